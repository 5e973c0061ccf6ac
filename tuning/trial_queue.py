"""Hand out the trials of a search: unfinished ones of an earlier attempt first, then new ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from lorafleet.jobs.runs.run import TrialState
from lorafleet.jobs.schema.types import Assignment
from lorafleet.tuning.ledger import Ledger
from lorafleet.tuning.proposals import Proposals
from lorafleet.tuning.trial_table import TrackedTrial


class NoTrial(Enum):
    """Reason why no trial is handed out."""

    FULL = "full"
    """As many trials as allowed are open."""
    WAIT = "wait"
    """A trial may follow when another one has ended."""
    END = "end"
    """No trial will follow in this attempt."""


@dataclass(frozen=True)
class ThreadShare:
    """CPU threads of the trials of a search."""

    usual: int
    """Threads of a process while all slots are in use."""
    slots: int
    """Trials that run at once."""
    takes_idle: bool = False
    """True if a trial may take the cores of idle slots: they are on the same machine."""

    def compute(self, used: int, left: int) -> int:
        """Return the threads of a trial that starts now.

        Args:
            used: Threads of the other trials that have started and not ended.
            left: Trials that could start now, this one included.
        """
        if not self.takes_idle:
            return self.usual
        return max(self.usual, (self.usual * self.slots - used) // left)


class TrialQueue:
    """Trials that are left to run.

    Whoever takes a trial hands it back with `complete`, when its state is recorded.

    Args:
        total: Number of trials of the whole run, over all attempts.
        max_open: Maximum number of trials that are handed out and have not ended.
        create: Creates the trial of an assignment; the second argument is its index.
        should_stop: Returns whether no further trial may start. It is called very often.
        threads: The threads of its trials.
    """

    def __init__(
        self,
        ledger: Ledger,
        proposals: Proposals,
        total: int,
        max_open: int,
        create: Callable[[Assignment, int], TrackedTrial],
        should_stop: Callable[[], bool],
        threads: ThreadShare,
    ) -> None:
        self.ledger, self.proposals = ledger, proposals
        self.total, self.max_open = total, max_open
        self.create, self.should_stop, self.threads = create, should_stop, threads
        self.unfinished = deque(
            trial
            for trial in ledger.trials.unended.values()
            if trial.state is not TrialState.PAUSED
        )
        self.earlier_ids = {trial.id for trial in ledger.trials}
        # Trials of earlier attempts count towards the total.
        self.created = len(self.earlier_ids)
        self.open_threads: dict[str, int] = {}
        """Threads of the trials that are handed out and have not ended, by id."""

    def take(self) -> TrackedTrial | NoTrial:
        """Return the next trial to run, or why there is none."""
        if self.should_stop():
            return NoTrial.END
        if self.open_trials >= self.max_open:
            return NoTrial.FULL
        trial = self._find_next()
        if trial is None:
            # An open trial may be restarted later, and END is final.
            return NoTrial.WAIT if self.open_trials else NoTrial.END
        self.open_threads[trial.id] = self._record_threads(trial)
        return trial

    @property
    def open_trials(self) -> int:
        """Number of trials that are handed out and have not ended."""
        return len(self.open_threads)

    def _record_threads(self, trial: TrackedTrial) -> int:
        """Return the threads of a trial; they are recorded when it is first handed out.

        A trial keeps its number: sums of another number of threads are rounded differently.
        """
        threads = trial.read_status().threads
        if threads is None:
            left = 1 + len(self.unfinished) + self.total - self.created
            threads = self.threads.compute(sum(self.open_threads.values()), left)
            trial.set_state(trial.state, threads=threads)
        return threads

    def _find_next(self) -> TrackedTrial | None:
        """Return the next trial; None if there is none now.

        Unfinished and promoted trials come before new ones.
        """
        self.unfinished.extend([] if self.unfinished else self.ledger.promote_paused())
        if self.unfinished:
            return self.unfinished.popleft()
        trial = self._create_next()
        if trial is not None:
            return trial
        self.unfinished.extend(self.ledger.close_rungs(is_idle=not self.open_trials))
        if self.unfinished:
            return self.unfinished.popleft()
        # The last paused trials may have been stopped: the best configuration is known now.
        return self._create_next()

    def _create_next(self) -> TrackedTrial | None:
        """Create the next new trial; None if there is none now."""
        while self.created < self.total:
            assignment = self.proposals.next()
            if assignment is None:
                return None
            trial = self.create(assignment, self.created)
            if trial.id in self.earlier_ids:
                continue  # an earlier attempt of this run created this trial
            self.created += 1
            return trial
        return None

    def complete(self, trial: TrackedTrial) -> None:
        """Report the outcome to the proposals; a trial that waits for a restart is queued again.

        A paused one is not: the ledger promotes it.
        """
        del self.open_threads[trial.id]
        if trial.state.has_ended:
            report_outcome(self.proposals, self.ledger, trial)
        elif trial.state is not TrialState.PAUSED:
            self.unfinished.append(trial)


def build_config(trial: TrackedTrial) -> dict[str, Any]:
    """Return what a host must know of a trial that was handed out."""
    return {
        "trial_id": trial.id,
        "assignment": trial.read_params().assignment,
        "threads": trial.read_status().threads,
    }


def report_outcome(proposals: Proposals, ledger: Ledger, trial: TrackedTrial) -> None:
    """Report to the proposals how a trial ended, from its record.

    Used for trials of this attempt and, at its start, for those of earlier ones.
    """
    scores = ledger.results[trial.id].scores
    proposals.tell(trial.read_params().assignment, scores, trial.state)
