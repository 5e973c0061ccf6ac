"""Describe the machines that a site offers.

The operator knows these facts and a job states requirements; jobs/sites/placement.py
brings both together. These classes are the input of planning. The models of site files
(slurm.py, kubernetes.py, ray.py) are converted to them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.text import format_count


class Node(Spec):
    """One machine of a site."""

    name: str
    """Name that its operator uses for it."""
    cpus: int = Field(ge=0)
    """Usable CPU cores; 0 on a head node that runs no trials."""
    memory_gib: float = Field(ge=0)
    """Memory, in GiB, that is free or can be freed."""
    gpus: int = Field(0, ge=0)
    """CUDA devices."""
    labels: dict[str, str] = {}
    """Ray labels of the node."""


class LocalSite(Spec):
    """The local machine.

    cluster/local_site.py creates it from the hardware that this process may use, which in a
    container is less than the machine has.
    """

    kind: Literal["local"] = "local"
    """Backend that runs the job."""
    cpus: int = Field(ge=1)
    """CPU cores that this process may use."""
    memory_gib: float = Field(gt=0)
    """Memory, in GiB, that is free or can be freed."""
    gpus: int = Field(0, ge=0)
    """CUDA devices."""
    gpu_memory_gib: float = Field(0.0, ge=0)
    """Memory of the smallest GPU, in GiB."""
    gpu_name: str = ""
    """Model of the first GPU."""
    without_gpu: str = ""
    """If there is no GPU: the messages of the driver and of torch, and what would help."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Return the one machine."""
        return (
            Node(name="this machine", cpus=self.cpus, memory_gib=self.memory_gib, gpus=self.gpus),
        )

    @property
    def display_name(self) -> str:
        """Return the name of the site in messages."""
        return "this machine"


class _MultiNodeSite(Spec):
    """Several machines on which Ray runs or will run."""

    nodes: tuple[Node, ...]
    """The machines."""
    gpu_memory_gib: float = Field(0.0, ge=0)
    """Memory of one GPU, in GiB; 0 if it is not known."""

    @property
    def gpus(self) -> int:
        """Return the number of CUDA devices of all machines."""
        return sum(node.gpus for node in self.nodes)


class RaySite(_MultiNodeSite):
    """A running Ray cluster of one or more machines.

    It is the cluster that RAY_ADDRESS or a Ray site file names. Only machines that answered
    are listed.
    """

    kind: Literal["ray"] = "ray"
    """Backend that runs the job."""
    address: str
    """Address of the Ray cluster, or `auto`."""

    @property
    def display_name(self) -> str:
        """Return the name of the site in messages."""
        return f"the Ray at {self.address}"


class Allocation(_MultiNodeSite):
    """Machines that a job gets from a cluster with a queue.

    The machines are identical; there may also be a head node that runs no trials.
    """

    kind: Literal["slurm", "kubernetes"] = "slurm"
    """Backend that runs the job."""
    cluster: str
    """Name of the site."""

    @property
    def display_name(self) -> str:
        """Return the name of the allocation in messages."""
        # A separate head node has no CPUs here, because it runs no trials.
        workers = sum(node.cpus > 0 for node in self.nodes)
        machines = format_count(workers, "node" if self.kind == "slurm" else "worker pod")
        return f"a job of {machines} on site {self.cluster}"


Site = LocalSite | RaySite | Allocation
