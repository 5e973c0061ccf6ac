"""Which arm of a comparison to ship, by the rule that the job file names. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from evaluation.decide import Option, Words, decide, sentence, tolerance_of
from evaluation.intervals import SHARES
from evaluation.paired import Comparison
from jobs.compare import Cost, Rule
from jobs.report import Arm, Recommendation
from jobs.rungs import Goal

SAME_TIME = 1.05
"""Times that differ by less are the same: twice the same training takes times further apart."""
_TIMES = ("train_seconds", "gpu_hours", "latency_ms")

COSTS: dict[str, tuple[str, str, Callable[[Arm], float | None]]] = {
    "train_seconds": ("seconds of training", ".1f", lambda arm: arm.train_seconds),
    "gpu_hours": ("GPU-hours of training", ".3f", lambda arm: arm.gpu_hours),
    "peak_memory_gib": ("GiB in training", ".2f", lambda arm: arm.peak_memory_gib),
    "inference_memory_gib": (
        "GiB in inference",
        ".2f",
        lambda arm: arm.inference.peak_memory_gib if arm.inference else None,
    ),
    "latency_ms": ("ms until it answers", ".1f", lambda arm: first_ms(arm)),
    "weights_mb": ("MB of trained weights", ".1f", lambda arm: arm.weights_mb),
}
"""Cost -> what it is, how it is written, and an arm's."""


def first_ms(arm: Arm) -> float | None:
    """Milliseconds until an arm's model says something: to the first token, or a row's class."""
    found = arm.inference
    if found is None:
        return None
    return found.ttft_ms if found.ttft_ms is not None else found.latency_ms


@dataclass(frozen=True)
class Choice:
    """How to choose."""

    rule: Rule
    metric: str
    goal: Goal
    cost: Cost
    within: float = 0.0
    tolerances: Mapping[str, float | None] = field(default_factory=dict)
    """Metric -> how much of it may be lost; None where the job does not say."""
    rows: int = 0
    """Held-out rows."""

    def score(self, arm: Arm) -> float:
        """An arm's metric, turned so that more is better."""
        value = arm.metrics.get(self.metric)
        assert value is not None
        return value if self.goal == "maximize" else -value

    @property
    def slack(self) -> float:
        """Costs up to so many times the least are the least."""
        return SAME_TIME if self.cost in _TIMES else 1.0

    def price(self, arm: Arm) -> float | None:
        """What an arm costs, in the cost that was asked for."""
        return COSTS[self.cost][2](arm)


def choose(arms: list[Arm], comparisons: Sequence[Comparison], choice: Choice) -> Recommendation:
    """Return the arm to ship, and why, in words. `comparisons` are by each metric that decides, the first first."""
    scored = [arm for arm in arms if arm.comparable and arm.metrics.get(choice.metric) is not None]
    unranked = [arm.arm for arm in arms if not arm.comparable]
    rule = rule_text(choice)
    if unranked and len(arms) - len(unranked) < 2:
        said = "Nothing is ranked: no two of them were judged alike (the remarks say what differs)."
        return Recommendation(trial_id=None, rule=rule, sentence=said)
    if not scored:
        return Recommendation(trial_id=None, rule=rule, sentence="No arm has a score yet.")
    options = {arm.arm: Option(arm.arm, choice.score(arm), choice.price(arm)) for arm in scored}
    decision = decide(list(options.values()), comparisons, choice.tolerances, choice.rows, choice.slack)
    by_name = {arm.arm: arm for arm in scored}
    if choice.rule == "cheapest_within_tolerance" or decision.too_few_rows:
        chosen = by_name[decision.chosen.name if not decision.too_few_rows else decision.best.name]
        words = Words("arm", "held-out row", lambda name: name, lambda one: _price(by_name[one.name], choice))
        said = sentence(decision, comparisons, choice.tolerances, words, lambda name: _got(by_name[name], choice))
    else:
        chosen, said = _by_score(scored, by_name[decision.best.name], comparisons, choice)
    if unranked:
        said += f" Not ranked beside the other {len(scored)}: {', '.join(unranked)}."
    return Recommendation(
        trial_id=chosen.trial_id,
        arm=chosen.arm,
        rule=rule,
        cost=choice.cost,
        sentence=said,
        adapter=chosen.weights,
        decided=not decision.too_few_rows,
    )


