"""What the operator of a Slurm cluster knows and a job does not say: partition, nodes, set-up lines, folders."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from lorafleet.jobs.errors import Problem, SpecProblems
from lorafleet.jobs.schema.base import Spec, Texts
from lorafleet.jobs.schema.environment import checked_environment
from lorafleet.jobs.sites.base import Allocation, Node
from pydantic import Field, field_validator, model_validator

_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}(?::\d{2}){0,2}|\d+)")
_OURS = ("--nodes", "--ntasks", "--cpus-per-task", "--gpus", "--gres", "--mem", "--time", "--output", "--error",
         "--signal", "--requeue", "--no-requeue", "--job-name", "--export", "--partition", "--account", "--qos",
         "--constraint", "--open-mode", "--array", "--dependency")  # fmt: skip
Word = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\s\x00-\x1f\x7f]+$")]
"""One word of a command line: no spaces, no control characters."""
Line = Annotated[str, Field(min_length=1, max_length=4000, pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]+$")]
"""One line of a script: no line break, no control character but a tab."""
Folder = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[/~$][^\x00-\x1f\x7f]*$")]
"""An absolute path; it may begin with ~ or a variable that the node has, such as $SCRATCH."""


class NodeType(Spec):
    """Machines that are alike, where a partition has several kinds."""

    cpus_per_node: int = Field(ge=1, le=4096)
    """CPU cores that a job may have on each."""
    memory_gb_per_node: float = Field(gt=0)
    """Memory that a job may have on each, in GB."""
    gpus_per_node: int = Field(0, ge=0, le=64)
    """GPUs on each."""
    gpu_memory_gb: float = Field(0.0, ge=0)
    """Memory of one of its GPUs, in GB; 0 where it is not known."""


class Container(Spec):
    """The container that every process of a job runs in."""

    kind: Literal["apptainer", "pyxis"]
    """What starts it: `apptainer exec`, or srun's own --container-image (pyxis)."""
    image: Word
    """The image: a .sif file, or what enroot understands."""
    mounts: Texts = ()
    """Folders to mount, as OUTSIDE:INSIDE."""


class RequeueSpec(Spec):
    """How a job outlives its time limit and preemption."""

    policy: Literal["requeue", "chain", "none"] = "requeue"
    """`requeue`: the job puts itself back into the queue. `chain`: a successor waits for its end (`afterany`), for
    clusters that do not requeue. `none`: it ends, and `lorafleet resume` goes on."""
    max_restarts: int = Field(3, ge=0, le=1000)
    """Restarts in a row that bring no new checkpoint, after which the job gives up."""
    max_walltime_chain: int = Field(4, ge=1, le=1000)
    """Jobs of one run at most, the first among them."""
    signal_seconds: int = Field(120, ge=30, le=3600)
    """Seconds before the time limit at which trials are asked to save (Slurm may be up to a minute early)."""


class HeadNode(Spec):
    """A small machine without GPUs for Ray's head and the driver, as the first part of a heterogeneous job."""

    partition: Word | None = None
    """Its partition; left out: the site's."""
    constraint: Word | None = None
    """Features that it must have."""
    cpus: int = Field(4, ge=1, le=4096)
    """CPU cores; no trial runs on them."""
    memory_gb: float = Field(16.0, gt=0)
    """Memory, in GB."""


class ArraySpec(Spec):
    """One array task a group of trials, in the place of one Ray over the whole allocation."""

    trials_per_task: int = Field(1, ge=1, le=10_000)
    """Trials that one task trains, on one node."""
    max_running: int | None = Field(None, ge=1, le=10_000)
    """Tasks that run at once (Slurm's `%`); left out: as many as the scheduler lets."""


