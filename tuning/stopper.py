"""End Ray Tune's loop when a search is over, or when the run is asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune.stopper import Stopper

from lorafleet.jobs.runs.run import TrialState
from lorafleet.tuning.searcher import ProposalSearcher

_SAVE_SECONDS = 300.0
"""Seconds that trials have to save when a run is asked to stop."""
_RETURN_SECONDS = 1.0
"""Seconds that trials have to return after their last report. Ray frees the workers of a group that
returns at once, but not always those of a group that is killed.
"""


class SearchStopper(Stopper):
    """Tells Tune to end when nothing is left to do, or when the run is asked to stop.

    Trials learn of a request to stop themselves, save and end. Tune would kill an actor after
    ten seconds, so the search ends only when no trial runs (all may wait for machines that
    never come), or after `_SAVE_SECONDS`. Tasks that still wait for machines when nothing is
    left to do are given up.

    Args:
        searcher: The searcher of the same search.
        on_tick: Called whenever Tune asks, which is ten times a second.
    """

    def __init__(self, searcher: ProposalSearcher, on_tick: Callable[[], None]) -> None:
        self.searcher, self.on_tick = searcher, on_tick
        self._asked_at: float | None = None
        self._idle_since: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves it and nothing reads that: a resume starts from the run's own files.
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: the scheduler stops single trials."""
        return False

    def stop_all(self) -> bool:
        """Return whether Tune's loop ends."""
        self.on_tick()
        if self.searcher.is_over():
            return True
        if not self.searcher.stop_file.exists():
            return False
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        if self.searcher.queue.ledger.trials.counts[TrialState.RUNNING]:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        has_saved = self._idle_since is not None and now - self._idle_since > _RETURN_SECONDS
        return has_saved or now - self._asked_at > _SAVE_SECONDS
