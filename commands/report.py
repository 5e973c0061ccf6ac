"""`lorafleet report`: print a run's table and decision at any time."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    Format,
    Runs,
    make_console,
    print_message,
    print_text,
    show_report,
)

if TYPE_CHECKING:
    from lorafleet.jobs.runs.report import Report


class ReportFormat(StrEnum):
    """Output format of a report."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"


ReportOutput = Annotated[ReportFormat, typer.Option("--format", help="Output format.")]
ReportName = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN[:TRIAL]]",
        help="Id, job name or folder of a run, or one of its trials. Default: the newest run.",
        show_default=False,
    ),
]


def report(
    run: ReportName = None, runs: Runs = DEFAULT_RUNS, output: ReportOutput = ReportFormat.TEXT
) -> None:
    """Print the table of every configuration and the recommendation.

    With RUN:TRIAL, print everything that is recorded of one trial.
    """
    from lorafleet.cluster.backends import get_backend
    from lorafleet.cluster.run_index import find_run
    from lorafleet.commands.show import print_export, read_export
    from lorafleet.evaluation.render.write import write_report
    from lorafleet.evaluation.report.build import build_report
    from lorafleet.jobs.runs.trust import find_distrust_reason

    name, trial_id = run or "", ""
    # A folder may have a colon in its name.
    if ":" in name and not Path(name).is_dir():
        name, _, trial_id = name.rpartition(":")
    selected_run = find_run(runs, name or None)
    get_backend(selected_run).refresh(selected_run, print_message)
    exported = read_export(selected_run)
    output_format = Format.JSON if output is ReportFormat.JSON else Format.TEXT
    # The run of an export has no trials; its result takes the place of the table.
    if exported:
        print_export(exported, output_format)
        return
    distrust_reason = find_distrust_reason(selected_run.path)
    run_report = build_report(selected_run) if distrust_reason else write_report(selected_run)
    if distrust_reason:
        print_message(
            f"note: {distrust_reason}; its report is only printed, not written to the run's folder"
        )
    if trial_id:
        _show_trial(run_report, trial_id, output)
        return
    if output is ReportFormat.CSV:
        from lorafleet.evaluation.render.forms import render_arms_csv, render_table_csv

        _print_csv(
            render_table_csv(run_report) if run_report.arms is None else render_arms_csv(run_report)
        )
        return
    if show_report(run_report, output_format) and not distrust_reason:
        print_text(f"\nreport   {selected_run.path / 'report' / 'report.html'}")


def _print_csv(text: str) -> None:
    """Print CSV line by line.

    A quoted cell keeps its line feeds; other control characters are escaped.
    """
    for line in text.removesuffix("\n").split("\n"):
        print_text(line)


def _show_trial(report: Report, trial_id: str, output: ReportFormat) -> None:
    """Print one trial. Raises UserError if the run does not have it."""
    from lorafleet.evaluation.render.forms import render_table_csv, render_trial
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.text import make_json_printable

    row = next((row for row in report.table_rows if row.trial_id == trial_id), None)
    if row is None:
        trial_ids = ", ".join(row.trial_id for row in report.table_rows[:8])
        more = f" and {len(report.table_rows) - 8} more" if len(report.table_rows) > 8 else ""
        raise UserError(f"{report.run} has no trial {trial_id}; it has {trial_ids}{more}")
    if output is ReportFormat.JSON:
        print_text(make_json_printable(row.model_dump_json(indent=2)))
    elif output is ReportFormat.CSV:
        _print_csv(render_table_csv(report, [row]))
    else:
        make_console().print(render_trial(report, row))
