"""`lorafleet doctor`: what is here, what is missing, and how to get it."""

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
    cluster_on,
    console,
    print_json,
    say,
)
from lorafleet.jobs.errors import ExitCode

if TYPE_CHECKING:
    from lorafleet.cluster.doctor import Finding

_MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("missing", "bold red")}


def doctor(runs: Runs = DEFAULT_RUNS, on: On = None, nodes: Nodes = None, output: Output = Format.TEXT) -> None:
    """Look at hardware, packages, caches, W&B and cluster clients; exit code 3 when something needed is missing.

    With --on a short job does it on nodes of the cluster, and tries the link between two of them.
    """
    from lorafleet.cluster.doctor import examine

    findings = examine(runs) if on is None else _on_nodes(on, nodes, runs)
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


def _on_nodes(on: str, nodes: int | None, runs: Path) -> list[Finding]:
    """Submit the job, wait for it, and take its folder away again."""
    import contextlib
    import shutil
    import time

    from lorafleet.cluster.doctor import Finding
    from lorafleet.jobs import files
    from lorafleet.jobs.errors import UserError

    backend = cluster_on(on, nodes)
    folder = backend.runs_dir(runs)
    run = backend.examine(folder)
    said, code = "", None
    try:
        found = files.read_json(run.path / "findings.json")
        watch = None if found else backend.watch(run)
        while watch and (code := watch.poll()) is None:
            place = watch.seen.sentence
            if place not in ("", said):
                said = place
                say(place)
            time.sleep(0.5)
        found = found or files.read_json(run.path / "findings.json")
        if watch and not found:
            log = (run.path / "logs" / "driver.log", *sorted((run.path / "slurm").glob("*.out")))
            last = "\n".join(path.read_text(errors="replace")[-1500:] for path in log if path.is_file())
            raise UserError(f"{last}\nthe job ended with code {code} and looked at nothing: {watch.seen.sentence}")
    except KeyboardInterrupt:
        with contextlib.suppress(UserError):
            backend.end_at_once(run)
        raise
    finally:
        shutil.rmtree(run.path, ignore_errors=True)
    return [Finding(**finding) for finding in found["findings"]]
