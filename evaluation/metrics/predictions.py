"""Per-row results of a model, for comparing two models on the same rows.

R rows. Trials write those of their best weights on the validation rows (`serialize`),
held-out evaluations those of each model (`RowResults.to_records`); reports read both.
They hold what every metric and interval is computed from, so a report can be built
again, and runs be compared, without the models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CONFUSION_METRICS = ("accuracy", "f1", "precision", "recall")
"""Metrics that are computed from the confusion matrix."""
MAX_CLASSES = 4096
"""Most classes of stored results: a confusion matrix of this size takes 128 MB."""
Ratio = tuple[np.ndarray, np.ndarray]
"""A metric per row: numerators and denominators. The metric is the quotient of their sums."""


@dataclass(frozen=True)
class Classified:
    """True and predicted classes of rows."""

    label_R: np.ndarray
    predicted_R: np.ndarray
    confidence_R: np.ndarray
    """Probability of the predicted class."""
    classes: int


@dataclass(frozen=True)
class RowResults:
    """Results of a model on the rows of a split, in the order of the rows.

    Either `classified` is set, or the model generates text. Two results can be compared
    only if they are of the same rows, which callers check by number and by digest of the
    rows.
    """

    loss_R: np.ndarray
    """Negative log-likelihood in nats: of the class, or summed over the row's target tokens."""
    targets_R: np.ndarray
    """Number of targets that the loss of a row is over: 1, or its target tokens."""
    classified: Classified | None = None
    answers: tuple[str | None, ...] = ()
    """Answers of the model; None for a row that it was not asked to answer."""
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    """Metrics of answers per row."""
    whole: Mapping[str, float] = field(default_factory=dict)
    """Metrics that have one value for all rows together."""

    def __len__(self) -> int:
        return len(self.loss_R)

    def get_ratio(self, name: str) -> Ratio:
        """Return a metric as a quotient of two sums over rows."""
        return (self.loss_R, self.targets_R) if name == "loss" else self.ratios[name]

    def has_metric(self, name: str) -> bool:
        """Return True if a metric can be computed from the rows."""
        return name in ("loss", "perplexity", *self.ratios) or (
            self.classified is not None and name in CONFUSION_METRICS
        )

    def to_records(self) -> Iterable[dict[str, Any]]:
        """Yield one record per row, for a file of JSON lines (`predictions-SPLIT.jsonl`).

        `from_records` reads them. Metrics of all rows together are not part of them; they are
        stored in the record of `summarize_results`.
        """
        for row in range(len(self)):
            record: dict[str, Any] = {"row": row, "loss": float(self.loss_R[row])}
            if self.classified:
                record["label"] = int(self.classified.label_R[row])
                record["predicted"] = int(self.classified.predicted_R[row])
                record["confidence"] = float(self.classified.confidence_R[row])
            else:
                record["tokens"] = int(self.targets_R[row])
                record["answer"] = self.answers[row] if self.answers else None
            if self.ratios:  # in a block of its own: a custom metric may have any name
                record["metrics"] = {
                    name: [float(values[row]) for values in pair]
                    for name, pair in self.ratios.items()
                }
            yield record


def serialize(results: RowResults, step: int) -> bytes:
    """Serialise per-row results as safetensors, without the answers.

    safetensors, because a run folder may come from somebody else and reading it must not
    run code.

    Args:
        results: The results.
        step: Step of the weights that were evaluated, by which readers notice an outdated
            file.
    """
    from safetensors.numpy import save

    tensors = {"loss": results.loss_R, "targets": results.targets_R}
    metadata = {"step": str(step), "whole": json.dumps(dict(results.whole))}
    if results.classified:
        classified = results.classified
        tensors["label"] = classified.label_R
        tensors["predicted"] = classified.predicted_R
        tensors["confidence"] = classified.confidence_R
        metadata["classes"] = str(classified.classes)
    for name, (above_R, below_R) in results.ratios.items():
        tensors |= {f"ratio/{name}/above": above_R, f"ratio/{name}/below": below_R}
    data: bytes = save(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata
    )
    return data


