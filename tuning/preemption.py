"""Tell whether a machine of a Ray cluster will be preempted, and whether a run is ending."""

from __future__ import annotations

import time

import ray

from lorafleet.tuning.progress import StopFile

_STOP_FILE_SECONDS = 1.5
"""Seconds that the stop file may take to appear after a process was lost."""
_LOSS_SECONDS = 2.0
"""Seconds after a lost process in which another one counts as lost with it, as with their node."""


def is_node_leaving() -> bool:
    """Return whether Ray announced that this machine will be preempted.

    Ray Train checks it in the same way; neither Tune nor Ray's core has an API for it.
    """
    node: str = ray.get_runtime_context().get_node_id()
    return node in (ray._private.state.state.get_draining_nodes() or {})


class EndOfRun:
    """Tells whether a process was lost because the whole run ends.

    Args:
        stop_file: Asks the run to stop.
    """

    def __init__(self, stop_file: StopFile) -> None:
        self.stop_file = stop_file
        self._lost_at = -_LOSS_SECONDS

    def has_begun(self) -> bool:
        """Return whether the run is asked to stop. Called when a process was lost.

        Waits a moment for the stop file, because a queue that ends a job signals its processes
        in no particular order. When many processes are lost at once, it waits for the first only.
        """
        if time.monotonic() - self._lost_at > _LOSS_SECONDS:
            deadline = time.monotonic() + _STOP_FILE_SECONDS
            while not self.stop_file.path.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
        self._lost_at = time.monotonic()
        return self.stop_file.path.exists()
