"""The budget of a search: wall-clock time and GPU-hours over all attempts."""

from __future__ import annotations

from collections.abc import Callable

from lorafleet.jobs.schema.search import BudgetSpec
from lorafleet.jobs.sites.placement import Placement


class Budget:
    """Tells when a search has spent its budget.

    Args:
        spec: The job's budget; None for a training without a search.
        placement: Placement of the trials.
        get_trial_seconds: Returns the time of all trials so far, summed.
        get_wall_seconds: Returns the time of all attempts so far.
    """

    def __init__(
        self,
        spec: BudgetSpec | None,
        placement: Placement,
        get_trial_seconds: Callable[[], float],
        get_wall_seconds: Callable[[], float],
    ) -> None:
        self.spec, self.get_trial_seconds = spec, get_trial_seconds
        self.gpus = placement.gpus
        self.get_wall_seconds = get_wall_seconds

    def describe_spent(self) -> str | None:
        """Return which budget is spent, as text, or None."""
        if self.spec is None:
            return None
        hours = self.spec.wall_hours
        if hours is not None and self.get_wall_seconds() > 3600 * hours:
            return f"the budget of {hours:g} hours of wall-clock time is spent"
        gpu_hours = self.spec.gpu_hours
        if gpu_hours is not None and self.gpus * self.get_trial_seconds() / 3600 > gpu_hours:
            return f"the budget of {gpu_hours:g} GPU-hours is spent"
        return None
