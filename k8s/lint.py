"""What the KubeRay operator and Kueue refuse, and what goes wrong without a word, that no API server checks.

Each rule names where it comes from: a function of KubeRay v1.7.0 (ray-operator/controllers/ray/utils/validation.go
unless said otherwise), of Kueue v0.19 (pkg/controller/jobs), or what was seen to happen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

Tree = dict[str, Any]
Found = Iterator[tuple[str, str]]
_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(m|Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?")
_SCALE = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50,
          "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}  # fmt: skip
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_MOST_POD_SETS = 18
KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a RayJob."""

    rule: str
    """The rule's name."""
    path: str
    """Where, such as `spec.backoffLimit`."""
    sentence: str
    """What is wrong, and what would be right."""
    source: str
    """Where the rule comes from."""


@dataclass(frozen=True)
class Rule:
    """A rule and its source."""

    name: str
    source: str
    look: Callable[[Tree], Found]


RULES: list[Rule] = []


def _rule(source: str) -> Callable[[Callable[[Tree], Found]], Callable[[Tree], Found]]:
    def add(look: Callable[[Tree], Found]) -> Callable[[Tree], Found]:
        RULES.append(Rule(look.__name__.lstrip("_"), source, look))
        return look

    return add


def lint(job: Tree) -> list[Finding]:
    """All that is wrong with a RayJob whose form is right."""
    return [Finding(rule.name, path, sentence, rule.source) for rule in RULES for path, sentence in rule.look(job)]


def groups(job: Tree) -> list[tuple[str, Tree]]:
    """(path, group) of the head and each group of workers."""
    cluster = "spec.rayClusterSpec"
    spec = get(job, cluster) or {}
    head = [(f"{cluster}.headGroupSpec", spec["headGroupSpec"])] if spec.get("headGroupSpec") else []
    workers = enumerate(spec.get("workerGroupSpecs") or [])
    return head + [(f"{cluster}.workerGroupSpecs[{index}]", group) for index, group in workers]


def templates(job: Tree) -> list[tuple[str, Tree]]:
    """(path, pod template) of every kind of pod."""
    found = [(f"{path}.template", group.get("template") or {}) for path, group in groups(job)]
    submitter = get(job, "spec.submitterPodTemplate")
    return [*found, ("spec.submitterPodTemplate", submitter)] if submitter else found


def get(tree: Any, path: str) -> Any:
    """What stands at a dotted path, or None."""
    for part in path.split("."):
        if not isinstance(tree, dict):
            return None
        tree = tree.get(part)
    return tree


def quantity(text: Any) -> float | None:
    """A quantity of Kubernetes as a number; None for what is none."""
    found = _QUANTITY.fullmatch(str(text))
    return float(found[1]) * _SCALE.get(found[2] or "", 1.0) if found else None


def _containers(template: Tree) -> list[Tree]:
    return get(template, "spec.containers") or []


@_rule("ValidateRayJobMetadata")
def _name(job: Tree) -> Found:
    name = str(get(job, "metadata.name") or "")
    if len(name) > 47:
        yield "metadata.name", f"{name} has {len(name)} characters, but KubeRay allows 47"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield "metadata.name", f"{name!r} must begin with a letter and have lower-case letters, digits and dashes only"


@_rule("the API server's rule for labels of objects, which the CRD leaves out of its schema")
def _labels(job: Tree) -> Found:
    for place in ("labels", "annotations"):
        for key, value in (get(job, f"metadata.{place}") or {}).items():
            if not isinstance(value, str):
                yield f"metadata.{place}.{key}", f"{value!r} must be a text"
            elif place == "labels" and not _LABEL.fullmatch(value):
                yield f"metadata.{place}.{key}", f"{value!r} is no value of a label (63 letters, digits and -_.)"


@_rule("ValidateRayJobSpec; the CRD has no enum")
def _submission_mode(job: Tree) -> Found:
    mode = get(job, "spec.submissionMode") or "K8sJobMode"
    if mode not in _MODES:
        yield "spec.submissionMode", f"{mode} is no mode; must be {', '.join(_MODES)}"


@_rule("ValidateRayJobSpec")
def _suspend_needs_shutdown(job: Tree) -> Found:
    if get(job, "spec.suspend") and not get(job, "spec.shutdownAfterJobFinishes"):
        yield "spec.suspend", "suspend needs shutdownAfterJobFinishes: true"


