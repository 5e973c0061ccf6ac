"""Checks that a Ray cluster has what a job needs, through its job server and a short job."""

from __future__ import annotations

from collections.abc import Iterator

from lorafleet.cluster.doctor import Finding, check_storage, check_version
from lorafleet.cluster.ray.client import RayJobs
from lorafleet.cluster.remote.place import CommandRunner, run_json_command
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.sites.ray import RayClusterSite
from lorafleet.jobs.text import format_count


def collect_findings(site: RayClusterSite, jobs: RayJobs, runner: CommandRunner) -> list[Finding]:
    """Run all checks. Raises RayUnreachable if no job server answers.

    Args:
        jobs: Client of the cluster's job server.
        runner: Runs commands next to the storage.
    """
    nodes = jobs.get_nodes()
    results = [Finding("job server", "ok", site.address)]
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    results.append(
        Finding(
            "machines",
            "ok",
            f"{len(nodes)}, with {format_count(cpus, 'core')} and {format_count(gpus, 'GPU')}",
        )
    )
    return [*results, *_check_command(runner, site.storage)]


def _check_command(runner: CommandRunner, mount: str) -> Iterator[Finding]:
    """Check that a command runs there, sees the storage, and has this machine's version."""
    try:
        report = run_json_command(runner, ["lorafleet", "node", "greet"], {"mount": mount})
    except UserError as error:
        yield Finding(
            "lorafleet on the cluster",
            "missing",
            str(error),
            "install this version of lorafleet in the cluster's environment",
        )
        return
    yield check_version(report, "lorafleet", "on the cluster")
    yield check_storage(
        report,
        "on the cluster",
        f"every machine must see {mount}, and its user must be able to write there",
    )
