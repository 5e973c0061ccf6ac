"""What a model did with each row, so that two models can be compared on the same rows. R rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
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


def packed(results: RowResults, step: int) -> bytes:
    """Return the numbers of each row as safetensors (answers are left out); `step` is that of the weights."""
    from safetensors.numpy import save

    tensors = {"loss": results.loss_R, "targets": results.targets_R}
    about = {"step": str(step), "whole": json.dumps(dict(results.whole))}
    if results.classified:
        said = results.classified
        tensors |= {"label": said.label_R, "predicted": said.predicted_R, "confidence": said.confidence_R}
        about["classes"] = str(said.classes)
    for name, (above_R, below_R) in results.ratios.items():
        tensors |= {f"ratio/{name}/above": above_R, f"ratio/{name}/below": below_R}
    data: bytes = save({name: np.ascontiguousarray(one) for name, one in tensors.items()}, about)
    return data


def unpacked(data: bytes) -> tuple[RowResults, int]:
    """Return (what `packed` was given, the step). Raises ValueError for what is no such thing."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        size = int.from_bytes(data[:8], "little")
        about = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        tensors = load(data)
        rows = len(tensors["loss"])
        if any(one.shape != (rows,) for one in tensors.values()):
            raise ValueError("rows that do not agree")
        said = None
        if "classes" in about:
            classes, label_R, predicted_R = int(about["classes"]), tensors["label"], tensors["predicted"]
            if (
                rows
                and not 0 <= min(label_R.min(), predicted_R.min()) <= max(label_R.max(), predicted_R.max()) < classes
            ):
                raise ValueError("a class that there is not")
            said = Classified(label_R.astype(int), predicted_R.astype(int), tensors["confidence"], classes)
        names = [name.removeprefix("ratio/").removesuffix("/above") for name in tensors if name.endswith("/above")]
        ratios = {name: (tensors[f"ratio/{name}/above"], tensors[f"ratio/{name}/below"]) for name in names}
        whole = {str(name): float(value) for name, value in json.loads(about["whole"]).items()}
        return RowResults(tensors["loss"], tensors["targets"], said, (), ratios, whole), int(about["step"])
    except (SafetensorError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not results of rows ({error})") from error


def joined(parts: Sequence[RowResults]) -> RowResults:
    """Return the results of several sets of rows as one; metrics of all rows together are left out."""
    first = parts[0]
    said = [one.classified for one in parts if one.classified]
    classified = None
    if said:
        classified = Classified(
            np.concatenate([one.label_R for one in said]),
            np.concatenate([one.predicted_R for one in said]),
            np.concatenate([one.confidence_R for one in said]),
            max(one.classes for one in said),
        )
    names = [name for name in first.ratios if all(name in one.ratios for one in parts)]
    ratios = {
        name: (
            np.concatenate([one.ratios[name][0] for one in parts]),
            np.concatenate([one.ratios[name][1] for one in parts]),
        )
        for name in names
    }
    return RowResults(
        np.concatenate([one.loss_R for one in parts]),
        np.concatenate([one.targets_R for one in parts]),
        classified,
        (),
        ratios,
    )


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