@_rule("ValidateRayJobSpec")
def _ttl_needs_shutdown(job: Tree) -> Found:
    ttl = get(job, "spec.ttlSecondsAfterFinished")
    if ttl and not get(job, "spec.shutdownAfterJobFinishes"):
        yield "spec.ttlSecondsAfterFinished", "it needs shutdownAfterJobFinishes: true"
    if isinstance(ttl, int) and ttl < 0:
        yield "spec.ttlSecondsAfterFinished", f"{ttl} must not be negative"


@_rule("ValidateRayJobSpec")
def _deletion_rules_or_shutdown(job: Tree) -> Found:
    if get(job, "spec.deletionStrategy") and get(job, "spec.shutdownAfterJobFinishes"):
        yield "spec.deletionStrategy", "it excludes shutdownAfterJobFinishes; leave one of the two out"


@_rule("validateDeletionRules")
def _deletion_rules(job: Tree) -> Found:
    rules = get(job, "spec.deletionStrategy.deletionRules") or []
    seen: dict[tuple[str, str, str], int] = {}
    times: dict[tuple[str, str], dict[str, int]] = {}
    for index, rule in enumerate(rules):
        path, condition = f"spec.deletionStrategy.deletionRules[{index}]", rule.get("condition") or {}
        kinds = [kind for kind in ("jobStatus", "jobDeploymentStatus") if condition.get(kind)]
        if len(kinds) != 1:
            yield path, "a condition must name jobStatus or jobDeploymentStatus, and only one of them"
            continue
        if condition.get("jobStatus") not in (None, "SUCCEEDED", "FAILED"):
            yield path, f"jobStatus {condition['jobStatus']} cannot be matched; must be SUCCEEDED or FAILED"
        what = (kinds[0], condition[kinds[0]])
        key = (*what, rule["policy"])
        if key in seen:
            yield path, f"the same condition and policy stand in deletionRules[{seen[key]}]"
        seen[key] = index
        times.setdefault(what, {})[rule["policy"]] = condition.get("ttlSeconds", 0)
        if rule["policy"] == "DeleteWorkers" and get(job, "spec.rayClusterSpec.enableInTreeAutoscaling"):
            yield path, "DeleteWorkers is refused with autoscaling"
    for what, policies in times.items():
        order = [name for name in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if name in policies]
        for sooner, later in pairwise(order):
            if policies[sooner] > policies[later]:
                where = f"{what[0]} {what[1]}"
                yield (
                    "spec.deletionStrategy.deletionRules",
                    f"under {where} {sooner} comes after {policies[sooner]} s, which is later than {later}",
                )


@_rule("ValidateRayJobSpec")
def _backoff_limit(job: Tree) -> Found:
    limit = get(job, "spec.backoffLimit")
    if isinstance(limit, int) and limit < 0:
        yield "spec.backoffLimit", f"{limit} must not be negative"
    if limit and get(job, "spec.submissionMode") == "InteractiveMode":
        yield "spec.backoffLimit", "InteractiveMode knows no retries; must be 0"
    if limit and get(job, "spec.clusterSelector"):
        yield "spec.backoffLimit", "a job on a cluster that is there already knows no retries; must be 0"


@_rule("ValidateRayJobSpec")
def _deadlines(job: Tree) -> Found:
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        value = get(job, f"spec.{field}")
        if isinstance(value, int) and value <= 0:
            yield f"spec.{field}", f"{value} must be above 0"


@_rule("seen: preRunningDeadlineSeconds counts the time that pods wait for room, and ends the job (docs/kubernetes.md)")
def _no_deadline_for_waiting(job: Tree) -> Found:
    if get(job, "spec.preRunningDeadlineSeconds") and not _queued(job):
        yield "spec.preRunningDeadlineSeconds", "without Kueue, which admits first, waiting for room ends the job"


@_rule("ValidateRayJobSpec")
def _cluster_or_selector(job: Tree) -> Found:
    cluster, selector = get(job, "spec.rayClusterSpec"), get(job, "spec.clusterSelector")
    if not cluster and not selector:
        yield "spec", "one of rayClusterSpec and clusterSelector must be there"
    if selector and get(job, "spec.suspend"):
        yield "spec.clusterSelector", "a job on a cluster that is there already cannot be suspended"


@_rule("ValidateRayJobSpec")
def _runtime_env_is_yaml(job: Tree) -> Found:
    text = get(job, "spec.runtimeEnvYAML")
    try:
        yaml.safe_load(text or "")
    except yaml.YAMLError as error:
        yield "spec.runtimeEnvYAML", f"not YAML: {str(error).splitlines()[0]}"


