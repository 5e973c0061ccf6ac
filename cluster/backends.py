"""Selects the backend of a site or of a submitted run.

Each backend is imported only when it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorafleet.cluster.backend import Backend, Cluster, RunBackend
from lorafleet.cluster.submission import SubmissionRecord, find_record
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.runs.trust import find_distrust_reason
from lorafleet.jobs.sites.base import Site

if TYPE_CHECKING:
    from lorafleet.jobs.loading.site_file import LoadedSite

_CLUSTERS = {
    "kubernetes": "lorafleet.k8s.backend:KubernetesBackend",
    "ray": "lorafleet.cluster.ray.backend:RayBackend",
    "slurm": "lorafleet.slurm.backend:SlurmBackend",
}
"""Backend class of each kind of site file, as module:class."""


def create_local_backend(site: Site | None = None) -> Backend:
    """Return the backend for this machine, or for the Ray cluster that RAY_ADDRESS names."""
    from lorafleet.cluster.local import LocalBackend

    return LocalBackend(site)


def _get_backend_class(kind: str) -> Any:
    # The classes are named as strings because `slurm` and `k8s` are higher layers than this
    # package.
    module, _, name = _CLUSTERS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def create_cluster_backend(site: LoadedSite, nodes: int | None = None) -> Cluster:
    """Return the backend for the cluster of a site file, for a job on `nodes` nodes.

    The cluster is not contacted. From here on, this process uses the site's caches.

    Args:
        nodes: Value of `--nodes`. None: the site's default.

    Raises:
        PlacementRefused: The kind of cluster cannot limit a job to some nodes.
    """
    backend: Cluster = _get_backend_class(site.site.kind)(site.site, nodes)
    backend.adopt_caches()
    return backend


def get_backend(run: Run, *, trust: bool = False) -> RunBackend:
    """Return the backend that a run was submitted to.

    A run that this user's lorafleet did not create is only read, unless `trust` is set: its
    site.json could name any cluster or process.

    Raises:
        RunError: The record of the submission is damaged, or from a newer version.
    """
    from lorafleet.cluster.untrusted_run import UntrustedBackend

    reason = None if trust else find_distrust_reason(run.path)
    if reason is not None:
        return UntrustedBackend(reason)
    record = find_record(run)
    if record is None:
        # Not `detect_site`: RAY_ADDRESS may be another one now, and this run needs no Ray to be
        # read or stopped.
        return create_local_backend()
    backend = get_cluster_backend(record)
    backend.adopt_caches()
    return backend


def get_cluster_backend(record: SubmissionRecord) -> Cluster:
    """Return the backend of a submission's record. Only for runs that are trusted."""
    backend: Cluster = _get_backend_class(record.kind).from_record(record)
    return backend
