"""Which backend a site's kind means; each is imported when it is wanted."""

from __future__ import annotations

from collections.abc import Callable

from cluster.backend import Backend
from jobs.site import Site


def _local(site: Site) -> Backend:
    from cluster.local import LocalBackend

    return LocalBackend(site)


BACKENDS: dict[str, Callable[[Site], Backend]] = {"local": _local, "ray": _local}


def backend_for(site: Site) -> Backend:
    """The backend that runs on a site."""
    return BACKENDS[site.kind](site)
