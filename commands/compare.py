"""`lorafleet compare`: compare methods or runs in one table that ends in a decision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafleet.commands.common import (
    Format,
    print_message,
    print_text,
    show_report,
)
from lorafleet.commands.options import LaunchOptions
from lorafleet.commands.sweep import start_job

JobOrRuns = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB.yaml [KEY=VALUE]... | RUN RUN...",
        help="A job file with a compare block, or two or more runs to compare.",
        show_default=False,
    ),
]
OutputDir = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="DIR",
        help="When comparing runs: write the page and the tables to this folder.",
    ),
]


def compare(what: JobOrRuns, options: LaunchOptions, into: OutputDir = None) -> None:
    """Train the arms of a job file at equal budget, or put runs side by side.

    Either ends with a table and a decision.
    """
    first = Path(what[0])
    # A name that ends in .yaml is a job file even if it does not exist: the error should then say
    # so.
    if first.suffix in (".yaml", ".yml") or first.is_file():
        _refuse_useless_options(
            {"--output": into is not None}, "of a job file, because its run has a report/ folder"
        )
        start_job("compare", first, what[1:], options)
        return
    job_options = {
        "--on": options.on,
        "--nodes": options.nodes,
        "--max-walltime-chain": options.chain,
        "--detach": options.detach,
        "--wait": options.wait,
        "--dry-run": options.dry_run,
    }
    _refuse_useless_options(
        {name: bool(value) for name, value in job_options.items()},
        "of existing runs, because nothing is trained",
    )
    _compare_runs(what, options.runs, options.quiet, options.output, into)


def _refuse_useless_options(options: dict[str, bool], reason: str) -> None:
    """Raise UserError for options that would do nothing.

    An ignored option would let the user believe that something else is compared.

    Args:
        options: Option -> whether it is set.
        reason: Ends the message: of what the comparison is.
    """
    from lorafleet.jobs.errors import UserError

    useless = [name for name, is_set in options.items() if is_set]
    if useless:
        raise UserError(
            f"{', '.join(useless)} has no effect in a comparison {reason}: leave it out"
        )


def _compare_runs(
    names: list[str], runs: Path, quiet: bool, output: Format, output_dir: Path | None
) -> None:
    from lorafleet.cluster.backends import get_backend
    from lorafleet.cluster.run_index import find_run
    from lorafleet.evaluation.render.write import write_report_files
    from lorafleet.evaluation.report.across_runs import compare_runs
    from lorafleet.jobs.errors import UserError

    selected_runs = [find_run(runs, name) for name in names]
    for run in selected_runs:
        # Without --trust: comparing reads files only, and an untrusted run is not refreshed.
        get_backend(run).refresh(run, print_message)
    # Two names may be the same run.
    if len({run.path for run in selected_runs}) < 2:
        raise UserError(
            f"compare has only the run {names[0]}, but needs a job file, or at least two runs"
        )
    report = compare_runs(selected_runs)
    if output_dir is not None:
        write_report_files(report, output_dir)
    if show_report(report, output, quiet=quiet) and output_dir is not None:
        print_text(f"\nreport   {output_dir / 'report.html'}")
