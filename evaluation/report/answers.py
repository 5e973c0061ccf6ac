"""Load the answers that the models of a run wrote for the held-out rows."""

from __future__ import annotations

from typing import Any

from lorafleet.evaluation.report.build import build_report
from lorafleet.evaluation.report.comparison import load_row_results
from lorafleet.evaluation.report.search import load_chosen_results, load_run_job
from lorafleet.jobs import files
from lorafleet.jobs.runs.run import Run


def load_answers(run: Run) -> tuple[list[dict[str, Any]], dict[str, tuple[str | None, ...]]]:
    """Load the held-out rows of a run and the answers of its models.

    An arm with several seeds is represented by its first seed.

    Returns:
        The rows, and model -> answers. The models are the arms of a comparison; for a
            search, the base and the recommended trial. Models without answers are left out.
    """
    report, job = build_report(run), load_run_job(run)
    rows = files.read_jsonl(run.get_rows_file(report.held_out))
    if report.arms is not None:
        results_by_arm = load_row_results(run, job, report.held_out)
        results_by_model = {
            name: next(iter(results.values()))
            for name, results in results_by_arm.items()
            if results
        }
    else:
        results_by_model = load_chosen_results(run, report)
    return rows, {
        name: results.answers for name, results in results_by_model.items() if results.answers
    }
