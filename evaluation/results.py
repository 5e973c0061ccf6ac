"""What a model did with each row, so that two models can be compared on the same rows. R rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CONFUSION = ("accuracy", "f1", "precision", "recall")
"""What is worked out from how often each class was taken for which."""
Ratio = tuple[np.ndarray, np.ndarray]
"""A metric by row: what is added up, and what the sum is divided by."""


@dataclass(frozen=True)
class Classified:
    """The classes of rows, and what a classifier said."""

    label_R: np.ndarray
    predicted_R: np.ndarray
    confidence_R: np.ndarray
    """The probability of what was predicted."""
    classes: int


@dataclass(frozen=True)
class RowResults:
    """What a model did with the rows of a split, in the rows' order."""

    loss_R: np.ndarray
    """Negative log-likelihood in nats: of the class, or summed over the row's target tokens."""
    targets_R: np.ndarray
    """What the loss of a row is over: 1, or its target tokens."""
    classified: Classified | None = None
    answers: tuple[str | None, ...] = ()
    """What the model wrote; None for a row that it was not asked for."""
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    """Metrics of answers by row."""
    whole: Mapping[str, float] = field(default_factory=dict)
    """Metrics that only all rows together have."""

    def __len__(self) -> int:
        return len(self.loss_R)

    def ratio(self, name: str) -> Ratio:
        """A metric as a quotient of two sums over rows."""
        return (self.loss_R, self.targets_R) if name == "loss" else self.ratios[name]

    def has(self, name: str) -> bool:
        """Whether a metric can be worked out from the rows."""
        return name in ("loss", "perplexity", *self.ratios) or (self.classified is not None and name in CONFUSION)

    def records(self) -> Iterable[dict[str, Any]]:
        """One object a row, for a file of JSON lines."""
        for row in range(len(self)):
            record: dict[str, Any] = {"row": row, "loss": float(self.loss_R[row])}
            if self.classified:
                record["label"] = int(self.classified.label_R[row])
                record["predicted"] = int(self.classified.predicted_R[row])
                record["confidence"] = float(self.classified.confidence_R[row])
            else:
                record["tokens"] = int(self.targets_R[row])
                record["answer"] = self.answers[row] if self.answers else None
            if self.ratios:  # apart, since a user's own metric may have any name
                record["metrics"] = {name: [float(part[row]) for part in pair] for name, pair in self.ratios.items()}
            yield record


def from_records(records: list[dict[str, Any]], classes: int, whole: Mapping[str, float | None]) -> RowResults:
    """What `records` gave, read back."""
    first = records[0]

    def column(name: str, kind: type = float) -> np.ndarray:
        return np.array([record[name] for record in records], dtype=kind)

    parts_R = [record.get("metrics", {}) for record in records]
    ratios = {
        name: (
            np.array([parts[name][0] for parts in parts_R], dtype=float),
            np.array([parts[name][1] for parts in parts_R], dtype=float),
        )
        for name in parts_R[0]
    }
    numbers: dict[str, float] = {name: math.nan if value is None else value for name, value in whole.items()}
    if "predicted" in first:
        said = Classified(column("label", int), column("predicted", int), column("confidence"), classes)
        return RowResults(column("loss"), np.ones(len(records), dtype=int), said, (), ratios, numbers)
    answers = tuple(record["answer"] for record in records)
    return RowResults(column("loss"), column("tokens", int), None, answers, ratios, numbers)
