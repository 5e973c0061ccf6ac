"""Events of a run: the lines of events.jsonl, one class for each kind.

The driver appends them (`Run.add_event`); reports and the live view read them
(`Run.read_events`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from lorafleet.jobs.runs.records import FailureRecord, Record, parse_record, read_lines


class Event(Record):
    """Base of the events. Read as such, it is an event of a kind that this version lacks."""

    event: str = ""
    """Kind of the event."""
    time: float | None = None
    """Seconds since the epoch."""
    attempt: int | None = None
    """Attempt of the driver that wrote it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the event's values, and its kind, for writing them."""
        return {"event": self.event} | super().to_dict()


class AttemptEvent(Event):
    """A driver started."""

    event: Literal["attempt"] = "attempt"
    number: int | None = None


class RayEvent(Event):
    """Ray is up."""

    event: Literal["ray"] = "ray"
    session_dir: str = ""
    """Ray's session folder."""
    started_by_driver: bool = True
    """True for a Ray that this driver started; False for a cluster that it joined."""


class PlacementEvent(Event):
    """Fewer trials run at once than planned."""

    event: Literal["placement"] = "placement"
    slots: int | None = None
    """Trials that run at once."""
    sentence: str = ""


class SearchEvent(Event):
    """The search starts, or continues."""

    event: Literal["search"] = "search"
    trials: int | None = None
    """Trials that there will be."""


class SearchEndedEvent(Event):
    """All trials have ended, and one is recommended; the held-out evaluation follows."""

    event: Literal["search_ended"] = "search_ended"
    trial_id: str = ""
    metric: str = ""
    score: float | None = None
    """The trial's metric on the validation rows."""
    rows: int | None = None
    """Number of validation rows."""
    adapter: str | None = None
    """Folder of its weights, relative to the run."""


class TrialEvent(Event):
    """A trial was created."""

    event: Literal["trial"] = "trial"
    trial_id: str = ""


class BaseLoadedEvent(Event):
    """A worker process loaded a base model."""

    event: Literal["base_loaded"] = "base_loaded"
    actor: str = ""
    """Host and process id."""
    count: int = 0
    """Bases that the process has loaded so far."""
    seconds: float | None = None
    """Time of the process's set-up."""


class RungEvent(Event):
    """The decision on a trial at a rung, with what it was derived from. It is final."""

    event: Literal["rung"] = "rung"
    trial_id: str
    rung: int
    """Index of the rung, from 0."""
    score: float | None = None
    """The trial's metric there; None if it is NaN or infinite."""
    loss: float | None = None
    """The trial's validation loss there, which decides between equal scores."""
    scores: int | None = None
    """Trials that had a score at this rung."""
    cutoff: float | None = None
    """The metric that was needed; None if every trial was promoted."""
    cutoff_loss: float | None = None
    goes_on: bool
    """True if the trial was promoted."""


class PauseEvent(Event):
    """A trial pauses at a rung. A `RungEvent` follows when it is promoted or stopped."""

    event: Literal["pause"] = "pause"
    trial_id: str
    rung: int
    """Index of the rung, from 0."""
    score: float | None = None
    """The trial's metric there; None if it is NaN or infinite."""
    loss: float | None = None
    """The trial's validation loss there."""


class RetryEvent(Event):
    """A trial failed and is queued to restart."""

    event: Literal["retry"] = "retry"
    trial_id: str
    failure: FailureRecord
    number: int
    """Restarts after failures of this class, this one included."""


class WarningEvent(Event):
    """Something went wrong with a trial, or an arm, that the report must mention."""

    event: Literal["warning"] = "warning"
    trial_id: str = ""
    sentence: str = ""


class NoteEvent(Event):
    """Something happened to the run that the report must mention."""

    event: Literal["note"] = "note"
    sentence: str = ""


class TrackingFailedEvent(Event):
    """Tracking was turned off, because the tracker raised an error."""

    event: Literal["tracking_failed"] = "tracking_failed"
    error: str = ""


class RayLeftEvent(Event):
    """Placement groups that Ray had not released when the search ended."""

    event: Literal["ray_left"] = "ray_left"
    placement_groups: int = 0


AnyEvent = TypeVar("AnyEvent", bound=Event)

_KINDS: dict[str, type[Event]] = {
    kind.model_fields["event"].default: kind
    for kind in (
        AttemptEvent,
        RayEvent,
        PlacementEvent,
        SearchEvent,
        SearchEndedEvent,
        TrialEvent,
        BaseLoadedEvent,
        RungEvent,
        PauseEvent,
        RetryEvent,
        WarningEvent,
        NoteEvent,
        TrackingFailedEvent,
        RayLeftEvent,
    )
}


def read_events(path: Path, kind: type[AnyEvent]) -> list[AnyEvent]:
    """Read the events of a kind from an events.jsonl, each as its class; of `Event`, all.

    Lines of other kinds and of stale attempts are not looked at: they may be damaged. A line is
    stale if a newer attempt had begun to write before it.

    Raises:
        DamagedFile: A value has another type than its kind demands.
    """
    events: list[AnyEvent] = []
    newest = 0
    for line in read_lines(path):
        attempt = line.get("attempt")
        number = attempt if isinstance(attempt, int) else 0
        if number < newest:
            continue
        newest = number
        line_kind = _KINDS.get(str(line.get("event")), Event)
        if issubclass(line_kind, kind):
            events.append(parse_record(path, line_kind, line))
    return events


def describe_event(event: Event) -> str | None:
    """Return the sentence of an event that a reader of the report must know; else None."""
    match event:
        case WarningEvent():
            return f"{event.trial_id}: {event.sentence}"
        case NoteEvent() | PlacementEvent():
            return event.sentence or None
        case TrackingFailedEvent():
            return (
                f"tracking with W&B was turned off: {event.error}; the run's own record is complete"
            )
        case RetryEvent():
            kind = event.failure.failure_class
            halved = ", with smaller micro-batches and more of them" if kind == "oom" else ""
            return (
                f"{event.trial_id} restarted{halved} (retry {event.number} after {kind}): "
                f"{event.failure.sentence}"
            )
    return None
