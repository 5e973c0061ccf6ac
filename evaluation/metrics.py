"""The metrics of jobs/metrics.py as arithmetic on what a model did with each row, with bootstrap intervals.

R rows, C classes, S resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.results import CONFUSION, Classified, RowResults
from jobs.metrics import TEXT_METRICS

Interval = tuple[float, float]
_SHARES = {*CONFUSION, *TEXT_METRICS} - {"length_ratio"}
"""Metrics that lie between 0 and 1."""
_SEED = 20_260_101
_CHUNK = 200


@dataclass(frozen=True)
class Scores:
    """Metrics on some rows, each with its 95 % interval (but for those that only all rows together have)."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]


def scores(results: RowResults | Sequence[RowResults], names: Iterable[str], resamples: int) -> Scores:
    """The named metrics of what a model did with some rows; those that it cannot have are left out.

    Of several models on the same rows (an arm's seeds), the means over them; intervals are then over rows and over the
    models that were drawn. Perplexity is the exponential of the loss, and so are the ends of its interval.
    """
    models = [results] if isinstance(results, RowResults) else list(results)
    first = models[0]
    wanted = [name for name in names if name in first.whole or first.has(name)]
    by_row = [name for name in wanted if name not in first.whole and name != "perplexity"]
    every_row = np.arange(len(first))[None, :]
    metrics = {name: float(mean_statistic(models, name, every_row)[0]) for name in by_row}
    sampled: dict[str, list[np.ndarray]] = {name: [] for name in by_row}
    for number, rows_SR in enumerate(resampled(len(first), resamples)):
        for name in by_row:
            sampled[name].append(_drawn_statistic(models, name, rows_SR, number))
    intervals = {name: interval(np.concatenate(values)) for name, values in sampled.items()}
    if "perplexity" in wanted:
        metrics["perplexity"] = _exp(metrics["loss"])
        intervals["perplexity"] = (_exp(intervals["loss"][0]), _exp(intervals["loss"][1]))
    metrics |= {name: float(np.mean([m.whole[name] for m in models])) for name in wanted if name in first.whole}
    return Scores({name: metrics[name] for name in wanted}, {n: intervals[n] for n in wanted if n in intervals})


@dataclass(frozen=True)
class Difference:
    """How far one set of models is from another on the same rows."""

    value: float
    interval: Interval
    p_value: float


def difference(
    ours: Sequence[RowResults], theirs: Sequence[RowResults], name: str, resamples: int, *, same_models: bool = False
) -> Difference:
    """The paired bootstrap of a metric: both sides are seen on the same resampled rows (Efron and Tibshirani 1993).

    Each side's models are drawn anew as well, so that a difference between lucky and unlucky seeds is none. With
    `same_models` the n-th of one side is the n-th of the other on another base: both sides draw the same ones.

    The p-value is two-sided: twice the smaller share of differences on either side of 0, each share with one resample
    more than was drawn (Davison and Hinkley 1997), so that it is never 0.
    """
    every_row = np.arange(len(ours[0]))[None, :]
    value = float((mean_statistic(ours, name, every_row) - mean_statistic(theirs, name, every_row))[0])
    parts = [
        _drawn_statistic(ours, name, rows_SR, 2 * number)
        - _drawn_statistic(theirs, name, rows_SR, 2 * number + (0 if same_models else 1))
        for number, rows_SR in enumerate(resampled(len(ours[0]), resamples))
    ]
    found_S = np.concatenate(parts)
    below, above = (int((found_S <= 0).sum()), int((found_S >= 0).sum()))
    return Difference(value, interval(found_S), min(1.0, 2 * (1 + min(below, above)) / (1 + len(found_S))))


