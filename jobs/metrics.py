"""The metrics' names, direction and meaning, and which task has which."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.rungs import Goal


@dataclass(frozen=True)
class Metric:
    """A number that a model gets on labelled rows."""

    name: str
    goal: Goal
    meaning: str


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "maximize", "share of rows with the right label"),
        Metric("f1", "maximize", "F1, macro average: every class counts alike"),
        Metric("precision", "maximize", "precision, macro average"),
        Metric("recall", "maximize", "recall, macro average"),
        Metric(
            "loss", "minimize", "mean negative log-likelihood, in nats, of a row (classification) or a target token"
        ),
        Metric("perplexity", "minimize", "exp of the mean negative log-likelihood of a target token"),
    )
}

TASK_METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "precision", "recall", "loss"),
    "generation": ("loss", "perplexity"),
}

DEFAULT_METRIC = {"classification": "accuracy", "generation": "loss"}
"""What a search looks at when the job file does not say."""


def bare_name(name: str) -> str:
    """`eval_f1`, `eval/f1` and `validation_f1` are all the metric `f1`: other tools prefix, we do not."""
    for prefix in ("eval_", "eval/", "validation_", "val_"):
        name = name.removeprefix(prefix)
    return name


def is_better(score: float, than: float | None, goal: Goal) -> bool:
    """Whether `score` beats `than`; anything beats None or NaN, and NaN beats nothing."""
    if score != score:
        return False
    if than is None or than != than:
        return True
    return score > than if goal == "maximize" else score < than
