"""Which candidate to ship, by one rule for sweeps and comparisons. Pure.

The cheapest candidate ships of which the rows show that it loses no more than the tolerance against the best, by every
metric that decides; the best by score ships where they show it of none that is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evaluation.intervals import FEWEST_ROWS, SHARES
from evaluation.paired import Comparison
from jobs.words import counted, unsigned_zero

SHARE_TOLERANCE = 0.01
"""What may be lost of a metric between 0 and 1 where the job does not say."""
RELATIVE_TOLERANCE = 0.01
"""What may be lost of any other, as a part of the best's value."""


_MOST_NAMED = 5


@dataclass(frozen=True)
class Option:
    """A candidate with what the decision needs of it."""

    name: str
    score: float
    """The first metric, turned so that more is better."""
    price: float | None
    """What it costs; None where that is not known."""


@dataclass(frozen=True)
class Decision:
    """What was chosen, and what the rows show of the others."""

    chosen: Option
    best: Option
    """The best by score: of equals the cheapest."""
    eligible: tuple[Option, ...]
    """The best, and all of which it is shown that they lose no more than the tolerance."""
    worse: tuple[Option, ...]
    """Those of which it is shown that they are worse than the best."""
    undecided: tuple[Option, ...]
    """Those that are cheaper than what was chosen, of which neither is shown."""
    incomparable: tuple[Option, ...]
    """Those of which no result row by row is known."""
    rows: int
    """Rows that it was decided on; 0 where that is not known."""

    @property
    def too_few_rows(self) -> bool:
        """Whether no difference between two candidates could be shown on so many rows."""
        return 0 < self.rows < FEWEST_ROWS


def tolerance_of(metric: str, given: float | None, best: float) -> float:
    """Return how much of a metric may be lost: what the job says, or 0.01 of a share and 1 % of anything else."""
    if given is not None:
        return given
    return SHARE_TOLERANCE if metric in SHARES else RELATIVE_TOLERANCE * abs(best)


def decide(
    options: Sequence[Option],
    comparisons: Sequence[Comparison],
    tolerances: Mapping[str, float | None],
    rows: int,
    slack: float = 1.0,
) -> Decision:
    """Choose among options, of which the first are better where all else is equal.

    `comparisons` are by each metric that decides, the first by which the best is found. With `slack` above 1, prices up
    to so many times the least are the least.
    """
    best = max(options, key=lambda one: (one.score, -_price(one)))
    eligible, worse, incomparable = [best], [], []
    undecided = []
    for one in options:
        if one is best:
            continue
        if len(comparisons) < max(1, len(tolerances)) or any(
            {one.name, best.name} - set(each.names) for each in comparisons
        ):
            incomparable.append(one)
            continue
        if all(
            each.most_worse(one.name, best.name)
            <= tolerance_of(each.metric, tolerances.get(each.metric), each.value(best.name))
            for each in comparisons
        ):
            eligible.append(one)
        elif any(each.is_worse(one.name, best.name) for each in comparisons):
            worse.append(one)
        else:
            undecided.append(one)
    priced = [one for one in eligible if one.price is not None]
    least = min((_price(one) for one in priced), default=0.0)
    near = [one for one in priced if _price(one) <= slack * least]
    chosen = max(near, key=lambda one: (one.score, -_price(one))) if near else best
    cheaper = tuple(one for one in undecided if _price(one) < _price(chosen))
    return Decision(chosen, best, tuple(eligible), tuple(worse), cheaper, tuple(incomparable), rows)


def _price(one: Option) -> float:
    return math.inf if one.price is None else one.price


@dataclass(frozen=True)
class Words:
    """How a sentence speaks of the options."""

    noun: str
    """What one of them is: an arm, a configuration."""
    rows: str
    """What they were judged on: validation rows."""
    called: Callable[[str], str]
    """What an option is called where it is first named."""
    price: Callable[[Option], str]
    """What it costs."""


