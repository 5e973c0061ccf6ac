"""Models of the Kubernetes and KubeRay objects that lorafleet writes.

They follow ray.io/v1 of KubeRay v1.7 and the core v1 API field by field. They forbid
unknown fields, so that a misspelt one fails here: a server would silently prune it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class KubernetesModel(BaseModel):
    """Base class of all models.

    It is frozen and forbids unknown fields. It is written in camel case, without unset
    fields.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
    )

    def to_tree(self) -> dict[str, Any]:
        """Return plain values, in the order of the fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Metadata(KubernetesModel):
    """ObjectMeta."""

    name: str | None = None
    namespace: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class KeyRef(KubernetesModel):
    """A key of a Secret."""

    name: str
    key: str
    optional: bool | None = None


class ValueFrom(KubernetesModel):
    """Source of a variable's value."""

    secret_key_ref: KeyRef


class Variable(KubernetesModel):
    """EnvVar."""

    name: str
    value: str | None = None
    value_from: ValueFrom | None = None


class Mount(KubernetesModel):
    """VolumeMount."""

    name: str
    mount_path: str
    sub_path: str | None = None
    read_only: bool | None = None


class Volume(KubernetesModel):
    """Volume with exactly one source."""

    name: str
    config_map: dict[str, Any] | None = None
    persistent_volume_claim: dict[str, Any] | None = None
    empty_dir: dict[str, Any] | None = None


class Resources(KubernetesModel):
    """ResourceRequirements.

    Requests equal limits, so that a pod is Guaranteed. Ray reads only the limits.
    """

    requests: dict[str, str]
    limits: dict[str, str]
    claims: list[dict[str, str]] | None = None


class Exec(KubernetesModel):
    """ExecAction."""

    command: list[str]


class Handler(KubernetesModel):
    """LifecycleHandler."""

    exec: Exec


class Lifecycle(KubernetesModel):
    """Hooks of a container's lifecycle: a command that runs before it is stopped."""

    pre_stop: Handler


class Container(KubernetesModel):
    """Container."""

    name: str
    image: str
    # Images are pinned by digest, so one that is on the node is never outdated.
    image_pull_policy: Literal["IfNotPresent"] | None = "IfNotPresent"
    command: list[str] | None = None
    ports: list[dict[str, Any]] | None = None
    resources: Resources
    env: list[Variable] | None = None
    security_context: dict[str, Any]
    lifecycle: Lifecycle | None = None
    volume_mounts: list[Mount] | None = None


class PodSpec(KubernetesModel):
    """PodSpec."""

    restart_policy: Literal["Never"] | None = None
    service_account_name: str | None = None
    automount_service_account_token: bool | None = None
    image_pull_secrets: list[dict[str, str]] | None = None
    priority_class_name: str | None = None
    termination_grace_period_seconds: int | None = None
    node_selector: dict[str, str] | None = None
    tolerations: list[dict[str, str | int]] | None = None
    affinity: dict[str, Any] | None = None
    topology_spread_constraints: list[dict[str, Any]] | None = None
    runtime_class_name: str | None = None
    resource_claims: list[dict[str, str]] | None = None
    security_context: dict[str, Any]
    containers: Sequence[Container | dict[str, Any]]
    volumes: Sequence[Volume | dict[str, Any]] | None = None


class Template(KubernetesModel):
    """PodTemplateSpec."""

    metadata: Metadata | None = None
    spec: PodSpec


class HeadGroup(KubernetesModel):
    """HeadGroupSpec."""

    service_type: Literal["ClusterIP"] = "ClusterIP"
    ray_start_params: dict[str, str]
    template: Template


class WorkerGroup(KubernetesModel):
    """WorkerGroupSpec."""

    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    num_of_hosts: int = 1
    ray_start_params: dict[str, str]
    labels: dict[str, str]
    template: Template


class RayCluster(KubernetesModel):
    """RayClusterSpec."""

    ray_version: str
    enable_in_tree_autoscaling: bool | None = None
    autoscaler_options: dict[str, Any] | None = None
    auth_options: dict[str, str]
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class RayJobSpec(KubernetesModel):
    """RayJobSpec."""

    submission_mode: Literal["K8sJobMode", "HTTPMode"]
    entrypoint: str
    entrypoint_num_cpus: int = 0
    entrypoint_resources: str
    metadata: dict[str, str]
    backoff_limit: int
    active_deadline_seconds: int | None = None
    pre_running_deadline_seconds: int | None = None
    submitter_config: dict[str, int] | None = None
    submitter_pod_template: Template | None = None
    shutdown_after_job_finishes: bool | None = None
    ttl_seconds_after_finished: int | None = None
    deletion_strategy: dict[str, Any] | None = None
    ray_cluster_spec: RayCluster


class RayJob(KubernetesModel):
    """A RayJob of ray.io/v1."""

    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayJob"] = "RayJob"
    metadata: Metadata
    spec: RayJobSpec


class JobSpec(KubernetesModel):
    """JobSpec of batch/v1.

    Unrelated to the `JobSpec` of a job file (jobs/schema/job.py).
    """

    backoff_limit: int
    active_deadline_seconds: int
    ttl_seconds_after_finished: int
    template: Template


class Job(KubernetesModel):
    """A Job of batch/v1."""

    api_version: Literal["batch/v1"] = "batch/v1"
    kind: Literal["Job"] = "Job"
    metadata: Metadata
    spec: JobSpec


class ConfigMap(KubernetesModel):
    """A ConfigMap."""

    api_version: Literal["v1"] = "v1"
    kind: Literal["ConfigMap"] = "ConfigMap"
    metadata: Metadata
    data: dict[str, str]


class NetworkPolicySpec(KubernetesModel):
    """NetworkPolicySpec."""

    pod_selector: dict[str, Any]
    policy_types: list[str]
    ingress: list[dict[str, Any]] = Field(min_length=1)


class NetworkPolicy(KubernetesModel):
    """A NetworkPolicy."""

    api_version: Literal["networking.k8s.io/v1"] = "networking.k8s.io/v1"
    kind: Literal["NetworkPolicy"] = "NetworkPolicy"
    metadata: Metadata
    spec: NetworkPolicySpec
