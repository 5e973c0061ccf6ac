"""`lorafleet compare`: several methods, or several runs, in one table that ends in a decision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.common import DEFAULT_RUNS, Chain, Format, Nodes, On, Output, Quiet, Runs
from commands.sweep import Detach, Wait

What = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB.yaml [KEY=VALUE]... | RUN RUN...",
        help="A job file with a compare block, or runs to put side by side.",
        show_default=False,
    ),
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
) -> None:
    """Train the arms of a job file at equal budget, or put runs side by side; end with a table and a decision."""
    from commands.sweep import start

    start("compare", Path(what[0]), what[1:], runs, on, nodes, chain, quiet, output, detach, wait)