@_rule("common.GetK8sJobCommand: the strings are pasted into a bash script, in double quotes or bare (seen)")
def _nothing_to_expand(job: Tree) -> Found:
    if get(job, "spec.submissionMode") == "HTTPMode":
        return
    texts = {"spec.runtimeEnvYAML": get(job, "spec.runtimeEnvYAML") or ""}
    texts |= {f"spec.metadata.{key}": f"{key}{value}" for key, value in (get(job, "spec.metadata") or {}).items()}
    for path, text in texts.items():
        if re.search(r"[$`\\]", str(text)):
            yield path, "the submitter's bash expands $, back-ticks and backslashes in it; must have none"
    command = str(get(job, "spec.entrypoint") or "")
    if re.search(r"[$`;&|<>(){}\n\\*?!#~]", command):
        yield "spec.entrypoint", "the submitter's bash would run or expand a part of it; must be plain words"


@_rule("common.GetK8sJobCommand")
def _entrypoint(job: Tree) -> Found:
    if not get(job, "spec.entrypoint") and get(job, "spec.submissionMode") != "InteractiveMode":
        yield "spec.entrypoint", "there is no command to run"


@_rule("common.GetK8sJobCommand: it goes to `ray job submit --entrypoint-resources`")
def _entrypoint_resources(job: Tree) -> Found:
    text = get(job, "spec.entrypointResources")
    if text is None:
        return
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        yield "spec.entrypointResources", f"{text!r} must be a JSON object of resources"


@_rule("ValidateRayJobSpec")
def _sidecar(job: Tree) -> Found:
    if get(job, "spec.submissionMode") != "SidecarMode":
        return
    for field in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
        if get(job, f"spec.{field}"):
            yield f"spec.{field}", "SidecarMode has no submitter of its own; leave it out"
    policy = get(job, "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy")
    if policy not in (None, "Never"):
        path = "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy"
        yield path, f"{policy} must be Never with SidecarMode"


@_rule("ValidateRayJobSpec (submitterPodTemplate); batchv1.Job refuses Always")
def _submitter(job: Tree) -> Found:
    if get(job, "spec.submissionMode") == "HTTPMode" and get(job, "spec.submitterPodTemplate"):
        yield "spec.submitterPodTemplate", "HTTPMode has no submitter; leave it out"
    policy = get(job, "spec.submitterPodTemplate.spec.restartPolicy")
    if get(job, "spec.submitterPodTemplate") and policy not in ("Never", "OnFailure"):
        yield "spec.submitterPodTemplate.spec.restartPolicy", f"{policy} must be Never or OnFailure"


@_rule("ValidateRayClusterSpec")
def _containers_are_there(job: Tree) -> Found:
    for path, group in groups(job):
        if not _containers(group.get("template") or {}):
            yield f"{path}.template.spec.containers", "there must be a container"


@_rule("ValidateRayClusterSpec")
def _resources_once(job: Tree) -> Found:
    for path, group in groups(job):
        params = group.get("rayStartParams") or {}
        if group.get("resources") and any(name in params for name in ("num-cpus", "num-gpus", "memory", "resources")):
            yield f"{path}.resources", "resources stand here and in rayStartParams; leave one of them out"
        if "labels" in params:
            yield f"{path}.rayStartParams.labels", "labels go into the group's own `labels`"


@_rule("ValidateRayClusterSpec: rayStartParams are pasted into a shell's command")
def _start_params(job: Tree) -> Found:
    for path, group in groups(job):
        for name, value in (group.get("rayStartParams") or {}).items():
            where = f"{path}.rayStartParams.{name}"
            if name in ("num-cpus", "num-gpus", "memory", "object-store-memory") and not re.fullmatch(r"\d+", value):
                yield where, f"{value!r} must be a whole number, as a text"
            bare = re.sub(r"'[^']*'", "", value)
            if re.search(r"[$`;&|<>(){}\"'\s\\]", bare):
                yield where, f"{value!r} goes through a shell: single quotes must go round it"


@_rule("ValidateRayClusterSpec")
def _replicas(job: Tree) -> Found:
    names: set[str] = set()
    for path, group in groups(job)[1:]:
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        count = group.get("replicas", 0)
        if least > most:
            yield f"{path}.minReplicas", f"{least} must not be above maxReplicas = {most}"
        elif not least <= count <= most:
            yield f"{path}.replicas", f"{count} must be between minReplicas = {least} and maxReplicas = {most}"
        if not get(job, "spec.rayClusterSpec.enableInTreeAutoscaling") and count == 0:
            yield f"{path}.replicas", "0 means no pod at all; it is the default where it is left out"
        if group.get("groupName") in names:
            yield f"{path}.groupName", f"{group['groupName']} stands there twice"
        names.add(group.get("groupName", ""))


