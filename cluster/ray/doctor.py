"""What a Ray cluster has of all that a job on it needs: asked of its job server, and of a short job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorafleet.cluster.doctor import Finding, same_version, storage
from lorafleet.cluster.remote.backend import ask
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.text import counted

if TYPE_CHECKING:
    from lorafleet.cluster.ray.backend import RayBackend


def findings(backend: RayBackend) -> list[Finding]:
    """Look at everything. Raises RayUnreachable where no job server answers."""
    nodes = backend.jobs.nodes()
    found = [Finding("job server", "ok", backend.site.address)]
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    found.append(Finding("machines", "ok", f"{len(nodes)}, with {counted(cpus, 'core')} and {counted(gpus, 'GPU')}"))
    return [*found, *_a_job(backend)]


def _a_job(backend: RayBackend) -> Iterator[Finding]:
    """A command runs there, sees the storage, and is of the version that is here."""
    try:
        with backend.reached(lambda _: None) as place:
            told = ask(place, ["lorafleet", "node", "greet"], {"mount": backend.mount})
    except UserError as error:
        yield Finding("lorafleet on the cluster", "missing", str(error), "install this version in its environment")
        return
    yield same_version(told, "lorafleet", "on the cluster")
    yield storage(told, "on the cluster", f"every machine must see {backend.mount}, and its user write there")
