"""A stand-in for KubeRay and the kubelet: the pods of a RayJob really run, each in namespaces of
its own.

What is executed is what the manifest says: Ray's start lines as KubeRay writes them, the
submitter's script, preStop hooks, mounts and variables. After KubeRay v1.7 (common/pod.go,
common/job.go, rayjob_controller.go). Other than there: all processes are root's, /tmp is shared but
for /tmp/ray, Ray's object store is small, gRPC asks /etc/hosts, limits of CPU and memory are not
enforced, times to live are shortened, and a head that dies is a cluster that is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafleet.k8s.lint import get
from lorafleet.k8s.render import CONFIG
from tests.kubernetes.api_server import ApiServer, Refused, Tree
from tests.kubernetes.pods import BIN, environment

POD = Path(__file__).with_name("pod.sh")
_NETWORK, _BRIDGE = "10.78.0", "lfkube"
_COMMANDS = ("ip", "unshare", "nsenter", "setpriv")
_FINALIZER = "ray.io/rayjob-finalizer"
OVERRIDES = {"GRPC_DNS_RESOLVER": "native"}
"""gRPC's own resolver does not read /etc/hosts."""
_OBJECT_STORE = 90_000_000
_NODE_GRACE_SECONDS = 40.0
"""Time from a node's last heartbeat to its taint (node-monitor-grace-period)."""
_DEFAULT_TOLERATION_SECONDS = 300.0
"""Toleration of an unreachable node that Kubernetes adds to pods without one."""
_STATUS_CHECK_SECONDS = 300.0
"""Time without an answer of the head after which KubeRay fails a RayJob, without a retry."""
_UNREACHABLE = "node.kubernetes.io/unreachable"


def missing() -> str | None:
    """Why no pods can run here, or None."""
    lacks = [command for command in _COMMANDS if shutil.which(command) is None]
    if os.geteuid() != 0:
        return "pods in namespaces need root"
    if lacks:
        return f"no {', '.join(lacks)} (apt-get install iproute2 util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    return None if tried.returncode == 0 else "this machine gives no network namespaces"


