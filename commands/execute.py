"""`lorafleet exec RUN`: the driver of a run. Started by a backend, never by hand."""

from __future__ import annotations

from pathlib import Path

import typer

from commands.common import say


def execute(run: Path) -> None:
    """Run what is left of a submitted run."""
    from jobs.errors import ExitCode
    from jobs.lease import HasDriver
    from jobs.ours import check_packages
    from jobs.run import Run

    check_packages()
    from tuning.allocation import allocation_here
    from tuning.sweep import Sweep

    try:
        code = Sweep(Run(run.absolute())).execute()
    except HasDriver as error:
        if not allocation_here():
            raise
        say(str(error))
        code = ExitCode.TAKEN
    raise typer.Exit(code)
