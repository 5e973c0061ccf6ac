"""Candidates that were judged on the same rows: how far each is from each, and how sure that is. Pure.

R rows, K candidates, S draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evaluation.intervals import FEWEST_ROWS, SHARES, Interval, contributions, degrees, student, why_none
from evaluation.results import RowResults
from jobs.rungs import Goal

LEVEL = 0.05
"""How often, at most, anything at all that is said of equal candidates is wrong."""
_SEED = 20_260_101
DRAWS = 10_000
_EXACT_ROWS = 20
"""Rows of which all signs are tried with two candidates."""
_EXACT_ROWS_OF_MANY = 12
_FLIPS = 10_000
_FLIPPED_ROWS = 200
"""Rows up to which signs are flipped; with more, the draws of `critical` say the same."""
_TIES = 1e-9


@dataclass(frozen=True)
class Candidate:
    """What may be shipped."""

    name: str
    """Its trial or arm."""
    models: Sequence[RowResults]
    """What its models (one a seed) did with each row."""
    origin: str | None = None
    """The candidate whose models it has on another base: seeds that are lucky for one are so for the other."""


def sign_flip(differences_R: np.ndarray) -> float:
    """Return the two-sided p-value of Fisher's sign-flip test that paired differences (R) are about 0.

    Exact up to 20 rows: the share of all 2^R choices of signs with a sum as far from 0. It cannot be below 2 / 2^R.
    With more rows 10,000 choices are drawn.
    """
    rows = len(differences_R)
    if rows <= _EXACT_ROWS:
        sums = np.zeros(1)
        for difference in differences_R:  # all sums, one row after another
            sums = np.concatenate([sums + difference, sums - difference])
        far = abs(differences_R.sum()) - _TIES * max(1.0, float(np.abs(differences_R).sum()))
        return float((np.abs(sums) >= far).mean())
    signs_SR = np.random.default_rng(_SEED).choice([-1.0, 1.0], (_FLIPS, rows))
    far = abs(differences_R.sum()) - _TIES * max(1.0, float(np.abs(differences_R).sum()))
    return float((1 + (np.abs(signs_SR @ differences_R) >= far).sum()) / (1 + _FLIPS))


class Comparison:
    """Every two candidates by one metric, with intervals that hold for all of them at once.

    The difference of two candidates is a mean of paired differences of rows. Its error is theirs and that of the seeds.
    The intervals are as wide as the largest of all standardised differences is in draws of a Gaussian multiplier
    bootstrap (Chernozhukov, Chetverikov and Kato 2013), so that the best may be picked on the same rows; each with the
    degrees of freedom that it has. p-values are adjusted for the number of candidates in the same way, and are never
    below what signs that are flipped row by row give.
    """

    def __init__(self, candidates: Sequence[Candidate], metric: str, goal: Goal, draws: int = DRAWS) -> None:
        """`draws` is how often the largest difference is drawn."""
        self._draws = draws
        self.names = [one.name for one in candidates]
        self.metric, self.goal = metric, goal
        self.rows = len(candidates[0].models[0])
        self._x_RK = np.stack(
            [np.mean([contributions(one, metric) for one in each.models], axis=0) for each in candidates], axis=1
        )
        self.values_K = self._x_RK.mean(axis=0)
        self._seeds_KK = _seed_covariance(candidates, metric)
        self._models_K = np.array([len(one.models) for one in candidates])
        self._share = metric in SHARES
        self.unsupported = next((why for each in candidates if (why := why_none(each.models, metric))), None)
        """Why the rows bear neither intervals nor p-values of this metric; None where they do."""

    def value(self, name: str) -> float:
        """Return a candidate's metric."""
        return float(self.values_K[self.names.index(name)])

    @cached_property
    def _rows_KK(self) -> np.ndarray:
        """Covariance of the candidates' means over rows."""
        centred_RK = self._x_RK - self.values_K
        covariance: np.ndarray = centred_RK.T @ centred_RK / max(1, self.rows - 1) / self.rows
        return covariance

    @cached_property
    def _of_rows_KK(self) -> np.ndarray:
        """Variance of each two candidates' difference over rows; of shares, as if one row more differed as most do.

        Rows on which nothing differs do not show that nothing ever will.
        """
        variance_KK = _of_differences(self._rows_KK)
        if self._share:
            most_KK = np.array([np.abs(self._x_RK - column[:, None]).max(axis=0) for column in self._x_RK.T])
            most_KK[most_KK < _TIES] = 1.0
            variance_KK = variance_KK + most_KK**2 / max(1, self.rows - 1) / self.rows
            np.fill_diagonal(variance_KK, 0.0)
        return variance_KK

    @cached_property
    def error_KK(self) -> np.ndarray:
        """Standard error of each two candidates' difference."""
        error: np.ndarray = np.sqrt(self._of_rows_KK + _of_differences(self._seeds_KK))
        return error

    @cached_property
    def _largest_S(self) -> np.ndarray:
        """The largest standardised difference of any two candidates in each draw, in order."""
        if len(self.names) == 2:  # no draws are needed for one normal number
            from scipy.special import ndtri

            quantiles_S: np.ndarray = ndtri(0.5 + 0.5 * (np.arange(self._draws) + 0.5) / self._draws)
            return quantiles_S
        both_KK = self._rows_KK + self._seeds_KK
        sizes_K, vectors_KK = np.linalg.eigh(both_KK)
        draws_SK = np.random.default_rng(_SEED).standard_normal((self._draws, len(self.names)))
        draws_SK = draws_SK * np.sqrt(np.clip(sizes_K, 0, None)) @ vectors_KK.T
        spread_KK = np.sqrt(np.clip(_of_differences(both_KK), 0, None))
        largest_S = np.zeros(self._draws)
        for place in range(len(self.names) - 1):
            scale_K = spread_KK[place, place + 1 :]
            apart_SK = np.abs(draws_SK[:, place + 1 :] - draws_SK[:, [place]])
            standard_SK = np.divide(apart_SK, scale_K, out=np.zeros_like(apart_SK), where=scale_K > _TIES * 1e-3)
            largest_S = np.maximum(largest_S, standard_SK.max(axis=1))
        return np.sort(largest_S)

    def _freedom(self, one: int, other: int) -> float:
        seeds = int(self._models_K[one] + self._models_K[other] - 2)
        of_seeds = float(_of_differences(self._seeds_KK)[one, other])
        return degrees(float(self._of_rows_KK[one, other]), self.rows - 1, of_seeds, seeds)

    def critical(self, one: int, other: int) -> float:
        """Return how many standard errors the simultaneous interval of two candidates reaches."""
        from scipy.special import ndtr

        return student(self._freedom(one, other), float(ndtr(self._normal)))

    @cached_property
    def _normal(self) -> float:
        """How many standard deviations the largest of normal differences exceeds in one draw of twenty."""
        return max(float(np.quantile(self._largest_S, 1 - LEVEL)), 1.959964)

    def difference(self, one: str, other: str) -> float:
        """Return the metric of `one` less that of `other`."""
        places = self._places(one, other)
        return float(self.values_K[places[0]] - self.values_K[places[1]])

    def interval(self, one: str, other: str) -> Interval | None:
        """Return the simultaneous 95 % interval of their difference; None where the rows are too few for one."""
        places = self._places(one, other)
        if self.unsupported or places[0] == places[1]:
            return None
        half = self.critical(*places) * float(self.error_KK[places])
        middle = self.difference(one, other)
        return middle - half, middle + half

    def p_value(self, one: str, other: str) -> float | None:
        """Return the two-sided p-value of their difference, adjusted for all candidates; None as `interval`.

        Of fewer rows than have an interval it is that of the flipped signs alone, which has its floor.
        """
        if self.rows < FEWEST_ROWS:
            return float(self._flipped_KK()[self._places(one, other)])
        return None if self.unsupported else float(self._p_KK[self._places(one, other)])

    @cached_property
    def _p_KK(self) -> np.ndarray:
        from scipy.special import ndtri, stdtr

        p_KK = np.ones((len(self.names), len(self.names)))
        flipped_KK = self._flipped_KK()
        for one, other in itertools.combinations(range(len(self.names)), 2):
            error = float(self.error_KK[one, other])
            if error > 0:
                reached = abs(float(self.values_K[one] - self.values_K[other])) / error
                normal = -float(ndtri(stdtr(self._freedom(one, other), -reached)))
                above = self._draws - int(np.searchsorted(self._largest_S, normal - _TIES))
                p_KK[one, other] = p_KK[other, one] = max((1 + above) / (1 + self._draws), flipped_KK[one, other])
        return p_KK

    def _flipped_KK(self) -> np.ndarray:
        """p-values of flipped signs: how often any two candidates come out as far apart as these two."""
        names = len(self.names)
        if self.rows > _FLIPPED_ROWS:
            return np.zeros((names, names))
        if names == 2:
            return np.full((2, 2), sign_flip(self._x_RK[:, 0] - self._x_RK[:, 1]))
        x_RK = self._x_RK
        size_KK = np.array([np.sqrt(((x_RK - column[:, None]) ** 2).sum(axis=0)) for column in x_RK.T])
        signs_SR = _signs(self.rows)
        sums_SK = signs_SR @ x_RK
        largest_S = np.zeros(len(signs_SR))
        for place in range(names - 1):
            apart_SK = np.abs(sums_SK[:, place + 1 :] - sums_SK[:, [place]])
            scale_K = size_KK[place, place + 1 :]
            standard_SK = np.divide(apart_SK, scale_K, out=np.zeros_like(apart_SK), where=scale_K > _TIES)
            largest_S = np.maximum(largest_S, standard_SK.max(axis=1))
        largest_S.sort()
        total_KK = self.rows * np.abs(self.values_K[:, None] - self.values_K[None, :])
        reached_KK = np.divide(total_KK, size_KK, out=np.zeros_like(total_KK), where=size_KK > _TIES)
        above_KK = len(largest_S) - np.searchsorted(largest_S, reached_KK - _TIES)
        drawn = 0 if self.rows <= _EXACT_ROWS_OF_MANY else 1
        p_KK: np.ndarray = (drawn + above_KK) / (drawn + len(largest_S))
        return p_KK

    def worse(self, name: str, than: str) -> float:
        """Return by how much a candidate is worse than another, in the metric; below 0 where it is better."""
        apart = self.difference(than, name)
        return apart if self.goal == "maximize" else -apart

    def most_worse(self, name: str, than: str) -> float:
        """Return how much worse it may be: the upper end of the interval of `worse`; infinite where there is none."""
        ends = self.interval(than, name)
        if name == than:
            return 0.0
        return math.inf if ends is None else ends[1] if self.goal == "maximize" else -ends[0]

    def is_worse(self, name: str, than: str) -> bool:
        """Whether the rows show that a candidate is worse than another, all candidates considered."""
        ends, p_value = self.interval(than, name), self.p_value(name, than)
        if ends is None or p_value is None or p_value >= LEVEL:
            return False
        return ends[0] > 0 if self.goal == "maximize" else ends[1] < 0

    def rows_to_decide(self, name: str, best: str, tolerance: float) -> int | None:
        """Return about how many rows would show what these do not: that `name` loses less than the tolerance, or more.

        They are the rows with which the interval, as narrow as their number makes it, would exclude the one or the
        other. None where no number of rows would.
        """
        places = self._places(name, best)
        half = self.critical(*places) * float(self.error_KK[places])
        loss = self.worse(name, best)
        apart = tolerance - loss if loss < tolerance else loss
        if apart <= 0 or not math.isfinite(half) or half <= 0:
            return None
        return math.ceil(self.rows * (half / apart) ** 2)

    def _places(self, one: str, other: str) -> tuple[int, int]:
        return self.names.index(one), self.names.index(other)


