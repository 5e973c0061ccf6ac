"""Describe what of the requested machines a run would leave unused, and the remedy. Pure."""

from __future__ import annotations

import math

from lorafleet.jobs.runs.plan import MemoryEstimate
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.base import Allocation, LocalSite, Node, Site
from lorafleet.jobs.sites.placement import Placement, select_labelled_nodes
from lorafleet.jobs.text import format_count

_MAX_TRIALS_PER_GPU = 4
"""Largest number of trials for a GPU that is advised: its compute is shared, not only its memory.
"""
_SMALL_SHARE = 0.5
"""A trial below this share of a GPU's memory, or of a cluster's cores, leaves enough to say so."""


def describe_waste(
    job: JobSpec,
    site: Site,
    placement: Placement,
    trials: int,
    memory: MemoryEstimate | None,
    *,
    is_packed: bool = False,
    can_share: bool = True,
) -> list[str]:
    """Return one message for each kind of resource that stays unused while all slots are busy.

    Args:
        job: The job; in a comparison, that of the arm.
        site: The machines that the run gets.
        placement: The placement of the trials.
        trials: Number of trials.
        memory: Estimate of the largest trial.
        is_packed: True if several trials share a process, and so its GPU's memory.
        can_share: False in a comparison, whose trials may not share a GPU.
    """
    nodes = _select_nodes(site, placement)
    used_nodes = _count_used_nodes(nodes, placement)
    reason = _explain_limit(placement, trials)
    return [
        *_describe_idle_nodes(site, nodes, used_nodes, reason),
        *_describe_idle_gpus(job, nodes, used_nodes, placement, reason),
        *_describe_idle_cores(site, nodes, used_nodes, placement, reason),
        *(
            []
            if is_packed
            else _describe_idle_gpu_memory(job, site, placement, memory, can_share=can_share)
        ),
    ]


def _select_nodes(site: Site, placement: Placement) -> list[Node]:
    """Return the machines on which trials may run."""
    return [node for node in select_labelled_nodes(site.nodes, placement.labels) if node.cpus]


def _count_used_nodes(nodes: list[Node], placement: Placement) -> int:
    """Return on how many machines the slots lie if they are filled one after another."""
    per_node = max((placement.share.count_on(node) for node in nodes), default=1) or 1
    shares = placement.slots * placement.num_nodes
    return min(len(nodes), max(placement.num_nodes, math.ceil(shares / per_node)))


def _explain_limit(placement: Placement, trials: int) -> str:
    """Return why no more trials run in parallel, as a clause."""
    if placement.limited_by.startswith("trials"):
        return "there is only one trial" if trials == 1 else f"there are only {trials} trials"
    return f"the trials are limited by {placement.limited_by}"


def _describe_idle_nodes(site: Site, nodes: list[Node], used_nodes: int, reason: str) -> list[str]:
    idle = len(nodes) - used_nodes
    if idle <= 0:
        return []
    # Only a job of a queue chooses how many machines it gets.
    advice = f": request {used_nodes} with --nodes {used_nodes}"
    return [
        f"{idle} of {format_count(len(nodes), 'machine')} {_stay(idle)} idle, because {reason}"
        + (advice if isinstance(site, Allocation) else "")
    ]


def _stay(number: int) -> str:
    return "stays" if number == 1 else "stay"


_GPU_REMEDIES = {
    "CPU cores": "lower resources.cpus_per_worker, or request more cores per node",
    "memory": "request more memory per node, or use less of it per trial",
    "max_concurrent_trials": "raise search.max_concurrent_trials, or request fewer GPUs",
    "GPUs": "choose resources.workers_per_node so that it divides the GPUs of a node",
}
"""Remedy for idle GPUs, by what limits the number of trials."""


def _describe_idle_gpus(
    job: JobSpec, nodes: list[Node], used_nodes: int, placement: Placement, reason: str
) -> list[str]:
    available = sum(sorted((node.gpus for node in nodes), reverse=True)[:used_nodes])
    used = placement.used_gpus
    if used >= available:
        return []
    if not placement.gpus_per_worker:
        unused = "resources.device is cpu" if job.resources.device == "cpu" else "no trial uses one"
        return [f"none of the {format_count(available, 'GPU')} is used, because {unused}"]
    remedy = _GPU_REMEDIES.get(placement.limited_by, "request fewer GPUs")
    idle = available - used
    return [f"{idle} of {available} GPUs {_stay(idle)} idle, because {reason}: {remedy}"]


def _describe_idle_cores(
    site: Site, nodes: list[Node], used_nodes: int, placement: Placement, reason: str
) -> list[str]:
    if isinstance(site, LocalSite) or placement.gpus_per_worker:
        return []  # here, idle cores are given to the trials; beside GPUs they are cheap
    available = sum(sorted((node.cpus for node in nodes), reverse=True)[:used_nodes])
    used = placement.slots * placement.workers * placement.cpus_per_worker
    if used >= _SMALL_SHARE * available:
        return []
    idle = available - used
    return [
        f"{idle} of {available} CPU cores {_stay(idle)} idle, because {reason}: raise "
        "resources.cpus_per_worker, or request fewer cores"
    ]


def _describe_idle_gpu_memory(
    job: JobSpec,
    site: Site,
    placement: Placement,
    memory: MemoryEstimate | None,
    *,
    can_share: bool,
) -> list[str]:
    total = site.gpu_memory_gib / placement.trials_per_gpu
    if not placement.gpus_per_worker or memory is None or not total or not memory.required:
        return []
    if memory.required >= _SMALL_SHARE * total:
        return []
    train = job.train
    accumulation = train.compute_accumulation_steps(job.resources.world_size)
    remedies = ["a smaller GPU costs less"]
    fitting = min(_MAX_TRIALS_PER_GPU, math.floor(site.gpu_memory_gib / memory.required))
    is_waiting = placement.waves > 1 and placement.limited_by == "GPUs"
    if can_share and is_waiting and placement.workers == 1 and fitting > placement.trials_per_gpu:
        share = math.floor(100 / fitting) / 100
        remedies.insert(
            0,
            f"set resources.gpus_per_trial to {share:g}, so that {fitting} trials share each GPU",
        )
    if accumulation > 1:
        steps = (
            ""
            if train.global_batch_size
            else ", and lower train.gradient_accumulation_steps as much"
        )
        remedies.insert(
            0,
            "raise train.per_device_train_batch_size from "
            f"{train.per_device_train_batch_size} (a step has {accumulation} micro-batches){steps}",
        )
    return [
        f"a trial needs about {memory.required:.1f} GiB of a GPU's {total:.1f}: "
        + "; ".join(remedies)
    ]
