"""`lorafleet stop`: ask a run to save and end."""

from __future__ import annotations

import typer

from commands.common import DEFAULT_RUNS, OneRun, Runs


def stop(run: OneRun, runs: Runs = DEFAULT_RUNS) -> None:
    """Ask a running run to save its trials and end; `resume` goes on with it."""
    from cluster.backends import backend_for
    from cluster.machine import local_site
    from cluster.store import find_run

    found = find_run(runs, run)
    backend_for(local_site()).cancel(found)
    typer.echo(f"{found.id} saves its trials and ends; `lorafleet resume {found.id}` goes on")