@_rule("ValidateRayClusterSpec (autoscaler v2)")
def _autoscaler(job: Tree) -> Found:
    cluster = get(job, "spec.rayClusterSpec") or {}
    if not cluster.get("enableInTreeAutoscaling"):
        return
    if get(cluster, "autoscalerOptions.version") == "v2":
        for path, group in groups(job):
            policy = get(group, "template.spec.restartPolicy")
            if policy not in (None, "Never"):
                yield f"{path}.template.spec.restartPolicy", f"{policy} must be Never with the autoscaler's version v2"


@_rule("ValidateRayClusterSpec")
def _redis(job: Tree) -> Found:
    if get(job, "spec.rayClusterSpec.gcsFaultToleranceOptions"):
        return
    for path, group in groups(job):
        for container in _containers(group.get("template") or {}):
            if any(variable.get("name") == "RAY_REDIS_ADDRESS" for variable in container.get("env") or []):
                yield f"{path}.template.spec", "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions"


@_rule("ValidateRayClusterSpec (authOptions)")
def _auth(job: Tree) -> Found:
    options = get(job, "spec.rayClusterSpec.authOptions") or {}
    version = str(get(job, "spec.rayClusterSpec.rayVersion") or "")
    if options.get("mode") != "token":
        yield "spec.rayClusterSpec.authOptions.mode", "anybody who reaches the head can run code: must be token"
        return
    known = re.match(r"(\d+)\.(\d+)", version)
    if not known or (int(known[1]), int(known[2])) < (2, 52):
        yield "spec.rayClusterSpec.rayVersion", f"{version or 'nothing'} must be 2.52 or newer for tokens"
    if options.get("enableK8sTokenAuth"):
        yield "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", "it is refused for a RayJob"


@_rule("common.BuildPod (podMemoryLimit, rayStartParams): Ray is told limits, and not requests")
def _limits(job: Tree) -> Found:
    for path, group in groups(job):
        for index, container in enumerate(_containers(group.get("template") or {})[:1]):
            resources = container.get("resources") or {}
            for name in ("cpu", "memory"):
                if name not in (resources.get("limits") or {}):
                    where = f"{path}.template.spec.containers[{index}].resources.limits.{name}"
                    yield where, "Ray takes its size from the limits; without one it takes the whole node's"
            for name, asked in (resources.get("requests") or {}).items():
                limit = quantity((resources.get("limits") or {}).get(name, asked))
                if (limit or 0) < (quantity(asked) or 0):
                    where = f"{path}.template.spec.containers[{index}].resources.requests.{name}"
                    yield where, f"{asked} must not be above its limit"


@_rule("seen: a head with CPUs runs trials beside the driver, and Ray Train's first process may land there")
def _head_takes_no_work(job: Tree) -> Found:
    params = get(job, "spec.rayClusterSpec.headGroupSpec.rayStartParams") or {}
    if params.get("num-cpus") != "0":
        yield "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 'the head must take no trials: must be "0"'
    for container in _containers(get(job, "spec.rayClusterSpec.headGroupSpec.template") or {}):
        for name, value in (get(container, "resources.limits") or {}).items():
            if "gpu" in name and quantity(value):
                yield "spec.rayClusterSpec.headGroupSpec.template.spec", f"the head asks for {name}, and uses none"


@_rule("the kubelet's: PodSecurity `restricted`")
def _restricted(job: Tree) -> Found:
    for path, template in templates(job):
        if get(template, "spec.securityContext.runAsNonRoot") is not True:
            yield f"{path}.spec.securityContext.runAsNonRoot", "PodSecurity `restricted` wants true"
        if get(template, "spec.securityContext.seccompProfile.type") not in ("RuntimeDefault", "Localhost"):
            yield f"{path}.spec.securityContext.seccompProfile", "PodSecurity `restricted` wants RuntimeDefault"
        for index, container in enumerate(_containers(template)):
            inside = container.get("securityContext") or {}
            where = f"{path}.spec.containers[{index}].securityContext"
            if inside.get("allowPrivilegeEscalation") is not False:
                yield f"{where}.allowPrivilegeEscalation", "PodSecurity `restricted` wants false"
            if "ALL" not in (get(inside, "capabilities.drop") or []):
                yield f"{where}.capabilities", "PodSecurity `restricted` wants drop: [ALL]"


@_rule("the kubelet's: what a preStop hook takes counts against terminationGracePeriodSeconds")
def _grace(job: Tree) -> Found:
    for path, template in templates(job):
        grace = get(template, "spec.terminationGracePeriodSeconds") or 30
        for container in _containers(template):
            command = get(container, "lifecycle.preStop.exec.command") or []
            if "--seconds" in command and int(command[command.index("--seconds") + 1]) >= grace:
                yield f"{path}.spec.terminationGracePeriodSeconds", f"{grace} must be above what preStop takes"


