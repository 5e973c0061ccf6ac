"""Describe what of the requested machines a run would leave unused, and the remedy. Pure."""

from __future__ import annotations

import math

from lorafleet.jobs.runs.plan import MemoryEstimate
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.base import LocalSite, Site
from lorafleet.jobs.sites.placement import Placement, select_labelled_nodes
from lorafleet.jobs.text import format_count

_SMALL_SHARE = 0.5
"""A trial below this share of a GPU's memory, or of a cluster's cores, leaves enough to say so."""


def describe_waste(
    job: JobSpec, site: Site, placement: Placement, trials: int, memory: MemoryEstimate | None
) -> list[str]:
    """Return one message for each kind of resource that stays unused while all slots are busy.

    Args:
        job: The job; in a comparison, that of the arm.
        site: The machines that the run gets.
        placement: The placement of the trials.
        trials: Number of trials.
        memory: Estimate of the largest trial.
    """
    return [
        *_describe_idle_nodes(site, placement, trials),
        *_describe_idle_gpus(job, site, placement),
        *_describe_idle_cores(site, placement),
        *_describe_idle_gpu_memory(job, site, placement, memory),
    ]


def _count_used_nodes(site: Site, placement: Placement) -> int:
    """Return on how many machines the slots lie if they are filled one after another."""
    workers = [node for node in site.nodes if node.cpus]
    per_node = max((placement.share.count_on(node) for node in workers), default=1) or 1
    shares = placement.slots * placement.num_nodes
    return min(len(workers), max(placement.num_nodes, math.ceil(shares / per_node)))


def _describe_idle_nodes(site: Site, placement: Placement, trials: int) -> list[str]:
    workers = [node for node in site.nodes if node.cpus]
    used = _count_used_nodes(site, placement)
    if len(workers) <= used:
        return []
    idle = len(workers) - used
    advice = "" if isinstance(site, LocalSite) else f": request {used} with --nodes {used}"
    reason = (
        (f"all {trials} trials fit" if trials > 1 else "the only trial fits") + " on the others"
        if placement.limited_by == "trials"
        else f"the trials are limited by {placement.limited_by}"
    )
    return [f"{idle} of {len(workers)} machines stay idle, because {reason}{advice}"]


_GPU_REMEDIES = {
    "CPU cores": "lower resources.cpus_per_worker, or request more cores per node",
    "memory": "request more memory per node, or use less of it per trial",
    "trials": "request fewer GPUs, or search more trials",
    "max_concurrent_trials": "raise search.max_concurrent_trials, or request fewer GPUs",
    "GPUs": "choose resources.workers_per_node so that it divides the GPUs of a node",
}
"""Remedy for idle GPUs, by what limits the number of trials."""


def _describe_idle_gpus(job: JobSpec, site: Site, placement: Placement) -> list[str]:
    used_nodes = _count_used_nodes(site, placement)
    nodes = [node for node in select_labelled_nodes(site.nodes, placement.labels) if node.cpus]
    available = sum(sorted((node.gpus for node in nodes), reverse=True)[:used_nodes])
    used = placement.slots * placement.workers * placement.gpus_per_worker
    if not available or used >= available:
        return []
    if not placement.gpus_per_worker:
        reason = "resources.device is cpu" if job.resources.device == "cpu" else "no trial uses one"
        return [f"none of the {format_count(available, 'GPU')} is used, because {reason}"]
    return [
        f"{available - used} of {available} GPUs stay idle, because the trials are limited by "
        f"{placement.limited_by}: {_GPU_REMEDIES.get(placement.limited_by, 'request fewer GPUs')}"
    ]


def _describe_idle_cores(site: Site, placement: Placement) -> list[str]:
    if isinstance(site, LocalSite) or placement.gpus_per_worker:
        return []  # here, idle cores are given to the trials; beside GPUs they are cheap
    used_nodes = _count_used_nodes(site, placement)
    available = sum(sorted((node.cpus for node in site.nodes), reverse=True)[:used_nodes])
    used = placement.slots * placement.workers * placement.cpus_per_worker
    if used >= _SMALL_SHARE * available:
        return []
    return [
        f"{available - used} of {available} CPU cores stay idle, because the trials are limited by "
        f"{placement.limited_by}: raise resources.cpus_per_worker, or request fewer cores"
    ]


def _describe_idle_gpu_memory(
    job: JobSpec, site: Site, placement: Placement, memory: MemoryEstimate | None
) -> list[str]:
    total = site.gpu_memory_gib
    if not placement.gpus_per_worker or memory is None or not total:
        return []
    if memory.required >= _SMALL_SHARE * total:
        return []
    batch = job.train.per_device_train_batch_size
    accumulation = job.train.compute_accumulation_steps(job.resources.world_size)
    remedies = ["a smaller GPU costs less"]
    if accumulation > 1:
        remedies.insert(
            0,
            f"raise train.per_device_train_batch_size from {batch} (a step has {accumulation} "
            "micro-batches)",
        )
    return [
        f"a trial needs about {memory.required:.1f} GiB of a GPU's {total:.1f}: "
        + "; ".join(remedies)
    ]
