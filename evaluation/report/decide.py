"""Decide which candidate to ship.

Sweeps, folds and comparisons share this rule. A candidate is eligible if the rows show
that it loses at most the tolerance against the best candidate, in every deciding
metric. The cheapest eligible candidate ships. If no cheaper candidate is eligible, the
best by score ships.

The burden of proof is on the cheaper candidate (a test of non-inferiority). The
opposite rule, "ship the cheapest that is not shown to be worse", would ship the
cheapest one whenever there are few rows. docs/concepts.md explains the rule to users.
Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lorafleet.evaluation.metrics.intervals import MIN_ROWS, SHARES
from lorafleet.evaluation.metrics.paired import Comparison
from lorafleet.evaluation.report.format import describe_p_value
from lorafleet.jobs.text import format_count, format_decimal

DEFAULT_SHARE_TOLERANCE = 0.01
"""Default tolerance for metrics between 0 and 1."""
DEFAULT_RELATIVE_TOLERANCE = 0.01
"""Default tolerance for all other metrics, relative to the value of the best candidate."""
_MAX_NAMES = 5

Tolerances = Mapping[str, float | None]
"""Metric -> how much of it may be lost. None selects the default of the metric."""


@dataclass(frozen=True)
class Option:
    """A candidate with its score and cost."""

    name: str
    score: float
    """The first metric, with the sign that makes larger values better."""
    cost: float | None
    """Cost in the unit of the decision; None if it was not measured."""


@dataclass(frozen=True)
class Decision:
    """The chosen option, and what the rows show about the others.

    Every option is the best, or in exactly one of the other four groups. `explain` turns a
    decision into sentences.
    """

    chosen: Option
    best: Option
    """The option with the best score; the cheapest of equals."""
    eligible: tuple[Option, ...]
    """The best, and all options that lose at most the tolerance."""
    worse: tuple[Option, ...]
    """Options that are shown to be worse than the best."""
    undecided: tuple[Option, ...]
    """Options for which the rows show neither."""
    unranked: tuple[Option, ...]
    """Options without per-row results."""
    rows: int
    """Number of rows; 0 if unknown."""

    @property
    def cheaper_undecided(self) -> list[Option]:
        """The undecided options that are cheaper than the chosen one."""
        return [option for option in self.undecided if _get_cost(option) < _get_cost(self.chosen)]

    @property
    def has_too_few_rows(self) -> bool:
        """True if no difference could be shown with so few rows."""
        return 0 < self.rows < MIN_ROWS


def resolve_tolerance(comparison: Comparison, tolerances: Tolerances, best: str) -> float:
    """Return how much of a metric may be lost against the best candidate, in its own units.

    Args:
        comparison: The comparison in this metric.
        tolerances: Tolerances of the job.
        best: Name of the best candidate. The default of a metric without bounds is a share
            of its value.
    """
    tolerance = tolerances.get(comparison.metric)
    if tolerance is not None:
        return tolerance
    if comparison.metric in SHARES:
        return DEFAULT_SHARE_TOLERANCE
    return DEFAULT_RELATIVE_TOLERANCE * abs(comparison.get_value(best))


def describe_tolerances(tolerances: Tolerances) -> str:
    """Return the tolerances as text, such as "0.01 of accuracy and 1 % of perplexity"."""
    texts = []
    for metric, tolerance in tolerances.items():
        if tolerance is None and metric not in SHARES:
            texts.append(f"{DEFAULT_RELATIVE_TOLERANCE:.0%} of {metric}".replace("%", " %"))
        else:
            texts.append(
                f"{DEFAULT_SHARE_TOLERANCE if tolerance is None else tolerance:g} of {metric}"
            )
    return " and ".join(texts)


def decide(
    options: Sequence[Option],
    comparisons: Sequence[Comparison],
    tolerances: Tolerances,
    rows: int,
    slack: float = 1.0,
) -> Decision:
    """Choose one of the options.

    Args:
        options: At least one. Earlier options win ties.
        comparisons: One per deciding metric, the first metric first.
        tolerances: One entry per deciding metric.
        rows: Number of rows; 0 if unknown.
        slack: Costs up to this factor above the lowest count as equal.

    Returns:
        The decision. With too few rows (`has_too_few_rows`) it still has a choice, which
            callers replace by the best.
    """
    # The cheapest of equal scores is the reference: otherwise it would have to be shown to be
    # equal, which needs rows.
    best = max(options, key=lambda option: (option.score, -_get_cost(option)))
    eligible, worse, undecided, unranked = [best], [], [], []
    for option in options:
        if option is best:
            continue
        # Without per-row results nothing can be shown about an option, neither that it may ship nor
        # that it is worse. Runs of earlier versions did not store them.
        if not _are_compared(option, best, comparisons, len(tolerances)):
            unranked.append(option)
        elif _is_within_tolerance(option, best, comparisons, tolerances):
            eligible.append(option)
        elif any(each.is_worse(option.name, best.name) for each in comparisons):
            worse.append(option)
        else:
            undecided.append(option)
    chosen = _find_cheapest(eligible, best, slack)
    return Decision(
        chosen=chosen,
        best=best,
        eligible=tuple(eligible),
        worse=tuple(worse),
        undecided=tuple(undecided),
        unranked=tuple(unranked),
        rows=rows,
    )


def _are_compared(
    option: Option, best: Option, comparisons: Sequence[Comparison], metrics: int
) -> bool:
    """Return True if both options were compared in every deciding metric."""
    if len(comparisons) < max(1, metrics):
        return False
    return all({option.name, best.name} <= set(each.names) for each in comparisons)


def _is_within_tolerance(
    option: Option, best: Option, comparisons: Sequence[Comparison], tolerances: Tolerances
) -> bool:
    """Return True if the rows show that an option loses at most the tolerance in every metric."""
    return all(
        each.compute_max_loss(option.name, best.name)
        <= resolve_tolerance(each, tolerances, best.name)
        for each in comparisons
    )


def _find_cheapest(eligible: Sequence[Option], best: Option, slack: float) -> Option:
    """Return the cheapest option; among equal costs the one with the best score.

    Options whose cost was not measured are never the cheapest. `best` is returned if none
    was.

    Args:
        eligible: Options that may ship.
        best: The option with the best score.
        slack: Costs up to this factor above the lowest count as equal.
    """
    measured = [option for option in eligible if option.cost is not None]
    if not measured:
        return best
    lowest = min(map(_get_cost, measured))
    cheap = [option for option in measured if _get_cost(option) <= slack * lowest]
    return max(cheap, key=lambda option: (option.score, -_get_cost(option)))


def _get_cost(option: Option) -> float:
    """Return the cost of an option; infinity if it was not measured."""
    return math.inf if option.cost is None else option.cost


@dataclass(frozen=True)
class Wording:
    """How sentences refer to options."""

    noun: str
    """Singular noun for an option, such as "arm"."""
    row_noun: str
    """Singular noun for a row, such as "validation row"."""
    describe: Callable[[str], str]
    """Option name -> its name with a short description."""
    format_cost: Callable[[Option], str]
    """Option -> its cost with the unit."""
    format_score: Callable[[str], str]
    """Option name -> its score with the interval."""


def explain(
    decision: Decision,
    comparisons: Sequence[Comparison],
    tolerances: Tolerances,
    wording: Wording,
) -> str:
    """Return the recommendation with its reason, in a few sentences.

    Args:
        decision: What `decide` returned.
        comparisons: The comparisons that it was made from.
        tolerances: Tolerances of the job.
        wording: How options, rows, costs and scores are called.
    """
    if decision.has_too_few_rows:
        return _explain_too_few_rows(decision, wording)
    if decision.chosen is decision.best:
        sentences = [_explain_best(decision, comparisons, wording)]
    else:
        sentences = _explain_cheaper(decision, comparisons, tolerances, wording)
    open_question = explain_open_question(decision, comparisons, tolerances, wording)
    if open_question:
        sentences.append(open_question)
    if decision.unranked:
        names = _list_names(decision.unranked)
        sentences.append(
            f"There are no comparable per-row results of {names} (not stored or not finite); only "
            "their scores were compared."
        )
    return " ".join(sentences)


def _explain_too_few_rows(decision: Decision, wording: Wording) -> str:
    best = decision.best.name
    return (
        f"Too few rows to decide: there are {format_count(decision.rows, wording.row_noun)}, but "
        f"at least {MIN_ROWS} are needed to compare two {wording.noun}s. {wording.describe(best)} "
        f"has the best score: {wording.format_score(best)}."
    )


def _explain_best(decision: Decision, comparisons: Sequence[Comparison], wording: Wording) -> str:
    """Explain why the best option ships: nothing cheaper is shown to be good enough."""
    best = decision.best
    sentence = (
        f"Ship {wording.describe(best.name)}: it has the best score, "
        f"{wording.format_score(best.name)}, on "
    )
    sentence += f"{_format_row_count(decision, wording)}."
    others = len(decision.eligible) - 1
    if others:
        verb = "is" if others == 1 else "are"
        return (
            f"{sentence} {format_count(others, f'other {wording.noun}')} {verb} within the "
            f"tolerance, but not clearly cheaper ({wording.format_cost(best)} for {best.name})."
        )
    if decision.cheaper_undecided:
        return sentence
    if decision.undecided:
        verb = "is" if len(decision.undecided) == 1 else "are"
        sentence += (
            f" {_list_names(decision.undecided)} {verb} not shown to be worse, but not cheaper "
            "either."
        )
    elif decision.worse:
        nearest = max(decision.worse, key=lambda option: option.score)
        sentence += f" {_explain_worse(nearest, best, comparisons)}"
    return sentence


def _explain_worse(option: Option, best: Option, comparisons: Sequence[Comparison]) -> str:
    """Explain in which metric an option is worse than the best, with interval and p-value."""
    comparison = next(each for each in comparisons if each.is_worse(option.name, best.name))
    interval = comparison.compute_loss_interval(option.name, best.name)
    p_value = comparison.compute_p_value(option.name, best.name)
    loss = format_decimal(comparison.compute_loss(option.name, best.name))
    ends = format_interval(interval) if interval else ""
    p_text = "" if p_value is None else f" ({describe_p_value(p_value)})"
    return (
        f"The next best, {option.name}, is worse in {comparison.metric} by {loss} {ends}{p_text}."
    )


def _explain_cheaper(
    decision: Decision, comparisons: Sequence[Comparison], tolerances: Tolerances, wording: Wording
) -> list[str]:
    """Explain a choice that is cheaper than the best: its cost, its score, what it may lose."""
    chosen, best = decision.chosen, decision.best
    lowest = min(map(_get_cost, decision.eligible))
    about = "" if _get_cost(chosen) == lowest else "about "
    sentences = [
        f"Ship {wording.describe(chosen.name)}: it has {about}the lowest cost "
        f"({wording.format_cost(chosen)}) of the {len(decision.eligible)} {wording.noun}s within "
        "the tolerance.",
        f"Its score on {_format_row_count(decision, wording)} is "
        f"{wording.format_score(chosen.name)}; the best is {wording.format_score(best.name)} of "
        f"{best.name} ({wording.format_cost(best)}).",
    ]
    for each in comparisons:
        loss = format_decimal(each.compute_loss(chosen.name, best.name))
        max_loss = format_decimal(each.compute_max_loss(chosen.name, best.name))
        tolerance = resolve_tolerance(each, tolerances, best.name)
        sentences.append(
            f"It loses {loss} in {each.metric}, at most {max_loss} with 95 % confidence (tolerance "
            f"{tolerance:.2g})."
        )
    return sentences


def explain_open_question(
    decision: Decision, comparisons: Sequence[Comparison], tolerances: Tolerances, wording: Wording
) -> str | None:
    """Describe the best cheaper option that the rows could not decide on.

    Args:
        decision: What `decide` returned.
        comparisons: The comparisons that it was made from.
        tolerances: Tolerances of the job.
        wording: How options and rows are called.

    Returns:
        Sentences with its loss in each undecided metric and how many rows would be enough;
            None if there is no such option.
    """
    undecided = decision.cheaper_undecided
    if not undecided:
        return None
    option, best = max(undecided, key=lambda candidate: candidate.score), decision.best
    losses, rows_needed = [], 0
    for comparison in comparisons:
        tolerance = resolve_tolerance(comparison, tolerances, best.name)
        # Kept in this metric; another one is undecided.
        if comparison.compute_max_loss(option.name, best.name) <= tolerance:
            continue
        interval = comparison.compute_loss_interval(option.name, best.name)
        if interval is None:
            losses.append(f"{comparison.metric} has no interval ({comparison.missing_reason})")
            continue
        loss = format_decimal(comparison.compute_loss(option.name, best.name))
        losses.append(
            f"it loses {loss} {format_interval(interval)} in {comparison.metric} (tolerance "
            f"{tolerance:.2g})"
        )
        rows_needed = max(
            rows_needed, comparison.estimate_rows_needed(option.name, best.name, tolerance) or 0
        )
    sentence = (
        f"{option.name} is cheaper ({wording.format_cost(option)}), but "
        f"{_format_row_count(decision, wording)} are not enough to show whether it is within the "
        f"tolerance: {'; '.join(losses)}."
    )
    # The estimate can fall below the rows that were not enough, by rounding or if it is undefined.
    if rows_needed > decision.rows:
        sentence += f" About {_round_up(rows_needed):,} rows would be enough."
    others = len(undecided) - 1
    if others:
        sentence += f" The same is true for {format_count(others, f'other {wording.noun}')}."
    return sentence


def _format_row_count(decision: Decision, wording: Wording) -> str:
    return (
        format_count(decision.rows, wording.row_noun)
        if decision.rows
        else f"the {wording.row_noun}s"
    )


def _list_names(options: Sequence[Option]) -> str:
    names = ", ".join(option.name for option in options[:_MAX_NAMES])
    hidden = len(options) - _MAX_NAMES
    return f"{names} and {hidden} more" if hidden > 0 else names


def format_interval(interval: tuple[float, float]) -> str:
    """Format an interval as `[low, high]`."""
    return f"[{format_decimal(interval[0])}, {format_decimal(interval[1])}]"


def _round_up(rows: int) -> int:
    """Round a number of rows up to two digits: it is an estimate, and 1,234 would look exact."""
    digit: int = 10 ** max(0, len(str(rows)) - 2)
    return math.ceil(rows / digit) * digit