@dataclass
class Pod:
    """A pod that runs."""

    name: str
    number: int
    folder: Path
    parent: int
    """The process outside that takes the pod with it."""
    spec: Tree
    variables: dict[str, str]
    ending: bool = False

    @property
    def address(self) -> str:
        return f"{_NETWORK}.{self.number}"

    @property
    def inside(self) -> int | None:
        """Its process 1, as this machine counts."""
        try:
            children = Path(f"/proc/{self.parent}/task/{self.parent}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    @property
    def log(self) -> str:
        try:
            return (self.folder / "log").read_text(errors="replace")
        except OSError:
            return ""

    @property
    def code(self) -> int | None:
        """What its command ended with."""
        try:
            return int((self.folder / "exit").read_text())
        except (OSError, ValueError):
            return None

    def enter(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Run a command in it, as `kubectl exec` does."""
        told = [f"{name}={value}" for name, value in self.variables.items()]
        spaces = ["--mount", "--net", "--pid", "--uts", "--ipc"]
        inside = ["nsenter", f"--target={self.inside}", *spaces, "env", "-i", *told]
        return subprocess.Popen([*inside, *command], **options)

    def processes(self) -> list[str]:
        """Command lines of what runs in it."""
        inside = self.inside
        if inside is None:
            return []
        seen = self.enter(
            ["ps", "-eo", "args", "--no-headers"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        return seen.communicate()[0].decode().splitlines()


@dataclass
class Operator:
    """Watches an API server, and runs what its RayJobs and Jobs say."""

    server: ApiServer
    folder: Path
    storage: Path
    """What every claim is."""
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(10, 250)))
    lock: threading.RLock = field(default_factory=threading.RLock)
    end: threading.Event = field(default_factory=threading.Event)
    tokens: dict[str, str] = field(default_factory=dict)
    attempts: list[str] = field(default_factory=list)
    """Names of the clusters, in the order in which they were made."""
    ttl_scale: float = 0.1
    node_scale: float = 0.1
    """Times around a lost node are shortened by this."""
    made: list[Path] = field(default_factory=list)
    spawner: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    """Whose one thread starts all pods: a parent's death (--pdeathsig) is that of the thread."""

    @property
    def running(self) -> list[str]:
        """Pods in which something runs."""
        return [name for name, pod in list(self.pods.items()) if pod.inside is not None]

    def up(self) -> None:
        for target in (Path(CONFIG), Path("/mnt/lorafleet")):
            if not target.exists():
                target.mkdir(parents=True)
                self.made.append(target)
        self._clear()
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{_NETWORK}.1/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        self.server.pods_exec = self._exec
        self.server.pods_log = lambda pod: self.pods[pod["metadata"]["name"]].log
        self.threads = [
            threading.Thread(target=work, daemon=True) for work in (self._kubelet, self._rayjobs)
        ]
        for thread in self.threads:
            thread.start()

    def down(self) -> None:
        self.end.set()
        for thread in self.threads:
            thread.join(20)
        for pod in list(self.pods.values()):
            self.kill(pod)
        self.spawner.shutdown()
        self._clear()
        for target in self.made:
            with contextlib.suppress(OSError):
                target.rmdir()

    def _clear(self) -> None:
        subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True, check=False)

    # --- the kubelet: pods

    def _kubelet(self) -> None:
        """Pods of Jobs are made, and pods that are deleted are ended: until then their objects
        stay.
        """
        while not self.end.wait(0.1):
            for job in self.server.all("Job"):
                name = job["metadata"]["name"]
                if f"{name}-pod" not in self.pods and "deletionTimestamp" not in job["metadata"]:
                    template = job["spec"]["template"]
                    labels = template["metadata"]["labels"] | {"job-name": name}
                    command = " ".join(template["spec"]["containers"][0]["command"])
                    with contextlib.suppress(Refused):
                        self.start(f"{name}-pod", labels, template["spec"], command, job)
            for pod in list(self.pods.values()):
                if not pod.ending and get(
                    self.server.get("Pod", pod.name), "metadata.deletionTimestamp"
                ):
                    pod.ending = True
                    threading.Thread(target=self._end_gently, args=(pod,), daemon=True).start()

    def start(
        self, name: str, labels: dict[str, str], spec: Tree, command: str, owner: Tree, **more: str
    ) -> Pod:
        """A pod of this name, with its object."""
        with self.lock:
            number = next(self.numbers)
        folder = self.folder / f"{name}-{number}"
        (folder / "home").mkdir(parents=True)
        container = spec["containers"][0]
        own = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "LANG": "C.UTF-8",
        }
        variables = own | OVERRIDES | more | environment(container) | self._secret(container)
        (folder / "mounts").write_text(
            "".join(f"{source} {target}\n" for source, target in self._mounts(folder, spec))
        )
        (folder / "environment").write_text(
            "".join(f"{key}={value}\0" for key, value in variables.items())
        )
        (folder / "command").write_text(command)
        self._write_hosts(folder, name)
        outside, inside = f"lfk{number}", f"lfi{number}"
        _ip("link", "add", outside, "type", "veth", "peer", "name", inside)
        _ip("link", "set", outside, "master", _BRIDGE, "up")
        spaces = [
            "--net",
            "--pid",
            "--uts",
            "--ipc",
            "--mount",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        line = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            *spaces,
            str(POD),
            str(folder),
            name[:60],
            f"{_NETWORK}.{number}",
            f"{_NETWORK}.1",
        ]
        with (folder / "log").open("ab") as out:
            options = {
                "stdin": subprocess.DEVNULL,
                "stdout": out,
                "stderr": out,
                "start_new_session": True,
            }
            process = self.spawner.submit(subprocess.Popen, line, **options).result()
        pod = Pod(name, number, folder, process.pid, spec, variables)
        threading.Thread(target=process.wait, daemon=True).start()
        ends = time.monotonic() + 10
        while pod.inside is None and time.monotonic() < ends:
            time.sleep(0.02)
        _ip("link", "set", inside, "netns", str(pod.inside), "name", "eth0")
        states = [{"name": one["name"], "state": {"running": {}}} for one in spec["containers"]]
        reference = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
        }
        with self.lock:
            self.pods[name] = pod
        self.server.put_down(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "spec": spec,
                "status": {"phase": "Running", "containerStatuses": states},
                "metadata": {
                    "name": name,
                    "labels": labels,
                    "ownerReferences": [reference],
                    "finalizers": ["kubelet"],
                },
            }
        )
        return pod

    def _secret(self, container: Tree) -> dict[str, str]:
        refs = [row for row in container.get("env") or [] if "valueFrom" in row]
        found = {}
        for row in refs:
            ref = row["valueFrom"]["secretKeyRef"]
            value = self.secrets.get(ref["name"], {}).get(ref["key"])
            if value is not None:
                found[row["name"]] = value
        return found

    def _mounts(self, folder: Path, spec: Tree) -> Iterator[tuple[Path, str]]:
        volumes = {volume["name"]: volume for volume in spec.get("volumes") or []}
        for mount in spec["containers"][0].get("volumeMounts") or []:
            volume = volumes[mount["name"]]
            if "persistentVolumeClaim" in volume:
                source = self.storage / (mount.get("subPath") or "")
                source.mkdir(parents=True, exist_ok=True)
                yield source, mount["mountPath"]
            elif "configMap" in volume:
                config = self.server.get("ConfigMap", volume["configMap"]["name"])
                assert config is not None
                (folder / "config").mkdir()
                for name, text in config["data"].items():
                    (folder / "config" / name).write_text(text)
                yield folder / "config", mount["mountPath"]

    def _write_hosts(self, folder: Path, name: str) -> None:
        heads = [
            f"{pod.address} {cluster}-head-svc.default.svc.cluster.local"
            for cluster, pod in self._heads()
        ]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *heads]) + "\n")

    def _heads(self) -> list[tuple[str, Pod]]:
        return [
            (name.removesuffix("-head"), pod)
            for name, pod in self.pods.items()
            if name.endswith("-head")
        ]

    def _exec(self, pod: Tree, command: list[str]) -> subprocess.Popen[bytes]:
        running = self.pods[pod["metadata"]["name"]]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return running.enter(command, **pipes)

    def kill(self, pod: Pod) -> None:
        """A pod is gone at once, with all that ran in it, as when its node is lost."""
        with self.lock:
            self.pods.pop(pod.name, None)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pod.parent, signal.SIGKILL)
        with self.server.store.lock:
            if ("Pod", "default", pod.name) in self.server.store.objects:
                self.server._gone(("Pod", "default", pod.name))
        subprocess.run(["ip", "link", "del", f"lfk{pod.number}"], capture_output=True, check=False)

    def lose_node(self, pod: Pod) -> None:
        """The node of a pod is lost: all that ran is gone at once, and the pod's object stays until
        Kubernetes evicts it.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(pod.parent, signal.SIGKILL)
        seconds = _NODE_GRACE_SECONDS + next(
            (
                float(row["tolerationSeconds"])
                for row in pod.spec.get("tolerations") or []
                if row.get("key") == _UNREACHABLE and "tolerationSeconds" in row
            ),
            _DEFAULT_TOLERATION_SECONDS,
        )
        evict = threading.Timer(seconds * self.node_scale, self.kill, args=(pod,))
        evict.daemon = True
        evict.start()

    def _end_gently(self, pod: Pod) -> None:
        """preStop, then SIGTERM, then the end: all within the grace period."""
        ends = time.monotonic() + pod.spec.get("terminationGracePeriodSeconds", 30)
        hook = get(pod.spec["containers"][0], "lifecycle.preStop.exec.command")
        if hook and pod.inside is not None and pod.code is None:
            with (pod.folder / "prestop").open("ab") as out:
                running = pod.enter(hook, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.wait(max(1.0, ends - time.monotonic()))
        inside = pod.inside
        if inside is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(inside, signal.SIGTERM)
        while pod.inside is not None and time.monotonic() < min(ends, time.monotonic() + 10):
            time.sleep(0.1)
        self.kill(pod)

    # --- the operator: RayJobs

    def _rayjobs(self) -> None:
        known: set[str] = set()
        while not self.end.wait(0.2):
            for job in self.server.all("RayJob"):
                if job["metadata"]["uid"] not in known:
                    known.add(job["metadata"]["uid"])
                    threading.Thread(
                        target=self._drive, args=(job["metadata"]["name"],), daemon=True
                    ).start()

    def _drive(self, name: str) -> None:
        try:
            self._attempts(name)
        except _Gone:
            return

    def _job(self, name: str) -> Tree:
        """The RayJob as it is.

        Raises _Gone when it is not any more; one that is being deleted is let go.
        """
        job = self.server.get("RayJob", name)
        if job is None or self.end.is_set():
            raise _Gone
        if job["metadata"].get("deletionTimestamp"):
            if get(job, "status.jobStatus") not in ("SUCCEEDED", "FAILED", "STOPPED") and get(
                job, "status.jobId"
            ):
                with contextlib.suppress(OSError, KeyError):
                    self._ask(
                        get(job, "status.rayClusterName"),
                        f"/api/jobs/{get(job, 'status.jobId')}/stop",
                        "POST",
                    )
            with self.server.store.lock:
                tree = self.server.store.objects["RayJob", "default", name]
                tree["metadata"]["finalizers"] = []
                self.server._gone(("RayJob", "default", name))
            raise _Gone
        return job

    def _attempts(self, name: str) -> None:
        with self.server.store.lock:
            self.server.store.objects["RayJob", "default", name]["metadata"]["finalizers"] = [
                _FINALIZER
            ]
        failed, most = 0, get(self._job(name), "spec.backoffLimit") or 0
        while True:
            cluster = f"{name}-{secrets.token_hex(3)[:5]}"
            self.attempts.append(cluster)
            outcome = self._attempt(name, cluster)
            if outcome["jobDeploymentStatus"] == "Failed" and outcome["reason"] not in (
                "DeadlineExceeded",
                "JobStatusCheckTimeoutExceeded",
            ):
                failed += 1
                if failed <= most:
                    self._set(
                        name, **outcome | {"jobDeploymentStatus": "Retrying", "failed": failed}
                    )
                    self._delete(cluster)
                    while any(pod.startswith(cluster) for pod in self.pods):
                        time.sleep(0.1)
                    continue
            self._set(name, **outcome, failed=failed)
            self._clear_up(name, cluster, outcome)
            return

    def _set(self, name: str, **status: Any) -> None:
        self._job(name)
        self.server.set_status("RayJob", name, **status)

    def _attempt(self, name: str, cluster: str) -> dict[str, str]:
        """One cluster, from its first pod to the job's end; returns the status."""
        began, job = time.monotonic(), self._job(name)
        deadline = get(job, "spec.activeDeadlineSeconds") or 10**9
        submission = f"{name}-{secrets.token_hex(3)[:5]}"
        self._set(
            name,
            jobDeploymentStatus="Initializing",
            jobStatus="",
            rayClusterName=cluster,
            jobId=submission,
            reason="",
            message="",
        )
        spec = get(job, "spec.rayClusterSpec")
        self.tokens[cluster] = secrets.token_hex(16)
        groups = [
            (group, index)
            for group in spec["workerGroupSpecs"]
            for index in range(group["replicas"])
        ]
        head, *workers = self._bring_up(job, cluster, groups, began + min(deadline, 300))
        self._set(name, jobDeploymentStatus="Running", jobStatus="")
        tries = 1 + int(get(job, "spec.submitterConfig.backoffLimit") or 0)
        submitter = self._submitter(job, cluster, submission, tries)
        told: dict[str, Any] = {}
        heard = time.monotonic()
        while True:
            self._job(name)
            if time.monotonic() - heard > _STATUS_CHECK_SECONDS * self.node_scale:
                return {
                    "jobDeploymentStatus": "Failed",
                    "jobStatus": told.get("status", ""),
                    "reason": "JobStatusCheckTimeoutExceeded",
                    "message": "the head has not answered for 300 seconds",
                }
            if time.monotonic() - began > deadline:
                return {
                    "jobDeploymentStatus": "Failed",
                    "reason": "DeadlineExceeded",
                    "message": "its time is up",
                }
            if head.name not in self.pods:
                return {
                    "jobDeploymentStatus": "Failed",
                    "jobStatus": told.get("status", ""),
                    "reason": "AppFailed",
                    "message": "the submitter has used up its retries",
                }
            for index, pod in enumerate(workers):
                if pod.name not in self.pods:
                    workers[index] = self._worker(job, cluster, *groups[index])
            with contextlib.suppress(OSError):
                told = self._ask(cluster, f"/api/jobs/{submission}")
                heard = time.monotonic()
                self._set(name, jobStatus=told["status"], message=told.get("message") or "")
            if submitter.code not in (None, 0) and tries > 1:
                tries -= 1
                submitter = self._submitter(job, cluster, submission, tries)
            if (
                told.get("status") in ("SUCCEEDED", "FAILED", "STOPPED")
                and submitter.code is not None
            ):
                ended = told["status"] != "FAILED"
                return {
                    "jobDeploymentStatus": "Complete" if ended else "Failed",
                    "jobStatus": told["status"],
                    "reason": "" if ended else "AppFailed",
                    "message": told.get("message") or "",
                }
            time.sleep(0.5)

    def _bring_up(
        self, job: Tree, cluster: str, groups: list[tuple[Tree, int]], ends: float
    ) -> list[Pod]:
        """Start the head and the workers, and wait until all are ready.

        Pods that end before that are started anew: on a slow machine Ray's client server gives up
        after 30 seconds and takes the head with it.
        """

        def start() -> list[Pod]:
            head = self._head(job, cluster, get(job, "spec.rayClusterSpec"))
            return [head, *(self._worker(job, cluster, *one) for one in groups)]

        pods, name = start(), job["metadata"]["name"]
        while not self._ready(cluster, pods):
            self._job(name)
            if time.monotonic() > ends:
                logs = "\n".join(pod.log[-2000:] for pod in pods)
                self._set(name, jobDeploymentStatus="Failed", reason="AppFailed", message=logs)
                raise AssertionError(f"the cluster did not come up: {logs}")
            if any(pod.code is not None for pod in pods):
                for pod in pods:
                    self.kill(pod)
                pods = start()
            time.sleep(0.3)
        return pods

    def _ask(self, cluster: str, path: str, method: str = "GET") -> Any:
        """Ray's dashboard, as the operator asks it."""
        head = self.pods.get(f"{cluster}-head")
        if head is None:
            raise OSError("no head")
        request = urllib.request.Request(f"http://{head.address}:8265{path}", method=method)
        request.add_header("Authorization", f"Bearer {self.tokens[cluster]}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def _ready(self, cluster: str, pods: list[Pod]) -> bool:
        """Whether all pods pass KubeRay's readiness probes."""
        paths = [f"http://{pods[0].address}:8265/api/gcs_healthz"]
        paths += [f"http://{pod.address}:52365/api/local_raylet_healthz" for pod in pods]
        for path in paths:
            try:
                with urllib.request.urlopen(path, timeout=3):
                    pass
            except (OSError, urllib.error.URLError):
                return False
        return True

    def _labels(
        self, job: Tree, cluster: str, template: Tree, kind: str, group: str
    ) -> dict[str, str]:
        return template["metadata"]["labels"] | {
            "ray.io/cluster": cluster,
            "ray.io/node-type": kind,
            "ray.io/group": group,
            "ray.io/originated-from-cr-name": job["metadata"]["name"],
        }

    def _ray_env(self, cluster: str, address: str) -> dict[str, str]:
        return {
            "RAY_CLUSTER_NAME": cluster,
            "RAY_ADDRESS": address,
            "RAY_PORT": "6379",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.tokens[cluster],
        }

    def _head(self, job: Tree, cluster: str, spec: Tree) -> Pod:
        group = spec["headGroupSpec"]
        line = "ulimit -n 65536; " + ray_start(group, head=True)
        labels = self._labels(job, cluster, group["template"], "head", "headgroup")
        return self.start(
            f"{cluster}-head",
            labels,
            group["template"]["spec"],
            line,
            job,
            **self._ray_env(cluster, "127.0.0.1:6379"),
        )

    def _worker(self, job: Tree, cluster: str, group: Tree, index: int) -> Pod:
        service = f"{cluster}-head-svc.default.svc.cluster.local"
        wait = (
            f"until ray health-check --address {service}:6379 >/dev/null 2>&1; do sleep 1; done; "
        )
        line = wait + "ulimit -n 65536; " + ray_start(group, address=f"{service}:6379")
        labels = self._labels(job, cluster, group["template"], "worker", group["groupName"])
        name = f"{cluster}-{group['groupName']}-{secrets.token_hex(3)[:5]}"
        return self.start(
            name,
            labels,
            group["template"]["spec"],
            line,
            job,
            **self._ray_env(cluster, f"{service}:6379"),
        )

    def _submitter(self, job: Tree, cluster: str, submission: str, left: int) -> Pod:
        """The submitter of K8sJobMode, with KubeRay's script: the entrypoint unquoted, JSON in
        double quotes.
        """
        spec, address = job["spec"], f"http://{cluster}-head-svc.default.svc.cluster.local:8265"
        metadata, resources = (
            json.dumps(json.dumps(spec["metadata"])),
            json.dumps(spec["entrypointResources"]),
        )
        script = (
            f"if ! ray job status --address {address} {submission} >/dev/null 2>&1 ; then ray job "
            f"submit --address {address} --no-wait --metadata-json {metadata} --submission-id "
            f"{submission} --entrypoint-resources {resources} -- {spec['entrypoint'].strip()} ; fi "
            f"; ray job logs --address {address} --follow {submission}"
        )
        template = spec["submitterPodTemplate"]
        name = job["metadata"]["name"]
        labels = template["metadata"]["labels"] | {"job-name": name}
        return self.start(
            f"{name}-submitter-{cluster[-5:]}-{left}",
            labels,
            template["spec"],
            script,
            job,
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=self.tokens[cluster],
            RAY_DASHBOARD_ADDRESS=address,
            RAY_JOB_SUBMISSION_ID=submission,
        )

    def _delete(self, cluster: str, kinds: tuple[str, ...] = ("head", "worker")) -> None:
        """Take pods of a cluster away."""
        for pod in self.server.all("Pod"):
            labels = pod["metadata"]["labels"]
            if labels.get("ray.io/cluster") == cluster and labels["ray.io/node-type"] in kinds:
                with contextlib.suppress(Refused):
                    self.server.delete(_kind("Pod"), "default", pod["metadata"]["name"])

    def _clear_up(self, name: str, cluster: str, outcome: dict[str, str]) -> None:
        """What the deletion rules say, each after its shortened time."""
        began = time.monotonic()
        for rule in get(self._job(name), "spec.deletionStrategy.deletionRules") or []:
            when = rule["condition"]
            if any(outcome.get(key) != value for key, value in when.items() if key != "ttlSeconds"):
                continue
            while time.monotonic() - began < when["ttlSeconds"] * self.ttl_scale:
                self._job(name)
                time.sleep(0.3)
            if rule["policy"] == "DeleteWorkers":
                self._delete(cluster, ("worker",))
            elif rule["policy"] == "DeleteCluster":
                self._delete(cluster)


class _Gone(Exception):
    """The RayJob is not there any more."""


def ray_start(group: Tree, *, head: bool = False, address: str = "") -> str:
    """The start line that KubeRay makes of a group: its own defaults, what limits say, what
    rayStartParams say last.
    """
    container = group["template"]["spec"]["containers"][0]
    limits = container["resources"]["limits"]
    params = {
        "block": "true",
        "dashboard-agent-listen-port": "52365",
        "metrics-export-port": "8080",
        "num-cpus": limits["cpu"],
        "memory": str(int(limits["memory"].removesuffix("Mi")) * 2**20),
        "object-store-memory": str(_OBJECT_STORE),
    }
    gpus = next((count for name, count in limits.items() if name.endswith("gpu")), None)
    params |= {"num-gpus": gpus} if gpus else {}
    params |= {"head": "true", "dashboard-host": "0.0.0.0"} if head else {"address": address}
    if group.get("labels"):
        params["labels"] = ",".join(f"{key}={value}" for key, value in group["labels"].items())
    params |= group["rayStartParams"]
    words = [
        f"--{key}" if value == "true" else f"--{key}={value}"
        for key, value in params.items()
        if value != "false"
    ]
    return "ray start " + " ".join(words)


def _kind(name: str) -> Any:
    from tests.kubernetes.api_server import KINDS

    return next(kind for kind in KINDS if kind.kind == name)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr}")
