"""Check a RayJob against rules of KubeRay, Kueue and the kubelet that no API server checks.

Each rule names its source: a function of KubeRay v1.7.0 (ray-
operator/controllers/ray/utils/validation.go unless stated otherwise), of Kueue v0.19
(pkg/controller/jobs), or an observation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from lorafleet.jobs.schema.environment import is_secret_name
from lorafleet.jobs.sites.kubernetes import HardeningPoint

Tree = dict[str, Any]
RuleProblems = Iterator[tuple[str, str]]
_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(m|Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?")
_UNIT_FACTORS = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50,
          "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}  # fmt: skip
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
# Of Kueue v0.19, including the head and the submitter. Earlier versions allow 8.
_MAX_POD_SETS = 18
KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"


@dataclass(frozen=True)
class Finding:
    """One problem of a RayJob."""

    rule: str
    """Name of the rule."""
    path: str
    """Path of the field, such as `spec.backoffLimit`."""
    sentence: str
    """What is wrong, and what would be right."""
    source: str
    """Source of the rule."""
    point: HardeningPoint | None = None
    """Point of hardening of the rule, if it has one."""


@dataclass(frozen=True)
class Rule:
    """A rule, its source and the function that checks it.

    `look` yields (path, sentence) for each problem. It may index into the object without
    checking types, because the schema was checked before.
    """

    name: str
    source: str
    look: Callable[[Tree], RuleProblems]
    point: HardeningPoint | None = None
    """Point of hardening that the rule protects, and that a site may weaken by name."""


RULES: list[Rule] = []


def _register_rule(
    source: str, point: HardeningPoint | None = None
) -> Callable[[Callable[[Tree], RuleProblems]], Callable[[Tree], RuleProblems]]:
    """Register a function as a rule. The function's name without underscore is the rule's id.

    Each rule needs a wrong example in tests/unit/k8s/test_lint.py.

    Args:
        source: Function upstream that has the rule, or `observed: ...` with what happens
            without it.
        point: Point of hardening that the rule protects.
    """

    def add(check: Callable[[Tree], RuleProblems]) -> Callable[[Tree], RuleProblems]:
        RULES.append(Rule(check.__name__.lstrip("_"), source, check, point))
        return check

    return add


def lint(job: Tree) -> list[Finding]:
    """Return all problems of a RayJob that is valid against its schema.

    A site's patch can produce an object of another form. The rules then raise TypeError,
    KeyError, AttributeError or ValueError, which the backend reports as a mistake of the
    patch.
    """
    return [
        Finding(rule.name, path, sentence, rule.source, rule.point)
        for rule in RULES
        for path, sentence in rule.look(job)
    ]


def list_groups(job: Tree) -> list[tuple[str, Tree]]:
    """Return (path, group) of the head and of each worker group."""
    cluster = "spec.rayClusterSpec"
    spec = get(job, cluster) or {}
    head = (
        [(f"{cluster}.headGroupSpec", spec["headGroupSpec"])] if spec.get("headGroupSpec") else []
    )
    workers = enumerate(spec.get("workerGroupSpecs") or [])
    return head + [(f"{cluster}.workerGroupSpecs[{index}]", group) for index, group in workers]


def list_templates(job: Tree) -> list[tuple[str, Tree]]:
    """Return (path, pod template) of the head, the workers and the submitter."""
    pod_templates = [
        (f"{path}.template", group.get("template") or {}) for path, group in list_groups(job)
    ]
    submitter = get(job, "spec.submitterPodTemplate")
    return (
        [*pod_templates, ("spec.submitterPodTemplate", submitter)] if submitter else pod_templates
    )


def get(tree: Any, path: str) -> Any:
    """Return the value at a dotted path of a tree, or None."""
    for part in path.split("."):
        if not isinstance(tree, dict):
            return None
        tree = tree.get(part)
    return tree


def parse_quantity(text: Any) -> float | None:
    """Return a Kubernetes quantity, such as 500m or 2Gi, as a number; None if it is not one."""
    match = _QUANTITY.fullmatch(str(text))
    return float(match[1]) * _UNIT_FACTORS.get(match[2] or "", 1.0) if match else None


def _get_containers(template: Tree) -> list[Tree]:
    """Return the containers of a pod template."""
    return get(template, "spec.containers") or []


@_register_rule("ValidateRayJobMetadata")
def _name(job: Tree) -> RuleProblems:
    name = str(get(job, "metadata.name") or "")
    # KubeRay appends to the name for the objects that it creates itself.
    if len(name) > 47:
        yield "metadata.name", f"{name} has {len(name)} characters, but KubeRay allows 47"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield (
            "metadata.name",
            f"{name!r} must begin with a letter and have lower-case letters, digits and dashes "
            "only",
        )


@_register_rule(
    "the API server's rule for labels of objects, which the CRD leaves out of its schema"
)
def _labels(job: Tree) -> RuleProblems:
    for section in ("labels", "annotations"):
        for key, value in (get(job, f"metadata.{section}") or {}).items():
            if not isinstance(value, str):
                yield f"metadata.{section}.{key}", f"{value!r} must be text"
            elif section == "labels" and not _LABEL_VALUE.fullmatch(value):
                yield (
                    f"metadata.{section}.{key}",
                    f"{value!r} is not a valid label value (63 letters, digits and -_.)",
                )


@_register_rule("ValidateRayJobSpec; the CRD has no enum")
def _submission_mode(job: Tree) -> RuleProblems:
    mode = get(job, "spec.submissionMode") or "K8sJobMode"
    if mode not in _MODES:
        yield "spec.submissionMode", f"{mode} is not a submission mode; must be {', '.join(_MODES)}"


@_register_rule("ValidateRayJobSpec")
def _suspend_needs_shutdown(job: Tree) -> RuleProblems:
    if get(job, "spec.suspend") and not get(job, "spec.shutdownAfterJobFinishes"):
        yield "spec.suspend", "suspend needs shutdownAfterJobFinishes: true"


@_register_rule("validateDeletionConfiguration")
def _ttl_needs_shutdown(job: Tree) -> RuleProblems:
    ttl = get(job, "spec.ttlSecondsAfterFinished")
    if ttl and not get(job, "spec.shutdownAfterJobFinishes"):
        yield "spec.ttlSecondsAfterFinished", "it requires shutdownAfterJobFinishes: true"
    if isinstance(ttl, int) and ttl < 0:
        yield "spec.ttlSecondsAfterFinished", f"{ttl} must not be negative"


@_register_rule("validateDeletionConfiguration")
def _deletion_rules_or_shutdown(job: Tree) -> RuleProblems:
    if get(job, "spec.deletionStrategy") and get(job, "spec.shutdownAfterJobFinishes"):
        yield (
            "spec.deletionStrategy",
            "it cannot be combined with shutdownAfterJobFinishes; leave one of the two out",
        )


@_register_rule("validateDeletionRules, validateTTLConsistency")
def _deletion_rules(job: Tree) -> RuleProblems:
    rules = get(job, "spec.deletionStrategy.deletionRules") or []
    indexes: dict[tuple[str, str, str], int] = {}
    times: dict[tuple[str, str], dict[str, int]] = {}
    for index, rule in enumerate(rules):
        path, condition = (
            f"spec.deletionStrategy.deletionRules[{index}]",
            rule.get("condition") or {},
        )
        kinds = [kind for kind in ("jobStatus", "jobDeploymentStatus") if condition.get(kind)]
        if len(kinds) != 1:
            yield (
                path,
                "a condition must name exactly one of jobStatus and jobDeploymentStatus",
            )
            continue
        if condition.get("jobStatus") not in (None, "SUCCEEDED", "FAILED"):
            yield (
                path,
                f"jobStatus {condition['jobStatus']} cannot be matched; must be SUCCEEDED or "
                "FAILED",
            )
        condition_key = (kinds[0], condition[kinds[0]])
        key = (*condition_key, rule["policy"])
        if key in indexes:
            yield path, f"deletionRules[{indexes[key]}] has the same condition and policy"
        indexes[key] = index
        times.setdefault(condition_key, {})[rule["policy"]] = condition.get("ttlSeconds", 0)
        if rule["policy"] == "DeleteWorkers" and get(
            job, "spec.rayClusterSpec.enableInTreeAutoscaling"
        ):
            yield path, "DeleteWorkers is not allowed with autoscaling"
    for condition_key, policies in times.items():
        order = [
            name for name in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if name in policies
        ]
        # The operator wants the times of the three policies not to decrease in this order.
        for earlier, later in pairwise(order):
            if policies[earlier] > policies[later]:
                condition_text = f"{condition_key[0]} {condition_key[1]}"
                yield (
                    "spec.deletionStrategy.deletionRules",
                    f"for {condition_text}, {earlier} runs after {policies[earlier]} s, but must "
                    f"not run later than {later}",
                )


@_register_rule("ValidateRayJobSpec")
def _backoff_limit(job: Tree) -> RuleProblems:
    limit = get(job, "spec.backoffLimit")
    if isinstance(limit, int) and limit < 0:
        yield "spec.backoffLimit", f"{limit} must not be negative"
    if limit and get(job, "spec.submissionMode") == "InteractiveMode":
        yield "spec.backoffLimit", "InteractiveMode does not retry; must be 0"
    if limit and get(job, "spec.clusterSelector"):
        yield (
            "spec.backoffLimit",
            "a job on an existing cluster does not retry; must be 0",
        )


@_register_rule("ValidateRayJobSpec")
def _deadlines(job: Tree) -> RuleProblems:
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        value = get(job, f"spec.{field}")
        if isinstance(value, int) and value <= 0:
            yield f"spec.{field}", f"{value} must be above 0"


@_register_rule(
    "observed: preRunningDeadlineSeconds includes the time that pods wait for resources, and ends "
    "the job (docs/kubernetes.md)"
)
def _no_deadline_for_waiting(job: Tree) -> RuleProblems:
    if get(job, "spec.preRunningDeadlineSeconds") and not _is_queued(job):
        yield (
            "spec.preRunningDeadlineSeconds",
            "without Kueue, which admits a job first, waiting for resources would end the job",
        )


@_register_rule("ValidateRayJobSpec")
def _cluster_or_selector(job: Tree) -> RuleProblems:
    cluster, selector = get(job, "spec.rayClusterSpec"), get(job, "spec.clusterSelector")
    if not cluster and not selector:
        yield "spec", "one of rayClusterSpec and clusterSelector must be set"
    if selector and get(job, "spec.suspend"):
        yield "spec.clusterSelector", "a job on an existing cluster cannot be suspended"


@_register_rule("ValidateRayJobSpec")
def _runtime_env_is_yaml(job: Tree) -> RuleProblems:
    text = get(job, "spec.runtimeEnvYAML")
    try:
        yaml.safe_load(text or "")
    except yaml.YAMLError as error:
        yield "spec.runtimeEnvYAML", f"not YAML: {str(error).splitlines()[0]}"


@_register_rule(
    "common.BuildJobSubmitCommand: the strings are pasted into a bash script, in double quotes or "
    "unquoted (observed)"
)
def _nothing_to_expand(job: Tree) -> RuleProblems:
    # HTTPMode sends the texts as JSON, and no shell reads them.
    if get(job, "spec.submissionMode") == "HTTPMode":
        return
    texts = {"spec.runtimeEnvYAML": get(job, "spec.runtimeEnvYAML") or ""}
    texts |= {
        f"spec.metadata.{key}": f"{key}{value}"
        for key, value in (get(job, "spec.metadata") or {}).items()
    }
    for path, text in texts.items():
        if re.search(r"[$`\\]", str(text)):
            yield (
                path,
                "the submitter's bash expands $, backticks and backslashes in it; remove them",
            )
    command = str(get(job, "spec.entrypoint") or "")
    if re.search(r"[$`;&|<>(){}\n\\*?!#~]", command):
        yield (
            "spec.entrypoint",
            "the submitter's bash would execute or expand part of it; use plain words only",
        )


@_register_rule("common.BuildJobSubmitCommand")
def _entrypoint(job: Tree) -> RuleProblems:
    if not get(job, "spec.entrypoint") and get(job, "spec.submissionMode") != "InteractiveMode":
        yield "spec.entrypoint", "the command is missing"


@_register_rule(
    "common.BuildJobSubmitCommand: it is passed to `ray job submit --entrypoint-resources`"
)
def _entrypoint_resources(job: Tree) -> RuleProblems:
    text = get(job, "spec.entrypointResources")
    if text is None:
        return
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        yield "spec.entrypointResources", f"{text!r} must be a JSON object of resources"


@_register_rule("ValidateRayJobSpec")
def _sidecar(job: Tree) -> RuleProblems:
    if get(job, "spec.submissionMode") != "SidecarMode":
        return
    for field in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
        if get(job, f"spec.{field}"):
            yield f"spec.{field}", "SidecarMode has no submitter of its own; leave it out"
    policy = get(job, "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy")
    if policy not in (None, "Never"):
        path = "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy"
        yield path, f"{policy} must be Never with SidecarMode"


@_register_rule("ValidateRayJobSpec (submitterPodTemplate); batchv1.Job refuses Always")
def _submitter(job: Tree) -> RuleProblems:
    if get(job, "spec.submissionMode") == "HTTPMode" and get(job, "spec.submitterPodTemplate"):
        yield "spec.submitterPodTemplate", "HTTPMode has no submitter; leave it out"
    policy = get(job, "spec.submitterPodTemplate.spec.restartPolicy")
    if get(job, "spec.submitterPodTemplate") and policy not in ("Never", "OnFailure"):
        yield "spec.submitterPodTemplate.spec.restartPolicy", f"{policy} must be Never or OnFailure"


@_register_rule("ValidateRayClusterSpec")
def _containers_are_there(job: Tree) -> RuleProblems:
    for path, group in list_groups(job):
        if not _get_containers(group.get("template") or {}):
            yield f"{path}.template.spec.containers", "a container is required"


@_register_rule("validateRayGroupResources, validateRayGroupLabels")
def _resources_once(job: Tree) -> RuleProblems:
    for path, group in list_groups(job):
        params = group.get("rayStartParams") or {}
        if group.get("resources") and any(
            name in params for name in ("num-cpus", "num-gpus", "memory", "resources")
        ):
            yield (
                f"{path}.resources",
                "resources are set here and in rayStartParams; leave one of them out",
            )
        if "labels" in params:
            yield f"{path}.rayStartParams.labels", "labels belong into the group's own `labels`"


@_register_rule("ValidateRayClusterSpec: rayStartParams are pasted into a shell command")
def _start_params(job: Tree) -> RuleProblems:
    for path, group in list_groups(job):
        for name, value in (group.get("rayStartParams") or {}).items():
            where = f"{path}.rayStartParams.{name}"
            if name in (
                "num-cpus",
                "num-gpus",
                "memory",
                "object-store-memory",
            ) and not re.fullmatch(r"\d+", value):
                yield where, f"{value!r} must be a whole number, written as text"
            unquoted = re.sub(r"'[^']*'", "", value)
            if re.search(r"[$`;&|<>(){}\"'\s\\]", unquoted):
                yield where, f"{value!r} is read by a shell: put it in single quotes"


@_register_rule("ValidateRayClusterSpec")
def _replicas(job: Tree) -> RuleProblems:
    names: set[str] = set()
    for path, group in list_groups(job)[1:]:
        # The defaults are those of the CRD, which the API server would add.
        min_replicas, max_replicas = (
            group.get("minReplicas", 0),
            group.get("maxReplicas", 2**31 - 1),
        )
        count = group.get("replicas", 0)
        if min_replicas > max_replicas:
            yield (
                f"{path}.minReplicas",
                f"{min_replicas} must not be above maxReplicas = {max_replicas}",
            )
        elif not min_replicas <= count <= max_replicas:
            yield (
                f"{path}.replicas",
                f"{count} must be between minReplicas = {min_replicas} and maxReplicas = "
                f"{max_replicas}",
            )
        if not get(job, "spec.rayClusterSpec.enableInTreeAutoscaling") and count == 0:
            yield (
                f"{path}.replicas",
                "0 creates no pod at all; it is the default if the field is left out",
            )
        if group.get("groupName") in names:
            yield f"{path}.groupName", f"the name {group['groupName']} occurs twice"
        names.add(group.get("groupName", ""))


@_register_rule("ValidateRayClusterSpec (autoscaler v2)")
def _autoscaler(job: Tree) -> RuleProblems:
    cluster = get(job, "spec.rayClusterSpec") or {}
    if not cluster.get("enableInTreeAutoscaling"):
        return
    if get(cluster, "autoscalerOptions.version") == "v2":
        for path, group in list_groups(job):
            policy = get(group, "template.spec.restartPolicy")
            if policy not in (None, "Never"):
                yield (
                    f"{path}.template.spec.restartPolicy",
                    f"{policy} must be Never with the autoscaler's version v2",
                )


@_register_rule("ValidateRayClusterSpec")
def _redis(job: Tree) -> RuleProblems:
    if get(job, "spec.rayClusterSpec.gcsFaultToleranceOptions"):
        return
    for path, group in list_groups(job):
        for container in _get_containers(group.get("template") or {}):
            if any(
                variable.get("name") == "RAY_REDIS_ADDRESS"
                for variable in container.get("env") or []
            ):
                yield f"{path}.template.spec", "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions"


@_register_rule("observed: without a token, anyone who reaches the head runs code", "token_auth")
def _token_auth(job: Tree) -> RuleProblems:
    if get(job, "spec.rayClusterSpec.authOptions.mode") != "token":
        yield (
            "spec.rayClusterSpec.authOptions.mode",
            "anyone who can reach the head can run code: must be token",
        )


@_register_rule("ValidateRayClusterSpec (authOptions)")
def _auth(job: Tree) -> RuleProblems:
    options = get(job, "spec.rayClusterSpec.authOptions") or {}
    version = str(get(job, "spec.rayClusterSpec.rayVersion") or "")
    if options.get("mode") != "token":
        return
    match = re.match(r"(\d+)\.(\d+)", version)
    # The operator derives from rayVersion whether the image's Ray knows tokens.
    if not match or (int(match[1]), int(match[2])) < (2, 52):
        yield (
            "spec.rayClusterSpec.rayVersion",
            f"{version or 'nothing'} must be 2.52 or newer for tokens",
        )
    if options.get("enableK8sTokenAuth"):
        yield "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", "it is not allowed in a RayJob"


@_register_rule(
    "common.generateRayStartCommand: memory and devices come from limits, cores from them first"
)
def _limits(job: Tree) -> RuleProblems:
    for path, group in list_groups(job):
        # Ray runs in the first container of a pod; the limits of others do not matter to it.
        for index, container in enumerate(_get_containers(group.get("template") or {})[:1]):
            resources = container.get("resources") or {}
            for name in ("cpu", "memory"):
                if name not in (resources.get("limits") or {}):
                    where = f"{path}.template.spec.containers[{index}].resources.limits.{name}"
                    yield (
                        where,
                        "Ray takes its size from the limits; without a limit it takes the whole "
                        "node's",
                    )
            for name, request in (resources.get("requests") or {}).items():
                limit = parse_quantity((resources.get("limits") or {}).get(name, request))
                if (limit or 0) < (parse_quantity(request) or 0):
                    where = f"{path}.template.spec.containers[{index}].resources.requests.{name}"
                    yield where, f"{request} must not exceed its limit"


@_register_rule(
    "observed: a head with CPUs runs trials beside the driver, and Ray Train's first process may "
    "be placed there"
)
def _head_takes_no_work(job: Tree) -> RuleProblems:
    params = get(job, "spec.rayClusterSpec.headGroupSpec.rayStartParams") or {}
    if params.get("num-cpus") != "0":
        yield (
            "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus",
            'the head must not run trials: must be "0"',
        )
    for container in _get_containers(get(job, "spec.rayClusterSpec.headGroupSpec.template") or {}):
        for name, value in (get(container, "resources.limits") or {}).items():
            if "gpu" in name and parse_quantity(value):
                yield (
                    "spec.rayClusterSpec.headGroupSpec.template.spec",
                    f"the head requests {name}, but does not use it",
                )


_RESTRICTED = "the API server's admission: PodSecurity `restricted`"
_RESTRICTED_VOLUMES = frozenset(
    "configMap csi downwardAPI emptyDir ephemeral persistentVolumeClaim projected secret".split()
)


_NOT_ROOT = "must be true, with a user other than 0"


def _list_all_containers(job: Tree) -> Iterator[tuple[str, Tree]]:
    """Yield (path, container) of every container of every pod.

    Init containers are included, and the autoscaler, which KubeRay adds to the head.
    """
    for path, template in list_templates(job):
        for field in ("containers", "initContainers"):
            for index, container in enumerate(get(template, f"spec.{field}") or []):
                yield f"{path}.spec.{field}[{index}]", container
    if get(job, "spec.rayClusterSpec.enableInTreeAutoscaling"):
        yield "spec.rayClusterSpec.autoscalerOptions", _get_autoscaler(job)


def _get_autoscaler(job: Tree) -> Tree:
    options: Tree = get(job, "spec.rayClusterSpec.autoscalerOptions") or {}
    # Without an image of its own it has the head's, which is checked there.
    return options if options.get("image") else {**options, "image": "@sha256:"}


@_register_rule(_RESTRICTED, "non_root")
def _non_root(job: Tree) -> RuleProblems:
    for path, template in list_templates(job):
        context = get(template, "spec.securityContext") or {}
        if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
            yield (
                f"{path}.spec.securityContext.runAsNonRoot",
                _NOT_ROOT,
            )
    for path, container in _list_all_containers(job):
        context = container.get("securityContext") or {}
        if context.get("runAsNonRoot") is False or context.get("runAsUser") == 0:
            yield f"{path}.securityContext.runAsNonRoot", _NOT_ROOT


@_register_rule(_RESTRICTED, "seccomp")
def _seccomp(job: Tree) -> RuleProblems:
    allowed = ("RuntimeDefault", "Localhost")
    for path, template in list_templates(job):
        if get(template, "spec.securityContext.seccompProfile.type") not in allowed:
            yield f"{path}.spec.securityContext.seccompProfile", "must be RuntimeDefault"
    for path, container in _list_all_containers(job):
        profile = get(container, "securityContext.seccompProfile.type")
        if profile is not None and profile not in allowed:
            yield f"{path}.securityContext.seccompProfile", "must be RuntimeDefault"


@_register_rule(_RESTRICTED, "escalation")
def _escalation(job: Tree) -> RuleProblems:
    for path, container in _list_all_containers(job):
        context = container.get("securityContext") or {}
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{path}.securityContext.allowPrivilegeEscalation", "must be false"
        if context.get("privileged"):
            yield f"{path}.securityContext.privileged", "must be false"


@_register_rule(_RESTRICTED, "capabilities")
def _capabilities(job: Tree) -> RuleProblems:
    for path, container in _list_all_containers(job):
        capabilities = get(container, "securityContext.capabilities") or {}
        if "ALL" not in (capabilities.get("drop") or []):
            yield f"{path}.securityContext.capabilities", "must drop: [ALL]"
        allowed = {"NET_BIND_SERVICE"}
        if any(
            "/" in name and not is_gpu_resource(name)
            for name in get(container, "resources.limits") or {}
        ):
            allowed.add("IPC_LOCK")  # RDMA devices need locked memory
        for name in capabilities.get("add") or []:
            if name not in allowed:
                yield f"{path}.securityContext.capabilities.add", f"{name} must not be added"


@_register_rule(_RESTRICTED, "host_namespaces")
def _host_namespaces(job: Tree) -> RuleProblems:
    for path, template in list_templates(job):
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if get(template, f"spec.{field}"):
                yield f"{path}.spec.{field}", "must be false"
    for path, container in _list_all_containers(job):
        for index, port in enumerate(container.get("ports") or []):
            if port.get("hostPort"):
                yield f"{path}.ports[{index}].hostPort", "must not be set"


@_register_rule(_RESTRICTED, "host_paths")
def _host_paths(job: Tree) -> RuleProblems:
    for path, template in list_templates(job):
        for index, volume in enumerate(get(template, "spec.volumes") or []):
            for kind in sorted(set(volume) - {"name"} - _RESTRICTED_VOLUMES):
                yield (
                    f"{path}.spec.volumes[{index}].{kind}",
                    "must not be used: mount a claim instead",
                )


@_register_rule(_RESTRICTED, "security_options")
def _security_options(job: Tree) -> RuleProblems:
    for path, template in list_templates(job):
        yield from _find_weak_options(f"{path}.spec", get(template, "spec.securityContext") or {})
        for name, value in (get(template, "metadata.annotations") or {}).items():
            if "apparmor" in name and value == "unconfined":
                yield f"{path}.metadata.annotations", f"{name} must not be unconfined"
    for path, container in _list_all_containers(job):
        yield from _find_weak_options(path, container.get("securityContext") or {})


def _find_weak_options(path: str, context: Tree) -> RuleProblems:
    """Yield what of a security context PodSecurity does not allow, beside users and rights."""
    where = f"{path}.securityContext"
    if context.get("procMount") not in (None, "Default"):
        yield f"{where}.procMount", "must be Default"
    if context.get("sysctls"):
        yield f"{where}.sysctls", "must not be set"
    if get(context, "appArmorProfile.type") == "Unconfined":
        yield f"{where}.appArmorProfile", "must not be Unconfined"
    options = context.get("seLinuxOptions") or {}
    if options.get("user") or options.get("role"):
        yield f"{where}.seLinuxOptions", "must not set user or role"
    if options.get("type") not in (None, "", *_SELINUX_TYPES):
        yield f"{where}.seLinuxOptions.type", f"must be one of {', '.join(_SELINUX_TYPES)}"
    if get(context, "windowsOptions.hostProcess"):
        yield f"{where}.windowsOptions.hostProcess", "must be false"


_HARMLESS_NAMES = frozenset({"TOKENIZERS_PARALLELISM"})
"""Names of lorafleet's own variables that only look like secrets."""
_SELINUX_TYPES = ("container_t", "container_init_t", "container_kvm_t", "container_engine_t")


