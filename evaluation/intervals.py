"""95 % intervals of metrics, each from the number of rows that can bear one.

Every metric is written as a mean over rows (`contributions`): exactly where it is one, and to first order (by its
influence function) where it is a quotient or a macro average. R rows, M models (seeds), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.results import CONFUSION, Classified, RowResults
from jobs.metrics import TEXT_METRICS

Interval = tuple[float, float]
FEWEST_ROWS = 6
"""Rows below which no interval is given and nothing is decided: no paired test of 5 can be below 0.0625."""
FEWEST_OF_CLASS = 10
"""Rows of every class that the interval of a macro average needs."""
SHARES = frozenset({*CONFUSION, *TEXT_METRICS} - {"length_ratio"})
"""Metrics that lie between 0 and 1."""
_MACRO = ("f1", "precision", "recall")
_PSEUDO_ROWS = 4.0
"""Half of them right and half wrong, added to the rows of a share (Agresti and Coull 1998)."""
_NORMAL = 1.959963984540054
_HALF = 0.975


def contributions(results: RowResults, name: str) -> np.ndarray:
    """Return what each row (R) adds to a metric: their mean is the metric."""
    if name == "perplexity":
        loss_R = contributions(results, "loss")
        with np.errstate(over="ignore"):
            value = np.exp(loss_R.mean())
        perplexity_R: np.ndarray = value * (1 + loss_R - loss_R.mean())
        return perplexity_R
    if name in CONFUSION and results.classified:
        said = results.classified
        if name == "accuracy":
            right_R: np.ndarray = (said.label_R == said.predicted_R).astype(float)
            return right_R
        cells_CC = counts(said)
        value, influence_CC = _macro(cells_CC, name)
        added_R: np.ndarray = value + influence_CC[said.label_R, said.predicted_R]
        return added_R
    above_R, below_R = results.ratio(name)
    if below_R.sum() == 0:
        return np.zeros(len(above_R))
    value = above_R.sum() / below_R.sum()
    ratio_R: np.ndarray = value + (above_R - value * below_R) / below_R.mean()
    return ratio_R


def interval_of(results: RowResults | Sequence[RowResults], name: str) -> Interval | None:
    """Return the 95 % interval of a metric; None where the rows cannot bear one (`why_none` says why).

    Of several models on the same rows it is that of their mean, over rows and over models that could have been drawn.
    One model's accuracy and other shares of rows have Wilson's interval (1927), macro averages Agresti and Coull's
    carried over to them, means Student's t with Hall's correction for skewness (1992).
    """
    models = [results] if isinstance(results, RowResults) else list(results)
    if why_none(models, name) is not None:
        return None
    if name == "perplexity":
        found = interval_of(models, "loss")
        with np.errstate(over="ignore"):
            return None if found is None else (float(np.exp(found[0])), float(np.exp(found[1])))
    if name in _MACRO and models[0].classified:
        return _of_macro([one.classified for one in models if one.classified], name)
    values_MR = np.stack([contributions(one, name) for one in models])
    if not np.isfinite(values_MR).all():
        return None
    whole = name in SHARES and bool(np.isin(values_MR, (0.0, 1.0)).all())
    if whole and len(models) == 1:
        return wilson(int(values_MR.sum()), values_MR.shape[1])
    return _of_mean(values_MR, pseudo=_PSEUDO_ROWS if whole else 0.0, share=name in SHARES)


def why_none(models: Sequence[RowResults], name: str) -> str | None:
    """Say why a metric of some rows has no interval; None where it has one."""
    first = models[0]
    if len(first) < FEWEST_ROWS:
        return f"{len(first)} rows are too few for an interval ({FEWEST_ROWS} are the least)"
    if name in first.whole:
        return f"{name} is of all rows together"
    if name in _MACRO and first.classified:
        cells_CC = sum(counts(one.classified) for one in models if one.classified)
        assert isinstance(cells_CC, np.ndarray)
        occurs_C = cells_CC.sum(axis=0) + cells_CC.sum(axis=1) > 0
        least = int(counts(first.classified).sum(axis=1)[occurs_C].min())
        if least < FEWEST_OF_CLASS:
            return f"a class has {least} rows, and an interval of {name} needs {FEWEST_OF_CLASS} of each"
    return None


def wilson(right: int, rows: int) -> Interval:
    """Return Wilson's score interval (1927) of a share."""
    share, z2 = right / rows, _NORMAL**2
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = _NORMAL / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if right == 0 else low), (1.0 if right == rows else high)


def mean_interval(values_R: np.ndarray) -> Interval | None:
    """Return the 95 % interval of a mean of numbers (R); None where they are too few, or all the same."""
    if len(values_R) < FEWEST_ROWS:
        return None
    return _of_mean(np.asarray(values_R, dtype=float)[None, :], pseudo=0.0, share=False)


