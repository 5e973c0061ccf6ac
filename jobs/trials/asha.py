"""ASHA's arithmetic: where the rungs are, who goes on, and what it costs. Pure.

Source: Li et al., A System for Massively Parallel Hyperparameter Tuning (MLSys 2020, arXiv 1810.05934), in the
stopping form that Ray Tune and Optuna use: a trial that reaches a rung is compared, there and then, with all scores
that the rung holds, its own included, and stops unless it is among the best 1/eta of them. Scores that are equal are
told apart by the validation loss, which is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Goal = Literal["maximize", "minimize"]


def rung_levels(grace_period: int, max_t: int, reduction_factor: int) -> list[int]:
    """The times at which trials are compared, smallest first, and `max_t` as the last: [223, 669, 2000].

    A rung in the second half of the way is left out: a cut there would save less than it costs in chances.
    """
    levels = []
    level = grace_period
    while 2 * level <= max_t:
        levels.append(level)
        level *= reduction_factor
    return [*levels, max_t]


def default_grace_period(max_t: int, reduction_factor: int) -> int:
    """A first rung that leaves two cuts before the end: max_t / eta^2, rounded up."""
    return -(-max_t // reduction_factor**2)


Place = tuple[float, float]
"""What a trial stands for at a rung, larger is better: its score by the search's metric, then minus its loss."""


def place(score: float | None, loss: float | None, goal: Goal) -> Place:
    """The place of a score. One that is missing or not a number is below all others.

    Equal scores are common where rows are counted (every trial that has learnt nothing yet has the accuracy of the
    largest class): the validation loss, which moves first, then decides.
    """
    return _signed(score, goal), _signed(loss, "minimize")


def _signed(value: float | None, goal: Goal) -> float:
    if value is None or math.isnan(value):
        return -math.inf
    return value if goal == "maximize" else -value


def rung_cutoff(places: Sequence[Place], eta: int) -> Place:
    """The last place that is still among the best 1/eta of a rung, of which at least one goes on.

    Raises ValueError on an empty rung.
    """
    if not places:
        raise ValueError("a rung without scores has no cutoff")
    kept = max(1, len(places) // eta)
    return sorted(places, reverse=True)[kept - 1]


def goes_on(own: Place, places: Sequence[Place], eta: int) -> bool:
    """Whether a trial continues past a rung whose places, its own included, are `places`.

    Ties in score and loss go on; a score that is not a number never does.
    """
    return own[0] > -math.inf and own >= rung_cutoff(places, eta)


def expected_survivors(arrivals: float, eta: int) -> float:
    """How many of `arrivals` trials in random order go on past one rung.

    The i-th to arrive goes on with probability max(1, floor(i/eta))/i, so early trials are let through too often:
    this is what the asynchronous form pays for never waiting. Fractions of a trial are interpolated.
    """
    whole = math.floor(arrivals)
    total = sum(max(1, i // eta) / i for i in range(1, whole + 1))
    following = whole + 1
    return total + (arrivals - whole) * max(1, following // eta) / following


def expected_time(trials: int, levels: Sequence[int], eta: int) -> float:
    """Time units that a whole search is expected to train for, in the unit of `levels`."""
    total, arrivals, previous = 0.0, float(trials), 0
    for level in levels:
        total += arrivals * (level - previous)
        arrivals, previous = expected_survivors(arrivals, eta), level
    return total


def rung_reached(time: int, levels: Sequence[int]) -> int | None:
    """The index of the last rung whose level is at or below `time`, or None before the first."""
    reached = [index for index, level in enumerate(levels) if time >= level]
    return reached[-1] if reached else None
