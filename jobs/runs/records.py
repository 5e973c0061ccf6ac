"""Read the files of a run and check the types of their values.

A run folder may be damaged, or written by anybody. Keys that are not declared here may
hold anything. Declared keys must have the declared type, or the file is damaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError


class DamagedFile(RunError):
    """Error: a file of a run has invalid contents. The message names the file."""


Ends = Annotated[list[float | None], Field(min_length=2, max_length=2)]
"""The two ends of an interval; None for one that is NaN or infinite."""


class Record(BaseModel):
    """Base of the typed files of a run. Missing values have their defaults.

    Values that are not declared are kept: a newer version of lorafleet may have added them.
    """

    # Built on first use: a command reads few of them.
    model_config = ConfigDict(extra="allow", strict=True, frozen=True, defer_build=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the values that the file had, for writing them again."""
        return self.model_dump(exclude_unset=True)


class PlanRecord(Record):
    """Part of plan.json that readers of a run need. The file may be of another version.

    `jobs.runs.plan.Plan` is the whole plan, as this version writes it.
    """

    command: str | None = None
    """`sweep`, `train`, `compare`, `export` or `benchmark`; None if there is no plan."""
    job: dict[str, Any] = {}
    """The job, not validated."""
    placement: dict[str, Any] = {}
    placements: dict[str, dict[str, Any]] = {}
    """Comparison: arm -> placement of its trials."""
    packing: dict[str, Any] | None = None
    """Packing of a sweep's trials."""
    rung_levels: list[int] = []
    """Rungs, in units of `time_attr`."""
    nodes: int = 1
    """Nodes of the job on a cluster with a queue."""
    share: list[int] = []
    """Trial range of an array task."""
    judges: bool = True
    """True if the run ends with the held-out evaluation of its finalists."""
    delivery: dict[str, Any] | None = None
    """Requested result of an export or a benchmark."""

    @property
    def is_empty(self) -> bool:
        """Return whether there is no plan, or nothing in it."""
        return not self.model_fields_set


class AttemptRecord(Record):
    """Contents of attempts/N.json: one driver of a run."""

    attempt: int | None = None
    machine: list[str] = []
    """Host name and PID namespace of the driver; empty if its writer was killed."""
    pid: int = 0
    pid_started: int | None = None
    submission: int | str | None = None
    """Number of the submission that it belongs to."""
    slurm_job: str | None = None
    slurm_restart: int = 0
    saved: str | None = None
    """Digest of what the run had saved when the driver started."""

    @property
    def host(self) -> str | None:
        """Return the host name of the driver."""
        return self.machine[0] if self.machine else None

    @property
    def submission_number(self) -> int:
        """Return the number of the submission; 0 if it is unknown."""
        text = str(self.submission or "")
        return int(text) if text.isdecimal() else 0


class StartRecord(Record):
    """A line of slurm/history.jsonl, which the batch script writes: a job starts or ends."""

    job: str
    restart: int
    """Number of times that Slurm had started the job before."""
    event: str
    """`began`, `ended`, or why the job requeued itself. `ended-by-slurm`: see `reason`."""
    submission: str | None = None
    reason: str = ""
    """Slurm's reason for ending the job, as a sentence about `it`; only for `ended-by-slurm`."""


class FailureRecord(Record):
    """How a trial failed."""

    failure_class: str
    """One of FAILURE_CLASSES, or `disk_full`, which ends the run and not the trial."""
    sentence: str = ""
    """Message for people."""
    final: bool = False
    """True if the trial must not be restarted, whatever the job's `retries` say."""


class RunStatusRecord(Record):
    """Contents of a run's status.json."""

    state: str | None = None
    reason: str | None = None
    """Why the run is in this state."""
    name: str | None = None
    """Name of the job."""
    pid: int | None = None
    pid_started: int | None = None
    """When the process started, as /proc has it. A process with the same id started at another
    time.
    """
    host: str | None = None
    phase: str | None = None
    """What the driver does now."""
    created: float | None = None
    updated: float | None = None
    ended: float | None = None
    wall_seconds: float | None = None
    """Time that all drivers of the run took together."""
    attempt: int | None = None


class TrialStatus(Record):
    """Contents of a trial's status.json."""

    state: str | None = None
    reason: str | None = None
    rung: int | None = None
    """Last rung that was reached; written when the trial ends."""
    failure: FailureRecord | None = None
    retries: dict[str, int] = {}
    """Failure class -> restarts after it."""
    threads: int | None = None
    """CPU threads of each of its processes, from its first start on."""
    trains_alone: bool = False
    """True after a process died that trained it together with others: it is not packed again."""
    started: float | None = None
    updated: float | None = None
    ended: float | None = None
    attempt: int | None = None


