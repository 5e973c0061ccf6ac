"""Compute the metrics of jobs/metrics.py from per-row results, with their intervals.

Macro averages leave out a class that occurs neither in the truth nor in the predictions.
A class that is never predicted has precision 0 (scikit-learn's macro average over the
labels that occur, zero_division=0).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lorafleet.evaluation.metrics.intervals import (
    Interval,
    compute_confidence_interval,
    compute_contributions,
    count_confusions,
)
from lorafleet.evaluation.metrics.predictions import Classified, RowResults


@dataclass(frozen=True)
class Scores:
    """Metrics on some rows, each with its 95 % interval if it has one.

    See `intervals.explain_missing_interval`.
    """

    metrics: dict[str, float]
    intervals: dict[str, Interval]


def compute_scores(results: RowResults | Sequence[RowResults], names: Iterable[str]) -> Scores:
    """Compute the named metrics from per-row results, with their intervals.

    Args:
        results: One model, or several on the same rows (an arm's seeds). Metrics of several
            are means over the models; perplexity is the geometric mean.
        names: Metrics. Those that the results do not have are left out.
    """
    models = [results] if isinstance(results, RowResults) else list(results)
    first = models[0]
    metrics: dict[str, float] = {}
    intervals: dict[str, Interval] = {}
    for name in names:
        if name in first.whole:
            metrics[name] = float(np.mean([model.whole[name] for model in models]))
        elif name == "perplexity":
            # The exponential of the mean loss, over seeds as over rows. A mean of perplexities
            # would be led by the worst seed.
            metrics[name] = _compute_exp(
                float(np.mean([compute_contributions(model, "loss").mean() for model in models]))
            )
        elif first.has_metric(name):
            metrics[name] = float(
                np.mean([compute_contributions(model, name).mean() for model in models])
            )
        interval = compute_confidence_interval(models, name) if name in metrics else None
        if interval is not None:
            intervals[name] = interval
    return Scores(metrics, intervals)


def compute_confusion(classified: Classified) -> list[list[int]]:
    """Return the number of rows by true class (outer) and predicted class (inner)."""
    cells: list[list[int]] = count_confusions(classified).astype(int).tolist()
    return cells


def compute_per_class(classified: Classified, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return precision, recall, F1 and number of rows (`support`) of each class."""
    cells = count_confusions(classified)
    correct, true, predicted = np.diagonal(cells), cells.sum(axis=1), cells.sum(axis=0)
    table = {
        "precision": _divide(correct, predicted),
        "recall": _divide(correct, true),
        "f1": _divide(2 * correct, true + predicted),
    }
    return {
        label: {name: float(values[index]) for name, values in table.items()}
        | {"support": int(true[index])}
        for index, label in enumerate(labels)
    }


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide element by element; 0 where the denominator is 0."""
    share: np.ndarray = np.divide(
        numerator, denominator, out=np.zeros_like(numerator, dtype=float), where=denominator > 0
    )
    return share


def _compute_exp(value: float) -> float:
    """Return the exponential of a value; infinity on overflow."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))
