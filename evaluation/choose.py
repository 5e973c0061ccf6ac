"""Which arm of a comparison to ship, by the rule that the job file names. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jobs.compare import Cost, Rule
from jobs.report import Arm, Pair, Recommendation
from jobs.rungs import Goal

ALIKE = 0.05
"""Two arms whose p-value is at least this cannot be told apart."""

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


def choose(arms: list[Arm], pairs: list[Pair], choice: Choice) -> Recommendation:
    """The arm to ship, and why, in words."""
    scored = [arm for arm in arms if arm.comparable and arm.metrics.get(choice.metric) is not None]
    unranked = [arm.arm for arm in arms if not arm.comparable]
    if unranked and len(arms) - len(unranked) < 2:
        sentence = "Nothing is ranked: no two of them were judged alike (the remarks say what differs)."
        return Recommendation(trial_id=None, rule=rule_text(choice), sentence=sentence)
    if not scored:
        return Recommendation(trial_id=None, rule=rule_text(choice), sentence="No arm has a score yet.")
    best = max(scored, key=choice.score)  # the first of equals
    eligible = _eligible(scored, best, pairs, choice)
    priced = [arm for arm in eligible if choice.price(arm) is not None]
    least = min((choice.price(arm) or 0.0 for arm in priced), default=0.0)
    near = [arm for arm in priced if (choice.price(arm) or 0.0) <= choice.slack * least]
    chosen = max(near, key=lambda arm: (choice.score(arm), -(choice.price(arm) or 0.0))) if near else best
    sentence = _sentence(chosen, best, eligible, scored, pairs, choice)
    if unranked:
        sentence += f" Not ranked beside the other {len(scored)}: {', '.join(unranked)}."
    return Recommendation(
        trial_id=chosen.trial_id,
        arm=chosen.arm,
        rule=rule_text(choice),
        cost=choice.cost,
        sentence=sentence,
        adapter=chosen.weights,
    )


def _eligible(scored: list[Arm], best: Arm, pairs: list[Pair], choice: Choice) -> list[Arm]:
    if choice.rule == "cheapest_within_noise":
        return [arm for arm in scored if arm is best or (_p_value(arm, best, pairs) or 0.0) >= ALIKE]
    if choice.rule == "smallest_within":
        return [arm for arm in scored if choice.score(arm) >= choice.score(best) - choice.within]
    return [best]


def front(arms: list[Arm], choice: Choice) -> list[Arm]:
    """The arms that no other beats in both metric and cost, the cheapest first."""
    priced = [arm for arm in arms if choice.price(arm) is not None and arm.metrics.get(choice.metric) is not None]
    found: list[Arm] = []
    for arm in sorted(priced, key=lambda arm: (choice.price(arm) or 0.0, -choice.score(arm))):
        if not found or choice.score(arm) > choice.score(found[-1]):
            found.append(arm)
    return found


def _p_value(one: Arm, other: Arm, pairs: list[Pair]) -> float | None:
    """Of two arms' difference; None where they were not compared row by row."""
    return next((pair.p_value for pair in pairs if {pair.one, pair.other} == {one.arm, other.arm}), None)


def rule_text(choice: Choice) -> str:
    """A rule in words."""
    words = COSTS[choice.cost][0] + (f" (within {SAME_TIME - 1:.0%}: the same)" if choice.slack > 1 else "")
    if choice.rule == "cheapest_within_noise":
        return (
            f"of the arms that cannot be told apart from the best by {choice.metric} on the held-out rows (paired "
            f"bootstrap, p at least {ALIKE:g}), the one that needs least: {words}"
        )
    if choice.rule == "smallest_within":
        return f"of the arms within {choice.within:g} of the best {choice.metric}, the one that needs least: {words}"
    if choice.rule == "pareto":
        return f"the best {choice.metric}, beside all arms that none beats in both {choice.metric} and {words}"
    return f"the best {choice.metric} on the held-out rows"


def _sentence(chosen: Arm, best: Arm, eligible: list[Arm], scored: list[Arm], pairs: list[Pair], choice: Choice) -> str:
    got = f"{choice.metric} {_score(chosen, choice)}"
    if choice.rule == "pareto":
        there = ", ".join(f"{arm.arm} ({_score(arm, choice)}, {_price(arm, choice)})" for arm in front(scored, choice))
        return f"Ship {chosen.arm}: it has the best {got}. None beats these in both: {there or 'no cost was measured'}."
    if choice.rule == "best" or (chosen is best and len(eligible) == 1):
        other = _next_best(best, scored, choice)
        p = _p_value(best, other, pairs) if other else None
        apart = f", p = {p:.3f} against {other.arm}" if other and p is not None else ""
        alone = "" if choice.rule == "best" or other is None else ", and no other comes near it"
        if choice.rule == "cheapest_within_noise" and other and p is None:
            alone = "; it was not compared row by row with the others, so that noise is not known"
        return f"Ship {best.arm}: it has the best {got}{alone}{apart}."
    if choice.price(chosen) is None:
        return f"Ship {best.arm}: it has the best {got}; {COSTS[choice.cost][0]} was measured of none."
    least = min(known for arm in eligible if (known := choice.price(arm)) is not None)
    near = "" if choice.price(chosen) == least else f"within {SAME_TIME - 1:.0%} of "
    price = f"{_price(chosen, choice)} is {near}the least"
    if chosen is best:
        return f"Ship {best.arm}: it has the best {got}, and {price} of the {len(eligible)} arms {_near(choice)}."
    of = f"{_score(best, choice)} of {best.arm}"
    if choice.rule == "cheapest_within_noise":
        apart = f"cannot be told apart from the {of} (p = {_p_value(chosen, best, pairs) or 0.0:.2f})"
    else:
        apart = f"is within {choice.within:g} of the {of}"
    return (
        f"Ship {chosen.arm}: its {got} {apart}, and {price} of the {len(eligible)} for which that holds "
        f"({_price(best, choice)} for {best.arm})."
    )


def _near(choice: Choice) -> str:
    if choice.rule == "smallest_within":
        return f"within {choice.within:g} of it"
    return "that cannot be told apart from it"


def _next_best(best: Arm, scored: list[Arm], choice: Choice) -> Arm | None:
    others = [arm for arm in scored if arm is not best]
    return max(others, key=choice.score) if others else None


def _score(arm: Arm, choice: Choice) -> str:
    ends = arm.interval.get(choice.metric)
    span = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
    return f"{arm.metrics[choice.metric]:.3f}{span}"


def _price(arm: Arm, choice: Choice) -> str:
    words, form, cost = COSTS[choice.cost]
    value = cost(arm)
    return f"{value:{form}} {words}" if value is not None else "a cost that is not known"
