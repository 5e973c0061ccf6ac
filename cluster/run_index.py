"""Finding, listing and cleaning runs in a runs folder."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from lorafleet.cluster.submitted_runs import submitted
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.runs.tracebacks import at_run
from lorafleet.jobs.runs.trust import forget
from lorafleet.jobs.schema.field_paths import closest


def all_runs(runs: Path, damaged: list[str] | None = None) -> list[Run]:
    """The runs of a folder, newest first; what is wrong with those that cannot be read is added to `damaged`."""
    said: list[str] = [] if damaged is None else damaged
    found = [Run(path.parent) for path in runs.glob("*/plan.json") if not path.parent.is_symlink()]
    return sorted((run for run in found if _readable(run, said)), key=lambda run: run.created, reverse=True)


def _readable(run: Run, damaged: list[str]) -> bool:
    """Whether a folder's status is a run's. Another program's folder is passed over."""
    try:
        return bool(run.state) and run.created >= 0
    except (ValueError, OSError, RunError) as error:
        damaged.append(f"{run.path.name} is left out: {error}")
        return False


def find_run(runs: Path, name: str | None) -> Run:
    """A run by its folder, its id or its job's name (the newest of that name); without a name, the newest of all.

    Raises RunError with what there is.
    """
    found = _found(runs, name)
    at_run(found.path)
    return found


def _found(runs: Path, name: str | None) -> Run:
    if name is not None and not name.strip():
        raise RunError("RUN is empty; `lorafleet list` shows the runs")
    if name:
        for path in (Path(name), runs / name):
            if (path / "plan.json").is_file() and not path.is_symlink():
                return Run(path.absolute())
    known = all_runs(runs)
    if name is not None or not known:  # those on a cluster may lie in its site's folder
        folders = {run.path.absolute() for run in known}
        known += [run for run in submitted() if run.path.absolute() not in folders and _readable(run, [])]
        for run in known:
            if run.id == name:
                return Run(run.path.absolute())
    if name is None:
        if known:
            return Run(known[0].path.absolute())
        raise RunError(f"there is no run in {runs.absolute()}; --runs DIR names another folder")
    named = [run for run in known if run.status().get("name") == name]
    if named:
        return Run(named[0].path.absolute())
    near = closest(name, [run.id for run in known])
    hint = f"; did you mean {near}?" if near else "; `lorafleet list` shows the runs"
    raise RunError(f"there is no run {name!r} in {runs.absolute()}{hint}")


@dataclass(frozen=True)
class Cleaned:
    """What `clean` did to one run."""

    run: str
    bytes: int
    kept_because: str | None


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() or path.is_symlink())


def protected(run: Run) -> str | None:
    """Why a run may not be cleaned, or None."""
    from lorafleet.cluster.backends import SITE_FILE, backend_of

    live = (RunState.RUNNING, RunState.PENDING)
    if (run.path / SITE_FILE).is_file():  # what its own record says may be older than what the queue knows
        seen = backend_of(run).look(run)
        if seen.state in live:
            return f"it is {seen.state}; `lorafleet stop {run.id}` first"
        if not seen.asked:
            return f"its cluster cannot be asked whether it runs: {seen.sentence}"
    elsewhere = run.status().get("host", os.uname().nodename) != os.uname().nodename
    if run.alive() or (elsewhere and run.state in live and not (run.path / SITE_FILE).is_file()):
        return f"it is {run.state}; `lorafleet stop {run.id}` first"
    if unsynced(run):
        return f"its W&B record has not been uploaded; `lorafleet sync {run.id}` first, or give --unsynced"
    return None


def unsynced(run: Run) -> bool:
    """Whether a run holds offline W&B records that no `sync` has uploaded."""
    kept = "wandb/wandb/offline-run-*"
    offline = [folder for inside in ("", "parts/*/", "arms/*/") for folder in run.path.glob(f"{inside}{kept}")]
    return any(not list(folder.glob("*.wandb.synced")) for folder in offline)


def clean(run: Run, *, dry_run: bool, even_unsynced: bool = False) -> Cleaned:
    """Delete a run's folder. A running or unsynced one is left alone, and the answer says why."""
    reason = protected(run)
    if reason and not (even_unsynced and "W&B" in reason):
        return Cleaned(run.id, 0, reason)
    size = folder_bytes(run.path)
    if not dry_run:
        forget(run.path)
        shutil.rmtree(run.path)
    return Cleaned(run.id, size, None)


def older_than(runs: Path, days: float) -> list[Run]:
    """Runs that were last touched more than `days` days ago."""
    limit = time.time() - 86400 * days
    return [run for run in all_runs(runs) if float(run.status().get("updated", run.created)) < limit]
