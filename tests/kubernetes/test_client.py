"""A run on Kubernetes over HTTP: the real client against an API server of ours that validates,
watches and fails.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafleet.cluster.backends import get_backend
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.remote import staging
from lorafleet.cluster.remote.place import upload_items
from lorafleet.cluster.remote.transfer import (
    UploadItem,
    collect_file_stats,
    compute_digest,
    iterate_frames,
    receive,
)
from lorafleet.cluster.submission import SITE_FILE, update_record
from lorafleet.commands.logs import find_driver_log
from lorafleet.jobs.errors import (
    CommandFailed,
    ExitCode,
    LorafleetError,
    PlacementRefused,
    RunError,
    UserError,
)
from lorafleet.jobs.runs.plan import MANIFEST
from lorafleet.jobs.runs.records import MetricsRow
from lorafleet.jobs.runs.run import Run, RunState, TrialState
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.k8s import storage_pod as porter
from lorafleet.k8s.backend import KubernetesBackend
from lorafleet.k8s.client import Client
from lorafleet.k8s.errors import ClusterError
from lorafleet.k8s.lint import get
from lorafleet.k8s.render import ATTEMPT_LABEL, HEAD, RUN_LABEL, get_run_folder
from lorafleet.k8s.watch import KubernetesWatch
from tests.conftest import JobMaker, lorafleet
from tests.kubernetes.api_server import ApiServer, Fault
from tests.kubernetes.crd import CRD
from tests.kubernetes.over_http import FINISHED, head, name_of, storage_at, stored
from tests.kubernetes.pods import BIN, Kubelet, became, secrets_asked
from tests.unit.k8s.test_render import bare

# --- handing over


def test_what_is_made(server: ApiServer, submitted: Callable[..., Run]) -> None:
    run = submitted()
    name = name_of(run)
    job = server.get("RayJob", name)
    assert job is not None
    assert job["metadata"]["labels"][RUN_LABEL] == run.id
    for kind in ("ConfigMap", "NetworkPolicy"):
        made = server.get(kind, name)
        assert made is not None
        (owner,) = made["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"]) == (
            "RayJob",
            name,
            job["metadata"]["uid"],
        )
    config = server.get("ConfigMap", name)
    assert config is not None
    assert json.loads(config["data"]["plan.json"])["job"]["name"] == "tiny"
    assert json.loads(config["data"]["plan.json"])["files"] == {}
    assert stored(run)["handed_over"] is True
    assert (
        get_backend(run).status(run).message
        == f"RayJob {name} was created, but the operator has not handled it yet"
    )
    server.delete(next(kind for kind in _kinds() if kind.kind == "RayJob"), "default", name)
    assert server.all("ConfigMap") == server.all("NetworkPolicy") == []
    assert not secrets_asked(server)


def _kinds() -> Any:
    from tests.kubernetes.api_server import KINDS

    return KINDS


def test_two_calls_make_two_runs(server: ApiServer, submitted: Callable[..., Run]) -> None:
    assert name_of(submitted()) != name_of(submitted())
    assert len(server.all("RayJob")) == 2


def test_an_answer_that_is_lost(server: ApiServer, submitted: Callable[..., Run]) -> None:
    """The server has made the object and could not say so: the client tries again, meets it, and
    knows it.
    """
    server.faults += [
        Fault("POST", path, after=True) for path in ("configmaps", "networkpolicies", "rayjobs")
    ]
    run = submitted()
    assert stored(run)["handed_over"] is True
    assert len(server.all("RayJob")) == 1
    assert server.get("ConfigMap", name_of(run))["metadata"]["ownerReferences"]  # type: ignore[index]


@pytest.mark.parametrize(("status", "headers"), [(429, {"Retry-After": "1"}), (503, {}), (500, {})])
def test_a_busy_server_is_asked_again(
    status: int, headers: dict[str, str], server: ApiServer, submitted: Callable[..., Run]
) -> None:
    server.faults.append(Fault("POST", "rayjobs", status, times=2, headers=headers))
    began = time.monotonic()
    run = submitted()
    assert server.get("RayJob", name_of(run)) is not None
    if headers:
        assert time.monotonic() - began >= 2  # as long as it was told to


def test_an_object_of_somebody_else_is_left_alone(
    server: ApiServer,
    submitted: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorafleet.jobs.runs.run.secrets.token_hex", lambda _: "abcdef")
    theirs = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "tiny-abcdef-1"},
        "data": {"a": "b"},
    }
    server.put_down(theirs)
    with pytest.raises(
        RunError, match="a ConfigMap tiny-abcdef-1 exists already, and another command created it"
    ):
        submitted()
    assert server.get("ConfigMap", "tiny-abcdef-1")["data"] == {"a": "b"}  # type: ignore[index]
    assert server.all("RayJob") == server.all("NetworkPolicy") == []
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("status", [400, 403, 422])
def test_what_the_server_refuses_leaves_nothing(
    status: int, server: ApiServer, submitted: Callable[..., Run], tmp_path: Path
) -> None:
    server.faults.append(Fault("POST", "rayjobs", status))
    with pytest.raises(
        ClusterError, match=f"RayJob tiny-.* was not created: the test wants a {status}"
    ):
        submitted()
    assert server.all("ConfigMap") == server.all("NetworkPolicy") == server.all("RayJob") == []
    assert not list((tmp_path / "runs").iterdir())


def test_a_server_that_goes_away_in_the_middle(
    server: ApiServer,
    submitted: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the job was taken is not known: the record stays, and `resume` hands it over once."""
    monkeypatch.setattr("lorafleet.k8s.client._MAX_RETRIES", 1)
    monkeypatch.setattr("lorafleet.k8s.client.Client.__init__.__defaults__", (None, 1))
    lost = Fault("POST", "rayjobs", times=20, after=True)
    server.faults.append(lost)
    with pytest.raises(RunError, match="It is not known whether the cluster accepted the job"):
        submitted()
    lost.times = 0
    (folder,) = (tmp_path / "runs").iterdir()
    run = Run(folder)
    assert stored(run)["handed_over"] is False
    get_backend(run).resume(run)
    assert stored(run)["handed_over"] is True
    assert [job["metadata"]["name"] for job in server.all("RayJob")] == [name_of(run)]
    assert server.get("ConfigMap", name_of(run))["metadata"]["ownerReferences"]  # type: ignore[index]


