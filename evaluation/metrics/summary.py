"""Summarise the results of a model on a split for the files of a run, and read them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafleet.evaluation.metrics.baselines import evaluate_trivial_answers
from lorafleet.evaluation.metrics.predictions import RowResults, from_records
from lorafleet.evaluation.metrics.scores import compute_confusion, compute_per_class, compute_scores
from lorafleet.jobs import files
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema.job import JobSpec


def summarize_results(results: RowResults, job: JobSpec, labels: Sequence[str]) -> dict[str, Any]:
    """Return metrics with their intervals, as a JSON record.

    Args:
        results: Per-row results on one split.
        job: The job, for the names of its metrics.
        labels: Class names in the order of the model's outputs; empty to number the
            classes.

    Returns:
        `metrics`, `intervals` and `whole` (metrics with one value for all rows). For a
            classifier also `per_class` and `confusion`. `read_results` takes the record
            again.
    """
    result_scores = compute_scores(results, job.metric_names)
    record: dict[str, Any] = {
        "metrics": result_scores.metrics,
        "intervals": result_scores.intervals,
        "whole": dict(results.whole),
    }
    if results.classified:
        class_names = labels or [str(label) for label in range(results.classified.classes)]
        record |= {
            "per_class": compute_per_class(results.classified, class_names),
            "confusion": compute_confusion(results.classified),
        }
    return record


def write_baselines(run: Run, job: JobSpec, rows: Mapping[str, Sequence[Row]]) -> None:
    """Write the metrics of trivial answers for each split, once.

    Does nothing if no metric of answers is evaluated, or if an earlier attempt wrote the
    file.

    Args:
        run: The run, whose `baselines_file` is written.
        job: Its job.
        rows: Split -> its rows.
    """
    if not job.text_metrics or run.baselines_file.is_file():
        return
    baselines = {
        split: evaluate_trivial_answers(split_rows, job.text_metrics)
        for split, split_rows in rows.items()
    }
    files.write_json(run.baselines_file, baselines)


def read_results(predictions: Path, record: dict[str, Any]) -> RowResults | None:
    """Read the results in a predictions file.

    Args:
        predictions: The file.
        record: What `summarize_results` returned for it.

    Returns:
        The results; None if there is no such file.
    """
    rows = files.read_jsonl(predictions)
    if not rows:
        return None
    classes = len(record.get("confusion", []))
    return from_records(rows, classes, record.get("whole", {}))
