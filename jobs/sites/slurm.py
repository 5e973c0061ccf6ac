"""Define a Slurm site: what its operator knows and a job does not state.

For example partition, nodes, set-up lines and folders. The values become words of a
batch script, so the types below exclude control characters; slurm/render.py quotes
them. The docstrings of classes and fields are documentation for users:
docs/site-file.md is generated from them.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lorafleet.jobs.errors import Problem, SpecProblems
from lorafleet.jobs.schema.base import Spec, Texts
from lorafleet.jobs.schema.environment import validate_environment
from lorafleet.jobs.sites.base import Allocation, Node

_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}(?::\d{2}){0,2}|\d+)")
# Options that slurm/render.py writes itself, and those that would contradict them.
_RESERVED_OPTIONS = (
    "--nodes",
    "--ntasks",
    "--cpus-per-task",
    "--gpus",
    "--gres",
    "--mem",
    "--time",
    "--output",
    "--error",
    "--signal",
    "--requeue",
    "--no-requeue",
    "--job-name",
    "--export",
    "--partition",
    "--account",
    "--qos",
    "--constraint",
    "--open-mode",
    "--array",
    "--dependency",
)
Word = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\s\x00-\x1f\x7f]+$")]
"""One word of a command line: no spaces and no control characters."""
Line = Annotated[str, Field(min_length=1, max_length=4000, pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]+$")]
"""One line of a script: no line break, and no control character except a tab."""
Folder = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[/~$][^\x00-\x1f\x7f]*$")]
"""An absolute path. It may begin with ~ or with a variable that the node defines, such as
$SCRATCH.
"""


class NodeType(Spec):
    """A group of identical nodes, for partitions with several kinds of nodes."""

    cpus_per_node: int = Field(ge=1, le=4096)
    """CPU cores that a job may use on each node."""
    memory_gb_per_node: float = Field(gt=0)
    """Memory that a job may use on each node, in GB."""
    gpus_per_node: int = Field(0, ge=0, le=64)
    """GPUs of each node."""
    gpu_memory_gb: float = Field(0.0, ge=0)
    """Memory of one GPU, in GB; 0 if it is not known."""


class Container(Spec):
    """Container in which every process of a job runs."""

    kind: Literal["apptainer", "pyxis"]
    """Container runtime: `apptainer` uses `apptainer exec`; `pyxis` uses srun's
    --container-image.
    """
    image: Word
    """Container image: a .sif file, or a name that enroot understands."""
    mounts: Texts = ()
    """Folders to mount, as OUTSIDE:INSIDE."""


class RequeueSpec(Spec):
    """What a job does at its time limit and after preemption."""

    policy: Literal["requeue", "chain", "none"] = "requeue"
    """`requeue`: the job requeues itself. `chain`: a successor job waits for its end (`afterany`),
    for clusters that do not requeue. `none`: the job ends, and `lorafleet resume` continues the
    run.
    """
    max_restarts: int = Field(3, ge=0, le=1000)
    """Restarts in a row without a new checkpoint after which the job gives up."""
    max_walltime_chain: int = Field(4, ge=1, le=1000)
    """Maximum number of jobs of one run, including the first."""
    signal_seconds: int = Field(120, ge=30, le=3600)
    """Seconds before the time limit at which trials are asked to save a checkpoint. Slurm may send
    the signal up to a minute early.
    """


class HeadNode(Spec):
    """A small node without GPUs for Ray's head and the driver, as the first component of a
    heterogeneous job.
    """

    partition: Word | None = None
    """Partition of the head node. Left out: the site's partition."""
    constraint: Word | None = None
    """Node features that it must have."""
    cpus: int = Field(4, ge=1, le=4096)
    """CPU cores of the head node. No trial runs on them."""
    memory_gb: float = Field(16.0, gt=0)
    """Memory of the head node, in GB."""


class ArraySpec(Spec):
    """How trials are grouped into the tasks of a job array, instead of one Ray cluster over the
    whole allocation.
    """

    trials_per_task: int = Field(1, ge=1, le=10_000)
    """Number of trials that one task trains, on one node."""
    max_running: int | None = Field(None, ge=1, le=10_000)
    """Maximum number of tasks that run at once (Slurm's `%`). Left out: as many as the scheduler
    allows.
    """


