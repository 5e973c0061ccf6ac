"""Compute the rungs of ASHA, which trials are promoted, and the expected cost. Pure.

Source: Li et al., A System for Massively Parallel Hyperparameter Tuning (MLSys 2020,
arXiv 1810.05934), in the stopping form of Ray Tune and Optuna: a trial that reaches a
rung is compared immediately with all scores of that rung, including its own, and stops
unless it is among the best 1/eta. Ties are broken by the validation loss, which is an
addition of lorafleet.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence

from lorafleet.jobs.schema.types import Goal


def compute_rung_levels(grace_period: int, max_t: int, reduction_factor: int) -> list[int]:
    """Return the times at which trials are compared, in ascending order.

    The last is `max_t`, as in [223, 669, 2000]. A rung in the second half of the training is
    left out: stopping there saves too little for the risk.
    """
    levels = []
    level = grace_period
    while 2 * level <= max_t:
        levels.append(level)
        level *= reduction_factor
    return [*levels, max_t]


def compute_default_grace_period(max_t: int, reduction_factor: int) -> int:
    """Return a first rung that leaves two stops before the end: max_t / eta^2, rounded up."""
    return -(-max_t // reduction_factor**2)


RungScore = tuple[float, float]
"""Score of a trial at a rung, larger is better: its value of the search's metric, then minus
its loss.
"""


def make_rung_score(score: float | None, loss: float | None, goal: Goal) -> RungScore:
    """Return the score of a trial at a rung. A missing or NaN value is below all others.

    Equal values are common for metrics that count rows: every trial that has learnt nothing
    yet has the accuracy of the largest class. The validation loss, which changes first, then
    decides.
    """
    return _apply_sign(score, goal), _apply_sign(loss, "minimize")


def _apply_sign(value: float | None, goal: Goal) -> float:
    if value is None or math.isnan(value):
        return -math.inf
    return value if goal == "maximize" else -value


class Rung:
    """Scores of the trials that have reached a rung.

    They are kept in order: a decision costs O(log N) comparisons.
    """

    def __init__(self) -> None:
        self.scores: dict[str, RungScore] = {}
        """Trial id -> score."""
        self._ascending: list[RungScore] = []

    def add(self, trial_id: str, score: RungScore) -> None:
        """Add the score of a trial. A later score of the same trial replaces it."""
        previous = self.scores.get(trial_id)
        if previous is not None:
            del self._ascending[bisect.bisect_left(self._ascending, previous)]
        self.scores[trial_id] = score
        bisect.insort(self._ascending, score)

    def compute_cutoff(self, eta: int) -> RungScore:
        """Return the lowest score among the best 1/eta so far.

        At least one trial is always promoted, so the first to arrive continues.

        Args:
            eta: Reduction factor.

        Raises:
            ValueError: The rung has no scores.
        """
        if not self._ascending:
            raise ValueError("a rung without scores has no cutoff")
        return self._ascending[-max(1, len(self._ascending) // eta)]

    def is_promoted(self, trial_id: str, eta: int) -> bool:
        """Return whether a trial is promoted past the rung, compared with the scores so far.

        Ties in score and loss are promoted; a NaN score never is. Raises KeyError for a trial
        without a score.
        """
        score = self.scores[trial_id]
        return score[0] > -math.inf and score >= self.compute_cutoff(eta)

    def rank(self, index: Mapping[str, int], count: int) -> list[str]:
        """Return the best trials, at most `count`, best first. NaN scores are left out.

        Args:
            index: Trial id -> order of creation, in which equal scores are ranked: the result does
                not depend on the order of arrival. Only these trials are ranked.
        """
        trials = [name for name in index if self.scores[name][0] > -math.inf]
        trials.sort(key=lambda name: (*(-part for part in self.scores[name]), index[name]))
        return trials[:count]


def estimate_survivors(arrivals: float, eta: int) -> float:
    """Return the expected number of trials that pass a rung.

    `arrivals` trials arrive in random order. The i-th arrival passes with probability max(1,
    floor(i/eta))/i, so that early trials pass too often: this is the cost of the asynchronous
    form, which never waits. Fractions of a trial are interpolated.
    """
    complete_trials = math.floor(arrivals)
    total = sum(max(1, i // eta) / i for i in range(1, complete_trials + 1))
    following = complete_trials + 1
    return total + (arrivals - complete_trials) * max(1, following // eta) / following


def estimate_promoted_time(trials: int, levels: Sequence[int], eta: int) -> int:
    """Return the training time of a search whose trials pause at rungs, in the unit of `levels`.

    Exactly the best 1/eta pass a rung, and at least one trial.
    """
    total, arrivals, previous = 0, trials, 0
    for level in levels:
        total += arrivals * (level - previous)
        arrivals, previous = max(1, arrivals // eta), level
    return total


def estimate_time(trials: int, levels: Sequence[int], eta: int) -> float:
    """Return the expected training time of a whole search, in the unit of `levels`.

    Each trial that passes a rung trains to the next one. Trials are assumed to arrive in
    random order, as in `estimate_survivors`.

    Args:
        trials: Number of trials that begin.
        levels: Rungs in ascending order; the last is the full length.
        eta: Reduction factor.
    """
    total, arrivals, previous = 0.0, float(trials), 0
    for level in levels:
        total += arrivals * (level - previous)
        arrivals, previous = estimate_survivors(arrivals, eta), level
    return total
