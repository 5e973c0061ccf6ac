"""Compare candidates that were evaluated on the same rows.

The only input is per-row results: `Comparison` computes paired differences, intervals
that hold for all pairs at once, and p-values. What to do with them is decided in
`report/decide.py`. All draws use a fixed seed, so a report that is built twice says the
same.

Shapes: R rows, K candidates, S draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lorafleet.evaluation.metrics.intervals import (
    MIN_ROWS,
    SHARES,
    Interval,
    compute_contributions,
    compute_degrees_of_freedom,
    compute_student_quantile,
    explain_missing_interval,
)
from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.jobs.schema.types import Goal

ALPHA = 0.05
"""Family-wise error rate: how often any claim about equal candidates may be wrong."""
DEFAULT_DRAWS = 10_000
_SEED = 20_260_101
_Z = 1.959963984540054
_MAX_EXACT_ROWS = 20
"""Up to this many rows, `run_sign_flip_test` enumerates all choices of signs."""
_MAX_EXACT_ROWS_FOR_MANY = 12
_FLIPS = 10_000
_MAX_FLIPPED_ROWS = 200
"""With more rows than this, flipped signs agree with the normal draws and are skipped."""
_EPSILON = 1e-9


@dataclass(frozen=True)
class Candidate:
    """A trial or an arm that may be shipped.

    Built from stored results by `report/recommend_trial.py` (one model) and
    `report/comparison.py` (one model per seed, in the order of the seeds).
    """

    name: str
    """Trial id or arm name."""
    models: Sequence[RowResults]
    """Per-row results of its models, one per seed."""
    origin: str | None = None
    """The candidate with the same adapters on another base.

    Both then share the effect of the seeds.
    """


def run_sign_flip_test(differences_R: np.ndarray) -> float:
    """Return the two-sided p-value of Fisher's sign-flip test for paired differences (R).

    Exact for up to 20 rows: the share of all 2^R choices of signs whose sum is at least as
    far from 0. The p-value cannot be below 2 / 2^R. With more rows, 10,000 random choices
    are used.

    Args:
        differences_R: Metric of one candidate minus that of the other, on each row.
    """
    rows = len(differences_R)
    # Sums of the same numbers in another order differ by rounding. Without the tolerance, choices
    # of signs that tie with the observed sum would be missed and the p-value would be too small.
    tolerance = _EPSILON * max(1.0, float(np.abs(differences_R).sum()))
    threshold = abs(differences_R.sum()) - tolerance
    if rows <= _MAX_EXACT_ROWS:
        sums = np.zeros(1)
        for difference in differences_R:
            sums = np.concatenate([sums + difference, sums - difference])
        return float((np.abs(sums) >= threshold).mean())
    sums = _draw_random_signs(rows) @ differences_R
    # The observed signs count as one of the draws: a p-value of 0 would claim more than 10,000
    # draws can show.
    return float((1 + (np.abs(sums) >= threshold).sum()) / (1 + len(sums)))


def select_comparable_candidates(candidates: Sequence[Candidate], metric: str) -> list[Candidate]:
    """Return the candidates whose models all have finite per-row values of a metric.

    A single infinite loss would make every interval of the comparison infinite, so such a
    candidate is left out and the others are still compared.
    """
    return [
        candidate
        for candidate in candidates
        if all(_has_finite_values(model, metric) for model in candidate.models)
    ]


def _has_finite_values(model: RowResults, metric: str) -> bool:
    return model.has_metric(metric) and bool(
        np.isfinite(compute_contributions(model, metric)).all()
    )


class Comparison:
    """Pairwise differences of candidates in one metric, with simultaneous intervals.

    A difference is a mean of paired per-row differences; its standard error covers rows and
    seeds. The critical value is the 95 % quantile of the largest standardised difference of
    any two candidates, drawn by a Gaussian multiplier bootstrap (Chernozhukov, Chetverikov
    and Kato 2013). All intervals hold at once, so the best candidate may be picked on the
    same rows. Each interval uses Student's t with its own degrees of freedom.

    p-values are adjusted for the number of candidates in the same way, and are never below
    those of sign flips.

    Draws, errors and p-values are computed when they are first asked for, and kept. Memory
    grows with draws times candidates, so callers compare at most `MAX_COMPARED` candidates.
    """

    def __init__(
        self, candidates: Sequence[Candidate], metric: str, goal: Goal, draws: int = DEFAULT_DRAWS
    ) -> None:
        """Compare candidates that are all finite in `metric` (`select_comparable_candidates`).

        Args:
            candidates: At least one. All were evaluated on the same rows, in the same order.
            metric: Name of the metric.
            goal: Whether more or less of it is better.
            draws: Draws of the bootstrap (`evaluate.bootstrap_samples`).
        """
        self._draws = draws
        self.names = [candidate.name for candidate in candidates]
        self.metric, self.goal = metric, goal
        self.rows = len(candidates[0].models[0])
        columns = [
            np.mean([compute_contributions(model, metric) for model in candidate.models], axis=0)
            for candidate in candidates
        ]
        self._values_RK = np.stack(columns, axis=1)
        self._means_K = self._values_RK.mean(axis=0)
        self._seeds_KK = _compute_seed_covariance(candidates, metric)
        self._models_K = np.array([len(candidate.models) for candidate in candidates])
        reasons = (explain_missing_interval(candidate.models, metric) for candidate in candidates)
        self.missing_reason = next((reason for reason in reasons if reason), None)
        """Why there are no intervals and p-values, or None."""

    def get_value(self, name: str) -> float:
        """Return the metric of a candidate."""
        return float(self._means_K[self.names.index(name)])

    def compute_difference(self, name: str, other: str) -> float:
        """Return the metric of `name` minus that of `other`."""
        return self.get_value(name) - self.get_value(other)

    def compute_interval(self, name: str, other: str) -> Interval | None:
        """Return the simultaneous 95 % interval of the metric of `name` minus that of `other`.

        None for a candidate and itself, or if the rows bear no interval; `missing_reason` says
        why.
        """
        if self.missing_reason or name == other:
            return None
        half = self._compute_half_width(name, other)
        center = self.compute_difference(name, other)
        return center - half, center + half

    def compute_p_value(self, name: str, other: str) -> float | None:
        """Return the adjusted two-sided p-value of the difference; None if it is not defined.

        With fewer than `MIN_ROWS` rows it is the p-value of the exact sign flips, which shows
        what so few rows can say. With enough rows it is None where there is no interval.
        """
        indices = self._find_indices(name, other)
        if self.rows < MIN_ROWS:
            return float(self._flipped_p_values_KK[indices])
        return None if self.missing_reason else float(self._p_values_KK[indices])

    def compute_loss(self, name: str, best: str) -> float:
        """Return how much worse `name` is than `best`, in units of the metric.

        Negative if it is better.
        """
        difference = self.compute_difference(best, name)
        return difference if self.goal == "maximize" else -difference

    def compute_loss_interval(self, name: str, best: str) -> Interval | None:
        """Return the simultaneous 95 % interval of the loss; None if there are too few rows."""
        interval = self.compute_interval(best, name)
        if interval is None or self.goal == "maximize":
            return interval
        return -interval[1], -interval[0]

    def compute_max_loss(self, name: str, best: str) -> float:
        """Return the upper end of the interval of the loss; infinity without an interval.

        This is what a tolerance is compared with: without evidence, a candidate is never within
        it.
        """
        if name == best:
            return 0.0
        interval = self.compute_loss_interval(name, best)
        return math.inf if interval is None else interval[1]

    def is_worse(self, name: str, best: str) -> bool:
        """Return True if the rows show that `name` is worse than `best`, given all candidates.

        Both the interval and the p-value must show it. The p-value has the floor of the sign
        flips, which the interval does not have.
        """
        interval, p_value = self.compute_loss_interval(name, best), self.compute_p_value(name, best)
        if interval is None or p_value is None:
            return False
        return interval[0] > 0 and p_value < ALPHA

    def estimate_rows_needed(self, name: str, best: str, tolerance: float) -> int | None:
        """Estimate how many rows would decide whether `name` loses at most `tolerance`.

        Assumes that the interval shrinks with the square root of the number of rows, and that
        the loss stays what it is.

        Args:
            name: The candidate.
            best: The reference.
            tolerance: How much may be lost, in units of the metric.

        Returns:
            Rows that would show either that the loss is within the tolerance or that `name` is
                worse. None if no number is enough.
        """
        half, loss = self._compute_half_width(name, best), self.compute_loss(name, best)
        margin = tolerance - loss if loss < tolerance else loss
        if margin <= 0 or half <= 0 or not math.isfinite(half):
            return None
        return math.ceil(self.rows * (half / margin) ** 2)

    def _find_indices(self, name: str, other: str) -> tuple[int, int]:
        return self.names.index(name), self.names.index(other)

    def _compute_half_width(self, name: str, other: str) -> float:
        indices = self._find_indices(name, other)
        return self.compute_critical_value(*indices) * float(self._errors_KK[indices])

    def compute_critical_value(self, index: int, other: int) -> float:
        """Return the half width of a simultaneous interval in standard errors.

        The bootstrap draws are normal. Its quantile is turned into a probability, and that into
        a quantile of Student's t with the degrees of freedom of this pair: few rows or seeds
        widen the interval.

        Args:
            index: Index of one candidate in `names`.
            other: Index of the other.
        """
        from scipy.special import ndtr

        return compute_student_quantile(
            self._compute_freedom(index, other), float(ndtr(self._normal_critical_value))
        )

    @cached_property
    def _normal_critical_value(self) -> float:
        # Never narrower than the interval of a single pair: the draws may fall short of it by
        # chance.
        return max(float(np.quantile(self._largest_S, 1 - ALPHA)), _Z)

    def _compute_freedom(self, index: int, other: int) -> float:
        row_variance = float(self._row_variances_KK[index, other])
        between_seeds = float(_compute_difference_variances(self._seeds_KK)[index, other])
        seeds = int(self._models_K[index] + self._models_K[other] - 2)
        return compute_degrees_of_freedom(row_variance, self.rows - 1, between_seeds, seeds)

    @cached_property
    def _rows_KK(self) -> np.ndarray:
        """Covariance of the candidates' means over rows."""
        centered_RK = self._values_RK - self._means_K
        covariance_KK: np.ndarray = centered_RK.T @ centered_RK / max(1, self.rows - 1) / self.rows
        return covariance_KK

    @cached_property
    def _row_variances_KK(self) -> np.ndarray:
        """Variance over rows of every difference.

        For metrics between 0 and 1, one more row is assumed to differ as much as the row that
        differs most. Otherwise two candidates that agree on all of 20 rows would count as equal for
        certain.
        """
        variances_KK = _compute_difference_variances(self._rows_KK)
        if self.metric in SHARES:
            columns = self._values_RK.T
            largest_KK = np.array([np.abs(columns - column).max(axis=1) for column in columns])
            largest_KK[largest_KK < _EPSILON] = 1.0
            variances_KK = variances_KK + largest_KK**2 / max(1, self.rows - 1) / self.rows
            np.fill_diagonal(variances_KK, 0.0)
        return variances_KK

    @cached_property
    def _errors_KK(self) -> np.ndarray:
        """Standard error of every difference."""
        errors_KK: np.ndarray = np.sqrt(
            self._row_variances_KK + _compute_difference_variances(self._seeds_KK)
        )
        return errors_KK

    @cached_property
    def _largest_S(self) -> np.ndarray:
        """The largest standardised difference of any two candidates in every draw, sorted."""
        if len(self.names) == 2:  # the absolute value of one normal variable: exact quantiles
            from scipy.special import ndtri

            probabilities_S = (np.arange(self._draws) + 0.5) / self._draws
            quantiles_S: np.ndarray = ndtri(0.5 + 0.5 * probabilities_S)
            return quantiles_S
        covariance_KK = self._rows_KK + self._seeds_KK
        # Equal candidates make the covariance singular, which a Cholesky factor does not allow.
        # Rounding can make eigenvalues slightly negative.
        eigenvalues_K, eigenvectors_KK = np.linalg.eigh(covariance_KK)
        scales_K = np.sqrt(np.clip(eigenvalues_K, 0, None))
        normal_SK = np.random.default_rng(_SEED).standard_normal((self._draws, len(self.names)))
        errors_KK = np.sqrt(_compute_difference_variances(covariance_KK))
        return _find_largest_differences((normal_SK * scales_K) @ eigenvectors_KK.T, errors_KK)

    @cached_property
    def _p_values_KK(self) -> np.ndarray:
        from scipy.special import ndtri, stdtr

        p_values_KK = np.ones((len(self.names), len(self.names)))
        for index, other in itertools.combinations(range(len(self.names)), 2):
            error = float(self._errors_KK[index, other])
            # The two candidates are equal on every row: the p-value stays 1.
            if error == 0:
                continue
            t = abs(float(self._means_K[index] - self._means_K[other])) / error
            # The draws are normal: look up the normal value that is as unlikely as this t.
            z = -float(ndtri(stdtr(self._compute_freedom(index, other), -t)))
            larger = self._draws - int(np.searchsorted(self._largest_S, z - _EPSILON))
            p_value = (1 + larger) / (1 + self._draws)
            p_values_KK[index, other] = p_values_KK[other, index] = p_value
        adjusted_KK: np.ndarray = np.maximum(p_values_KK, self._flipped_p_values_KK)
        return adjusted_KK

    @cached_property
    def _flipped_p_values_KK(self) -> np.ndarray:
        """p-values of sign flips (K, K), the floor of all p-values.

        They say how often flipped rows set any two candidates as far apart as these two. 0 (no
        floor) with more than 200 rows, where they agree with the normal draws.
        """
        names = len(self.names)
        if self.rows > _MAX_FLIPPED_ROWS:
            return np.zeros((names, names))
        if names == 2:
            p_value = run_sign_flip_test(self._values_RK[:, 0] - self._values_RK[:, 1])
            return np.full((2, 2), p_value)
        columns = self._values_RK.T
        norms_KK = np.array([np.sqrt(((columns - column) ** 2).sum(axis=1)) for column in columns])
        is_exact = self.rows <= _MAX_EXACT_ROWS_FOR_MANY
        signs_SR = _list_all_signs(self.rows) if is_exact else _draw_random_signs(self.rows)
        largest_S = _find_largest_differences(signs_SR @ self._values_RK, norms_KK)
        sums_KK = self.rows * np.abs(self._means_K[:, None] - self._means_K[None, :])
        standardised_KK = np.divide(
            sums_KK, norms_KK, out=np.zeros_like(sums_KK), where=norms_KK > _EPSILON
        )
        larger_KK = len(largest_S) - np.searchsorted(largest_S, standardised_KK - _EPSILON)
        # Random signs do not contain the observed ones for certain, so these are counted in.
        extra = 0 if is_exact else 1
        p_values_KK: np.ndarray = (extra + larger_KK) / (extra + len(largest_S))
        return p_values_KK


