"""Select held-out rows to show: large differences and errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.jobs.runs.report import Answer, Sample

MAX_ROWS = 12
"""Most rows that a report shows."""
_PREFERRED = ("rougeL", "rouge1", "bertscore_f1", "exact_match")
"""Metrics by which answers are told apart, the preferred one first."""


def select_differing(
    rows: Sequence[Mapping[str, Any]],
    models: Mapping[str, RowResults],
    labels: Sequence[str],
    max_rows: int = MAX_ROWS,
) -> list[Sample]:
    """Return the rows on which the models differ most, with all their answers.

    Args:
        rows: Held-out rows as they are shown, with `prompt` and `reference`.
        models: Name -> its results on these rows.
        labels: Class names in the order of the model's outputs.
        max_rows: Most rows to return.

    Returns:
        The largest difference first. Empty if results are of other rows, or nothing
            differs.
    """
    if not rows or not models or any(len(results) != len(rows) for results in models.values()):
        return []
    distance_R = _compute_distances(list(models.values()))
    shown = [row for row in np.argsort(-distance_R, kind="stable") if distance_R[row] >= 0][
        :max_rows
    ]
    return [_build_sample(int(row), rows, models, labels) for row in shown]


def select_mistakes(
    rows: Sequence[Mapping[str, Any]],
    name: str,
    results: RowResults,
    labels: Sequence[str],
    max_rows: int = MAX_ROWS,
) -> list[Sample]:
    """Return the rows that a classifier got wrong, the most confident first.

    Confident mistakes are often rows with a wrong label, so they are the first thing to
    look at.

    Args:
        rows: Held-out rows as they are shown.
        name: Name of the model in the samples.
        results: Its results on these rows.
        labels: Class names.
        max_rows: Most rows to return.
    """
    classified = results.classified
    if classified is None or len(rows) != len(results):
        return []
    wrong_R = classified.predicted_R != classified.label_R
    order = np.argsort(-np.where(wrong_R, classified.confidence_R, -1.0), kind="stable")
    return [
        _build_sample(int(row), rows, {name: results}, labels)
        for row in order[:max_rows]
        if wrong_R[row]
    ]


def select_worst(
    rows: Sequence[Mapping[str, Any]],
    name: str,
    results: RowResults,
    labels: Sequence[str],
    max_rows: int = MAX_ROWS,
) -> list[Sample]:
    """Return the rows to whose true class a classifier gives the least probability.

    Rows that `select_mistakes` returns are left out. With two classes the result is empty:
    the most confident mistake is the worst row.

    Args:
        rows: Held-out rows as they are shown.
        name: Name of the model in the samples.
        results: Its results on these rows.
        labels: Class names.
        max_rows: Most rows to look at; fewer are returned.
    """
    if results.classified is None or len(rows) != len(results) or len(labels) < 3:
        return []
    shown = {sample.row for sample in select_mistakes(rows, name, results, labels, max_rows)}
    order = np.argsort(
        -np.where(np.isfinite(results.loss_R), results.loss_R, -np.inf), kind="stable"
    )[:max_rows]
    return [
        _build_sample(int(row), rows, {name: results}, labels)
        for row in order
        if int(row) not in shown
    ]


def _compute_distances(models: list[RowResults]) -> np.ndarray:
    """Return how far the models are apart on each row; negative if there is nothing to show.

    Classes: the number of different predictions, then the mean confidence. Answers: the
    spread of a metric, or of the loss per target token if no metric was requested.
    """
    classified = [results.classified for results in models]
    if all(predictions is not None for predictions in classified):
        predicted_MR = np.stack(
            [predictions.predicted_R for predictions in classified if predictions]
        )
        confidence_R = np.mean(
            [predictions.confidence_R for predictions in classified if predictions], axis=0
        )
        different_R = np.array([len(set(column)) for column in predicted_MR.T])
        return (
            np.where(different_R > 1, different_R + confidence_R, -1.0)
            if len(models) > 1
            else np.full(len(confidence_R), -1.0)
        )
    # A run generates answers for some rows only if no metric needs them all
    # (`evaluate.sample_rows`).
    answered_R = np.array(
        [
            all(results.answers and results.answers[row] is not None for results in models)
            for row in range(len(models[0]))
        ]
    )
    name = next(
        (
            name
            for name in (*_PREFERRED, *models[0].ratios)
            if all(name in m.ratios for m in models)
        ),
        None,
    )
    values = [
        # The summed loss of a long answer would always differ most, so it is divided by its tokens.
        results.ratios[name][0] if name else results.loss_R / np.maximum(results.targets_R, 1)
        for results in models
    ]
    spread_R = np.ptp(np.stack(values), axis=0)
    return np.where(answered_R, spread_R, -1.0)


def _choose_metric(results: RowResults) -> str | None:
    """Return the metric by which answers are told apart; None if there is none."""
    return next((name for name in (*_PREFERRED, *results.ratios) if name in results.ratios), None)


def _build_sample(
    row: int,
    rows: Sequence[Mapping[str, Any]],
    models: Mapping[str, RowResults],
    labels: Sequence[str],
) -> Sample:
    answers = {name: _build_answer(row, results, labels) for name, results in models.items()}
    return Sample(
        row=row, prompt=rows[row]["prompt"], reference=rows[row]["reference"], answers=answers
    )


def _build_answer(row: int, results: RowResults, labels: Sequence[str]) -> Answer:
    """Return a model's answer to a row: a class with its confidence, or a text with a score."""
    classified = results.classified
    if classified is not None:
        predicted, label = int(classified.predicted_R[row]), int(classified.label_R[row])
        text = labels[predicted] if predicted < len(labels) else str(predicted)
        return Answer(
            text=text, confidence=_to_finite(classified.confidence_R[row]), right=predicted == label
        )
    name = _choose_metric(results)
    score = _to_finite(results.ratios[name][0][row]) if name else None
    return Answer(text=results.answers[row] or "", score=score)


def _to_finite(value: float) -> float | None:
    """Return a value as a float; None if it is NaN or infinite."""
    return float(value) if np.isfinite(value) else None
