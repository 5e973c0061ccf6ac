"""What the files of a run must look like to be read: a run folder may be damaged, or written by anybody.

Keys that are not named here may hold anything; those that are have these types, or the file is damaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.schema.validation_messages import sentences
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

_OPEN = ConfigDict(extra="allow", strict=True)


class DamagedFile(RunError):
    """A file of a run that is not as it was written; the sentence names it."""


class _Failure(TypedDict, total=False):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    failure_class: str
    sentence: str


class RunStatus(TypedDict, total=False):
    """status.json of a run."""

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
    """status.json of a trial."""

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
    """params.json of a trial."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    index: int
    assignment: dict[str, Any]
    rung_levels: list[int]
    total_steps: int
    gpus: float
    resolved: dict[str, Any]


class MetricRow(TypedDict, total=False):
    """A line of metrics.jsonl; metrics beside these are numbers."""

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
    """progress.json of a trial."""

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
    """facts.json of a run."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    rows: dict[str, int]
    labels: list[Any] | None
    class_counts: dict[str, dict[str, int]]
    warnings: list[str]
    versions: dict[str, str]
    data_sha256: dict[str, str]
    model_revisions: dict[str, str]
    encoders: dict[str, str]


RUN_STATUS: TypeAdapter[Any] = TypeAdapter(RunStatus)
TRIAL_STATUS: TypeAdapter[Any] = TypeAdapter(TrialStatus)
PARAMS: TypeAdapter[Any] = TypeAdapter(Params)
PROGRESS: TypeAdapter[Any] = TypeAdapter(Progress)
FACTS: TypeAdapter[Any] = TypeAdapter(Facts)
EVENTS: TypeAdapter[Any] = TypeAdapter(list[Event])
METRIC_ROWS: TypeAdapter[Any] = TypeAdapter(list[MetricRow])


def read_record(path: Path, kind: TypeAdapter[Any]) -> dict[str, Any]:
    """Read a JSON object of a run; empty where there is no such file. Raises DamagedFile."""
    try:
        value = files.read_json(path)
    except (RunError, OSError) as error:
        raise DamagedFile(str(error)) from None
    _check(path, kind, value)
    return value


def read_rows(path: Path, kind: TypeAdapter[Any]) -> list[dict[str, Any]]:
    """Read the lines of a run's file. Raises DamagedFile."""
    try:
        rows = files.read_jsonl(path)
    except RunError as error:
        raise DamagedFile(str(error)) from None
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from None
    _check(path, kind, rows)
    return rows


def _check(path: Path, kind: TypeAdapter[Any], value: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
    try:
        kind.validate_python(value)
    except ValidationError as error:
        first = sentences(error, known=())[0]
        raise DamagedFile(f"{path} is damaged: {first.sentence}") from None
    except RecursionError:
        raise DamagedFile(f"{path} is damaged: it is nested too deeply") from None


@contextlib.contextmanager
def damaged_where_wrong(path: Path) -> Iterator[None]:
    """Take an error in the handling of values of these types for what it is: `path` was not written by lorafleet."""
    try:
        yield
    except RunError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged ({type(error).__name__}: {error})") from error
