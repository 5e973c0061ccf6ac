"""Run one trial after another in a warm Ray actor, which loads the base only once."""

from __future__ import annotations

from typing import Any

import ray
from ray import tune

from lorafleet.tuning.trial_host import TrialHost
from lorafleet.tuning.trial_run import Work


class WarmTrial(tune.Trainable):
    """Ray actor around a `TrialHost`.

    Tune calls `setup` once, `step` for each report, and `reset_config` for the next trial.
    If the process cannot be trusted any more, `step` raises WorkerUnusable and Tune replaces
    the actor.
    """

    def setup(self, config: dict[str, Any], work: Work) -> None:
        """Import the libraries and load the base."""
        self.host = TrialHost(work, _is_node_leaving)
        self.host.set_up(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Switch to another trial and keep the base."""
        self.host.set_trial(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Return one report, packed for Tune (see `TrialReport.to_result`).

        Raises:
            WorkerUnusable: The process must not take another trial; the error carries the
                trial's failure.
        """
        return self.host.step().to_result()

    def cleanup(self) -> None:
        """Close the current trial before the actor ends."""
        self.host.close()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any] | None:
        """Do nothing: a trial's checkpoint is in its own folder, where the next actor finds it."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing: see `save_checkpoint`."""


def _is_node_leaving() -> bool:
    """Return whether Ray announced that this machine will be preempted.

    Ray Train checks it in the same way; Tune has no API for it.
    """
    node: str = ray.get_runtime_context().get_node_id()
    return node in (ray._private.state.state.get_draining_nodes() or {})
