"""Define report.json: quality, time, memory and cost of each trial, and a recommendation.

This module has only the models: evaluation/report/ fills them and evaluation/render/
shows them. The docstrings of classes and fields are documentation for users:
docs/report-json.md is generated from them. Raise `Report.schema_version` if the meaning
of a field changes.
"""

from __future__ import annotations

from typing import Any, Literal

from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.types import Goal


class Failure(Spec):
    """Why a trial failed."""

    failure_class: str
    """Kind of failure: oom, nan, preempted, worker_lost, data, config or code."""
    sentence: str
    """What happened, in one sentence."""


Metrics = dict[str, float | None]
Intervals = dict[str, tuple[float, float]]


class Row(Spec):
    """One trial, or the base model without training."""

    trial_id: str
    """Id of the trial (a hash of its configuration); `base` for the base model."""
    arm: str | None = None
    """Arm of a comparison that the trial belongs to."""
    state: Literal["finished", "stopped", "failed", "running", "paused", "pending"]
    """State of the trial."""
    rung: int | None = None
    """Last rung that the trial reached, from 0."""
    params: dict[str, Any] = {}
    """Searched values: dotted field -> value."""
    fold: int | None = None
    """Fold of a cross-validation that `metrics` were measured on; null without folds."""
    repeats: bool = False
    """True if the trial repeats the best configuration with another seed."""
    metrics: Metrics = {}
    """Metrics of the saved weights on the validation rows. The choice is based on these."""
    intervals: Intervals = {}
    """95 % intervals of `metrics`; a metric is left out if there are too few rows for one."""
    test_metrics: Metrics | None = None
    """Metrics on the held-out rows; null if the trial was not evaluated on them."""
    test_intervals: Intervals = {}
    """95 % intervals of `test_metrics`; a metric is left out if there are too few rows for one."""
    per_class: dict[str, dict[str, float]] = {}
    """Classification, held-out rows: class -> precision, recall, f1 and support (number of
    rows).
    """
    confusion: list[list[int]] = []
    """Classification, held-out rows: number of rows by true class (outer) and predicted class
    (inner).
    """
    step: int = 0
    """Optimizer steps trained."""
    weights_step: int | None = None
    """Optimizer step at which the saved weights were written: that of the best evaluation."""
    samples: int = 0
    """Training rows seen, over all epochs."""
    train_seconds: float | None = None
    """Seconds of training, without start-up and evaluation."""
    eval_seconds: float | None = None
    """Seconds of all evaluations together."""
    eval_runtime: float | None = None
    """Mean seconds of one evaluation on the validation rows."""
    eval_samples_per_second: float | None = None
    """Validation rows per second of evaluation."""
    eval_steps_per_second: float | None = None
    """Evaluation batches (`train.per_device_eval_batch_size` rows on each process) per second of
    evaluation.
    """
    seconds_per_answer: float | None = None
    """Seconds of evaluation per generated answer, if every evaluation generates answers."""
    samples_per_second: float | None = None
    """Training rows per second of training."""
    tokens_per_second: float | None = None
    """Tokens per second of training, without padding."""
    peak_memory_gib: float | None = None
    """Peak memory of one training process in GiB: on its GPU, or of the whole process (CPU)."""
    gpu_hours: float | None = None
    """GPU-hours of training and evaluation."""
    trainable_parameters: int | None = None
    """Number of trained parameters."""
    number_formats: str | None = None
    """Number formats of weights and arithmetic."""
    failure: Failure | None = None
    """Failure, if the trial failed."""
    reason: str | None = None
    """Why the trial was stopped."""
    curve: list[dict[str, Any]] = []
    """Points of the curves: step, samples, train_loss and, at evaluations, the metrics."""


class FoldScores(Spec):
    """Scores of one configuration in a cross-validation."""

    params: dict[str, Any]
    """Searched values: dotted field -> value."""
    scores: list[float]
    """The metric on each fold that was trained to the end."""
    mean: float
    """Mean of the scores."""
    deviation: float
    """Standard deviation of the scores (n - 1); 0 for a single score."""


class Inference(Spec):
    """Speed and memory of an arm's model at inference: medians over rounds, each in a process of
    its own.
    """

    ttft_ms: float | None = None
    """Milliseconds to the first token of an answer."""
    tokens_per_second: float | None = None
    """Tokens per second after the first token, one answer at a time."""
    latency_ms: float | None = None
    """Milliseconds per row: one classification, or one answer of a fixed length."""
    samples_per_second: float | None = None
    """Rows per second in full batches (classification)."""
    peak_memory_gib: float | None = None
    """Peak memory during inference in GiB: of the GPU, or of the whole process (CPU)."""
    begun_gib: float | None = None
    """Memory of the process before the model was loaded, in GiB (CPU)."""
    load_peak_gib: float | None = None
    """Peak memory of the process while the model was loaded, in GiB."""
    load_seconds: float | None = None
    """Seconds to load the model."""
    rounds: int = 0
    """Number of measured rounds."""
    spread: dict[str, tuple[float, float]] = {}
    """Smallest and largest value over the rounds."""
    threads: int | None = None
    """CPU threads used."""
    cpu: str | None = None
    """Processor."""
    cpu_flags: str | None = None
    """Instruction sets that decide the speed of INT8 and bfloat16."""
    load_average: float | None = None
    """Load average of the machine over the last minute."""


