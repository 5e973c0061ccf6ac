"""The metrics of jobs/metrics.py as arithmetic on what a model said of each row, with bootstrap intervals.

R rows, C classes, S resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Interval = tuple[float, float]
_SEED = 20_260_101
_CHUNK = 200


@dataclass(frozen=True)
class Scores:
    """Metrics on some rows, each with its 95 % interval."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]


def classification_scores(
    losses_R: np.ndarray, predicted_R: np.ndarray, labels_R: np.ndarray, classes: int, resamples: int
) -> Scores:
    """Accuracy, macro F1, macro precision, macro recall and mean loss of rows.

    A class that is never predicted has precision 0, one that never occurs is left out of the averages
    (scikit-learn's macro average over the labels that occur in the truth or the predictions, zero_division=0).
    """
    pairs_R = labels_R * classes + predicted_R
    whole = _from_confusion(_confusion(pairs_R[None, :], classes))
    metrics = {name: float(values[0]) for name, values in whole.items()} | {"loss": float(losses_R.mean())}
    sampled: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for rows_SR in _resampled(len(labels_R), resamples):
        for name, values in _from_confusion(_confusion(pairs_R[rows_SR], classes)).items():
            sampled[name].append(values)
        sampled["loss"].append(losses_R[rows_SR].mean(axis=1))
    return Scores(metrics, {name: _interval(np.concatenate(values)) for name, values in sampled.items()})


def generation_scores(nll_R: np.ndarray, tokens_R: np.ndarray, resamples: int) -> Scores:
    """Mean loss of a target token (every token counts alike, not every row) and its exponential, the perplexity."""
    loss = nll_R.sum() / tokens_R.sum()
    sampled = [nll_R[rows].sum(axis=1) / tokens_R[rows].sum(axis=1) for rows in _resampled(len(nll_R), resamples)]
    low, high = _interval(np.concatenate(sampled))
    with np.errstate(over="ignore"):
        perplexity, ends = float(np.exp(loss)), (float(np.exp(low)), float(np.exp(high)))
    return Scores({"loss": float(loss), "perplexity": perplexity}, {"loss": (low, high), "perplexity": ends})


def _resampled(rows: int, resamples: int) -> list[np.ndarray]:
    """Indices of bootstrap samples (Efron 1979), the same for every model: differences between models are paired."""
    random = np.random.default_rng(_SEED)
    return [random.integers(0, rows, (min(_CHUNK, resamples - done), rows)) for done in range(0, resamples, _CHUNK)]


def _interval(values_S: np.ndarray) -> Interval:
    low, high = np.percentile(values_S, [2.5, 97.5])
    return float(low), float(high)


def _confusion(pairs_SR: np.ndarray, classes: int) -> np.ndarray:
    """Counts [S, true class, predicted class]."""
    samples = len(pairs_SR)
    offset = np.arange(samples)[:, None] * classes * classes
    counts = np.bincount((pairs_SR + offset).ravel(), minlength=samples * classes * classes)
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
