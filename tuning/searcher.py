"""Provide proposals to Ray Tune as a searcher.

Unfinished trials of an earlier attempt come first. Tune's ids of trials last for one
attempt; the run's own ids are content hashes and are passed in the config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.schema.types import Assignment
from lorafleet.tuning.ledger import Ledger
from lorafleet.tuning.proposals import Proposals


class ProposalSearcher(Searcher):
    """Hands out trials while fewer than `most_open` are unfinished.

    Tune keeps only one trial waiting for a custom searcher. TUNE_MAX_PENDING_TRIALS_PG (set
    in the sweep) raises that limit, so that a freed actor always finds a waiting trial and
    is reused instead of torn down.

    Args:
        total: Number of trials of the whole run, over all attempts.
        most_open: Maximum number of trials that are handed out and have not ended.
        make: Creates the trial of an assignment; the second argument is its index.
        stopping: Returns whether no further trial may start. It is called very often.
    """

    def __init__(
        self,
        ledger: Ledger,
        proposals: Proposals,
        total: int,
        most_open: int,
        make: Callable[[Assignment, int], Trial],
        stopping: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.ledger, self.proposals, self.total, self.most_open = (
            ledger,
            proposals,
            total,
            most_open,
        )
        self.make, self.stopping = make, stopping
        self.half_done = [trial for trial in self.run.list_trials() if not trial.state.has_ended]
        self.earlier = {trial.id for trial in self.run.list_trials()}
        # Trials of earlier attempts count towards the total.
        self.made = len(self.earlier)
        self.open: dict[str, Trial] = {}

    @property
    def run(self) -> Run:
        """Run that the trials belong to."""
        return self.ledger.run

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Return True. The metric comes from the job, not from Tune."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial's config, None for "not now", or FINISHED for "no more".

        FINISHED is final for Tune: it never asks again in this attempt.

        Args:
            trial_id: Tune's id, which `on_trial_complete` receives again.
        """
        if self.stopping():
            return Searcher.FINISHED
        if len(self.open) >= self.most_open:
            return None
        trial = self._get_next_trial()
        if trial is None:
            # An open trial may be restarted later, and FINISHED is final for Tune.
            return None if self.open else Searcher.FINISHED
        self.open[trial_id] = trial
        return {"trial_id": trial.id, "assignment": trial.read_params().assignment}

    def _get_next_trial(self) -> Trial | None:
        """Return the next trial to run, unfinished ones first; None if there is none."""
        if self.half_done:
            return self.half_done.pop(0)
        while self.made < self.total:
            assignment = self.proposals.next()
            if assignment is None:
                return None
            trial = self.make(assignment, self.made)
            if trial.id in self.earlier:
                continue  # an earlier attempt of this run created this trial
            self.made += 1
            return trial
        return None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Report the outcome to the proposals; a trial that waits for a restart is queued again."""
        trial = self.open.pop(trial_id, None)
        if trial is None:
            return
        # The scheduler has recorded the outcome before Tune calls this.
        if trial.state.has_ended:
            report_outcome(self.proposals, self.ledger, trial)
        else:
            self.half_done.append(trial)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the state is in the run's own files."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: see `save`."""


def report_outcome(proposals: Proposals, ledger: Ledger, trial: Trial) -> None:
    """Report to the proposals how a trial ended, from the trial's own record.

    Used for trials of this attempt and, at its start, for those of earlier ones.
    """
    scores = {
        row.step: score
        for row in trial.read_evaluations()
        if (score := row.get_metric(ledger.metric)) is not None
    }
    proposals.tell(trial.read_params().assignment, scores, trial.state)
