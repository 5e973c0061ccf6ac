"""Where trials go: one trial's needs and a site's machines -> bundles and how many run at once. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from lorafleet.jobs.errors import PlacementRefused
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.compatibility import Strategy
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.base import LocalSite, Node, Site
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.jobs.sites.slurm import SlurmSite
from lorafleet.jobs.text import counted
from pydantic import Field

_SHOWN = 8
"""Machines that a sentence names."""


class Share(NamedTuple):
    """What one trial takes."""

    nodes: int
    """So many different machines,"""
    cpus: int
    """CPU cores of each,"""
    gpus: int
    """and GPUs of each."""

    def of(self, node: Node) -> int:
        """How many such shares a machine holds."""
        return min(node.cpus // self.cpus, node.gpus // self.gpus if self.gpus else node.cpus // self.cpus)

    def __str__(self) -> str:
        each = _cores_and_gpus(self.cpus, self.gpus) if self.gpus else counted(self.cpus, "CPU core")
        return f"{self.nodes} nodes x {each}" if self.nodes > 1 else each


def nodes_of_job(site: SlurmSite | KubernetesSite, asked: int | None, one_trial: int) -> int:
    """Machines for trials in one job of a cluster: what `--nodes` says, else the site's, else what one trial needs.

    Raises PlacementRefused for fewer than a trial needs, and for more than the site's max_nodes.
    """
    nodes = asked or site.nodes or one_trial
    if nodes < one_trial:
        source = "--nodes" if asked else f"nodes of site {site.name}"
        raise PlacementRefused(f"{source} is {nodes}, and each trial needs {counted(one_trial, site.machine)}")
    if site.max_nodes and nodes > site.max_nodes:
        machines = counted(nodes, site.machine)
        raise PlacementRefused(f"the job would have {machines}, and max_nodes of site {site.name} is {site.max_nodes}")
    return nodes


class Placement(Spec):
    """How trials are laid over the hardware."""

    workers: int = Field(ge=1)
    """Training processes of one trial, on all its machines."""
    num_nodes: int = Field(1, ge=1)
    """Machines of one trial."""
    cpus_per_worker: int = Field(ge=1)
    """CPU cores of each process."""
    gpus_per_worker: int = Field(ge=0, le=1)
    """GPUs of each."""
    labels: dict[str, str] = {}
    """Ray labels that each of its machines has."""
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

    @property
    def spread(self) -> Literal["STRICT_PACK", "STRICT_SPREAD", "PACK"]:
        """How Ray lays out a trial's processes; all of them are placed, or none."""
        if self.num_nodes == 1:
            return "STRICT_PACK"
        return "STRICT_SPREAD" if self.workers == self.num_nodes else "PACK"

    @property
    def share(self) -> Share:
        """What one trial takes of each of its machines."""
        each = self.workers // self.num_nodes
        return Share(self.num_nodes, each * self.cpus_per_worker, each * self.gpus_per_worker)


def groups(nodes: Sequence[Node], share: Share) -> int:
    """How many trials can run at once when each has its share of `share.nodes` different machines.

    g trials fit when the machines, none used more than once by a trial, have g x nodes shares between them:
    sum(min(shares of a machine, g)) >= g x nodes.
    """
    held = [share.of(node) for node in nodes]
    possible = 0
    while sum(min(count, possible + 1) for count in held) >= (possible + 1) * share.nodes:
        possible += 1
    return possible


def place(job: JobSpec, site: Site, trials: int, trial_memory_gib: float, strategy: Strategy = "ddp") -> Placement:
    """Slots and waves of `trials` trials, each of which takes `trial_memory_gib` of host memory over all its machines.

    Raises PlacementRefused, in one sentence, when not even one trial fits.
    """
    wants = job.resources
    gpus = _gpus_per_worker(job, site)
    if job.search and job.search.budget.gpu_hours is not None and not gpus:
        raise PlacementRefused(
            f"search.budget.gpu_hours counts GPUs, and the trials on {site.called} use none; use "
            "search.budget.wall_hours"
        )
    per_node = wants.workers_per_node
    share = Share(wants.num_nodes, per_node * wants.cpus_per_worker, per_node * gpus)
    nodes = labelled(site.nodes, wants.label_selector)
    _check_one_fits(site, nodes, share, wants.label_selector)
    fits = {"CPU cores": groups(nodes, share._replace(gpus=0))}
    if share.gpus:
        fits["GPUs"] = groups(nodes, share)
    fits["memory"] = _memory_groups(nodes, site.called, wants.num_nodes, trial_memory_gib)
    fits["trials"] = trials
    if job.search and job.search.max_concurrent_trials:
        fits["max_concurrent_trials"] = job.search.max_concurrent_trials
    limit = min(fits, key=lambda what: fits[what])
    slots = max(1, fits[limit])
    return Placement(
        workers=wants.world_size,
        num_nodes=wants.num_nodes,
        cpus_per_worker=wants.cpus_per_worker,
        gpus_per_worker=gpus,
        labels=wants.label_selector,
        strategy=strategy,
        slots=slots,
        waves=math.ceil(trials / slots),
        limited_by=limit,
    )


