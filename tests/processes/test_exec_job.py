"""The entrypoint of a rendered RayJob, handed to a real Ray by its job API, as KubeRay's submitter
does it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafleet.jobs.runs.events import AttemptEvent
from lorafleet.jobs.runs.plan import MANIFEST
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.sites.kubernetes import WORKER_LABELS, KubernetesSite
from lorafleet.k8s.backend import KubernetesBackend
from lorafleet.k8s.lint import get
from lorafleet.k8s.render import CONFIG, get_run_folder
from tests.conftest import JobMaker
from tests.processes.conftest import _free_port, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.long]

GRID = """
search:
  method: grid
  scheduler: {type: none, time_attr: samples, max_t: 40000}
  parameters: {train.learning_rate: {values: [1e-3, 3e-3, 1e-2]}}
"""


@pytest.fixture
def pods(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray as the manifest asks for it: a head that takes the driver alone, two workers with their
    label.
    """
    from ray.cluster_utils import Cluster
    from ray.job_submission import JobSubmissionClient

    for name, value in {
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "LF_NODES": "2",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)  # the head's pod has them
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    port = _free_port()
    head = {
        "num_cpus": 0,
        "resources": {"driver": 1},
        "include_dashboard": True,
        "dashboard_port": port,
    }
    # the pods of a real cluster have an address each; here their agents must not take each other's
    # port
    cluster = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args=head | {"dashboard_agent_listen_port": _free_port()},
    )
    try:
        for _ in range(2):
            cluster.add_node(
                num_cpus=1, labels=WORKER_LABELS, dashboard_agent_listen_port=_free_port()
            )
        yield wait_for(lambda: _client(JobSubmissionClient, f"http://127.0.0.1:{port}"))
    finally:
        cluster.shutdown()


def _client(kind: Any, address: str) -> Any:
    try:
        return kind(address)
    except (ConnectionError, RuntimeError):
        return None


def _submitted(pods: Any, handed: dict[str, Any]) -> Any:
    try:
        return pods.submit_job(**handed)
    except RuntimeError as error:
        if "No available agent" in str(
            error
        ):  # the head's agent starts some seconds after its dashboard
            return None
        raise


def test_the_entrypoint_makes_the_run_and_goes_on_with_it(
    bert_job: JobMaker, tmp_path: Path, pods: Any
) -> None:
    """Stopped as the operator does it when the RayJob is deleted; a second cluster's job goes on
    with the same run.
    """
    site = KubernetesSite.model_validate({
        "name": "pods", "image": "lorafleet@sha256:" + "1" * 64, "nodes": 2, "cpus_per_node": 1,
        "memory_gb_per_node": 4.0, "storage": {"claim": "runs", "mount_path": str(tmp_path / "mnt")},
    })  # fmt: skip
    loaded = bert_job(GRID, train__checkpoint_minutes=0.02, search__max_concurrent_trials=2)
    plan = KubernetesBackend(site).plan(loaded, "sweep")
    config, _, job = yaml.safe_load_all(plan.files[MANIFEST])
    mounted = tmp_path / "etc"
    mounted.mkdir()
    for name, text in config["data"].items():
        (mounted / name).write_text(text)
    command = str(get(job, "spec.entrypoint")).replace(CONFIG, str(mounted))
    handed = {
        "entrypoint": command,
        "entrypoint_resources": json.loads(str(get(job, "spec.entrypointResources"))),
    }
    run = Run(Path(get_run_folder(site, str(get(job, "metadata.name")).rpartition("-")[0])))

    first = wait_for(lambda: _submitted(pods, handed), 90)
    wait_for(
        lambda: (
            pods.get_job_status(first).is_terminal()
            or any(trial.state.has_ended for trial in run.list_trials())
        )
    )
    assert not pods.get_job_status(first).is_terminal(), pods.get_job_logs(first)
    wait_for(
        lambda: any((trial.checkpoint / "checksums.json").is_file() for trial in run.list_trials())
    )
    assert pods.stop_job(first)
    wait_for(lambda: pods.get_job_status(first).is_terminal())
    assert run.state == "stopped", pods.get_job_logs(first)
    ended = {
        trial.id: (trial.path / "metrics.jsonl").read_bytes()
        for trial in run.list_trials()
        if trial.state.has_ended
    }
    assert 0 < len(ended) < 3

    second = _submitted(pods, handed)
    wait_for(lambda: pods.get_job_status(second).is_terminal())
    said = pods.get_job_logs(second)
    assert str(pods.get_job_status(second)) == "SUCCEEDED", said
    assert run.state == "finished"
    assert {
        name: (run.get_trial(name).path / "metrics.jsonl").read_bytes() for name in ended
    } == ended
    for trial in run.list_trials():
        steps = [row.step for row in trial.read_metrics()]
        assert steps == sorted(set(steps))
    assert json.loads((run.path / "report" / "report.json").read_text())["recommendation"][
        "trial_id"
    ]
    assert len(run.read_events(AttemptEvent)) == 2
    assert (run.path / "logs" / "driver.log").read_text()
