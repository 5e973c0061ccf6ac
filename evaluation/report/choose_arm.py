"""Choose which arm of a comparison to ship, by the rule of the job file.

Pure functions. `cheapest_within_tolerance` is the shared rule of `decide.py` with a
cost that the job names. The other rules look at scores only. All of them ship the best
arm if there are too few rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lorafleet.evaluation.metrics.paired import Comparison
from lorafleet.evaluation.report.decide import (
    Option,
    Tolerances,
    Wording,
    decide,
    describe_tolerances,
    explain,
    format_interval,
)
from lorafleet.evaluation.report.format import describe_p_value
from lorafleet.jobs.runs.report import Arm, Recommendation
from lorafleet.jobs.schema.comparison import Cost, Rule
from lorafleet.jobs.schema.types import Goal

SAME_TIME = 1.05
"""Times within this factor count as equal: repeated runs of one training differ by more."""
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
    "latency_ms": ("ms per answer", ".1f", lambda arm: get_first_response_ms(arm)),
    "weights_mb": ("MB of trained weights", ".1f", lambda arm: arm.weights_mb),
}
"""Cost -> its text, its number format, and a function that reads it from an arm."""


def get_first_response_ms(arm: Arm) -> float | None:
    """Return the milliseconds to the first output of an arm's model; None if not measured.

    The first output is the first token, or the class of a row. A whole answer would depend
    on the number of tokens that the job asks for.
    """
    inference = arm.inference
    if inference is None:
        return None
    return inference.ttft_ms if inference.ttft_ms is not None else inference.latency_ms


@dataclass(frozen=True)
class Choice:
    """The rule by which an arm is chosen, and its settings.

    Made from the `compare` block of a job, or from defaults to compare runs side by side.
    """

    rule: Rule
    metric: str
    goal: Goal
    cost: Cost
    within: float = 0.0
    tolerances: Tolerances = field(default_factory=dict)
    """One entry for every metric that decides, the first metric first."""
    rows: int = 0
    """Number of held-out rows."""

    def score(self, arm: Arm) -> float:
        """Return an arm's metric, with the sign that makes larger values better.

        Only for arms that have the metric.
        """
        value = arm.metrics.get(self.metric)
        assert value is not None
        return value if self.goal == "maximize" else -value

    @property
    def slack(self) -> float:
        """Factor above the lowest cost up to which costs count as equal to it."""
        return SAME_TIME if self.cost in _TIMES else 1.0

    def get_cost(self, arm: Arm) -> float | None:
        """Return the cost of an arm that the rule uses; None if it was not measured."""
        return COSTS[self.cost][2](arm)


def choose(arms: list[Arm], comparisons: Sequence[Comparison], choice: Choice) -> Recommendation:
    """Choose an arm by the rule of the job file.

    Args:
        arms: All arms. Those that are not comparable or have no score are not chosen.
        comparisons: One entry per deciding metric.
        choice: The rule and its settings.

    Returns:
        The recommendation. `arm` is None if no arm has a score, or if no two were evaluated
            alike.
    """
    ranked = [arm for arm in arms if arm.comparable and arm.metrics.get(choice.metric) is not None]
    excluded = [arm.arm for arm in arms if not arm.comparable]
    rule = describe_rule(choice)
    # One arm alone would always win. Without a second one that was evaluated alike there is no
    # ranking.
    if excluded and len(arms) - len(excluded) < 2:
        sentence = (
            "Nothing is ranked: no two of the models were evaluated in the same way (see the "
            "remarks for the differences)."
        )
        return Recommendation(trial_id=None, rule=rule, sentence=sentence)
    if not ranked:
        return Recommendation(trial_id=None, rule=rule, sentence="No arm has a score yet.")
    by_name = {arm.arm: arm for arm in ranked}
    options = [Option(arm.arm, choice.score(arm), choice.get_cost(arm)) for arm in ranked]
    decision = decide(options, comparisons, choice.tolerances, choice.rows, choice.slack)
    if decision.has_too_few_rows or choice.rule == "cheapest_within_tolerance":
        option = decision.best if decision.has_too_few_rows else decision.chosen
        chosen = by_name[option.name]
        wording = Wording(
            noun="arm",
            row_noun="held-out row",
            describe=lambda name: name,
            format_cost=lambda option: _format_cost(by_name[option.name], choice),
            format_score=lambda name: f"{choice.metric} {_format_score(by_name[name], choice)}",
        )
        sentence = explain(decision, comparisons, choice.tolerances, wording)
    else:
        chosen, sentence = _choose_by_score(
            ranked, by_name[decision.best.name], comparisons, choice
        )
    if excluded:
        sentence += f" Not ranked with the other {len(ranked)}: {', '.join(excluded)}."
    return Recommendation(
        trial_id=chosen.trial_id,
        arm=chosen.arm,
        rule=rule,
        cost=choice.cost,
        sentence=sentence,
        adapter=chosen.weights,
        decided=not decision.has_too_few_rows,
    )


def _choose_by_score(
    ranked: list[Arm], best: Arm, comparisons: Sequence[Comparison], choice: Choice
) -> tuple[Arm, str]:
    """Apply a rule that uses scores only.

    Returns:
        (the chosen arm, the sentence of the recommendation).
    """
    score = f"{choice.metric} {_format_score(best, choice)}"
    if choice.rule == "pareto":
        arms = [
            f"{arm.arm} ({_format_score(arm, choice)}, {_format_cost(arm, choice)})"
            for arm in find_pareto_front(ranked, choice)
        ]
        unbeaten = ", ".join(arms) or "no cost was measured"
        return (
            best,
            f"Ship {best.arm}: it has the best {score}. No other arm beats any of these in both "
            f"metric and cost: {unbeaten}.",
        )
    if choice.rule == "best":
        p_value = _format_p_value(best, ranked, comparisons, choice)
        return best, f"Ship {best.arm}: it has the best {score}{p_value}."
    return _choose_smallest_within(ranked, best, score, choice)


def _choose_smallest_within(
    ranked: list[Arm], best: Arm, score: str, choice: Choice
) -> tuple[Arm, str]:
    """Apply the rule `smallest_within`: the lowest cost among arms near the best score.

    Unlike `cheapest_within_tolerance`, it compares the scores themselves, without
    intervals.

    Returns:
        (the chosen arm, the sentence of the recommendation).
    """
    near = [arm for arm in ranked if choice.score(arm) >= choice.score(best) - choice.within]
    costs = {arm.arm: cost for arm in near if (cost := choice.get_cost(arm)) is not None}
    if not costs:
        return (
            best,
            f"Ship {best.arm}: it has the best {score}; {COSTS[choice.cost][0]} was not measured "
            "for any arm.",
        )
    lowest = min(costs.values())
    cheap = [arm for arm in near if costs.get(arm.arm, math.inf) <= choice.slack * lowest]
    chosen = max(cheap, key=lambda arm: (choice.score(arm), -costs[arm.arm]))
    close = "" if costs[chosen.arm] == lowest else f"within {SAME_TIME - 1:.0%} of "
    price = f"{_format_cost(chosen, choice)} is {close}the lowest cost"
    if chosen is best:
        arms = f"the {len(near)} arms within {choice.within:g}"
        return best, f"Ship {best.arm}: it has the best {score}, and {price} of {arms}."
    return chosen, (
        f"Ship {chosen.arm}: its {choice.metric} {_format_score(chosen, choice)} is within "
        f"{choice.within:g} of the {_format_score(best, choice)} of {best.arm}, and {price} of the "
        f"{len(near)} arms within that distance ({_format_cost(best, choice)} for {best.arm})."
    )


def _format_p_value(
    best: Arm, ranked: list[Arm], comparisons: Sequence[Comparison], choice: Choice
) -> str:
    """Format the p-value of the best arm against the next best, or "" if they were not compared."""
    others = [arm for arm in ranked if arm is not best]
    if not others or not comparisons:
        return ""
    runner_up = max(others, key=choice.score)
    if not {best.arm, runner_up.arm} <= set(comparisons[0].names):
        return ""
    p_value = comparisons[0].compute_p_value(best.arm, runner_up.arm)
    return "" if p_value is None else f", {describe_p_value(p_value)} against {runner_up.arm}"


def find_pareto_front(arms: list[Arm], choice: Choice) -> list[Arm]:
    """Return the arms that no other beats in both metric and cost, the cheapest first.

    Arms without a measured cost or metric are left out.
    """
    priced = [
        arm
        for arm in arms
        if choice.get_cost(arm) is not None and arm.metrics.get(choice.metric) is not None
    ]
    unbeaten: list[Arm] = []
    # From the cheapest on, an arm is on the front if its score is above that of all cheaper ones.
    for arm in sorted(priced, key=lambda arm: (choice.get_cost(arm) or 0.0, -choice.score(arm))):
        if not unbeaten or choice.score(arm) > choice.score(unbeaten[-1]):
            unbeaten.append(arm)
    return unbeaten


def describe_rule(choice: Choice) -> str:
    """Return the rule as text."""
    cost_text = COSTS[choice.cost][0]
    if choice.slack > 1:
        cost_text += f" (differences below {SAME_TIME - 1:.0%} count as equal)"
    if choice.rule == "cheapest_within_tolerance":
        return (
            f"among the arms that lose at most {describe_tolerances(choice.tolerances)} against "
            "the best (simultaneous 95 % intervals of paired differences on the held-out rows), "
            f"the one with the lowest {cost_text}; if there is none, the best"
        )
    if choice.rule == "smallest_within":
        return (
            f"of the arms within {choice.within:g} of the best {choice.metric}, the one with the "
            f"lowest {cost_text}"
        )
    if choice.rule == "pareto":
        return (
            f"the best {choice.metric}, shown with all arms that no other arm beats in both "
            f"{choice.metric} and {cost_text}"
        )
    return f"the best {choice.metric} on the held-out rows"


def _format_score(arm: Arm, choice: Choice) -> str:
    """Format the metric of an arm with its interval."""
    ends = arm.interval.get(choice.metric)
    return f"{arm.metrics[choice.metric]:.3f}" + (f" {format_interval(ends)}" if ends else "")


def _format_cost(arm: Arm, choice: Choice) -> str:
    """Format the cost of an arm with its unit."""
    unit, number_format, read_cost = COSTS[choice.cost]
    value = read_cost(arm)
    return f"{value:{number_format}} {unit}" if value is not None else "an unknown cost"
