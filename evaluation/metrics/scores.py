"""The metrics of jobs/metrics.py as arithmetic on what a model did with each row, with their intervals.

The macro averages leave out a class that occurs neither in the truth nor in the predictions; one that is never
predicted has precision 0 (scikit-learn's macro average over the labels that occur, zero_division=0).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from lorafleet.evaluation.metrics.intervals import Interval, confidence_interval, confusion_counts, contributions
from lorafleet.evaluation.metrics.predictions import Classified, RowResults


@dataclass(frozen=True)
class Scores:
    """Metrics on some rows, each with its 95 % interval where the rows bear one (`intervals.missing_reason`)."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]


def scores(results: RowResults | Sequence[RowResults], names: Iterable[str]) -> Scores:
    """Return the named metrics of what a model did with some rows; those that it cannot have are left out.

    Of several models on the same rows (an arm's seeds), the means over them; of perplexities, the geometric mean.
    """
    models = [results] if isinstance(results, RowResults) else list(results)
    first = models[0]
    metrics: dict[str, float] = {}
    intervals: dict[str, Interval] = {}
    for name in names:
        if name in first.whole:
            metrics[name] = float(np.mean([one.whole[name] for one in models]))
        elif name == "perplexity":
            metrics[name] = _exp(float(np.mean([contributions(one, "loss").mean() for one in models])))
        elif first.has(name):
            metrics[name] = float(np.mean([contributions(one, name).mean() for one in models]))
        found = confidence_interval(models, name) if name in metrics else None
        if found is not None:
            intervals[name] = found
    return Scores(metrics, intervals)


def confusion(said: Classified) -> list[list[int]]:
    """How many rows of each class (outer) were said to be of which (inner)."""
    cells: list[list[int]] = confusion_counts(said).astype(int).tolist()
    return cells


def per_class(said: Classified, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and how many rows there are, of each class."""
    cells = confusion_counts(said)
    right, true, predicted = np.diagonal(cells), cells.sum(axis=1), cells.sum(axis=0)
    table = {
        "precision": _share(right, predicted),
        "recall": _share(right, true),
        "f1": _share(2 * right, true + predicted),
    }
    return {
        label: {name: float(values[index]) for name, values in table.items()} | {"support": int(true[index])}
        for index, label in enumerate(labels)
    }


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    share: np.ndarray = np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=whole > 0)
    return share


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))