@_register_rule("observed: whoever may read RayJobs and pods reads the values of their variables")
def _secret_values(job: Tree) -> RuleProblems:
    for path, container in _list_all_containers(job):
        for index, variable in enumerate(container.get("env") or []):
            name = str(variable.get("name"))
            if variable.get("value") and is_secret_name(name) and name not in _HARMLESS_NAMES:
                yield (
                    f"{path}.env[{index}]",
                    f"{name} may hold a secret: take it from a Secret (`secrets`)",
                )


@_register_rule("observed: KubeRay's own submitter has no security context, and mounts a token")
def _submitter_template(job: Tree) -> RuleProblems:
    mode = get(job, "spec.submissionMode") or "K8sJobMode"
    if mode == "K8sJobMode" and not get(job, "spec.submitterPodTemplate"):
        yield "spec.submitterPodTemplate", "must be there in K8sJobMode"


@_register_rule(
    "observed: code of models and metrics could use the token of the pod's service account",
    "service_account_token",
)
def _service_account_token(job: Tree) -> RuleProblems:
    autoscales = get(job, "spec.rayClusterSpec.enableInTreeAutoscaling")
    for path, template in list_templates(job):
        # The autoscaler beside the head needs its token.
        if autoscales and path.endswith("headGroupSpec.template"):
            continue
        if get(template, "spec.automountServiceAccountToken") is not False:
            yield f"{path}.spec.automountServiceAccountToken", "must be false"
        for index, volume in enumerate(get(template, "spec.volumes") or []):
            if any(
                "serviceAccountToken" in source for source in get(volume, "projected.sources") or []
            ):
                yield (
                    f"{path}.spec.volumes[{index}].projected",
                    "must not project a service account's token",
                )


