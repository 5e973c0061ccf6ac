"""`lorafleet exec RUN`: the driver of a run. Started by a backend, never by hand."""

from __future__ import annotations

from pathlib import Path

import typer


def execute(run: Path) -> None:
    """Run what is left of a submitted run."""
    from jobs.ours import check_packages
    from jobs.run import Run

    check_packages()
    from tuning.sweep import Sweep

    raise typer.Exit(Sweep(Run(run.absolute())).execute())
