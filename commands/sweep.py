"""`lorafleet sweep` and `lorafleet train`: plan, submit, watch, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.common import DEFAULT_RUNS, Format, Job, Nodes, Output, Overrides, Quiet, Runs, note_aliases, say

Detach = Annotated[bool, typer.Option("--detach", "-d", help="Return at once; the run goes on in the background.")]


def sweep(
    job: Job,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    nodes: Nodes = None,
    quiet: Quiet = False,
    output: Output = Format.TEXT,
    detach: Detach = False,
) -> None:
    """Search for the best configuration, and end with a table and a recommendation."""
    _start("sweep", job, overrides, runs, nodes, quiet, output, detach)


def train(
    job: Job,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    nodes: Nodes = None,
    quiet: Quiet = False,
    output: Output = Format.TEXT,
    detach: Detach = False,
) -> None:
    """Train one configuration: the job file's own values, whatever it searches."""
    _start("train", job, overrides, runs, nodes, quiet, output, detach)


def _start(
    command: str,
    path: Path,
    overrides: list[str] | None,
    runs: Path,
    nodes: int | None,
    quiet: bool,
    output: Format,
    detach: bool,
) -> None:
    from cluster.backends import backend_for
    from cluster.check import check_names
    from cluster.fetch import fetch_job
    from cluster.machine import site_here
    from commands.watch import follow
    from jobs.errors import JobFileError, Problem
    from jobs.load import load_job

    loaded = load_job(path, tuple(overrides or ()))
    if command == "sweep" and loaded.job.search is None:
        raise JobFileError(
            str(path), [Problem("search", "there is no search block; add one, or use `lorafleet train`")]
        )
    if not quiet:
        note_aliases(loaded.notes)
    check_names(loaded)
    fetch_job(loaded.job, say if not quiet else lambda _: None)
    backend = backend_for(site_here(nodes))
    plan = backend.plan(loaded, command)
    if not quiet:
        for note in plan.notes[len(loaded.notes) :]:
            say(f"note: {note}")
    run = backend.submit(plan, loaded, runs)
    if detach:
        typer.echo(run.id)
        return
    follow(run, backend, quiet=quiet, output=output)
