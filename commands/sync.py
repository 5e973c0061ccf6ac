"""`lorafleet sync`: upload a run's offline W&B records."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from lorafleet.commands.common import DEFAULT_RUNS, OneRun, Runs, Trust, confirm_trust, say, tell
from lorafleet.jobs import files
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.text import counted


def sync(
    run: OneRun,
    runs: Runs = DEFAULT_RUNS,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also records of trials that have not ended, as far as they are.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the command alone.")] = False,
    trust: Trust = False,
) -> None:
    """Upload a run's W&B records that were written offline (`wandb sync`), each once, when its trial has ended.

    A trial that goes on in another job writes its whole record anew, so no step arrives twice.
    """
    from lorafleet.cluster.backends import backend_of, lies_elsewhere
    from lorafleet.cluster.run_index import find_run

    found = find_run(runs, run)
    confirm_trust(found, "sync", trust=trust)
    backend = backend_of(found, trust=trust)
    done = 0
    while True:
        live = backend.look(found).state in (RunState.PENDING, RunState.RUNNING)
        ready, waiting = records(found, whole=everything or found.state is RunState.FINISHED)
        if show:
            tell(" ".join(sync_command(ready)))
            return
        if ready:
            _upload(found, ready)
            done += len(ready)
        if not (follow and live):
            break
        time.sleep(_LOOK_SECONDS)
    if not done and not waiting:
        none = "tracking was online or disabled"
        if lies_elsewhere(found):
            none = f"`lorafleet pull {found.id}` brings them"
        what = "all of them are uploaded" if _all_records(found) else none
        raise UserError(f"{found.id} has no offline W&B records to upload: {what}")
    say(f"wandb sync took {counted(done, 'record')} of {found.id}; what it did with each stands above")
    if waiting:
        left = f"{counted(len(waiting), 'record')} of trials that have not ended"
        say(f"{left}: `lorafleet sync {found.id}` takes them later, --all as they are")


_RECORDS = "wandb/wandb/offline-run-*"
_CLOSED = "wandb/closed.jsonl"
_LOOK_SECONDS = 30.0


def records(run: Run, *, whole: bool) -> tuple[list[Path], list[Path]]:
    """(those to upload now, those whose trial has not ended) of the records that were not uploaded yet."""
    closed = {row["trial_id"] for one in [run, *run.arms()] for row in files.read_jsonl(one.path / _CLOSED)}
    left = [folder for folder in _all_records(run) if not list(folder.glob("*.wandb.synced"))]
    ready = [folder for folder in left if whole or folder.name.rpartition("-")[2] in closed]
    return ready, [folder for folder in left if folder not in ready]


def _all_records(run: Run) -> list[Path]:
    """Those of a run, and of a comparison's arms."""
    return [folder for one in [run, *run.arms()] for folder in sorted(one.path.glob(_RECORDS))]


def _upload(run: Run, folders: list[Path]) -> None:
    from lorafleet.evaluation.report.search import run_job

    base_url = run_job(run).tracking.base_url
    env = os.environ | ({"WANDB_BASE_URL": base_url} if base_url else {})
    done = subprocess.run(sync_command(folders), env=env, check=False)
    if done.returncode:
        raise UserError(
            f"wandb sync ended with code {done.returncode}; it says why above (not logged in? `wandb login`)"
        )


def sync_command(folders: list[Path]) -> list[str]:
    """The `wandb sync` of this Python's environment."""
    script = Path(sys.executable).with_name("wandb")
    return [str(script) if script.is_file() else "wandb", "sync", *map(str, folders)]
