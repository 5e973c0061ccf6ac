"""`lorafleet report`: the table and the decision, any time."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from lorafleet.commands.common import DEFAULT_RUNS, Format, Runs, console, say, show_report, tell

if TYPE_CHECKING:
    from lorafleet.jobs.runs.report import Report


class ReportFormat(StrEnum):
    """How the table is printed."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"


ReportOutput = Annotated[ReportFormat, typer.Option("--format", help="What to print.")]
ReportName = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN[:TRIAL]]",
        help="Id, job name or folder of a run, or one of its trials. Default: the newest run.",
        show_default=False,
    ),
]


def report(run: ReportName = None, runs: Runs = DEFAULT_RUNS, output: ReportOutput = ReportFormat.TEXT) -> None:
    """The table of every configuration, and which one to ship; with RUN:TRIAL all that is known of one."""
    from lorafleet.cluster.backends import backend_of
    from lorafleet.cluster.run_index import find_run
    from lorafleet.commands.deliver import exported_of, show_exported
    from lorafleet.evaluation.report.search import build_report, write_report
    from lorafleet.jobs.runs.trust import distrust

    name, trial_id = run or "", ""
    if ":" in name and not Path(name).is_dir():
        name, _, trial_id = name.rpartition(":")
    found = find_run(runs, name or None)
    backend_of(found).refresh(found, say)
    exported = exported_of(found)
    plain = Format.JSON if output is ReportFormat.JSON else Format.TEXT
    if exported:
        show_exported(exported, plain)
        return
    stranger = distrust(found.path)
    report_of_it = build_report(found) if stranger else write_report(found)
    if stranger:
        say(f"note: {stranger}; its report is shown, and nothing is written there")
    if trial_id:
        _show_trial(report_of_it, trial_id, output)
        return
    if output is ReportFormat.CSV:
        from lorafleet.evaluation.render.forms import arms_csv, table_csv

        _print_csv(table_csv(report_of_it) if report_of_it.arms is None else arms_csv(report_of_it))
        return
    if show_report(report_of_it, plain) and not stranger:
        tell(f"\nreport   {found.path / 'report' / 'report.html'}")


def _print_csv(text: str) -> None:
    """Print CSV line by line: a cell in quotes keeps its line feeds, all other control characters are escaped."""
    for line in text.removesuffix("\n").split("\n"):
        tell(line)


def _show_trial(report: Report, trial_id: str, output: ReportFormat) -> None:
    """Print one trial. Raises UserError for one that the run does not have."""
    from lorafleet.evaluation.render.forms import one_trial, table_csv
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.text import printable_json

    row = next((row for row in report.shown if row.trial_id == trial_id), None)
    if row is None:
        known = ", ".join(row.trial_id for row in report.shown[:8])
        more = f" and {len(report.shown) - 8} more" if len(report.shown) > 8 else ""
        raise UserError(f"{report.run} has no trial {trial_id}; it has {known}{more}")
    if output is ReportFormat.JSON:
        tell(printable_json(row.model_dump_json(indent=2)))
    elif output is ReportFormat.CSV:
        _print_csv(table_csv(report, [row]))
    else:
        console().print(one_trial(report, row))
