"""The list of runs submitted to a queue, so that any later shell can find them again."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from lorafleet.jobs import files
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.user import get_state_folder

_LOGGER = logging.getLogger(__name__)


def get_registry_path() -> Path:
    """Return the path of the list of runs."""
    return get_state_folder() / "submitted.jsonl"


def add(run: Run, site: str) -> None:
    """Add a run and its folder to the list.

    If the home folder is not writable, the run is left out of the list and the job is not
    affected.
    """
    _LOGGER.info("%s was submitted to site %s", run.id, site)
    try:
        row = {"time": time.time(), "run": run.id, "path": str(run.path), "site": site}
        files.append_jsonl(get_registry_path(), row)
    # The run is submitted, and can still be found in its folder.
    except OSError:
        return


def list_submitted_runs() -> list[Run]:
    """Return the listed runs whose folders still exist, newest first.

    Runs that were resumed are listed once.
    """
    paths = dict.fromkeys(
        str(row["path"]) for row in reversed(files.read_jsonl(get_registry_path()))
    )
    return [Run(Path(path)) for path in paths if (Path(path) / "plan.json").is_file()]