@_register_rule("utils.IsGPUResourceKey: Ray gets --num-gpus from these limits only")
def _gpu_names(job: Tree) -> RuleProblems:
    for path, group in list_groups(job)[1:]:
        container = next(iter(_get_containers(group.get("template") or {})), {})
        limits = get(container, "resources.limits") or {}
        where = f"{path}.template.spec.containers[0].resources.limits"
        if (group.get("rayStartParams") or {}).get("num-gpus") or any(map(is_gpu_resource, limits)):
            continue
        for name in limits:
            if "gpu" in name or "/mig-" in name:
                yield (
                    f"{where}.{name}",
                    "KubeRay does not count it as a GPU: the name must end with `gpu`, or be "
                    "nvidia.com/mig-Ng.Mgb; else set rayStartParams.num-gpus with `patch`",
                )


def is_gpu_resource(name: str) -> bool:
    """Return whether KubeRay counts a resource as GPUs."""
    return name.endswith("gpu") or bool(re.search(r"nvidia\.com/mig-\d+g\.\d+gb$", name))


@_register_rule(
    "the kubelet: the time of a preStop hook counts towards terminationGracePeriodSeconds"
)
def _grace(job: Tree) -> RuleProblems:
    for path, template in list_templates(job):
        # 30 s is Kubernetes' default. The hook is `lorafleet node leave --seconds N`
        # (k8s/render.py).
        grace = get(template, "spec.terminationGracePeriodSeconds") or 30
        for container in _get_containers(template):
            command = get(container, "lifecycle.preStop.exec.command") or []
            if "--seconds" in command and int(command[command.index("--seconds") + 1]) >= grace:
                yield (
                    f"{path}.spec.terminationGracePeriodSeconds",
                    f"{grace} must be longer than the preStop hook takes",
                )


