"""Read a run again and again, as cheaply as it can be.

A command that follows a run of a thousand trials must not read some thousand files each
time. The driver's `progress.json` says which trials have changed; those are read, and what
has ended is read once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.events import Event
from lorafleet.jobs.runs.records import (
    MetricsRow,
    PlanRecord,
    Progress,
    ProgressRecord,
    RunMetadata,
    TrialParams,
    TrialStatus,
    raise_damaged_file,
    read_typed,
)
from lorafleet.jobs.runs.run import Run, Trial, TrialState

Value = TypeVar("Value")
Version = tuple[int | None, str | None, int | None]
"""Attempt, state and number of results of a trial. Its files are the same while this is."""
_READ_ANYWAY = 2
"""Trials that are read each time, whatever their heartbeats say."""


class _CachedFile(Generic[Value]):
    """Content of a file, which is read again only when the file has changed.

    Args:
        path: The file; it may not exist.
        read: Reads it.
    """

    def __init__(self, path: Path, read: Callable[[], Value]) -> None:
        self.path, self.read = path, read
        self._cached: tuple[tuple[int, ...] | None, Value] | None = None

    def get(self) -> Value:
        """Return the content. Raises what `read` raises."""
        try:
            identity = files.get_file_identity(self.path)
        except OSError:
            identity = None
        if self._cached is None or self._cached[0] != identity:
            self._cached = identity, self.read()
        return self._cached[1]


@dataclass(frozen=True)
class FollowedTrial:
    """A trial as it was last read."""

    trial: Trial
    params: TrialParams
    status: TrialStatus
    rows: list[MetricsRow]
    """Rows with an evaluation, and the last one."""
    rung: int | None
    """Last rung that was reached."""
    progress: Progress
    """Its heartbeat; empty if it has none."""
    version: Version | None
    """Version of the files that were read, according to the heartbeat before."""

    @property
    def has_ended(self) -> bool:
        """Return whether the trial has ended."""
        return TrialState(self.status.state or "pending").has_ended


class FollowedRun:
    """A run that is read again and again.

    Args:
        run: A plain run, or a comparison, whose trials are those of its arms.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._sources: dict[Path, _Source] = {}
        self._plan = _CachedFile(run.path / "plan.json", run.read_plan)
        self._metadata = _CachedFile(run.path / "facts.json", run.read_metadata)

    def read_plan(self) -> PlanRecord:
        """Return the plan. Raises DamagedFile."""
        return self._plan.get()

    def read_metadata(self) -> RunMetadata:
        """Return the metadata. Raises DamagedFile."""
        return self._metadata.get()

    def read_trials(self) -> list[FollowedTrial]:
        """Return all trials, in the order of their index. Damaged ones are left out."""
        if (self.run.path / "arms").is_dir():
            sources = [self._get_source(arm.path) for arm in self.run.list_arms()]
            return [trial for source in sources for trial in source.read_trials()]
        return self._get_source(self.run.path).read_trials()

    def read_events(self) -> list[Event]:
        """Return all events of the run itself, oldest first. Raises DamagedFile."""
        return self._get_source(self.run.path).read_events()

    def list_remarks(self) -> list[str]:
        """Return unplanned events, as `Run.list_remarks` does."""
        arms = self.run.list_arms() if (self.run.path / "arms").is_dir() else []
        messages = []
        for folder in (*(arm.path for arm in arms), self.run.path):
            prefix = "" if folder == self.run.path else f"{folder.name}: "
            sentences = self._get_source(folder).list_remarks()
            messages += [f"{prefix}{sentence}" for sentence in sentences]
        return messages

    def _get_source(self, folder: Path) -> _Source:
        return self._sources.setdefault(folder, _Source(Run(folder)))


class _Source:
    """One run whose trials are followed: the run itself, or an arm."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._trials: dict[Path, FollowedTrial] = {}
        self._heartbeats: dict[Path, _CachedFile[ProgressRecord]] = {}
        self._events = _CachedFile(run.path / "events.jsonl", lambda: run.read_events(Event))

    def read_events(self) -> list[Event]:
        return self._events.get()

    def list_remarks(self) -> list[str]:
        from lorafleet.jobs.runs.events import describe_event

        sentences = map(describe_event, self.read_events())
        return [sentence for sentence in sentences if sentence is not None]

    def read_trials(self) -> list[FollowedTrial]:
        folders = set(self.run.list_trial_folders())
        # Read before the trials are: what changes meanwhile is seen the next time.
        records = {
            folder: self._read_heartbeats(folder)
            for folder in {path.parent.parent for path in folders}
        }
        # The longest unread ones are read in any case: files that were downloaded may be older than
        # the heartbeats beside them.
        must_read = set(self._list_unended()[:_READ_ANYWAY])
        for path in folders:
            record = records[path.parent.parent]
            progress, previous = record.trials.get(path.name), self._trials.get(path)
            version = None
            if progress is not None:
                version = record.attempt, progress.state, progress.results
            if previous is None or path in must_read or not _is_current(previous, version):
                self._read(path, version, progress or Progress())
            elif progress is not None:
                self._trials[path] = replace(previous, progress=progress)
        for path in self._trials.keys() - folders:  # an array task's, moved into the run
            del self._trials[path]
        trials = self._trials.values()
        return sorted(trials, key=lambda followed: (followed.params.index, followed.trial.id))

    def _list_unended(self) -> list[Path]:
        """Return the known trials that have not ended, the longest unread first."""
        return [path for path, followed in self._trials.items() if not followed.has_ended]

    def _read(self, path: Path, version: Version | None, progress: Progress) -> None:
        """Read a trial, unless it is damaged: the run's remarks name it."""
        self._trials.pop(path, None)  # inserted again as the last one
        trial = Trial(path)
        with contextlib.suppress(RunError), raise_damaged_file(path):
            if not (path / "params.json").is_file():
                return
            params, status, rows = trial.read_params(), trial.read_status(), trial.read_metrics()
            _: Any = trial.state  # raises for an unknown state
            kept = [row for row in rows[:-1] if row.evaluated] + rows[-1:]
            rung = trial.find_rung(rows)
            self._trials[path] = FollowedTrial(trial, params, status, kept, rung, progress, version)

    def _read_heartbeats(self, folder: Path) -> ProgressRecord:
        """Return the heartbeats of a run's trials; empty if the file is damaged."""
        path = Run(folder).progress_file
        cached = self._heartbeats.setdefault(
            folder, _CachedFile(path, lambda: read_typed(path, ProgressRecord))
        )
        try:
            return cached.get()
        except RunError:
            return ProgressRecord()


def _is_current(followed: FollowedTrial, version: Version | None) -> bool:
    """Return whether the files of a trial have not changed since they were read.

    Args:
        version: Version according to the newest heartbeat; None without one, because the trial
            has ended, or because no driver has trained.
    """
    return followed.has_ended if version is None else followed.version == version
