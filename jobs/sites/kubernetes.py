"""Define a Kubernetes site: what its operator knows and a job does not say.

For example the image, namespace, storage, queue and nodes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lorafleet.jobs.errors import Problem, SpecProblems
from lorafleet.jobs.schema.base import Spec, Texts
from lorafleet.jobs.schema.environment import is_secret_name, validate_environment
from lorafleet.jobs.sites.base import Allocation, Node

# A DNS-1123 label, of which names of Kubernetes objects are made.
_DNS = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
Name = Annotated[str, Field(pattern=rf"^{_DNS}(\.{_DNS})*$", max_length=253)]
"""Name of a Kubernetes object: lower-case letters, digits, dashes and dots."""
LabelKey = Annotated[
    str, Field(pattern=rf"^({_DNS}(\.{_DNS})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$")
]
"""Key of a label: `NAME` or `domain/NAME`."""
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")]
"""Value of a label: at most 63 letters, digits, dashes, underscores and dots."""
Labels = dict[LabelKey, LabelValue]
WORKER_LABELS = {"lorafleet.dev/role": "worker"}
"""Ray labels of worker pods; trials run only on nodes with them."""
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$")]
"""Amount as Kubernetes writes it, such as 500m or 2Gi."""
ContainerPath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]+$", max_length=200)]
"""Absolute path in a container, without spaces."""


class Toleration(Spec):
    """A taint of nodes that pods tolerate."""

    key: LabelKey | None = None
    """Key of the taint. Default: every taint."""
    operator: Literal["Exists", "Equal"] | None = None
    """How the taint is matched: `Equal` compares the value, `Exists` ignores it. Default: Equal if
    a value is set, else Exists.
    """
    value: LabelValue | None = None
    """Value of the taint, for `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. Default: every effect."""
    toleration_seconds: int | None = Field(None, ge=0, le=86400)
    """Seconds after which a pod leaves a node that gets the taint. Only with effect NoExecute.
    Default: never.
    """

    @model_validator(mode="after")
    def _check_operator(self) -> Toleration:
        """Check that operator, key, value and effect fit together."""
        if self.toleration_seconds is not None and self.effect != "NoExecute":
            raise ValueError("toleration_seconds needs effect NoExecute")
        if self.operator == "Exists" and self.value is not None:
            raise ValueError(
                f"operator Exists takes no value, but value is {self.value}: use operator Equal"
            )
        if self.operator == "Equal" and self.value is None:
            raise ValueError("operator Equal needs a value")
        if self.key is None and self.value is not None:
            raise ValueError(f"value is {self.value}, but there is no key")
        return self

    def to_dict(self) -> dict[str, str | int]:
        """Return the toleration as Kubernetes takes it.

        The operator is always written: Kubernetes' default is Equal, which without a value
        would match only an empty one.
        """
        values: dict[str, str | int] = self.model_dump(
            exclude_none=True, exclude={"toleration_seconds"}
        )
        if self.toleration_seconds is not None:
            values["tolerationSeconds"] = self.toleration_seconds
        return values | {"operator": self.operator or ("Exists" if self.value is None else "Equal")}


class VolumeMount(Spec):
    """A place where pods see a volume."""

    name: Name
    """Name of the volume."""
    mount_path: ContainerPath
    """Path in the container."""
    sub_path: Annotated[str, Field(min_length=1, max_length=400)] | None = None
    """Folder of the volume. Default: all of it."""
    read_only: bool = False
    """True to mount it read-only."""


class ResourceClaim(Spec):
    """Devices that dynamic resource allocation (DRA) gives a pod."""

    name: Name
    """Name of the claim in the pod."""
    claim: Name | None = None
    """ResourceClaim in the namespace."""
    template: Name | None = None
    """ResourceClaimTemplate in the namespace, of which each pod gets a claim of its own."""

    @model_validator(mode="after")
    def _check_source(self) -> ResourceClaim:
        if (self.claim is None) == (self.template is None):
            raise ValueError("set one of claim and template")
        return self


_RESERVED_NAMES = {
    "volumes": ("storage", "tmp", "job", "shm"),
    "sidecars": ("ray-head", "ray-worker", "ray-job-submitter", "autoscaler"),
    "resource_claims": (),
}
"""Names of lorafleet's own volumes and containers, by the field that could repeat them."""
_RESERVED_PATHS = ("/tmp", "/dev/shm", "/etc/lorafleet")  # nosec B108  # a pod's own


class PodSettings(Spec):
    """Settings of a job's pods for the tools and hardware of a cluster.

    Values of the type mapping are Kubernetes' own, with its spelling (`topologyKey`).
    """

    annotations: dict[LabelKey, str] = {}
    """Annotations of these pods, in addition to those of the site."""
    labels: Labels = {}
    """Labels of these pods, in addition to those of the site."""
    volumes: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """Volumes, as Kubernetes writes them: `{name: data, persistentVolumeClaim: {claimName: x}}`."""
    mounts: Annotated[tuple[VolumeMount, ...], Field(strict=False)] = ()
    """Paths of these volumes in Ray's container."""
    affinity: dict[str, Any] = {}
    """Affinity of the pods."""
    topology_spread: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """Topology spread constraints of the pods."""
    runtime_class: Name | None = None
    """RuntimeClass of the pods, such as nvidia or gvisor."""
    hugepages: dict[Literal["2Mi", "1Gi"], Quantity] = {}
    """Huge pages of Ray's container, by page size: `{2Mi: 1Gi}`."""
    sidecars: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """Further containers of the pods, as Kubernetes writes them. Those without a security context
    get that of Ray's container.
    """
    resource_claims: Annotated[tuple[ResourceClaim, ...], Field(strict=False)] = ()
    """Device claims of Ray's container, for devices that trials do not count, such as network
    cards. GPUs of trials come from `gpus_per_node`.
    """

    @model_validator(mode="after")
    def _check_items(self) -> PodSettings:
        """Check that items have names of their own, and mounts and affinity make sense."""
        self._check_names()
        self._check_mounts()
        for kind, rules in self.affinity.items():
            if not isinstance(rules, dict) or not all(
                isinstance(terms, list | dict) for terms in rules.values()
            ):
                raise ValueError(f"affinity.{kind} must be a mapping of rules")
        return self

    def _check_names(self) -> None:
        for field, reserved in _RESERVED_NAMES.items():
            names = [
                item.get("name") if isinstance(item, dict) else item.name
                for item in getattr(self, field)
            ]
            for name in names:
                if not isinstance(name, str):
                    raise ValueError(f"each of {field} needs a name")
                if name in reserved:
                    raise ValueError(f"{field} has {name}, a name that lorafleet uses itself")
                if names.count(name) > 1:
                    raise ValueError(f"{field} has {name} twice")

    def _check_mounts(self) -> None:
        volumes = {volume["name"] for volume in self.volumes} | {"storage"}
        for mount in self.mounts:
            if mount.name not in volumes:
                raise ValueError(f"mounts names {mount.name}, but volumes has no such volume")
            if mount.mount_path.rstrip("/") in _RESERVED_PATHS:
                raise ValueError(f"mounts has {mount.mount_path}, which lorafleet mounts itself")


HardeningPoint = Literal[
    "capabilities",
    "escalation",
    "host_namespaces",
    "host_paths",
    "image_digest",
    "non_root",
    "seccomp",
    "security_options",
    "service_account_token",
    "token_auth",
]
"""A point of hardening that a check of the manifest looks for."""


class KubernetesHead(Spec):
    """The pod of Ray's head and the driver; no trial runs in it."""

    cpus: int = Field(4, ge=1, le=1024)
    """CPU cores. Default: 4."""
    memory_gb: float = Field(16.0, gt=0)
    """Memory, in GB. Default: 16."""
    ephemeral_gb: float = Field(20.0, gt=0)
    """Space on its node's own disk, in GB, for Ray's logs. Default: 20."""
    node_selector: Labels = {}
    """Labels that its node must have."""
    tolerations: Annotated[tuple[Toleration, ...], Field(strict=False)] = ()
    """Taints that it tolerates."""
    priority_class: Name | None = None
    """Priority class of the pod."""
    pod: PodSettings = PodSettings()
    """Further settings of the pod."""


class Storage(Spec):
    """The volume that all pods of all runs share: it holds runs, models and data."""

    claim: Name
    """PersistentVolumeClaim in the namespace. With several pods it must be ReadWriteMany."""
    sub_path: (
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=200)] | None
    ) = None
    """Folder of a user or a team on the volume, such as `team-a/ana`. Pods see nothing else of the
    volume.
    """
    mount_path: ContainerPath = "/mnt/lorafleet"
    """Path at which pods see the volume. Default: /mnt/lorafleet."""
    read_write_many: bool = True
    """True if several nodes may mount the volume at the same time. If false, a job has one worker
    pod, on the node of its head.
    """

    @field_validator("sub_path")
    @classmethod
    def _check_sub_path(cls, value: str | None) -> str | None:
        """Check that the folder does not leave the volume."""
        # Kubernetes refuses this as well, but only when it creates the pods of a submitted job.
        if value and ".." in value.split("/"):
            raise ValueError(f"{value!r} leaves the volume: do not use `..`")
        return value


class SecretRef(Spec):
    """A value that is stored in a Secret of the namespace."""

    name: Name
    """Name of the Secret."""
    key: Annotated[str, Field(pattern=r"^[-._A-Za-z0-9]{1,253}$")]
    """Key in the Secret."""
    optional: bool = False
    """True if pods may start without it."""


class NoQueue(Spec):
    """No queue: Kubernetes' own scheduler."""

    kind: Literal["none"] = "none"
    """No queue."""


class Kueue(Spec):
    """Kueue, which admits a job completely or not at all."""

    kind: Literal["kueue"]
    """Kueue."""
    queue: Name
    """LocalQueue in the namespace."""
    priority_class: Name | None = None
    """WorkloadPriorityClass of the job."""
    topology: LabelKey | None = None
    """Topology level (a node label) that worker pods should share, such as
    cloud.provider.com/topology-rack.
    """
    topology_required: bool = False
    """True if worker pods must share that level."""

    @model_validator(mode="after")
    def _check_topology(self) -> Kueue:
        """Check that a required topology is named."""
        if self.topology_required and self.topology is None:
            raise ValueError("topology_required is true, but topology names no level")
        return self


class Volcano(Spec):
    """Volcano. The KubeRay operator must run with --batch-scheduler=volcano."""

    kind: Literal["volcano"]
    """Volcano."""
    queue: Name = "default"
    """Queue. Default: default."""


class YuniKorn(Spec):
    """Apache YuniKorn. The KubeRay operator must run with --batch-scheduler=yunikorn."""

    kind: Literal["yunikorn"]
    """YuniKorn."""
    queue: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")]
    """Queue, such as root.research."""


class Kai(Spec):
    """KAI. The KubeRay operator must run with --batch-scheduler=kai-scheduler."""

    kind: Literal["kai"]
    """KAI."""
    queue: Name
    """Queue."""


Scheduler = Annotated[NoQueue | Kueue | Volcano | YuniKorn | Kai, Field(discriminator="kind")]


class Network(Spec):
    """Network settings of the worker pods."""

    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9._^=,-]{1,64}$")] | None = None
    """Network interface for NCCL and gloo, such as `eth0`. Default: they choose one."""
    rdma_resource: LabelKey | None = None
    """Device resource of an RDMA plug-in, such as rdma/hca_shared. Worker pods then get the
    capability IPC_LOCK.
    """
    rdma_count: int = Field(1, ge=1, le=64)
    """Number of these devices that a worker pod gets. Default: 1."""
    attach: Annotated[str, Field(pattern=r"^[A-Za-z0-9._/@,-]{1,500}$")] | None = None
    """Additional networks of worker pods (Multus, k8s.v1.cni.cncf.io/networks)."""
    ib_hca: Annotated[str, Field(pattern=r"^[A-Za-z0-9_^=:,-]{1,200}$")] | None = None
    """InfiniBand cards that NCCL uses (NCCL_IB_HCA), such as mlx5."""


class Deadlines(Spec):
    """Time limits and retries of a job."""

    hours: float | None = Field(None, gt=0, le=24 * 365)
    """Maximum hours of one attempt. The time starts again with each retry, and each time that a
    queue admits the job again.
    """
    start_minutes: float | None = Field(None, gt=0, le=60 * 24 * 30)
    """Minutes within which an attempt must run after Kueue has admitted it. Only with Kueue:
    elsewhere the time that a job waits for free nodes would count, and end it.
    """
    retries: int = Field(2, ge=0, le=100)
    """Number of new clusters after a failure; each continues the run. Default: 2."""
    save_seconds: int = Field(120, ge=30, le=3600)
    """Seconds that pods have to save when they are deleted or preempted. Default: 120."""
    lost_node_seconds: int = Field(45, ge=0, le=240)
    """Seconds that pods stay on a node that does not answer. KubeRay gives a job up when its head
    has not answered for 300 seconds; Kubernetes' own default for this is 300, too. Default: 45.
    """


class Retention(Spec):
    """Retention times of ended jobs on the cluster. The run stays on the storage permanently.

    Kueue allows only one time: `cluster_minutes` then applies to success and failure, and the
    RayJob stays.
    """

    cluster_minutes: float = Field(1.0, ge=0, le=60 * 24 * 30)
    """Minutes that the head stays after success. Default: 1."""
    failed_cluster_minutes: float = Field(60.0, ge=0, le=60 * 24 * 30)
    """Minutes that the head stays after a failure, so that you can read its logs; the workers are
    deleted at once. Default: 60.
    """
    object_days: float = Field(7.0, gt=0, le=365)
    """Days that the RayJob itself stays after success. Default: 7."""


class KubernetesSite(Spec):
    """A namespace of a cluster with the KubeRay operator, as one group of users sees it."""

    kind: Literal["kubernetes"] = "kubernetes"
    """Backend of the site."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$")
    """Display name of the site. Defaults to the file name."""
    context: Annotated[str, Field(min_length=1, max_length=400)] | None = None
    """Context of the kubeconfig. Default: the current one, or the pod's own service account."""
    namespace: Annotated[str, Field(pattern=rf"^{_DNS}$")] = "default"
    """Namespace of all objects that are created."""
    image: str
    """Image of all pods, pinned by digest: NAME[:LORAFLEET_VERSION]@sha256:...; docs/kubernetes.md
    has a Dockerfile.
    """
    pull_secrets: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Secrets for the image's registry."""
    service_account: Name | None = None
    """Service account of the pods. Its token is mounted only if trials are autoscaled."""
    storage: Storage
    """Volume for runs, models and data."""
    nodes: int | None = Field(None, ge=1, le=1000)
    """Number of worker pods of one job. Default: what one trial needs."""
    max_nodes: int | None = Field(None, ge=1, le=1000)
    """Maximum number of worker pods of one job."""
    cpus_per_node: int = Field(ge=1, le=1024)
    """CPU cores of a worker pod."""
    memory_gb_per_node: float = Field(gt=0)
    """Memory of a worker pod, in GB."""
    ephemeral_gb_per_node: float = Field(50.0, gt=0)
    """Space on the node's own disk for a worker pod, in GB. Default: 50."""
    shared_memory_gb: float | None = Field(None, gt=0)
    """Size of /dev/shm in a worker pod, in GB, taken from its memory.

    Default: 30 % of the memory.
    """
    gpu_resource: LabelKey = "nvidia.com/gpu"
    """Resource name of a GPU in the device plug-in."""
    gpus_per_node: int = Field(0, ge=0, le=64)
    """GPUs of a worker pod; 0 for CPU pods."""
    gpu_memory_gb: float = Field(0.0, ge=0)
    """Memory of one GPU, in GB. Leave it at 0 if it is not known; then nothing checks whether a
    trial fits.
    """
    node_selector: Labels = {}
    """Labels that the nodes of worker pods must have."""
    tolerations: Annotated[tuple[Toleration, ...], Field(strict=False)] = ()
    """Taints that worker pods tolerate."""
    priority_class: Name | None = None
    """Priority class of worker pods."""
    pod: PodSettings = PodSettings()
    """Further settings of worker pods."""
    head: KubernetesHead = KubernetesHead()
    """The pod of Ray's head and the driver."""
    autoscale: bool = False
    """True to add and remove worker pods with the number of waiting trials, for searches of
    one-pod trials. False to start all worker pods or none.
    """
    scheduler: Scheduler = NoQueue()
    """Queue that admits jobs. Default: none."""
    network: Network = Network()
    """Network settings of the worker pods."""
    network_policy: bool = True
    """True to create a NetworkPolicy that admits only the job's own pods and the KubeRay operator.
    Default: true.
    """
    operator_labels: Labels = {"app.kubernetes.io/component": "kuberay-operator"}
    """Labels of the operator's pods, for the NetworkPolicy."""
    deadlines: Deadlines = Deadlines()
    """Time limits and retries of a job."""
    keep: Retention = Retention()
    """How long ended jobs stay on the cluster."""
    internet: bool = False
    """True if pods may download from the hub and connect to W&B. If false, they use what was
    staged, and W&B runs offline. Default: false.
    """
    secrets: dict[str, SecretRef] = {}
    """Environment variables of the head and the workers that are read from Secrets, such as
    WANDB_API_KEY and HF_TOKEN.
    """
    environment: dict[str, str] = {}
    """Environment variables of every process. Names that may hold a secret are refused, because
    the value would be part of the manifest.
    """
    allow_environment: Texts = ()
    """Variables that a job's `environment` may set although they change which code runs, such as
    TRITON_CACHE_DIR.
    """
    labels: Labels = {}
    """Labels of all objects that are created, such as team or cost centre."""
    annotations: dict[LabelKey, str] = {}
    """Annotations of all pods that are created."""
    user: (
        Annotated[str, Field(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")] | None
    ) = None
    """Label with the name of the submitter. Default: the name of your local account."""
    run_as_user: int = Field(1000, ge=1, le=2**31 - 1)
    """User id of all processes; it must match the image. Default: 1000."""
    run_as_group: int = Field(100, ge=1, le=2**31 - 1)
    """Group id of all processes and of the volume's files. Default: 100."""
    patch: dict[str, Any] | list[dict[str, Any]] = {}
    """Patch for the RayJob, applied last: a mapping is a JSON merge patch (RFC 7386), a list is a
    JSON Patch (RFC 6902). The result is checked again.
    """
    weaken: Annotated[tuple[HardeningPoint, ...], Field(strict=False)] = ()
    """Points of hardening that `patch` and `pod` may weaken. A point that is not named here is
    refused.
    """

    @property
    def display_name(self) -> str:
        """Return the name of the site in messages."""
        return f"site {self.name}"

    @property
    def machine_noun(self) -> str:
        """Return the name of one of its machines in messages."""
        return "worker pod"

    def build_allocation(self, nodes: int) -> Allocation:
        """Return a job with this number of worker pods, as placement sees it.

        Memory is converted from GB (10^9 bytes) to GiB. The head pod comes first; it has no
        CPUs for trials and is not counted in `nodes`. Workers have the Ray labels
        WORKER_LABELS, to which the trials of a job are tied.
        """
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
        return Allocation(
            kind=self.kind, cluster=self.name, nodes=(head, *workers), gpu_memory_gib=gpu_memory
        )

    @field_validator("storage", mode="before")
    @classmethod
    def _check_storage(cls, value: Any) -> Any:
        """Check that the storage is a block with a volume claim."""
        if isinstance(value, str):
            if "://" in value:
                raise ValueError(
                    f"{value!r} is object storage, which cannot hold runs, because their files are "
                    "appended to and renamed; name a volume claim, {claim: NAME}"
                )
            raise ValueError(
                f"{value!r} must be a block with the name of a volume claim, {{claim: NAME}}"
            )
        return value

    @field_validator("image")
    @classmethod
    def _check_image(cls, value: str) -> str:
        """Check that the image is pinned by digest."""
        if not re.fullmatch(r"[a-z0-9][a-zA-Z0-9._:/-]*@sha256:[0-9a-f]{64}", value):
            raise ValueError(
                f"{value!r} is not pinned: must be NAME:VERSION@sha256:DIGEST, so that every "
                "attempt of a run uses the same software (`docker inspect --format '{{index "
                ".RepoDigests 0}}' IMAGE` prints it)"
            )
        return value

    @field_validator("environment")
    @classmethod
    def _check_environment(cls, value: dict[str, str]) -> dict[str, str]:
        """Check the names of the environment variables."""
        return validate_environment(value)

    @field_validator("secrets")
    @classmethod
    def _check_secret_names(cls, value: dict[str, SecretRef]) -> dict[str, SecretRef]:
        """Check that the keys of `secrets` may be names of environment variables."""
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name.startswith(
                ("RAY_", "LF_")
            ):
                raise ValueError(
                    f"{name!r} is not a valid variable name for a Secret (RAY_ and LF_ are "
                    "reserved)"
                )
        return value

    @model_validator(mode="after")
    def _check_fields(self) -> KubernetesSite:
        """Check fields that depend on each other. Raises SpecProblems."""
        problems = []
        if self.nodes and self.max_nodes and self.nodes > self.max_nodes:
            sentence = f"nodes is {self.nodes}, but must not exceed max_nodes = {self.max_nodes}"
            problems.append(Problem("nodes", sentence))
        if self.shared_memory_gb and self.shared_memory_gb >= self.memory_gb_per_node:
            sentence = (
                f"shared_memory_gb is {self.shared_memory_gb:g}, but must be below "
                "memory_gb_per_node"
            )
            problems.append(Problem("shared_memory_gb", sentence))
        duplicates = sorted(set(self.secrets) & set(self.environment))
        if duplicates:
            problems.append(
                Problem(
                    f"secrets.{duplicates[0]}",
                    f"{duplicates[0]} is set in secrets and in environment: keep one",
                )
            )
        if self.deadlines.start_minutes and self.scheduler.kind != "kueue":
            sentence = (
                "deadlines.start_minutes is set, but the scheduler is not kueue: the time that a "
                "job waits for resources would count, and end the job. Leave it out"
            )
            problems.append(Problem("deadlines.start_minutes", sentence))
        if self.autoscale and self.scheduler.kind != "none":
            sentence = (
                f"autoscale is true, but {self.scheduler.kind} admits a whole job at once; must be "
                "false"
            )
            problems.append(Problem("autoscale", sentence))
        raw_fields = {
            "patch": self.patch,
            "pod.sidecars": list(self.pod.sidecars),
            "head.pod.sidecars": list(self.head.pod.sidecars),
        }
        for field, tree in raw_fields.items():
            names = [name for name in _list_patched_variables(tree) if is_secret_name(name)]
            if names:
                sentence = (
                    f"{field} sets {min(names)}, which may hold a secret: name a Secret in "
                    "`secrets` instead"
                )
                problems.append(Problem(field, sentence))
        if problems:
            raise SpecProblems(problems)
        return self


def _list_patched_variables(tree: Any) -> list[str]:
    """Return the names of the variables to which a patch gives a value.

    A variable is an object with `name` and `value` at any depth: a patch may replace the
    environment of every container.
    """
    if isinstance(tree, dict):
        names = (
            [tree["name"]]
            if isinstance(tree.get("name"), str) and isinstance(tree.get("value"), str)
            else []
        )
        return names + [name for value in tree.values() for name in _list_patched_variables(value)]
    if isinstance(tree, list):
        return [name for value in tree for name in _list_patched_variables(value)]
    return []
