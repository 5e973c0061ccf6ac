"""What the operator of a Kubernetes cluster knows and a job does not say: image, namespace, storage, queue, nodes."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from lorafleet.jobs.errors import Problem, SpecProblems
from lorafleet.jobs.schema.base import Spec, Texts
from lorafleet.jobs.schema.environment import checked_environment, may_be_secret
from lorafleet.jobs.sites.base import Allocation, Node
from pydantic import Field, field_validator, model_validator

_DNS = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
Name = Annotated[str, Field(pattern=rf"^{_DNS}(\.{_DNS})*$", max_length=253)]
"""The name of an object of Kubernetes: lower-case letters, digits, dashes and dots."""
LabelKey = Annotated[str, Field(pattern=rf"^({_DNS}(\.{_DNS})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$")]
"""The key of a label: `NAME` or `domain/NAME`."""
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")]
"""The value of a label: 63 letters, digits, dashes, underscores and dots at most."""
Labels = dict[LabelKey, LabelValue]
WORKER_LABELS = {"lorafleet.dev/role": "worker"}
"""What Ray knows worker pods by: trials are held to them."""
Inside = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]+$", max_length=200)]
"""An absolute path in a container, without spaces."""


class Toleration(Spec):
    """A taint of nodes that is no hindrance."""

    key: LabelKey | None = None
    """The taint's key; left out: every taint."""
    operator: Literal["Exists", "Equal"] | None = None
    """Whether the value counts; left out: Equal where there is one, else Exists."""
    value: LabelValue | None = None
    """Its value, with `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Which effect; left out: every one."""

    @model_validator(mode="after")
    def _is_one(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError(f"operator Exists has no value, but value is {self.value}: must be Equal")
        if self.operator == "Equal" and self.value is None:
            raise ValueError("operator Equal needs a value")
        if self.key is None and self.value is not None:
            raise ValueError(f"value is {self.value}, but there is no key that it is the value of")
        return self

    def tree(self) -> dict[str, str]:
        """As Kubernetes wants it."""
        told = self.model_dump(exclude_none=True)
        return told | {"operator": self.operator or ("Exists" if self.value is None else "Equal")}


class KubernetesHead(Spec):
    """The pod of Ray's head and the driver; no trial runs in it."""

    cpus: int = Field(4, ge=1, le=1024)
    """CPU cores."""
    memory_gb: float = Field(16.0, gt=0)
    """Memory, in GB."""
    ephemeral_gb: float = Field(20.0, gt=0)
    """Room on its node's own disk, in GB: Ray's logs lie there."""
    node_selector: Labels = {}
    """Labels that its node must have."""
    tolerations: Annotated[tuple[Toleration, ...], Field(strict=False)] = ()
    """Taints that it tolerates."""
    priority_class: Name | None = None
    """Its priority class."""


class Storage(Spec):
    """The volume that all pods of all runs see: runs, models and data lie on it."""

    claim: Name
    """A PersistentVolumeClaim in the namespace; with several pods it must be ReadWriteMany."""
    sub_path: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=200)] | None = None
    """Folder of a user or a team in it, such as `team-a/ana`: pods see nothing else of the volume."""
    mount_path: Inside = "/mnt/lorafleet"
    """Where pods see it."""
    read_write_many: bool = True
    """Whether several nodes may have it at the same time; false: one worker pod, on the node of its head."""

    @field_validator("sub_path")
    @classmethod
    def _stays_inside(cls, value: str | None) -> str | None:
        if value and ".." in value.split("/"):
            raise ValueError(f"{value!r} leaves the volume: no `..` in it")
        return value


class SecretRef(Spec):
    """A value that stands in a Secret of the namespace."""

    name: Name
    """The Secret."""
    key: Annotated[str, Field(pattern=r"^[-._A-Za-z0-9]{1,253}$")]
    """The key in it."""
    optional: bool = False
    """Whether pods start without it."""


class NoQueue(Spec):
    """Kubernetes' own scheduler."""

    kind: Literal["none"] = "none"
    """No queue."""


