"""`lorafleet sweep` and `lorafleet train`: plan, submit, watch and report."""

from __future__ import annotations

from pathlib import Path

from lorafleet.commands.common import (
    Job,
    Overrides,
    get_backend,
    print_message,
    print_notes,
    print_text,
)
from lorafleet.commands.options import LaunchOptions
from lorafleet.commands.plan import PlanFormat, show_plan


def sweep(job: Job, options: LaunchOptions, overrides: Overrides = None) -> None:
    """Search for the best configuration, and end with a table and a recommendation."""
    start_job("sweep", job, overrides, options)


def train(job: Job, options: LaunchOptions, overrides: Overrides = None) -> None:
    """Train one configuration, with the job file's own values.

    The search block is ignored.
    """
    start_job("train", job, overrides, options)


def start_job(
    command: str, path: Path, overrides: list[str] | None, options: LaunchOptions
) -> None:
    """Plan a job, submit it, and follow it to its report.

    What is missing on this machine is downloaded first. With `--on` nothing is downloaded
    here, because the cluster has inputs of its own.

    Args:
        command: `sweep`, `train` or `compare`.
        path: The job file.
        overrides: Fields to set, as KEY=VALUE.

    Raises:
        UserError: The job cannot start. JobFileError if the file is the reason.
        typer.Exit: With the run's exit code, unless --detach is set.
    """
    from lorafleet.cluster.fetch import fetch_job
    from lorafleet.cluster.planning.preflight import load_checked
    from lorafleet.commands.watch import follow
    from lorafleet.jobs.data.rows import forget_rows
    from lorafleet.jobs.errors import JobFileError, Problem

    loaded = load_checked(path, tuple(overrides or ()))
    if command == "sweep" and loaded.job.search is None:
        raise JobFileError(
            str(path),
            [Problem("search", "there is no search block: add one, or use `lorafleet train`")],
        )
    if command == "compare" and loaded.job.compare is None:
        raise JobFileError(
            str(path),
            [Problem("compare", "there is no compare block: add one, or name two runs to compare")],
        )
    if not options.quiet and not options.dry_run:
        print_notes(loaded.notes)
    backend = get_backend(options.on, options.nodes, options.chain)
    if options.dry_run:
        show_plan(
            backend, backend.plan(loaded, command), options.runs, PlanFormat(options.output.value)
        )
        return
    if options.on is None:
        # Before the plan, which is exact only with data and model at hand.
        fetch_job(loaded.job, print_message if not options.quiet else lambda _: None)
    plan = backend.plan(loaded, command)
    if not options.quiet:
        for note in plan.notes[len(loaded.notes) :]:
            print_message(f"note: {note}")
    run = backend.submit(plan, loaded, backend.resolve_runs_dir(options.runs))
    forget_rows()  # waiting for the run needs no rows
    if options.detach:
        print_text(run.id)
        return
    follow(run, backend, quiet=options.quiet, output=options.output, silent=options.wait)
