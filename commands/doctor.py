"""`lorafleet doctor`: what is here, what is missing, and how to get it."""

from __future__ import annotations

import typer

from commands.common import DEFAULT_RUNS, Format, Output, Runs, console, print_json
from jobs.errors import ExitCode

_MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("missing", "bold red")}


def doctor(runs: Runs = DEFAULT_RUNS, output: Output = Format.TEXT) -> None:
    """Look at hardware, packages, caches, W&B and cluster clients; exit code 3 when something needed is missing."""
    from cluster.doctor import examine

    findings = examine(runs)
    if output is Format.JSON:
        print_json({"findings": [finding.as_dict() for finding in findings]})
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            word, style = _MARKS[finding.verdict]
            said = finding.found + (f": {finding.advice}" if finding.advice else "")
            table.add_row(Text(word, style=style), Text(finding.what), Text(said, overflow="fold"))
        console().print(table)
    if any(finding.verdict == "missing" for finding in findings):
        raise typer.Exit(ExitCode.GATE_REFUSED)
