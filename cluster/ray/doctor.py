"""Checks that a Ray cluster has what a job needs, through its job server and a short job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorafleet.cluster.doctor import Finding, check_storage, check_version
from lorafleet.cluster.remote.backend import run_json_command
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.text import format_count

if TYPE_CHECKING:
    from lorafleet.cluster.ray.backend import RayBackend


def collect_findings(backend: RayBackend) -> list[Finding]:
    """Run all checks. Raises RayUnreachable if no job server answers."""
    nodes = backend.jobs.get_nodes()
    results = [Finding("job server", "ok", backend.site.address)]
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    results.append(
        Finding(
            "machines",
            "ok",
            f"{len(nodes)}, with {format_count(cpus, 'core')} and {format_count(gpus, 'GPU')}",
        )
    )
    return [*results, *_check_command(backend)]


def _check_command(backend: RayBackend) -> Iterator[Finding]:
    """Check that a command runs there, sees the storage, and has this machine's version."""
    try:
        with backend.open_storage(lambda _: None) as runner:
            report = run_json_command(
                runner, ["lorafleet", "node", "greet"], {"mount": backend.mount}
            )
    except UserError as error:
        yield Finding(
            "lorafleet on the cluster",
            "missing",
            str(error),
            "install this version in its environment",
        )
        return
    yield check_version(report, "lorafleet", "on the cluster")
    yield check_storage(
        report,
        "on the cluster",
        f"every machine must see {backend.mount}, and its user write there",
    )
