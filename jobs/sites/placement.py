"""Compute how trials are placed on the machines of a site, and how many run at once.

All functions are pure. Planning computes a placement from what a site promises, and the
driver reduces it to the machines that came up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from lorafleet.jobs.errors import PlacementRefused
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.job import JobSpec, ResourcesSpec
from lorafleet.jobs.schema.types import Strategy
from lorafleet.jobs.sites.base import LocalSite, Node, Site
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.jobs.sites.slurm import SlurmSite
from lorafleet.jobs.text import format_count

_RAY_GPU_PARTS = 10_000
"""Ray counts GPUs in parts of this size."""
_MAX_NODES_SHOWN = 8
"""Maximum number of machines that a message lists."""


class Share(NamedTuple):
    """Resources of one trial."""

    nodes: int
    """Number of different machines."""
    cpus: int
    """CPU cores on each machine."""
    gpus: int
    """GPUs on each machine."""
    trials_per_gpu: int = 1
    """Trials that share a GPU."""

    def count_on(self, node: Node) -> int:
        """Return how many such shares fit on a machine.

        A machine without CPU cores, such as a head node, holds none, whatever GPUs it has.
        """
        by_cpus = node.cpus // self.cpus
        if not self.gpus:
            return by_cpus
        return min(by_cpus, node.gpus // self.gpus * self.trials_per_gpu)

    def __str__(self) -> str:
        each = format_count(self.cpus, "CPU core")
        if self.gpus:
            each += f" and {format_gpus(self.gpus, self.trials_per_gpu)}"
        return f"{self.nodes} nodes x {each}" if self.nodes > 1 else each


def choose_node_count(
    site: SlurmSite | KubernetesSite, requested: int | None, nodes_per_trial: int
) -> int:
    """Return the number of machines for one job on a cluster.

    It is `--nodes` if set, else the site's setting, else what one trial needs.

    Args:
        site: The site, whose `max_nodes` limits the number.
        requested: Value of `--nodes`; None if it is not set.
        nodes_per_trial: Machines that one trial spans.

    Raises:
        PlacementRefused: It is less than a trial needs, or more than the site's max_nodes.
    """
    nodes = requested or site.nodes or nodes_per_trial
    if nodes < nodes_per_trial:
        source = "--nodes" if requested else f"nodes of site {site.name}"
        raise PlacementRefused(
            f"{source} is {nodes}, but each trial needs "
            f"{format_count(nodes_per_trial, site.machine_noun)}"
        )
    if site.max_nodes and nodes > site.max_nodes:
        machines = format_count(nodes, site.machine_noun)
        raise PlacementRefused(
            f"the job would have {machines}, but max_nodes of site {site.name} is {site.max_nodes}"
        )
    return nodes


class Placement(Spec):
    """Assignment of trials to hardware.

    `compute_placement` creates it for the plan, plan.json stores it, and the driver adapts
    it with `fit_placement` to the machines that it finds.
    """

    workers: int = Field(ge=1)
    """Training processes of one trial, over all its machines."""
    num_nodes: int = Field(1, ge=1)
    """Machines of one trial."""
    cpus_per_worker: int = Field(ge=1)
    """CPU cores of each training process."""
    has_auto_cpus: bool = False
    """True if `cpus_per_worker` is a share of the cores, and may change with the machines."""
    gpus_per_worker: int = Field(ge=0, le=1)
    """GPUs of each training process; 1 if trials share a GPU."""
    trials_per_gpu: int = Field(1, ge=1)
    """Trials that share a GPU, each in a process of its own."""
    labels: dict[str, str] = {}
    """Ray labels that each machine of a trial must have."""
    strategy: Strategy = "ddp"
    """Strategy by which the processes of a trial share the work; `auto` is already resolved."""
    slots: int = Field(ge=1)
    """Number of trials that run at the same time."""
    waves: int = Field(ge=1)
    """Number of rounds of trials if none stops early."""
    pack: int = Field(1, ge=1)
    """Maximum number of trials that a process trains at once, on one base."""
    limited_by: str
    """Resource or setting that limits the number of slots."""

    @property
    def is_distributed(self) -> bool:
        """Return whether a trial has several processes.

        It then runs in a Ray Train worker group, not a warm actor.
        """
        return self.workers > 1

    @property
    def fits_one_process(self) -> bool:
        """Return whether only one training process runs at a time."""
        return self.workers == 1 and self.slots == 1

    @property
    def spread(self) -> Literal["STRICT_PACK", "STRICT_SPREAD", "PACK"]:
        """Return Ray's placement strategy for the processes of a trial.

        Ray places all of them or none. A trial of one machine stays together, and processes
        that are alone on their machines must be apart. PACK is used for several processes on
        each of several machines, each process pinned to its machine (see `needs_node_bundles`).
        """
        if self.num_nodes == 1:
            return "STRICT_PACK"
        return "PACK" if self.needs_node_bundles else "STRICT_SPREAD"

    @property
    def needs_node_bundles(self) -> bool:
        """Return whether the machines of a trial must be chosen before its processes are placed.

        True for several processes on each of several machines, for which Ray has no exact
        strategy.
        """
        return 1 < self.num_nodes < self.workers

    @property
    def share(self) -> Share:
        """Return the resources that one trial takes on each of its machines."""
        each = self.workers // self.num_nodes
        return Share(
            self.num_nodes,
            each * self.cpus_per_worker,
            each * self.gpus_per_worker,
            self.trials_per_gpu,
        )

    @property
    def gpus(self) -> float:
        """Return the GPUs of a trial, for cost."""
        return self.workers * self.gpus_per_worker / self.trials_per_gpu

    @property
    def ray_gpus(self) -> float:
        """Return the GPUs of a training process as Ray counts them, in ten-thousandths."""
        if self.trials_per_gpu == 1:
            return self.gpus_per_worker
        return math.floor(_RAY_GPU_PARTS / self.trials_per_gpu) / _RAY_GPU_PARTS

    @property
    def used_gpus(self) -> int:
        """Return the number of GPUs on which trials run if all slots are busy."""
        return math.ceil(self.slots / self.trials_per_gpu) * self.workers * self.gpus_per_worker


def format_gpus(gpus: int, trials_per_gpu: int) -> str:
    """Return the GPUs of a process: `1 GPU`, or `1/2 of a GPU` if trials share it."""
    if gpus and trials_per_gpu > 1:
        return f"1/{trials_per_gpu} of a GPU"
    return format_count(gpus, "GPU")


def count_concurrent_trials(nodes: Sequence[Node], share: Share) -> int:
    """Return how many trials can run at once, each on `share.nodes` different machines.

    g trials fit if the machines, each used at most once by a trial, have g x nodes shares
    between them: sum(min(shares of a machine, g)) >= g x nodes. This is enough: dealt out
    machine after machine to the g trials in turn, no trial gets two shares of one machine.
    """
    shares_per_node = [share.count_on(node) for node in nodes]
    possible = 0
    while (
        sum(min(count, possible + 1) for count in shares_per_node) >= (possible + 1) * share.nodes
    ):
        possible += 1
    return possible


def compute_placement(
    job: JobSpec, site: Site, trials: int, trial_memory_gib: float, strategy: Strategy = "ddp"
) -> Placement:
    """Return the placement of `trials` trials on a site.

    Args:
        job: The job; in a comparison, that of the arm.
        site: The machines that the run gets.
        trials: Number of trials.
        trial_memory_gib: Host memory of one trial over all its machines, in GiB.
        strategy: Resolved strategy of a trial's processes.

    Raises:
        PlacementRefused: Not even one trial fits.
    """
    resources = job.resources
    gpus = _resolve_gpus_per_worker(job, site)
    if job.search and job.search.budget.gpu_hours is not None and not gpus:
        raise PlacementRefused(
            f"search.budget.gpu_hours counts GPUs, but the trials on {site.display_name} use none; "
            "use search.budget.wall_hours"
        )
    per_node = resources.workers_per_node
    if resources.gpus_per_trial < 1 and not gpus:
        raise PlacementRefused(
            f"resources.gpus_per_trial is {resources.gpus_per_trial:g}, but {site.display_name} "
            "has no usable GPU"
        )
    share = Share(
        resources.num_nodes,
        per_node * resources.min_cpus_per_worker,
        per_node * gpus,
        resources.trials_per_gpu,
    )
    nodes = select_labelled_nodes(site.nodes, resources.label_selector)
    _check_trial_fits(site, nodes, share, resources.label_selector)
    # CPU cores are counted without the GPUs, so that `limited_by` names what is scarcest. Of equal
    # limits, the first is named.
    fits = {"CPU cores": count_concurrent_trials(nodes, share._replace(gpus=0))}
    if share.gpus:
        fits["GPUs"] = count_concurrent_trials(nodes, share)
    fits["memory"] = _count_trials_by_memory(
        nodes, site.display_name, resources.num_nodes, trial_memory_gib
    )
    fits["trials"] = trials
    if job.search and job.search.max_concurrent_trials:
        fits["max_concurrent_trials"] = job.search.max_concurrent_trials
    limit = min(fits, key=lambda name: fits[name])
    slots = max(1, fits[limit])
    return Placement(
        workers=resources.world_size,
        num_nodes=resources.num_nodes,
        cpus_per_worker=_choose_cpus(resources, site, nodes, share, slots),
        has_auto_cpus=resources.cpus_per_worker == "auto" and isinstance(site, LocalSite),
        gpus_per_worker=gpus,
        trials_per_gpu=resources.trials_per_gpu,
        labels=resources.label_selector,
        strategy=strategy,
        slots=slots,
        waves=math.ceil(trials / slots),
        limited_by=limit,
    )


def _choose_cpus(
    resources: ResourcesSpec, site: Site, nodes: Sequence[Node], share: Share, slots: int
) -> int:
    """Return the CPU cores of each training process.

    Of a cluster, no more is taken than needed: it may have other users, and its nodes fewer cores
    than they promise.

    Args:
        share: What a trial needs at least.
        slots: Trials that run at once.
    """
    if resources.cpus_per_worker != "auto" or not isinstance(site, LocalSite):
        return resources.min_cpus_per_worker
    return _divide_cpus(nodes, share, resources.workers_per_node, slots)


def _divide_cpus(nodes: Sequence[Node], share: Share, workers_per_node: int, slots: int) -> int:
    """Return the largest number of cores of a process with which `slots` trials still fit."""
    largest = max(node.cpus for node in nodes) // workers_per_node
    fits = (
        cpus
        for cpus in range(largest, 1, -1)
        if count_concurrent_trials(nodes, share._replace(cpus=workers_per_node * cpus)) >= slots
    )
    return next(fits, 1)


def select_labelled_nodes(nodes: Sequence[Node], labels: Mapping[str, str]) -> list[Node]:
    """Return the machines that have all of the labels."""
    return [node for node in nodes if labels.items() <= node.labels.items()]


def _check_trial_fits(
    site: Site, nodes: Sequence[Node], share: Share, labels: Mapping[str, str]
) -> None:
    """Raise PlacementRefused with the most helpful reason if no trial fits."""
    if count_concurrent_trials(nodes, share):
        return
    if labels and not nodes:
        label_list = ", ".join(f"{name}={value}" for name, value in labels.items())
        raise PlacementRefused(
            f"resources.label_selector requires machines with {label_list}, but "
            f"{site.display_name} has none"
        )
    if share.nodes > len(site.nodes) and isinstance(site, LocalSite):
        raise PlacementRefused(
            f"each trial needs {share}, but this is a single machine: start Ray on each machine "
            "(`ray start`) and set RAY_ADDRESS, or set resources.num_nodes to 1"
        )
    raise PlacementRefused(
        f"each trial needs {share}, but {site.display_name} has {_describe_nodes(nodes)}"
    )


def _describe_nodes(nodes: Sequence[Node]) -> str:
    """Return `a: 8 CPU cores and 4 GPUs, b: ...`. A single machine is listed without its name."""
    entries = [_format_cores_and_gpus(node.cpus, node.gpus) for node in nodes[:_MAX_NODES_SHOWN]]
    if len(nodes) > 1:
        entries = [
            f"{node.name}: {resources}" for node, resources in zip(nodes, entries, strict=False)
        ]
    more = [f"{len(nodes) - _MAX_NODES_SHOWN} more"] if len(nodes) > _MAX_NODES_SHOWN else []
    return ", ".join(entries + more) or "no machine"


def _format_cores_and_gpus(cpus: int, gpus: int) -> str:
    return f"{format_count(cpus, 'CPU core')} and {format_count(gpus, 'GPU')}"


def _count_trials_by_memory(
    nodes: Sequence[Node], site: str, num_nodes: int, trial_memory_gib: float
) -> int:
    """Return how many trials fit into the memory. Raises PlacementRefused if none does."""
    # Never 0: it is a divisor below.
    memory_per_node = max(trial_memory_gib / num_nodes, 0.01)
    # A trial needs num_nodes machines, so the last of the largest ones decides whether any trial
    # fits.
    largest = sorted((node.memory_gib for node in nodes if node.cpus), reverse=True)[:num_nodes]
    if memory_per_node > largest[-1]:
        raise PlacementRefused(
            f"each trial needs about {memory_per_node:.1f} GiB of memory on each machine, but "
            f"{site} has only {largest[-1]:.1f} free"
        )
    shares = [math.floor(node.memory_gib / memory_per_node) for node in nodes if node.cpus]
    return max(1, sum(shares) // num_nodes)


def fit_placement(placement: Placement, nodes: Sequence[Node]) -> tuple[Placement, str | None]:
    """Return the placement on the available machines, and a message if fewer trials fit.

    The driver calls it once its Ray cluster is up: machines may be missing or smaller than
    planned. The number of slots never grows, because memory or the job may limit it.

    Args:
        placement: The planned placement.
        nodes: The machines that are up.

    Returns:
        The placement with fewer slots and more waves, and a message; or the unchanged
            placement and None.

    Raises:
        PlacementRefused: No trial fits.
    """
    nodes = select_labelled_nodes(nodes, placement.labels)
    need = placement.share
    possible = count_concurrent_trials(nodes, need)
    if possible < placement.slots and placement.has_auto_cpus:
        workers_per_node = placement.workers // placement.num_nodes
        need = need._replace(cpus=workers_per_node)
        possible = count_concurrent_trials(nodes, need)
        slots = max(1, min(possible, placement.slots))
        cpus = _divide_cpus(nodes, need, workers_per_node, slots) if possible else 1
        placement = placement.model_copy(update={"cpus_per_worker": cpus})
    if possible >= placement.slots:
        return placement, None
    summary = (
        f"each trial needs {need}; the cluster has room for {format_count(possible, 'such group')}"
    )
    if not possible:
        raise PlacementRefused(f"{summary} ({_describe_nodes(nodes)})")
    waves = math.ceil(placement.waves * placement.slots / possible)
    reduced = placement.model_copy(
        update={"slots": possible, "waves": waves, "limited_by": "the cluster's machines"}
    )
    return reduced, f"{summary}; running {possible} in parallel"


def _resolve_gpus_per_worker(job: JobSpec, site: Site) -> int:
    """Return the number of GPUs of each training process: 1 or 0, also where trials share one.

    Raises:
        PlacementRefused: The job requires GPUs and the site has none.
    """
    resources = job.resources
    if resources.device == "cpu":
        return 0
    requested = resources.gpus_per_node
    if site.gpus:
        return 1 if requested else 0
    reason = f": {site.without_gpu}" if isinstance(site, LocalSite) and site.without_gpu else ""
    problem = f"{site.display_name} has no usable GPU{reason}"
    if requested not in ("auto", 0):
        raise PlacementRefused(f"resources.gpus_per_node is {requested}, but {problem}")
    if resources.device == "cuda" and requested == "auto":
        raise PlacementRefused(f"resources.device is cuda, but {problem}")
    return 0