def test_unknown_fields_are_refused_by_the_server(
    server: ApiServer, submitted: Callable[..., Run], site: KubernetesSite, tmp_path: Path
) -> None:
    odd = site.model_copy(update={"patch": {"spec": {"entrypointNumCpuz": 1}}})
    with pytest.raises(ClusterError, match=r"strict decoding error.*entrypointNumCpuz"):
        submitted(KubernetesBackend(odd))
    assert server.all("ConfigMap") == []


def test_a_local_path_is_refused(
    server: ApiServer, submitted: Callable[..., Run], tmp_path: Path
) -> None:
    with pytest.raises(
        PlacementRefused,
        match=r"data.train_file is .*, which site bare cannot read: upload it with `lora",
    ):
        submitted(KubernetesBackend(storage_at(Path("/mnt/lorafleet"))))
    assert not server.requests


# --- following


@pytest.mark.parametrize(
    ("status", "state", "said", "code"),
    [
        (FINISHED, "finished", "", ExitCode.OK),
        (
            {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
            "stopped",
            "was stopped",
            ExitCode.INTERRUPTED,
        ),
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "FAILED",
                "reason": "AppFailed",
                "message": "Job entrypoint command failed with exit code 2, last available logs: ...",
            },
            "failed",
            "its driver failed",
            ExitCode.USER_INPUT,
        ),
        (
            {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "DeadlineExceeded"},
            "stopped",
            "it reached deadlines.hours",
            ExitCode.INTERRUPTED,
        ),
        (
            {
                "jobDeploymentStatus": "ValidationFailed",
                "reason": "ValidationFailed",
                "message": "name too long",
            },
            "failed",
            "was rejected by the operator: the operator rejected it; name too long",
            ExitCode.OUR_FAULT,
        ),
    ],
)
def test_how_it_ends(
    status: dict[str, str],
    state: str,
    said: str,
    code: int,
    server: ApiServer,
    kubelet: Kubelet,
    submitted: Callable[..., Run],
) -> None:
    run = submitted()
    backend = get_backend(run)
    watch = backend.watch(run)
    server.set_status(
        "RayJob", name_of(run), **{**status, "jobStatus": status.get("jobStatus", "")}
    )
    assert code_of(watch) == code
    assert (watch.status.state, said in watch.status.message) == (state, True), watch.status
    assert backend.status(run).state == state
    server.delete(_kinds()[0], "default", name_of(run))  # long afterwards
    assert backend.status(run).state == state


def code_of(watch: Any) -> int:
    """The exit code, once there is one."""
    codes: list[int] = []

    def ended() -> bool:
        code = watch.poll()
        codes.extend([] if code is None else [code])
        return bool(codes)

    became(ended)
    return codes[0]


def comes(server: ApiServer, run: Run, watch: Any, words: str, **status: str) -> str:
    """Set a status; returns what the watch says once these words are in it."""
    server.set_status("RayJob", name_of(run), **status)

    def said() -> str:
        assert watch.poll() is None
        sentence: str = watch.status.message
        return sentence if words in sentence else ""

    return str(became(said))


