"""`lorafleet sync`: upload a run's offline W&B records."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

from commands.common import DEFAULT_RUNS, OneRun, Runs, say
from jobs.errors import UserError
from jobs.words import counted


def sync(
    run: OneRun, runs: Runs = DEFAULT_RUNS, show: bool = typer.Option(False, help="Print the command alone.")
) -> None:
    """Upload a run's W&B records that were written offline (`wandb sync`)."""
    from cluster.store import find_run
    from evaluation.report import run_job

    found = find_run(runs, run)
    folders = sorted(found.path.glob("wandb/wandb/offline-run-*"))
    if not folders:
        raise UserError(f"{found.id} has no offline W&B records: tracking was online or disabled")
    command = sync_command(folders)
    if show:
        typer.echo(" ".join(command))
        return
    base_url = run_job(found).tracking.base_url
    env = os.environ | ({"WANDB_BASE_URL": base_url} if base_url else {})
    done = subprocess.run(command, env=env, check=False)
    if done.returncode:
        raise UserError(
            f"wandb sync ended with code {done.returncode}; it says why above (not logged in? `wandb login`)"
        )
    say(f"wandb sync took {counted(len(folders), 'record')} of {found.id}; what it did with each stands above")


def sync_command(folders: list[Path]) -> list[str]:
    """The `wandb sync` of this Python's environment."""
    script = Path(sys.executable).with_name("wandb")
    return [str(script) if script.is_file() else "wandb", "sync", *map(str, folders)]