@_register_rule("the API server's enum, which the CRD leaves out")
def _pull_policy(job: Tree) -> RuleProblems:
    for path, template in list_templates(job):
        for index, container in enumerate(_get_containers(template)):
            policy = container.get("imagePullPolicy")
            if policy not in (None, "Always", "IfNotPresent", "Never"):
                where = f"{path}.spec.containers[{index}].imagePullPolicy"
                yield where, f"{policy} must be Always, IfNotPresent or Never"


@_register_rule("observed: attempts of one run with different images run different programs")
def _one_image(job: Tree) -> RuleProblems:
    images = {
        container.get("image"): f"{path}.spec.containers[{index}].image"
        for path, template in list_templates(job)
        for index, container in enumerate(_get_containers(template)[:1])
    }
    if len(images) > 1:
        yield (
            list(images.values())[-1],
            f"pods have different images: {', '.join(map(str, images))}",
        )


@_register_rule("observed: a tag can name other programs tomorrow", "image_digest")
def _image_digest(job: Tree) -> RuleProblems:
    for path, container in _list_all_containers(job):
        if "@sha256:" not in str(container.get("image")):
            yield f"{path}.image", f"{container.get('image')} is not pinned by digest"


def _is_queued(job: Tree) -> bool:
    """Return whether Kueue manages a RayJob."""
    return KUEUE_QUEUE in (get(job, "metadata.labels") or {})