class Kueue(Spec):
    """Kueue admits the whole job, or nothing of it."""

    kind: Literal["kueue"]
    """Kueue."""
    queue: Name
    """LocalQueue in the namespace."""
    priority_class: Name | None = None
    """WorkloadPriorityClass."""
    topology: LabelKey | None = None
    """Level of the topology that worker pods should share (a node label), such as cloud.provider.com/topology-rack."""
    topology_required: bool = False
    """Whether they must share it."""

    @model_validator(mode="after")
    def _topology_is_named(self) -> Kueue:
        if self.topology_required and self.topology is None:
            raise ValueError("topology_required is true, but topology names no level")
        return self


class Volcano(Spec):
    """Volcano; the KubeRay operator runs with --batch-scheduler=volcano."""

    kind: Literal["volcano"]
    """Volcano."""
    queue: Name = "default"
    """Queue."""


class YuniKorn(Spec):
    """Apache YuniKorn; the KubeRay operator runs with --batch-scheduler=yunikorn."""

    kind: Literal["yunikorn"]
    """YuniKorn."""
    queue: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")]
    """Queue, such as root.research."""


class Kai(Spec):
    """KAI; the KubeRay operator runs with --batch-scheduler=kai-scheduler."""

    kind: Literal["kai"]
    """KAI."""
    queue: Name
    """Queue."""


Scheduler = Annotated[NoQueue | Kueue | Volcano | YuniKorn | Kai, Field(discriminator="kind")]


class Network(Spec):
    """How worker pods talk to each other."""

    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9._^=,-]{1,64}$")] | None = None
    """Interface for NCCL and gloo (`eth0`); left out: theirs to find."""
    rdma_resource: LabelKey | None = None
    """Device resource of an RDMA plug-in, such as rdma/hca_shared; worker pods then get IPC_LOCK."""
    rdma_count: int = Field(1, ge=1, le=64)
    """How many of it a worker pod gets."""
    attach: Annotated[str, Field(pattern=r"^[A-Za-z0-9._/@,-]{1,500}$")] | None = None
    """Further networks of worker pods (Multus, k8s.v1.cni.cncf.io/networks)."""
    ib_hca: Annotated[str, Field(pattern=r"^[A-Za-z0-9_^=:,-]{1,200}$")] | None = None
    """Which InfiniBand cards NCCL uses (NCCL_IB_HCA), such as mlx5."""


class Deadlines(Spec):
    """When a job is given up."""

    hours: float | None = Field(None, gt=0, le=24 * 365)
    """Hours that one attempt may take; each retry, and each time that a queue admits the job again, begins anew."""
    start_minutes: float | None = Field(None, gt=0, le=60 * 24 * 30)
    """Minutes in which an attempt must run, counted from when Kueue has admitted it. Only with Kueue: elsewhere waiting
    for room would end the job."""
    retries: int = Field(2, ge=0, le=100)
    """New clusters after a failure; each goes on with the run."""
    save_seconds: int = Field(120, ge=30, le=3600)
    """Seconds that pods have to save when they are taken away."""


class Keep(Spec):
    """How long what has ended stays on the cluster; the run is on the storage for good. Kueue wants one time alone: the
    first, for success and failure, and the RayJob stays."""

    cluster_minutes: float = Field(1.0, ge=0, le=60 * 24 * 30)
    """Minutes that the head stays after success."""
    failed_cluster_minutes: float = Field(60.0, ge=0, le=60 * 24 * 30)
    """Minutes that the head stays after a failure, for its logs; the workers go at once."""
    object_days: float = Field(7.0, gt=0, le=365)
    """Days that the RayJob itself stays after success."""


