"""A run that was cut into the tasks of a job array: each has a part of its own, and one driver puts them together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.runs.lease import Lease, watch
from lorafleet.jobs.runs.run import Run, Trial

_KEPT = ("warning", "retry", "base_loaded", "note", "tracking_failed")
"""Events of a part that say something of the whole."""


def gather(run: Run, facts: dict[str, Any], say: Callable[[str], None]) -> None:
    """Move the trials of all parts into the run, ended or not: what has not ended goes on from its checkpoint.

    Raises RunError while a part's driver lives. What was moved before a kill is not moved again.
    """
    seconds = float(run.status().get("wall_seconds") or 0.0)
    parts = run.parts()
    watched = watch([part.path for part in parts], say)
    for part in parts:
        # From here on a driver of the part that comes back is refused.
        lease = Lease.take(part.path, facts, say=say, **({"seconds": 0.0} if part.path in watched else {}))
        seconds = max(seconds, float(part.status().get("wall_seconds") or 0.0))
        for folder in sorted((part.path / "trials").glob("*")):
            target = run.path / "trials" / folder.name
            if (folder / "params.json").is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                _without_attempts(Trial(folder))
                folder.rename(target)
        for event in part.events():
            if event["event"] in _KEPT:
                known = ("time", "event", "attempt", "schema_version")
                run.event(event["event"], **{key: value for key, value in event.items() if key not in known})
        _move_wandb(part.path / "wandb", run.path / "wandb")
        _keep_log(part, run)
        lease.release()
        shutil.rmtree(part.path, ignore_errors=True)
    if (run.path / "parts").is_dir():
        run.set_state(run.state, wall_seconds=seconds)
        shutil.rmtree(run.path / "parts", ignore_errors=True)


def _without_attempts(trial: Trial) -> None:
    """A part counts its own attempts, and the run its own: numbers of one mean nothing in the other."""
    rows = trial.metrics()
    if rows:
        bare = [json.dumps({key: value for key, value in row.items() if key != "attempt"}) for row in rows]
        files.write_text(trial.path / "metrics.jsonl", "\n".join(bare) + "\n")


def _move_wandb(source: Path, target: Path) -> None:
    (target / "wandb").mkdir(parents=True, exist_ok=True)
    for folder in source.glob("wandb/*run-*"):
        if not (target / "wandb" / folder.name).exists():
            folder.rename(target / "wandb" / folder.name)
    for row in files.read_jsonl(source / "closed.jsonl"):
        files.append_jsonl(target / "closed.jsonl", {"trial_id": row["trial_id"]})


def _keep_log(part: Run, run: Run) -> None:
    log = part.path / "logs" / "driver.log"
    if log.is_file():
        (run.path / "logs").mkdir(exist_ok=True)
        log.rename(run.path / "logs" / f"driver-part-{part.path.name}.log")
