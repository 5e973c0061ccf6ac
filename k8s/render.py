"""Render the Kubernetes objects of a job from its request and its site.

Pure: no clock, no randomness. Each submission of a run is a RayJob, with a ConfigMap
that holds the job and a NetworkPolicy.
"""

from __future__ import annotations

import copy
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
from lorafleet.jobs.sites.kubernetes import (
    WORKER_LABELS,
    KubernetesSite,
    PodSettings,
    Toleration,
)
from lorafleet.k8s import models
from lorafleet.k8s.models import Metadata, Mount, Variable, Volume

RUN_LABEL, ATTEMPT_LABEL, USER_LABEL = (
    "lorafleet.dev/run",
    "lorafleet.dev/submission",
    "lorafleet.dev/user",
)
CALL_ANNOTATION = "lorafleet.dev/call"
CONFIG = "/etc/lorafleet"
GROUP = "workers"
HEAD, STORAGE_POD = "ray-head", "porter"
"""Names of the containers in which commands are run."""
_MAX_NAME_LENGTH = 47
"""Largest length of a name. KubeRay refuses longer ones, since it appends to them for its
own objects (ValidateRayJobMetadata).
"""
_MAX_DOCUMENT_BYTES = 900_000
"""Largest size in bytes of the job's files. A ConfigMap holds 1 MiB."""
_SHELL_SAFE = re.compile(r"[A-Za-z0-9 _./=:,@%+-]*")
"""Characters that the submitter's bash does not expand."""
# The head offers this resource and the driver requires it, so that Ray starts the driver there.
_DRIVER_RESOURCE = {"driver": 1}
_DASHBOARD_PORT, _GCS_PORT = 8265, 6379
_EXTRA_GRACE_SECONDS = 30
"""Seconds of a pod's grace period in addition to the time for saving."""


@dataclass(frozen=True)
class RenderContext:
    """Values besides the site that the objects depend on."""

    run: str
    """Id of the run."""
    submission: int
    """Number of this submission of the run, starting at 1."""
    nodes: int
    """Number of worker pods."""
    texts: Mapping[str, str]
    """File name -> text of the job, for a driver without a run folder (`jobs.runs.bundle`)."""
    ray_version: str
    """Version of Ray. The image must have the same one."""
    user: str
    """User who submits."""
    call: str = ""
    """Id that distinguishes the objects of this call from others with the same name. Empty for
    a manifest that is stored.
    """


def make_object_name(run: str, submission: int) -> str:
    """Return the name of a run's objects: its id and the submission number.

    Names are DNS-1035 labels of at most 47 characters, so the id is shortened in the middle
    if needed. The six characters that make a run's id unique are kept. The name is the same
    at each call: a repeated submission conflicts with its own objects instead of creating
    others.
    """
    slug, _, suffix = run.rpartition("-")
    end = f"-{suffix}-{submission}"
    prefix = re.sub(r"[^a-z0-9-]+", "-", slug.lower()).strip("-") or "run"
    if not prefix[0].isalpha():
        prefix = f"r-{prefix}"
    return prefix[: _MAX_NAME_LENGTH - len(end)].rstrip("-") + end


def get_run_folder(site: KubernetesSite, run: str) -> str:
    """Return the path of a run inside the pods."""
    return f"{site.storage.mount_path}/runs/{run}"


def render(site: KubernetesSite, context: RenderContext) -> list[dict[str, Any]]:
    """Return the objects in the order of their creation, the RayJob last.

    Raises:
        PlacementRefused: The job is too large for a ConfigMap, or the site's patch changes
            the identity of the RayJob.
    """
    size = sum(len(text.encode()) for text in context.texts.values())
    if size > _MAX_DOCUMENT_BYTES:
        raise PlacementRefused(
            f"the job has {size:,} bytes including the plan of its trials, but a ConfigMap holds "
            f"only {_MAX_DOCUMENT_BYTES:,}: use fewer trials (search.num_samples)"
        )
    metadata = _build_metadata(site, context)
    config = models.ConfigMap(metadata=metadata, data=dict(context.texts))
    job = models.RayJob(metadata=metadata, spec=_build_spec(site, context)).to_tree()
    patched = apply_patch(job, site)
    for path in ("apiVersion", "kind", "metadata.name", "metadata.namespace"):
        # `status`, `stop` and `resume` find the RayJob by these values.
        if fields.get_value(patched, path) != fields.get_value(job, path):
            expected = fields.get_value(job, path)
            raise PlacementRefused(
                f"patch of site {site.name} changes {path}, which must be {expected}"
            )
    policy = [_build_network_policy(site, context).to_tree()] if site.network_policy else []
    # The pods mount the ConfigMap and must never be reachable without the policy, so both come
    # first.
    return [config.to_tree(), *policy, patched]


