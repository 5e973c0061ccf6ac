"""Build the report of any run."""

from __future__ import annotations

from lorafleet.evaluation.report.comparison import build_comparison_report
from lorafleet.evaluation.report.human_rating import load_ratings
from lorafleet.evaluation.report.search import (
    build_search_report,
    collect_results,
    load_run_job,
)
from lorafleet.jobs.extras import has_module
from lorafleet.jobs.runs.records import raise_damaged_file
from lorafleet.jobs.runs.report import Report
from lorafleet.jobs.runs.run import Run


def _read_written_report(run: Run) -> Report | None:
    path = run.path / "report" / "report.json"
    if not path.is_file():
        return None
    with raise_damaged_file(path):
        return Report.model_validate_json(path.read_text())


def build_report(run: Run) -> Report:
    """Build the report of a run from the results that it has so far.

    A report is never stored as state: it is computed from the run's files each time, also
    while the run trains, without torch, Ray or network. A benchmark is the exception: it
    has no trials, so its written report is read.

    Args:
        run: A run of any command.

    Raises:
        RunError: The folder is not a complete run, a needed file is damaged, or its job is
            of another version.
    """
    command = run.read_plan().command
    # A benchmark has no trials to build its report from, and a client-only installation has no
    # scipy for the intervals: both have the report that the run itself wrote.
    if command == "benchmark" or not has_module("scipy"):
        report = _read_written_report(run)
        if report is not None:
            return report
    if command == "compare":
        class_counts = run.read_metadata().class_counts
        report = build_comparison_report(run, load_run_job(run), collect_results(run), class_counts)
    else:
        report = build_search_report(run)
    if not (run.path / "ratings").is_dir():
        return report
    return report.model_copy(update={"ratings": load_ratings(run)})
