"""Find the backend of a site, or of a run that was submitted to it. Backends are imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from lorafleet.cluster.backend import Backend, Cluster, RunBackend
from lorafleet.jobs import files
from lorafleet.jobs.loading.site_file import LoadedSite
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.runs.trust import distrust
from lorafleet.jobs.sites.base import Site

_CLUSTERS = {
    "kubernetes": "lorafleet.k8s.backend:KubernetesBackend",
    "ray": "lorafleet.cluster.ray.backend:RayBackend",
    "slurm": "lorafleet.slurm.backend:SlurmBackend",
}
"""Backend class of each kind of site file, as module:class."""

SITE_FILE = "site.json"
"""Of a run that went to a queue: the site as it was then."""


def backend_here(site: Site) -> Backend:
    """This machine, or the Ray that RAY_ADDRESS names."""
    from lorafleet.cluster.local import LocalBackend

    return LocalBackend(site)


def _backend_class(kind: str) -> Any:
    module, _, name = _CLUSTERS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def backend_on(site: LoadedSite, nodes: int | None = None) -> Cluster:
    """Return the backend of a site file's cluster, for a job of `nodes` nodes."""
    backend: Cluster = _backend_class(site.site.kind)(site.site, nodes)
    return backend


def lies_elsewhere(run: Run) -> bool:
    """Whether a run's folder here is but a record of one on a storage that this machine does not see."""
    return files.read_json(run.path / SITE_FILE).get("kind") in ("kubernetes", "ray")


def backend_of(run: Run, *, trust: bool = False) -> RunBackend:
    """Return the backend that a run was submitted to.

    A run that this user's lorafleet did not create is only read, unless `trust` is set.
    """
    from lorafleet.cluster.untrusted_run import Stranger

    reason = None if trust else distrust(run.path)
    if reason is not None:
        return Stranger(reason)
    stored = files.read_json(run.path / SITE_FILE)
    if not stored:
        from lorafleet.cluster.hardware import local_site

        return backend_here(local_site())
    backend: Cluster = _backend_class(stored["kind"]).from_record(stored)
    return backend
