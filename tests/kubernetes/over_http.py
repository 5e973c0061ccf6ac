"""Of tests that talk to the API server of ours: names, and runs that were submitted to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafleet.cluster.backends import get_backend
from lorafleet.cluster.submission import SITE_FILE
from lorafleet.jobs import files
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.k8s.backend import KubernetesBackend
from lorafleet.k8s.render import ATTEMPT_LABEL, HEAD, RUN_LABEL
from tests.kubernetes.pods import Kubelet
from tests.unit.k8s.test_render import bare

FINISHED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


def storage_at(folder: Path, **more: Any) -> KubernetesSite:
    return bare(storage={"claim": "runs", "mount_path": str(folder)}, internet=True, **more)


def name_of(run: Run) -> str:
    backend = get_backend(run)
    assert isinstance(backend, KubernetesBackend)
    return backend.job_status.get_object_name(run)


def stored(run: Run) -> dict[str, Any]:
    return files.read_json(run.path / SITE_FILE)


def head(kubelet: Kubelet, run: Run, submission: str = "1") -> None:
    labels = {RUN_LABEL: run.id, ATTEMPT_LABEL: submission, "ray.io/node-type": "head"}
    kubelet.pod(f"{run.id}-head", labels, {"containers": [{"name": HEAD}]})