@_register_rule("Kueue pkg/controller/jobs/rayjob/rayjob_webhook.go, validateCreate")
def _kueue_shutdown(job: Tree) -> RuleProblems:
    if _is_queued(job) and not get(job, "spec.shutdownAfterJobFinishes"):
        yield (
            "spec.shutdownAfterJobFinishes",
            "Kueue requires true (and therefore no deletionStrategy)",
        )


@_register_rule("Kueue rayjob_webhook.go, validateCreate")
def _kueue_selector(job: Tree) -> RuleProblems:
    if _is_queued(job) and get(job, "spec.clusterSelector"):
        yield "spec.clusterSelector", "Kueue does not manage jobs on existing clusters"


@_register_rule("Kueue rayjob_webhook.go, validateCreate")
def _kueue_autoscaling(job: Tree) -> RuleProblems:
    elastic = (get(job, "metadata.annotations") or {}).get("kueue.x-k8s.io/elastic-job")
    if (
        _is_queued(job)
        and get(job, "spec.rayClusterSpec.enableInTreeAutoscaling")
        and elastic != "true"
    ):
        yield (
            "spec.rayClusterSpec.enableInTreeAutoscaling",
            "Kueue admits a whole job at once: must be false",
        )


@_register_rule("Kueue rayjob_webhook.go, validateCreate")
def _kueue_pod_sets(job: Tree) -> RuleProblems:
    workers = list_groups(job)[1:]
    if not _is_queued(job):
        return
    if len(workers) + 2 > _MAX_POD_SETS:
        yield (
            "spec.rayClusterSpec.workerGroupSpecs",
            f"Kueue allows at most {_MAX_POD_SETS - 2} groups of workers",
        )
    for path, group in workers:
        if group.get("groupName") == "head":
            yield (
                f"{path}.groupName",
                "Kueue uses this name for the head's pods: choose another name",
            )


