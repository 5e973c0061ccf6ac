"""Evaluate the base and the finalists on held-out rows that no decision has used.

Sweeps and comparisons use it. Results are files next to the model (metrics and one line
for each row), so an evaluation that was written is not repeated by a resumed run.
"""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorafleet.cluster.execution.supervisor import STACKS_PREFIX
from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.evaluation.metrics.summary import summarize_results
from lorafleet.evaluation.tokens import TokenData, open_tokens
from lorafleet.jobs import files
from lorafleet.jobs.errors import LorafleetError, make_disk_full_error
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials import sampling as search
from lorafleet.training.evaluation import evaluate_rows
from lorafleet.training.meter import free_unused_memory
from lorafleet.training.methods import detach, load_weights
from lorafleet.training.model import Base, check_class_order, reset_heads, resolve_device
from lorafleet.training.watchdog import Watchdog
from lorafleet.tuning.base_cache import BaseCache
from lorafleet.tuning.failures import WorkerUnusable, classify_exception, is_device_error
from lorafleet.tuning.trial_report import EvaluationReport
from lorafleet.tuning.trial_run import Work

MAX_TRIES = 2
"""Number of processes that may die while they evaluate a model."""


class _StopRequested(Exception):
    """Raised when the run is asked to stop."""


@dataclass(frozen=True)
class HeldOutEvaluation:
    """One model to be evaluated.

    It is pickled and sent to the process that evaluates it.
    """

    name: str
    """Name of the model in messages."""
    job: JobSpec
    """Job with the model's base, method and metrics."""
    tokens: str
    """Folder of the tokenised rows."""
    weights: str | None
    """Folder of the trained weights. None: the base model."""
    splits: tuple[str, ...]
    """Splits that it is evaluated on."""
    folder: str
    """Folder for the results."""
    record: str
    """Name of the file in `folder` with the metrics of each split."""
    predictions: str
    """Name of the file in `folder` with the result of each row. SPLIT stands for the split."""

    def get_predictions_path(self, split: str) -> Path:
        """Return the predictions file of one split."""
        return Path(self.folder) / self.predictions.replace("SPLIT", split)

    def get_stacks_path(self, attempt: int) -> Path:
        """Return the file for the stacks of a process that hangs while it evaluates the model.

        Args:
            attempt: Number of the try, from 1.
        """
        name = self.name.replace("/", "-")
        return Path(self.folder) / f"{STACKS_PREFIX}{name}-{attempt}.txt"

    def get_traceback_path(self) -> Path:
        """Return the file for the traceback of an error."""
        return Path(self.folder) / f"exam-traceback-{self.name.replace('/', '-')}.txt"

    def count_lost_processes(self) -> int:
        """Return how many processes died or hung while they evaluated the model."""
        # A process that leaves the evaluation in any other way deletes its file, which is empty.
        return sum(path.exists() for path in self._list_stacks_paths())

    def forget_lost_processes(self) -> None:
        """Delete what `count_lost_processes` counts."""
        for path in self._list_stacks_paths():
            path.unlink(missing_ok=True)

    def _list_stacks_paths(self) -> list[Path]:
        return [self.get_stacks_path(attempt) for attempt in range(1, MAX_TRIES + 1)]


BASE = "base"
"""Name of the untuned base model among the models of a run."""


def build_evaluation(work: Work, data: TokenData, name: str) -> HeldOutEvaluation:
    """Return the evaluation of one model of a search.

    The base is also evaluated on the validation rows, for comparison with the trials.

    Args:
        work: What the trials of the search share.
        data: The tokenised rows.
        name: `BASE`, or the id of a trial, whose best weights are evaluated.
    """
    run, split = work.attempt_run, get_held_out_split(data)
    if name == BASE:
        splits = tuple(dict.fromkeys(("validation", split)))
        path = run.get_base_predictions_file("SPLIT")
        return HeldOutEvaluation(
            BASE, work.job, work.tokens, None, splits, str(path.parent), "base.json", path.name
        )
    trial = run.get_trial(name)
    job = search.build_trial_job(work.job, trial.read_params().assignment)
    names = ("test.json", trial.get_predictions_file("SPLIT").name)
    return HeldOutEvaluation(
        name, job, work.tokens, str(trial.weights), (split,), str(trial.path), *names
    )


def get_held_out_split(data: TokenData) -> str:
    """Return the split that no decision has used; without test rows, the validation rows."""
    return "validation" if data.chosen_on_test else "test"


