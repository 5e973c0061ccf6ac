"""`lorafleet sync`: upload a run's offline W&B records."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    OneRun,
    Runs,
    Trust,
    confirm_trust,
    print_message,
    print_text,
)
from lorafleet.jobs import files
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.text import format_count


def sync(
    run: OneRun,
    runs: Runs = DEFAULT_RUNS,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep uploading until the run has ended.")
    ] = False,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Also upload the records of trials that have not ended yet."),
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Only print the command.")] = False,
    trust: Trust = False,
) -> None:
    """Upload a run's offline W&B records with `wandb sync`.

    Each record is uploaded once, after its trial has ended. A trial that continues in another job
    writes its whole record again, so no step is uploaded twice.
    """
    from lorafleet.cluster.backends import get_backend
    from lorafleet.cluster.run_index import find_run
    from lorafleet.cluster.submission import is_remote
    from lorafleet.jobs.runs.run import RunState

    selected_run = find_run(runs, run)
    confirm_trust(selected_run, "sync", trust=trust)
    backend = get_backend(selected_run, trust=trust)
    uploaded = 0
    while True:
        # Read before the records: of a run that has ended since, this round still finds all of
        # them.
        is_live = backend.status(selected_run).state in (RunState.PENDING, RunState.RUNNING)
        ready, waiting = select_records(
            selected_run, include_unfinished=everything or selected_run.state is RunState.FINISHED
        )
        if show:
            print_text(" ".join(build_sync_command(ready)))
            return
        if ready:
            _upload(selected_run, ready)
            uploaded += len(ready)
        if not (follow and is_live):
            break
        time.sleep(_POLL_SECONDS)
    if not uploaded and not waiting:
        reason = "tracking was online or disabled"
        if is_remote(selected_run):
            reason = f"`lorafleet pull {selected_run.id}` downloads them"
        explanation = "all of them are uploaded" if _list_records(selected_run) else reason
        raise UserError(f"{selected_run.id} has no offline W&B records to upload: {explanation}")
    print_message(
        f"wandb sync processed {format_count(uploaded, 'record')} of {selected_run.id}; its output "
        "above says what it did with each"
    )
    if waiting:
        remaining = f"{format_count(len(waiting), 'record')} of trials that have not ended"
        print_message(
            f"{remaining}: run `lorafleet sync {selected_run.id}` again when they have ended, or "
            "upload them as they are with --all"
        )


if TYPE_CHECKING:
    from lorafleet.jobs.runs.run import Run

_RECORDS = "wandb/wandb/offline-run-*"
_CLOSED = "wandb/closed.jsonl"
_POLL_SECONDS = 30.0


def select_records(run: Run, *, include_unfinished: bool) -> tuple[list[Path], list[Path]]:
    """Return the records that are not uploaded yet, as (ready to upload, trial has not ended).

    Args:
        include_unfinished: Treat every record as ready, even if its trial has not ended.
    """
    closed = {
        row["trial_id"]
        for member in [run, *run.list_arms()]
        for row in files.read_jsonl(member.path / _CLOSED)
    }
    pending = [folder for folder in _list_records(run) if not list(folder.glob("*.wandb.synced"))]
    # W&B names a folder offline-run-TIME-ID, and the id of a trial's record ends with the trial id.
    ready = [
        folder
        for folder in pending
        if include_unfinished or folder.name.rpartition("-")[2] in closed
    ]
    return ready, [folder for folder in pending if folder not in ready]


def _list_records(run: Run) -> list[Path]:
    """Return the records of a run and of a comparison's arms.

    A record is one folder of W&B, with one run of one trial.
    """
    return [
        folder
        for member in [run, *run.list_arms()]
        for folder in sorted(member.path.glob(_RECORDS))
    ]


def _upload(run: Run, folders: list[Path]) -> None:
    from lorafleet.evaluation.report.search import load_run_job

    base_url = load_run_job(run).tracking.base_url
    env = os.environ | ({"WANDB_BASE_URL": base_url} if base_url else {})
    process = subprocess.run(build_sync_command(folders), env=env, check=False)
    if process.returncode:
        raise UserError(
            f"wandb sync ended with exit code {process.returncode}; see its output above (if you "
            "are not logged in, run `wandb login`)"
        )


def build_sync_command(folders: list[Path]) -> list[str]:
    """Return the `wandb sync` command of this Python environment.

    A `wandb` elsewhere on PATH may be another version.
    """
    script = Path(sys.executable).with_name("wandb")
    return [str(script) if script.is_file() else "wandb", "sync", *map(str, folders)]
