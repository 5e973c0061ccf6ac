"""Metrics of baselines that need no training.

They are the most common class, an empty answer, and the question as the answer. A
recommendation that does not beat the best of them is withdrawn (`report/verdict.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.schema.metrics import TEXT_METRICS

MAX_ROWS = 2_000
"""Rows on which the answers are evaluated: ROUGE takes about 1 ms per row."""
_METRICS_OF_ANSWERS = tuple(
    name for name in TEXT_METRICS if name not in ("bertscore_f1", "length_ratio")
)
"""Metrics that need no encoder and no code of the user."""


def evaluate_majority_class(
    train_counts: Mapping[str, int], counts: Mapping[str, int]
) -> tuple[str, dict[str, float]]:
    """Evaluate a classifier that always predicts the most common class of the training rows.

    Args:
        train_counts: Class -> training rows.
        counts: Class -> rows to evaluate on.

    Returns:
        The class, and accuracy, f1, precision and recall as scikit-learn computes them. `loss` is
        that of predicting the class frequencies of the training rows; it is left out if a class has
        no training row.
    """
    majority = max(train_counts, key=lambda label: train_counts[label])
    rows = sum(counts.values())
    if not rows:
        return majority, {}
    hits = counts.get(majority, 0)
    occurring = len({label for label, count in counts.items() if count} | {majority})
    accuracy = hits / rows
    metrics = {
        "accuracy": accuracy,
        # The most common class has precision hits / rows and recall 1; all other classes score 0.
        "f1": 2 * hits / (hits + rows) / occurring,
        "precision": accuracy / occurring,
        "recall": (1.0 if hits else 0.0) / occurring,
    }
    train_rows = sum(train_counts.values())
    evaluated = {label: count for label, count in counts.items() if count}
    # A class without training rows has the frequency 0, and so an infinite loss.
    if all(train_counts.get(label) for label in evaluated):
        log_likelihood = sum(
            count * math.log(train_counts[label] / train_rows) for label, count in evaluated.items()
        )
        metrics["loss"] = -log_likelihood / rows
    return majority, metrics


def evaluate_trivial_answers(
    rows: Sequence[Row], metrics: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Evaluate an empty answer and the question as the answer, on up to `MAX_ROWS` rows.

    Args:
        rows: Rows of one split.
        metrics: Metrics of the job. Those that need an encoder or code of the user are left
            out.

    Returns:
        Baseline -> metric -> value; empty if no metric remains or there are no rows.
    """
    from lorafleet.evaluation.metrics.text import compute_text_metrics

    names = [name for name in metrics if name in _METRICS_OF_ANSWERS]
    if not names or not rows:
        return {}
    rows = rows[:MAX_ROWS]
    references = [row.reference for row in rows]
    answers = {
        "an empty answer": [""] * len(rows),
        "the question as the answer": [_get_last_question(row) for row in rows],
    }
    results = {}
    for baseline, texts in answers.items():
        ratios = compute_text_metrics(names, texts, references)
        results[baseline] = {
            name: float(np.mean(numerator)) for name, (numerator, _) in ratios.items()
        }
    return results


def _get_last_question(row: Row) -> str:
    return row.messages[-2].content if len(row.messages) > 1 else row.prompt
