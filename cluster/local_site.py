"""The machines that a job runs on without a site file: this machine, or the Ray of RAY_ADDRESS."""

from __future__ import annotations

import os

from lorafleet.cluster.hardware import (
    count_cpus,
    explain_missing_gpu,
    find_gpus,
    get_free_memory_gib,
)
from lorafleet.jobs.errors import PlacementRefused
from lorafleet.jobs.sites.base import LocalSite, RaySite, Site
from lorafleet.jobs.text import format_count


def detect_site(nodes: int | None = None) -> Site:
    """Return the Ray cluster that RAY_ADDRESS names, or this machine, limited to `nodes` nodes.

    Raises:
        PlacementRefused: There are fewer nodes that take work.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        from lorafleet.cluster.ray.nodes import detect_ray_site

        return limit_nodes(detect_ray_site(address), nodes)
    if nodes and nodes > 1:
        raise PlacementRefused(
            f"--nodes is {nodes}, but this is a single machine: start Ray on each machine (`ray "
            "start`) and set RAY_ADDRESS"
        )
    return detect_local_site()


def limit_nodes(site: RaySite, nodes: int | None) -> RaySite:
    """Return a cluster with only its `nodes` largest machines.

    Trials then run in parallel only up to the capacity of these machines.

    Raises:
        PlacementRefused: The cluster has fewer machines that take work.
    """
    usable_nodes = [node for node in site.nodes if node.cpus]
    if nodes is None:
        return site
    if nodes > len(usable_nodes):
        raise PlacementRefused(
            f"--nodes is {nodes}, but {site.display_name} has only "
            f"{format_count(len(usable_nodes), 'machine')} that can run trials"
        )
    # Ray itself is not limited: only the number of parallel trials follows from these machines.
    largest = sorted(usable_nodes, key=lambda node: (node.gpus, node.cpus), reverse=True)[:nodes]
    return site.model_copy(update={"nodes": tuple(largest)})


def detect_local_site() -> LocalSite:
    """Return this machine as a site.

    Cores come from this process's affinity and cgroup, memory is what is free, GPUs come from
    the driver.
    """
    gpus = find_gpus()
    return LocalSite(
        cpus=count_cpus(),
        memory_gib=get_free_memory_gib(),
        gpus=gpus.count,
        gpu_memory_gib=gpus.memory_gib,
        gpu_name=gpus.name,
        without_gpu="" if gpus.count else explain_missing_gpu(gpus.driver),
    )