class TrialParams(Record):
    """Contents of a trial's params.json."""

    index: int = 0
    """Order of creation."""
    assignment: dict[str, Any] = {}
    """Dotted field -> value that the search assigned."""
    rung_levels: list[int] = []
    """Rungs, in units of `time_attr`."""
    rung_steps: list[int] = []
    """Rungs, in optimizer steps."""
    batch_rows: int | None = None
    """Rows of an optimizer step."""
    total_steps: int | None = None
    gpus: float | None = None
    resolved: dict[str, Any] = {}
    """All fields that affect training, with the values of this trial."""
    repeats: bool = False
    """True for a repetition of the best configuration with another seed."""


class Progress(Record):
    """Heartbeat of a trial that has not ended: its progress since the last report."""

    state: str | None = None
    results: int | None = None
    """Reports in this attempt. While state and reports are the same, so are the trial's own files,
    but for reports without an evaluation.
    """

    step: int = 0
    """Optimizer steps so far; 0 before the first heartbeat."""
    total: int = 0
    time: float | None = None
    train_loss: float | None = None
    train_seconds: float | None = None
    tokens_per_second: float | None = None


class ProgressRecord(Record):
    """Contents of a run's progress.json: the heartbeats of all trials that have not ended."""

    attempt: int | None = None
    trials: dict[str, Progress] = {}
    """Trial id -> its heartbeat."""


class MetricsRow(Record):
    """A line of a trial's metrics.jsonl: what a report of the trial told.

    Metrics of an evaluation have no fields here, because a job can add its own: use
    `get_metric`. Costs are sums over the trial's life, over all attempts.
    """

    step: int
    """Optimizer steps so far."""
    samples: int | None = None
    """Training rows so far."""
    epoch: float | None = None
    rung: int | None = None
    """Index of the rung of this step; None between rungs."""
    attempt: int | None = None
    evaluated: bool = False
    """True if the row holds an evaluation on the validation rows."""
    time: float | None = None
    loss: float | None = None
    """Validation loss; only in rows with an evaluation."""
    train_loss: float | None = None
    """Mean loss over the targets since the last report."""
    learning_rate: float | None = None
    intervals: dict[str, Ends | None] | None = None
    """Metric -> the ends of its confidence interval."""
    train_seconds: float | None = None
    eval_seconds: float | None = None
    tokens: int | float | None = None
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    peak_memory_gib: float | None = None
    trainable_parameters: int | None = None
    number_formats: str | None = None
    """Number formats of weights and computation, as text."""
    pack: int | None = None
    """Trials that its process trained at once, if they were several: times are then shares, and
    the memory is that of all of them.
    """
    nodes: int | None = None
    """Machines of the trial's processes, if there are several."""
    host: str | None = None
    """Host and process id of the first process."""
    first_gradient_at: float | None = None
    """Time of the first backward pass, in seconds since the epoch."""

    def get_metric(self, name: str) -> float | None:
        """Return a metric of the evaluation; None if the row does not have it.

        Raises DamagedFile if the value is not a number.
        """
        value = (self.model_extra or {}).get(name)
        if name in type(self).model_fields:
            value = getattr(self, name)
        if value is None or isinstance(value, int | float):
            return value
        raise DamagedFile(
            f"metrics.jsonl is damaged: {name} of step {self.step} is {value!r}, not a number"
        )

    def get_metrics(self, names: Iterable[str]) -> dict[str, float | None]:
        """Return the named metrics that the row has, NaN and infinite ones as None."""
        fields = self.to_dict()
        return {name: self.get_metric(name) for name in names if name in fields}


class PackRecord(Record):
    """Contents of a run's pack.json: how many trials its driver trains at once, and why."""

    trials: int = 1
    """1: one at a time."""
    trials_per_pass: int = 1
    """Maximum number of trials that share a forward pass."""
    max_rank: int = 1
    """Largest rank of a trial that is packed."""
    together: dict[str, float] = {}
    """Number of trials in a forward pass -> tokens per second of all of them, as measured."""
    alone: float | None = None
    """Tokens per second of the trials that would otherwise be trained at once; None if that was not
    measured.
    """
    sentence: str = ""
    """The choice and its reason."""
    measuring: int | None = None
    """Number of trials that are being measured; None once the choice is made."""


class SplitScores(Record):
    """Scores of a model on one split, in test.json or base.json."""

    metrics: dict[str, float | None] = {}
    intervals: dict[str, Ends | None] = {}
    """Metric -> the ends of its confidence interval."""
    whole: dict[str, float | None] = {}
    """Metrics that have one value for all rows together."""
    per_class: dict[str, dict[str, Any]] = {}
    """Class -> its precision, recall, F1 and rows; only for classifiers."""
    confusion: list[list[int]] = []
    """Rows by true class and predicted class; only for classifiers."""

    @property
    def is_empty(self) -> bool:
        """Return whether the model was not evaluated on the split."""
        return not self.model_fields_set


