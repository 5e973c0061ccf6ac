"""Compute how long a trial trains and when it is evaluated.

All functions are pure. The job states times in units of `scheduler.time_attr`; here
they become optimiser steps, by which the training loop counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials import asha as rungs


@dataclass(frozen=True)
class Schedule:
    """Fixed points of one trial, in optimiser steps."""

    total_steps: int
    batch_rows: int
    """Rows in one optimiser step."""
    steps_per_epoch: int
    evaluation_steps: tuple[int, ...]
    """Steps after which the trial is evaluated, including the last step."""
    rung_steps: tuple[int, ...]
    """Step of each rung; the last one is the end of the trial."""
    rung_levels: tuple[int, ...]
    """Rungs in units of `time_attr`."""
    evaluate_every: int | None = None
    """Additional evaluations after each multiple of this number of steps. None: only at
    `evaluation_steps`.
    """

    @property
    def total_samples(self) -> int:
        """Return the number of training rows processed by the end of the trial.

        The last batch of an epoch may be short.
        """
        return self.total_steps * self.batch_rows

    def find_next_evaluation(self, step: int) -> int:
        """Return the step of the first evaluation after `step`.

        Beyond the last fixed evaluation this is the end of the trial.
        """
        fixed = next(
            (
                evaluation_step
                for evaluation_step in self.evaluation_steps
                if evaluation_step > step
            ),
            self.total_steps,
        )
        return (
            min(fixed, (step // self.evaluate_every + 1) * self.evaluate_every)
            if self.evaluate_every
            else fixed
        )


def build_schedule(job: JobSpec, train_rows: int, *, searching: bool) -> Schedule:
    """Return the schedule of a trial over `train_rows` rows.

    Args:
        job: The job of the trial.
        train_rows: Rows of one epoch; with packing, packed rows.
        searching: The trial belongs to a search, whose `max_t` takes precedence over the
            length in `train`.

    Returns:
        The schedule. Outside of a search it has one rung, at the end.
    """
    batch = job.train.compute_effective_batch_size(job.resources.world_size)
    per_epoch = math.ceil(train_rows / batch)
    full_steps = job.train.max_steps or max(1, round(per_epoch * job.train.num_train_epochs))
    asha = job.search.scheduler if searching and job.search else None
    if asha is None:
        return Schedule(
            full_steps,
            batch,
            per_epoch,
            (full_steps,),
            (full_steps,),
            (full_steps,),
            job.train.eval_steps or per_epoch,
        )
    steps_per_unit = {"samples": 1 / batch, "step": 1.0, "epoch": float(per_epoch)}[asha.time_attr]
    max_t = asha.max_t or max(1, round(full_steps / steps_per_unit))
    levels = [max_t]
    if asha.type == "asha":
        grace = asha.grace_period or rungs.compute_default_grace_period(
            max_t, asha.reduction_factor
        )
        levels = rungs.compute_rung_levels(min(grace, max_t), max_t, asha.reduction_factor)
    # The small term keeps a rounding error of the division from adding a step.
    steps = tuple(max(1, math.ceil(level * steps_per_unit - 1e-9)) for level in levels)
    only_at_rungs = asha.type == "asha" and job.train.eval_steps is None
    evaluate_every = None if only_at_rungs else job.train.eval_steps or per_epoch
    return Schedule(steps[-1], batch, per_epoch, steps, steps, tuple(levels), evaluate_every)
