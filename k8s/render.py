"""The objects of a job on Kubernetes, from what it asks and what the site says. Pure: no clock, no randomness.

A run is a RayJob for each time that it is submitted, with a ConfigMap that holds the job and a NetworkPolicy.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from lorafleet.jobs.errors import PlacementRefused
from lorafleet.jobs.runs.bundle import DOCUMENT
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.environment import OFFLINE
from lorafleet.jobs.sites.kubernetes import WORKER_LABELS, KubernetesSite, Toleration
from lorafleet.k8s import models
from lorafleet.k8s.models import Metadata, Mount, Variable, Volume

RUN_LABEL, ATTEMPT_LABEL, USER_LABEL = "lorafleet.dev/run", "lorafleet.dev/submission", "lorafleet.dev/user"
CALL_ANNOTATION = "lorafleet.dev/call"
CONFIG = "/etc/lorafleet"
GROUP = "workers"
HEAD, PORTER = "ray-head", "porter"
"""Containers in which commands are run."""
_LONGEST_NAME = 47
"""KubeRay refuses longer ones: it adds to them for its own objects (ValidateRayJobMetadata)."""
_LARGEST_DOCUMENT = 900_000
"""Bytes: a ConfigMap holds 1 MiB."""
_PLAIN = re.compile(r"[A-Za-z0-9 _./=:,@%+-]*")
"""What the submitter's bash leaves alone."""
_DRIVER = {"driver": 1}
_DASHBOARD, _GCS = 8265, 6379
_LATER = 30
"""Seconds that a pod has beyond those for saving."""


@dataclass(frozen=True)
class Order:
    """What the objects depend on beside the site."""

    run: str
    """The run's id."""
    submission: int
    """How often it was submitted, this time included."""
    nodes: int
    """Worker pods."""
    texts: Mapping[str, str]
    """The job by file, for the driver that has no run folder yet (`jobs.runs.bundle`)."""
    ray_version: str
    """Ray's, which must be the image's."""
    user: str
    """Who submits."""
    call: str = ""
    """What tells this call's objects from others with the same name; empty for a manifest that is kept."""


def object_name(run: str, submission: int) -> str:
    """The name of a run's objects: its id, shortened in the middle, and the number of the submission.

    Names are DNS-1035 labels of 47 characters at most; the six characters that tell runs apart stay.
    """
    slug, _, mark = run.rpartition("-")
    end = f"-{mark}-{submission}"
    start = re.sub(r"[^a-z0-9-]+", "-", slug.lower()).strip("-") or "run"
    if not start[0].isalpha():
        start = f"r-{start}"
    return start[: _LONGEST_NAME - len(end)].rstrip("-") + end


def run_folder(site: KubernetesSite, run: str) -> str:
    """Where pods see a run."""
    return f"{site.storage.mount_path}/runs/{run}"


def render(site: KubernetesSite, order: Order) -> list[dict[str, Any]]:
    """The objects in the order in which they are made, the RayJob last.

    Raises PlacementRefused where the job is too large for a ConfigMap, or the site's patch leaves no RayJob.
    """
    size = sum(len(text.encode()) for text in order.texts.values())
    if size > _LARGEST_DOCUMENT:
        raise PlacementRefused(
            f"the job has {size:,} bytes with the plan of its trials, and a ConfigMap holds {_LARGEST_DOCUMENT:,}: the "
            "search must have fewer trials"
        )
    meta = _metadata(site, order)
    config = models.ConfigMap(metadata=meta, data=dict(order.texts))
    job = models.RayJob(metadata=meta, spec=_spec(site, order)).tree()
    patched = merged(job, site.patch)
    for path in ("apiVersion", "kind", "metadata.name", "metadata.namespace"):
        if fields.get(patched, path) != fields.get(job, path):
            must = fields.get(job, path)
            raise PlacementRefused(f"patch of site {site.name} changes {path}, which must be {must}")
    policy = [_network_policy(site, order).tree()] if site.network_policy else []
    return [config.tree(), *policy, patched]


def to_yaml(objects: list[dict[str, Any]]) -> str:
    """One YAML file of several objects."""
    return "---\n".join(yaml.dump(tree, sort_keys=False, width=120, Dumper=_Plain) for tree in objects)


