"""The budget of a search: wall-clock time and GPU-hours over all attempts."""

from __future__ import annotations

import time
from collections.abc import Callable

from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema.search import BudgetSpec
from lorafleet.jobs.sites.placement import Placement

_COUNT_SECONDS = 5.0
"""Seconds between two counts of the GPU-hours: Tune asks many times a second."""


class Budget:
    """Tells when a search has spent its budget.

    Args:
        spec: The job's budget; None for a training without a search.
        run: The run, whose metrics tell the GPU time of each trial.
        placement: Placement of the trials.
        get_wall_seconds: Returns the time of all attempts so far.
    """

    def __init__(
        self,
        spec: BudgetSpec | None,
        run: Run,
        placement: Placement,
        get_wall_seconds: Callable[[], float],
    ) -> None:
        self.spec, self.run = spec, run
        self.gpus = placement.workers * placement.gpus_per_worker
        self.get_wall_seconds = get_wall_seconds
        self._counted_at = -_COUNT_SECONDS
        self._gpu_hours = 0.0

    def describe_spent(self) -> str | None:
        """Return which budget is spent, as text, or None."""
        if self.spec is None:
            return None
        hours = self.spec.wall_hours
        if hours is not None and self.get_wall_seconds() > 3600 * hours:
            return f"the budget of {hours:g} hours of wall-clock time is spent"
        gpu_hours = self.spec.gpu_hours
        if gpu_hours is not None and self._count_gpu_hours() > gpu_hours:
            return f"the budget of {gpu_hours:g} GPU-hours is spent"
        return None

    def _count_gpu_hours(self) -> float:
        """Return the GPU-hours of all trials, counted every few seconds only."""
        now = time.monotonic()
        if now - self._counted_at >= _COUNT_SECONDS:
            # The times in a row are sums over the trial's life, over all attempts.
            last_rows = [
                rows[-1] for trial in self.run.list_trials() if (rows := trial.read_metrics())
            ]
            seconds = sum(
                (row.train_seconds or 0.0) + (row.eval_seconds or 0.0) for row in last_rows
            )
            self._gpu_hours = self.gpus * seconds / 3600
            self._counted_at = now
        return self._gpu_hours
