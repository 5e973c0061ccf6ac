"""Which trial to ship: the smallest whose validation interval overlaps the best one's. Pure."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from jobs.report import OverFolds, Recommendation, Row
from jobs.rungs import Goal
from jobs.search_spec import FOLD

RULE = (
    "of the best configurations that were trained to the end (as many as search.keep), the one with the fewest trained "
    "parameters whose 95 % interval on the validation rows overlaps the best one's; among equals the better score"
)


def recommend(rows: list[Row], metric: str, goal: Goal, labels: dict[str, str], keep: int) -> Recommendation:
    """The recommendation for a table. `labels` has a trial's searched values in words; `keep` adapters are on disk.

    Trials that were cut are left out while any trial was trained to the end: a cut trial's score is of a shorter
    training, and its cost is not what it would be.
    """
    scored = [
        row
        for row in rows
        if row.state in ("finished", "stopped", "running")
        and row.fold is None
        and not row.repeats
        and _score(row, metric) is not None
    ]
    whole = [row for row in scored if row.state == "finished"] or scored
    if not whole:
        return Recommendation(trial_id=None, rule=RULE, sentence="No trial has a score yet, so there is none to ship.")
    whole = sorted(whole, key=lambda row: _score(row, metric) or 0.0, reverse=goal == "maximize")[:keep]
    best = whole[0]
    alike = [row for row in whole if row is best or _overlap(row, best, metric)]
    chosen = min(alike, key=lambda row: row.trainable_parameters or 0)  # the first, and so the better, of equals
    return Recommendation(
        trial_id=chosen.trial_id,
        rule=RULE,
        sentence=_sentence(chosen, best, len(alike), len(whole), metric, labels),
    )


def over_folds(rows: list[Row], metric: str, goal: Goal) -> list[OverFolds]:
    """Every configuration of a cross-validation with its mean over folds, the best first."""
    found: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for row in rows:
        score = _score(row, metric)
        if row.fold is not None and row.state == "finished" and score is not None:
            params = {path: value for path, value in row.params.items() if path != FOLD}
            found.setdefault(repr(params), (params, []))[1].append(score)
    made = [
        OverFolds(params=params, scores=scores, mean=fmean(scores), deviation=stdev(scores) if len(scores) > 1 else 0.0)
        for params, scores in found.values()
    ]
    sign = -1 if goal == "maximize" else 1
    return sorted(made, key=lambda one: (-len(one.scores), sign * one.mean))


def recommend_over_folds(
    rows: list[Row], folds: list[OverFolds], metric: str, labels: dict[str, str]
) -> Recommendation:
    """The configuration with the best mean over folds, as it was trained on the training rows as they are."""
    rule = f"the configuration with the best mean {metric} over the folds, trained on the training rows as they are"
    whole = [row for row in rows if row.fold is None and not row.repeats and _score(row, metric) is not None]
    if not whole or not folds:
        sentence = "The best configuration over the folds is not trained yet, so there is none to ship."
        return Recommendation(trial_id=None, rule=rule, sentence=sentence)
    row, best = whole[0], folds[0]
    what = f"Ship {row.trial_id}" + (f" ({labels[row.trial_id]})" if labels.get(row.trial_id) else "")
    over = f"{best.mean:.3f} ± {best.deviation:.3f} over {len(best.scores)} folds"
    second = f", against {folds[1].mean:.3f} ± {folds[1].deviation:.3f} of the next" if len(folds) > 1 else ""
    sentence = f"{what}: its configuration has the best mean {metric}, {over}{second} (± one standard deviation)."
    return Recommendation(trial_id=row.trial_id, rule=rule, sentence=sentence)


def _score(row: Row, metric: str) -> float | None:
    return row.metrics.get(metric)


def _overlap(row: Row, best: Row, metric: str) -> bool:
    own, other = row.intervals.get(metric), best.intervals.get(metric)
    return bool(own and other and own[0] <= other[1] and other[0] <= own[1])


def _sentence(chosen: Row, best: Row, alike: int, of: int, metric: str, labels: dict[str, str]) -> str:
    what = f"Ship {chosen.trial_id}" + (f" ({labels[chosen.trial_id]})" if labels.get(chosen.trial_id) else "")
    got = f"{metric} {_score(chosen, metric):.3f}{_span(chosen, metric)} on the validation rows"
    if chosen is best and of == 1:
        return f"{what}: {got}. It is the only configuration with a score."
    if chosen is best and alike == 1:
        return f"{what}: it has the best {got}, and no other's interval reaches it."
    if chosen is best:
        others = f"none of the {alike - 1} that" if alike > 2 else "the one other that"
        smaller = "is smaller" if alike > 2 else "is not smaller"
        return f"{what}: it has the best {got}, and {others} cannot be told apart from it {smaller}."
    size = f"{chosen.trainable_parameters:,}" if chosen.trainable_parameters else "?"
    other = f"{best.trainable_parameters:,}" if best.trainable_parameters else "?"
    return (
        f"{what}: {got} cannot be told apart from the best ({best.trial_id}: {_score(best, metric):.3f}"
        f"{_span(best, metric)}), and it is the smallest of the {alike} for which that holds "
        f"({size} trained parameters against {other})."
    )


def _span(row: Row, metric: str) -> str:
    interval = row.intervals.get(metric)
    return f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