class SlurmSite(Spec):
    """A Slurm cluster, as one group of users meets it."""

    kind: Literal["slurm"] = "slurm"
    """Which backend runs it."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$")
    """What sentences call it; the file's name where it is left out."""
    partition: Word | None = None
    """Partition (queue); left out: the cluster's default."""
    account: Word | None = None
    """Account that is charged."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Features that nodes must have, in Slurm's words (`a100&ib`)."""
    gpu_request: Literal["gpus-per-node", "gres", "gpus"] = "gpus-per-node"
    """How this cluster wants GPUs to be asked for; two ways at once are refused by some and misread by others."""
    gpu_type: Word | None = None
    """Kind of GPU in the request (`a100`), where the cluster tells them apart."""
    cpus_per_node: int = Field(ge=1, le=4096)
    """CPU cores that a job has on each node."""
    memory_gb_per_node: float = Field(gt=0)
    """Memory that a job has on each node, in GB."""
    gpus_per_node: int = Field(0, ge=0, le=64)
    """GPUs that a job has on each node; 0 for CPU nodes."""
    gpu_memory_gb: float = Field(0.0, ge=0)
    """Memory of one GPU, in GB; 0 where it is not known, and nothing is said to fit or not."""
    node_types: dict[str, NodeType] = {}
    """Kinds of nodes by name, where they differ: what fits is judged by the smallest."""
    head: HeadNode | None = None
    """A machine of its own for the head and the driver (a heterogeneous job); left out: they share the first node."""
    launch: Literal["ray", "array"] = "ray"
    """`ray`: one Ray over one allocation. `array`: many small trials that know nothing of each other (grid or random
    search with scheduler: none), a group of them to a task of a job array."""
    array: ArraySpec = ArraySpec()
    """How an array is cut up."""
    nodes: int | None = Field(None, ge=1, le=10_000)
    """Nodes of one allocation; left out: what one trial needs."""
    max_nodes: int | None = Field(None, ge=1, le=10_000)
    """Most nodes that one allocation may have."""
    time_limit: str = "1:00:00"
    """Time limit of a job, in Slurm's form: MINUTES, H:MM:SS or D-HH:MM:SS."""
    requeue: RequeueSpec = RequeueSpec()
    """What happens at its end."""
    setup: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """Lines of bash that make lorafleet's environment on a node (modules, conda, a venv). They are code: the file that
    they come from is printed."""
    environment: dict[str, str] = {}
    """Variables for every process. Names that may hold a secret are refused: they would stand in the script."""
    share: Literal["none", "group"] = "none"
    """Who may read new run folders beside their owner: `group`, that of the folder above. They hold held-out texts."""
    allow_environment: Texts = ()
    """Variables that a job's `environment` may set though they change which code runs, such as TRITON_CACHE_DIR."""
    container: Container | None = None
    """The container to run in, if any."""
    network_interface: Word | None = None
    """Interface between nodes for NCCL and gloo (`ib0`); left out: theirs to find."""
    scratch_dir: Folder | None = None
    """Fast folder on each node's own disk ($TMPDIR, /local); left out: /tmp."""
    runs_dir: Folder | None = None
    """Folder of the runs, which all nodes and the login node see; left out: what --runs says."""
    cache_dir: Folder | None = None
    """Folder of fetched models and data, which all nodes see; left out: LORAFLEET_CACHE's."""
    template: str | None = None
    """A batch script of your own in the place of ours (jinja2; `lorafleet plan --on` shows what it makes)."""
    extra_sbatch: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """Further #SBATCH options, such as `--mail-type=FAIL`."""

    @property
    def called(self) -> str:
        """What sentences call it."""
        return f"site {self.name}"

    @property
    def machine(self) -> str:
        """What sentences call one of its machines."""
        return "node"

    @property
    def smallest(self) -> NodeType:
        """What every node has at least."""
        own = {
            "cpus_per_node": self.cpus_per_node,
            "memory_gb_per_node": self.memory_gb_per_node,
            "gpus_per_node": self.gpus_per_node,
            "gpu_memory_gb": self.gpu_memory_gb,
        }
        kinds = [NodeType.model_validate(own), *self.node_types.values()]
        known = [kind.gpu_memory_gb for kind in kinds if kind.gpu_memory_gb]
        return NodeType(
            cpus_per_node=min(kind.cpus_per_node for kind in kinds),
            memory_gb_per_node=min(kind.memory_gb_per_node for kind in kinds),
            gpus_per_node=min(kind.gpus_per_node for kind in kinds),
            gpu_memory_gb=min(known, default=0.0),
        )

    def allocation(self, nodes: int) -> Allocation:
        """A job of so many nodes, as placement sees it."""
        least = self.smallest
        memory = least.memory_gb_per_node * 1e9 / 2**30
        machines = [
            Node(name=f"node {number}", cpus=least.cpus_per_node, memory_gib=memory, gpus=least.gpus_per_node)
            for number in range(1, nodes + 1)
        ]
        if self.head:
            machines.insert(0, Node(name="head", cpus=0, memory_gib=self.head.memory_gb * 1e9 / 2**30))
        gpu_memory = least.gpu_memory_gb * 1e9 / 2**30
        return Allocation(cluster=self.name, nodes=tuple(machines), gpu_memory_gib=gpu_memory)

    @property
    def time_limit_seconds(self) -> int:
        """The time limit in seconds."""
        return slurm_seconds(self.time_limit)

    @field_validator("time_limit")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        slurm_seconds(value)
        return value

    @field_validator("environment")
    @classmethod
    def _holds_no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        return checked_environment(value)

    @field_validator("extra_sbatch")
    @classmethod
    def _leaves_ours_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for line in value:
            option = re.split(r"[=\s]", line.strip(), maxsplit=1)[0]
            if not option.startswith("-"):
                raise ValueError(f"{line!r} is no option of sbatch: it must begin with a dash")
            if not option.startswith("--"):
                raise ValueError(
                    f"{option} is a short form: write the long one, so that a reader knows what it asks for"
                )
            begins = len(option) > 3 and any(ours.startswith(option) for ours in _OURS)
            if begins or any(option == ours or option.startswith(f"{ours}-") for ours in _OURS):
                raise ValueError(f"{option} is set from other fields of the site, and must not stand here as well")
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> SlurmSite:
        problems = []
        if self.nodes and self.max_nodes and self.nodes > self.max_nodes:
            sentence = f"nodes is {self.nodes}, but must not be above max_nodes = {self.max_nodes}"
            problems.append(Problem("nodes", sentence))
        if self.launch == "array" and (self.head or (self.nodes or 1) > 1):
            sentence = "launch is array, whose tasks have one node each: leave out head and nodes"
            problems.append(Problem("launch", sentence))
        if self.launch == "array" and self.requeue.policy == "chain":
            sentence = "launch is array, whose tasks do not chain: requeue.policy must be requeue or none"
            problems.append(Problem("requeue.policy", sentence))
        if self.gpu_type and not self.gpus_per_node:
            problems.append(Problem("gpu_type", f"gpu_type is {self.gpu_type}, but gpus_per_node is 0"))
        if self.requeue.signal_seconds >= self.time_limit_seconds:
            sentence = (
                f"requeue.signal_seconds is {self.requeue.signal_seconds}, but must be below the time limit of "
                f"{self.time_limit} ({self.time_limit_seconds} s)"
            )
            problems.append(Problem("requeue.signal_seconds", sentence))
        if problems:
            raise SpecProblems(problems)
        return self


def slurm_seconds(text: str) -> int:
    """Seconds of a time in Slurm's forms: M, M:SS, H:MM:SS, D-H, D-HH:MM, D-HH:MM:SS. Raises ValueError.

    UNLIMITED is refused: such a job pends before every maintenance.
    """
    found = _TIME.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is no time; must be MINUTES, H:MM:SS or D-HH:MM:SS, such as 2-00:00:00")
    days, parts = found[1], [int(part) for part in found[2].split(":")]
    if days is not None:  # D-H, D-H:M, D-H:M:S
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        total = int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    elif len(parts) == 3:
        total = parts[0] * 3600 + parts[1] * 60 + parts[2]
    else:  # M, M:S
        total = parts[0] * 60 + (parts[1] if len(parts) > 1 else 0)
    if not total:
        raise ValueError(f"{text!r} is no time at all; a job must have a limit above 0")
    return total
