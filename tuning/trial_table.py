"""Hold all trials of a run in memory, for the driver that writes them.

The files stay the record: the table is filled from them once. States are written before they
are visible here. Results without an evaluation are written later.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lorafleet.jobs.runs.records import MetricsRow, TrialParams, TrialStatus
from lorafleet.jobs.runs.run import Run, Trial, TrialState
from lorafleet.jobs.schema.types import Assignment


@dataclass(frozen=True)
class TrackedTrial(Trial):
    """A trial of a `TrialTable`, whose parameters and status are in memory.

    Results without an evaluation wait in memory until the next evaluation, or until
    `write_rows` is called.
    """

    memory: _Memory = field(default_factory=lambda: _Memory(), compare=False, repr=False)

    def read_params(self) -> TrialParams:
        """Return the trial's parameters."""
        if self.memory.params is None:
            self.memory.params = super().read_params()
        return self.memory.params

    def read_status(self) -> TrialStatus:
        """Return the trial's status."""
        if self.memory.status is None:
            self.memory.status = super().read_status()
        return self.memory.status

    def set_state(self, state: TrialState, **details: Any) -> TrialStatus:
        """Write the state together with `details`, after the results before it."""
        self.write_rows()
        previous = self.state
        self.memory.status = super().set_state(state, **details)
        self.memory.on_state(self, previous)
        return self.memory.status

    def add_rows(self, *rows: MetricsRow) -> None:
        """Add lines to metrics.jsonl: at once if one of them is an evaluation or at a rung."""
        now = time.time()
        self.memory.unwritten += [row.model_copy(update={"time": now}) for row in rows]
        if any(row.evaluated or row.rung is not None for row in rows):
            self.write_rows()

    @property
    def has_unwritten_rows(self) -> bool:
        """Return whether results wait to be written."""
        return bool(self.memory.unwritten)

    def take_unsaved_rows(self) -> list[MetricsRow]:
        """Return the waiting results that no earlier call has returned."""
        rows = self.memory.unwritten[self.memory.saved :]
        self.memory.saved = len(self.memory.unwritten)
        return rows

    def write_rows(self) -> None:
        """Write the results that wait."""
        if self.memory.unwritten:
            super().add_rows(*self.memory.unwritten)
            self.memory.unwritten, self.memory.saved = [], 0

    def read_metrics(self) -> list[MetricsRow]:
        """Return all rows of metrics.jsonl, oldest first."""
        self.write_rows()
        return super().read_metrics()


@dataclass
class _Memory:
    """Values of a trial that are not read from its files again."""

    params: TrialParams | None = None
    status: TrialStatus | None = None
    unwritten: list[MetricsRow] = field(default_factory=list)
    saved: int = 0
    """Number of the unwritten rows that are in the journal."""
    on_state: Callable[[TrackedTrial, TrialState], None] = lambda trial, previous: None


class TrialTable:
    """The trials of a run, in the order of their index. Iterating yields `TrackedTrial`s.

    Reads the run's folder when it is created, and never again.

    Args:
        run: The run, which this process drives.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._trials: dict[str, TrackedTrial] = {}
        self.unended: dict[str, TrackedTrial] = {}
        """Trials that have not ended, by id."""
        self.counts = Counter[TrialState]()
        """State -> number of trials."""
        for trial in run.list_trials():
            self._insert(TrackedTrial(trial.path, trial.attempt))

    def __iter__(self) -> Iterator[TrackedTrial]:
        return iter(self._trials.values())

    def __len__(self) -> int:
        return len(self._trials)

    def __contains__(self, trial_id: str) -> bool:
        return trial_id in self._trials

    def get(self, trial_id: str) -> TrackedTrial:
        """Return a trial. Raises KeyError if there is none."""
        return self._trials[trial_id]

    def add(self, trial_id: str, index: int, assignment: Assignment, **params: Any) -> TrackedTrial:
        """Create a trial, as `Run.add_trial` does; one that exists is returned."""
        if trial_id not in self._trials:
            trial = self.run.add_trial(trial_id, index, assignment, **params)
            self._insert(TrackedTrial(trial.path, trial.attempt))
        return self._trials[trial_id]

    def _insert(self, trial: TrackedTrial) -> None:
        trial.memory.on_state = self._record_change
        self._trials[trial.id] = trial
        self.counts[trial.state] += 1
        if not trial.state.has_ended:
            self.unended[trial.id] = trial

    def _record_change(self, trial: TrackedTrial, previous: TrialState) -> None:
        """Count a trial in its new state."""
        self.counts[previous] -= 1
        self.counts[trial.state] += 1
        if trial.state.has_ended:
            self.unended.pop(trial.id, None)
