"""After the choice: the base and the finalists on rows that no decision has looked at."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
import torch
from torch import nn

from evaluation.results import RowResults
from evaluation.summary import summary
from jobs import files, search
from jobs.errors import disk_full
from jobs.spec import JobSpec
from training.data import open_tokens
from training.evaluation import evaluate_rows
from training.methods import detach, load_weights
from training.model import Base, fresh_heads, load_base, resolve_device
from training.watchdog import Watchdog
from tuning.nodes import first_line
from tuning.trial_run import Work

BASE = "base"
_PLACED_SECONDS = 900.0
"""How long an examiner may wait for a place."""
_TRIES = 2


class _Stopped(Exception):
    """The run is to stop."""


class Examiner:
    """An actor with a base, which evaluates one adapter after another."""

    def __init__(self, work: Work) -> None:
        os.chdir(work.run)
        torch.set_num_threads(max(1, work.job.resources.cpus_per_worker))
        self.work, self.run = work, work.written
        self.data = open_tokens(Path(work.tokens))
        self.base: Base | None = None
        self.watchdog: Watchdog | None = None

    def here(self) -> bool:
        """That it is up."""
        return True

    def examine(self, name: str, splits: list[str], attempt: int) -> str | None:
        """Evaluate a trial's adapter (or, for `base`, the untuned base) on splits; write what was found.

        Returns None when the run is to stop first.
        """
        began = time.monotonic()
        stacks = self._folder(name) / f"exam-stacks-{name}-{attempt}.txt"
        self.watchdog = Watchdog(stacks, 60 * self.work.job.retries.hang_minutes)
        self.watchdog.beat(setting_up=True)
        try:
            found = self._base_results(splits) if name == BASE else self._trial_results(name, splits)
        except _Stopped:
            return None
        finally:
            self.watchdog.close()
        job = self.work.job
        record: dict[str, Any] = {}
        for split, results in found.items():
            files.write_jsonl(self._predictions(name, split), results.records())
            record[split] = summary(results, job, self.data.labels)
        target = self._folder(name) / ("base.json" if name == BASE else "test.json")
        files.write_json(target, record | {"seconds": time.monotonic() - began})
        return name

    def _predictions(self, name: str, split: str) -> Path:
        return self.run.base_predictions(split) if name == BASE else self.run.trial(name).predictions(split)

    def _folder(self, name: str) -> Path:
        return self.run.path / "report" if name == BASE else self.run.trial(name).path

    def _loaded(self, job: JobSpec) -> Base:
        labels = len(self.data.labels)
        if self.base is None or not self.base.serves(job, labels):
            self.base = None
            self.base = load_base(job, labels, resolve_device(self.work.gpus))
        return self.base

    def _base_results(self, splits: list[str]) -> dict[str, RowResults]:
        base = self._loaded(self.work.job)
        fresh_heads(base, self.work.job.train.seed)
        return {split: self._results(base.model, self.work.job, split, base) for split in splits}

    def _trial_results(self, name: str, splits: list[str]) -> dict[str, RowResults]:
        trial = self.run.trial(name)
        job = search.trial(self.work.job, trial.params()["assignment"])
        base = self._loaded(job)
        model = load_weights(job, base, trial.weights)
        try:
            return {split: self._results(model, job, split, base) for split in splits}
        finally:
            detach(base, model)

    def _results(self, model: nn.Module, job: JobSpec, split: str, base: Base) -> RowResults:
        """All that the job asks on the held-out rows, and what it searched by on the others."""
        held_out = split == "test" or self.data.chosen_on_test
        metrics = job.extra_metrics if held_out else tuple({job.metric.name} & set(job.extra_metrics))
        answered = job.evaluate.sample_rows if held_out and not metrics else None
        return evaluate_rows(
            model, job, self.data, split, base.device, metrics=metrics, answered=answered, on_pass=self._on_pass
        )

    def _on_pass(self, _phase: str) -> None:
        assert self.watchdog is not None
        self.watchdog.beat()
        if self.work.stop_requested():
            raise _Stopped


def examine_all(work: Work, names: list[str], slots: int, *, splits: dict[str, list[str]]) -> dict[str, str]:
    """Evaluate the named adapters, as many at once as there are slots.

    Returns why for each that could not be: one that fails costs its own numbers, not the report. An examiner whose
    process dies is replaced, and what it was at is tried once more. Raises DiskFull.
    """
    failed: dict[str, str] = {}
    waiting, tries = list(names), Counter[str]()
    free = [_examiner(work) for _ in range(min(slots, len(names)))]
    running: dict[Any, tuple[str, Any]] = {}
    while waiting or running:
        while waiting and free:
            examiner, name = free.pop(), waiting.pop(0)
            try:
                ray.get(examiner.here.remote(), timeout=_PLACED_SECONDS)
            except ray.exceptions.RayError as error:
                failed[name] = f"no process for it could be started: {first_line(error)}"
                continue
            tries[name] += 1
            running[examiner.examine.remote(name, splits[name], tries[name])] = (name, examiner)
        if not running:
            return failed | dict.fromkeys(waiting, "no process for it could be started")
        (done, *_), _ = ray.wait(list(running))  # each ends: what hangs is ended by its watchdog
        name, examiner = running.pop(done)
        try:
            ray.get(done)
        except ray.exceptions.RayError as error:
            full = disk_full(error, Path(work.run))
            if full:
                raise full from error
            ray.kill(examiner)
            examiner = _examiner(work)
            if isinstance(error, ray.exceptions.RayActorError) and tries[name] < _TRIES:
                waiting.append(name)
            else:
                failed[name] = first_line(error)
        free.append(examiner)
    return failed


def _examiner(work: Work) -> Any:
    wants = work.job.resources
    actor = ray.remote(Examiner).options(
        num_cpus=wants.cpus_per_worker, num_gpus=work.gpus, label_selector=wants.label_selector
    )
    return actor.remote(work)