def _signs(rows: int) -> np.ndarray:
    """Return choices of signs for rows: all of them where they are few."""
    if rows <= _EXACT_ROWS_OF_MANY:
        numbers_S = np.arange(2**rows)
        every: np.ndarray = 1.0 - 2.0 * (numbers_S[:, None] >> np.arange(rows) & 1)
        return every
    return np.random.default_rng(_SEED).choice([-1.0, 1.0], (_FLIPS, rows))


def _of_differences(covariance_KK: np.ndarray) -> np.ndarray:
    """Return the variance of each two candidates' difference."""
    own_K = np.diagonal(covariance_KK)
    variance: np.ndarray = np.clip(own_K[:, None] + own_K[None, :] - 2 * covariance_KK, 0.0, None)
    return variance


def _seed_covariance(candidates: Sequence[Candidate], metric: str) -> np.ndarray:
    """Return the covariance (K, K) of the candidates' means over the seeds that could have been drawn.

    Candidates with the same models share their seeds; others' are independent.
    """
    values = [np.array([contributions(one, metric).mean() for one in each.models]) for each in candidates]
    found_KK = np.zeros((len(candidates), len(candidates)))
    for one, ours in enumerate(candidates):
        for other, theirs in enumerate(candidates):
            shared = one == other or (ours.origin or ours.name) == (theirs.origin or theirs.name)
            models = len(values[one])
            if shared and models == len(values[other]) > 1:
                found_KK[one, other] = np.cov(values[one], values[other])[0, 1] / models
    return found_KK