def _by_score(scored: list[Arm], best: Arm, comparisons: Sequence[Comparison], choice: Choice) -> tuple[Arm, str]:
    """Return (the arm, the sentence) of the rules that look at scores alone."""
    got = _got(best, choice)
    if choice.rule == "pareto":
        there = ", ".join(f"{arm.arm} ({_score(arm, choice)}, {_price(arm, choice)})" for arm in front(scored, choice))
        return (
            best,
            f"Ship {best.arm}: it has the best {got}. None beats these in both: {there or 'no cost was measured'}.",
        )
    if choice.rule == "best":
        return best, f"Ship {best.arm}: it has the best {got}{_against_next(best, scored, comparisons, choice)}."
    near = [arm for arm in scored if choice.score(arm) >= choice.score(best) - choice.within]
    priced = [arm for arm in near if choice.price(arm) is not None]
    if not priced:
        return best, f"Ship {best.arm}: it has the best {got}; {COSTS[choice.cost][0]} was measured of none."
    least = min(choice.price(arm) or 0.0 for arm in priced)
    cheap = [arm for arm in priced if (choice.price(arm) or 0.0) <= choice.slack * least]
    chosen = max(cheap, key=lambda arm: (choice.score(arm), -(choice.price(arm) or 0.0)))
    close = "" if choice.price(chosen) == least else f"within {SAME_TIME - 1:.0%} of "
    price = f"{_price(chosen, choice)} is {close}the least"
    if chosen is best:
        return (
            best,
            f"Ship {best.arm}: it has the best {got}, and {price} of the {len(near)} arms within {choice.within:g}.",
        )
    return chosen, (
        f"Ship {chosen.arm}: its {_got(chosen, choice)} is within {choice.within:g} of the {_score(best, choice)} of "
        f"{best.arm}, and {price} of the {len(near)} for which that holds ({_price(best, choice)} for {best.arm})."
    )


def _against_next(best: Arm, scored: list[Arm], comparisons: Sequence[Comparison], choice: Choice) -> str:
    """Write the p-value of the best against the one after it, where they were compared row by row."""
    others = [arm for arm in scored if arm is not best]
    if not others or not comparisons:
        return ""
    other = max(others, key=choice.score)
    if not {best.arm, other.arm} <= set(comparisons[0].names):
        return ""
    p_value = comparisons[0].p_value(best.arm, other.arm)
    return f", p = {p_value:.3f} against {other.arm}" if p_value is not None else ""


def front(arms: list[Arm], choice: Choice) -> list[Arm]:
    """The arms that no other beats in both metric and cost, the cheapest first."""
    priced = [arm for arm in arms if choice.price(arm) is not None and arm.metrics.get(choice.metric) is not None]
    found: list[Arm] = []
    for arm in sorted(priced, key=lambda arm: (choice.price(arm) or 0.0, -choice.score(arm))):
        if not found or choice.score(arm) > choice.score(found[-1]):
            found.append(arm)
    return found


def rule_text(choice: Choice) -> str:
    """Return a rule in words."""
    words = COSTS[choice.cost][0] + (f" (within {SAME_TIME - 1:.0%}: the same)" if choice.slack > 1 else "")
    if choice.rule == "cheapest_within_tolerance":
        kept = may_lose_all(choice.tolerances)
        return (
            f"of the arms that the held-out rows show to lose at most {kept} against the best by {choice.metric} "
            f"(simultaneous 95 % intervals of paired differences), the one that needs least: {words}; where they show "
            "it of none, the best"
        )
    if choice.rule == "smallest_within":
        return f"of the arms within {choice.within:g} of the best {choice.metric}, the one that needs least: {words}"
    if choice.rule == "pareto":
        return f"the best {choice.metric}, beside all arms that none beats in both {choice.metric} and {words}"
    return f"the best {choice.metric} on the held-out rows"


def may_lose_all(tolerances: Mapping[str, float | None]) -> str:
    """Write how much of each metric may be lost."""
    return " and ".join(_may_lose(name, given) for name, given in tolerances.items())


def _may_lose(name: str, given: float | None) -> str:
    if given is not None:
        return f"{given:g} of {name}"
    return f"{tolerance_of(name, None, 1.0):g} of {name}" if name in SHARES else f"1 % of {name}"


def _got(arm: Arm, choice: Choice) -> str:
    return f"{choice.metric} {_score(arm, choice)}"


def _score(arm: Arm, choice: Choice) -> str:
    ends = arm.interval.get(choice.metric)
    span = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
    return f"{arm.metrics[choice.metric]:.3f}{span}"


def _price(arm: Arm, choice: Choice) -> str:
    words, form, cost = COSTS[choice.cost]
    value = cost(arm)
    return f"{value:{form}} {words}" if value is not None else "a cost that is not known"