class SlurmSite(Spec):
    """A Slurm cluster, as configured for one group of users."""

    kind: Literal["slurm"] = "slurm"
    """Backend that runs the job."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$")
    """Display name of the site. Defaults to the file name."""
    partition: Word | None = None
    """Partition (queue). Left out: the cluster's default."""
    account: Word | None = None
    """Account that is charged."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Node features that nodes must have, in Slurm's syntax (`a100&ib`)."""
    gpu_request: Literal["gpus-per-node", "gres", "gpus"] = "gpus-per-node"
    """Option with which this cluster wants GPUs to be requested. Only one is used: some clusters
    refuse two at once and others misread them.
    """
    gpu_type: Word | None = None
    """GPU type in the request (`a100`), if the cluster distinguishes types."""
    cpus_per_node: int = Field(ge=1, le=4096)
    """CPU cores that a job gets on each node."""
    memory_gb_per_node: float = Field(gt=0)
    """Memory that a job gets on each node, in GB."""
    memory_request: Literal["mem", "mem-per-cpu", "mem-per-gpu", "all", "none"] = "mem"
    """Option with which this cluster wants memory to be requested: `--mem`, `--mem-per-cpu` or
    `--mem-per-gpu`, computed from memory_gb_per_node; `all`: `--mem=0`, all memory of a node;
    `none`: no option, where the cluster derives memory from cores or GPUs.
    """
    gpus_per_node: int = Field(0, ge=0, le=64)
    """GPUs that a job gets on each node; 0 for CPU nodes."""
    gpu_memory_gb: float = Field(0.0, ge=0)
    """Memory of one GPU, in GB. 0: not known; lorafleet then does not check whether a model
    fits.
    """
    node_types: dict[str, NodeType] = {}
    """Node types by name, if they differ. Placement assumes the smallest of them."""
    head: HeadNode | None = None
    """A separate node for the head and the driver (a heterogeneous job). Left out: they share the
    first node.
    """
    launch: Literal["ray", "array"] = "ray"
    """`ray`: one Ray cluster over one allocation. `array`: many small, independent trials (grid or
    random search with scheduler: none), grouped into the tasks of a job array.
    """
    array: ArraySpec = ArraySpec()
    """How trials are grouped into array tasks."""
    nodes: int | None = Field(None, ge=1, le=10_000)
    """Number of nodes of one allocation. Left out: the number that one trial needs."""
    max_nodes: int | None = Field(None, ge=1, le=10_000)
    """Maximum number of nodes of one allocation."""
    time_limit: str = "1:00:00"
    """Time limit of a job, in Slurm's format: MINUTES, H:MM:SS or D-HH:MM:SS."""
    requeue: RequeueSpec = RequeueSpec()
    """What happens at the end of a job."""
    setup: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """Lines of bash that set up lorafleet's environment on a node (modules, conda, a venv). They
    are code, so the file that they come from is printed.
    """
    environment: dict[str, str] = {}
    """Environment variables for every process. Names that may hold a secret are refused, because
    the values are written to the script.
    """
    share: Literal["none", "group"] = "none"
    """Who may read new run folders besides their owner. `group`: the group of the parent folder.
    Run folders contain held-out texts.
    """
    allow_environment: Texts = ()
    """Variables that a job's `environment` may set although they change which code runs, such as
    TRITON_CACHE_DIR.
    """
    container: Container | None = None
    """Container to run in. Left out: none."""
    network_interface: Word | None = None
    """Network interface between nodes for NCCL and gloo (`ib0`). Left out: they choose it
    themselves.
    """
    scratch_dir: Folder | None = None
    """Fast folder on each node's own disk ($TMPDIR, /local). Left out: /tmp."""
    runs_dir: Folder | None = None
    """Folder of the runs.

    All nodes and the login node must see it. Left out: the value of --runs.
    """
    cache_dir: Folder | None = None
    """Folder of fetched models and data. All nodes must see it. Left out: the value of
    LORAFLEET_CACHE.
    """
    template: str | None = None
    """Your own batch script, used instead of the built-in one (jinja2; `lorafleet plan --on` shows
    the result).
    """
    extra_sbatch: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """Additional #SBATCH options, such as `--mail-type=FAIL`. With `--exclusive`, Ray gets all
    cores of each node; the plan still counts on cpus_per_node.
    """

    @property
    def display_name(self) -> str:
        """Return the name of the site in messages."""
        return f"site {self.name}"

    @property
    def machine_noun(self) -> str:
        """Return the word for one of the site's machines in messages."""
        return "node"

    @property
    def smallest_node(self) -> NodeType:
        """Return the resources that every node has at least.

        Slurm may give a job any mix of the node types, so every trial must fit the smallest.
        GPU memory is the minimum over the types for which it is known.
        """
        site_values = {
            "cpus_per_node": self.cpus_per_node,
            "memory_gb_per_node": self.memory_gb_per_node,
            "gpus_per_node": self.gpus_per_node,
            "gpu_memory_gb": self.gpu_memory_gb,
        }
        kinds = [NodeType.model_validate(site_values), *self.node_types.values()]
        gpu_memories = [kind.gpu_memory_gb for kind in kinds if kind.gpu_memory_gb]
        return NodeType(
            cpus_per_node=min(kind.cpus_per_node for kind in kinds),
            memory_gb_per_node=min(kind.memory_gb_per_node for kind in kinds),
            gpus_per_node=min(kind.gpus_per_node for kind in kinds),
            gpu_memory_gb=min(gpu_memories, default=0.0),
        )

    @property
    def requests_whole_nodes(self) -> bool:
        """Return whether `extra_sbatch` requests whole nodes, with all cores that they have."""
        # `--exclusive=user` and `=mcs` only keep other users away.
        return any(line.strip() == "--exclusive" for line in self.extra_sbatch)

    def build_allocation(self, nodes: int) -> Allocation:
        """Return the allocation of a job with `nodes` nodes, for placement.

        Memory is converted from GB (10^9 bytes) to GiB. A separate head node comes first; it
        has no CPUs for trials and is not counted in `nodes`.
        """
        smallest = self.smallest_node
        memory = smallest.memory_gb_per_node * 1e9 / 2**30
        machines = [
            Node(
                name=f"node {number}",
                cpus=smallest.cpus_per_node,
                memory_gib=memory,
                gpus=smallest.gpus_per_node,
            )
            for number in range(1, nodes + 1)
        ]
        if self.head:
            machines.insert(
                0, Node(name="head", cpus=0, memory_gib=self.head.memory_gb * 1e9 / 2**30)
            )
        gpu_memory = smallest.gpu_memory_gb * 1e9 / 2**30
        return Allocation(cluster=self.name, nodes=tuple(machines), gpu_memory_gib=gpu_memory)

    @property
    def time_limit_seconds(self) -> int:
        """Return the time limit in seconds."""
        return parse_slurm_time(self.time_limit)

    @field_validator("time_limit")
    @classmethod
    def _check_time_limit(cls, value: str) -> str:
        parse_slurm_time(value)
        return value

    @field_validator("environment")
    @classmethod
    def _check_environment(cls, value: dict[str, str]) -> dict[str, str]:
        return validate_environment(value)

    @field_validator("extra_sbatch")
    @classmethod
    def _check_extra_sbatch(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for line in value:
            option = re.split(r"[=\s]", line.strip(), maxsplit=1)[0]
            if not option.startswith("-"):
                raise ValueError(f"{line!r} is not an option of sbatch: it must begin with a dash")
            if not option.startswith("--"):
                raise ValueError(
                    f"{option} is a short option: write the long form, so that a reader knows what "
                    "it requests"
                )
            # sbatch accepts unambiguous abbreviations of its long options: `--part` is
            # `--partition`.
            is_abbreviation = len(option) > 3 and any(
                reserved.startswith(option) for reserved in _RESERVED_OPTIONS
            )
            if is_abbreviation or any(
                # Options of one family contradict each other as well, such as `--mem` and
                # `--mem-per-cpu`.
                option == reserved or option.startswith(f"{reserved}-")
                for reserved in _RESERVED_OPTIONS
            ):
                raise ValueError(
                    f"{option} is set from other fields of the site: leave it out here"
                )
        return value

    @model_validator(mode="after")
    def _check_consistency(self) -> SlurmSite:
        problems = []
        if self.memory_request == "mem-per-gpu" and not self.smallest_node.gpus_per_node:
            sentence = "memory_request is mem-per-gpu, but gpus_per_node is 0: use mem"
            problems.append(Problem("memory_request", sentence))
        if self.nodes and self.max_nodes and self.nodes > self.max_nodes:
            sentence = f"nodes is {self.nodes}, but must not exceed max_nodes = {self.max_nodes}"
            problems.append(Problem("nodes", sentence))
        if self.launch == "array" and (self.head or (self.nodes or 1) > 1):
            sentence = "launch is array, whose tasks use one node each: leave out head and nodes"
            problems.append(Problem("launch", sentence))
        if self.launch == "array" and self.requeue.policy == "chain":
            sentence = (
                "launch is array, whose tasks cannot be chained: requeue.policy must be requeue or "
                "none"
            )
            problems.append(Problem("requeue.policy", sentence))
        if self.gpu_type and not self.gpus_per_node:
            problems.append(
                Problem("gpu_type", f"gpu_type is {self.gpu_type}, but gpus_per_node is 0")
            )
        if self.requeue.signal_seconds >= self.time_limit_seconds:
            sentence = (
                f"requeue.signal_seconds is {self.requeue.signal_seconds}, but must be below the "
                f"time limit of {self.time_limit} ({self.time_limit_seconds} s)"
            )
            problems.append(Problem("requeue.signal_seconds", sentence))
        if problems:
            raise SpecProblems(problems)
        return self


def parse_slurm_time(text: str) -> int:
    """Return the seconds of a time in Slurm's formats.

    The formats are M, M:SS, H:MM:SS, D-H, D-HH:MM and D-HH:MM:SS. UNLIMITED is refused,
    because such a job stays pending before every maintenance.

    Raises:
        ValueError: The text has another form, or the time is 0.
    """
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError(
            f"{text!r} is not a time; must be MINUTES, H:MM:SS or D-HH:MM:SS, such as 2-00:00:00"
        )
    days, parts = match[1], [int(part) for part in match[2].split(":")]
    if days is not None:  # D-H, D-H:M, D-H:M:S
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        total = int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    elif len(parts) == 3:
        total = parts[0] * 3600 + parts[1] * 60 + parts[2]
    else:  # M, M:S
        total = parts[0] * 60 + (parts[1] if len(parts) > 1 else 0)
    if not total:
        raise ValueError(f"{text!r} is zero, but a job must have a time limit above 0")
    return total
