"""Provide the trials of a `TrialQueue` to Ray Tune as a searcher.

Tune's ids of trials last for one attempt; the run's own ids are content hashes and are
passed in the config.
"""

from __future__ import annotations

from typing import Any

from ray.tune.search import Searcher

from lorafleet.jobs.runs.run import Trial
from lorafleet.tuning.trial_queue import NoTrial, TrialQueue


class ProposalSearcher(Searcher):
    """Hands out the trials of a queue.

    Tune keeps only one trial waiting for a custom searcher. TUNE_MAX_PENDING_TRIALS_PG (set
    in the sweep) raises that limit, so that a freed actor always finds a waiting trial and
    is reused instead of torn down.
    """

    def __init__(self, queue: TrialQueue) -> None:
        super().__init__()
        self.queue = queue
        self.open: dict[str, Trial] = {}

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
        trial = self.queue.take()
        if isinstance(trial, NoTrial):
            return Searcher.FINISHED if trial is NoTrial.END else None
        self.open[trial_id] = trial
        return {"trial_id": trial.id, "assignment": trial.read_params().assignment}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Hand a trial back to the queue. The scheduler has recorded its outcome before."""
        trial = self.open.pop(trial_id, None)
        if trial is not None:
            self.queue.complete(trial)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the state is in the run's own files."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: see `save`."""
