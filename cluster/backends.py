"""Which backend a site means, or a run that was submitted to it; each is imported when it is wanted."""

from __future__ import annotations

from cluster.backend import Backend, Cluster, RunBackend
from jobs import files
from jobs.ray_cluster_site import RayClusterSite
from jobs.run import Run
from jobs.site import Site
from jobs.site_file import LoadedSite
from jobs.slurm_site import SlurmSite
from jobs.trust import distrust

SITE_FILE = "site.json"
"""Of a run that went to a queue: the site as it was then."""


def backend_here(site: Site) -> Backend:
    """This machine, or the Ray that RAY_ADDRESS names."""
    from cluster.local import LocalBackend

    return LocalBackend(site)


def backend_on(site: LoadedSite, nodes: int | None = None) -> Cluster:
    """The cluster of a site file, for a job of so many nodes."""
    if isinstance(site.site, SlurmSite):
        from cluster.slurm_backend import SlurmBackend

        return SlurmBackend(site.site, nodes)
    if isinstance(site.site, RayClusterSite):
        from cluster.ray_backend import RayBackend

        return RayBackend(site.site, nodes)
    from cluster.kubernetes_backend import KubernetesBackend

    return KubernetesBackend(site.site, nodes)


def lies_elsewhere(run: Run) -> bool:
    """Whether a run's folder here is but a record of one on a storage that this machine does not see."""
    return files.read_json(run.path / SITE_FILE).get("kind") in ("kubernetes", "ray")


def backend_of(run: Run, *, trust: bool = False) -> RunBackend:
    """Return the backend that a run was submitted to.

    A run that this user's lorafleet did not create is only read, unless `trust` is set.
    """
    from cluster.stranger import Stranger

    reason = None if trust else distrust(run.path)
    if reason is not None:
        return Stranger(reason)
    stored = files.read_json(run.path / SITE_FILE)
    if not stored:
        from cluster.machine import local_site

        return backend_here(local_site())
    if stored["kind"] == "ray":
        from cluster.ray_backend import stored_backend as of_ray

        return of_ray(stored)
    if stored["kind"] == "kubernetes":
        from cluster.kubernetes_backend import stored_backend as of_kubernetes

        return of_kubernetes(stored)
    from cluster.slurm_backend import stored_backend as of_slurm

    return of_slurm(stored)
