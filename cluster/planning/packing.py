"""Plan how many trials a sweep trains at once in a process. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorafleet.cluster.planning.earlier_runs import EarlierTrial, find_pack
from lorafleet.jobs.runs.plan import MemoryEstimate, PackingPlan
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.base import Site
from lorafleet.jobs.sites.placement import Placement, select_labelled_nodes
from lorafleet.jobs.trials.packing import (
    MAX_AUTO_TRIALS,
    build_pack_key,
    describe_full_cpu,
    find_max_rank,
    find_packing_refusal,
)

_SHARED = ("base weights", "runtime")
"""Components of a trial's memory that the trials of a pack share."""


def plan_packing(
    job: JobSpec,
    trials: list[JobSpec],
    total: int,
    site: Site,
    placement: Placement,
    memory: MemoryEstimate | None,
    tokens: int | None,
    earlier: Sequence[EarlierTrial] = (),
) -> PackingPlan:
    """Return how many trials of a search are trained at once in a process.

    Args:
        job: The job of the search.
        trials: The jobs of the trials that are known in advance.
        total: Number of trials.
        placement: Placement of the trials if they are not packed.
        memory: Estimate of the largest trial.
        tokens: Tokens of a micro-batch of one trial, without padding; None if unknown.
        earlier: What trials of this base model measured on this site.
    """
    pack = job.resources.pack
    processes, cpus = _count_processes(site, placement)
    refusal = _find_refusal(job, trials, total, placement)
    is_measured = pack == "auto"
    if refusal is None and is_measured and not placement.gpus_per_worker:
        refusal = describe_full_cpu(tokens)
    if refusal is not None:
        return PackingPlan(reason=refusal, tokens=tokens)
    limits = {
        "trials": math.ceil(total / processes),
        "resources.pack": MAX_AUTO_TRIALS if is_measured else int(pack),
    }
    if job.search and job.search.max_concurrent_trials:
        limits["search.max_concurrent_trials"] = job.search.max_concurrent_trials // processes
    available = _get_memory_gib(site, placement)
    if memory is not None and available:
        limits["memory"] = _count_fitting(memory, available)
    limit = min(limits, key=lambda name: limits[name])
    count = limits[limit]
    if count < 2:
        return PackingPlan(reason=_explain_single(limit, total, processes), tokens=tokens)
    return PackingPlan(
        trials=count,
        processes=processes,
        reason=f"limited by {limit}",
        is_measured=is_measured,
        max_rank=max(find_max_rank(job), *(trial.lora.lora_r for trial in trials)),
        tokens=tokens,
        memory_gib=None if memory is None else round(compute_pack_gib(memory, count), 2),
        unpacked=placement,
        cpus_per_process=cpus,
        earlier=find_pack(earlier, trials, cuda=bool(placement.gpus_per_worker), cpus=cpus),
    )


def _explain_single(limit: str, total: int, processes: int) -> str:
    """Return why no process would train two trials at once."""
    if limit != "trials":
        return f"two trials at once do not fit: limited by {limit}"
    return f"there are {total} trials for {processes} processes"


def _count_processes(site: Site, placement: Placement) -> tuple[int, int]:
    """Return how many processes would train packs, and the CPU cores of each.

    On GPUs it is one process for each GPU. On CPUs it is one for each machine, with the cores of
    all trials that would otherwise run there.
    """
    if placement.gpus_per_worker:
        return placement.slots, placement.cpus_per_worker
    nodes = select_labelled_nodes(site.nodes, placement.labels)
    trials_per_node = sorted((placement.share.count_on(node) for node in nodes), reverse=True)
    used, cores = 1, 0
    for number, trials in enumerate(trials_per_node, start=1):
        # All processes have as many cores, so the smallest machine decides.
        each = min(trials, math.ceil(placement.slots / number))
        if number * each > used * cores:
            used, cores = number, each
    return used, cores * placement.cpus_per_worker


def build_packed_placement(packing: PackingPlan, total: int) -> Placement:
    """Return the placement of the processes that train packs.

    Args:
        packing: A plan with several trials at once.
        total: Number of trials.
    """
    unpacked = packing.unpacked
    assert unpacked is not None
    return unpacked.model_copy(
        update={
            "slots": packing.processes,
            "cpus_per_worker": packing.cpus_per_process,
            "pack": packing.trials,
            "waves": math.ceil(total / (packing.trials * packing.processes)),
            "limited_by": packing.reason.removeprefix("limited by "),
        }
    )


def _find_refusal(
    job: JobSpec, trials: list[JobSpec], total: int, placement: Placement
) -> str | None:
    """Return why the trials of a search are not packed, whatever their size, or None."""
    if job.resources.pack in ("off", 1):
        return f"resources.pack is {job.resources.pack}"
    if total < 2:
        return "there is only one trial"
    if placement.trials_per_gpu > 1:
        return f"{placement.trials_per_gpu} processes share a GPU (resources.gpus_per_trial)"
    refusals = [find_packing_refusal(trial) for trial in trials]
    if all(refusals):
        return refusals[0]
    if job.evaluate.folds:
        return "the trials of a cross-validation have different rows"
    if len({build_pack_key(trial) for trial in trials}) > 1:
        return "the trials differ in more than a pack can: method, layers, number formats or folds"
    # On a CPU, such a trial would keep all cores to itself.
    if any(refusals) and placement.slots > 1 and not placement.gpus_per_worker:
        return f"some trials cannot be packed: {next(filter(None, refusals))}"
    return None


def _get_memory_gib(site: Site, placement: Placement) -> float:
    """Return the memory of a process that packs, in GiB; 0 if it is unknown."""
    if placement.gpus_per_worker:
        return site.gpu_memory_gib
    nodes = select_labelled_nodes(site.nodes, placement.labels)
    return min((node.memory_gib for node in nodes if node.cpus), default=0.0)


def compute_pack_gib(memory: MemoryEstimate, trials: int) -> float:
    """Return the expected memory of a process that trains several trials at once, in GiB.

    Weights and libraries are there once; adapters, optimiser states and activations are those of
    all trials.

    Args:
        memory: Estimate of one trial.
    """
    shared = sum(memory.components.get(name, 0.0) for name in _SHARED)
    return shared + trials * max(0.0, memory.required - shared)


def _count_fitting(memory: MemoryEstimate, available_gib: float) -> int:
    """Return how many trials at once fit into the memory of one process."""
    one, two = compute_pack_gib(memory, 1), compute_pack_gib(memory, 2)
    each = max(two - one, 1e-3)
    return max(1, math.floor((available_gib - (one - each)) / each))