def labelled(nodes: Sequence[Node], labels: Mapping[str, str]) -> list[Node]:
    """The machines that have all of the labels."""
    return [node for node in nodes if labels.items() <= node.labels.items()]


def _check_one_fits(site: Site, nodes: Sequence[Node], share: Share, labels: Mapping[str, str]) -> None:
    if groups(nodes, share):
        return
    if labels and not nodes:
        wanted = ", ".join(f"{name}={value}" for name, value in labels.items())
        raise PlacementRefused(f"resources.label_selector wants machines with {wanted}, and {site.called} has none")
    if share.nodes > len(site.nodes) and isinstance(site, LocalSite):
        raise PlacementRefused(
            f"each trial needs {share}, and this is one machine: start Ray on each (`ray start`) and name it in "
            "RAY_ADDRESS, or set resources.num_nodes to 1"
        )
    raise PlacementRefused(f"each trial needs {share}, and {site.called} has {_held(nodes)}")


def _held(nodes: Sequence[Node]) -> str:
    """`a: 8 CPU cores and 4 GPUs, b: ...`; a machine alone is not named."""
    shown = [_cores_and_gpus(node.cpus, node.gpus) for node in nodes[:_SHOWN]]
    if len(nodes) > 1:
        shown = [f"{node.name}: {has}" for node, has in zip(nodes, shown, strict=False)]
    more = [f"{len(nodes) - _SHOWN} more"] if len(nodes) > _SHOWN else []
    return ", ".join(shown + more) or "no machine"


def _cores_and_gpus(cpus: int, gpus: int) -> str:
    return f"{counted(cpus, 'CPU core')} and {counted(gpus, 'GPU')}"


def _memory_groups(nodes: Sequence[Node], site: str, num_nodes: int, trial_memory_gib: float) -> int:
    """How many trials the memory holds; raises PlacementRefused when not one."""
    each = max(trial_memory_gib / num_nodes, 0.01)
    largest = sorted((node.memory_gib for node in nodes if node.cpus), reverse=True)[:num_nodes]
    if each > largest[-1]:
        raise PlacementRefused(
            f"each trial needs about {each:.1f} GiB of memory on each machine, and {site} has {largest[-1]:.1f} free"
        )
    shares = [math.floor(node.memory_gib / each) for node in nodes if node.cpus]
    return max(1, sum(shares) // num_nodes)


def fitted(placement: Placement, nodes: Sequence[Node]) -> tuple[Placement, str | None]:
    """The placement on the machines that are really there, and what is to be said when fewer trials fit at once.

    Raises PlacementRefused when none does.
    """
    nodes = labelled(nodes, placement.labels)
    possible = groups(nodes, placement.share)
    if possible >= placement.slots:
        return placement, None
    here = f"each trial needs {placement.share}; the cluster has {counted(possible, 'such group')}"
    if not possible:
        raise PlacementRefused(f"{here} ({_held(nodes)})")
    waves = math.ceil(placement.waves * placement.slots / possible)
    fewer = placement.model_copy(update={"slots": possible, "waves": waves, "limited_by": "the cluster's machines"})
    return fewer, f"{here}; concurrency set to {possible}"


def _gpus_per_worker(job: JobSpec, site: Site) -> int:
    wants = job.resources
    if wants.device == "cpu":
        return 0
    asked = wants.gpus_per_node
    if site.gpus:
        return 1 if asked else 0
    why = f": {site.without_gpu}" if isinstance(site, LocalSite) and site.without_gpu else ""
    none = f"{site.called} has no GPU that can be used{why}"
    if asked not in ("auto", 0):
        raise PlacementRefused(f"resources.gpus_per_node is {asked}, but {none}")
    if wants.device == "cuda" and asked == "auto":
        raise PlacementRefused(f"resources.device is cuda, but {none}")
    return 0