def to_yaml(objects: list[dict[str, Any]]) -> str:
    """Return one YAML text of several objects.

    Keys keep the order of the models, and no anchors are written, so that people and `git
    diff` can compare manifests.
    """
    return "---\n".join(
        yaml.dump(tree, sort_keys=False, width=120, Dumper=_ManifestDumper) for tree in objects
    )


class _ManifestDumper(yaml.SafeDumper):
    """YAML dumper without anchors that writes multi-line texts as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Represent a text, as a block if it has several lines."""
        return self.represent_scalar(
            "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
        )


_ManifestDumper.add_representer(str, _ManifestDumper.represent_text)


def apply_patch(job: dict[str, Any], site: KubernetesSite) -> dict[str, Any]:
    """Return the RayJob with the site's patch: a JSON Patch if it is a list, else a merge patch.

    Raises:
        PlacementRefused: An operation of the JSON Patch is malformed, or its path does not exist.
    """
    if isinstance(site.patch, dict):
        patched: dict[str, Any] = apply_merge_patch(job, site.patch)
        return patched
    import jsonpatch

    try:
        result = jsonpatch.apply_patch(job, site.patch)
    except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException, TypeError) as error:
        reason = " ".join(str(error).split())
        raise PlacementRefused(f"patch of site {site.name} cannot be applied: {reason}") from error
    if not isinstance(result, dict):
        raise PlacementRefused(f"patch of site {site.name} replaces the RayJob by something else")
    return result


