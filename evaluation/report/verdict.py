"""Check a recommendation before a user follows it.

It is checked against the baselines, and for known reasons to distrust it (cautions).
Sweeps and comparisons use the same checks; `plan` uses those that need only the rows.
Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorafleet.evaluation.metrics.intervals import SHARES, Interval
from lorafleet.evaluation.report.decide import (
    DEFAULT_RELATIVE_TOLERANCE,
    DEFAULT_SHARE_TOLERANCE,
    format_interval,
)
from lorafleet.jobs.runs.report import Baseline, Recommendation, Row
from lorafleet.jobs.schema.metrics import is_better
from lorafleet.jobs.schema.types import Goal
from lorafleet.jobs.text import format_count, format_decimal

FEW_ROWS = 100
"""With fewer rows a decision gets a caution."""
_MAX_NAMES = 5


def check_against_baselines(
    recommendation: Recommendation,
    metric: str,
    goal: Goal,
    value: float | None,
    interval: Interval | None,
    baselines: Sequence[Baseline],
    rows: str,
) -> tuple[Recommendation, list[str]]:
    """Withdraw a recommendation that does not beat the best baseline.

    Args:
        recommendation: Returned unchanged if nothing was decided.
        metric: The metric that decides.
        goal: Whether more or less of it is better.
        value: Metric of the recommended trial or arm.
        interval: Its 95 % interval.
        baselines: Baselines on the same rows.
        rows: What the rows are called, such as "validation rows".

    Returns:
        The recommendation, and a caution if the interval contains the baseline.
    """
    name = recommendation.arm or recommendation.trial_id
    # With too few rows nothing was decided, so there is nothing to withdraw: three rows do not show
    # that a model is no better than a baseline.
    if name is None or value is None or not recommendation.decided:
        return recommendation, []
    values = [(baseline.what, baseline.metrics.get(metric)) for baseline in baselines]
    candidates = [
        (description, baseline) for description, baseline in values if baseline is not None
    ]
    if metric in SHARES and goal == "maximize":
        candidates.append(("a model that is always wrong", 0.0))
    if not candidates:
        return recommendation, []
    pick = max if goal == "maximize" else min
    description, best = pick(candidates, key=lambda pair: pair[1])
    score = f"{metric} {format_decimal(value)}" + (
        f" {format_interval(interval)}" if interval else ""
    )
    if not is_better(value, best, goal):
        sentence = (
            f"Do not ship: on the {rows}, the best is {name} with {score}, which does not beat "
            f"{description} ({format_decimal(best)})."
        )
        return recommendation.model_copy(update={"sentence": sentence, "decided": False}), []
    if interval is None or not _is_baseline_in_interval(interval, best, goal):
        return recommendation, []
    return recommendation, [
        f"{name} ({score}) is not clearly better than {description} ({format_decimal(best)})."
    ]


def _is_baseline_in_interval(interval: Interval, baseline: float, goal: Goal) -> bool:
    """Return True if the interval does not exclude the baseline."""
    return interval[0] <= baseline if goal == "maximize" else interval[1] >= baseline


def check_rows(counts: Mapping[str, Mapping[str, int]], split: str, rows: int) -> list[str]:
    """Return cautions about the rows of a decision. Used by plans and reports.

    Args:
        counts: Split -> class -> rows; empty without classes.
        split: The split that decides.
        rows: Its number of rows; 0 if unknown.
    """
    cautions = []
    if 0 < rows < FEW_ROWS:
        cautions.append(
            f"The decision is based on {format_count(rows, f'{split} row')}; with fewer than "
            f"{FEW_ROWS}, only large differences can be shown."
        )
    for name in dict.fromkeys((split, "test")):
        split_counts = counts.get(name, {})
        empty = [label for label, count in split_counts.items() if not count]
        if empty and any(split_counts.values()):
            if len(empty) == 1:
                classes, possessive = "1 class has", "its"
            else:
                classes, possessive = f"{len(empty)} classes have", "their"
            cautions.append(
                f"{classes} no {name} rows, so {possessive} quality is unknown: "
                f"{_list_names(empty)}."
            )
    return cautions


def check_predictions(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> list[str]:
    """Return a caution about classes that a classifier never predicts.

    Args:
        confusion: Rows by true class (outer) and predicted class (inner); empty if unknown.
        labels: Class names, in the same order. Classes without rows are not reported here.
    """
    if not confusion:
        return []
    missing = []
    for index, label in enumerate(labels):
        if sum(confusion[index]) and not any(line[index] for line in confusion):
            missing.append(label)
    if not missing:
        return []
    classes = "1 class is" if len(missing) == 1 else f"{len(missing)} classes are"
    return [f"{classes} never predicted: {_list_names(missing)}."]


def check_convergence(name: str | None, row: Row | None, metric: str, goal: Goal) -> list[str]:
    """Return a caution if a trial was still improving when its training ended.

    Args:
        name: What the report calls the trial: its id, or the arm that it belongs to.
        row: The trial; None if there is none.
        metric: The metric that decides.
        goal: Whether more or less of it is better.

    Returns:
        One sentence if its last evaluation improved on the best earlier one by more than
            the default tolerance, else an empty list.
    """
    values = [point[metric] for point in row.curve if point.get(metric) is not None] if row else []
    if row is None or len(values) < 2:
        return []
    *earlier, last = values
    previous = max(earlier) if goal == "maximize" else min(earlier)
    gain = last - previous if goal == "maximize" else previous - last
    threshold = (
        DEFAULT_SHARE_TOLERANCE if metric in SHARES else DEFAULT_RELATIVE_TOLERANCE * abs(last)
    )
    if gain <= threshold:
        return []
    return [
        f"The {metric} of {name} was still improving when its training ended ({previous:.3f}, then "
        f"{last:.3f}). Longer training may help."
    ]


def check_scores(metric: str, values: Sequence[float | None]) -> list[str]:
    """Return a caution if every candidate has the score 0."""
    scores = [value for value in values if value is not None]
    # A loss of 0 is a perfect score, so only metrics between 0 and 1 are checked.
    if len(scores) < 2 or any(scores) or metric not in SHARES:
        return []
    return [
        f"All {len(scores)} candidates have {metric} 0. Check the metric and the format of the "
        "answers."
    ]


def _list_names(labels: Sequence[str]) -> str:
    names = ", ".join(labels[:_MAX_NAMES])
    hidden = len(labels) - _MAX_NAMES
    return f"{names} and {hidden} more" if hidden > 0 else names
