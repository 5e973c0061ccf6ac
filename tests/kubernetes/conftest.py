"""A cluster of this machine: an API server, and an operator whose pods really run."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorafleet.cluster.submission import SITE_FILE
from lorafleet.jobs import files
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.plan import MANIFEST
from lorafleet.jobs.runs.records import MetricsRow
from lorafleet.jobs.runs.run import Run, RunState, TrialState
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.k8s.backend import KubernetesBackend
from lorafleet.k8s.render import get_run_folder
from lorafleet.k8s.watch import KubernetesWatch
from tests.conftest import JobMaker
from tests.kubernetes.api_server import ApiServer
from tests.kubernetes.crd import CRD
from tests.kubernetes.operator import Operator, missing
from tests.kubernetes.over_http import storage_at
from tests.kubernetes.pods import BIN, Kubelet

PLANTED = "planted-secret-4712"
SITE = """
kind: kubernetes
image: registry/lorafleet:0.1.0@sha256:{digest}
storage: {{claim: shared, sub_path: team/me}}
nodes: 2
cpus_per_node: 1
memory_gb_per_node: 3
head: {{cpus: 1, memory_gb: 3}}
network: {{interface: eth0}}
deadlines: {{save_seconds: 60}}
secrets: {{WANDB_API_KEY: {{name: wandb, key: api-key, optional: true}}, PLANTED: {{name: planted, key: it}}}}
labels: {{team: ours}}
"""


@dataclass
class User:
    """Somebody with a kubeconfig and a home of their own."""

    server: ApiServer
    operator: Operator
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        state = {"KUBECONFIG": str(self.home / "kubeconfig"), "XDG_CONFIG_HOME": str(self.home / "config"),
                 "XDG_STATE_HOME": str(self.home / "state")}  # fmt: skip
        return os.environ | state

    def write_site(self, name: str = "pods", more: str = "") -> None:
        folder = self.home / "config" / "lorafleet" / "sites"
        folder.mkdir(parents=True, exist_ok=True)
        own = {line.partition(":")[0] for line in more.splitlines()}
        kept = [
            line
            for line in SITE.format(digest="1" * 64).splitlines()
            if line.partition(":")[0] not in own
        ]
        (folder / f"{name}.yaml").write_text("\n".join([*kept, more]) + "\n")

    def lorafleet(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(*words), cwd=self.home, env=self.environment, capture_output=True, text=True,
                              timeout=600, check=False)  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done

    def command(self, *words: str | Path) -> list[str]:
        return [str(BIN / "lorafleet"), *map(str, words)]

    def job(self, loaded: LoadedJob) -> Path:
        """A job file, whose files lie on the storage."""
        path = self.home / f"job-{time.monotonic_ns()}.yaml"
        path.write_text(loaded.text)
        self.lorafleet("fetch", path, "--on", "pods")
        return path

    def submit(self, loaded: LoadedJob, command: str = "sweep") -> Run:
        done = self.lorafleet(
            command, self.job(loaded), *loaded.overrides, "--on", "pods", "--detach"
        )
        return Run(self.home / "runs" / done.stdout.strip())

    def there(self, run: Run) -> Run:
        """The run itself, on the storage."""
        return Run(self.operator.storage / "team" / "me" / "runs" / run.id)

    def status(self, run: Run) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(
            self.lorafleet("status", run.id, "--format", "json").stdout
        )
        return told

    def when(self, run: Run, condition: Callable[[], Any], seconds: float = 240) -> Any:
        """What a condition says once it holds; else all that is known."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            found = condition()
            if found:
                return found
            time.sleep(0.2)
        raise AssertionError(f"it did not come to that: {self.server.all('RayJob')}\n{self.logs()}")

    def logs(self) -> str:
        """The last words of every pod that there was."""
        texts = []
        for log in sorted(self.operator.folder.glob("*/log")):
            texts.append(f"== {log.parent.name}\n{log.read_text(errors='replace')[-2500:]}")
        return "\n".join(texts)


@pytest.fixture(autouse=True)
def _no_watch_is_left() -> Iterator[None]:
    yield
    for found in gc.get_objects():
        if isinstance(found, KubernetesWatch):
            found.close()


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    """A namespace with a claim and a Secret.

    Where pods cannot run, tests are skipped with the reason.
    """
    why = missing()
    if why:
        pytest.skip(why)
    server = ApiServer(CRD)
    folder = Path(tempfile.mkdtemp(prefix="pods-", dir="/tmp"))
    operator = Operator(server, folder, tmp_path / "storage", secrets={"planted": {"it": PLANTED}})
    server.put_down({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "shared"},
                     "spec": {"accessModes": ["ReadWriteMany"]}})  # fmt: skip
    operator.up()
    made = User(server, operator, tmp_path)
    server.kubeconfig(tmp_path / "kubeconfig")
    made.write_site()
    try:
        yield made
    finally:
        operator.down()
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """A cluster with an empty namespace, which the kubeconfig names."""
    made = ApiServer(CRD)
    monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield made
    made.close()


@pytest.fixture
def kubelet(server: ApiServer) -> Iterator[Kubelet]:
    made = Kubelet(server)
    yield made
    made.end.set()


@pytest.fixture
def site(tmp_path: Path, opinion_files: dict[str, Path]) -> KubernetesSite:
    """Its storage is seen by pods where this machine has it, with the data of the jobs in it."""
    return storage_at(opinion_files["train"].parent.parent)


@pytest.fixture
def submitted(
    site: KubernetesSite, bert_job: JobMaker, tmp_path: Path, server: ApiServer
) -> Callable[..., Run]:
    def submit(backend: KubernetesBackend | None = None, **overrides: object) -> Run:
        backend = backend or KubernetesBackend(site)
        loaded = bert_job(**overrides)
        return backend.submit(backend.plan(loaded, "train"), loaded, tmp_path / "runs")

    return submit


@pytest.fixture
def away(tmp_path: Path) -> KubernetesSite:
    """A site whose storage has nothing of this machine."""
    (tmp_path / "mnt").mkdir()
    return storage_at(tmp_path / "mnt")


@pytest.fixture
def on_storage(site: KubernetesSite, submitted: Callable[..., Run]) -> tuple[Run, Run]:
    """(the record here, the run as a driver would have written it on the storage)."""
    here = submitted()
    there = Run(Path(get_run_folder(site, here.id)))
    shutil.copytree(here.path, there.path, ignore=shutil.ignore_patterns(SITE_FILE, MANIFEST))
    there.set_state(RunState.RUNNING)
    for number, accuracy in enumerate((0.5, 0.75)):
        trial = there.add_trial(f"trial{number}", number, {"train.learning_rate": 0.1})
        trial.add_rows(
            MetricsRow.model_validate({"step": 1, "evaluated": True, "accuracy": accuracy})
        )
        trial.set_state(TrialState.FINISHED)
        (trial.path / "adapter").mkdir()
        (trial.path / "adapter" / "adapter_model.safetensors").write_bytes(os.urandom(3_000_000))
        (trial.checkpoint).mkdir(parents=True)
        (trial.checkpoint / "state.pt").write_bytes(b"x" * 1000)
    (there.path / "logs").mkdir(exist_ok=True)
    (there.path / "logs" / "driver.log").write_text("the driver speaks\n")
    files.write_json(
        there.path / "report" / "report.json", {"recommendation": {"trial_id": "trial1"}}
    )
    (there.path / "wandb" / "wandb").mkdir(parents=True)
    (there.path / "wandb" / "wandb" / "run.wandb").write_bytes(b"w" * 10)
    (there.path / "stop").write_text("")
    yield here, there
    shutil.rmtree(there.path)