def _find_largest_differences(values_SK: np.ndarray, scales_KK: np.ndarray) -> np.ndarray:
    """Return the largest scaled difference (S) of any two columns, sorted.

    Pairs with a scale of 0 are left out.

    Args:
        values_SK: One value of each candidate per draw.
        scales_KK: Standard error of each pair.
    """
    largest_S = np.zeros(len(values_SK))
    # Column by column: all pairs at once would take draws times pairs of memory.
    for index in range(values_SK.shape[1] - 1):
        differences_SK = np.abs(values_SK[:, index + 1 :] - values_SK[:, [index]])
        scales_K = scales_KK[index, index + 1 :]
        zeros_SK = np.zeros_like(differences_SK)
        scaled_SK = np.divide(
            differences_SK, scales_K, out=zeros_SK, where=scales_K > _EPSILON * 1e-3
        )
        largest_S = np.maximum(largest_S, scaled_SK.max(axis=1))
    return np.sort(largest_S)


def _list_all_signs(rows: int) -> np.ndarray:
    """Return all 2^R choices of signs."""
    numbers_S = np.arange(2**rows)
    signs_SR: np.ndarray = 1.0 - 2.0 * (numbers_S[:, None] >> np.arange(rows) & 1)
    return signs_SR


def _draw_random_signs(rows: int) -> np.ndarray:
    return np.random.default_rng(_SEED).choice([-1.0, 1.0], (_FLIPS, rows))