class BatchSpeed(Spec):
    """Speed of an arm's model at one batch size: medians over rounds."""

    batch_size: int
    """Rows in a batch."""
    length: int
    """Tokens per row: of the prompt, or of the text to classify."""
    ttft_ms: float | None = None
    """Milliseconds to the first token of the answers."""
    tokens_per_second: float | None = None
    """Tokens per second of all answers together, after the first token."""
    latency_ms: float | None = None
    """Milliseconds per batch."""
    samples_per_second: float | None = None
    """Rows per second (classification)."""


class Arm(Spec):
    """One arm of a comparison: a way to adapt the base model."""

    arm: str
    """Name of the arm."""
    what: str
    """Description."""
    metrics: Metrics = {}
    """Metrics on the held-out rows, as means over the seeds."""
    interval: Intervals = {}
    """95 % intervals of `metrics` over rows and seeds; a metric is left out if there are too few
    rows for one.
    """
    seeds: dict[str, Metrics] = {}
    """Seed -> metrics of the model trained with it."""
    configuration: dict[str, Any] = {}
    """Configuration that its search chose: dotted field -> value."""
    tried: int = 0
    """Number of configurations that its search tried."""
    trial_id: str | None = None
    """Trial whose weights are the model of the first seed."""
    weights: str | None = None
    """Folder of those weights, relative to the run."""
    weights_mb: float | None = None
    """Size of those weights on disk, in MB."""
    train_seconds: float | None = None
    """Seconds of one training, as the mean over the seeds; 0 if nothing is trained."""
    search_seconds: float | None = None
    """Seconds of training in its search."""
    gpu_hours: float | None = None
    """GPU-hours of one training."""
    peak_memory_gib: float | None = None
    """Peak memory of one training process, in GiB."""
    trainable_parameters: int | None = None
    """Number of trained parameters."""
    inference: Inference | None = None
    """Speed and memory at inference."""
    batches: list[BatchSpeed] = []
    """Speed for each batch size of a benchmark."""
    comparable: bool = True
    """True if the arm was evaluated on the same rows, in the same way, as the others."""
    remarks: list[str] = []
    """Remarks, such as a failed seed."""


class Pair(Spec):
    """Paired comparison of two arms on the same rows."""

    one: str
    """First arm."""
    other: str
    """Second arm."""
    metric: str
    """Metric of the comparison."""
    difference: float
    """Metric of `one` minus metric of `other`."""
    interval: tuple[float, float] | None
    """95 % interval of the difference, simultaneous for all pairs; null if there are too few
    rows.
    """
    p_value: float | None
    """Two-sided p-value, adjusted for the number of arms; null if there are too few rows."""


class Answer(Spec):
    """Output of one model for one row."""

    text: str
    """Predicted class, or generated text."""
    confidence: float | None = None
    """Probability of the predicted class."""
    score: float | None = None
    """Score of this output by the metric that orders the samples."""
    right: bool | None = None
    """True if the predicted class is the reference."""


class Sample(Spec):
    """One held-out row with the outputs of several models."""

    row: int
    """Index among the held-out rows, from 0."""
    prompt: str
    """Prompt, or the text to classify."""
    reference: str
    """Reference output."""
    answers: dict[str, Answer]
    """Model (arm, trial or `base`) -> output."""


class Judgement(Spec):
    """Human ratings of one model by one criterion."""

    arm: str
    """Model: an arm, a trial or `base`."""
    criterion: str
    """fluency, coherence or correctness."""
    mean: float
    """Mean rating over rows, 0 to 5. Each row counts with the mean of its raters."""
    interval: tuple[float, float] | None = None
    """95 % interval of the mean over rows; null if there are too few rows."""
    rows: int
    """Number of rated rows."""
    alpha: float | None = None
    """Krippendorff's alpha (interval data) of the raters for this criterion, over all models; null
    with one rater, or if all ratings are equal.
    """


class Ratings(Spec):
    """Human ratings of the models' answers, shown to raters without model names."""

    raters: list[str]
    """Names of the raters."""
    judgements: list[Judgement]
    """One entry per model and criterion."""
    notes: list[str] = []
    """Notes of the raters."""