class _Plain(yaml.SafeDumper):
    """No anchors; texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A text as a block where it has lines."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _Plain.represent_text)


def merged(tree: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386): blocks are merged, null removes, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    both = dict(tree) if isinstance(tree, dict) else {}
    for key, value in patch.items():
        if value is None:
            both.pop(key, None)
        else:
            both[key] = merged(both.get(key), value)
    return both


def labels_of(site: KubernetesSite, order: Order) -> dict[str, str]:
    """What every object and every pod of a run carries."""
    return site.labels | {
        "app.kubernetes.io/name": "lorafleet",
        "app.kubernetes.io/managed-by": "lorafleet",
        RUN_LABEL: label(order.run),
        ATTEMPT_LABEL: str(order.submission),
        USER_LABEL: label(site.user or order.user),
    }


def label(text: str) -> str:
    """A text as the value of a label, as near as it may be."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:63].strip("-_.") or "unknown"


def _metadata(site: KubernetesSite, order: Order) -> Metadata:
    queue, labels = site.scheduler, labels_of(site, order)
    if queue.kind == "kueue":
        labels["kueue.x-k8s.io/queue-name"] = queue.queue
        if queue.priority_class:
            labels["kueue.x-k8s.io/priority-class"] = queue.priority_class
    elif queue.kind == "volcano":
        labels["volcano.sh/queue-name"] = queue.queue
    elif queue.kind == "yunikorn":
        labels |= {
            "ray.io/gang-scheduling-enabled": "true",
            "yunikorn.apache.org/app-id": object_name(order.run, order.submission),
            "yunikorn.apache.org/queue": queue.queue,
        }
    elif queue.kind == "kai":
        labels["kai.scheduler/queue"] = queue.queue
    return Metadata(
        name=object_name(order.run, order.submission),
        namespace=site.namespace,
        labels=labels,
        annotations=_call(order),
    )


def _call(order: Order) -> dict[str, str] | None:
    return {CALL_ANNOTATION: order.call} if order.call else None


def porter(site: KubernetesSite, name: str, user: str, seconds: int) -> dict[str, Any]:
    """A Job with one pod that sees the storage and waits: files go through it. It ends by itself after so long."""
    labels = site.labels | {
        "app.kubernetes.io/name": "lorafleet",
        "app.kubernetes.io/managed-by": "lorafleet",
        USER_LABEL: label(site.user or user),
    }
    own = labels | ({"kueue.x-k8s.io/queue-name": site.scheduler.queue} if site.scheduler.kind == "kueue" else {})
    size = {"cpu": "500m", "memory": "1Gi"}
    cache = f"{site.storage.mount_path}/cache"
    container = models.Container(
        name=PORTER,
        image=site.image,
        command=["sleep", str(seconds)],
        resources=models.Resources(requests=size, limits=size),
        env=[
            Variable(name="LORAFLEET_CACHE", value=cache),
            Variable(name="HF_HUB_CACHE", value=f"{cache}/hub"),
            Variable(name="LORAFLEET_TRUSTED_FOLDERS", value=site.storage.mount_path),
        ],
        security_context=_container_security(),
        volume_mounts=[mount for mount in _mounts(site) if mount.name != "job"],
    )
    volumes = [
        Volume(name="storage", persistent_volume_claim={"claimName": site.storage.claim}),
        Volume(name="tmp", empty_dir={}),
    ]
    spec = _pod(site, [container], site.head.node_selector, site.head.tolerations, None, volumes)
    spec = spec.model_copy(update={"restart_policy": "Never", "termination_grace_period_seconds": 1})
    template = models.Template(metadata=Metadata(labels=labels), spec=spec)
    return models.Job(
        metadata=Metadata(name=name, namespace=site.namespace, labels=own),
        spec=models.JobSpec(
            backoff_limit=0, active_deadline_seconds=seconds, ttl_seconds_after_finished=60, template=template
        ),
    ).tree()