def _compute_difference_variances(covariance_KK: np.ndarray) -> np.ndarray:
    """Return the variance of every difference."""
    variances_K = np.diagonal(covariance_KK)
    variances_KK = variances_K[:, None] + variances_K[None, :] - 2 * covariance_KK
    clipped_KK: np.ndarray = np.clip(variances_KK, 0.0, None)
    return clipped_KK


def _compute_seed_covariance(candidates: Sequence[Candidate], metric: str) -> np.ndarray:
    """Return the covariance (K, K) of the candidates' means over seeds.

    Candidates with the same adapters share the effect of the seeds. All others are independent.
    """
    values = [
        np.array([compute_contributions(model, metric).mean() for model in candidate.models])
        for candidate in candidates
    ]
    origins = [candidate.origin or candidate.name for candidate in candidates]
    covariance_KK = np.zeros((len(candidates), len(candidates)))
    for index, other in itertools.product(range(len(candidates)), repeat=2):
        models = len(values[index])
        # Candidates with the same adapters move together from seed to seed. Counting them as
        # independent would hide a difference of their bases behind the spread of the seeds.
        if origins[index] == origins[other] and models == len(values[other]) > 1:
            covariance_KK[index, other] = np.cov(values[index], values[other])[0, 1] / models
    return covariance_KK
