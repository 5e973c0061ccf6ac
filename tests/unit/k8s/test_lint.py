"""One wrong RayJob for every rule that no API server checks, and for the schema; a right one passes
them all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest

from lorafleet.jobs.runs.run import RunState
from lorafleet.jobs.sites.kubernetes import HardeningPoint
from lorafleet.k8s.crd import Schema
from lorafleet.k8s.lint import RULES, get, is_gpu_resource, lint, parse_quantity
from lorafleet.k8s.manifest_check import check_rules
from lorafleet.k8s.states import find_pending_reason, parse_job_state
from tests.conftest import ROOT
from tests.unit.k8s.test_render import IMAGE, bare, rayjob, schema, sites

__all__ = ["schema"]
Tree = dict[str, Any]
HEAD, WORKERS = "spec.rayClusterSpec.headGroupSpec", "spec.rayClusterSpec.workerGroupSpecs"


def put(tree: Tree, path: str, value: Any) -> None:
    """Set a dotted path, with numbers for the places of lists, and ! for a dot in the last key.

    None removes.
    """
    *way, last = path.split(".")
    last = last.replace("!", ".")
    for part in way:
        tree = tree[int(part)] if part.isdigit() else tree.setdefault(part, {})  # type: ignore[index]
    if value is None:
        tree.pop(last)
    elif last.isdigit():
        tree[int(last)] = value  # type: ignore[index]
    else:
        tree[last] = value


def kueue() -> Tree:
    return rayjob(sites()["kubernetes-kueue"])


def kai() -> Tree:
    return rayjob(sites()["kai"])


def autoscaled() -> Tree:
    return rayjob(sites()["autoscaled"])


def plain() -> Tree:
    return rayjob(bare())


Case = tuple[str, Callable[[], Tree], dict[str, Any], str]
CASES: list[Case] = [
    ("name", plain, {"metadata.name": "a" * 48}, "metadata.name"),
    ("name", plain, {"metadata.name": "1-run"}, "metadata.name"),
    ("labels", plain, {"metadata.labels.cost": 4711}, "metadata.labels.cost"),
    ("labels", plain, {"metadata.labels.team": "ours, all"}, "metadata.labels.team"),
    ("submission_mode", plain, {"spec.submissionMode": "K8JobMode"}, "spec.submissionMode"),
    ("suspend_needs_shutdown", plain, {"spec.suspend": True}, "spec.suspend"),
    (
        "ttl_needs_shutdown",
        plain,
        {"spec.ttlSecondsAfterFinished": 60},
        "spec.ttlSecondsAfterFinished",
    ),
    (
        "deletion_rules_or_shutdown",
        plain,
        {"spec.shutdownAfterJobFinishes": True},
        "spec.deletionStrategy",
    ),
    (
        "deletion_rules",
        plain,
        {"spec.deletionStrategy.deletionRules.0.condition.jobStatus": "STOPPED"},
        "spec.deletionStrategy.deletionRules[0]",
    ),
    (
        "deletion_rules",
        plain,
        {"spec.deletionStrategy.deletionRules.0.condition": {"ttlSeconds": 1}},
        "spec.deletionStrategy.deletionRules[0]",
    ),
    (
        "deletion_rules",
        plain,
        {"spec.deletionStrategy.deletionRules.1.policy": "DeleteCluster"},
        "spec.deletionStrategy.deletionRules[1]",
    ),
    (
        "deletion_rules",
        plain,
        {"spec.deletionStrategy.deletionRules.1.condition.ttlSeconds": 1},
        "spec.deletionStrategy.deletionRules",
    ),
    (
        "deletion_rules",
        autoscaled,
        {"spec.deletionStrategy.deletionRules.0.policy": "DeleteWorkers"},
        "spec.deletionStrategy.deletionRules[0]",
    ),
    ("backoff_limit", plain, {"spec.backoffLimit": -1}, "spec.backoffLimit"),
    ("backoff_limit", plain, {"spec.submissionMode": "InteractiveMode"}, "spec.backoffLimit"),
    ("deadlines", plain, {"spec.activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds"),
    (
        "no_deadline_for_waiting",
        plain,
        {"spec.preRunningDeadlineSeconds": 60},
        "spec.preRunningDeadlineSeconds",
    ),
    ("cluster_or_selector", plain, {"spec.rayClusterSpec": None}, "spec"),
    (
        "runtime_env_is_yaml",
        plain,
        {"spec.runtimeEnvYAML": "env_vars: {A: "},
        "spec.runtimeEnvYAML",
    ),
    (
        "nothing_to_expand",
        plain,
        {"spec.runtimeEnvYAML": "env_vars: {A: $HOME}"},
        "spec.runtimeEnvYAML",
    ),
    ("nothing_to_expand", plain, {"spec.metadata.run": "`id`"}, "spec.metadata.run"),
    (
        "nothing_to_expand",
        plain,
        {"spec.entrypoint": "lorafleet exec x && rm -r x"},
        "spec.entrypoint",
    ),
    ("entrypoint", plain, {"spec.entrypoint": None}, "spec.entrypoint"),
    (
        "entrypoint_resources",
        plain,
        {"spec.entrypointResources": "driver=1"},
        "spec.entrypointResources",
    ),
    ("sidecar", plain, {"spec.submissionMode": "SidecarMode"}, "spec.submitterPodTemplate"),
    (
        "submitter",
        plain,
        {"spec.submitterPodTemplate.spec.restartPolicy": "Always"},
        "spec.submitterPodTemplate.spec.restartPolicy",
    ),
    ("submitter", plain, {"spec.submissionMode": "HTTPMode"}, "spec.submitterPodTemplate"),
    (
        "containers_are_there",
        plain,
        {f"{HEAD}.template.spec.containers": []},
        f"{HEAD}.template.spec.containers",
    ),
    ("resources_once", plain, {f"{HEAD}.resources": {"CPU": "1"}}, f"{HEAD}.resources"),
    (
        "resources_once",
        plain,
        {f"{HEAD}.rayStartParams.labels": "a=b"},
        f"{HEAD}.rayStartParams.labels",
    ),
    (
        "start_params",
        plain,
        {f"{WORKERS}.0.rayStartParams.num-cpus": "2.5"},
        f"{WORKERS}[0].rayStartParams.num-cpus",
    ),
    (
        "start_params",
        plain,
        {f"{HEAD}.rayStartParams.resources": '{"driver": 1}'},
        f"{HEAD}.rayStartParams.resources",
    ),
    ("replicas", plain, {f"{WORKERS}.0.replicas": 0}, f"{WORKERS}[0].replicas"),
    ("replicas", plain, {f"{WORKERS}.0.minReplicas": 9}, f"{WORKERS}[0].minReplicas"),
    (
        "autoscaler",
        autoscaled,
        {f"{WORKERS}.0.template.spec.restartPolicy": "Always"},
        f"{WORKERS}[0].template.spec.restartPolicy",
    ),
    (
        "redis",
        plain,
        {f"{HEAD}.template.spec.containers.0.env.0.name": "RAY_REDIS_ADDRESS"},
        f"{HEAD}.template.spec",
    ),
    (
        "token_auth",
        plain,
        {"spec.rayClusterSpec.authOptions.mode": "disabled"},
        "spec.rayClusterSpec.authOptions.mode",
    ),
    (
        "secret_values",
        plain,
        {f"{HEAD}.template.spec.containers.0.env.0.name": "API_TOKEN"},
        f"{HEAD}.template.spec.containers[0].env[0]",
    ),
    (
        "submitter_template",
        plain,
        {"spec.submitterPodTemplate": None},
        "spec.submitterPodTemplate",
    ),
    (
        "escalation",
        autoscaled,
        {"spec.rayClusterSpec.autoscalerOptions.securityContext.privileged": True},
        "spec.rayClusterSpec.autoscalerOptions.securityContext.privileged",
    ),
    (
        "image_digest",
        autoscaled,
        {"spec.rayClusterSpec.autoscalerOptions.image": "other:latest"},
        "spec.rayClusterSpec.autoscalerOptions.image",
    ),
    (
        "service_account_token",
        plain,
        {
            f"{WORKERS}.0.template.spec.volumes.0": {
                "name": "job",
                "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]},
            }
        },
        f"{WORKERS}[0].template.spec.volumes[0].projected",
    ),
    *(
        (
            "security_options",
            plain,
            {f"{WORKERS}.0.template.spec.containers.0.securityContext.{field}": value},
            f"{WORKERS}[0].template.spec.containers[0].securityContext.{path}",
        )
        for field, value, path in (
            ("procMount", "Unmasked", "procMount"),
            ("appArmorProfile", {"type": "Unconfined"}, "appArmorProfile"),
            ("seLinuxOptions", {"role": "sysadm_r"}, "seLinuxOptions"),
            ("seLinuxOptions", {"type": "spc_t"}, "seLinuxOptions.type"),
            ("windowsOptions", {"hostProcess": True}, "windowsOptions.hostProcess"),
        )
    ),
    (
        "security_options",
        plain,
        {f"{HEAD}.template.spec.securityContext.sysctls": [{"name": "kernel.x", "value": "1"}]},
        f"{HEAD}.template.spec.securityContext.sysctls",
    ),
    ("auth", plain, {"spec.rayClusterSpec.rayVersion": "2.9.0"}, "spec.rayClusterSpec.rayVersion"),
    (
        "limits",
        plain,
        {f"{WORKERS}.0.template.spec.containers.0.resources.limits": {"cpu": "8"}},
        f"{WORKERS}[0].template.spec.containers[0].resources.limits.memory",
    ),
    (
        "limits",
        plain,
        {f"{HEAD}.template.spec.containers.0.resources.requests": {"cpu": "64"}},
        f"{HEAD}.template.spec.containers[0].resources.requests.cpu",
    ),
    (
        "head_takes_no_work",
        plain,
        {f"{HEAD}.rayStartParams.num-cpus": "4"},
        f"{HEAD}.rayStartParams.num-cpus",
    ),
    (
        "non_root",
        plain,
        {"spec.submitterPodTemplate.spec.securityContext": {}},
        "spec.submitterPodTemplate.spec.securityContext.runAsNonRoot",
    ),
    (
        "non_root",
        plain,
        {f"{WORKERS}.0.template.spec.containers.0.securityContext.runAsUser": 0},
        f"{WORKERS}[0].template.spec.containers[0].securityContext.runAsNonRoot",
    ),
    (
        "seccomp",
        plain,
        {f"{HEAD}.template.spec.securityContext.seccompProfile.type": "Unconfined"},
        f"{HEAD}.template.spec.securityContext.seccompProfile",
    ),
    (
        "seccomp",
        plain,
        {
            f"{HEAD}.template.spec.containers.0.securityContext.seccompProfile": {
                "type": "Unconfined"
            }
        },
        f"{HEAD}.template.spec.containers[0].securityContext.seccompProfile",
    ),
    (
        "escalation",
        plain,
        {f"{WORKERS}.0.template.spec.containers.0.securityContext": {}},
        f"{WORKERS}[0].template.spec.containers[0].securityContext.allowPrivilegeEscalation",
    ),
    (
        "escalation",
        plain,
        {f"{WORKERS}.0.template.spec.containers.0.securityContext.privileged": True},
        f"{WORKERS}[0].template.spec.containers[0].securityContext.privileged",
    ),
    (
        "capabilities",
        plain,
        {f"{WORKERS}.0.template.spec.containers.0.securityContext.capabilities": {}},
        f"{WORKERS}[0].template.spec.containers[0].securityContext.capabilities",
    ),
    (
        "capabilities",
        plain,
        {f"{WORKERS}.0.template.spec.containers.0.securityContext.capabilities.add": ["IPC_LOCK"]},
        f"{WORKERS}[0].template.spec.containers[0].securityContext.capabilities.add",
    ),
    (
        "host_namespaces",
        plain,
        {f"{WORKERS}.0.template.spec.hostNetwork": True},
        f"{WORKERS}[0].template.spec.hostNetwork",
    ),
    (
        "host_namespaces",
        plain,
        {f"{HEAD}.template.spec.containers.0.ports.0.hostPort": 6379},
        f"{HEAD}.template.spec.containers[0].ports[0].hostPort",
    ),
    (
        "host_paths",
        plain,
        {f"{WORKERS}.0.template.spec.volumes.0": {"name": "job", "hostPath": {"path": "/"}}},
        f"{WORKERS}[0].template.spec.volumes[0].hostPath",
    ),
    (
        "escalation",
        plain,
        {f"{HEAD}.template.spec.initContainers": [{"name": "x", "image": IMAGE}]},
        f"{HEAD}.template.spec.initContainers[0].securityContext.allowPrivilegeEscalation",
    ),
    (
        "service_account_token",
        plain,
        {f"{WORKERS}.0.template.spec.automountServiceAccountToken": None},
        f"{WORKERS}[0].template.spec.automountServiceAccountToken",
    ),
    (
        "gpu_names",
        plain,
        {f"{WORKERS}.0.template.spec.containers.0.resources.limits.nvidia!com/gpu!shared": "1"},
        f"{WORKERS}[0].template.spec.containers[0].resources.limits.nvidia.com/gpu.shared",
    ),
    (
        "image_digest",
        plain,
        {f"{HEAD}.template.spec.containers.0.image": "registry/lorafleet:0.1.0"},
        f"{HEAD}.template.spec.containers[0].image",
    ),
    (
        "grace",
        plain,
        {f"{HEAD}.template.spec.terminationGracePeriodSeconds": 60},
        f"{HEAD}.template.spec.terminationGracePeriodSeconds",
    ),
    (
        "pull_policy",
        plain,
        {f"{HEAD}.template.spec.containers.0.imagePullPolicy": "Sometimes"},
        f"{HEAD}.template.spec.containers[0].imagePullPolicy",
    ),
    (
        "one_image",
        plain,
        {f"{WORKERS}.0.template.spec.containers.0.image": "other@sha256:" + "2" * 64},
        f"{WORKERS}[0].template.spec.containers[0].image",
    ),
    (
        "kueue_shutdown",
        kueue,
        {"spec.shutdownAfterJobFinishes": False},
        "spec.shutdownAfterJobFinishes",
    ),
    (
        "kueue_selector",
        kueue,
        {"spec.clusterSelector": {"ray.io/cluster": "x"}},
        "spec.clusterSelector",
    ),
    (
        "kueue_autoscaling",
        kueue,
        {"spec.rayClusterSpec.enableInTreeAutoscaling": True},
        "spec.rayClusterSpec.enableInTreeAutoscaling",
    ),
    ("kueue_pod_sets", kueue, {f"{WORKERS}.0.groupName": "head"}, f"{WORKERS}[0].groupName"),
    ("kueue_suspend", kueue, {"spec.suspend": True}, "spec.suspend"),
    ("kai", kai, {"spec.submissionMode": "K8sJobMode"}, "spec.submissionMode"),
    (
        "yunikorn",
        plain,
        {"metadata.labels.ray.io/gang-scheduling-enabled": "true"},
        "metadata.labels",
    ),
]


def shown(value: Any) -> str:
    """What a test is called: not by where its function lies in memory."""
    return str(getattr(value, "__name__", value))[:40]


def changed(make: Callable[[], Tree], changes: dict[str, Any]) -> Tree:
    tree = copy.deepcopy(make())
    for path, value in changes.items():
        if path.startswith("metadata.labels."):
            tree["metadata"]["labels"][path.removeprefix("metadata.labels.")] = value
        else:
            put(tree, path, value)
    return tree


@pytest.mark.parametrize(("rule", "make", "changes", "path"), CASES, ids=shown)
def test_what_is_wrong_is_found_where_it_is(
    rule: str, make: Callable[[], Tree], changes: dict[str, Any], path: str
) -> None:
    assert lint(make()) == []
    found = [(finding.rule, finding.path) for finding in lint(changed(make, changes))]
    assert (rule, path) in found


def test_every_rule_has_a_wrong_example_and_a_source() -> None:
    assert {rule.name for rule in RULES} == {case[0] for case in CASES}
    assert len(RULES) >= 30
    assert f"{len(RULES)} rules" in (ROOT / "docs" / "kubernetes.md").read_text()
    assert all(rule.source for rule in RULES)


def test_a_weakened_point_must_be_named() -> None:
    patch = {"spec": {"rayClusterSpec": {"authOptions": {"mode": "disabled"}}}}
    refused = check_rules(bare(patch=patch), 1, rayjob(bare(patch=patch)))
    assert refused == [
        "spec.rayClusterSpec.authOptions.mode: anyone who can reach the head can run code: must be "
        "token (or name token_auth in `weaken` of the site file)"
    ]
    allowed = bare(patch=patch, weaken=["token_auth"])
    assert check_rules(allowed, 1, rayjob(allowed)) == []
    root = bare(
        pod={"sidecars": [{"name": "agent", "image": IMAGE, "securityContext": {}}]},
        weaken=["escalation"],
    )
    (left,) = check_rules(root, 1, rayjob(root))
    assert "containers[1].securityContext.capabilities: must drop: [ALL]" in left
    points = {rule.point for rule in RULES if rule.point}
    assert points == set(get_args(HardeningPoint))


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("nvidia.com/gpu", True),
        ("amd.com/gpu", True),
        ("nvidia.com/mig-1g.5gb", True),
        ("nvidia.com/mig-1g.5gb.me", False),
        ("nvidia.com/gpu.shared", False),
        ("gpu.intel.com/i915", False),
    ],
)
def test_gpus_that_kuberay_counts(name: str, counts: bool) -> None:
    """From its v1.7.0: others would give pods with GPUs that Ray does not know of."""
    site = bare(gpu_resource=name, gpus_per_node=1)
    assert is_gpu_resource(name) is counts
    paths = [finding.path for finding in lint(rayjob(site)) if finding.rule == "gpu_names"]
    limits = f"{WORKERS}[0].template.spec.containers[0].resources.limits"
    assert paths == ([] if counts else [f"{limits}.{name}"])
    patch = [
        {
            "op": "add",
            "path": "/spec/rayClusterSpec/workerGroupSpecs/0/rayStartParams/num-gpus",
            "value": "1",
        }
    ]
    patched = bare(gpu_resource=name, gpus_per_node=1, patch=patch)
    assert lint(rayjob(patched)) == []


def test_quantities() -> None:
    assert [parse_quantity(text) for text in ("500m", "2", "1Gi", "1k", "x")] == [
        0.5,
        2.0,
        2.0**30,
        1000.0,
        None,
    ]


SCHEMA_CASES = [
    ({"spec.backofLimit": 2}, "spec"),
    ({"spec.backoffLimit": "2"}, "spec.backoffLimit"),
    ({"spec.backoffLimit": 2**31}, "spec.backoffLimit"),
    ({f"{HEAD}.rayStartParams.num-cpus": 0}, f"{HEAD}.rayStartParams['num-cpus']"),
    ({f"{WORKERS}.0.groupName": None}, f"{WORKERS}[0]"),
    ({f"{WORKERS}.0.replicas": "2"}, f"{WORKERS}[0].replicas"),
    (
        {f"{WORKERS}.0.template.spec.containers.0.env.0.value": 1},
        f"{WORKERS}[0].template.spec.containers[0].env[0].value",
    ),
    (
        {f"{WORKERS}.0.template.spec.containers.0.env.1.name": "LORAFLEET_CACHE"},
        f"{WORKERS}[0].template.spec.containers[0].env[1]",
    ),
    (
        {f"{HEAD}.template.spec.containers.0.resources.limits.cpu": 0.5},
        f"{HEAD}.template.spec.containers[0].resources.limits.cpu",
    ),
    (
        {f"{HEAD}.template.spec.containers.0.resources.limits.memory": "16 GB"},
        f"{HEAD}.template.spec.containers[0].resources.limits.memory",
    ),
    (
        {"spec.deletionStrategy.deletionRules.0.policy": "DeleteAll"},
        "spec.deletionStrategy.deletionRules[0].policy",
    ),
    ({f"{HEAD}.template": None}, HEAD),
]


@pytest.mark.parametrize(("changes", "path"), SCHEMA_CASES, ids=lambda value: str(value)[:40])
def test_the_real_schema_refuses(changes: dict[str, Any], path: str, schema: Schema) -> None:
    assert schema.list_errors(plain()) == []
    (error,) = schema.list_errors(changed(plain, changes))
    assert error.startswith(f"{path}: ")


def test_the_rules_in_cel_hold(schema: Schema) -> None:
    """The CRD's own CEL rules, evaluated: every one of them on what we write, and one on what
    breaks it.
    """
    import celpy

    def broken(node: Tree, value: Any) -> list[str]:
        said = []
        if isinstance(value, dict):
            for name, inner in (node.get("properties") or {}).items():
                if name in value:
                    said += broken(inner, value[name])
        elif isinstance(value, list):
            said += [text for one in value for text in broken(node.get("items") or {}, one)]
        for rule in node.get("x-kubernetes-validations") or []:
            if "oldSelf" in rule["rule"]:
                continue
            environment = celpy.Environment()
            program = environment.program(environment.compile(rule["rule"]))
            if not program.evaluate({"self": celpy.json_to_cel(value)}):
                said.append(rule.get("message", rule["rule"]))
        return said

    for site in sites().values():
        assert broken(schema.tree, rayjob(site)) == []
    condition = "spec.deletionStrategy.deletionRules.0.condition"
    both = {f"{condition}.jobStatus": "SUCCEEDED", f"{condition}.jobDeploymentStatus": "Failed"}
    assert broken(schema.tree, changed(plain, both))


@pytest.mark.parametrize(
    ("deployment", "job", "reason", "run", "ended"),
    [
        ("", "", "", RunState.PENDING, False),
        ("Initializing", "", "", RunState.PENDING, False),
        ("Running", "", "", RunState.PENDING, False),
        ("Running", "PENDING", "", RunState.PENDING, False),
        ("Running", "RUNNING", "", RunState.RUNNING, False),
        ("Complete", "SUCCEEDED", "", RunState.FINISHED, True),
        ("Complete", "STOPPED", "", RunState.STOPPED, True),
        ("Complete", "FAILED", "AppFailed", RunState.FAILED, True),
        ("Failed", "FAILED", "AppFailed", RunState.FAILED, True),
        ("Failed", "RUNNING", "DeadlineExceeded", RunState.STOPPED, True),
        ("Failed", "", "SubmissionFailed", RunState.FAILED, True),
        ("Retrying", "FAILED", "AppFailed", RunState.PENDING, False),
        ("Suspending", "RUNNING", "", RunState.PENDING, False),
        ("Suspended", "", "", RunState.PENDING, False),
        ("Waiting", "", "", RunState.PENDING, False),
        ("ValidationFailed", "", "ValidationFailed", RunState.FAILED, True),
        ("Dreaming", "", "", RunState.PENDING, False),
    ],
)
def test_states(deployment: str, job: str, reason: str, run: RunState, ended: bool) -> None:
    state = parse_job_state(
        {
            "jobDeploymentStatus": deployment,
            "jobStatus": job,
            "reason": reason,
            "message": "said so",
        }
    )
    assert (state.run, state.ended) == (run, ended)
    assert state.sentence
    if run is RunState.FAILED:
        assert "said so" in state.sentence


def test_a_new_job_has_no_status_and_a_queued_one_is_suspended() -> None:
    assert parse_job_state(None).run is RunState.PENDING
    assert (
        parse_job_state({"jobDeploymentStatus": "Suspended"}, queued=True).sentence
        == "is queued; none of its pods run"
    )
    preempted = parse_job_state({"jobDeploymentStatus": "Suspending"}, queued=True)
    assert preempted.sentence == "was preempted and queued again"


@pytest.mark.parametrize(
    ("reason", "message", "said"),
    [
        (
            "FailedScheduling",
            "0/9 nodes are available: 3 Insufficient nvidia.com/gpu, 6 Insufficient cpu.",
            "no node has enough free nvidia.com/gpu and CPU (0 of 9 nodes qualify)",
        ),
        (
            "FailedScheduling",
            "0/2 nodes are available: 2 node(s) had untolerated taint {gpu: yes}.",
            "its nodes have a taint that the site does not tolerate (gpu: yes): add it to tolerations in "
            "the site file",
        ),
        (
            "FailedScheduling",
            "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.",
            "no node has the labels of node_selector",
        ),
        (
            "FailedScheduling",
            'persistentvolumeclaim "shared" not found',
            'it cannot be scheduled: persistentvolumeclaim "shared" not found',
        ),
        ("Failed", "Failed to pull image x", "the image cannot be pulled: Failed to pull image x"),
        (
            "FailedMount",
            "MountVolume.SetUp failed",
            "a volume cannot be mounted: MountVolume.SetUp failed",
        ),
        (
            "FailedCreate",
            "pods is forbidden: exceeded quota: gpus",
            "the namespace's quota is used up: pods is forbidden: exceeded quota: gpus",
        ),
        ("Scheduled", "Successfully assigned", None),
    ],
)
def test_why_pods_wait(reason: str, message: str, said: str | None) -> None:
    old = {"reason": "FailedMount", "message": "old", "lastTimestamp": "2026-01-01T00:00:00Z"}
    new = {"reason": reason, "message": message, "lastTimestamp": "2026-01-02T00:00:00Z"}
    assert find_pending_reason([new]) == said
    if said:
        assert find_pending_reason([old, new]) == said


def test_paths_are_found() -> None:
    assert get({"a": {"b": 1}}, "a.b") == 1
    assert get({"a": []}, "a.b") is None