def deserialize(data: bytes) -> tuple[RowResults, int]:
    """Return the results and the step that `serialize` wrote.

    The data is untrusted: the run may have been copied from elsewhere, and the file may be
    torn.

    Raises:
        ValueError: The data is anything else, or its sizes or classes do not fit together.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        # `safetensors.numpy.load` does not return the metadata. A file begins with the length of
        # its JSON header, as 8 bytes.
        header_size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_size]).get("__metadata__", {})
        tensors = load(data)
        rows = len(tensors["loss"])
        if any(tensor.shape != (rows,) for tensor in tensors.values()):
            raise ValueError("the tensors have different numbers of rows")
        classified = (
            _read_classified(tensors, int(metadata["classes"])) if "classes" in metadata else None
        )
        names = [
            name.removeprefix("ratio/").removesuffix("/above")
            for name in tensors
            if name.endswith("/above")
        ]
        ratios = {
            name: (tensors[f"ratio/{name}/above"], tensors[f"ratio/{name}/below"]) for name in names
        }
        whole = {str(name): float(value) for name, value in json.loads(metadata["whole"]).items()}
        results = RowResults(tensors["loss"], tensors["targets"], classified, (), ratios, whole)
        return results, int(metadata["step"])
    except (SafetensorError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a file of per-row results ({error})") from error


def _read_classified(tensors: Mapping[str, np.ndarray], classes: int) -> Classified:
    label_R, predicted_R = tensors["label"].astype(int), tensors["predicted"].astype(int)
    # A confusion matrix has `classes` x `classes` cells, so a number in a file from elsewhere could
    # ask for any amount of memory.
    if classes > MAX_CLASSES:
        raise ValueError(f"{classes} classes")
    classes_R = np.concatenate([label_R, predicted_R])
    if len(classes_R) and not 0 <= classes_R.min() <= classes_R.max() < classes:
        raise ValueError("a class is out of range")
    return Classified(label_R, predicted_R, tensors["confidence"], classes)


def concatenate(parts: Sequence[RowResults]) -> RowResults:
    """Return the results of several sets of rows as one, in the order of `parts`.

    Used for the folds of a cross-validation. Answers and metrics of all rows together are
    left out, and so are metrics that a part does not have.
    """
    first = parts[0]
    classified_parts = [part.classified for part in parts if part.classified]
    classified = None
    if classified_parts:
        classified = Classified(
            np.concatenate([part.label_R for part in classified_parts]),
            np.concatenate([part.predicted_R for part in classified_parts]),
            np.concatenate([part.confidence_R for part in classified_parts]),
            max(part.classes for part in classified_parts),
        )
    names = [name for name in first.ratios if all(name in results.ratios for results in parts)]
    ratios = {
        name: (
            np.concatenate([results.ratios[name][0] for results in parts]),
            np.concatenate([results.ratios[name][1] for results in parts]),
        )
        for name in names
    }
    return RowResults(
        np.concatenate([results.loss_R for results in parts]),
        np.concatenate([results.targets_R for results in parts]),
        classified,
        (),
        ratios,
    )


def from_records(
    records: list[dict[str, Any]], classes: int, whole: Mapping[str, float | None]
) -> RowResults:
    """Return the results that `RowResults.to_records` wrote.

    Args:
        records: All rows of a predictions file; at least one.
        classes: Number of classes; 0 for a model that generates text.
        whole: Metrics of all rows together. None stands for a value that was not finite.
    """
    first = records[0]

    def read_column(name: str, kind: type = float) -> np.ndarray:
        return np.array([record[name] for record in records], dtype=kind)

    metrics_R = [record.get("metrics", {}) for record in records]
    ratios = {
        name: (
            np.array([metrics[name][0] for metrics in metrics_R], dtype=float),
            np.array([metrics[name][1] for metrics in metrics_R], dtype=float),
        )
        for name in metrics_R[0]
    }
    numbers: dict[str, float] = {
        name: math.nan if value is None else value for name, value in whole.items()
    }
    if "predicted" in first:
        classified = Classified(
            read_column("label", int),
            read_column("predicted", int),
            read_column("confidence"),
            classes,
        )
        return RowResults(
            read_column("loss"), np.ones(len(records), dtype=int), classified, (), ratios, numbers
        )
    answers = tuple(record["answer"] for record in records)
    return RowResults(
        read_column("loss"), read_column("tokens", int), None, answers, ratios, numbers
    )
