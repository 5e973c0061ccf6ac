"""What a place to run offers: the operator's facts, as opposed to the job's wishes."""

from __future__ import annotations

from typing import Literal

from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.text import counted
from pydantic import Field


class Node(Spec):
    """One machine of a site."""

    name: str
    """What its operator calls it."""
    cpus: int = Field(ge=0)
    """CPU cores that may be used; 0 on a head that takes no work."""
    memory_gib: float = Field(ge=0)
    """Memory, in GiB, that is free or can be freed."""
    gpus: int = Field(0, ge=0)
    """CUDA devices."""
    labels: dict[str, str] = {}
    """What Ray knows it by."""


class LocalSite(Spec):
    """This machine."""

    kind: Literal["local"] = "local"
    """Which backend runs it."""
    cpus: int = Field(ge=1)
    """CPU cores that this process may use."""
    memory_gib: float = Field(gt=0)
    """Memory, in GiB, that is free or can be freed."""
    gpus: int = Field(0, ge=0)
    """CUDA devices."""
    gpu_memory_gib: float = Field(0.0, ge=0)
    """Memory of the smallest of them, in GiB."""
    gpu_name: str = ""
    """Model of the first GPU."""
    without_gpu: str = ""
    """Where there is none: what the driver and torch say, and what would help."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The one machine."""
        return (Node(name="this machine", cpus=self.cpus, memory_gib=self.memory_gib, gpus=self.gpus),)

    @property
    def called(self) -> str:
        """What sentences call it."""
        return "this machine"


class _Machines(Spec):
    """Several machines that Ray is up on, or will be."""

    nodes: tuple[Node, ...]
    """The machines."""
    gpu_memory_gib: float = Field(0.0, ge=0)
    """Memory of a GPU, in GiB; 0 where it is not known."""

    @property
    def gpus(self) -> int:
        """CUDA devices of all machines."""
        return sum(node.gpus for node in self.nodes)


class RaySite(_Machines):
    """A Ray that is up already, on one machine or several: what RAY_ADDRESS names, as far as it answers."""

    kind: Literal["ray"] = "ray"
    """Which backend runs it."""
    address: str
    """Where it listens, or `auto`."""

    @property
    def called(self) -> str:
        """What sentences call it."""
        return f"the Ray at {self.address}"


class Allocation(_Machines):
    """What a job gets of a cluster with a queue: machines that are alike, and perhaps a head that takes no work."""

    kind: Literal["slurm", "kubernetes"] = "slurm"
    """Which backend runs it."""
    cluster: str
    """The site's name."""

    @property
    def called(self) -> str:
        """What sentences call it."""
        workers = sum(node.cpus > 0 for node in self.nodes)
        machines = counted(workers, "node" if self.kind == "slurm" else "worker pod")
        return f"a job of {machines} on site {self.cluster}"


Site = LocalSite | RaySite | Allocation
