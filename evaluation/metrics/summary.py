"""What goes into a run's files of what a model did with the rows of a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafleet.evaluation.metrics.predictions import RowResults, from_records
from lorafleet.evaluation.metrics.scores import confusion, per_class, scores
from lorafleet.evaluation.report.baselines import trivial_answers
from lorafleet.jobs import files
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema.job import JobSpec


def summary(results: RowResults, job: JobSpec, labels: Sequence[str]) -> dict[str, Any]:
    """Metrics with their intervals; of a classifier also by class, and which class it took for which."""
    found = scores(results, job.metric_names)
    record: dict[str, Any] = {"metrics": found.metrics, "intervals": found.intervals, "whole": dict(results.whole)}
    if results.classified:
        named = labels or [str(label) for label in range(results.classified.classes)]
        record |= {"per_class": per_class(results.classified, named), "confusion": confusion(results.classified)}
    return record


def write_baselines(run: Run, job: JobSpec, rows: Mapping[str, Sequence[Row]]) -> None:
    """Write the metrics of trivial answers for each split (split -> rows), once and only if answers are evaluated."""
    if not job.text_metrics or run.baselines_file.is_file():
        return
    baselines = {split: trivial_answers(split_rows, job.text_metrics) for split, split_rows in rows.items()}
    files.write_json(run.baselines_file, baselines)


def read_results(predictions: Path, record: dict[str, Any]) -> RowResults | None:
    """What a file of predictions holds, with the `summary` beside it; None where there is no such file."""
    rows = files.read_jsonl(predictions)
    if not rows:
        return None
    classes = len(record.get("confusion", []))
    return from_records(rows, classes, record.get("whole", {}))
