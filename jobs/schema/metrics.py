"""Names, directions and meanings of the metrics, and the metrics of each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafleet.jobs.schema.types import Goal


@dataclass(frozen=True)
class Metric:
    """A score of a model on labelled rows."""

    name: str
    goal: Goal | Literal["closer to 1"]
    """Direction that is better. `closer to 1`: the metric only describes, and a choice cannot be
    based on it.
    """
    meaning: str


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "maximize", "share of rows whose predicted label is right"),
        Metric("f1", "maximize", "F1, macro average: every class has the same weight"),
        Metric("precision", "maximize", "precision, macro average"),
        Metric("recall", "maximize", "recall, macro average"),
        Metric(
            "loss",
            "minimize",
            "mean negative log-likelihood in nats, per row (classification) or per target token",
        ),
        Metric(
            "perplexity", "minimize", "exp of the mean negative log-likelihood per target token"
        ),
        Metric("rouge1", "maximize", "ROUGE-1 F1: words shared with the reference, after stemming"),
        Metric(
            "rouge2",
            "maximize",
            "ROUGE-2 F1: pairs of neighbouring words shared with the reference",
        ),
        Metric("rougeL", "maximize", "ROUGE-L F1: longest common subsequence of words"),
        Metric("rougeLsum", "maximize", "ROUGE-L F1 over sentences"),
        Metric(
            "bertscore_f1",
            "maximize",
            "BERTScore F1: words matched by the embeddings of an encoder",
        ),
        Metric(
            "exact_match",
            "maximize",
            "share of answers equal to the reference, ignoring case and outer spaces",
        ),
        Metric(
            "contains", "maximize", "share of answers that contain the reference, ignoring case"
        ),
        Metric(
            "length_ratio",
            "closer to 1",
            "number of words in all answers divided by that in all references",
        ),
    )
}

METRIC_VERSION = 1
"""Version of the metric definitions, raised with every change. Scores of two versions are
never ranked together.
"""

ROW_KEYS = frozenset(
    "attempt epoch eval_seconds evaluated first_gradient_at gpu_hours host intervals learning_rate "
    "nodes number_formats pack peak_memory_gib rung samples samples_per_second schema_version step "
    "time tokens tokens_per_second train_loss train_seconds trainable_parameters".split()
)
"""Keys of a line of metrics.jsonl that are not metrics."""

TEXT_METRICS = (
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "bertscore_f1",
    "exact_match",
    "contains",
    "length_ratio",
)
"""Metrics of generated text. They require the model to generate answers, token by token."""

LIKELIHOOD_METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "precision", "recall", "loss"),
    "generation": ("loss", "perplexity"),
    "summarization": ("loss", "perplexity"),
}
"""Task -> metrics of every evaluation. They cost one forward pass over the rows."""

DEFAULT_TEXT_METRICS: dict[str, tuple[str, ...]] = {
    "classification": (),
    "generation": (),
    "summarization": ("rouge1", "rouge2", "rougeL", "rougeLsum", "length_ratio"),
}
"""Task -> text metrics that are computed if `evaluate.metrics` is left out."""

DEFAULT_METRIC = {"classification": "accuracy", "generation": "loss", "summarization": "loss"}
"""Task -> metric that a search optimizes if the job file names none."""


def strip_metric_prefix(name: str) -> str:
    """Return the name of a metric without another tool's prefix, such as `f1` for `eval_f1`.

    Other tools log metrics of the evaluation set under such names, so job files that were
    written for them have these names in `search.metric`.
    """
    for prefix in (
        "eval_",
        "eval/",
        "validation_",
        "validation/",
        "valid_",
        "valid/",
        "val_",
        "val/",
    ):
        name = name.removeprefix(prefix)
    return name


def is_better(score: float, than: float | None, goal: Goal) -> bool:
    """Return whether `score` beats `than`.

    Any number beats None and NaN; NaN beats nothing. An equal score does not beat the
    other, so the earlier of two equal evaluations keeps its weights.
    """
    # Only NaN differs from itself.
    if score != score:
        return False
    if than is None or than != than:
        return True
    return score > than if goal == "maximize" else score < than
