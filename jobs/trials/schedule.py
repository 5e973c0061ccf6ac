"""How long a trial trains and when it is looked at: optimiser steps, rungs, evaluations. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials import asha as rungs


@dataclass(frozen=True)
class Schedule:
    """The fixed points of one trial, in optimiser steps."""

    total_steps: int
    batch_rows: int
    """Rows in one optimiser step."""
    steps_per_epoch: int
    evaluation_steps: tuple[int, ...]
    """Steps after which the trial is evaluated, the last step among them."""
    rung_steps: tuple[int, ...]
    """The step of each rung; the last is the end."""
    rung_levels: tuple[int, ...]
    """The rungs in the units of `time_attr`."""
    evaluate_every: int | None = None
    """Evaluations between those: after each multiple of this."""

    @property
    def total_samples(self) -> int:
        """Training rows seen at the end (the last batch of an epoch may be short)."""
        return self.total_steps * self.batch_rows

    def next_evaluation(self, step: int) -> int:
        """The first evaluation after `step`."""
        fixed = next((at for at in self.evaluation_steps if at > step), self.total_steps)
        return min(fixed, (step // self.evaluate_every + 1) * self.evaluate_every) if self.evaluate_every else fixed


def schedule(job: JobSpec, train_rows: int, *, searching: bool) -> Schedule:
    """The schedule of a trial over `train_rows` rows; in a search, `max_t` comes before what `train` says."""
    batch = job.train.effective_batch_size(job.resources.world_size)
    per_epoch = math.ceil(train_rows / batch)
    own = job.train.max_steps or max(1, round(per_epoch * job.train.num_train_epochs))
    asha = job.search.scheduler if searching and job.search else None
    if asha is None:
        return Schedule(own, batch, per_epoch, (own,), (own,), (own,), job.train.eval_steps or per_epoch)
    to_steps = {"samples": 1 / batch, "step": 1.0, "epoch": float(per_epoch)}[asha.time_attr]
    max_t = asha.max_t or max(1, round(own / to_steps))
    levels = [max_t]
    if asha.type == "asha":
        grace = asha.grace_period or rungs.default_grace_period(max_t, asha.reduction_factor)
        levels = rungs.rung_levels(min(grace, max_t), max_t, asha.reduction_factor)
    steps = tuple(max(1, math.ceil(level * to_steps - 1e-9)) for level in levels)
    at_rungs_alone = asha.type == "asha" and job.train.eval_steps is None
    every = None if at_rungs_alone else job.train.eval_steps or per_epoch
    return Schedule(steps[-1], batch, per_epoch, steps, steps, tuple(levels), every)
