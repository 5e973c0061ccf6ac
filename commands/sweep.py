"""`lorafleet sweep` and `lorafleet train`: plan, submit, watch and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    Chain,
    Format,
    Job,
    Nodes,
    On,
    Output,
    Overrides,
    Quiet,
    Runs,
    get_backend,
    print_message,
    print_notes,
    print_text,
)

Wait = Annotated[
    bool, typer.Option("--wait", help="Print no live view, and end with the run's own exit code.")
]
Detach = Annotated[
    bool, typer.Option("--detach", "-d", help="Return at once; the run goes on in the background.")
]


def sweep(
    job: Job,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    on: On = None,
    nodes: Nodes = None,
    chain: Chain = None,
    quiet: Quiet = False,
    output: Output = Format.TEXT,
    detach: Detach = False,
    wait: Wait = False,
) -> None:
    """Search for the best configuration, and end with a table and a recommendation."""
    start_job("sweep", job, overrides, runs, on, nodes, chain, quiet, output, detach, wait)


def train(
    job: Job,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    on: On = None,
    nodes: Nodes = None,
    chain: Chain = None,
    quiet: Quiet = False,
    output: Output = Format.TEXT,
    detach: Detach = False,
    wait: Wait = False,
) -> None:
    """Train one configuration, with the job file's own values.

    The search block is ignored.
    """
    start_job("train", job, overrides, runs, on, nodes, chain, quiet, output, detach, wait)


def start_job(
    command: str,
    path: Path,
    overrides: list[str] | None,
    runs: Path,
    on: str | None,
    nodes: int | None,
    chain: int | None,
    quiet: bool,
    output: Format,
    detach: bool,
    wait: bool,
) -> None:
    """Plan a job, submit it, and follow it to its report."""
    from lorafleet.cluster.fetch import fetch_job
    from lorafleet.cluster.planning.preflight import load_checked
    from lorafleet.commands.watch import follow
    from lorafleet.jobs.errors import JobFileError, Problem

    loaded = load_checked(path, tuple(overrides or ()))
    if command == "sweep" and loaded.job.search is None:
        raise JobFileError(
            str(path),
            [Problem("search", "there is no search block; add one, or use `lorafleet train`")],
        )
    if command == "compare" and loaded.job.compare is None:
        raise JobFileError(
            str(path),
            [Problem("compare", "there is no compare block; add one, or give two runs to compare")],
        )
    if not quiet:
        print_notes(loaded.notes)
    backend = get_backend(on, nodes, chain)
    if on is None:
        fetch_job(loaded.job, print_message if not quiet else lambda _: None)
    plan = backend.plan(loaded, command)
    if not quiet:
        for note in plan.notes[len(loaded.notes) :]:
            print_message(f"note: {note}")
    run = backend.submit(plan, loaded, backend.resolve_runs_dir(runs))
    if detach:
        print_text(run.id)
        return
    follow(run, backend, quiet=quiet, output=output, silent=wait)
