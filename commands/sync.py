"""`lorafleet sync`: upload a run's offline W&B records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

from commands.common import DEFAULT_RUNS, OneRun, Runs, say
from jobs.errors import UserError


def sync(
    run: OneRun, runs: Runs = DEFAULT_RUNS, show: bool = typer.Option(False, help="Print the command alone.")
) -> None:
    """Upload a run's W&B records that were written offline (`wandb sync`)."""
    from cluster.store import find_run

    found = find_run(runs, run)
    folders = sorted(found.path.glob("wandb/wandb/offline-run-*"))
    if not folders:
        raise UserError(f"{found.id} has no offline W&B records: tracking was online or disabled")
    command = sync_command(folders)
    if show:
        typer.echo(" ".join(command))
        return
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise UserError(f"wandb sync ended with code {done.returncode}; `wandb login` first, or see its message above")
    say(f"{len(folders)} records of {found.id} are uploaded")


def sync_command(folders: list[Path]) -> list[str]:
    """The `wandb sync` of this Python's environment."""
    script = Path(sys.executable).with_name("wandb")
    return [str(script) if script.is_file() else "wandb", "sync", "--skip-console", *map(str, folders)]
