"""What needs no training: always the commonest class, an empty answer, the question as its own answer. Pure.

N rows, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.text_metrics import text_metrics
from jobs.metrics import TEXT_METRICS
from jobs.row_formats import Row

MOST_ROWS = 2_000
"""Rows of which answers are judged."""
_OF_ANSWERS = tuple(name for name in TEXT_METRICS if name not in ("bertscore_f1", "length_ratio"))


def of_classes(train: Mapping[str, int], held_out: Mapping[str, int]) -> tuple[str, dict[str, float]]:
    """Return (the commonest training class, the metrics on other rows of always saying it). The loss is that of the
    classes' shares among the training rows, as the probabilities of every row.

    `train` and `held_out` have the rows of each class.
    """
    common = max(train, key=lambda name: train[name])  # the first of equals
    rows, right = sum(held_out.values()), held_out.get(common, 0)
    if not rows:
        return common, {}
    occurring = {name for name, count in held_out.items() if count} | {common}
    share, parts = right / rows, len(occurring)
    known = sum(train.values())
    chances = {name: train.get(name, 0) / known for name in held_out}
    loss = sum(count * -math.log(chances[name]) for name, count in held_out.items() if count and chances[name] > 0)
    metrics = {
        "accuracy": share,
        "f1": 2 * right / (right + rows) / parts,
        "precision": share / parts,
        "recall": (1.0 if right else 0.0) / parts,
    }
    if all(chances[name] > 0 for name, count in held_out.items() if count):
        metrics["loss"] = loss / rows
    return common, metrics


def of_answers(rows: Sequence[Row], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the metrics of an empty answer and of the question as its own answer, on the first rows; those alone that
    need no encoder and no code of the user's."""
    wanted = [name for name in names if name in _OF_ANSWERS]
    if not wanted or not rows:
        return {}
    judged = rows[:MOST_ROWS]
    references = [row.reference for row in judged]
    answers = {
        "an empty answer": [""] * len(judged),
        "the question as its own answer": [_question(row) for row in judged],
    }
    found = {name: text_metrics(wanted, said, references) for name, said in answers.items()}
    return {
        name: {metric: float(np.sum(above) / max(1e-12, np.sum(below))) for metric, (above, below) in ratios.items()}
        for name, ratios in found.items()
    }


def _question(row: Row) -> str:
    """Return what was asked last."""
    return row.messages[-2].content if len(row.messages) > 1 else row.prompt