def _drawn_statistic(models: Sequence[RowResults], name: str, rows_SR: np.ndarray, number: int) -> np.ndarray:
    """A metric of each sample of rows (S), as the mean over as many models as there are, drawn with replacement."""
    if len(models) == 1:
        return mean_statistic(models, name, rows_SR)
    if name == "perplexity":
        with np.errstate(over="ignore"):
            exponential: np.ndarray = np.exp(_drawn_statistic(models, "loss", rows_SR, number))
        return exponential
    values_MS = np.stack([statistic(results, name, rows_SR) for results in models])
    drawn_MS = np.random.default_rng([_SEED, number]).integers(0, len(models), values_MS.shape)
    mean_S = values_MS.mean(axis=0)
    # Drawing n of n has only (n - 1) / n of the variance that n models show: much less, of 2 or 3.
    wider = math.sqrt(len(models) / (len(models) - 1))
    drawn_S: np.ndarray = mean_S + wider * (np.take_along_axis(values_MS, drawn_MS, axis=0).mean(axis=0) - mean_S)
    return np.clip(drawn_S, 0.0, 1.0) if name in _SHARES else drawn_S


def mean_statistic(models: Sequence[RowResults], name: str, rows_SR: np.ndarray) -> np.ndarray:
    """A metric of each sample of rows (S), as the mean over models; of perplexities, the geometric mean."""
    if name == "perplexity":
        with np.errstate(over="ignore"):
            exponential: np.ndarray = np.exp(mean_statistic(models, "loss", rows_SR))
        return exponential
    mean: np.ndarray = np.mean([statistic(results, name, rows_SR) for results in models], axis=0)
    return mean


def statistic(results: RowResults, name: str, rows_SR: np.ndarray) -> np.ndarray:
    """A metric of each sample of rows (S).

    The macro averages leave out a class that occurs neither in the truth nor in the predictions; one that is never
    predicted has precision 0 (scikit-learn's macro average over the labels that occur, zero_division=0).
    """
    if name in CONFUSION and results.classified:
        return _from_confusion(_confusion(results.classified, rows_SR))[name]
    above_R, below_R = results.ratio(name)
    return _share(above_R[rows_SR].sum(axis=1), below_R[rows_SR].sum(axis=1))


def resampled(rows: int, resamples: int) -> Iterator[np.ndarray]:
    """Indices of bootstrap samples (Efron 1979), the same for every model: differences between models are paired."""
    random = np.random.default_rng(_SEED)
    for done in range(0, resamples, _CHUNK):
        yield random.integers(0, rows, (min(_CHUNK, resamples - done), rows))


def interval(values_S: np.ndarray) -> Interval:
    """The middle 95 % of resampled values."""
    low, high = np.percentile(values_S, [2.5, 97.5])
    return float(low), float(high)


def confusion(said: Classified) -> list[list[int]]:
    """How many rows of each class (outer) were said to be of which (inner)."""
    counts: list[list[int]] = _confusion(said, np.arange(len(said.label_R))[None, :])[0].tolist()
    return counts


def per_class(said: Classified, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and how many rows there are, of each class."""
    counts = np.array(confusion(said), dtype=float)
    right, true, predicted = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
    table = {
        "precision": _share(right, predicted),
        "recall": _share(right, true),
        "f1": _share(2 * right, true + predicted),
    }
    return {
        label: {name: float(values[index]) for name, values in table.items()} | {"support": int(true[index])}
        for index, label in enumerate(labels)
    }


def _confusion(said: Classified, rows_SR: np.ndarray) -> np.ndarray:
    """Counts [S, true class, predicted class]."""
    samples, classes = len(rows_SR), said.classes
    pairs_R = said.label_R * classes + said.predicted_R
    offset = np.arange(samples)[:, None] * classes * classes
    counts = np.bincount((pairs_R[rows_SR] + offset).ravel(), minlength=samples * classes * classes)
    return counts.reshape(samples, classes, classes)


def _from_confusion(counts: np.ndarray) -> dict[str, np.ndarray]:
    right = np.diagonal(counts, axis1=1, axis2=2).astype(float)
    true, predicted = counts.sum(axis=2), counts.sum(axis=1)
    precision, recall = _share(right, predicted), _share(right, true)
    f1 = _share(2 * right, true + predicted)
    occurs = (true + predicted) > 0
    return {
        "accuracy": right.sum(axis=1) / counts.sum(axis=(1, 2)),
        "f1": _average(f1, occurs),
        "precision": _average(precision, occurs),
        "recall": _average(recall, occurs),
    }


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    share: np.ndarray = np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=whole > 0)
    return share


def _average(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    average: np.ndarray = (values * counted).sum(axis=1) / np.maximum(counted.sum(axis=1), 1)
    return average


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))