def sentence(
    decision: Decision,
    comparisons: Sequence[Comparison],
    tolerances: Mapping[str, float | None],
    words: Words,
    scored: Callable[[str], str],
) -> str:
    """Say what ships and why; `scored` writes an option's metric with its interval."""
    chosen, best = decision.chosen, decision.best
    on = f"on {counted(decision.rows, words.rows) if decision.rows else f'the {words.rows}s'}"
    if decision.too_few_rows:
        return (
            f"Too few rows to decide: the score is of {counted(decision.rows, words.rows)}, and {FEWEST_ROWS} are the "
            f"least on which two {words.noun}s can be told apart. The best score is that of {words.called(best.name)}: "
            f"{scored(best.name)}."
        )
    ship = f"Ship {words.called(chosen.name)}:"
    if chosen is not best:
        lost = "; ".join(_loss(each, chosen.name, best.name, tolerances) for each in comparisons)
        said = (
            f"{ship} it costs least ({words.price(chosen)}) of the {len(decision.eligible)} that are shown to lose no "
            f"more than the tolerance {on}: {scored(chosen.name)}, against {scored(best.name)} of {best.name} "
            f"({words.price(best)}). {lost}."
        )
    else:
        said = f"{ship} it has the best {scored(best.name)} {on}"
        if len(decision.eligible) > 1:
            also = counted(len(decision.eligible) - 1, f"other {words.noun}")
            said += f", and costs least ({words.price(best)}): {also} would lose no more than the tolerance"
        elif decision.worse and not decision.undecided:
            nearest = max(decision.worse, key=lambda one: one.score)
            said += f"; the nearest that is shown to be worse is {nearest.name} ({_shown(comparisons, nearest, best)})"
        said += "."
    question = open_question(decision, comparisons, tolerances)
    said += f" {question}." if question else ""
    if decision.incomparable:
        names = ", ".join(one.name for one in decision.incomparable[:_MOST_NAMED])
        more = (
            f" and {len(decision.incomparable) - _MOST_NAMED} more" if len(decision.incomparable) > _MOST_NAMED else ""
        )
        said += f" What they did with each row is not stored, so these were judged by score alone: {names}{more}."
    return said


def _loss(comparison: Comparison, name: str, best: str, tolerances: Mapping[str, float | None]) -> str:
    """Say how much an option that ships loses against the best, by one metric."""
    tolerance = tolerance_of(comparison.metric, tolerances.get(comparison.metric), comparison.value(best))
    loss, most = comparison.worse(name, best), comparison.most_worse(name, best)
    return (
        f"It loses {unsigned_zero(loss)} of {comparison.metric}, at most {unsigned_zero(most)} (95 %, all compared at "
        f"once), where {tolerance:.2g} may be lost"
    )


def _shown(comparisons: Sequence[Comparison], one: Option, best: Option) -> str:
    """Write the difference by which an option is worse than the best, in the first metric that shows it."""
    each = next(each for each in comparisons if each.is_worse(one.name, best.name))
    ends, p_value = each.interval(best.name, one.name), each.p_value(best.name, one.name)
    assert ends is not None
    assert p_value is not None
    if each.goal == "minimize":
        ends = (-ends[1], -ends[0])
    return f"{each.metric} {unsigned_zero(each.worse(one.name, best.name))} worse {span(ends)}, p = {p_value:.3f}"


def open_question(
    decision: Decision, comparisons: Sequence[Comparison], tolerances: Mapping[str, float | None]
) -> str | None:
    """Say what the rows could not decide of the cheaper option that comes nearest, and how many rows would.

    None where nothing is open. The sentence begins with the option's name.
    """
    if not decision.undecided:
        return None
    near = max(decision.undecided, key=lambda one: one.score)
    best, needed = decision.best, 0
    parts = []
    for each in comparisons:
        tolerance = tolerance_of(each.metric, tolerances.get(each.metric), each.value(best.name))
        if each.most_worse(near.name, best.name) <= tolerance:
            continue
        ends = each.interval(best.name, near.name)
        if ends is None:
            parts.append(f"{each.metric} has no interval: {each.unsupported}")
            continue
        if each.goal == "minimize":
            ends = (-ends[1], -ends[0])
        loss = unsigned_zero(each.worse(near.name, best.name))
        parts.append(f"{each.metric} {loss} worse {span(ends)}, where {tolerance:.2g} may be lost")
        needed = max(needed, each.rows_to_decide(near.name, best.name, tolerance) or 0)
    more = f"; about {_rounded(needed):,} rows would decide it" if needed > decision.rows else ""
    others = len(decision.undecided) - 1
    also = f", nor of {counted(others, 'other')}" if others else ""
    return f"{near.name} costs less, but {counted(decision.rows, 'row')} cannot tell{also} ({'; '.join(parts)}){more}"


def span(ends: tuple[float, float]) -> str:
    """Write an interval."""
    return f"[{unsigned_zero(ends[0])}, {unsigned_zero(ends[1])}]"


def _rounded(rows: int) -> int:
    """Return a number of rows with two digits: it is an estimate."""
    digits: int = 10 ** max(0, len(str(rows)) - 2)
    return math.ceil(rows / digits) * digits
