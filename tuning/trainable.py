"""Train and evaluate in a warm Ray actor, which loads the base only once.

The config of a Tune trial is one of three: `{"trial_id": ..., "assignment": ...}` trains a
trial, `{"evaluation": NAME, "attempt": N}` evaluates a model on held-out rows, and
`{"standby": True}` keeps the actor with its base until one of the others is there.
"""

from __future__ import annotations

import time
from typing import Any

from ray import tune

from lorafleet.training.cpu import set_up_cpu
from lorafleet.tuning.held_out import Evaluator, build_evaluation
from lorafleet.tuning.preemption import is_node_leaving
from lorafleet.tuning.trial_host import TrialHost
from lorafleet.tuning.trial_report import EvaluationReport
from lorafleet.tuning.trial_run import Work

_STANDBY_SECONDS = 0.5
"""Seconds between two reports of an actor that has nothing to do."""


class WarmTrial(tune.Trainable):
    """Ray actor around a `TrialHost` and an `Evaluator`, which share one base.

    Tune calls `setup` once, `step` for each report, and `reset_config` for the next trial.
    If the process cannot be trusted any more, `step` raises WorkerUnusable and Tune replaces
    the actor.
    """

    def setup(self, config: dict[str, Any], work: Work) -> None:
        """Import the libraries and, for a trial, load its base."""
        self.host = TrialHost(work, is_node_leaving)
        self.evaluator = Evaluator(work, self.host.bases)
        if "trial_id" in config:
            self.host.set_up(config)
        self.task = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Switch to another task and keep the base."""
        if "trial_id" in new_config:
            self.host.set_trial(new_config)
        else:
            self.host.close()
        self.task = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Return one report, packed for Tune.

        Raises:
            WorkerUnusable: The process must not take another task; the error carries the
                failure.
        """
        if "standby" in self.task:
            time.sleep(_STANDBY_SECONDS)
            return {}
        if "evaluation" in self.task:
            return self._evaluate(self.task["evaluation"], self.task["attempt"]).to_result()
        return self.host.step().to_result()

    def _evaluate(self, name: str, attempt: int) -> EvaluationReport:
        """Evaluate a model on the held-out rows."""
        work = self.host.work
        set_up_cpu(work.threads)  # the last trial may have had more
        return self.evaluator.try_evaluate(build_evaluation(work, self.host.data, name), attempt)

    def cleanup(self) -> None:
        """Close the current trial before the actor ends."""
        self.host.close()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any] | None:
        """Do nothing: a trial's checkpoint is in its own folder, where the next actor finds it."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing: see `save_checkpoint`."""