@_register_rule("Kueue: it sets suspend itself when it admits and preempts a job")
def _kueue_suspend(job: Tree) -> RuleProblems:
    if _is_queued(job) and get(job, "spec.suspend") is not None:
        yield "spec.suspend", "Kueue sets it; leave it out"


@_register_rule("KubeRay batchscheduler/kai-scheduler (DoBatchSchedulingOnSubmission)")
def _kai(job: Tree) -> RuleProblems:
    labels = get(job, "metadata.labels") or {}
    if (
        "kai.scheduler/queue" in labels
        and (get(job, "spec.submissionMode") or "K8sJobMode") == "K8sJobMode"
    ):
        yield "spec.submissionMode", "KAI does not support K8sJobMode; must be HTTPMode"


@_register_rule("KubeRay batchscheduler/yunikorn (populateYuniKornLabels)")
def _yunikorn(job: Tree) -> RuleProblems:
    labels = get(job, "metadata.labels") or {}
    if labels.get("ray.io/gang-scheduling-enabled") == "true" and not labels.get(
        "yunikorn.apache.org/app-id"
    ):
        yield (
            "metadata.labels",
            "YuniKorn needs the label yunikorn.apache.org/app-id to schedule a gang",
        )


def lint_site(*, nodes: int, read_write_many: bool, image: str, version: str) -> list[str]:
    """Return the problems between a job and its site, one message each.

    Args:
        nodes: Worker pods of the job.
        read_write_many: Whether several nodes can mount the storage at the same time.
        image: Image of the site.
        version: Version of lorafleet on this machine.
    """
    problems = []
    if nodes > 1 and not read_write_many:
        problems.append(
            f"storage.read_write_many is false, but the job has {nodes} worker pods on several "
            "nodes: use a ReadWriteMany claim, or one node"
        )
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    # A tag that is no version, such as `latest`, says nothing.
    if re.match(r"v?\d+\.\d+", tag) and tag.lstrip("v") != version:
        problems.append(
            f"image has lorafleet {tag}, but this machine has {version}, so the pods would reject "
            "the job: use an image of the same version"
        )
    return problems