def _spec(site: KubernetesSite, order: Order) -> models.RayJobSpec:
    limits = site.deadlines
    over_http = site.scheduler.kind == "kai"  # KAI refuses the submitter's pod
    return models.RayJobSpec(
        submission_mode="HTTPMode" if over_http else "K8sJobMode",
        entrypoint=entrypoint(["lorafleet", "exec", run_folder(site, order.run), "--job", f"{CONFIG}/{DOCUMENT}"]),
        entrypoint_resources=json.dumps(_DRIVER),
        metadata={"run": label(order.run), "submission": str(order.submission)},
        backoff_limit=limits.retries,
        active_deadline_seconds=round(limits.hours * 3600) if limits.hours else None,
        pre_running_deadline_seconds=round(limits.start_minutes * 60) if limits.start_minutes else None,
        submitter_config=None if over_http else {"backoffLimit": 3},
        submitter_pod_template=None if over_http else _submitter(site, order),
        **_clearing_up(site),
        ray_cluster_spec=_cluster(site, order),
    )


def entrypoint(words: list[str]) -> str:
    """A command that the submitter's bash, into which KubeRay pastes it, takes for these words and nothing else.

    Raises PlacementRefused for words with characters that it would expand.
    """
    for word in words:
        if not _PLAIN.fullmatch(word):
            raise PlacementRefused(f"{word!r} cannot be part of a job's command: a shell would read more than a word")
    return shlex.join(words)


def _clearing_up(site: KubernetesSite) -> dict[str, Any]:
    """When the cluster and the RayJob go. Kueue wants the older of the two ways (kueue#3994)."""
    keep = site.keep
    minutes = round(keep.cluster_minutes * 60)
    if site.scheduler.kind == "kueue":
        return {"shutdown_after_job_finishes": True, "ttl_seconds_after_finished": minutes}
    head_stays = round(keep.failed_cluster_minutes * 60)

    def rule(policy: str, seconds: int, **condition: str) -> dict[str, Any]:
        return {"policy": policy, "condition": {**condition, "ttlSeconds": seconds}}

    rules = [
        rule("DeleteCluster", minutes, jobStatus="SUCCEEDED"),
        rule("DeleteSelf", max(minutes, round(keep.object_days * 86400)), jobStatus="SUCCEEDED"),
    ]
    # At a deadline only the second condition holds, and what the driver does would go on for as long as its pods live.
    for condition in ({"jobStatus": "FAILED"}, {"jobDeploymentStatus": "Failed"}):
        if site.autoscale:  # DeleteWorkers is refused with it
            rules.append(rule("DeleteCluster", 0, **condition))
        else:
            rules += [rule("DeleteWorkers", 0, **condition), rule("DeleteCluster", head_stays, **condition)]
    return {"deletion_strategy": {"deletionRules": rules}}


def _cluster(site: KubernetesSite, order: Order) -> models.RayCluster:
    return models.RayCluster(
        ray_version=order.ray_version,
        enable_in_tree_autoscaling=site.autoscale,
        autoscaler_options=_autoscaler() if site.autoscale else None,
        auth_options={"mode": "token"},
        head_group_spec=_head(site, order),
        worker_group_specs=[_workers(site, order)],
    )


def _autoscaler() -> dict[str, Any]:
    """Of the container that KubeRay puts beside the head."""
    return {"version": "v2", "idleTimeoutSeconds": 120, "securityContext": _container_security()}


def _head(site: KubernetesSite, order: Order) -> models.HeadGroup:
    head = site.head
    size = {"cpu": str(head.cpus), "memory": _mib(head.memory_gb), "ephemeral-storage": _mib(head.ephemeral_gb)}
    container = models.Container(
        name=HEAD,
        image=site.image,
        ports=[
            {"name": "gcs-server", "containerPort": _GCS},
            {"name": "dashboard", "containerPort": _DASHBOARD},
        ],
        resources=models.Resources(requests=size, limits=size),
        env=_environment(site, order, head=True),
        security_context=_container_security(),
        lifecycle=_before_the_end(site, order, []),
        volume_mounts=_mounts(site),
    )
    spec = _pod(site, [container], head.node_selector, head.tolerations, head.priority_class, _volumes(site, order))
    if site.autoscale:  # KubeRay makes a service account for the autoscaler beside the head
        spec = spec.model_copy(update={"restart_policy": "Never", "automount_service_account_token": None})
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    return models.HeadGroup(
        ray_start_params={
            "num-cpus": "0",
            "num-gpus": "0",
            "resources": f"'{json.dumps(_DRIVER)}'",  # through a shell
            "dashboard-host": "0.0.0.0",  # nosec B104  # the pod's, behind the network policy
        },
        template=models.Template(metadata=Metadata(labels=labels_of(site, order), annotations=annotations), spec=spec),
    )


