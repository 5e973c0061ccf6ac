"""`lorafleet clean`: free the disk of runs that are over."""

from __future__ import annotations

from typing import Annotated

import typer
from lorafleet.commands.common import DEFAULT_RUNS, RunName, Runs, tell
from lorafleet.jobs.errors import ExitCode, UserError


def clean(
    run: RunName = None,
    older_than: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="All runs untouched for this many days.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")] = False,
    unsynced: Annotated[bool, typer.Option("--unsynced", help="Also runs whose W&B record was not uploaded.")] = False,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Delete a run, or all runs older than some days. Running ones, and W&B records not uploaded, are never touched."""
    from lorafleet.cluster import run_index as store

    if run is not None and not run:
        raise UserError("RUN is empty; `lorafleet list` shows the runs")
    if (run is None) == (older_than is None):
        raise UserError("clean needs either a RUN or --older-than DAYS, and exactly one of the two")
    chosen = [store.find_run(runs, run)] if run is not None else store.older_than(runs, older_than or 0.0)
    results = [store.clean(found, dry_run=dry_run, even_unsynced=unsynced) for found in chosen]
    for result in results:
        if result.kept_because:
            tell(f"kept     {result.run}: {result.kept_because}")
        else:
            tell(f"{'would free' if dry_run else 'freed'}  {result.bytes / 1e6:.1f} MB  {result.run}")
    if run is not None and results[0].kept_because:
        raise typer.Exit(ExitCode.GATE_REFUSED)