def _of_mean(values_MR: np.ndarray, *, pseudo: float, share: bool) -> Interval | None:
    """Of the mean over rows and models; with `pseudo` so many rows, half of them 1 and half 0, are added."""
    models, rows = values_MR.shape
    values_R = values_MR.mean(axis=0)
    whole = rows + pseudo
    middle = (values_R.sum() + pseudo / 2) / whole
    apart_R = values_R - middle
    squares = (apart_R**2).sum() + pseudo / 2 * ((1 - middle) ** 2 + middle**2)
    of_rows = squares / (whole if pseudo else rows - 1) / whole
    seeds = SeedSpread(values_MR.mean(axis=1))
    error = math.sqrt(of_rows + seeds.variance)
    if error == 0.0:
        return None
    skew = 0.0 if pseudo else float((apart_R**3).mean() / rows**2 / error**3)
    quantile = student(degrees(of_rows, rows - 1, seeds.variance, models - 1), _HALF)
    low = float(middle - error * _hall(quantile, skew))
    high = float(middle - error * _hall(-quantile, skew))
    return (max(0.0, low), min(1.0, high)) if share else (low, high)


def student(freedom: float, share: float) -> float:
    """Return a quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))


def _hall(quantile: float, skew: float) -> float:
    """Return a quantile of a studentised mean of that skewness (Hall 1992: the inverse of his cubic transformation)."""
    if abs(skew) < 1e-9:
        return quantile
    return float((np.cbrt(1 + skew * (quantile - skew / 6)) - 1) / (skew / 3))


@dataclass(frozen=True)
class SeedSpread:
    """How far models of one arm that differ in their seed lie apart."""

    values_M: np.ndarray
    """The metric of each."""

    @property
    def variance(self) -> float:
        """Of their mean; 0 of one alone, whose spread is not known."""
        models = len(self.values_M)
        return float(self.values_M.var(ddof=1) / models) if models > 1 else 0.0


def degrees(one: float, of_one: float, other: float, of_other: float) -> float:
    """Return the degrees of freedom of a sum of two variances (Satterthwaite 1946)."""
    if other == 0.0:
        return max(1.0, of_one)
    return (one + other) ** 2 / (one**2 / max(1.0, of_one) + other**2 / max(1.0, of_other))


def _of_macro(models: Sequence[Classified], name: str) -> Interval:
    """Of the mean macro average of models on the same rows, with pseudo-rows in the proportion of the classes."""
    rows = len(models[0].label_R)
    of_models_R, pseudo_squares, middles, values = np.zeros(rows), 0.0, [], []
    for said in models:
        cells_CC = counts(said)
        added_CC = _pseudo_cells(cells_CC)
        middle, influence_CC = _macro(cells_CC + added_CC, name)
        of_models_R += influence_CC[said.label_R, said.predicted_R] / len(models)
        pseudo_squares += float((added_CC * influence_CC**2).sum()) / len(models)
        middles.append(middle)
        values.append(_macro(cells_CC, name)[0])
    whole = rows + _PSEUDO_ROWS
    of_rows = (float((of_models_R**2).sum()) + pseudo_squares) / whole**2
    seeds = SeedSpread(np.array(values))
    half = student(degrees(of_rows, rows - 1, seeds.variance, len(models) - 1), _HALF) * math.sqrt(
        of_rows + seeds.variance
    )
    middle = float(np.mean(middles))
    return max(0.0, middle - half), min(1.0, middle + half)


def _pseudo_cells(cells_CC: np.ndarray) -> np.ndarray:
    """Return pseudo-rows: half right in proportion to the classes, half wrong in proportion to both margins."""
    true_C, said_C = cells_CC.sum(axis=1) / cells_CC.sum(), cells_CC.sum(axis=0) / cells_CC.sum()
    off_diagonal = 1 - np.eye(len(cells_CC))
    wrong_CC = np.outer(true_C, said_C) * off_diagonal
    if wrong_CC.sum() == 0:
        wrong_CC = np.outer(true_C, true_C) * off_diagonal
    right_CC = np.diag(true_C) * _PSEUDO_ROWS / 2
    if wrong_CC.sum() == 0:  # one class alone
        return right_CC
    cells: np.ndarray = right_CC + wrong_CC / wrong_CC.sum() * _PSEUDO_ROWS / 2
    return cells


def counts(said: Classified) -> np.ndarray:
    """Return how many rows of each class (outer) were said to be of which (inner)."""
    pairs_R = said.label_R * said.classes + said.predicted_R
    return np.bincount(pairs_R, minlength=said.classes**2).reshape(said.classes, said.classes).astype(float)


def _macro(cells_CC: np.ndarray, name: str) -> tuple[float, np.ndarray]:
    """Return (a macro average, the influence (C, C) on it of a row of each class that is said to be of each)."""
    rows, classes = cells_CC.sum(), len(cells_CC)
    true_C, said_C, right_C = cells_CC.sum(axis=1), cells_CC.sum(axis=0), np.diagonal(cells_CC)
    occurs_C = true_C + said_C > 0
    above_C = 2 * right_C if name == "f1" else right_C
    below_C = {"f1": true_C + said_C, "precision": said_C, "recall": true_C}[name]
    value_C = np.divide(above_C, below_C, out=np.zeros(classes), where=below_C > 0)
    influence_CC = np.zeros((classes, classes))
    for place in np.flatnonzero(occurs_C & (below_C > 0)):
        counts_CC = np.zeros((classes, classes))
        if name != "precision":
            counts_CC[place, :] += 1
        if name != "recall":
            counts_CC[:, place] += 1
        hits_CC = np.zeros((classes, classes))
        hits_CC[place, place] = 2 if name == "f1" else 1
        influence_CC += (hits_CC - value_C[place] * counts_CC) * rows / below_C[place]
    number = max(1, int(occurs_C.sum()))
    return float(value_C[occurs_C].sum() / number), influence_CC / number
