"""Summarise the results of a model on a split for the files of a run, and read them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorafleet.evaluation.metrics.baselines import evaluate_trivial_answers
from lorafleet.evaluation.metrics.predictions import RowResults, from_records
from lorafleet.evaluation.metrics.scores import compute_confusion, compute_per_class, compute_scores
from lorafleet.jobs import files
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.runs.records import SplitScores
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema.job import JobSpec


def summarize_results(results: RowResults, job: JobSpec, labels: Sequence[str]) -> SplitScores:
    """Return metrics with their intervals, for test.json and base.json.

    Args:
        results: Per-row results on one split.
        job: The job, for the names of its metrics.
        labels: Class names in the order of the model's outputs; empty to number the
            classes.

    """
    result_scores = compute_scores(results, job.metric_names)
    scores = SplitScores(
        metrics=files.replace_non_finite(result_scores.metrics),
        intervals=files.replace_non_finite(result_scores.intervals),
        whole=files.replace_non_finite(dict(results.whole)),
    )
    if not results.classified:
        return scores
    class_names = labels or [str(label) for label in range(results.classified.classes)]
    return scores.model_copy(
        update={
            "per_class": compute_per_class(results.classified, class_names),
            "confusion": compute_confusion(results.classified),
        }
    )


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


def read_results(predictions: Path, scores: SplitScores) -> RowResults | None:
    """Read the results in a predictions file.

    Args:
        predictions: The file.
        scores: What `summarize_results` returned for them.

    Returns:
        The results; None if there is no such file, or there are no scores.
    """
    rows = files.read_jsonl(predictions)
    if not rows or scores.is_empty:
        return None
    return from_records(rows, len(scores.confusion), scores.whole)