class Baseline(Spec):
    """A baseline that needs no training, on the same rows."""

    name: str = ""
    """Name in tables."""
    what: str
    """Description, such as always predicting the most frequent class, or an empty answer."""
    metrics: Metrics = {}
    """Metrics on the validation rows."""
    test_metrics: Metrics = {}
    """Metrics on the held-out rows."""


class Recommendation(Spec):
    """Which trial to ship, and why."""

    trial_id: str | None
    """Recommended trial; null if no trial has a score."""
    arm: str | None = None
    """Recommended arm of a comparison."""
    rule: str
    """Name of the decision rule."""
    cost: str | None = None
    """Cost that the rule of a comparison weighs against quality."""
    sentence: str
    """The recommendation and its reason."""
    decided: bool = True
    """False if there are too few rows to decide, or if nothing beats the best baseline. `trial_id`
    is the best by score then, and the sentence does not say "Ship".
    """
    adapter: str | None = None
    """Folder of the adapter (of the model for method `full`), relative to the run."""


class Report(Spec):
    """Contents of report.json."""

    schema_version: int = 1
    """Version of this format."""
    run: str
    """Id of the run: the name of its folder."""
    state: str
    """State of the run: pending, running, finished, stopped or failed."""
    task: str
    """classification, generation or summarization."""
    model: str
    """Base model, as in the job."""
    data: str
    """Data set, as in the job."""
    metrics: list[str]
    """All reported metrics."""
    metric: str
    """Metric that the choice is based on."""
    also: list[str] = []
    """Further metrics that decide: the choice must be at least as good by each of them."""
    goal: Goal
    """maximize or minimize."""
    rows_count: dict[str, int] = {}
    """Number of rows of each split."""
    rungs: list[int] = []
    """Rungs of the search, in units of `time_attr`."""
    time_attr: str = "samples"
    """Unit of the rungs."""
    held_out: Literal["test", "validation"] = "test"
    """Rows that `test_metrics` were measured on. `validation` means that there is no test set."""
    base: Row
    """Base model without training."""
    baselines: list[Baseline] = []
    """Baselines that need no training."""
    cautions: list[str] = []
    """Reasons not to trust the recommendation. The report prints them above it."""
    trials: list[Row]
    """All trials, best first."""
    recommendation: Recommendation
    """Which trial or arm to ship, and why."""
    folds: list[FoldScores] = []
    """Cross-validation: all configurations, best mean first."""
    arms: list[Arm] | None = None
    """Arms of a comparison; null for other runs."""
    pairs: list[Pair] = []
    """Paired comparisons of all pairs of arms."""
    samples: list[Sample] = []
    """Held-out rows with the outputs of several models; rows with the largest differences first."""
    per_class: dict[str, dict[str, float]] = {}
    """`per_class` of the recommended classifier: class -> precision, recall, f1 and support (number
    of rows).
    """
    confusion: list[list[int]] = []
    """`confusion` of the recommended classifier: number of rows by true class (outer) and predicted
    class (inner).
    """
    ratings: Ratings | None = None
    """Human ratings (`lorafleet rate`)."""
    worst: list[Sample] = []
    """Classification with more than two classes: rows whose true class got the lowest probability,
    without those in `mistakes`.
    """
    mistakes: list[Sample] = []
    """Rows that the recommended classifier got wrong, most confident first."""
    wall_seconds: float | None = None
    """Wall-clock seconds, over all attempts."""
    warnings: list[str] = []
    """Warnings about the data or the run."""
    versions: dict[str, str] = {}
    """Versions of the packages that trained."""
    facts: dict[str, Any] = {}
    """Digests of the data files, revisions of the models, class names."""

    @property
    def table_rows(self) -> list[Row]:
        """Return the rows of the table: base, baselines and trials.

        A comparison lists base and baselines among the arms, so only its trials are returned.
        """
        if self.arms is not None:
            return self.trials
        baselines = [
            Row(
                trial_id=baseline.name or baseline.what,
                state="finished",
                metrics=baseline.metrics,
                test_metrics=baseline.test_metrics or None,
                trainable_parameters=0,
            )
            for baseline in self.baselines
        ]
        return [self.base, *baselines, *self.trials]

    @property
    def table_arms(self) -> list[Arm]:
        """Return the rows of a comparison's table: the arms and the baselines."""
        baselines = [
            Arm(arm=baseline.name or baseline.what, what="no model", metrics=baseline.test_metrics)
            for baseline in self.baselines
        ]
        return [*(self.arms or []), *baselines]

    def get_row(self, trial_id: str) -> Row:
        """Return the row of one trial.

        The id must come from this report: another one raises StopIteration.
        """
        return next(row for row in self.trials if row.trial_id == trial_id)
