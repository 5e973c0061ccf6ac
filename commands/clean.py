"""`lorafleet clean`: delete finished runs to free disk space."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafleet.commands.common import DEFAULT_RUNS, RunName, Runs, print_text
from lorafleet.jobs.errors import ExitCode, UserError


def clean(
    run: RunName = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="DAYS",
            help="Delete all runs that have not changed for this many days.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be deleted, and delete nothing.")
    ] = False,
    unsynced: Annotated[
        bool,
        typer.Option("--unsynced", help="Also delete runs whose W&B record has not been uploaded."),
    ] = False,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Delete a run, or all runs untouched for a number of days.

    Running ones are never deleted. Runs whose W&B records were not uploaded are kept unless
    --unsynced is given.
    """
    from lorafleet.cluster import run_index as store

    if run is not None and not run:
        raise UserError("RUN is empty; `lorafleet list` shows the runs")
    if (run is None) == (older_than is None):
        raise UserError("clean needs either a RUN or --older-than DAYS (exactly one of the two)")
    selected_runs = (
        [store.find_run(runs, run)]
        if run is not None
        else store.list_old_runs(runs, older_than or 0.0)
    )
    results = [
        store.clean(selected_run, dry_run=dry_run, even_unsynced=unsynced)
        for selected_run in selected_runs
    ]
    for result in results:
        if result.kept_because:
            print_text(f"kept     {result.run}: {result.kept_because}")
        else:
            print_text(
                f"{'would free' if dry_run else 'freed'}  {result.bytes / 1e6:.1f} MB  {result.run}"
            )
    # Only for a run that was named. With --older-than, keeping some runs is a normal result.
    if run is not None and results[0].kept_because:
        raise typer.Exit(ExitCode.GATE_REFUSED)
