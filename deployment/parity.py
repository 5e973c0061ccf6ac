"""Compare a target with its source on held-out rows.

Both models are run on the same tokens; logits, predictions and a metric are compared.
Limits on the differences are in `jobs/schema/export.py`, the verdict in
`jobs/runs/export_result.py`. Nothing here knows the runtime: a model is a `Decoder` or
has `logits`.

Shapes: T tokens of a row, P compared positions, C classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorafleet.deployment.decoding import Decoder, compute_positions, pad_left
from lorafleet.deployment.runtime import pad_right
from lorafleet.evaluation.metrics.predictions import Classified, RowResults
from lorafleet.evaluation.metrics.scores import compute_scores
from lorafleet.jobs.runs.export_result import ParityMeasurement

_MAX_TOTAL_POSITIONS, _MAX_ROW_POSITIONS, _MIN_ROW_POSITIONS = 1024, 32, 2
"""Limits on the positions whose logits are compared, each with the whole vocabulary: over
all rows, and largest and smallest number per row.
"""
_STEPPED_ROWS = 4
"""Number of rows that are also run token by token."""
_STEPS = 8
_BATCH = 8


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows on which a source and its targets are compared.

    Built once per export, so that every target sees the same rows, positions and steps.
    """

    rows: tuple[tuple[int, ...], ...]
    """Token ids of each row."""
    targets: tuple[int, ...]
    """The class of each row; for a causal model, the number of tokens before the trained part."""
    pad_id: int
    classes: int = 0
    """Number of classes. 0: a causal model."""

    def select_positions(self, row: int) -> np.ndarray:
        """Return the compared positions of a row (P), evenly spread over its trained part.

        Position t holds the logits that predict token t + 1, so the last token has none. The
        limits keep the logits of all rows in memory: a vocabulary of 150,000 takes 0.6 MB per
        position.
        """
        first, last = max(1, self.targets[row]) - 1, len(self.rows[row]) - 2
        max_positions = min(
            _MAX_ROW_POSITIONS, max(_MIN_ROW_POSITIONS, _MAX_TOTAL_POSITIONS // len(self.rows))
        )
        return np.unique(
            np.linspace(first, last, min(max_positions, last - first + 1)).round().astype(int)
        )

    def list_prompts(self, max_rows: int, max_tokens: int) -> list[list[int]]:
        """Return the first rows as inputs: whole texts for a classifier, else prompts.

        Args:
            max_rows: Most rows.
            max_tokens: Longer prompts keep their last tokens, as an answer must fit behind
                them.
        """
        rows = [list(row) for row in self.rows[:max_rows]]
        if self.classes:
            return rows
        return [
            row[: max(1, prompt_length)][-max_tokens:]
            for row, prompt_length in zip(rows, self.targets, strict=False)
        ]

    def select_stepped_rows(self) -> tuple[list[tuple[int, ...]], int]:
        """Return the rows to run in steps, and how many of their last tokens are run one by one.

        The rows have different lengths, so that a batch of them is padded: rows of equal length
        would hide errors in the mask and the positions.
        """
        by_length: dict[int, tuple[int, ...]] = {}
        for row in self.rows:
            by_length.setdefault(len(row), row)
        long = [length for length in by_length if length > _STEPS + 1]
        lengths = sorted(long or [length for length in by_length if length > 2])
        indexes = np.unique(np.linspace(0, len(lengths) - 1, _STEPPED_ROWS).astype(int))
        chosen = [by_length[lengths[index]] for index in indexes if lengths]
        return chosen, min([_STEPS, *(len(row) - 2 for row in chosen)])


@dataclass
class ModelOutputs:
    """Outputs of a model on held-out rows."""

    logits: list[np.ndarray]
    """Logits of each row: at its compared positions (P x V), or of its classes (C)."""
    results: RowResults
    stepped: list[np.ndarray] = field(default_factory=list)
    """Logits of the rows that were run in steps, at the last steps (P x V)."""


def collect_outputs(model: Any, held_out: HeldOut) -> ModelOutputs:
    """Run a model on all held-out rows, and for a causal model on some of them step by step.

    Args:
        model: A `Decoder`, or a classifier with `logits`.
        held_out: The rows.
    """
    return (
        _collect_class_outputs(model, held_out)
        if held_out.classes
        else _collect_token_outputs(model, held_out)
    )


def _collect_class_outputs(model: Any, held_out: HeldOut) -> ModelOutputs:
    """Run a classifier on all rows."""
    batches = []
    for start in range(0, len(held_out.rows), _BATCH):
        batches.append(
            model.logits(*pad_right(held_out.rows[start : start + _BATCH], held_out.pad_id))
        )
    # In float64, so that the metric has no rounding errors of its own.
    logits_RC = np.concatenate(batches).astype(np.float64)
    shifted_RC = logits_RC - logits_RC.max(axis=1, keepdims=True)
    log_RC = shifted_RC - np.log(np.exp(shifted_RC).sum(axis=1, keepdims=True))
    label_R, rows = np.array(held_out.targets), np.arange(len(held_out.rows))
    predicted_R = logits_RC.argmax(axis=1)
    classified = Classified(
        label_R, predicted_R, np.exp(log_RC[rows, predicted_R]), held_out.classes
    )
    return ModelOutputs(
        list(logits_RC), RowResults(-log_RC[rows, label_R], np.ones(len(rows), int), classified)
    )


def _collect_token_outputs(model: Decoder, held_out: HeldOut) -> ModelOutputs:
    """Run a causal model on all rows, whole and in steps."""
    return ModelOutputs(*_run_whole_rows(model, held_out), _run_in_steps(model, held_out))


def _run_whole_rows(model: Decoder, held_out: HeldOut) -> tuple[list[np.ndarray], RowResults]:
    """Return (logits at the compared positions, loss of each row)."""
    logits, losses, counts = [], [], []
    for number, row in enumerate(held_out.rows):
        ids_1T = np.array([row], np.int64)
        mask_1T = np.ones_like(ids_1T)
        logits_1TV, _ = model.step(ids_1T, mask_1T, compute_positions(mask_1T), None)
        first = max(1, held_out.targets[number])
        learnt_PV = logits_1TV[0, first - 1 : -1].astype(np.float64)
        losses.append(_compute_nll(learnt_PV, ids_1T[0, first:]).sum())
        counts.append(len(row) - first)
        logits.append(logits_1TV[0, held_out.select_positions(number)])
    return logits, RowResults(np.array(losses), np.array(counts))


def _run_in_steps(model: Decoder, held_out: HeldOut) -> list[np.ndarray]:
    """Run some rows as a left-padded batch, with their last tokens one by one.

    All other tokens are run at once. Errors in the cache, the mask or the positions show
    only here.

    Returns:
        Logits of each row at the last steps (P x V); empty if no row is long enough.
    """
    rows, steps = held_out.select_stepped_rows()
    if not rows:
        return []
    ids_BT, mask_BT = pad_left([row[:-steps] for row in rows], held_out.pad_id)
    logits_BTV, cache = model.step(ids_BT, mask_BT, compute_positions(mask_BT), None)
    last_logits = [logits_BTV[:, -1]]
    for step in range(steps, 1, -1):
        mask_BT = np.concatenate([mask_BT, np.ones((len(rows), 1), np.int64)], axis=1)
        new_B1 = np.array([[row[-step]] for row in rows], np.int64)
        logits_BTV, cache = model.step(new_B1, mask_BT, compute_positions(mask_BT)[:, -1:], cache)
        last_logits.append(logits_BTV[:, -1])
    return list(np.stack(last_logits, axis=1))


def _compute_nll(logits_PV: np.ndarray, tokens_P: np.ndarray) -> np.ndarray:
    """Return the negative log-likelihood of each token."""
    top_P1 = logits_PV.max(axis=1, keepdims=True)
    total_P = np.log(np.exp(logits_PV - top_P1).sum(axis=1)) + top_P1[:, 0]
    nll_P: np.ndarray = total_P - logits_PV[np.arange(len(tokens_P)), tokens_P]
    return nll_P


def compare_outputs(source: ModelOutputs, target: ModelOutputs) -> ParityMeasurement:
    """Compare the outputs of a target with those of its source.

    Args:
        source: Outputs of the source.
        target: Outputs of the target, on the same rows.

    Returns:
        The differences. Values that are NaN or infinite become None, which no gate accepts.
    """
    metric = "accuracy" if source.results.classified else "perplexity"
    before, after = (_compute_metric(outputs.results, metric) for outputs in (source, target))
    largest, mean = _compute_differences(source.logits, target.logits)
    agreeing = _compare_predictions(source.logits, target.logits)
    agreeing_steps = _compare_predictions(source.stepped, target.stepped)
    return ParityMeasurement(
        rows=len(source.logits),
        positions=len(agreeing),
        max_logit_difference=_drop_non_finite(largest),
        mean_logit_difference=_drop_non_finite(mean),
        agreement=float(agreeing.mean()),
        steps=len(agreeing_steps),
        step_agreement=float(agreeing_steps.mean()) if len(agreeing_steps) else None,
        step_logit_difference=_drop_non_finite(
            _compute_differences(source.stepped, target.stepped)[0]
        )
        if len(agreeing_steps)
        else None,
        metric=metric,
        before=before[0],
        before_interval=before[1],
        after=after[0],
        after_interval=after[1],
    )


@dataclass(frozen=True)
class Score:
    """Quality of a model on held-out rows."""

    metric: str
    value: float | None
    interval: tuple[float, float] | None


def compute_score(model: Any, held_out: HeldOut) -> Score:
    """Compute the metric that targets are judged by, for any model.

    Args:
        model: A `Decoder`, or a classifier with `logits`.
        held_out: The rows.
    """
    results = (
        _collect_class_outputs(model, held_out).results
        if held_out.classes
        else _run_whole_rows(model, held_out)[1]
    )
    metric = "accuracy" if results.classified else "perplexity"
    return Score(metric, *_compute_metric(results, metric))


def _compute_differences(
    source: Sequence[np.ndarray], target: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Return the (largest, mean) absolute difference of logits.

    Works row by row, since the differences of all rows would take gigabytes.
    """
    largest, total, count = 0.0, 0.0, 0
    for source_row, target_row in zip(source, target, strict=True):
        difference = np.abs(source_row - target_row)
        largest = float(np.maximum(largest, difference.max()))  # np.maximum propagates NaN
        total, count = total + float(difference.sum(dtype=np.float64)), count + difference.size
    return largest, total / max(1, count)


def _compare_predictions(source: Sequence[np.ndarray], target: Sequence[np.ndarray]) -> np.ndarray:
    """Return for each position (row) whether the most likely token (class) is the same."""
    agreeing = [
        np.atleast_1d(source_row.argmax(-1) == target_row.argmax(-1))
        for source_row, target_row in zip(source, target, strict=True)
    ]
    return np.concatenate(agreeing) if agreeing else np.zeros(0, bool)


def _compute_metric(
    results: RowResults, name: str
) -> tuple[float | None, tuple[float, float] | None]:
    """Return (value, 95 % interval) of a metric.

    Each is None if it is missing or not finite; few rows have no interval.
    """
    names = ["accuracy"] if name == "accuracy" else ["loss", "perplexity"]
    result = compute_scores(results, names)
    value, bounds = (
        _drop_non_finite(result.metrics[name]),
        result.intervals.get(name),
    )  # None for few rows
    return value, bounds if bounds is not None and np.isfinite(bounds).all() else None


def _drop_non_finite(value: float) -> float | None:
    """Return the value, or None if it is NaN or infinite."""
    return float(value) if np.isfinite(value) else None
