"""Where trials go: one trial's needs and a machine's hardware -> bundles and how many run at once. Pure."""

from __future__ import annotations

import math

from pydantic import Field

from jobs.errors import PlacementRefused
from jobs.site import LocalSite
from jobs.spec import JobSpec, Spec
from jobs.support import Strategy


class Placement(Spec):
    """How trials are laid over the hardware."""

    workers: int = Field(ge=1)
    """Training processes of one trial."""
    cpus_per_worker: int = Field(ge=1)
    """CPU cores of each."""
    gpus_per_worker: int = Field(ge=0, le=1)
    """GPUs of each."""
    strategy: Strategy = "ddp"
    """How the processes of one trial share the work; `auto` has been resolved."""
    slots: int = Field(ge=1)
    """Trials at once."""
    waves: int = Field(ge=1)
    """Rounds that all trials would need if none stopped early."""
    limited_by: str
    """What set the number of slots."""

    @property
    def distributed(self) -> bool:
        """Whether a trial has several processes, and so runs in a Ray Train worker group and not in a warm actor."""
        return self.workers > 1


def place(job: JobSpec, site: LocalSite, trials: int, trial_memory_gib: float, strategy: Strategy = "ddp") -> Placement:
    """Slots and waves of `trials` trials, each of which takes `trial_memory_gib` of host memory.

    Raises PlacementRefused, in one sentence, when not even one trial fits.
    """
    wants = job.resources
    gpus = _gpus_per_worker(job, site)
    if wants.num_nodes > 1:
        raise PlacementRefused(f"resources.num_nodes is {wants.num_nodes}, but this is one machine")
    if job.search and job.search.budget.gpu_hours is not None and not gpus:
        raise PlacementRefused(
            "search.budget.gpu_hours counts GPUs, and this machine's trials use none; use search.budget.wall_hours"
        )
    workers = wants.workers_per_node
    needs = {"CPU cores": (workers * wants.cpus_per_worker, site.cpus), "GPUs": (workers * gpus, site.gpus)}
    fits = {}
    for what, (need, have) in needs.items():
        if need > have:
            raise PlacementRefused(f"each trial needs {need} {what} on one machine, and this one has {have}")
        if need:
            fits[what] = have // need
    if trial_memory_gib > site.memory_gib:
        raise PlacementRefused(
            f"each trial needs about {trial_memory_gib:.1f} GiB of memory, and {site.memory_gib:.1f} are free here"
        )
    fits["memory"] = max(1, math.floor(site.memory_gib / max(trial_memory_gib, 0.01)))
    fits["trials"] = trials
    if job.search and job.search.max_concurrent_trials:
        fits["max_concurrent_trials"] = job.search.max_concurrent_trials
    limit = min(fits, key=lambda what: fits[what])
    slots = max(1, fits[limit])
    return Placement(
        workers=workers,
        cpus_per_worker=wants.cpus_per_worker,
        gpus_per_worker=gpus,
        strategy=strategy,
        slots=slots,
        waves=math.ceil(trials / slots),
        limited_by=limit,
    )


def _gpus_per_worker(job: JobSpec, site: LocalSite) -> int:
    wants = job.resources
    if wants.device == "cpu":
        return 0
    asked = wants.gpus_per_node
    if asked == "auto":
        if wants.device == "cuda" and not site.gpus:
            raise PlacementRefused("resources.device is cuda, but this machine has no GPU that its driver shows")
        return 1 if site.gpus else 0
    if asked and not site.gpus:
        raise PlacementRefused(f"resources.gpus_per_node is {asked}, but this machine has no GPU that its driver shows")
    return 1 if asked else 0
