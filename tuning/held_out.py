"""After the choice: the base and the finalists on rows that no decision has looked at."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.evaluation.metrics.summary import summary
from lorafleet.evaluation.tokens import TokenData, open_tokens
from lorafleet.jobs import files
from lorafleet.jobs.errors import disk_full
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.evaluation import evaluate_rows
from lorafleet.training.methods import detach, load_weights
from lorafleet.training.model import Base, check_class_order, fresh_heads, load_base, resolve_device
from lorafleet.training.watchdog import Watchdog
from lorafleet.tuning.node_check import first_line
from lorafleet.tuning.trial_run import Work
from torch import nn

_PLACED_SECONDS = 900.0
"""How long an examiner may wait for a place."""
_TRIES = 2


class _Stopped(Exception):
    """The run is to stop."""


@dataclass(frozen=True)
class Exam:
    """One model to be judged."""

    name: str
    """What it is called where something is said of it."""
    job: JobSpec
    """As what: its base, its method, its metrics."""
    tokens: str
    """The folder of the tokenised rows."""
    weights: str | None
    """The folder of what was trained; None: the base as it is."""
    splits: tuple[str, ...]
    """The rows that it is judged on."""
    folder: str
    """Where what is found goes."""
    record: str
    """The file in it with the metrics of each split."""
    predictions: str
    """The file in it with what it did with each row; SPLIT stands for the split."""

    def predictions_of(self, split: str) -> Path:
        """The file of one split."""
        return Path(self.folder) / self.predictions.replace("SPLIT", split)


def trial_exam(trial: Trial, job: JobSpec, tokens: str, splits: tuple[str, ...]) -> Exam:
    """The exam of a trial's best weights."""
    names = ("test.json", trial.predictions("SPLIT").name)
    return Exam(trial.id, job, tokens, str(trial.weights), splits, str(trial.path), *names)


def base_exam(run: Run, job: JobSpec, tokens: str, splits: tuple[str, ...]) -> Exam:
    """The exam of a run's untuned base."""
    path = run.base_predictions("SPLIT")
    return Exam("base", job, tokens, None, splits, str(path.parent), "base.json", path.name)


class Examiner:
    """An actor with a base, which judges one model after another: the base stays loaded, adapters come and go."""

    def __init__(self, work: Work) -> None:
        os.chdir(work.run)
        torch.set_num_threads(max(1, work.job.resources.cpus_per_worker))
        self.work = work
        self.data: TokenData | None = None
        self.base: Base | None = None
        self.loads = 0  # how often a base was loaded
        self.watchdog: Watchdog | None = None

    def here(self) -> bool:
        """That it is up."""
        return True

    def examine(self, exam: Exam, attempt: int) -> bool:
        """Judge a model and write what was found. Returns False when the run is to stop first."""
        began = time.monotonic()
        folder = Path(exam.folder)
        folder.mkdir(parents=True, exist_ok=True)
        stacks = folder / f"exam-stacks-{exam.name.replace('/', '-')}-{attempt}.txt"
        self.watchdog = Watchdog(stacks, 60 * self.work.job.retries.hang_minutes)
        self.watchdog.beat(setting_up=True)
        if self.data is None or str(self.data.folder) != exam.tokens:
            self.data = open_tokens(Path(exam.tokens))
        try:
            found = self._results(exam, self.data)
        except _Stopped:
            return False
        finally:
            self.watchdog.close()
        record: dict[str, Any] = {"seconds": time.monotonic() - began, "base_loads": self.loads}
        for split, results in found.items():
            files.write_jsonl(exam.predictions_of(split), results.records())
            record[split] = summary(results, exam.job, self.data.labels)
        files.write_json(folder / exam.record, record)
        return True

    def _results(self, exam: Exam, data: TokenData) -> dict[str, RowResults]:
        labels = len(data.labels)
        own = self.base is not None and self.base.own_head and exam.weights is None  # an adapter may have left its own
        if self.base is None or own or not self.base.serves(exam.job, labels):
            self.base = None
            self.base = load_base(exam.job, labels, resolve_device(self.work.gpus))
            self.loads += 1
        base = self.base
        if exam.weights is None:
            if base.own_head:
                check_class_order(base.model.config.id2label, data.labels, exam.job.model.model_name_or_path)
            else:
                fresh_heads(base, exam.job.train.seed)
            return {split: self._of_split(base.model, exam.job, data, split, base) for split in exam.splits}
        config = files.read_json(Path(exam.weights) / "config.json")  # of a whole model; an adapter has none
        check_class_order(config.get("id2label", {}), data.labels, exam.weights)
        model = load_weights(exam.job, base, Path(exam.weights))
        try:
            return {split: self._of_split(model, exam.job, data, split, base) for split in exam.splits}
        finally:
            detach(base, model)

    def _of_split(self, model: nn.Module, job: JobSpec, data: TokenData, split: str, base: Base) -> RowResults:
        """All that the job asks on the held-out rows, and what it searched by on the others."""
        held_out = split == "test" or data.chosen_on_test
        deciding = [one.name for one in job.decision_metrics if one.name in job.extra_metrics]
        metrics = job.extra_metrics if held_out else tuple(deciding)
        answered = job.evaluate.sample_rows if held_out and not metrics else None
        return evaluate_rows(
            model, job, data, split, base.device, metrics=metrics, answered=answered, on_pass=self._on_pass
        )

    def _on_pass(self, _phase: str) -> None:
        assert self.watchdog is not None
        self.watchdog.beat()
        if self.work.stop_requested():
            raise _Stopped


def examine_all(work: Work, exams: list[Exam], slots: int) -> dict[str, str]:
    """Judge models, as many at once as there are slots.

    Returns why for each that could not be: one that fails costs its own numbers, not the report. An examiner whose
    process dies is replaced, and what it was at is tried once more. Raises DiskFull.
    """
    failed: dict[str, str] = {}
    waiting, tries = list(exams), Counter[str]()
    free = [_examiner(work) for _ in range(min(slots, len(exams)))]
    running: dict[Any, tuple[Exam, Any]] = {}
    while waiting or running:
        while waiting and free:
            examiner, exam = free.pop(), waiting.pop(0)
            try:
                ray.get(examiner.here.remote(), timeout=_PLACED_SECONDS)
            except ray.exceptions.RayError as error:
                failed[exam.name] = f"no process for it could be started: {first_line(error)}"
                continue
            tries[exam.name] += 1
            running[examiner.examine.remote(exam, tries[exam.name])] = (exam, examiner)
        if not running:
            return failed | dict.fromkeys((exam.name for exam in waiting), "no process for it could be started")
        (done, *_), _ = ray.wait(list(running))  # each ends: what hangs is ended by its watchdog
        exam, examiner = running.pop(done)
        try:
            ray.get(done)
        except ray.exceptions.RayError as error:
            full = disk_full(error, Path(work.run))
            if full:
                raise full from error
            ray.kill(examiner)
            examiner = _examiner(work)
            if isinstance(error, ray.exceptions.RayActorError) and tries[exam.name] < _TRIES:
                waiting.append(exam)
            else:
                failed[exam.name] = first_line(error)
        free.append(examiner)
    return failed


def _examiner(work: Work) -> Any:
    wants = work.job.resources
    actor = ray.remote(Examiner).options(
        num_cpus=wants.cpus_per_worker, num_gpus=work.gpus, label_selector=wants.label_selector
    )
    return actor.remote(work)
