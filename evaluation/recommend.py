"""Which trial of a search to ship: the smallest that is shown to lose little against the best. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from evaluation.choose import may_lose_all
from evaluation.decide import Decision, Option, Words, decide, sentence, span
from evaluation.paired import DRAWS, Candidate, Comparison
from evaluation.results import RowResults
from jobs.report import OverFolds, Recommendation, Row
from jobs.rungs import Goal
from jobs.search import without_fold

MOST_COMPARED = 50
"""Configurations, the best by score, that are compared with each other row by row."""


@dataclass(frozen=True)
class Choosing:
    """By what a search chooses."""

    metric: str
    goal: Goal
    tolerances: Mapping[str, float | None]
    """How much of each metric that decides may be lost, the first first; None: as the metric has it."""
    also: tuple[tuple[str, Goal], ...] = ()
    """Further metrics, and which way is better."""
    keep: int = 5
    """Adapters on disk: those of this many best trials."""
    rows: int = 0
    """Validation rows."""
    draws: int = DRAWS
    labels: Mapping[str, str] = field(default_factory=dict)
    """Trial -> its searched values in words."""

    def rule(self, of: str) -> str:
        """Return the rule in words; `of` says which configurations it is about."""
        return (
            f"{of}, the one with the fewest trained parameters that the validation rows show to lose at most "
            f"{may_lose_all(self.tolerances)} against the best (simultaneous 95 % intervals of paired "
            "differences); where they show it of none, the best"
        )


def recommend(rows: list[Row], choosing: Choosing, results: Mapping[str, RowResults]) -> Recommendation:
    """Return the recommendation for a table. `results` are what trials did with each validation row.

    Trials that were cut are left out while any trial was trained to the end: a cut trial's score is of a shorter
    training, and its cost is not what it would be.
    """
    metric, keep = choosing.metric, choosing.keep
    rule = choosing.rule("of the best configurations that were trained to the end (as many as search.keep)")
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
        return Recommendation(trial_id=None, rule=rule, sentence="No trial has a score yet, so there is none to ship.")
    whole = sorted(whole, key=lambda row: _score(row, metric) or 0.0, reverse=choosing.goal == "maximize")
    family = {row.trial_id: results[row.trial_id] for row in whole[:MOST_COMPARED] if row.trial_id in results}
    comparisons = _comparisons(family, choosing)
    decision = decide(_options(whole[:keep], choosing), comparisons, choosing.tolerances, _rows(family, choosing))
    by_id = {row.trial_id: row for row in whole}
    chosen = by_id[decision.best.name if decision.too_few_rows else decision.chosen.name]

    def called(trial_id: str) -> str:
        return f"{trial_id} ({choosing.labels[trial_id]})" if choosing.labels.get(trial_id) else trial_id

    said = sentence(
        decision,
        comparisons,
        choosing.tolerances,
        Words("configuration", "validation row", called, _price),
        lambda trial_id: f"{metric} {_with_span(by_id[trial_id], metric)}",
    )
    if len(whole) == 1:
        ended = "trained to the end" if whole[0].state == "finished" else "with a score"
        said += f" It is the only configuration {ended}, so there was nothing to choose."
    return Recommendation(trial_id=chosen.trial_id, rule=rule, sentence=said, decided=not decision.too_few_rows)


def _comparisons(family: Mapping[str, RowResults], choosing: Choosing) -> list[Comparison]:
    """Compare trials that have results of the same rows; nothing where there are not two."""
    lengths, found = [len(one) for one in family.values()], []
    for metric, goal in ((choosing.metric, choosing.goal), *choosing.also):
        alike = {name: one for name, one in family.items() if len(one) == max(lengths) and one.has(metric)}
        if len(alike) > 1:
            candidates = [Candidate(name, [one]) for name, one in alike.items()]
            found.append(Comparison(candidates, metric, goal, choosing.draws))
    return found


def _options(rows: Sequence[Row], choosing: Choosing) -> list[Option]:
    sign = 1 if choosing.goal == "maximize" else -1
    return [
        Option(row.trial_id, sign * (_score(row, choosing.metric) or 0.0), row.trainable_parameters) for row in rows
    ]


def _rows(family: Mapping[str, RowResults], choosing: Choosing) -> int:
    return max((len(one) for one in family.values()), default=choosing.rows)


def _price(option: Option) -> str:
    return "size not known" if option.price is None else f"{option.price:,} trained parameters"


def over_folds(rows: list[Row], metric: str, goal: Goal) -> list[OverFolds]:
    """Every configuration of a cross-validation with its mean over folds, the best first."""
    found: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for row in rows:
        score = _score(row, metric)
        if row.fold is not None and row.state == "finished" and score is not None:
            params = without_fold(row.params)
            found.setdefault(repr(params), (params, []))[1].append(score)
    made = [
        OverFolds(params=params, scores=scores, mean=fmean(scores), deviation=stdev(scores) if len(scores) > 1 else 0.0)
        for params, scores in found.values()
    ]
    sign = -1 if goal == "maximize" else 1
    return sorted(made, key=lambda one: (-len(one.scores), sign * one.mean))


def decide_over_folds(
    folds: list[OverFolds], choosing: Choosing, results: Mapping[str, RowResults], sizes: Mapping[str, int | None]
) -> tuple[Decision, list[Comparison]]:
    """Choose among configurations by the same rule: what each did with every row of all folds, by `name_of` it.

    Those that a fold is missing of are left out while another has all.
    """
    most = len(folds[0].scores)
    whole = [one for one in folds if len(one.scores) == most]
    sign = 1 if choosing.goal == "maximize" else -1
    options = [Option(name_of(one), sign * one.mean, sizes.get(name_of(one))) for one in whole]
    family = {name_of(one): results[name_of(one)] for one in whole[:MOST_COMPARED] if name_of(one) in results}
    comparisons = _comparisons(family, choosing)
    return decide(options, comparisons, choosing.tolerances, _rows(family, choosing)), comparisons


def name_of(one: OverFolds) -> str:
    """Return what a configuration is called among others."""
    return repr(one.params)


def recommend_over_folds(
    rows: list[Row],
    folds: list[OverFolds],
    choosing: Choosing,
    results: Mapping[str, RowResults],
) -> Recommendation:
    """Return the configuration that the folds choose, as it was trained on the training rows as they are."""
    metric = choosing.metric
    rule = choosing.rule("of the configurations, over the validation rows of all folds together")
    whole = [row for row in rows if row.fold is None and not row.repeats and _score(row, metric) is not None]
    if not whole or not folds:
        said = "The best configuration over the folds is not trained yet, so there is none to ship."
        return Recommendation(trial_id=None, rule=rule, sentence=said)
    row = whole[0]
    params = without_fold(row.params)
    sizes = {repr(without_fold(one.params)): one.trainable_parameters for one in rows}
    decision, comparisons = decide_over_folds(folds, choosing, results, sizes)
    by_name = {name_of(one): one for one in folds}

    def called(name: str) -> str:
        if name != repr(params):
            return described(by_name[name].params)
        return (
            f"{row.trial_id} ({choosing.labels[row.trial_id]})" if choosing.labels.get(row.trial_id) else row.trial_id
        )

    def scored(name: str) -> str:
        one = by_name[name]
        return f"mean {metric} {one.mean:.3f} ± {one.deviation:.3f} over {len(one.scores)} folds"

    said = sentence(decision, comparisons, choosing.tolerances, Words("configuration", "row", called, _price), scored)
    if repr(params) not in (decision.chosen.name, decision.best.name):
        said = f"{row.trial_id} was trained whole, by the rule of an earlier version. By this one: {said}"
    return Recommendation(trial_id=row.trial_id, rule=rule, sentence=said, decided=not decision.too_few_rows)


def described(params: Mapping[str, Any]) -> str:
    """Return searched values in words."""
    return ", ".join(f"{path.rpartition('.')[2]}={value}" for path, value in params.items())


def _score(row: Row, metric: str) -> float | None:
    return row.metrics.get(metric)


def _with_span(row: Row, metric: str) -> str:
    ends = row.intervals.get(metric)
    return f"{_score(row, metric):.3f}{f' {span(ends)}' if ends else ''}"
