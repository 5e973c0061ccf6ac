"""Merge the array tasks of a split run into the run.

Each task of a job array runs in a run folder of its own below `parts/`; one driver
merges them. Only there are decisions made that need all trials.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lorafleet.jobs import files
from lorafleet.jobs.runs.events import (
    BaseLoadedEvent,
    Event,
    NoteEvent,
    RetryEvent,
    TrackingFailedEvent,
    WarningEvent,
)
from lorafleet.jobs.runs.lease import Lease, find_silent_runs
from lorafleet.jobs.runs.records import AttemptRecord
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.tuning.results_journal import ResultsJournal

_MERGED_EVENTS = (WarningEvent, RetryEvent, BaseLoadedEvent, NoteEvent, TrackingFailedEvent)
"""Events of an array task that are copied to the whole run."""


def merge_tasks(run: Run, metadata: AttemptRecord, say: Callable[[str], None]) -> None:
    """Move the trials of all array tasks into the run, ended or not.

    Trials that have not ended continue from their checkpoints. An interrupted merge can be
    repeated: trials that were moved already are not moved again.

    Args:
        metadata: Metadata of this process, recorded in the lease.
        say: Receives messages for the log.

    Raises:
        RunError: The driver of an array task is still alive.
    """
    seconds = float(run.read_status().wall_seconds or 0.0)
    # One watch for all tasks: a driver on another machine is dead only after 40 silent seconds.
    parts = run.list_array_tasks()
    watched_paths = find_silent_runs([part.path for part in parts], say)
    for part in parts:
        # From here on, a restarted driver of this array task is refused.
        lease = Lease.acquire(
            part.path, metadata, say=say, **({"seconds": 0.0} if part.path in watched_paths else {})
        )
        # The tasks run side by side, so the longest counts and not their sum.
        seconds = max(seconds, float(part.read_status().wall_seconds or 0.0))
        ResultsJournal(replace(part, attempt=lease.attempt)).recover()
        for folder in sorted((part.path / "trials").glob("*")):
            target = run.path / "trials" / folder.name
            # Without params.json the task was killed while it created the trial.
            if (folder / "params.json").is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                _remove_attempts(Trial(folder))
                folder.rename(target)
        for event in part.read_events(Event):
            if isinstance(event, _MERGED_EVENTS):
                run.add_event(_drop_stamps(event))
        _move_wandb_runs(part.path / "wandb", run.path / "wandb")
        _move_log(part, run)
        # Everything has been moved; a repeated merge must not find the events again.
        lease.release()
        shutil.rmtree(part.path, ignore_errors=True)
    if (run.path / "parts").is_dir():
        run.set_state(run.state, wall_seconds=seconds)
        shutil.rmtree(run.path / "parts", ignore_errors=True)


def _drop_stamps(event: Event) -> Event:
    """Return an event of an array task without its time and attempt: the run has its own."""
    stamps = ("time", "attempt", "schema_version")
    values = {name: value for name, value in event.to_dict().items() if name not in stamps}
    return type(event).model_validate(values)


def _remove_attempts(trial: Trial) -> None:
    """Remove the attempt numbers from a trial's metrics.

    An array task counts its own attempts, so its numbers mean nothing in the whole run.
    """
    rows = trial.read_metrics()
    if rows:
        lines = [
            json.dumps({key: value for key, value in row.to_dict().items() if key != "attempt"})
            for row in rows
        ]
        files.write_text(trial.path / "metrics.jsonl", "\n".join(lines) + "\n")


def _move_wandb_runs(source: Path, target: Path) -> None:
    """Move an array task's W&B runs, and its list of closed trials, into the run."""
    (target / "wandb").mkdir(parents=True, exist_ok=True)
    for folder in source.glob("wandb/*run-*"):
        if not (target / "wandb" / folder.name).exists():
            folder.rename(target / "wandb" / folder.name)
    for row in files.read_jsonl(source / "closed.jsonl"):
        files.append_jsonl(target / "closed.jsonl", {"trial_id": row["trial_id"]})


def _move_log(part: Run, run: Run) -> None:
    """Move an array task's driver log into the run's log folder."""
    log = part.path / "logs" / "driver.log"
    if log.is_file():
        (run.path / "logs").mkdir(exist_ok=True)
        log.rename(run.path / "logs" / f"driver-part-{part.path.name}.log")
