"""`lorafleet report`: the table and the decision, any time."""

from __future__ import annotations

import typer

from commands.common import DEFAULT_RUNS, Format, Output, RunName, Runs, console, say


def report(run: RunName = None, runs: Runs = DEFAULT_RUNS, output: Output = Format.TEXT) -> None:
    """The table of every configuration, and which one to ship."""
    from cluster.backends import backend_of
    from cluster.store import find_run
    from evaluation.render import terminal
    from evaluation.report import report_json, write_report

    found = find_run(runs, run)
    backend_of(found).refresh(found, say)
    made = write_report(found)
    if output is Format.JSON:
        typer.echo(report_json(made))
        return
    screen = console()
    screen.print(terminal(made, screen.width))
    typer.echo(f"\nreport   {found.path / 'report' / 'report.html'}")
