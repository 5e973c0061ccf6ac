"""Collect the answers that people rate."""

from __future__ import annotations

from lorafleet.evaluation.report.answers import load_answers
from lorafleet.evaluation.report.human_rating import Item, build_sheet
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.run import Run


def build_run_sheet(run: Run, rater: str, max_rows: int) -> list[Item]:
    """Return the sheet of a rater for a run.

    Args:
        run: A run with several models that generate text.
        rater: Name of the rater, which decides the order of rows and answers.
        max_rows: Most rows to rate.

    Raises:
        RunError: The run has fewer than two models with answers, or no row that all
            answered.
    """
    rows, answers = load_answers(run)
    if len(answers) < 2:
        raise RunError(
            f"{run.id} has answers of {len(answers)} models, but rating needs at least two"
        )
    items = build_sheet(rows, answers, rater, max_rows)
    if not items:
        raise RunError(
            f"{run.id} has no answers to the held-out rows; rating needs a task that generates "
            "text (with evaluate.sample_rows, or a text metric)"
        )
    return items
