"""What the models of a run wrote for the held-out rows."""

from __future__ import annotations

from typing import Any

from lorafleet.evaluation.report.comparison import judged_results
from lorafleet.evaluation.report.search import build_report, chosen_results, run_job
from lorafleet.jobs import files
from lorafleet.jobs.runs.run import Run


def answers_of(run: Run) -> tuple[list[dict[str, Any]], dict[str, tuple[str | None, ...]]]:
    """(the held-out rows, each model's answers): a comparison's arms, else the base and the recommended trial."""
    report, job = build_report(run), run_job(run)
    rows = files.read_jsonl(run.rows_file(report.held_out))
    if report.arms is not None:
        judged = judged_results(run, job, report.held_out)
        found = {name: next(iter(results.values())) for name, results in judged.items() if results}
    else:
        found = chosen_results(run, report)
    return rows, {name: results.answers for name, results in found.items() if results.answers}
