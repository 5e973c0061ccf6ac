"""Evaluate the base and the finalists on held-out rows that no decision has used.

Sweeps and comparisons use it. Results are files next to the model (metrics and one line
for each row), so an evaluation that was written is not repeated by a resumed run.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import nn

from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.evaluation.metrics.summary import summarize_results
from lorafleet.evaluation.tokens import TokenData, open_tokens
from lorafleet.jobs import files
from lorafleet.jobs.errors import make_disk_full_error
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.evaluation import evaluate_rows
from lorafleet.training.methods import detach, load_weights
from lorafleet.training.model import Base, check_class_order, load_base, reset_heads, resolve_device
from lorafleet.training.watchdog import Watchdog
from lorafleet.tuning.node_check import extract_error_line
from lorafleet.tuning.trial_run import Work

_PLACEMENT_SECONDS = 900.0
"""Seconds that a worker may wait to be placed on a node."""
_MAX_TRIES = 2


class _StopRequested(Exception):
    """Raised when the run is asked to stop."""


@dataclass(frozen=True)
class HeldOutEvaluation:
    """One model to be evaluated.

    It is pickled and sent to an `EvalWorker`.
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


def build_trial_evaluation(
    trial: Trial, job: JobSpec, tokens: str, splits: tuple[str, ...]
) -> HeldOutEvaluation:
    """Return the evaluation of a trial's best weights.

    Args:
        job: The resolved job of the trial.
        tokens: Folder of the tokenised rows.
        splits: Names of the splits.
    """
    names = ("test.json", trial.get_predictions_file("SPLIT").name)
    return HeldOutEvaluation(
        trial.id, job, tokens, str(trial.weights), splits, str(trial.path), *names
    )


def build_base_evaluation(
    run: Run, job: JobSpec, tokens: str, splits: tuple[str, ...]
) -> HeldOutEvaluation:
    """Return the evaluation of a run's untuned base."""
    path = run.get_base_predictions_file("SPLIT")
    return HeldOutEvaluation(
        "base", job, tokens, None, splits, str(path.parent), "base.json", path.name
    )


class EvalWorker:
    """Ray actor that evaluates one model after another.

    Its base stays loaded; adapters are attached and detached. `evaluate_all` starts as many
    as there are slots, and replaces one whose process died.
    """

    def __init__(self, work: Work) -> None:
        os.chdir(work.run)
        torch.set_num_threads(max(1, work.job.resources.cpus_per_worker))
        self.work = work
        self.data: TokenData | None = None
        self.base: Base | None = None
        self.loads = 0  # number of times that a base was loaded
        self.watchdog: Watchdog | None = None

    def is_ready(self) -> bool:
        """Return True once the actor is running.

        A call of it returns when Ray has placed the actor on a node.
        """
        return True

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
        stacks = folder / f"exam-stacks-{evaluation.name.replace('/', '-')}-{attempt}.txt"
        self.watchdog = Watchdog(stacks, 60 * self.work.job.retries.hang_minutes)
        self.watchdog.reset(setting_up=True)
        if self.data is None or str(self.data.folder) != evaluation.tokens:
            self.data = open_tokens(Path(evaluation.tokens))
        try:
            results_by_split = self._evaluate_splits(evaluation, self.data)
        except _StopRequested:
            return False
        finally:
            self.watchdog.close()
        record: dict[str, Any] = {
            "seconds": time.monotonic() - started_at,
            "base_loads": self.loads,
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
        """Return the results of a model on all its splits.

        The base is loaded if the loaded one does not fit.
        """
        labels = len(data.labels)
        # An adapter may have replaced the head that came with the base.
        head_may_differ = (
            self.base is not None and self.base.own_head and evaluation.weights is None
        )
        if self.base is None or head_may_differ or not self.base.can_serve(evaluation.job, labels):
            # Dropped first: two bases may not fit into memory at the same time.
            self.base = None
            self.base = load_base(evaluation.job, labels, resolve_device(self.work.gpus))
            self.loads += 1
        base = self.base
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


def evaluate_all(work: Work, evaluations: list[HeldOutEvaluation], slots: int) -> dict[str, str]:
    """Evaluate models, up to `slots` of them at once.

    A failure costs only that model's numbers. A worker whose process dies is replaced, and
    its evaluation is tried once more. An exception in a living worker is not retried: it
    would occur again.

    Args:
        evaluations: Models that have no results yet.
        slots: Maximum number of workers.

    Returns:
        Model name -> reason, for each model that could not be evaluated.

    Raises:
        DiskFull: A worker could not write its results.
    """
    failed: dict[str, str] = {}
    waiting, tries = list(evaluations), Counter[str]()
    free = [_start_worker(work) for _ in range(min(slots, len(evaluations)))]
    running: dict[Any, tuple[HeldOutEvaluation, Any]] = {}
    while waiting or running:
        while waiting and free:
            worker, evaluation = free.pop(), waiting.pop(0)
            try:
                # Placement may fail for good, for example after nodes were lost; `evaluate` itself
                # has no time limit.
                ray.get(worker.is_ready.remote(), timeout=_PLACEMENT_SECONDS)
            except ray.exceptions.RayError as error:
                failed[evaluation.name] = (
                    f"no worker process could be started: {extract_error_line(error)}"
                )
                continue
            tries[evaluation.name] += 1
            running[worker.evaluate.remote(evaluation, tries[evaluation.name])] = (
                evaluation,
                worker,
            )
        if not running:
            return failed | dict.fromkeys(
                (evaluation.name for evaluation in waiting), "no worker process could be started"
            )
        (done, *_), _ = ray.wait(
            list(running)
        )  # every call returns: a hanging worker is ended by its watchdog
        evaluation, worker = running.pop(done)
        try:
            ray.get(done)
        except ray.exceptions.RayError as error:
            full = make_disk_full_error(error, Path(work.run))
            if full:
                raise full from error
            # Whatever failed, the next model gets a process that nothing has happened to.
            ray.kill(worker)
            worker = _start_worker(work)
            if (
                isinstance(error, ray.exceptions.RayActorError)
                and tries[evaluation.name] < _MAX_TRIES
            ):
                waiting.append(evaluation)
            else:
                failed[evaluation.name] = extract_error_line(error)
        free.append(worker)
    return failed


def _start_worker(work: Work) -> Any:
    """Start an evaluation worker with the resources of a trial's process."""
    resources = work.job.resources
    actor = ray.remote(EvalWorker).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=work.gpus,
        label_selector=resources.label_selector,
    )
    return actor.remote(work)
