"""Watch the machines of a Slurm allocation while trials run on them."""

from __future__ import annotations

import os
import signal
import time

from lorafleet.cluster.execution.allocation import get_allocation
from lorafleet.cluster.ray.nodes import parse_nodes
from lorafleet.jobs.errors import PlacementRefused
from lorafleet.jobs.runs.events import NoteEvent
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.sites.placement import Placement, fit_placement

_CHECK_SECONDS = 15.0
"""Seconds between two checks of the machines."""


class MachineWatch:
    """Asks for a requeue when the remaining nodes cannot hold one trial.

    Lost nodes of an allocation do not come back. Outside of one, nothing is checked.
    """

    def __init__(self, run: Run, placement: Placement) -> None:
        self.run, self.placement = run, placement
        self._checked_at = time.monotonic()
        self._has_too_few = False

    def check(self) -> None:
        """Check the machines, if the last check is long enough ago."""
        now = time.monotonic()
        if not get_allocation() or now - self._checked_at < _CHECK_SECONDS:
            return
        self._checked_at = now
        import ray

        try:
            fit_placement(self.placement, parse_nodes(ray.nodes()))
        except PlacementRefused as error:
            if not self._has_too_few:
                # Ray may report a node as lost for a moment: only two checks in a row count.
                self._has_too_few = True
                return
            sentence = (
                f"nodes were lost: {error}; the trials are saved, to continue in a new allocation"
            )
            self.run.add_event(NoteEvent(sentence=sentence))
            # The same path as a warning from the queue: trials save, and the exit code asks for a
            # requeue.
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            self._has_too_few = False
