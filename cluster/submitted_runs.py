"""Runs that were submitted to a queue, so that they are found again in a shell that knows nothing of them."""

from __future__ import annotations

import time
from pathlib import Path

from lorafleet.jobs import files
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.user import state_folder


def registry_file() -> Path:
    """The list of runs."""
    return state_folder() / "submitted.jsonl"


def add(run: Run, site: str) -> None:
    """Remember where a run lies. A home folder that cannot be written costs the memory, not the job."""
    try:
        row = {"time": time.time(), "run": run.id, "path": str(run.path), "site": site}
        files.append_jsonl(registry_file(), row)
    except OSError:
        return


def submitted() -> list[Run]:
    """The runs that are still where they were, newest first."""
    paths = dict.fromkeys(str(row["path"]) for row in reversed(files.read_jsonl(registry_file())))
    return [Run(Path(path)) for path in paths if (Path(path) / "plan.json").is_file()]
