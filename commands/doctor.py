"""`lorafleet doctor`: check what is installed, what is missing, and how to get it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    Format,
    Nodes,
    On,
    Output,
    Runs,
    load_cluster,
    make_console,
    print_json,
    print_message,
)
from lorafleet.jobs.errors import ExitCode

if TYPE_CHECKING:
    from lorafleet.cluster.doctor import Finding

_MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("missing", "bold red")}


def doctor(
    runs: Runs = DEFAULT_RUNS, on: On = None, nodes: Nodes = None, output: Output = Format.TEXT
) -> None:
    """Check hardware, packages, caches, W&B and cluster clients.

    The exit code is 3 when something needed is missing. With --on, a short job checks the nodes
    of the cluster and the link between two of them.
    """
    from lorafleet.cluster.doctor import check_machine

    findings = check_machine(runs) if on is None else _check_nodes(on, nodes, runs)
    if output is Format.JSON:
        print_json({"findings": [finding.to_dict() for finding in findings]})
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            mark, style = _MARKS[finding.verdict]
            details = finding.found + (f": {finding.advice}" if finding.advice else "")
            table.add_row(
                Text(mark, style=style), Text(finding.what), Text(details, overflow="fold")
            )
        make_console().print(table)
    if any(finding.verdict == "missing" for finding in findings):
        raise typer.Exit(ExitCode.GATE_REFUSED)


def _check_nodes(on: str, nodes: int | None, runs: Path) -> list[Finding]:
    """Submit the check as a job, wait for it, and remove its folder.

    Raises:
        UserError: The job ended before it checked anything.
    """
    from lorafleet.cluster.doctor import Finding
    from lorafleet.cluster.probe import follow_short_job

    backend = load_cluster(on, nodes)
    run = backend.check_site(backend.resolve_runs_dir(runs))
    report = follow_short_job(backend, run, "findings.json", print_message)
    return [Finding(**finding) for finding in report["findings"]]