def apply_merge_patch(tree: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7386).

    Objects are merged, null removes a key, and everything else replaces the old value.
    """
    if not isinstance(patch, dict):
        return patch
    result = dict(tree) if isinstance(tree, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = apply_merge_patch(result.get(key), value)
    return result


def build_labels(site: KubernetesSite, context: RenderContext) -> dict[str, str]:
    """Return the labels of every object and every pod of a run."""
    # The site's labels come first: they must not replace those by which runs are found.
    return site.labels | {
        "app.kubernetes.io/name": "lorafleet",
        "app.kubernetes.io/managed-by": "lorafleet",
        RUN_LABEL: to_label_value(context.run),
        ATTEMPT_LABEL: str(context.submission),
        USER_LABEL: to_label_value(site.user or context.user),
    }


def to_label_value(text: str) -> str:
    """Convert a text to a valid label value, replacing and cutting characters as needed.

    Ids of runs are valid values as they are. Names of users may not be, and different ones
    can give the same value.
    """
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:63].strip("-_.") or "unknown"


def _build_metadata(site: KubernetesSite, context: RenderContext) -> Metadata:
    """Return the metadata of a run's objects, with the labels of the site's queue."""
    queue, labels = site.scheduler, build_labels(site, context)
    if queue.kind == "kueue":
        labels["kueue.x-k8s.io/queue-name"] = queue.queue
        if queue.priority_class:
            labels["kueue.x-k8s.io/priority-class"] = queue.priority_class
    elif queue.kind == "volcano":
        labels["volcano.sh/queue-name"] = queue.queue
    elif queue.kind == "yunikorn":
        labels |= {
            "ray.io/gang-scheduling-enabled": "true",
            "yunikorn.apache.org/app-id": make_object_name(context.run, context.submission),
            "yunikorn.apache.org/queue": queue.queue,
        }
    elif queue.kind == "kai":
        labels["kai.scheduler/queue"] = queue.queue
    return Metadata(
        name=make_object_name(context.run, context.submission),
        namespace=site.namespace,
        labels=labels,
        annotations=_build_call_annotation(context),
    )


def _build_call_annotation(context: RenderContext) -> dict[str, str] | None:
    """Return the annotation with the id of the call, or None."""
    return {CALL_ANNOTATION: context.call} if context.call else None


def render_storage_pod(site: KubernetesSite, name: str, user: str, seconds: int) -> dict[str, Any]:
    """Return a Job with one idle pod that mounts the storage, for file transfers.

    Args:
        site: The site.
        name: Name of the Job, unique for each call.
        user: Local account, if the site names no user.
        seconds: Lifetime: the pod ends by itself after it, even if nobody deletes the Job.
    """
    labels = site.labels | {
        "app.kubernetes.io/name": "lorafleet",
        "app.kubernetes.io/managed-by": "lorafleet",
        USER_LABEL: to_label_value(site.user or user),
    }
    job_labels = labels | (
        {"kueue.x-k8s.io/queue-name": site.scheduler.queue}
        if site.scheduler.kind == "kueue"
        else {}
    )
    size = {"cpu": "500m", "memory": "1Gi"}
    cache = f"{site.storage.mount_path}/cache"
    container = models.Container(
        name=STORAGE_POD,
        image=site.image,
        command=["sleep", str(seconds)],
        resources=models.Resources(requests=size, limits=size),
        env=[
            Variable(name="LORAFLEET_CACHE", value=cache),
            Variable(name="HF_HUB_CACHE", value=f"{cache}/hub"),
            Variable(name="LORAFLEET_TRUSTED_FOLDERS", value=site.storage.mount_path),
        ],
        security_context=_build_container_security(),
        volume_mounts=[mount for mount in _build_mounts(site) if mount.name != "job"],
    )
    volumes = [
        Volume(name="storage", persistent_volume_claim={"claimName": site.storage.claim}),
        Volume(name="tmp", empty_dir={}),
    ]
    spec = _build_pod_spec(
        site, [container], site.head.node_selector, site.head.tolerations, None, volumes
    )
    spec = spec.model_copy(
        # As process 1, `sleep` ignores SIGTERM: its deletion would take the whole grace period.
        update={"restart_policy": "Never", "termination_grace_period_seconds": 1}
    )
    template = models.Template(
        metadata=Metadata(labels=labels, annotations=site.annotations or None), spec=spec
    )
    return models.Job(
        metadata=Metadata(name=name, namespace=site.namespace, labels=job_labels),
        spec=models.JobSpec(
            backoff_limit=0,
            active_deadline_seconds=seconds,
            ttl_seconds_after_finished=60,
            template=template,
        ),
    ).to_tree()


def _build_spec(site: KubernetesSite, context: RenderContext) -> models.RayJobSpec:
    """Return the spec of the RayJob."""
    deadlines = site.deadlines
    over_http = site.scheduler.kind == "kai"  # KAI refuses the submitter pod
    return models.RayJobSpec(
        submission_mode="HTTPMode" if over_http else "K8sJobMode",
        entrypoint=format_entrypoint(
            [
                "lorafleet",
                "exec",
                get_run_folder(site, context.run),
                "--job",
                f"{CONFIG}/{DOCUMENT}",
            ]
        ),
        entrypoint_resources=json.dumps(_DRIVER_RESOURCE),
        metadata={"run": to_label_value(context.run), "submission": str(context.submission)},
        backoff_limit=deadlines.retries,
        active_deadline_seconds=round(deadlines.hours * 3600) if deadlines.hours else None,
        pre_running_deadline_seconds=round(deadlines.start_minutes * 60)
        if deadlines.start_minutes
        else None,
        submitter_config=None if over_http else {"backoffLimit": 3},
        submitter_pod_template=None if over_http else _build_submitter(site, context),
        **_build_cleanup(site),
        ray_cluster_spec=_build_cluster(site, context),
    )


def format_entrypoint(arguments: list[str]) -> str:
    """Return a shell command for these arguments.

    KubeRay pastes it unquoted into a bash script of the submitter, so quoting alone is not
    trusted: characters that mean something to bash are refused.

    Raises:
        PlacementRefused: An argument has such a character.
    """
    for argument in arguments:
        if not _SHELL_SAFE.fullmatch(argument):
            raise PlacementRefused(
                f"{argument!r} cannot be part of a job's command, because a shell would not read "
                "it as one word: use only letters, digits and ./_-"
            )
    return shlex.join(arguments)


def _build_cleanup(site: KubernetesSite) -> dict[str, Any]:
    """Return the fields that say when the cluster and the RayJob are deleted.

    Kueue only supports the older of KubeRay's two mechanisms (kueue#3994).
    """
    keep = site.keep
    success_seconds = round(keep.cluster_minutes * 60)
    if site.scheduler.kind == "kueue":
        return {"shutdown_after_job_finishes": True, "ttl_seconds_after_finished": success_seconds}
    failed_seconds = round(keep.failed_cluster_minutes * 60)

    def make_rule(policy: str, seconds: int, **condition: str) -> dict[str, Any]:
        return {"policy": policy, "condition": {**condition, "ttlSeconds": seconds}}

    rules = [
        make_rule("DeleteCluster", success_seconds, jobStatus="SUCCEEDED"),
        make_rule(
            "DeleteSelf",
            max(success_seconds, round(keep.object_days * 86400)),
            jobStatus="SUCCEEDED",
        ),
    ]
    # At a deadline only the second condition holds. Without it the driver would run on until its
    # pods are deleted.
    for condition in ({"jobStatus": "FAILED"}, {"jobDeploymentStatus": "Failed"}):
        if site.autoscale:  # KubeRay refuses DeleteWorkers with autoscaling
            rules.append(make_rule("DeleteCluster", 0, **condition))
        else:
            rules += [
                make_rule("DeleteWorkers", 0, **condition),
                make_rule("DeleteCluster", failed_seconds, **condition),
            ]
    return {"deletion_strategy": {"deletionRules": rules}}


def _build_cluster(site: KubernetesSite, context: RenderContext) -> models.RayCluster:
    """Return the Ray cluster of the RayJob."""
    return models.RayCluster(
        ray_version=context.ray_version,
        enable_in_tree_autoscaling=site.autoscale,
        autoscaler_options=_build_autoscaler_options() if site.autoscale else None,
        # Explicit, because the default changes with the version of Ray: 2.61 switches tokens on for
        # all clusters.
        auth_options={"mode": "token"},
        head_group_spec=_build_head(site, context),
        worker_group_specs=[_build_workers(site, context)],
    )


def _build_autoscaler_options() -> dict[str, Any]:
    """Return the options of the autoscaler container that KubeRay adds to the head."""
    return {
        "version": "v2",
        "idleTimeoutSeconds": 120,
        # PodSecurity `restricted` refuses a container without one, and KubeRay's default has none.
        "securityContext": _build_container_security(),
    }


def _build_head(site: KubernetesSite, context: RenderContext) -> models.HeadGroup:
    """Return the head group of the cluster."""
    head = site.head
    resources = {
        "cpu": str(head.cpus),
        "memory": _format_mib(head.memory_gb),
        "ephemeral-storage": _format_mib(head.ephemeral_gb),
    }
    container = models.Container(
        name=HEAD,
        image=site.image,
        ports=[
            {"name": "gcs-server", "containerPort": _GCS_PORT},
            {"name": "dashboard", "containerPort": _DASHBOARD_PORT},
        ],
        resources=models.Resources(requests=resources, limits=resources),
        env=_build_environment(site, context, head=True),
        security_context=_build_container_security(),
        lifecycle=_build_pre_stop_hook(site, context, []),
        volume_mounts=_build_mounts(site),
    )
    spec = _build_pod_spec(
        site,
        [container],
        head.node_selector,
        head.tolerations,
        head.priority_class,
        _build_volumes(site, context),
    )
    if site.autoscale:  # KubeRay creates a service account for the autoscaler
        spec = spec.model_copy(
            update={"restart_policy": "Never", "automount_service_account_token": None}
        )
    spec = _apply_settings(spec, container, head.pod)
    return models.HeadGroup(
        ray_start_params={
            "num-cpus": "0",
            "num-gpus": "0",
            # Quoted: KubeRay passes it through a shell.
            "resources": f"'{json.dumps(_DRIVER_RESOURCE)}'",
            "dashboard-host": "0.0.0.0",  # nosec B104  # inside the pod, behind the network policy
        },
        template=models.Template(
            metadata=Metadata(
                labels=head.pod.labels | build_labels(site, context),
                annotations=_build_annotations(site, head.pod),
            ),
            spec=spec,
        ),
    )


def _build_workers(site: KubernetesSite, context: RenderContext) -> models.WorkerGroup:
    """Return the worker group of the cluster."""
    resources = {
        "cpu": str(site.cpus_per_node),
        "memory": _format_mib(site.memory_gb_per_node),
        "ephemeral-storage": _format_mib(site.ephemeral_gb_per_node),
    }
    if site.gpus_per_node:
        resources[site.gpu_resource] = str(site.gpus_per_node)
    network, annotations = site.network, {}
    if network.rdma_resource:
        resources[network.rdma_resource] = str(network.rdma_count)
    if network.attach:
        annotations["k8s.v1.cni.cncf.io/networks"] = network.attach
    queue = site.scheduler
    if queue.kind == "kueue" and queue.topology:
        kind = "required" if queue.topology_required else "preferred"
        annotations[f"kueue.x-k8s.io/podset-{kind}-topology"] = queue.topology
    shared_memory_gb = site.shared_memory_gb or 0.3 * site.memory_gb_per_node
    container = models.Container(
        name="ray-worker",
        image=site.image,
        resources=models.Resources(requests=resources, limits=resources),
        env=_build_environment(site, context, head=False),
        security_context=_build_container_security(
            add=("IPC_LOCK",) if network.rdma_resource else ()
        ),
        lifecycle=_build_pre_stop_hook(site, context, ["--drain"]),
        volume_mounts=[
            *_build_mounts(site),
            Mount(name="shm", mount_path="/dev/shm"),  # nosec B108  # the pod's own
        ],
    )
    # Without this, KubeRay mounts /dev/shm with the size of the whole memory limit.
    memory = Volume(
        name="shm", empty_dir={"medium": "Memory", "sizeLimit": _format_mib(shared_memory_gb)}
    )
    spec = _build_pod_spec(
        site,
        [container],
        site.node_selector,
        site.tolerations,
        site.priority_class,
        [*_build_volumes(site, context), memory],
    )
    if site.autoscale:
        spec = spec.model_copy(update={"restart_policy": "Never"})
    if not site.storage.read_write_many:
        spec = spec.model_copy(update={"affinity": _build_head_affinity(context)})
    spec = _apply_settings(spec, container, site.pod)
    labels = site.pod.labels | build_labels(site, context) | {"lorafleet.dev/group": GROUP}
    return models.WorkerGroup(
        group_name=GROUP,
        replicas=1 if site.autoscale else context.nodes,
        min_replicas=1 if site.autoscale else context.nodes,
        max_replicas=context.nodes,
        ray_start_params={},
        labels=WORKER_LABELS,
        template=models.Template(
            metadata=Metadata(
                labels=labels, annotations=_build_annotations(site, site.pod) | annotations
            ),
            spec=spec,
        ),
    )


def _build_head_affinity(context: RenderContext) -> dict[str, Any]:
    """Return the affinity that puts workers on the head's node.

    It is needed for a volume that only one node can mount at a time.
    """
    head = {"matchLabels": {RUN_LABEL: to_label_value(context.run), "ray.io/node-type": "head"}}
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": head}
    return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def _build_submitter(site: KubernetesSite, context: RenderContext) -> models.Template:
    """Return the pod template of the submitter.

    KubeRay's default has no security context, no registry secret and no service account.
    """
    resources = {"cpu": "500m", "memory": "1Gi"}
    container = models.Container(
        name="ray-job-submitter",
        image=site.image,
        resources=models.Resources(requests=resources, limits=resources),
        security_context=_build_container_security(),
    )
    spec = _build_pod_spec(
        site, [container], site.head.node_selector, site.head.tolerations, None, None
    )
    spec = spec.model_copy(
        update={"restart_policy": "Never", "termination_grace_period_seconds": None}
    )
    return models.Template(
        metadata=Metadata(
            labels=build_labels(site, context), annotations=_build_annotations(site, PodSettings())
        ),
        spec=spec,
    )


def _build_annotations(site: KubernetesSite, settings: PodSettings) -> dict[str, str]:
    """Return the annotations of a pod of a job: nodes are not emptied while it runs.

    Moving the head costs an attempt, moving a worker a trial's progress since its checkpoint,
    and the end of the submitter's log stream can end the job. A site may say otherwise.
    """
    keep = {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }
    return keep | site.annotations | settings.annotations


def _apply_settings(
    spec: models.PodSpec, container: models.Container, settings: PodSettings
) -> models.PodSpec:
    """Return the spec of a pod with the site's further settings.

    Args:
        spec: The spec, whose only container is `container`.
        container: Ray's container, which comes first: KubeRay takes it for Ray.
        settings: The settings.
    """
    pages = {f"hugepages-{size}": amount for size, amount in settings.hugepages.items()}
    claims = [{"name": claim.name} for claim in settings.resource_claims]
    resources = models.Resources(
        requests=container.resources.requests | pages,
        limits=container.resources.limits | pages,
        claims=claims or None,
    )
    mounts = [
        Mount(
            name=mount.name,
            mount_path=mount.mount_path,
            sub_path=mount.sub_path,
            read_only=mount.read_only or None,
        )
        for mount in settings.mounts
    ]
    container = container.model_copy(
        update={
            "resources": resources,
            "volume_mounts": [*(container.volume_mounts or []), *mounts],
        }
    )
    sidecars = [
        {"securityContext": _build_container_security(), **sidecar} for sidecar in settings.sidecars
    ]
    return spec.model_copy(
        update={
            "containers": [container, *sidecars],
            "volumes": [*(spec.volumes or []), *settings.volumes],
            "affinity": _merge_affinity(spec.affinity, settings.affinity),
            "topology_spread_constraints": list(settings.topology_spread) or None,
            "runtime_class_name": settings.runtime_class,
            "resource_claims": [
                {
                    "name": claim.name,
                    **(
                        {"resourceClaimName": claim.claim}
                        if claim.claim
                        else {"resourceClaimTemplateName": claim.template or ""}
                    ),
                }
                for claim in settings.resource_claims
            ]
            or None,
        }
    )


def _merge_affinity(
    required: dict[str, Any] | None, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the site's affinity with the terms that a job itself needs added."""
    merged: dict[str, Any] = copy.deepcopy(settings)
    for kind, rules in (required or {}).items():
        for rule, terms in rules.items():
            group = merged.setdefault(kind, {})
            group[rule] = [*group.get(rule, []), *terms]
    return merged or None


