"""Provide trials and evaluations to Ray Tune as a searcher.

Tune's ids of trials last for one attempt; the run's own ids are content hashes and are
passed in the config (see `tuning/trainable.py`).
"""

from __future__ import annotations

from typing import Any

from ray.tune.search import Searcher

from lorafleet.jobs.runs.run import TrialState
from lorafleet.tuning.evaluation_queue import EvaluationQueue
from lorafleet.tuning.progress import StopFile
from lorafleet.tuning.trial_queue import NoTrial, TrialQueue, build_config
from lorafleet.tuning.trial_table import TrackedTrial


class ProposalSearcher(Searcher):
    """Hands out the trials of a queue, then the evaluations on held-out rows.

    Tune keeps only one trial waiting for a custom searcher. TUNE_MAX_PENDING_TRIALS_PG (set
    in the sweep) raises that limit, so that a freed actor always finds a waiting trial and
    is reused instead of torn down. While nothing waits and other trials still run, idle
    actors are kept by standby tasks: they are needed for the evaluations.

    Args:
        stop_file: Asks the run to stop; a spent budget does not count.
        evaluations: None if the search evaluates nothing on held-out rows, or does so later.
        slots: Number of actors that run at once.
    """

    def __init__(
        self,
        queue: TrialQueue,
        stop_file: StopFile,
        evaluations: EvaluationQueue | None = None,
        slots: int = 0,
    ) -> None:
        super().__init__()
        self.queue, self.stop_file = queue, stop_file
        self.evaluations, self.slots = evaluations, slots
        # By Tune's id.
        self.open_trials: dict[str, TrackedTrial] = {}
        self.open_evaluations: dict[str, str] = {}
        self.standbys: set[str] = set()
        self.idle_actors = 0
        """Actors that have ended a task, and were given no other one."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves it and nothing reads that: a resume starts from the run's own files.
        return {}

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Return True. The metric comes from the job, not from Tune."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next task's config, None for "not now", or FINISHED for "no more".

        FINISHED is final for Tune: it never asks again in this attempt.

        Args:
            trial_id: Tune's id, which `on_trial_complete` receives again.
        """
        task = self._take_task(trial_id)
        if isinstance(task, dict):
            self.idle_actors = max(0, self.idle_actors - 1)
        return task

    def _take_task(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return what `suggest` returns."""
        trial = self.queue.take()
        if isinstance(trial, TrackedTrial):
            self.open_trials[trial_id] = trial
            return build_config(trial)
        if self.evaluations is None or self.stop_file.exists():
            return Searcher.FINISHED if trial is NoTrial.END else None
        if trial is NoTrial.FULL:
            return None
        search_is_over = trial is NoTrial.END and not self.open_trials
        evaluation = self.evaluations.take(search_is_over=search_is_over)
        if evaluation is not None:
            name, attempt = evaluation
            self.open_evaluations[trial_id] = name
            return {"evaluation": name, "attempt": attempt}
        if self.evaluations.is_empty():
            return Searcher.FINISHED
        # Only for an actor that is there: another one would need resources, which an autoscaler
        # might add.
        if self.idle_actors and self._count_tasks() < self.slots:
            self.standbys.add(trial_id)
            return {"standby": True}
        return None

    def _count_tasks(self) -> int:
        return len(self.open_trials) + len(self.open_evaluations) + len(self.standbys)

    def is_over(self) -> bool:
        """Return whether all trials and evaluations have ended; standby tasks do not count."""
        is_busy = self.open_trials or self.open_evaluations
        return self.evaluations is not None and self.evaluations.is_empty() and not is_busy

    def needs_standby(self) -> bool:
        """Return whether actors may still be needed."""
        return (
            self.evaluations is not None
            and not self.evaluations.is_empty()
            and not self.stop_file.exists()
        )

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Hand a task back to its queue. The scheduler has recorded its outcome before."""
        if trial_id in self.standbys:
            self.standbys.remove(trial_id)  # another task takes its actor
        elif not error:
            self.idle_actors += 1
        trial = self.open_trials.pop(trial_id, None)
        if trial is not None:
            self.queue.complete(trial)
            # A trial that was trained to the end is a finalist, whatever the others reach.
            if trial.state is TrialState.FINISHED and self.evaluations is not None:
                self.evaluations.add(trial.id)
        name = self.open_evaluations.pop(trial_id, None)
        if name is not None and self.evaluations is not None:
            # Does nothing if the scheduler has recorded a failure.
            self.evaluations.complete(name)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the state is in the run's own files."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: see `save`."""