class KubernetesSite(Spec):
    """A namespace of a cluster with the KubeRay operator, as one group of users meets it."""

    kind: Literal["kubernetes"] = "kubernetes"
    """Which backend runs it."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$")
    """What sentences call it; the file's name where it is left out."""
    context: Annotated[str, Field(min_length=1, max_length=400)] | None = None
    """Context of the kubeconfig; left out: the current one, or the pod's own service account."""
    namespace: Annotated[str, Field(pattern=rf"^{_DNS}$")] = "default"
    """Namespace of everything that is made."""
    image: str
    """Image of all pods, by digest: NAME[:LORAFLEET_VERSION]@sha256:...; docs/kubernetes.md has a Dockerfile."""
    pull_secrets: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Secrets for the image's registry."""
    service_account: Name | None = None
    """Service account of the pods; its token is not mounted unless trials are autoscaled."""
    storage: Storage
    """The volume of runs, models and data."""
    nodes: int | None = Field(None, ge=1, le=1000)
    """Worker pods of one job; left out: what one trial needs."""
    max_nodes: int | None = Field(None, ge=1, le=1000)
    """Most worker pods that one job may have."""
    cpus_per_node: int = Field(ge=1, le=1024)
    """CPU cores of a worker pod."""
    memory_gb_per_node: float = Field(gt=0)
    """Memory of a worker pod, in GB."""
    ephemeral_gb_per_node: float = Field(50.0, gt=0)
    """Room on its node's own disk, in GB."""
    shared_memory_gb: float | None = Field(None, gt=0)
    """Size of /dev/shm in a worker pod, in GB, out of its memory; left out: 30 % of it."""
    gpu_resource: LabelKey = "nvidia.com/gpu"
    """What the device plug-in calls a GPU."""
    gpus_per_node: int = Field(0, ge=0, le=64)
    """GPUs of a worker pod; 0 for CPU pods."""
    gpu_memory_gb: float = Field(0.0, ge=0)
    """Memory of one GPU, in GB; 0 where it is not known, and nothing is said to fit or not."""
    node_selector: Labels = {}
    """Labels that nodes of worker pods must have."""
    tolerations: Annotated[tuple[Toleration, ...], Field(strict=False)] = ()
    """Taints that worker pods tolerate."""
    priority_class: Name | None = None
    """Priority class of worker pods."""
    head: KubernetesHead = KubernetesHead()
    """The pod of Ray's head and the driver."""
    autoscale: bool = False
    """Whether worker pods come and go with the trials that wait (searches of one-pod trials); false: all or nothing."""
    scheduler: Scheduler = NoQueue()
    """The queue that admits jobs, if any."""
    network: Network = Network()
    """How worker pods talk to each other."""
    network_policy: bool = True
    """Whether a NetworkPolicy lets in only the job's own pods and the KubeRay operator."""
    operator_labels: Labels = {"app.kubernetes.io/component": "kuberay-operator"}
    """What the operator's pods are known by, for that policy."""
    deadlines: Deadlines = Deadlines()
    """When a job is given up."""
    keep: Keep = Keep()
    """How long what has ended stays on the cluster."""
    internet: bool = False
    """Whether pods may fetch from the hub and talk to W&B; false: what was staged, and W&B offline."""
    secrets: dict[str, SecretRef] = {}
    """Variables of the head and the workers that are read from Secrets, such as WANDB_API_KEY and HF_TOKEN."""
    environment: dict[str, str] = {}
    """Variables for every process. Names that may hold a secret are refused: they would stand in the manifest."""
    allow_environment: Texts = ()
    """Variables that a job's `environment` may set though they change which code runs, such as TRITON_CACHE_DIR."""
    labels: Labels = {}
    """Labels of everything that is made: team, cost centre."""
    user: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")] | None = None
    """Who submits, as a label; left out: the name of the account here."""
    run_as_user: int = Field(1000, ge=1, le=2**31 - 1)
    """User number of all processes; the image's."""
    run_as_group: int = Field(100, ge=1, le=2**31 - 1)
    """Group number of all processes and of the volume's files."""
    patch: dict[str, Any] = {}
    """A JSON merge patch (RFC 7386) on the RayJob, applied last; the result is checked again."""

    @property
    def called(self) -> str:
        """What sentences call it."""
        return f"site {self.name}"

    @property
    def machine(self) -> str:
        """What sentences call one of its machines."""
        return "worker pod"

    def allocation(self, nodes: int) -> Allocation:
        """A job of so many worker pods, as placement sees it."""
        memory = self.memory_gb_per_node * 1e9 / 2**30
        head = Node(name="head", cpus=0, memory_gib=self.head.memory_gb * 1e9 / 2**30)
        workers = [
            Node(
                name=f"worker {number}",
                cpus=self.cpus_per_node,
                memory_gib=memory,
                gpus=self.gpus_per_node,
                labels=WORKER_LABELS,
            )
            for number in range(1, nodes + 1)
        ]
        gpu_memory = self.gpu_memory_gb * 1e9 / 2**30
        return Allocation(kind=self.kind, cluster=self.name, nodes=(head, *workers), gpu_memory_gib=gpu_memory)

    @field_validator("storage", mode="before")
    @classmethod
    def _is_a_volume(cls, value: Any) -> Any:
        if isinstance(value, str):
            if "://" in value:
                raise ValueError(
                    f"{value!r} is object storage, which cannot hold runs: their files are appended to and renamed; "
                    "must be a claim of a volume, {claim: NAME}"
                )
            raise ValueError(f"{value!r} must be a block with the name of a volume claim, {{claim: NAME}}")
        return value

    @field_validator("image")
    @classmethod
    def _is_pinned(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-zA-Z0-9._:/-]*@sha256:[0-9a-f]{64}", value):
            raise ValueError(
                f"{value!r} is not pinned: must be NAME:VERSION@sha256:DIGEST, so that every attempt at a run has the "
                "same programs (`docker inspect --format '{{index .RepoDigests 0}}' IMAGE` prints it)"
            )
        return value

    @field_validator("environment")
    @classmethod
    def _holds_no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        return checked_environment(value)

    @field_validator("secrets")
    @classmethod
    def _are_variables(cls, value: dict[str, SecretRef]) -> dict[str, SecretRef]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name.startswith(("RAY_", "LF_")):
                raise ValueError(f"{name!r} is no name that a variable from a Secret may have")
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> KubernetesSite:
        problems = []
        if self.nodes and self.max_nodes and self.nodes > self.max_nodes:
            sentence = f"nodes is {self.nodes}, but must not be above max_nodes = {self.max_nodes}"
            problems.append(Problem("nodes", sentence))
        if self.shared_memory_gb and self.shared_memory_gb >= self.memory_gb_per_node:
            sentence = f"shared_memory_gb is {self.shared_memory_gb:g}, but must be below memory_gb_per_node"
            problems.append(Problem("shared_memory_gb", sentence))
        both = sorted(set(self.secrets) & set(self.environment))
        if both:
            problems.append(Problem(f"secrets.{both[0]}", f"{both[0]} stands in secrets and in environment"))
        if self.deadlines.start_minutes and self.scheduler.kind != "kueue":
            sentence = (
                "deadlines.start_minutes is set, and the scheduler is not kueue: the time that a job waits for room "
                "would count, and end it; must be left out"
            )
            problems.append(Problem("deadlines.start_minutes", sentence))
        if self.autoscale and self.scheduler.kind != "none":
            sentence = f"autoscale is true, but {self.scheduler.kind} admits a whole job; must be false"
            problems.append(Problem("autoscale", sentence))
        hidden = sorted(name for name in _variables(self.patch) if may_be_secret(name))
        if hidden:
            sentence = f"patch sets {hidden[0]}, which may hold a secret: name a Secret in `secrets` instead"
            problems.append(Problem("patch", sentence))
        if problems:
            raise SpecProblems(problems)
        return self


def _variables(tree: Any) -> list[str]:
    """Names of the variables that a patch gives a value."""
    if isinstance(tree, dict):
        own = [tree["name"]] if isinstance(tree.get("name"), str) and isinstance(tree.get("value"), str) else []
        return own + [name for value in tree.values() for name in _variables(value)]
    if isinstance(tree, list):
        return [name for value in tree for name in _variables(value)]
    return []
