"""Report: rows with quality and its uncertainty, time, memory and cost; and a recommendation with its rule."""

from __future__ import annotations

from typing import Any, Literal

from jobs.base import Spec
from jobs.rungs import Goal


class Failure(Spec):
    """Why a trial could not go on."""

    failure_class: str
    """One of oom, nan, preempted, worker_lost, data, config, code."""
    sentence: str
    """What happened."""


Metrics = dict[str, float | None]
Intervals = dict[str, tuple[float, float]]


class Row(Spec):
    """One trial, or the untuned base model."""

    trial_id: str
    """Content hash; `base` for the base model."""
    state: Literal["finished", "stopped", "failed", "running", "pending"]
    """Where it is."""
    rung: int | None = None
    """The last rung reached, from 0."""
    params: dict[str, Any] = {}
    """Dotted field -> what the search gave it."""
    metrics: Metrics = {}
    """Of the best adapter on the validation rows: what the choice looks at."""
    intervals: Intervals = {}
    """95 % bootstrap intervals of `metrics`."""
    test_metrics: Metrics | None = None
    """On the test rows; null where they were not run."""
    test_intervals: Intervals = {}
    """95 % bootstrap intervals of `test_metrics`."""
    per_class: dict[str, dict[str, float]] = {}
    """Of a classifier on the test rows: label -> precision, recall, f1, and support (rows)."""
    confusion: list[list[int]] = []
    """Of a classifier on the test rows: how many rows of each class (outer) were said to be of which (inner)."""
    step: int = 0
    """Optimiser steps trained."""
    samples: int = 0
    """Training rows seen."""
    train_seconds: float | None = None
    """Seconds of training alone: no start-up, no evaluation."""
    eval_seconds: float | None = None
    """Seconds of evaluation."""
    samples_per_second: float | None = None
    """Training rows per second of training."""
    tokens_per_second: float | None = None
    """Real (not padding) tokens per second of training."""
    peak_memory_gib: float | None = None
    """Largest memory of one training process, on its device (CUDA) or in all (CPU), in GiB."""
    gpu_hours: float | None = None
    """GPUs times hours of training and evaluation."""
    trainable_parameters: int | None = None
    """Parameters that were trained."""
    failure: Failure | None = None
    """Why it failed."""
    reason: str | None = None
    """Why it stopped."""
    curve: list[dict[str, Any]] = []
    """Points of the loss and metric curves: step, samples, train_loss, and the metrics where evaluated."""


class Recommendation(Spec):
    """Which trial to ship."""

    trial_id: str | None
    """None when no trial has a score."""
    rule: str
    """How it was chosen."""
    sentence: str
    """The choice and its reason, in words."""
    adapter: str | None = None
    """Folder of the adapter (or, from method `full`, of the model), relative to the run."""


class Report(Spec):
    """What a run found."""

    schema_version: int = 1
    """Of this object."""
    run: str
    """The run's folder name."""
    state: str
    """The run's state."""
    task: str
    """classification, generation or summarization."""
    model: str
    """The base model."""
    data: str
    """The data set."""
    metrics: list[str]
    """Every metric of the table."""
    metric: str
    """What the search looked at."""
    goal: Goal
    """maximize or minimize."""
    rows_count: dict[str, int] = {}
    """Rows of each split."""
    rungs: list[int] = []
    """The rungs, in the units of `time_attr`."""
    time_attr: str = "samples"
    """Unit of the rungs."""
    held_out: Literal["test", "validation"] = "test"
    """Which rows the test metrics are of: `validation` means the choice was made on these rows."""
    base: Row
    """The base model without training."""
    trials: list[Row]
    """Every trial, best first."""
    recommendation: Recommendation
    """Which to ship."""
    wall_seconds: float | None = None
    """Time on the clock, over all attempts."""
    warnings: list[str] = []
    """What is odd about the data or the run."""
    versions: dict[str, str] = {}
    """Versions of what trained."""
    facts: dict[str, Any] = {}
    """Digests of the data, revisions of the models."""

    @property
    def shown(self) -> list[Row]:
        """The table's rows: the base, then the trials."""
        return [self.base, *self.trials]

    def row(self, trial_id: str) -> Row:
        """The row of one trial."""
        return next(row for row in self.trials if row.trial_id == trial_id)
