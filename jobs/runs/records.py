"""Read the files of a run and check the types of their values.

A run folder may be damaged, or written by anybody. Keys that are not declared here may
hold anything. Declared keys must have the declared type, or the file is damaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.schema.validation_messages import list_problems

_OPEN = ConfigDict(extra="allow", strict=True)


class DamagedFile(RunError):
    """Error: a file of a run has invalid contents. The message names the file."""


class Record(BaseModel):
    """Base of the typed files of a run. Missing values have their defaults.

    Values that are not declared are kept: a newer version of lorafleet may have added them.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the values that the file had, for writing them again."""
        return self.model_dump(exclude_unset=True)


class FailureRecord(Record):
    """How a trial failed."""

    failure_class: str
    """One of FAILURE_CLASSES."""
    sentence: str = ""
    """Message for people."""


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
    """Last rung that was reached."""
    failure: FailureRecord | None = None
    retries: dict[str, int] = {}
    """Failure class -> restarts after it."""
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
    """Contents of a trial's progress.json: its heartbeat."""

    step: int = 0
    """Optimizer steps so far; 0 before the first heartbeat."""
    total: int = 0
    time: float | None = None
    train_loss: float | None = None
    train_seconds: float | None = None
    tokens_per_second: float | None = None


class MetricRow(TypedDict, total=False):
    """A line of metrics.jsonl. All other keys are metrics, which are numbers."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    step: int
    samples: int | None
    rung: int | None
    attempt: int | None
    evaluated: bool
    time: float
    loss: float | None
    train_loss: float | None
    learning_rate: float | None
    intervals: dict[str, tuple[float, float] | list[float] | None] | None
    train_seconds: float | None
    eval_seconds: float | None
    tokens: float | None
    tokens_per_second: float | None
    samples_per_second: float | None
    peak_memory_gib: float | None
    trainable_parameters: int | None


class Event(TypedDict, total=False):
    """A line of events.jsonl."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    event: str
    time: float
    attempt: int | None
    trial_id: str
    sentence: str
    error: str
    rung: int
    goes_on: bool
    number: int
    failure: dict[str, Any]
    trials: int | None


class Facts(TypedDict, total=False):
    """Contents of a run's facts.json: metadata on data, models and versions."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    rows: dict[str, int]
    labels: list[Any] | None
    class_counts: dict[str, dict[str, int]]
    warnings: list[str]
    versions: dict[str, str]
    data_sha256: dict[str, str]
    model_revisions: dict[str, str]
    encoders: dict[str, str]


FACTS: TypeAdapter[Any] = TypeAdapter(Facts)
EVENTS: TypeAdapter[Any] = TypeAdapter(list[Event])
METRIC_ROWS: TypeAdapter[Any] = TypeAdapter(list[MetricRow])


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_typed(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """Read a file of a run as its record; one with defaults if the file does not exist.

    Raises:
        DamagedFile: The file is no JSON object, or a value has another type.
    """
    try:
        return kind.model_validate(_read_object(path))
    except ValidationError as error:
        raise _make_damage(path, error) from None
    except RecursionError:
        raise DamagedFile(f"{path} is damaged: it is nested too deeply") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return files.read_json(path)
    except (RunError, OSError) as error:
        raise DamagedFile(str(error)) from None


def _make_damage(path: Path, error: ValidationError) -> DamagedFile:
    first = list_problems(error, valid_keys=())[0]
    return DamagedFile(f"{path} is damaged: {first.sentence}")


def read_record(path: Path, kind: TypeAdapter[Any]) -> dict[str, Any]:
    """Read a JSON object of a run; empty if the file does not exist. Raises DamagedFile."""
    value = _read_object(path)
    _validate_record(path, kind, value)
    return value


def read_rows(path: Path, kind: TypeAdapter[Any]) -> list[dict[str, Any]]:
    """Read the lines of a JSON Lines file of a run. Raises DamagedFile."""
    try:
        rows = files.read_jsonl(path)
    except RunError as error:
        raise DamagedFile(str(error)) from None
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from None
    _validate_record(path, kind, rows)
    return rows


def _validate_record(
    path: Path, kind: TypeAdapter[Any], value: dict[str, Any] | Sequence[dict[str, Any]]
) -> None:
    try:
        kind.validate_python(value)
    except ValidationError as error:
        raise _make_damage(path, error) from None
    except RecursionError:
        raise DamagedFile(f"{path} is damaged: it is nested too deeply") from None


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