def _build_pod_spec(
    site: KubernetesSite,
    containers: list[models.Container],
    node_selector: dict[str, str],
    tolerations: tuple[Toleration, ...],
    priority_class: str | None,
    volumes: list[Volume] | None,
) -> models.PodSpec:
    """Return a pod spec with the site's security settings."""
    return models.PodSpec(
        service_account_name=site.service_account,
        # Trials run code of models and metrics, which has no business with the API server.
        automount_service_account_token=False,
        image_pull_secrets=[{"name": name} for name in site.pull_secrets] or None,
        priority_class_name=priority_class,
        termination_grace_period_seconds=site.deadlines.save_seconds + _EXTRA_GRACE_SECONDS,
        node_selector=node_selector or None,
        tolerations=_list_tolerations(site, tolerations),
        security_context={
            "runAsNonRoot": True,
            "runAsUser": site.run_as_user,
            "runAsGroup": site.run_as_group,
            "fsGroup": site.run_as_group,
            # Otherwise each start of a pod changes the group of every file on the volume.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        containers=containers,
        volumes=volumes,
    )


def _list_tolerations(
    site: KubernetesSite, tolerations: tuple[Toleration, ...]
) -> list[dict[str, str | int]]:
    """Return the site's tolerations, and how long pods stay on a node that is lost.

    Kubernetes adds its own 300 seconds for these two taints, unless a pod tolerates them itself.
    """
    lost = (
        Toleration(key=key, effect="NoExecute", toleration_seconds=site.deadlines.lost_node_seconds)
        for key in _LOST_NODE_TAINTS
    )
    # Another effect is another taint.
    site_keys = {item.key for item in tolerations if item.effect in ("NoExecute", None)}
    defaults = [toleration for toleration in lost if toleration.key not in site_keys]
    return [toleration.to_dict() for toleration in (*tolerations, *defaults)]


_LOST_NODE_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def _build_container_security(add: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the security context of a container, with additional capabilities."""
    capabilities: dict[str, Any] = {"drop": ["ALL"]}
    if add:
        capabilities["add"] = list(add)
    return {"allowPrivilegeEscalation": False, "capabilities": capabilities}


def _build_pre_stop_hook(
    site: KubernetesSite, context: RenderContext, options: list[str]
) -> models.Lifecycle:
    """Return the hook that saves the trials before a pod is deleted or preempted."""
    seconds = str(site.deadlines.save_seconds)
    command = [
        "lorafleet",
        "node",
        "leave",
        get_run_folder(site, context.run),
        *options,
        "--seconds",
        seconds,
    ]
    return models.Lifecycle(pre_stop=models.Handler(exec=models.Exec(command=command)))


def _build_mounts(site: KubernetesSite) -> list[Mount]:
    """Return the volume mounts of a container."""
    storage = site.storage
    return [
        Mount(name="job", mount_path=CONFIG, read_only=True),
        Mount(name="storage", mount_path=storage.mount_path, sub_path=storage.sub_path),
        Mount(name="tmp", mount_path="/tmp"),  # nosec B108  # the pod's own
    ]


def _build_volumes(site: KubernetesSite, context: RenderContext) -> list[Volume]:
    """Return the volumes of a pod."""
    return [
        Volume(name="job", config_map={"name": make_object_name(context.run, context.submission)}),
        Volume(name="storage", persistent_volume_claim={"claimName": site.storage.claim}),
        Volume(name="tmp", empty_dir={}),
    ]


def _build_environment(
    site: KubernetesSite, context: RenderContext, *, head: bool
) -> list[Variable]:
    """Return the environment variables of a container."""
    cache = f"{site.storage.mount_path}/cache"
    defaults = {
        "LORAFLEET_CACHE": cache,
        # The volume may belong to another user id, or be writable by its group. A pod has no names
        # of users and groups by which these could be judged.
        "LORAFLEET_TRUSTED_FOLDERS": site.storage.mount_path,
        "HF_HUB_CACHE": f"{cache}/hub",
        "HF_HOME": "/tmp/huggingface",  # nosec B108  # the pod's own
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "LF_NODES": str(context.nodes),
    }
    if not site.internet:
        defaults |= OFFLINE
    if site.autoscale:
        defaults["LF_AUTOSCALES"] = "1"
    if head:
        defaults["RAY_JOB_STOP_WAIT_TIME_S"] = str(
            site.deadlines.save_seconds
        )  # Ray's default is 3 seconds
    else:
        if site.network.interface:
            defaults |= {
                "NCCL_SOCKET_IFNAME": site.network.interface,
                "GLOO_SOCKET_IFNAME": site.network.interface,
            }
        if site.network.ib_hca:
            defaults["NCCL_IB_HCA"] = site.network.ib_hca
        if site.gpus_per_node:
            defaults |= {
                "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            }
    plain_values = {
        name: value
        # The list of variables is a map for Kubernetes: a name may occur only once.
        for name, value in (defaults | site.environment).items()
        if name not in site.secrets
    }
    values = [
        Variable(name=name, value=_escape_value(value)) for name, value in plain_values.items()
    ]
    secret_values = [
        Variable(
            name=name,
            value_from=models.ValueFrom(
                secret_key_ref=models.KeyRef(
                    name=ref.name, key=ref.key, optional=ref.optional or None
                )
            ),
        )
        for name, ref in site.secrets.items()
    ]
    return values + secret_values


def _escape_value(value: str) -> str:
    """Escape a value: Kubernetes would replace $(NAME) by another variable."""
    return value.replace("$(", "$$(")


def _format_mib(gigabytes: float) -> str:
    """Convert decimal gigabytes to a quantity in MiB."""
    return f"{int(gigabytes * 1e9 / 2**20)}Mi"


def _build_network_policy(site: KubernetesSite, context: RenderContext) -> models.NetworkPolicy:
    """Return a policy that admits only the run's own pods, and the operator to the dashboard."""
    run_selector = {"matchLabels": {RUN_LABEL: to_label_value(context.run)}}
    # An empty selector means every namespace: the operator usually runs in its own.
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": site.operator_labels}}
    return models.NetworkPolicy(
        metadata=Metadata(
            name=make_object_name(context.run, context.submission),
            namespace=site.namespace,
            labels=build_labels(site, context),
            annotations=_build_call_annotation(context),
        ),
        spec=models.NetworkPolicySpec(
            pod_selector=run_selector,
            policy_types=["Ingress"],
            ingress=[
                {"from": [{"podSelector": run_selector}]},
                {"from": [operator], "ports": [{"protocol": "TCP", "port": _DASHBOARD_PORT}]},
            ],
        ),
    )