def _workers(site: KubernetesSite, order: Order) -> models.WorkerGroup:
    size = {
        "cpu": str(site.cpus_per_node),
        "memory": _mib(site.memory_gb_per_node),
        "ephemeral-storage": _mib(site.ephemeral_gb_per_node),
    }
    if site.gpus_per_node:
        size[site.gpu_resource] = str(site.gpus_per_node)
    network, annotations = site.network, {}
    if network.rdma_resource:
        size[network.rdma_resource] = str(network.rdma_count)
    if network.attach:
        annotations["k8s.v1.cni.cncf.io/networks"] = network.attach
    queue = site.scheduler
    if queue.kind == "kueue" and queue.topology:
        kind = "required" if queue.topology_required else "preferred"
        annotations[f"kueue.x-k8s.io/podset-{kind}-topology"] = queue.topology
    shared = site.shared_memory_gb or 0.3 * site.memory_gb_per_node
    container = models.Container(
        name="ray-worker",
        image=site.image,
        resources=models.Resources(requests=size, limits=size),
        env=_environment(site, order, head=False),
        security_context=_container_security(add=("IPC_LOCK",) if network.rdma_resource else ()),
        lifecycle=_before_the_end(site, order, ["--drain"]),
        volume_mounts=[*_mounts(site), Mount(name="shm", mount_path="/dev/shm")],  # nosec B108  # the pod's own
    )
    memory = Volume(name="shm", empty_dir={"medium": "Memory", "sizeLimit": _mib(shared)})
    spec = _pod(
        site, [container], site.node_selector, site.tolerations, site.priority_class, [*_volumes(site, order), memory]
    )
    if site.autoscale:
        spec = spec.model_copy(update={"restart_policy": "Never"})
    if not site.storage.read_write_many:
        spec = spec.model_copy(update={"affinity": _on_the_heads_node(order)})
    labels = labels_of(site, order) | {"lorafleet.dev/group": GROUP}
    return models.WorkerGroup(
        group_name=GROUP,
        replicas=1 if site.autoscale else order.nodes,
        min_replicas=1 if site.autoscale else order.nodes,
        max_replicas=order.nodes,
        ray_start_params={},
        labels=WORKER_LABELS,
        template=models.Template(metadata=Metadata(labels=labels, annotations=annotations or None), spec=spec),
    )


def _on_the_heads_node(order: Order) -> dict[str, Any]:
    """A volume that one node may have at a time: the worker goes where the head is."""
    head = {"matchLabels": {RUN_LABEL: label(order.run), "ray.io/node-type": "head"}}
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": head}
    return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def _submitter(site: KubernetesSite, order: Order) -> models.Template:
    """KubeRay's own would have no security context, no registry secret and no service account."""
    size = {"cpu": "500m", "memory": "1Gi"}
    container = models.Container(
        name="ray-job-submitter",
        image=site.image,
        resources=models.Resources(requests=size, limits=size),
        security_context=_container_security(),
    )
    spec = _pod(site, [container], site.head.node_selector, site.head.tolerations, None, None)
    spec = spec.model_copy(update={"restart_policy": "Never", "termination_grace_period_seconds": None})
    return models.Template(metadata=Metadata(labels=labels_of(site, order)), spec=spec)