def test_a_watch_sees_every_turn_through_all_faults(
    server: ApiServer, kubelet: Kubelet, submitted: Callable[..., Run]
) -> None:
    run = submitted()
    name = name_of(run)
    watch = get_backend(run).watch(run)
    became(lambda: watch.poll() is None and "operator has not handled it" in watch.status.message)
    comes(
        server, run, watch, "waits for its pods", jobDeploymentStatus="Initializing", jobStatus=""
    )
    server.faults.append(Fault("WATCH", ""))  # the next event is the last of its connection
    comes(
        server,
        run,
        watch,
        "is starting the driver",
        jobDeploymentStatus="Running",
        jobStatus="PENDING",
    )
    assert watch.status.state is RunState.PENDING
    comes(server, run, watch, f"RayJob {name} runs", jobStatus="RUNNING")
    server.faults += [Fault("WATCH", ""), Fault("GET", "rayjobs.*watch", 500)]
    again = "is being restarted on a new cluster: its driver failed"
    comes(
        server,
        run,
        watch,
        again,
        jobDeploymentStatus="Retrying",
        jobStatus="FAILED",
        reason="AppFailed",
    )
    server.forget()  # the version that a watch begins from is too old: 410
    server.faults.append(Fault("WATCH", ""))
    comes(server, run, watch, "runs", jobDeploymentStatus="Running", jobStatus="RUNNING", reason="")
    server.set_status("RayJob", name, **FINISHED)
    assert code_of(watch) == ExitCode.OK


