"""Check every machine of a cluster before training starts.

A machine with another version, or without the shared folders, would otherwise fail in
the middle of a search, and only for the trials that happen to run there.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorafleet.cluster.ray.nodes import format_node_name, parse_nodes, run_on_each_node
from lorafleet.jobs.data.hub import check_complete
from lorafleet.jobs.errors import AssetError, PlacementRefused
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.placement import select_labelled_nodes

_INSPECT_SECONDS = 180.0


def check_nodes(run: Path, tokens: Path, job: JobSpec) -> None:
    """Raise PlacementRefused if a machine that may get workers cannot take part.

    Every machine must see the run's folder and the tokens, have the model, and have the
    same lorafleet version. Ray must be connected. All problems are in one message.

    Args:
        run: Folder of the run.
        tokens: Folder of the token cache.
        job: Its label selector decides which machines are checked.
    """
    import ray

    eligible = {
        node.name
        for node in select_labelled_nodes(parse_nodes(ray.nodes()), job.resources.label_selector)
        if node.cpus
    }
    # Machines without CPUs, such as a pure head node, get no workers.
    alive = [row for row in ray.nodes() if row["Alive"] and format_node_name(row) in eligible]
    problems = []
    for row, answer in zip(
        alive, run_on_each_node(alive, _inspect_node, run, tokens, job), strict=True
    ):
        host = row["NodeManagerHostname"]
        try:
            problems += [
                f"{host}: {problem}"
                for problem in _list_problems(
                    ray.get(answer, timeout=_INSPECT_SECONDS), run, tokens
                )
            ]
        except ray.exceptions.RayError as error:
            problems.append(f"{host}: {extract_error_line(error)}")
    if problems:
        raise PlacementRefused(
            "some machines of the cluster cannot take part: " + "; ".join(problems)
        )


def _inspect_node(run: Path, tokens: Path, job: JobSpec) -> dict[str, Any]:
    """Return what this machine sees of the run, the tokens and the model. Runs on that machine."""
    missing_model = None
    try:
        check_complete(job.model.model_name_or_path, job.model.revision)
    except AssetError as error:
        missing_model = str(error)
    return {
        "sees_run": (run / "plan.json").is_file(),
        "sees_tokens": (tokens / "meta.json").is_file(),
        "lacks_model": missing_model,
        "version": version("lorafleet"),
    }


def _list_problems(node: dict[str, Any], run: Path, tokens: Path) -> list[str]:
    """Return the reasons why a machine cannot take part."""
    problems = []
    if not node["sees_run"]:
        problems.append(f"does not see {run} (--runs must be a folder that all machines share)")
    if not node["sees_tokens"]:
        problems.append(
            f"does not see {tokens} (LORAFLEET_CACHE must be a folder that all machines share)"
        )
    if node["lacks_model"]:
        problems.append(node["lacks_model"])
    if node["version"] != version("lorafleet"):
        problems.append(
            f"has lorafleet {node['version']}, but this machine has {version('lorafleet')}"
        )
    return problems


def extract_error_line(error: Exception) -> str:
    """Return the line of one of Ray's long messages that states the error.

    That is the last line that contains `Error`, since the remote traceback ends with it;
    otherwise the first line.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if "Error" in line),
        lines[0] if lines else type(error).__name__,
    )
