"""`lorafleet compare`: several methods, or several runs, in one table that ends in a decision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from lorafleet.commands.common import (
    DEFAULT_RUNS,
    Chain,
    Format,
    Nodes,
    On,
    Output,
    Quiet,
    Runs,
    say,
    show_report,
    tell,
)
from lorafleet.commands.sweep import Detach, Wait, start

What = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB.yaml [KEY=VALUE]... | RUN RUN...",
        help="A job file with a compare block, or runs to put side by side.",
        show_default=False,
    ),
]
Into = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Of runs side by side: write the page and tables here.")
]


def compare(
    what: What,
    runs: Runs = DEFAULT_RUNS,
    on: On = None,
    nodes: Nodes = None,
    chain: Chain = None,
    quiet: Quiet = False,
    output: Output = Format.TEXT,
    detach: Detach = False,
    wait: Wait = False,
    into: Into = None,
) -> None:
    """Train the arms of a job file at equal budget, or put runs side by side; end with a table and a decision."""
    first = Path(what[0])
    if first.suffix in (".yaml", ".yml") or first.is_file():
        _no_use({"--output": into is not None}, "of a job file, whose run has a report/ of its own")
        start("compare", first, what[1:], runs, on, nodes, chain, quiet, output, detach, wait)
        return
    given = {"--on": on, "--nodes": nodes, "--max-walltime-chain": chain, "--detach": detach, "--wait": wait}
    _no_use({name: bool(value) for name, value in given.items()}, "of runs side by side, which trains nothing")
    _side_by_side(what, runs, quiet, output, into)


def _no_use(given: dict[str, bool], why: str) -> None:
    """Raises UserError for an option that would do nothing."""
    from lorafleet.jobs.errors import UserError

    useless = [name for name, there in given.items() if there]
    if useless:
        raise UserError(f"{', '.join(useless)} has no use in a comparison {why}: leave it out")


def _side_by_side(names: list[str], runs: Path, quiet: bool, output: Format, into: Path | None) -> None:
    from lorafleet.cluster.backends import backend_of
    from lorafleet.cluster.run_index import find_run
    from lorafleet.evaluation.report.across_runs import across
    from lorafleet.evaluation.report.search import write_forms
    from lorafleet.jobs.errors import UserError

    found = [find_run(runs, name) for name in names]
    for run in found:
        backend_of(run).refresh(run, say)
    if len({run.path for run in found}) < 2:
        raise UserError(f"compare has {names[0]} alone, but must have a job file, or two runs or more")
    report = across(found)
    if into is not None:
        write_forms(report, into)
    if show_report(report, output, quiet=quiet) and into is not None:
        tell(f"\nreport   {into / 'report.html'}")