class HeldOutScores(Record):
    """Contents of test.json and base.json: the held-out evaluation of one model."""

    seconds: float | None = None
    base_loads: int | None = None
    """Bases that the worker had loaded so far."""
    validation: SplitScores | None = None
    test: SplitScores | None = None

    def get_split(self, name: str) -> SplitScores:
        """Return the scores of a split; empty if the model was not evaluated on it."""
        scores = self.test if name == "test" else self.validation
        return scores or SplitScores()

    @property
    def is_empty(self) -> bool:
        """Return whether there is no such file, or nothing in it."""
        return not self.model_fields_set


class RunMetadata(Record):
    """Contents of a run's facts.json: metadata on data, models and versions."""

    rows: dict[str, int] = {}
    """Split -> rows."""
    tokens: dict[str, int] = {}
    """Split -> tokens."""
    labels: list[Any] | None = None
    """Class names in the order of the head's outputs."""
    class_counts: dict[str, dict[str, int]] = {}
    """Split -> class -> rows."""
    warnings: list[str] = []
    chosen_on_test: bool = False
    """True if there are no test rows: the reported scores are those of the validation rows."""
    versions: dict[str, str] = {}
    """Package -> version."""
    data_sha256: dict[str, str] = {}
    """Split -> SHA-256 of its data file."""
    rows_sha256: dict[str, str] = {}
    """Split -> SHA-256 of its rows, as read."""
    model_revisions: dict[str, str] = {}
    """Model -> what identifies its weights and tokenizer."""
    encoders: dict[str, str] = {}
    """Encoder of a metric -> its revision."""
    prompt_format: int | None = None
    """Version of the rules that make prompts from rows."""
    conversation: dict[str, Any] = {}
    """Settings that decide how conversations are rendered."""
    metric_version: int | None = None
    custom_metrics: dict[str, str] = {}
    """Custom metric -> SHA-256 of its code."""
    learning_rate: float | None = None
    """Learning rate of the job, or its method's default."""

    @property
    def is_empty(self) -> bool:
        """Return whether there is no such file, or nothing in it."""
        return not self.model_fields_set

    @property
    def held_out_split(self) -> Literal["test", "validation"]:
        """Return the split that the reported scores are measured on."""
        return "validation" if self.chosen_on_test else "test"


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_typed(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """Read a file of a run as its record; one with defaults if the file does not exist.

    Raises:
        DamagedFile: The file is no JSON object, a value has another type, or a newer version of
            lorafleet wrote it.
    """
    try:
        values = files.read_json(path)
    except (RunError, OSError) as error:
        raise DamagedFile(str(error)) from None
    return parse_record(path, kind, values)


def _make_damage(path: Path, error: ValidationError) -> DamagedFile:
    # Imported here: it builds the schema of the whole job, which readers of a run need not have.
    from lorafleet.jobs.schema.validation_messages import list_problems

    first = list_problems(error, valid_keys=())[0]
    return DamagedFile(f"{path} is damaged: {first.sentence}")


def read_rows(path: Path, kind: type[AnyRecord]) -> list[AnyRecord]:
    """Read the lines of a JSON Lines file of a run as records.

    Returns:
        The records, oldest first; none if the file does not exist.

    Raises:
        DamagedFile: A line's value has another type, or a newer version of lorafleet wrote it.
    """
    return [parse_record(path, kind, line) for line in read_lines(path)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a JSON Lines file of a run. Raises DamagedFile."""
    try:
        return files.read_jsonl(path)
    except RunError as error:
        raise DamagedFile(str(error)) from None
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from None


def parse_record(path: Path, kind: type[AnyRecord], values: dict[str, Any]) -> AnyRecord:
    """Convert the values of a file, or of a line of it, to a record.

    Args:
        path: The file, for messages.
        kind: Class of the record.
        values: The JSON object.

    Raises:
        DamagedFile: A value has another type, or a newer version of lorafleet wrote the values.
    """
    check_version(path, values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _make_damage(path, error) from None
    except RecursionError:
        raise DamagedFile(f"{path} is damaged: it is nested too deeply") from None


def check_version(path: Path, values: dict[str, Any]) -> None:
    """Raise DamagedFile if a newer version of lorafleet wrote the values of a file."""
    version = values.get("schema_version", files.SCHEMA_VERSION)
    if not isinstance(version, int):
        raise DamagedFile(f"{path} is damaged: schema_version is {version!r}, not an integer")
    if version > files.SCHEMA_VERSION:
        raise DamagedFile(
            f"{path} has schema_version {version}, and this lorafleet reads versions up to "
            f"{files.SCHEMA_VERSION}: use the version of lorafleet that wrote it"
        )


@contextlib.contextmanager
def raise_damaged_file(path: Path) -> Iterator[None]:
    """Convert errors in the handling of a file's values to DamagedFile.

    Such an error means that lorafleet did not write `path` in this form.
    """
    try:
        yield
    except RunError:
        raise
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
    ) as error:
        raise DamagedFile(f"{path} is damaged ({type(error).__name__}: {error})") from error
