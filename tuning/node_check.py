"""Every machine of a cluster, looked at before anything is trained on it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorafleet.cluster.ray.nodes import node_name, nodes_of, on_each
from lorafleet.jobs.data.hub import check_whole
from lorafleet.jobs.errors import AssetError, PlacementRefused
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.placement import labelled

_LOOK_SECONDS = 180.0


def check_nodes(run: Path, tokens: Path, job: JobSpec) -> None:
    """Raise PlacementRefused when a machine that may get workers lacks what they open (the run's folder, the tokens,
    the model), or has another lorafleet."""
    import ray

    able = {node.name for node in labelled(nodes_of(ray.nodes()), job.resources.label_selector) if node.cpus}
    alive = [row for row in ray.nodes() if row["Alive"] and node_name(row) in able]
    problems = []
    for row, answer in zip(alive, on_each(alive, _look, run, tokens, job), strict=True):
        host = row["NodeManagerHostname"]
        try:
            problems += [f"{host}: {what}" for what in _wrong(ray.get(answer, timeout=_LOOK_SECONDS), run, tokens)]
        except ray.exceptions.RayError as error:
            problems.append(f"{host}: {first_line(error)}")
    if problems:
        raise PlacementRefused("not every machine of the cluster can take part: " + "; ".join(problems))


def _look(run: Path, tokens: Path, job: JobSpec) -> dict[str, Any]:
    """On the machine itself."""
    lacks = None
    try:
        check_whole(job.model.model_name_or_path, job.model.revision)
    except AssetError as error:
        lacks = str(error)
    return {
        "sees_run": (run / "plan.json").is_file(),
        "sees_tokens": (tokens / "meta.json").is_file(),
        "lacks_model": lacks,
        "version": version("lorafleet"),
    }


def _wrong(seen: dict[str, Any], run: Path, tokens: Path) -> list[str]:
    wrong = []
    if not seen["sees_run"]:
        wrong.append(f"does not see {run} (--runs must be a folder that all machines share)")
    if not seen["sees_tokens"]:
        wrong.append(f"does not see {tokens} (LORAFLEET_CACHE must be a folder that all machines share)")
    if seen["lacks_model"]:
        wrong.append(seen["lacks_model"])
    if seen["version"] != version("lorafleet"):
        wrong.append(f"has lorafleet {seen['version']}, and this is {version('lorafleet')}")
    return wrong


def first_line(error: Exception) -> str:
    """The line of one of Ray's long messages that says what happened."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[0] if lines else type(error).__name__)
