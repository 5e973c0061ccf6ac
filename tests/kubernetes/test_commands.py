"""Kubernetes on the command line, over HTTP: real processes, and `kubectl` beside them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.loading.site_file import load_site
from lorafleet.jobs.runs.plan import MANIFEST
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.k8s.backend import KubernetesBackend
from lorafleet.k8s.render import ATTEMPT_LABEL, RUN_LABEL
from tests.conftest import JobMaker, hears_ctrl_c, lorafleet
from tests.kubernetes.api_server import ApiServer
from tests.kubernetes.over_http import FINISHED, head, name_of
from tests.kubernetes.pods import BIN, Kubelet, secrets_asked


def test_without_the_right_to_exec_its_pods_log_is_shown(
    server: ApiServer, kubelet: Kubelet, submitted: Callable[..., Run], tmp_path: Path
) -> None:
    run = submitted()
    head(kubelet, run)
    labels = {RUN_LABEL: run.id, ATTEMPT_LABEL: "1", "job-name": name_of(run)}
    kubelet.pod("submitter", labels, {"containers": [{"name": "ray-job-submitter"}]})
    server.pods_log = lambda pod: f"{pod['metadata']['name']} speaks\n"
    server.forbidden.append(("get", "/exec$"))
    done = lorafleet("logs", run.path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "submitter speaks\n"), done.stderr
    told = lorafleet("pull", run.path, cwd=tmp_path)
    assert told.returncode == ExitCode.USER_INPUT
    assert "the command cannot be run in pod" in told.stderr
    assert '(docs/kubernetes.md, "Rights", lists the rights that lorafleet needs)' in told.stderr


def test_doctor_on_a_namespace(
    server: ApiServer, kubelet: Kubelet, away: KubernetesSite, tmp_path: Path
) -> None:
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "runs"},
             "spec": {"accessModes": ["ReadWriteMany"]}}  # fmt: skip
    file = tmp_path / "there.yaml"
    file.write_text(
        yaml.safe_dump(
            {"kind": "kubernetes", **away.model_dump(mode="json", exclude_defaults=True)}
        )
    )
    missing = lorafleet("doctor", "--on", file, "--format", "json", cwd=tmp_path)
    assert missing.returncode == ExitCode.GATE_REFUSED
    server.put_down(claim)
    done = lorafleet("doctor", "--on", file, "--format", "json", cwd=tmp_path)
    found = {row["what"]: row for row in json.loads(done.stdout)["findings"]}
    verdicts = {what: row["verdict"] for what, row in found.items()}
    assert set(verdicts.values()) == {"ok"}, found
    assert done.returncode == 0
    assert "writable" in found["storage in a pod"]["found"]
    server.forbidden += [("delete", "/rayjobs$"), ("create", "/pods/exec$")]
    told = lorafleet("doctor", "--on", file, "--format", "json", cwd=tmp_path)
    rows = {row["what"]: row for row in json.loads(told.stdout)["findings"]}
    assert (
        rows["right to rayjobs"]["found"]
        == "you have no right to delete them, needed to submit, follow and stop a run"
    )
    assert rows["right to pods/exec"]["verdict"] == "missing"
    assert not secrets_asked(server)
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_on_the_command_line(server: ApiServer, kubelet: Kubelet, site: KubernetesSite, bert_job: JobMaker,
                                   tmp_path: Path) -> None:  # fmt: skip
    file, job = tmp_path / "there.yaml", tmp_path / "job.yaml"
    file.write_text(
        yaml.safe_dump(
            {"kind": "kubernetes", **site.model_dump(mode="json", exclude_defaults=True)}
        )
    )
    job.write_text(bert_job().text)
    planned = lorafleet("train", job, "--on", file, "--dry-run", cwd=tmp_path, check=True).stdout
    assert "manifest.yaml (" in planned
    assert f"{'':<16}RayJob tiny-" in planned
    assert "entrypoint:" not in planned
    assert "entrypoint:" in lorafleet(
        "plan", job, "--train", "--on", file, "--script", cwd=tmp_path, check=True
    ).stdout  # fmt: skip
    assert server.all("RayJob") == []
    name = lorafleet(
        "train", job, "--on", file, "--detach", cwd=tmp_path, check=True
    ).stdout.strip()
    rayjob = f"{name}-1"
    told = json.loads(
        lorafleet("status", name, "--format", "json", cwd=tmp_path, check=True).stdout
    )
    assert told["state"] == "pending"
    assert told["place"] == f"RayJob {rayjob} was created, but the operator has not handled it yet"
    server.set_status("RayJob", rayjob, jobDeploymentStatus="Running", jobStatus="RUNNING")
    listed = lorafleet("list", "--format", "json", cwd=tmp_path, check=True).stdout
    assert [row["state"] for row in json.loads(listed)["runs"]] == ["running"]
    assert f"running: RayJob {rayjob} runs" in lorafleet("status", name, cwd=tmp_path).stdout
    assert "is saving its trials and will stop" in lorafleet("stop", name, cwd=tmp_path).stdout
    assert (
        f"it was stopped: continue it with `lorafleet resume {name}`"
        in lorafleet("status", name, cwd=tmp_path).stdout
    )
    assert lorafleet("resume", name, "--detach", cwd=tmp_path).stdout.strip() == name
    assert server.get("RayJob", f"{name}-2") is not None
    assert not secrets_asked(server)


def test_ctrl_c_only_detaches(
    server: ApiServer, site: KubernetesSite, bert_job: JobMaker, tmp_path: Path
) -> None:
    file, job = tmp_path / "there.yaml", tmp_path / "job.yaml"
    file.write_text(
        yaml.safe_dump(
            {"kind": "kubernetes", **site.model_dump(mode="json", exclude_defaults=True)}
        )
    )
    job.write_text(bert_job().text)
    process = subprocess.Popen([str(BIN / "lorafleet"), "train", str(job), "--on", str(file)], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=hears_ctrl_c)  # fmt: skip
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any("operator has not handled it" in line for line in lines)
    process.send_signal(signal.SIGINT)
    said = process.stdout.read()
    assert process.wait(20) == ExitCode.INTERRUPTED
    assert "continues to run: follow it with `lorafleet logs -f tiny-" in said
    (left,) = server.all("RayJob")
    assert "deletionTimestamp" not in left["metadata"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_kubectl_takes_the_double_for_a_cluster(
    server: ApiServer, site: KubernetesSite, bert_job: JobMaker, tmp_path: Path
) -> None:
    """A client that nobody here wrote: the manifest as a user applies it, looked at, and waited
    for.
    """
    backend = KubernetesBackend(site)
    plan = backend.plan(bert_job(), "train")
    manifest = tmp_path / MANIFEST
    manifest.write_text(plan.files[MANIFEST])
    *_, job = yaml.safe_load_all(plan.files[MANIFEST])
    name = job["metadata"]["name"]
    env = os.environ | {"HOME": str(tmp_path)}

    def kubectl(*words: str) -> str:
        done = subprocess.run(
            ["kubectl", *words], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    words = plan.command_line.split()
    assert words[:3] == ["kubectl", "apply", "--server-side"]
    assert "serverside-applied" in kubectl(*words[1:-1], str(manifest))
    assert name in kubectl("get", "rayjob", "--selector", RUN_LABEL)
    server.set_status("RayJob", name, **FINISHED)
    kubectl(
        "wait", f"rayjob/{name}", "--for=jsonpath={.status.jobStatus}=SUCCEEDED", "--timeout=20s"
    )
    kubectl("delete", "rayjob", name)
    assert server.all("RayJob") == []


def test_a_run_that_is_unknown_here(
    server: ApiServer,
    kubelet: Kubelet,
    on_storage: tuple[Run, Run],
    site: KubernetesSite,
    tmp_path: Path,
) -> None:
    """Of another machine, or of kubectl: its record is made, and the verbs find it."""
    here, there = on_storage
    file, home = tmp_path / "there.yaml", tmp_path / "other"
    home.mkdir()
    file.write_text(
        yaml.safe_dump(
            {"kind": "kubernetes", **site.model_dump(mode="json", exclude_defaults=True)}
        )
    )
    server.set_status("RayJob", name_of(here), jobDeploymentStatus="Running", jobStatus="RUNNING")
    done = lorafleet("pull", here.id, "--on", file, "--adapters", "best", cwd=home, check=True)
    run = Run(home / "runs" / here.id)
    for name in ("plan.json", "job.yaml"):
        assert (run.path / name).read_bytes() == (there.path / name).read_bytes()
    assert (run.path / "trials" / "trial1" / "adapter" / "adapter_model.safetensors").is_file(), (
        done.stdout
    )
    told = json.loads(lorafleet("status", here.id, "--format", "json", cwd=home, check=True).stdout)
    assert (told["state"], told["place"]) == ("running", f"RayJob {name_of(here)} runs")
    again = lorafleet("pull", here.id, "--on", file, cwd=home)
    assert f"this machine already has a record of {here.id}" in again.stderr
    nobodys = lorafleet("pull", "nobodys-123456", "--on", file, cwd=home)
    assert nobodys.returncode == ExitCode.USER_INPUT
    assert "there is no run in" in nobodys.stderr
    assert [path.name for path in (home / "runs").iterdir() if not path.name.startswith(".")] == [
        here.id
    ]


def test_a_site_file_is_drafted(server: ApiServer, tmp_path: Path) -> None:
    """What can be seen of the cluster is in it, and it loads; what cannot is said to be a guess."""
    first, blind = tmp_path / "first.yaml", tmp_path / "blind.yaml"
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim"}
    server.put_down(
        claim | {"metadata": {"name": "own"}, "spec": {"accessModes": ["ReadWriteOnce"]}}
    )
    server.put_down(
        claim | {"metadata": {"name": "shared"}, "spec": {"accessModes": ["ReadWriteMany"]}}
    )
    for number, gpus in enumerate(("0", "8", "8")):
        has = {"cpu": "95", "memory": "900Gi", "nvidia.com/gpu": gpus}
        server.put_down({"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"n{number}"},
                         "status": {"allocatable": has}})  # fmt: skip
    said = lorafleet(
        "init", "--site", "kubernetes", "--output", first, cwd=tmp_path, check=True
    ).stdout
    site = load_site(str(first)).site
    assert isinstance(site, KubernetesSite)
    assert (site.storage.claim, site.gpus_per_node, site.cpus_per_node) == ("shared", 8, 85)
    assert "# other claims: own" in said
    server.forbidden += [("get", "/nodes$"), ("get", "/persistentvolumeclaims$")]
    said = lorafleet(
        "init", "--site", "kubernetes", "--output", blind, cwd=tmp_path, check=True
    ).stdout
    assert "The nodes are not visible to you" in said
    assert isinstance(load_site(str(blind)).site, KubernetesSite)
    nowhere = lorafleet("init", "--site", "kubernetes", "--context", "x", cwd=tmp_path)
    assert nowhere.returncode == ExitCode.USER_INPUT
    assert "there is no context x in the kubeconfig; it has double" in nowhere.stderr