def test_a_version_that_is_too_old_is_listed_again(server: ApiServer) -> None:
    """Between the list and the watch everything is compacted away."""
    server.put_down({"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "old"}})
    client, end, told, wrong = Client("default"), threading.Event(), [], []
    listed = client.custom.list_namespaced_custom_object
    turns: list[bool] = []

    def compacted(**options: Any) -> Any:
        if "watch" in options:
            turns.append(True)
            if len(turns) == 1:
                server.forget()
        return listed(**options)

    compacted.__doc__ = listed.__doc__
    client.custom.list_namespaced_custom_object = compacted  # type: ignore[method-assign]
    threading.Thread(
        target=client.follow, args=("old", told.append, wrong.append, end), daemon=True
    ).start()
    became(lambda: len(told) >= 2)  # listed, refused with 410, listed again
    server.set_status("RayJob", "old", jobDeploymentStatus="Running")
    became(lambda: (told[-1] or {}).get("status", {}).get("jobDeploymentStatus") == "Running")
    end.set()
    assert wrong == []  # a 410 is nobody's trouble


def test_a_server_that_talks_nonsense_is_asked_again(
    server: ApiServer,
    kubelet: Kubelet,
    submitted: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A page of a proxy in the place of a watch's events, and a fault of ours: the one is told, the
    other raised.
    """
    run = submitted()
    whole, lines = server.chunk_of, ["<html>sign in</html>", '""', '{"type": "ADDED"}']
    server.chunk_of = lambda tree: lines.pop() + "\n" if lines else whole(tree)
    watch = get_backend(run).watch(run)
    assert isinstance(watch, KubernetesWatch)
    ends = time.monotonic() + 30
    while lines:  # some changes are met by the list, between two watches
        server.set_status("RayJob", name_of(run), jobDeploymentStatus="Initializing", jobStatus="")
        assert watch.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.1)
    comes(server, run, watch, "runs", jobDeploymentStatus="Running", jobStatus="RUNNING")
    monkeypatch.setattr(Client, "_follow_once", lambda *_: 1 / 0)

    def ended() -> bool:
        watch.connections.client.stop_following()  # a watch that is being opened does not hear it
        return watch.poll() is not None

    with pytest.raises(ZeroDivisionError):
        became(ended)


def test_a_watch_that_is_being_opened_is_closed_too(
    server: ApiServer,
    kubelet: Kubelet,
    submitted: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not hear that it should stop: here, two times."""
    watch = get_backend(run := submitted()).watch(run)
    assert isinstance(watch, KubernetesWatch)
    became(lambda: watch.poll() is None and "operator has not handled it" in watch.status.message)
    heard, stop = [False, False], Client.stop_following
    monkeypatch.setattr(
        Client, "stop_following", lambda client: heard.pop() if heard else stop(client)
    )
    watch.close()
    assert not heard
    assert not [thread for thread in watch._threads if thread.is_alive()]


def test_a_large_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    """And what is sent is what a tar of it would be."""
    large = tmp_path / "model" / "large.safetensors"
    large.parent.mkdir()
    with large.open("wb") as file:
        file.truncate(300_000_000)
    (large.parent / "config.json").write_text("{}")
    tracemalloc.start()
    sizes = [len(block) for block in iterate_frames(large.parent)]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(sizes) > 300_000_000
    assert most < 10_000_000
    receive(
        tmp_path / "there" / "model",
        compute_digest(large.parent),
        _Stream(iterate_frames(large.parent)),
        file=False,
    )
    assert (tmp_path / "there" / "model" / "large.safetensors").stat().st_size == 300_000_000


class _Stream(io.RawIOBase):
    """Blocks as a stream, for a reader that asks for so many bytes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks, self.rest = blocks, b""

    def read(self, count: int = -1) -> bytes:
        while len(self.rest) < count:
            self.rest += next(self.blocks)
        data, self.rest = self.rest[:count], self.rest[count:]
        return data


def test_a_queue_that_takes_the_job_back(
    server: ApiServer, submitted: Callable[..., Run], site: KubernetesSite
) -> None:
    """Kueue suspends it: queued again, by no retry of its own."""
    run = submitted(KubernetesBackend(site.model_copy(update={"scheduler": _kueue()})))
    watch = get_backend(run).watch(run)
    comes(
        server,
        run,
        watch,
        "is queued; none of its pods run",
        jobDeploymentStatus="Suspended",
        jobStatus="",
    )
    server.event(
        f"rayjob-{name_of(run)}-1a2b3",
        "Pending",
        "couldn't assign flavors to pod set "
        "workers: insufficient "
        "unused quota for nvidia.com/gpu in flavor a100, 8 "
        "more needed",
        kind="Workload",
    )
    assert (
        "its queue has no free quota: couldn't assign flavors"
        in get_backend(run).status(run).message
    )
    comes(server, run, watch, "runs", jobDeploymentStatus="Running", jobStatus="RUNNING")
    comes(server, run, watch, "was preempted and queued again", jobDeploymentStatus="Suspending")


def _kueue() -> Any:
    return bare(scheduler={"kind": "kueue", "queue": "team"}).scheduler


def test_why_pods_wait(server: ApiServer, submitted: Callable[..., Run], kubelet: Kubelet) -> None:
    run = submitted()
    labels = {RUN_LABEL: run.id, ATTEMPT_LABEL: "1", "ray.io/node-type": "worker"}
    kubelet.pod("w1", labels, {"containers": [{"name": "ray-worker"}]}, phase="Pending")
    server.set_status("RayJob", name_of(run), jobDeploymentStatus="Initializing")
    server.event(
        "w1", "FailedScheduling", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    )
    said = get_backend(run).status(run)
    assert said.state is RunState.PENDING
    assert said.message.endswith(
        "waits for its pods: no node has enough free nvidia.com/gpu (0 of 3 nodes qualify)"
    )


def test_a_cluster_that_does_not_answer(
    server: ApiServer, submitted: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submitted()
    server.close()
    monkeypatch.setattr("lorafleet.k8s.client.Client.__init__.__defaults__", (None, 0))
    seen = get_backend(run).status(run)
    assert seen.state is RunState.PENDING
    assert "the cluster's API server does not answer" in seen.message


# --- ending and going on


def test_stop_waits_for_the_operators_finalizer(
    server: ApiServer, submitted: Callable[..., Run]
) -> None:
    run = submitted()
    name, backend = name_of(run), get_backend(run)
    with server.store.lock:
        server.store.objects["RayJob", "default", name]["metadata"]["finalizers"] = [
            "ray.io/rayjob-finalizer"
        ]
    server.set_status("RayJob", name, jobDeploymentStatus="Running", jobStatus="RUNNING")
    assert "is saving its trials and will stop" in backend.cancel(run)
    assert (
        backend.status(run).message == f"RayJob {name} is being deleted: its trials are saved first"
    )
    with pytest.raises(RunError, match="is still being deleted"):
        backend.resume(run)
    with server.store.lock:
        server._gone(("RayJob", "default", name))
    seen = backend.status(run)
    assert (seen.state, seen.message) == (
        RunState.STOPPED,
        f"it was stopped: continue it with `lorafleet resume {run.id}`",
    )
    assert server.all("ConfigMap") == server.all("NetworkPolicy") == []
    with pytest.raises(RunError, match="has no pending or running RayJob: it is stopped"):
        backend.cancel(run)


def test_a_stopped_run_is_over_when_its_pods_are(
    server: ApiServer, kubelet: Kubelet, submitted: Callable[..., Run]
) -> None:
    """The RayJob goes at once, and its pods take their time to save."""
    run = submitted()
    backend = get_backend(run)
    server.set_status("RayJob", name_of(run), jobDeploymentStatus="Running", jobStatus="RUNNING")
    head(kubelet, run)
    backend.cancel(run)
    seen = backend.status(run)
    assert (seen.state, seen.message) == (
        RunState.RUNNING,
        "its RayJob was deleted; its pods are saving their trials and will stop",
    )
    with pytest.raises(RunError, match="is still being deleted"):
        backend.resume(run)
    watch = backend.watch(run)
    became(lambda: watch.poll() is None and "its pods are saving" in watch.status.message)
    server.delete(
        next(kind for kind in _kinds() if kind.kind == "Pod"), "default", f"{run.id}-head"
    )
    assert code_of(watch) == ExitCode.INTERRUPTED
    assert backend.status(run).state is RunState.STOPPED


def test_resume_hands_over_a_new_rayjob_for_the_same_run(
    server: ApiServer, submitted: Callable[..., Run]
) -> None:
    run = submitted()
    first, backend = name_of(run), get_backend(run)
    with pytest.raises(RunError, match=f"has RayJob {first}, which was created"):
        backend.resume(run)
    server.set_status(
        "RayJob", first, jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed"
    )
    assert backend.status(run).state is RunState.FAILED
    backend.resume(run)
    second = name_of(run)
    assert (first[-2:], second) == ("-1", f"{first[:-2]}-2")
    assert [job["metadata"]["name"] for job in server.all("RayJob")] == [
        second
    ]  # the head that was kept goes
    job = server.get("RayJob", second)
    assert job is not None
    assert get(job, "spec.entrypoint").split()[2] == get_run_folder(backend.site, run.id)  # type: ignore[attr-defined]
    assert job["metadata"]["labels"][ATTEMPT_LABEL] == "2"
    assert backend.status(run).state is RunState.PENDING


def test_a_rayjob_that_somebody_deleted(server: ApiServer, submitted: Callable[..., Run]) -> None:
    run = submitted()
    server.delete(_kinds()[0], "default", name_of(run))
    seen = get_backend(run).status(run)
    assert seen.state is RunState.FAILED
    assert "is no longer on the cluster, and lorafleet did not delete it" in seen.message


# --- the record


def names(run: Run) -> set[str]:
    return {name for name in collect_file_stats(run.path) if not name.startswith(".")}


OWN = {"job.yaml", "plan.json", "resolved.json", "status.json", SITE_FILE, MANIFEST}


def test_the_record_comes_through_the_head(
    server: ApiServer, kubelet: Kubelet, on_storage: tuple[Run, Run]
) -> None:
    here, there = on_storage
    head(kubelet, here)
    get_backend(here).refresh(here)
    trials = {
        f"trials/trial{n}/{name}"
        for n in (0, 1)
        for name in ("metrics.jsonl", "params.json", "status.json")
    }
    assert names(here) == OWN | trials | {"events.jsonl", "logs/driver.log", "report/report.json"}
    assert here.state is RunState.RUNNING
    assert (here.path / "trials/trial1/metrics.jsonl").read_bytes() == (
        there.path / "trials/trial1/metrics.jsonl"
    ).read_bytes()
    assert get_backend(here).pull(here, "none", lambda _: None) == 1  # W&B's: all else is as it was
    there.get_trial("trial0").add_rows(MetricsRow.model_validate({"step": 2}))
    assert get_backend(here).pull(here, "none", lambda _: None) == 1
    assert len(here.get_trial("trial0").read_metrics()) == 2
    assert not server.all("Job")
    assert not secrets_asked(server)


@pytest.mark.parametrize(
    ("which", "come"), [("none", set()), ("best", {"trial1"}), ("all", {"trial0", "trial1"})]
)
@pytest.mark.parametrize("protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io"])
def test_pull_without_a_head_goes_through_a_pod(
    protocol: str,
    which: Any,
    come: set[str],
    server: ApiServer,
    kubelet: Kubelet,
    on_storage: tuple[Run, Run],
) -> None:
    here, there = on_storage
    server.protocols = (protocol,)
    get_backend(here).pull(here, which, lambda _: None)
    for name in ("trial0", "trial1"):
        weights = Path("trials") / name / "adapter" / "adapter_model.safetensors"
        assert (here.path / weights).is_file() is (name in come)
        if name in come:
            assert (here.path / weights).read_bytes() == (there.path / weights).read_bytes()
    assert "wandb/wandb/run.wandb" in names(here)
    assert not any("checkpoints" in name or name == "stop" for name in names(here))
    assert server.all("Job") == server.all("Pod") == []  # taken away again


@pytest.mark.parametrize(
    "spoil", ["head -c 300", "head -c -9", "sed 's/finished/stopped!/; s/trial1/trial0/'"]
)
def test_what_did_not_come_whole_is_not_kept(
    spoil: str, server: ApiServer, kubelet: Kubelet, on_storage: tuple[Run, Run]
) -> None:
    """A stream that is cut off, early or late, or damaged on its way, changes nothing here."""
    here, _ = on_storage
    head(kubelet, here)
    whole = kubelet.run
    flip = (
        f"{BIN}/python -c 'import sys; b = bytearray(sys.stdin.buffer.read()); b[len(b) // 2] ^= 1; "
        "sys.stdout.buffer.write(b)'"
    )
    server.pods_exec = lambda pod, command: whole(
        pod, ["bash", "-c", f"{' '.join(command)} | {flip if spoil.startswith('sed') else spoil}"]
    )
    before = {name: (here.path / name).read_bytes() for name in names(here)}
    with pytest.raises(CommandFailed, match="is incomplete or damaged"):
        get_backend(here).pull(here, "none", lambda _: None)
    assert {name: (here.path / name).read_bytes() for name in names(here)} == before
    assert not list(here.path.parent.glob(".*.tar"))


def test_a_pod_cannot_write_outside_the_record(tmp_path: Path) -> None:
    """What comes from a pod is unpacked inside the folder, and never over what belongs to this
    side.
    """
    from lorafleet.cluster.remote.transfer import Unpacker

    inside = tmp_path / "record"
    inside.mkdir()
    evil = tmp_path / "evil.tar.gz"
    with tarfile.open(evil, "w:gz") as archive:
        for name in ("site.json", "plan.json", "logs/driver.log", "../outside"):
            archive.add(__file__, arcname=name)
    unpacker = Unpacker(inside)
    unpacker.add_block(evil.read_bytes())
    with pytest.raises(LorafleetError, match="outside"):
        unpacker.finish()
    assert not (tmp_path / "outside").exists()
    assert not list(inside.rglob("*"))


def test_a_run_that_ended_brings_its_record(
    server: ApiServer, kubelet: Kubelet, on_storage: tuple[Run, Run], tmp_path: Path
) -> None:
    """Its head is gone already: through a pod, and the end is the run's own word."""
    here, there = on_storage
    there.get_trial("trial0").set_state(TrialState.FAILED)
    there.set_state(RunState.FINISHED, reason="1 of 2 trials failed")
    watch = get_backend(here).watch(here)
    server.set_status("RayJob", name_of(here), **FINISHED)
    assert code_of(watch) == ExitCode.SOME_TRIALS_FAILED
    assert watch.status.message == "1 of 2 trials failed"
    assert here.get_trial("trial1").read_metrics()
    listed = json.loads(
        lorafleet("list", "--format", "json", "--runs", here.path.parent, cwd=tmp_path).stdout
    )
    assert [(row["state"], row["on"]) for row in listed["runs"]] == [("finished", "bare")]


def test_an_older_transfer_puts_nothing_back(
    server: ApiServer, kubelet: Kubelet, on_storage: tuple[Run, Run], tmp_path: Path
) -> None:
    """One that has read the run before its end, and ends after another has brought the end."""
    here, there = on_storage
    head(kubelet, here)
    whole, held = kubelet.run, threading.Event()

    def slow(pod: Any, command: list[str]) -> subprocess.Popen[bytes]:
        server.pods_exec = whole
        process = whole(
            pod,
            [
                "bash",
                "-c",
                f"{' '.join(command)} > {tmp_path}/read; touch "
                f"{tmp_path}/done; "
                f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; cat "
                f"{tmp_path}/read",
            ],
        )
        held.set()
        return process

    server.pods_exec = slow
    backend = get_backend(here)
    older = threading.Thread(target=backend.refresh, args=(here,))
    older.start()
    assert held.wait(20)
    became(lambda: (tmp_path / "done").exists())
    there.set_state(RunState.FINISHED)
    backend.refresh(here)  # does not wait: a transfer is under way
    assert here.state is RunState.PENDING
    newer = threading.Thread(target=backend.pull, args=(here, "none", lambda _: None))
    newer.start()
    (tmp_path / "go").touch()
    older.join(20)
    newer.join(20)
    assert here.state is RunState.FINISHED


def test_the_record_of_an_ended_run_comes_once(
    server: ApiServer, kubelet: Kubelet, on_storage: tuple[Run, Run], tmp_path: Path
) -> None:
    """Nobody followed it, and its pods are gone: the first who asks has it brought."""
    here, there = on_storage
    there.set_state(RunState.FINISHED)
    server.set_status("RayJob", name_of(here), **FINISHED)
    said: list[str] = []
    get_backend(here).refresh(here, said.append)
    assert said == [
        f"{here.id} has ended and its pods are gone: downloading its record through a storage pod"
    ]
    assert here.state is RunState.FINISHED
    get_backend(here).refresh(here, said.append)
    assert len(said) == 1


def test_a_record_that_cannot_come_is_said(server: ApiServer, on_storage: tuple[Run, Run]) -> None:
    here, _ = on_storage
    server.forbidden.append(("create", "/jobs$"))
    watch = get_backend(here).watch(here)
    server.set_status("RayJob", name_of(here), **FINISHED)
    assert code_of(watch) == ExitCode.OK
    assert f"run `lorafleet pull {here.id}`" in watch.status.message


def test_the_end_of_a_resumed_run_is_its_own(
    server: ApiServer, kubelet: Kubelet, on_storage: tuple[Run, Run]
) -> None:
    """What was brought of the first submission says nothing of the second one's end, nor does who
    followed that.
    """
    here, there = on_storage
    head(kubelet, here)
    backend, first = get_backend(here), name_of(here)
    there.set_state(RunState.STOPPED, reason="interrupted")
    backend.refresh(here)
    server.set_status("RayJob", first, jobDeploymentStatus="Complete", jobStatus="STOPPED")
    assert backend.status(here).state is RunState.STOPPED
    backend.resume(here)
    assert here.state is RunState.PENDING
    update_record(here, 1, last={"state": "stopped", "sentence": "of the first"}, collected=True)
    assert "last" not in stored(here)
    server.forbidden.append(("create", "/jobs$"))
    server.set_status("RayJob", name_of(here), **FINISHED)
    watch = backend.watch(here)
    assert code_of(watch) == ExitCode.OK
    assert watch.status.state is RunState.FINISHED
    assert f"run `lorafleet pull {here.id}`" in watch.status.message


def test_a_driver_that_did_not_come_to_its_folder(
    server: ApiServer, kubelet: Kubelet, submitted: Callable[..., Run], tmp_path: Path
) -> None:
    """Another version in the image, say: what its pod has said is all that there is."""
    run = submitted()
    labels = {RUN_LABEL: run.id, ATTEMPT_LABEL: "1", "job-name": name_of(run)}
    kubelet.pod("submitter", labels, {"containers": [{"name": "ray-job-submitter"}]})
    head(kubelet, run)
    server.pods_log = lambda _: "the job was submitted by lorafleet 9.9.9\n"
    server.set_status(
        "RayJob",
        name_of(run),
        jobDeploymentStatus="Failed",
        jobStatus="FAILED",
        reason="AppFailed",
        message="Job entrypoint command failed with exit code 2, last available logs",
    )
    watch = get_backend(run).watch(run)
    assert code_of(watch) == ExitCode.USER_INPUT
    assert find_driver_log(run).read_text() == "the job was submitted by lorafleet 9.9.9\n"


def test_how_a_command_in_a_pod_ends(
    server: ApiServer, kubelet: Kubelet, submitted: Callable[..., Run]
) -> None:
    run = submitted()
    head(kubelet, run)
    client = Client("default")
    pod = f"{run.id}-head"
    with pytest.raises(CommandFailed, match="no such thing"):
        client.run_command(
            pod, HEAD, ["bash", "-c", "echo no such thing >&2; exit 3"], lambda _: None
        )
    said = bytearray()
    client.run_command(pod, HEAD, ["head", "-c", "20000000", "/dev/zero"], said.extend)
    assert len(said) == 20_000_000
    with pytest.raises(CommandFailed, match="full"):  # it takes no more, and says why
        client.run_command(
            pod,
            HEAD,
            ["bash", "-c", "echo full >&2; exit 1"],
            lambda _: None,
            iter([b"x" * 10**6] * 20),
        )

    def dies(_pod: Any, _command: list[str]) -> subprocess.Popen[bytes]:
        raise ConnectionResetError

    server.pods_exec = dies
    with pytest.raises(ClusterError, match=r"was lost|does not answer"):
        client.run_command(pod, HEAD, ["true"], lambda _: None)


# --- models and data


def test_fetch_brings_a_jobs_files_to_the_storage(
    server: ApiServer, kubelet: Kubelet, away: KubernetesSite, bert_job: JobMaker, tmp_path: Path
) -> None:
    loaded, said = bert_job(), []
    backend = KubernetesBackend(away)
    assert backend._check_rules(backend.plan(loaded, "train"), _manifest(backend, loaded))
    assert "4 inputs uploaded to the storage" in backend.upload_inputs(loaded.job, said.append)
    plan = backend.plan(loaded, "train")
    assert plan.job.data.train_file == str(_there(away, loaded.job.data.train_file))
    for local, pods in (
        (loaded.job.data.train_file, plan.job.data.train_file),
        (
            f"{loaded.job.model.model_name_or_path}/config.json",
            f"{plan.job.model.model_name_or_path}/config.json",
        ),
    ):
        assert Path(str(pods)).read_bytes() == Path(str(local)).read_bytes()
    assert (
        plan.trials[0].trial_id
        == make_plan(loaded, away.build_allocation(1), "train").trials[0].trial_id
        is not None
    )
    assert backend._check_rules(plan, _manifest(backend, loaded)) == []
    again: list[str] = []
    backend.upload_inputs(loaded.job, again.append)
    assert all("is already on the storage" in sentence for sentence in again)
    assert server.all("Job") == []


def _manifest(backend: KubernetesBackend, loaded: Any) -> Any:
    *_, job = yaml.safe_load_all(backend.plan(loaded, "train").files[MANIFEST])
    return job


def _there(site: KubernetesSite, path: str | None) -> Path:
    cargo = staging.build_upload_item(str(path))
    return Path(site.storage.mount_path) / "cache" / cargo.target


def test_a_folder_whose_bytes_have_changed_is_sent_again(
    server: ApiServer, kubelet: Kubelet, tmp_path: Path
) -> None:
    """The name of a data set of the hub stays while its rows change."""
    rows, mount = tmp_path / "rows", tmp_path / "mnt"
    for folder in (rows, mount):
        folder.mkdir()
    site = storage_at(mount)
    said: list[str] = []
    for text in ("of march\n", "of september\n", "of september\n"):
        (rows / "train.jsonl").write_text(text)
        with porter.open_storage_pod(site, Client("default"), said.append) as place:
            upload_items(
                place, [UploadItem(rows, "datasets/x@main", compute_digest(rows))], said.append
            )
        assert (mount / "cache" / "datasets" / "x@main" / "train.jsonl").read_text() == text
    assert [("is already on the storage" in sentence) for sentence in said] == [False, False, True]
    assert {path.name for path in (mount / "cache" / "datasets").iterdir()} == {
        "x@main",
        ".x@main.sha256",
    }


def test_a_file_that_changed_since_is_refused(
    server: ApiServer, kubelet: Kubelet, away: KubernetesSite, bert_job: JobMaker, tmp_path: Path
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(Path(str(bert_job().job.data.train_file)).read_text())
    loaded = bert_job(data__train_file=str(own))
    backend = KubernetesBackend(away)
    backend.upload_inputs(loaded.job, lambda _: None)
    own.write_text(own.read_text() + '{"text": "a late row", "label": "good"}\n')
    with pytest.raises(
        PlacementRefused, match=r"data.train_file is .*own.jsonl, which site bare cannot read"
    ):
        backend.submit(backend.plan(loaded, "train"), loaded, tmp_path / "runs")


def test_what_does_not_arrive_as_it_was_sent(
    server: ApiServer, kubelet: Kubelet, away: KubernetesSite, bert_job: JobMaker, tmp_path: Path
) -> None:
    """The pod checks the bytes: what is wrong is not kept, and not remembered."""
    whole = kubelet.run

    def spoilt(pod: Any, command: list[str]) -> subprocess.Popen[bytes]:
        return whole(
            pod, [*command[:4], "0" * 64, *command[5:]] if command[2] == "receive" else command
        )

    server.pods_exec = spoilt
    backend, loaded = KubernetesBackend(away), bert_job()
    with pytest.raises(CommandFailed, match="arrived damaged: its checksum differs"):
        backend.upload_inputs(loaded.job, lambda _: None)
    assert not list((tmp_path / "mnt" / "cache" / "staged").glob("*/*.jsonl"))
    assert staging.map_uploaded_paths(backend.storage, loaded.job, "") == {}


def test_a_transfer_pod_that_does_not_start(
    server: ApiServer,
    kubelet: Kubelet,
    away: KubernetesSite,
    bert_job: JobMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorafleet.k8s.storage_pod._START_TIMEOUT_SECONDS", 1.5)
    kubelet.holds_back = lambda _: True
    said: list[str] = []

    def refused(job: Any) -> bool:
        name = job["metadata"]["name"]
        if not any(event["involvedObject"]["name"] == name for event in server.all("Event")):
            server.event(
                name, "FailedCreate", 'pods "x" is forbidden: exceeded quota: compute', kind="Job"
            )
        return True

    kubelet.holds_back = refused
    with pytest.raises(
        UserError, match=r"did not start within .* the namespace's quota is used up"
    ):
        KubernetesBackend(away).upload_inputs(bert_job().job, said.append)
    assert any(
        "the storage pod is waiting: the namespace's quota is used up" in sentence
        for sentence in said
    )
    assert server.all("Job") == []


# --- the cluster is asked


def test_the_schema_comes_from_the_cluster(
    server: ApiServer, site: KubernetesSite, bert_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it may not be read the server tries the job itself; where no cluster answers, that is
    said.
    """
    odd = KubernetesBackend(site.model_copy(update={"patch": {"spec": {"entrypointNumCpuz": 1}}}))
    plan = odd.plan(bert_job(), "train")
    assert any(
        "schema: " in sentence and "entrypointNumCpuz" in sentence
        for sentence in odd.check(plan)[0]
    )
    good = KubernetesBackend(site)
    assert good.check(good.plan(bert_job(), "train")) == ([], [])
    server.forbidden.append(("get", "customresourcedefinitions"))
    assert any("strict decoding error" in sentence for sentence in odd.check(plan)[0])
    assert good.check(good.plan(bert_job(), "train")) == ([], [])
    assert server.all("RayJob") == []
    server.close()
    monkeypatch.delenv("LORAFLEET_RAYJOB_CRD", raising=False)
    refused, unasked = odd.check(plan)
    assert refused == []
    assert "not against your cluster's schema of RayJob" in unasked[0]
    monkeypatch.setenv("LORAFLEET_RAYJOB_CRD", str(CRD))
    assert any("entrypointNumCpuz" in sentence for sentence in odd.check(plan)[0])


def test_a_cluster_without_kuberay(
    site: KubernetesSite, bert_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ApiServer(None)
    monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig(tmp_path / "kubeconfig")))
    backend = KubernetesBackend(site)
    assert backend.check(backend.plan(bert_job(), "train"))[0] == [
        "schema: the cluster does not know RayJob: an administrator must install KubeRay"
    ]
    made.close()
