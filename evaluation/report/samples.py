"""Held-out rows side by side: those on which models differ most, and those that the chosen one is most wrong about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.jobs.runs.report import Answer, Sample

MOST = 12
"""Rows that a report shows."""
_PREFERRED = ("rougeL", "rouge1", "bertscore_f1", "exact_match")
"""By which answers are set apart, where there are several metrics."""


def differing(
    rows: Sequence[Mapping[str, Any]], models: Mapping[str, RowResults], labels: Sequence[str], most: int = MOST
) -> list[Sample]:
    """The rows on which the models differ most, with all their answers."""
    if not rows or not models or any(len(found) != len(rows) for found in models.values()):
        return []
    apart_R = _apart(list(models.values()))
    shown = [row for row in np.argsort(-apart_R, kind="stable") if apart_R[row] >= 0][:most]
    return [_sample(int(row), rows, models, labels) for row in shown]


def mistakes(
    rows: Sequence[Mapping[str, Any]], name: str, found: RowResults, labels: Sequence[str], most: int = MOST
) -> list[Sample]:
    """The rows that a classifier got wrong, the most confident first."""
    said = found.classified
    if said is None or len(rows) != len(found):
        return []
    wrong_R = said.predicted_R != said.label_R
    order = np.argsort(-np.where(wrong_R, said.confidence_R, -1.0), kind="stable")
    return [_sample(int(row), rows, {name: found}, labels) for row in order[:most] if wrong_R[row]]


def worst(
    rows: Sequence[Mapping[str, Any]], name: str, found: RowResults, labels: Sequence[str], most: int = MOST
) -> list[Sample]:
    """The rows to whose right class a classifier gives the least probability, that `mistakes` does not show.

    Of two classes there are none: the surest mistake is the worst row.
    """
    if found.classified is None or len(rows) != len(found) or len(labels) < 3:
        return []
    shown = {sample.row for sample in mistakes(rows, name, found, labels, most)}
    order = np.argsort(-np.where(np.isfinite(found.loss_R), found.loss_R, -np.inf), kind="stable")[:most]
    return [_sample(int(row), rows, {name: found}, labels) for row in order if int(row) not in shown]


def _apart(models: list[RowResults]) -> np.ndarray:
    """How far models are apart on each row; below 0 where there is nothing to show.

    Classes: how many different ones were said, and then how sure the models were. Answers: the spread of a metric, or
    of the loss of a target token where no metric was asked for.
    """
    classified = [found.classified for found in models]
    if all(said is not None for said in classified):
        predicted_MR = np.stack([said.predicted_R for said in classified if said])
        sure_R = np.mean([said.confidence_R for said in classified if said], axis=0)
        different_R = np.array([len(set(column)) for column in predicted_MR.T])
        return np.where(different_R > 1, different_R + sure_R, -1.0) if len(models) > 1 else np.full(len(sure_R), -1.0)
    answered_R = np.array(
        [all(found.answers and found.answers[row] is not None for found in models) for row in range(len(models[0]))]
    )
    name = next((name for name in (*_PREFERRED, *models[0].ratios) if all(name in m.ratios for m in models)), None)
    values = [found.ratios[name][0] if name else found.loss_R / np.maximum(found.targets_R, 1) for found in models]
    spread_R = np.ptp(np.stack(values), axis=0)
    return np.where(answered_R, spread_R, -1.0)


def _setting_apart(found: RowResults) -> str | None:
    return next((name for name in (*_PREFERRED, *found.ratios) if name in found.ratios), None)


def _sample(
    row: int, rows: Sequence[Mapping[str, Any]], models: Mapping[str, RowResults], labels: Sequence[str]
) -> Sample:
    answers = {name: _answer(row, found, labels) for name, found in models.items()}
    return Sample(row=row, prompt=rows[row]["prompt"], reference=rows[row]["reference"], answers=answers)


def _answer(row: int, found: RowResults, labels: Sequence[str]) -> Answer:
    said = found.classified
    if said is not None:
        predicted, label = int(said.predicted_R[row]), int(said.label_R[row])
        text = labels[predicted] if predicted < len(labels) else str(predicted)
        return Answer(text=text, confidence=_number(said.confidence_R[row]), right=predicted == label)
    name = _setting_apart(found)
    score = _number(found.ratios[name][0][row]) if name else None
    return Answer(text=found.answers[row] or "", score=score)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
