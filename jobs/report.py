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
    arm: str | None = None
    """The arm of a comparison that it belongs to."""
    state: Literal["finished", "stopped", "failed", "running", "pending"]
    """Where it is."""
    rung: int | None = None
    """The last rung reached, from 0."""
    params: dict[str, Any] = {}
    """Dotted field -> what the search gave it."""
    fold: int | None = None
    """Which fold of a cross-validation its `metrics` are of; null outside of one."""
    repeats: bool = False
    """Whether it is the best configuration once more, with another seed."""
    metrics: Metrics = {}
    """Of the best adapter on the validation rows: what the choice looks at."""
    intervals: Intervals = {}
    """95 % intervals of `metrics`, where the rows bear one."""
    test_metrics: Metrics | None = None
    """On the test rows; null where they were not run."""
    test_intervals: Intervals = {}
    """95 % intervals of `test_metrics`, where the rows bear one."""
    per_class: dict[str, dict[str, float]] = {}
    """Of a classifier on the test rows: label -> precision, recall, f1, and support (rows)."""
    confusion: list[list[int]] = []
    """Of a classifier on the test rows: how many rows of each class (outer) were said to be of which (inner)."""
    step: int = 0
    """Optimiser steps trained."""
    weights_step: int | None = None
    """Optimiser step of the weights on disk: the best evaluation. `metrics` are theirs."""
    samples: int = 0
    """Training rows seen."""
    train_seconds: float | None = None
    """Seconds of training alone: no start-up, no evaluation."""
    eval_seconds: float | None = None
    """Seconds of all its evaluations."""
    eval_runtime: float | None = None
    """Seconds of one evaluation on the validation rows, on average."""
    eval_samples_per_second: float | None = None
    """Validation rows per second of evaluation."""
    eval_steps_per_second: float | None = None
    """Passes (`train.per_device_eval_batch_size` rows on each process) per second of evaluation."""
    seconds_per_answer: float | None = None
    """Seconds of evaluation for a row that is answered, where every evaluation writes answers."""
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
    number_formats: str | None = None
    """What weights and arithmetic were in."""
    failure: Failure | None = None
    """Why it failed."""
    reason: str | None = None
    """Why it stopped."""
    curve: list[dict[str, Any]] = []
    """Points of the loss and metric curves: step, samples, train_loss, and the metrics where evaluated."""


class OverFolds(Spec):
    """One configuration of a cross-validation."""

    params: dict[str, Any]
    """Dotted field -> what the search gave it."""
    scores: list[float]
    """The metric on each fold that was trained to the end."""
    mean: float
    """Of the scores."""
    deviation: float
    """Their standard deviation (n - 1); 0 for one alone."""


class Inference(Spec):
    """What an arm's model costs where it answers, as medians over rounds in processes of their own."""

    ttft_ms: float | None = None
    """Milliseconds to the first token of an answer."""
    tokens_per_second: float | None = None
    """Tokens of an answer after the first, one answer at a time."""
    latency_ms: float | None = None
    """Milliseconds of one row: its class, or its whole answer of a fixed length."""
    samples_per_second: float | None = None
    """Rows a second in full batches (classification)."""
    peak_memory_gib: float | None = None
    """Largest memory while it answers: of the device (CUDA), or of the whole process (CPU)."""
    begun_gib: float | None = None
    """Of that, what the process had before it had a model (CPU)."""
    load_peak_gib: float | None = None
    """Largest memory of the process while the model was loaded."""
    load_seconds: float | None = None
    """Seconds until the model was loaded."""
    rounds: int = 0
    """How often it was measured."""
    spread: dict[str, tuple[float, float]] = {}
    """Smallest and largest of the rounds."""
    threads: int | None = None
    """CPU threads that it had."""
    cpu: str | None = None
    """The processor."""
    cpu_flags: str | None = None
    """What of its instruction sets decides the speed of small numbers."""
    load_average: float | None = None
    """How busy the machine was: processes that ran or waited, over the last minute."""


class BatchSpeed(Spec):
    """What an arm's model takes for one size of a batch, as medians over rounds."""

    batch_size: int
    """Rows side by side."""
    length: int
    """Tokens of each: of a prompt, or of a text to classify."""
    ttft_ms: float | None = None
    """Milliseconds to the first token of the answers."""
    tokens_per_second: float | None = None
    """Tokens of all answers together, after the first."""
    latency_ms: float | None = None
    """Milliseconds of the whole batch."""
    samples_per_second: float | None = None
    """Rows a second (classification)."""


class Arm(Spec):
    """One way to adapt the base, with all that decides."""

    arm: str
    """Its name."""
    what: str
    """What it is, in words."""
    metrics: Metrics = {}
    """On the held-out rows, as the mean over its seeds."""
    interval: Intervals = {}
    """95 % intervals of `metrics` over rows and seeds, where the rows bear one."""
    seeds: dict[str, Metrics] = {}
    """Seed -> the metrics of the model that was trained with it."""
    configuration: dict[str, Any] = {}
    """What its search found: dotted field -> value."""
    tried: int = 0
    """Configurations that its search tried."""
    trial_id: str | None = None
    """The trial whose weights are its first model."""
    weights: str | None = None
    """Their folder, relative to the run."""
    weights_mb: float | None = None
    """Their size on disk, in MB."""
    train_seconds: float | None = None
    """Seconds of one training, as the mean over its seeds; 0 where nothing is trained."""
    search_seconds: float | None = None
    """Seconds of training in its search."""
    gpu_hours: float | None = None
    """GPU-hours of one training."""
    peak_memory_gib: float | None = None
    """Largest memory of one training process, in GiB."""
    trainable_parameters: int | None = None
    """Parameters that were trained."""
    inference: Inference | None = None
    """What its model costs where it answers."""
    batches: list[BatchSpeed] = []
    """The same for sizes of batches that a benchmark was asked for."""
    comparable: bool = True
    """Whether it was judged on the same rows, in the same way, as the others."""
    remarks: list[str] = []
    """What is odd about it."""