def _pod(
    site: KubernetesSite,
    containers: list[models.Container],
    node_selector: dict[str, str],
    tolerations: tuple[Toleration, ...],
    priority_class: str | None,
    volumes: list[Volume] | None,
) -> models.PodSpec:
    return models.PodSpec(
        service_account_name=site.service_account,
        automount_service_account_token=False,
        image_pull_secrets=[{"name": name} for name in site.pull_secrets] or None,
        priority_class_name=priority_class,
        termination_grace_period_seconds=site.deadlines.save_seconds + _LATER,
        node_selector=node_selector or None,
        tolerations=[one.tree() for one in tolerations] or None,
        security_context={
            "runAsNonRoot": True,
            "runAsUser": site.run_as_user,
            "runAsGroup": site.run_as_group,
            "fsGroup": site.run_as_group,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        containers=containers,
        volumes=volumes,
    )


def _container_security(add: tuple[str, ...] = ()) -> dict[str, Any]:
    capabilities: dict[str, Any] = {"drop": ["ALL"]}
    if add:
        capabilities["add"] = list(add)
    return {"allowPrivilegeEscalation": False, "capabilities": capabilities}


def _before_the_end(site: KubernetesSite, order: Order, options: list[str]) -> models.Lifecycle:
    """A pod that is taken away has its trials saved first."""
    seconds = str(site.deadlines.save_seconds)
    command = ["lorafleet", "node", "leave", run_folder(site, order.run), *options, "--seconds", seconds]
    return models.Lifecycle(pre_stop=models.Handler(exec=models.Exec(command=command)))


def _mounts(site: KubernetesSite) -> list[Mount]:
    storage = site.storage
    return [
        Mount(name="job", mount_path=CONFIG, read_only=True),
        Mount(name="storage", mount_path=storage.mount_path, sub_path=storage.sub_path),
        Mount(name="tmp", mount_path="/tmp"),  # nosec B108  # the pod's own
    ]


def _volumes(site: KubernetesSite, order: Order) -> list[Volume]:
    return [
        Volume(name="job", config_map={"name": object_name(order.run, order.submission)}),
        Volume(name="storage", persistent_volume_claim={"claimName": site.storage.claim}),
        Volume(name="tmp", empty_dir={}),
    ]


def _environment(site: KubernetesSite, order: Order, *, head: bool) -> list[Variable]:
    cache = f"{site.storage.mount_path}/cache"
    own = {
        "LORAFLEET_CACHE": cache,
        "LORAFLEET_TRUSTED_FOLDERS": site.storage.mount_path,
        "HF_HUB_CACHE": f"{cache}/hub",
        "HF_HOME": "/tmp/huggingface",  # nosec B108  # the pod's own
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "LF_NODES": str(order.nodes),
    }
    if not site.internet:
        own |= OFFLINE
    if site.autoscale:
        own["LF_AUTOSCALES"] = "1"
    if head:
        own["RAY_JOB_STOP_WAIT_TIME_S"] = str(site.deadlines.save_seconds)  # three seconds, if it is not said
    else:
        if site.network.interface:
            own |= {"NCCL_SOCKET_IFNAME": site.network.interface, "GLOO_SOCKET_IFNAME": site.network.interface}
        if site.network.ib_hca:
            own["NCCL_IB_HCA"] = site.network.ib_hca
        if site.gpus_per_node:
            own |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    told = {name: value for name, value in (own | site.environment).items() if name not in site.secrets}
    values = [Variable(name=name, value=_literal(value)) for name, value in told.items()]
    refs = [
        Variable(
            name=name,
            value_from=models.ValueFrom(
                secret_key_ref=models.KeyRef(name=ref.name, key=ref.key, optional=ref.optional or None)
            ),
        )
        for name, ref in site.secrets.items()
    ]
    return values + refs


def _literal(value: str) -> str:
    """A value as it is: Kubernetes would put other variables in the place of $(NAME)."""
    return value.replace("$(", "$$(")


def _mib(gigabytes: float) -> str:
    return f"{int(gigabytes * 1e9 / 2**20)}Mi"


def _network_policy(site: KubernetesSite, order: Order) -> models.NetworkPolicy:
    """Into a run's pods come its own pods, and to the dashboard the operator."""
    own = {"matchLabels": {RUN_LABEL: label(order.run)}}
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": site.operator_labels}}
    return models.NetworkPolicy(
        metadata=Metadata(
            name=object_name(order.run, order.submission),
            namespace=site.namespace,
            labels=labels_of(site, order),
            annotations=_call(order),
        ),
        spec=models.NetworkPolicySpec(
            pod_selector=own,
            policy_types=["Ingress"],
            ingress=[
                {"from": [{"podSelector": own}]},
                {"from": [operator], "ports": [{"protocol": "TCP", "port": _DASHBOARD}]},
            ],
        ),
    )