@_rule("the API server's enum, which the CRD leaves out")
def _pull_policy(job: Tree) -> Found:
    for path, template in templates(job):
        for index, container in enumerate(_containers(template)):
            policy = container.get("imagePullPolicy")
            if policy not in (None, "Always", "IfNotPresent", "Never"):
                where = f"{path}.spec.containers[{index}].imagePullPolicy"
                yield where, f"{policy} must be Always, IfNotPresent or Never"


@_rule("seen: attempts of one run with other images are other programs")
def _one_image(job: Tree) -> Found:
    images = {
        container.get("image"): f"{path}.spec.containers[{index}].image"
        for path, template in templates(job)
        for index, container in enumerate(_containers(template)[:1])
    }
    if len(images) > 1:
        yield list(images.values())[-1], f"pods have different images: {', '.join(map(str, images))}"
    for image, path in images.items():
        if "@sha256:" not in str(image):
            yield path, f"{image} is not pinned by digest"


def _queued(job: Tree) -> bool:
    return KUEUE_QUEUE in (get(job, "metadata.labels") or {})


@_rule("Kueue pkg/controller/jobs/rayjob/rayjob_webhook.go, validateCreate")
def _kueue_shutdown(job: Tree) -> Found:
    if _queued(job) and not get(job, "spec.shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes", "Kueue wants true (and therefore no deletionStrategy)"


@_rule("Kueue rayjob_webhook.go, validateCreate")
def _kueue_selector(job: Tree) -> Found:
    if _queued(job) and get(job, "spec.clusterSelector"):
        yield "spec.clusterSelector", "Kueue takes no jobs on clusters that are there already"


@_rule("Kueue rayjob_webhook.go, validateCreate")
def _kueue_autoscaling(job: Tree) -> Found:
    elastic = (get(job, "metadata.annotations") or {}).get("kueue.x-k8s.io/elastic-job")
    if _queued(job) and get(job, "spec.rayClusterSpec.enableInTreeAutoscaling") and elastic != "true":
        yield "spec.rayClusterSpec.enableInTreeAutoscaling", "Kueue admits a whole job: must be false"


@_rule("Kueue rayjob_webhook.go, validateCreate")
def _kueue_pod_sets(job: Tree) -> Found:
    workers = groups(job)[1:]
    if not _queued(job):
        return
    if len(workers) + 2 > _MOST_POD_SETS:
        yield "spec.rayClusterSpec.workerGroupSpecs", f"Kueue takes {_MOST_POD_SETS - 2} groups of workers at most"
    for path, group in workers:
        if group.get("groupName") == "head":
            yield f"{path}.groupName", "Kueue calls the head's pods so; must be another name"


@_rule("Kueue: it sets suspend itself when it admits and preempts")
def _kueue_suspend(job: Tree) -> Found:
    if _queued(job) and get(job, "spec.suspend") is not None:
        yield "spec.suspend", "Kueue sets it; leave it out"


@_rule("KubeRay batchscheduler/kai-scheduler (DoBatchSchedulingOnSubmission)")
def _kai(job: Tree) -> Found:
    labels = get(job, "metadata.labels") or {}
    if "kai.scheduler/queue" in labels and (get(job, "spec.submissionMode") or "K8sJobMode") == "K8sJobMode":
        yield "spec.submissionMode", "KAI refuses K8sJobMode; must be HTTPMode"


@_rule("KubeRay batchscheduler/yunikorn (populateYuniKornLabels)")
def _yunikorn(job: Tree) -> Found:
    labels = get(job, "metadata.labels") or {}
    if labels.get("ray.io/gang-scheduling-enabled") == "true" and not labels.get("yunikorn.apache.org/app-id"):
        yield "metadata.labels", "YuniKorn needs yunikorn.apache.org/app-id for a gang"


def lint_site(*, nodes: int, read_write_many: bool, image: str, version: str) -> list[str]:
    """What is wrong between a job and the site that it is for, a sentence each."""
    found = []
    if nodes > 1 and not read_write_many:
        found.append(
            f"storage.read_write_many is false, and the job has {nodes} worker pods on several nodes: the claim must "
            "be ReadWriteMany"
        )
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    if re.match(r"v?\d+\.\d+", tag) and tag.lstrip("v") != version:
        found.append(f"image has lorafleet {tag}, and this is {version}: the pods would refuse the job")
    return found