class Pair(Spec):
    """Two arms on the same rows."""

    one: str
    """An arm."""
    other: str
    """Another."""
    metric: str
    """What they are compared by."""
    difference: float
    """The metric of `one` less that of `other`."""
    interval: tuple[float, float] | None
    """Its 95 % interval, which holds for all pairs at once; null where the rows are too few for one."""
    p_value: float | None
    """Two-sided, adjusted for the number of arms: how easily chance alone makes such a difference; null likewise."""


class Answer(Spec):
    """What one model said of a row."""

    text: str
    """A class, or what it wrote."""
    confidence: float | None = None
    """The probability that it gave the class."""
    score: float | None = None
    """The metric by which answers are set apart, of this one."""
    right: bool | None = None
    """Whether it is the reference (classes)."""


class Sample(Spec):
    """One held-out row with what several models said of it."""

    row: int
    """Its number among the held-out rows, from 0."""
    prompt: str
    """What was asked, or the text that has a class."""
    reference: str
    """What is right."""
    answers: dict[str, Answer]
    """Model (arm, trial or `base`) -> its answer."""


class Judgement(Spec):
    """What people think of one model by one criterion."""

    arm: str
    """The model: an arm, a trial or `base`."""
    criterion: str
    """fluency, coherence or correctness."""
    mean: float
    """Over rows, each the mean of its raters; 0 to 5."""
    interval: tuple[float, float] | None = None
    """Its 95 % interval over rows; null where they are too few for one."""
    rows: int
    """How many rows were rated."""
    alpha: float | None = None
    """Krippendorff's alpha (interval data) of the raters by this criterion, over all models; null with one rater, or
    where all gave the same."""


class Ratings(Spec):
    """What people think of the models' answers, which they were shown without names."""

    raters: list[str]
    """Who rated."""
    judgements: list[Judgement]
    """One for each model and criterion."""
    notes: list[str] = []
    """What raters noted."""


class Baseline(Spec):
    """What needs no training, on the same rows."""

    name: str = ""
    """What tables call it."""
    what: str
    """What it does: always the commonest class, an empty answer."""
    metrics: Metrics = {}
    """On the rows that the choice looked at."""
    test_metrics: Metrics = {}
    """On the held-out rows."""


class Recommendation(Spec):
    """Which trial to ship."""

    trial_id: str | None
    """None when no trial has a score."""
    arm: str | None = None
    """The arm of a comparison."""
    rule: str
    """How it was chosen."""
    cost: str | None = None
    """Of a comparison: what its rule weighs quality against."""
    sentence: str
    """The choice and its reason, in words."""
    decided: bool = True
    """Whether it says `Ship`: false where the rows are too few to tell any two apart, and where nothing beats the best
    baseline. The best by score is named all the same."""
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
    baselines: list[Baseline] = []
    """What needs no training."""
    cautions: list[str] = []
    """What speaks against trusting the recommendation."""
    trials: list[Row]
    """Every trial, best first."""
    recommendation: Recommendation
    """Which to ship."""
    folds: list[OverFolds] = []
    """Of a cross-validation: every configuration, the best mean first."""
    arms: list[Arm] | None = None
    """What a comparison put side by side; null for a run that compares nothing."""
    pairs: list[Pair] = []
    """Every two arms on the same rows."""
    samples: list[Sample] = []
    """Held-out rows side by side: those first on which the models differ most."""
    per_class: dict[str, dict[str, float]] = {}
    """Of the recommended classifier on the held-out rows: label -> precision, recall, f1, and support (rows)."""
    confusion: list[list[int]] = []
    """Of it: how many rows of each class (outer) were said to be of which (inner)."""
    ratings: Ratings | None = None
    """What people think (`lorafleet rate`)."""
    worst: list[Sample] = []
    """Of a classifier of more than two classes: the rows to whose right class it gives the least probability, where
    they are not among `mistakes`."""
    mistakes: list[Sample] = []
    """Of the recommended classifier: what it got wrong, the most confident first."""
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
        """The table's rows: the base and the baselines, then the trials; a comparison has them among the arms."""
        if self.arms is not None:
            return self.trials
        baselines = [
            Row(
                trial_id=one.name or one.what,
                state="finished",
                metrics=one.metrics,
                test_metrics=one.test_metrics or None,
                trainable_parameters=0,
            )
            for one in self.baselines
        ]
        return [self.base, *baselines, *self.trials]

    @property
    def shown_arms(self) -> list[Arm]:
        """The rows of a comparison's table: the arms, and what needs no training."""
        baselines = [Arm(arm=one.name or one.what, what="no model", metrics=one.test_metrics) for one in self.baselines]
        return [*(self.arms or []), *baselines]

    def row(self, trial_id: str) -> Row:
        """The row of one trial."""
        return next(row for row in self.trials if row.trial_id == trial_id)
