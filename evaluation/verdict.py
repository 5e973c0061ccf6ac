"""Whether what was chosen is worth shipping, and what to be careful about. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evaluation.decide import span, tolerance_of
from evaluation.intervals import SHARES
from jobs.metrics import is_better
from jobs.report import Baseline, Recommendation, Row
from jobs.rungs import Goal
from jobs.words import counted, unsigned_zero

FEW_ROWS = 100
"""Below so many rows a decision gets a remark."""
_MOST_NAMED = 5


def checked(
    recommendation: Recommendation,
    metric: str,
    goal: Goal,
    value: float | None,
    ends: tuple[float, float] | None,
    baselines: Sequence[Baseline],
    rows: str,
) -> tuple[Recommendation, list[str]]:
    """Return (the recommendation, which does not say `Ship` of what does not beat the best baseline; remarks on it).

    `value` is the metric of what was chosen and `ends` its interval, on the rows that the baselines are of, which
    `rows` names.
    """
    chosen = recommendation.arm or recommendation.trial_id
    if chosen is None or value is None:
        return recommendation, []
    known = [(one.what, found) for one in baselines if (found := one.metrics.get(metric)) is not None]
    if metric in SHARES and goal == "maximize":
        known.append(("being never right", 0.0))
    if not known:
        return recommendation, []
    what, best = (max if goal == "maximize" else min)(known, key=lambda one: one[1])
    had = f"{metric} {unsigned_zero(value)}" + (f" {span(ends)}" if ends else "")
    if not is_better(value, best, goal):
        sentence = (
            f"Nothing here is worth shipping: on the {rows} {chosen} is the best with {had}, and {what} has "
            f"{unsigned_zero(best)}."
        )
        return recommendation.model_copy(update={"sentence": sentence, "decided": False}), []
    reaches = ends is not None and (ends[0] <= best if goal == "maximize" else ends[1] >= best)
    remark = f"the {had} of {chosen} cannot be told apart from the {unsigned_zero(best)} of {what}"
    return recommendation, [remark] if reaches else []


def of_rows(counts: Mapping[str, Mapping[str, int]], split: str, rows: int) -> list[str]:
    """Return remarks on the rows that decide: too few of them, classes without any. `counts` has them by split, class.

    They are the same in a plan and in a report.
    """
    found = []
    if 0 < rows < FEW_ROWS:
        found.append(
            f"the decision rests on {counted(rows, f'{split} row')}: with fewer than {FEW_ROWS} little is shown"
        )
    for name in dict.fromkeys((split, "test")):
        missing = [label for label, count in counts.get(name, {}).items() if not count]
        if missing and any(counts[name].values()):
            are = "class has" if len(missing) == 1 else "classes have"
            found.append(f"{len(missing)} {are} no {name} row: {_named(missing)}; nothing is known of them")
    return found


def of_model(
    metric: str, goal: Goal, row: Row | None, confusion: Sequence[Sequence[int]], labels: Sequence[str]
) -> list[str]:
    """Return remarks on what was chosen: classes that it never says, a metric that was still getting better."""
    found = []
    silent = [
        label
        for place, label in enumerate(labels)
        if confusion and sum(confusion[place]) and not any(line[place] for line in confusion)
    ]
    if silent:
        are = "class is" if len(silent) == 1 else "classes are"
        found.append(f"{len(silent)} {are} never predicted: {_named(silent)}")
    points = [(point["step"], point[metric]) for point in row.curve if point.get(metric) is not None] if row else []
    if len(points) > 1:
        *before, (_, last) = points
        best = (max if goal == "maximize" else min)(value for _, value in before)
        gained = (last - best) * (1 if goal == "maximize" else -1)
        if gained > tolerance_of(metric, None, last):
            found.append(
                f"the {metric} of {row.trial_id if row else ''} was still getting better when its training ended "
                f"({best:.3f}, then {last:.3f}): longer training may give more"
            )
    return found


def of_scores(metric: str, values: Sequence[float | None]) -> list[str]:
    """Return a remark where everything scored 0."""
    known = [value for value in values if value is not None]
    if len(known) > 1 and not any(known) and metric in SHARES:
        return [f"all {len(known)} have {metric} 0: the metric or the answers' form may be wrong"]
    return []


def _named(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _MOST_NAMED} more" if len(labels) > _MOST_NAMED else ""
    return ", ".join(labels[:_MOST_NAMED]) + more
