"""Find, list and clean runs in a runs folder.

There is no database: a run is a folder with a plan.json, and can be copied or deleted
with the tools of the shell. Runs on clusters are also found by the list of submitted
runs.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from lorafleet.cluster.submitted_runs import list_submitted_runs
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.runs.tracebacks import set_current_run
from lorafleet.jobs.runs.trust import remove_run_record


def list_all_runs(runs: Path, damaged: list[str] | None = None) -> list[Run]:
    """Return the runs of a folder, newest first.

    Args:
        damaged: Receives one message for each run that cannot be read.
    """
    messages: list[str] = [] if damaged is None else damaged
    candidates = [
        Run(path.parent) for path in runs.glob("*/plan.json") if not path.parent.is_symlink()
    ]
    return sorted(
        (run for run in candidates if _is_readable(run, messages)),
        key=lambda run: run.created,
        reverse=True,
    )


def _is_readable(run: Run, damaged: list[str]) -> bool:
    """Return whether a folder holds a readable run; the folder of another program is skipped."""
    try:
        return bool(run.state) and run.created >= 0
    except (ValueError, OSError, RunError) as error:
        damaged.append(f"{run.path.name} is skipped: {error}")
        return False


def find_run(runs: Path, name: str | None) -> Run:
    """Return a run by its folder, its id or its job's name; without a name, the newest run.

    Of several runs with the same job name, the newest is returned.

    Raises:
        RunError: There is no such run; the message suggests a similar one.
    """
    run = _resolve_run(runs, name)
    set_current_run(run.path)
    return run


def _resolve_run(runs: Path, name: str | None) -> Run:
    if name is not None and not name.strip():
        raise RunError("RUN is empty; `lorafleet list` shows the runs")
    if name:
        # A path first: it works from any folder, also for runs outside the runs folder.
        for path in (Path(name), runs / name):
            if (path / "plan.json").is_file() and not path.is_symlink():
                return Run(path.absolute())
    damaged: list[str] = []
    candidates = list_all_runs(runs, damaged)
    if (
        name is not None or not candidates
    ):  # runs on a cluster may be stored in the site's own runs_dir
        folders = {run.path.absolute() for run in candidates}
        candidates += [
            run
            for run in list_submitted_runs()
            if run.path.absolute() not in folders and _is_readable(run, [])
        ]
        for run in candidates:
            if run.id == name:
                return Run(run.path.absolute())
    if name is None:
        if candidates:
            return Run(candidates[0].path.absolute())
        if damaged:
            raise RunError(f"no run in {runs.absolute()} can be read: {damaged[0]}")
        raise RunError(
            f"there is no run in {runs.absolute()}: start one, or name another folder with --runs "
            "DIR"
        )
    matches = [run for run in candidates if run.read_status().name == name]
    if matches:
        return Run(matches[0].path.absolute())
    raise RunError(
        f"there is no run {name!r} in {runs.absolute()}{_suggest_run(name, candidates)}; "
        "`lorafleet list` shows the runs"
    )


def _suggest_run(name: str, candidates: list[Run]) -> str:
    """Return a suggestion for a run that does not exist: the most similar or the newest run.

    Job names are compared too, because an id is much longer than the name that a user types.

    Args:
        candidates: The existing runs, the newest first.
    """
    if not candidates:
        return ""
    from lorafleet.jobs.schema.field_paths import find_closest

    closest_id = find_closest(name, [run.id for run in candidates])
    if closest_id:
        return f"; did you mean {closest_id}?"
    newest_ids = {str(run.read_status().name): run.id for run in reversed(candidates)}
    closest_job = find_closest(name, newest_ids)
    if closest_job:
        return f"; did you mean {newest_ids[closest_job]}?"
    return f"; the newest run is {candidates[0].id}"


@dataclass(frozen=True)
class CleanResult:
    """The result of `clean` for one run.

    `bytes` is 0 if the run was kept, and `kept_because` then says why.
    """

    run: str
    bytes: int
    kept_because: str | None


def compute_folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(
        path.lstat().st_size for path in folder.rglob("*") if path.is_file() or path.is_symlink()
    )


def find_clean_obstacle(run: Run) -> str | None:
    """Return why a run may not be cleaned, or None.

    Asks the cluster of a submitted run. If it does not answer, the run is kept: it may be
    active.
    """
    from lorafleet.cluster.backends import get_backend
    from lorafleet.cluster.submission import find_record

    active_states = (RunState.RUNNING, RunState.PENDING)
    was_submitted = find_record(run) is not None
    if was_submitted:  # the run's own record may be older than the queue's state
        status = get_backend(run).status(run)
        if status.state in active_states:
            return f"it is {status.state}; stop it first with `lorafleet stop {run.id}`"
        if not status.fresh:
            return f"its cluster does not answer, so the run may still be active: {status.message}"
    # The process of a driver on another machine cannot be checked from here; its recorded state is
    # all there is.
    is_on_other_host = run.read_status().host not in (None, os.uname().nodename)
    if run.is_alive() or (is_on_other_host and run.state in active_states and not was_submitted):
        return f"it is {run.state}; stop it first with `lorafleet stop {run.id}`"
    if has_unsynced_wandb(run):
        return (
            f"its W&B record has not been uploaded; run `lorafleet sync {run.id}` first, or use "
            "--unsynced"
        )
    return None


def has_unsynced_wandb(run: Run) -> bool:
    """Return whether a run holds offline W&B records that no `sync` has uploaded.

    `wandb sync` leaves a file beside each record that it has uploaded. Array tasks and arms
    are included.
    """
    pattern = "wandb/wandb/offline-run-*"
    offline_folders = [
        folder
        for prefix in ("", "parts/*/", "arms/*/")
        for folder in run.path.glob(f"{prefix}{pattern}")
    ]
    return any(not list(folder.glob("*.wandb.synced")) for folder in offline_folders)


def clean(run: Run, *, dry_run: bool, even_unsynced: bool = False) -> CleanResult:
    """Delete a run's folder, unless it is running or has W&B records that are not uploaded.

    Returns:
        The bytes that were freed (or would be, with `dry_run`), or the reason why the run was
            kept.
    """
    reason = find_clean_obstacle(run)
    if reason and not (even_unsynced and "W&B" in reason):
        return CleanResult(run.id, 0, reason)
    size = compute_folder_bytes(run.path)
    if not dry_run:
        # A later folder of the same name must not count as created by this user's lorafleet.
        remove_run_record(run.path)
        shutil.rmtree(run.path)
    return CleanResult(run.id, size, None)


def list_old_runs(runs: Path, days: float) -> list[Run]:
    """Return the runs that were last updated more than `days` days ago."""
    limit = time.time() - 86400 * days
    return [
        run for run in list_all_runs(runs) if (run.read_status().updated or run.created) < limit
    ]
