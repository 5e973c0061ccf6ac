"""Every machine of a cluster, looked at before anything is trained on it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from jobs.errors import PlacementRefused

_LOOK_SECONDS = 180.0


def check_nodes(run: Path) -> None:
    """Raise PlacementRefused when a machine does not see the run's folder, or has another lorafleet."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    alive = [row for row in ray.nodes() if row["Alive"]]
    answers = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(row["NodeID"], soft=False)).remote(str(run))
        for row in alive
    ]
    problems = []
    for row, answer in zip(alive, answers, strict=True):
        host = row["NodeManagerHostname"]
        try:
            problems += [f"{host}: {what}" for what in _wrong(ray.get(answer, timeout=_LOOK_SECONDS), run)]
        except ray.exceptions.RayError as error:
            problems.append(f"{host}: {_first_line(error)}")
    if problems:
        raise PlacementRefused("not every machine of the cluster can take part: " + "; ".join(problems))


def _look(run: str) -> dict[str, Any]:
    """On the machine itself."""
    return {"sees_run": (Path(run) / "plan.json").is_file(), "version": version("lorafleet")}


def _wrong(seen: dict[str, Any], run: Path) -> list[str]:
    wrong = []
    if not seen["sees_run"]:
        wrong.append(f"does not see {run} (--runs must be a folder that all machines share)")
    if seen["version"] != version("lorafleet"):
        wrong.append(f"has lorafleet {seen['version']}, and this is {version('lorafleet')}")
    return wrong


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[0] if lines else type(error).__name__)