class Evaluator:
    """Evaluates one model after another in this process.

    The base stays loaded; adapters are attached and detached.

    Args:
        bases: The base of this process.
    """

    def __init__(self, work: Work, bases: BaseCache) -> None:
        self.work, self.bases = work, bases
        self.data: TokenData | None = None
        self.watchdog: Watchdog | None = None

    def try_evaluate(self, evaluation: HeldOutEvaluation, attempt: int) -> EvaluationReport:
        """Evaluate a model as `evaluate` does, and return an error as a report.

        After an error, the next model gets a base that nothing has happened to.

        Raises:
            WorkerUnusable: This process must not evaluate another model.
        """
        try:
            self.evaluate(evaluation, attempt)
        # The boundary of a model: any error costs its numbers, and the others are evaluated.
        except Exception as error:
            disk_full_error = make_disk_full_error(error, Path(self.work.run))
            if disk_full_error:
                return EvaluationReport(disk_full=str(disk_full_error))
            if is_device_error(error):
                raise WorkerUnusable(classify_exception(error)) from error
            failure = self._describe_error(evaluation, error)
            error.__traceback__ = None  # its frames hold the tensors that did not fit
            self.bases.drop()
            free_unused_memory(resolve_device(self.work.gpus))
            return EvaluationReport(failure=failure)
        return EvaluationReport()

    def _describe_error(self, evaluation: HeldOutEvaluation, error: Exception) -> str:
        """Return an error as text. If it may be a fault of lorafleet, save its traceback."""
        first_line = next(iter(str(error).strip().splitlines()), "")
        text = f"{type(error).__name__}: {first_line}".removesuffix(": ")
        if isinstance(error, LorafleetError):
            return text
        path = evaluation.get_traceback_path()
        files.write_text(path, "".join(traceback.format_exception(error)))
        return f"{text} (see {os.path.relpath(path, self.work.run)})"

    def evaluate(self, evaluation: HeldOutEvaluation, attempt: int) -> bool:
        """Evaluate a model and write the results.

        Args:
            attempt: Number of this try, from 1. It names the file for stacks of a hang.

        Returns:
            False if the run is asked to stop before the evaluation ends; nothing is written
            then.
        """
        started_at = time.monotonic()
        folder = Path(evaluation.folder)
        folder.mkdir(parents=True, exist_ok=True)
        stacks = evaluation.get_stacks_path(attempt)
        stacks.touch()  # also without a watchdog: `count_lost_processes` counts it
        self.watchdog = Watchdog(stacks, 60 * self.work.job.retries.hang_minutes)
        self.watchdog.reset(setting_up=True)
        try:
            if self.data is None or str(self.data.folder) != evaluation.tokens:
                self.data = open_tokens(Path(evaluation.tokens))
            results_by_split = self._evaluate_splits(evaluation, self.data)
        except _StopRequested:
            return False
        finally:
            self.watchdog.close()
            if stacks.exists() and not stacks.stat().st_size:
                stacks.unlink()
        record: dict[str, Any] = {
            "seconds": time.monotonic() - started_at,
            "base_loads": self.bases.loads,
        }
        for split, results in results_by_split.items():
            files.write_jsonl(evaluation.get_predictions_path(split), results.to_records())
            scores = summarize_results(results, evaluation.job, self.data.labels)
            record[split] = scores.to_dict()
        # Last, because its existence means that the evaluation is complete.
        files.write_json(folder / evaluation.record, record)
        return True

    def _evaluate_splits(
        self, evaluation: HeldOutEvaluation, data: TokenData
    ) -> dict[str, RowResults]:
        """Return the results of a model on all its splits."""
        base = self.bases.get(evaluation.job, len(data.labels), untuned=evaluation.weights is None)
        if evaluation.weights is None:
            if base.own_head:
                check_class_order(
                    base.model.config.id2label, data.labels, evaluation.job.model.model_name_or_path
                )
            else:
                reset_heads(base, evaluation.job.train.seed)
            return {
                split: self._evaluate_split(base.model, evaluation.job, data, split, base)
                for split in evaluation.splits
            }
        # Only full weights have a config.json with class names; for an adapter, the result is
        # empty.
        config = files.read_json(Path(evaluation.weights) / "config.json")
        check_class_order(config.get("id2label", {}), data.labels, evaluation.weights)
        model = load_weights(evaluation.job, base, Path(evaluation.weights))
        try:
            return {
                split: self._evaluate_split(model, evaluation.job, data, split, base)
                for split in evaluation.splits
            }
        finally:
            detach(base, model)

    def _evaluate_split(
        self, model: nn.Module, job: JobSpec, data: TokenData, split: str, base: Base
    ) -> RowResults:
        """Return the results of a model on one split.

        Held-out rows get all metrics of the job, other rows only those that the search decided
        by.
        """
        held_out = split == "test" or data.chosen_on_test
        decision_names = [
            metric.name for metric in job.decision_metrics if metric.name in job.extra_metrics
        ]
        metrics = job.extra_metrics if held_out else tuple(decision_names)
        # Without metrics of answers, a few are generated for readers of the report.
        rows_to_answer = job.evaluate.sample_rows if held_out and not metrics else None
        return evaluate_rows(
            model,
            job,
            data,
            split,
            base.device,
            metrics=metrics,
            rows_to_answer=rows_to_answer,
            on_pass=self._handle_pass,
        )

    def _handle_pass(self, _phase: str) -> None:
        """Reset the watchdog, and raise _StopRequested if the run is asked to stop."""
        assert self.watchdog is not None
        self.watchdog.reset()
        if self.work.is_stop_requested():
            raise _StopRequested
