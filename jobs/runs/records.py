"""Read the files of a run and check the types of their values.

A run folder may be damaged, or written by anybody. Keys that are not declared here may
hold anything. Declared keys must have the declared type, or the file is damaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.schema.validation_messages import list_problems

_OPEN = ConfigDict(extra="allow", strict=True)


class DamagedFile(RunError):
    """Error: a file of a run has invalid contents. The message names the file."""


class _Failure(TypedDict, total=False):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    failure_class: str
    sentence: str


class RunStatusRecord(TypedDict, total=False):
    """Contents of a run's status.json."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    state: str
    reason: str | None
    name: str
    pid: int | None
    pid_started: int | None
    host: str | None
    phase: str | None
    created: float
    updated: float
    ended: float | None
    wall_seconds: float | None
    attempt: int | None


class TrialStatus(TypedDict, total=False):
    """Contents of a trial's status.json."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    state: str
    reason: str | None
    rung: int | None
    failure: _Failure | None
    retries: dict[str, int]
    started: float | None
    updated: float
    ended: float | None
    attempt: int | None


class Params(TypedDict, total=False):
    """Contents of a trial's params.json."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    index: int
    assignment: dict[str, Any]
    rung_levels: list[int]
    total_steps: int
    gpus: float
    resolved: dict[str, Any]


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


class Progress(TypedDict, total=False):
    """Contents of a trial's progress.json."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    step: int
    total: int
    time: float
    train_loss: float | None
    train_seconds: float | None
    tokens_per_second: float | None


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
    failure: _Failure
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


RUN_STATUS: TypeAdapter[Any] = TypeAdapter(RunStatusRecord)
TRIAL_STATUS: TypeAdapter[Any] = TypeAdapter(TrialStatus)
PARAMS: TypeAdapter[Any] = TypeAdapter(Params)
PROGRESS: TypeAdapter[Any] = TypeAdapter(Progress)
FACTS: TypeAdapter[Any] = TypeAdapter(Facts)
EVENTS: TypeAdapter[Any] = TypeAdapter(list[Event])
METRIC_ROWS: TypeAdapter[Any] = TypeAdapter(list[MetricRow])


def read_record(path: Path, kind: TypeAdapter[Any]) -> dict[str, Any]:
    """Read a JSON object of a run; empty if the file does not exist. Raises DamagedFile."""
    try:
        value = files.read_json(path)
    except (RunError, OSError) as error:
        raise DamagedFile(str(error)) from None
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
        first = list_problems(error, valid_keys=())[0]
        raise DamagedFile(f"{path} is damaged: {first.sentence}") from None
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
