"""The warm host: an actor that imports and loads the base once, and then takes one trial after another.

A trial that cannot go on is reported as a result and not raised: the actor, with its loaded base, lives on.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune

from jobs import files, search
from jobs.errors import TrainingFailure, UserError
from jobs.metrics import is_better
from jobs.run import Run, Trial
from jobs.schedule import Schedule, schedule
from jobs.spec import JobSpec
from training.checkpoint import settled
from training.data import TokenData, open_tokens
from training.model import Base, base_key, load_base, resolve_device
from training.session import TrainingSession

_BEAT_SECONDS = 1.5
"""Between two looks at the stop flag, and two heartbeats."""
_REPORT_SECONDS = 15.0
"""Longest time without a result: Tune hears of a trial, and can stop it, at least this often."""


@dataclass(frozen=True)
class Work:
    """What every trial of a sweep shares; sent to each actor once."""

    job: JobSpec
    run: str
    """The run's folder."""
    tokens: str
    """The folder of the tokenised rows."""
    gpus: int
    """GPUs of one actor."""
    searching: bool
    """Whether the search's schedule holds, or the training's own."""

    def stop_requested(self) -> bool:
        """Whether the run is asked to end (Ctrl-C, `lorafleet stop`, preemption)."""
        return (Path(self.run) / "stop").exists()


def pack(report: dict[str, Any]) -> dict[str, Any]:
    """A report as a Tune result: one text, since Tune flattens what it hands to schedulers and reads `done` itself."""
    return {"report": json.dumps(files.finite(report))}


class TrialRun:
    """A session with its trial's folder: what both hosts do around the loop."""

    def __init__(self, work: Work, config: dict[str, Any], data: TokenData) -> None:
        self.work, self.data = work, data
        self.trial: Trial = Run(Path(work.run)).trial(config["trial_id"])
        self.job = search.trial(work.job, config["assignment"])
        self.plan: Schedule = schedule(self.job, len(data.splits["train"]), searching=work.searching)
        self.best: float | None = None
        self.unrecorded: dict[str, Any] | None = None
        self.session: TrainingSession | None = None
        self.saved_at = time.monotonic()

    def open(self, base: Base) -> TrainingSession:
        """Build the session and go on from the trial's checkpoint, where there is one."""
        self.session = TrainingSession.build(self.job, base, self.data, self.plan)
        folder = settled(self.trial.checkpoint)
        if folder.is_dir():
            extra = self.session.load(folder)
            self.best = extra.get("best")
            # The last report before a kill may not have reached the driver: it is made again, the driver knows.
            self.unrecorded = extra.get("row")
        return self.session

    def advance(self, *, by_clock: bool) -> dict[str, Any]:
        """Train to the next evaluation (or for some seconds), save, and say what is to be reported."""
        session = self.session
        assert session is not None
        if self.unrecorded is not None:
            row, self.unrecorded = self.unrecorded, None
            return {"row": row, "done": session.done}
        target = self.plan.next_evaluation(session.step)
        row = self._train(session, target, by_clock=by_clock)
        if session.step >= target:
            row |= self._evaluated(session)
        if row.get("evaluated") or self._save_due():
            session.save(self.trial.checkpoint, {"best": self.best, "row": row})
            self.saved_at = time.monotonic()
        return {"row": row, "done": session.done}

    def _train(self, session: TrainingSession, target: int, *, by_clock: bool) -> dict[str, Any]:
        if not by_clock:
            return session.advance(target)
        began = time.monotonic()
        while True:
            row = session.advance(target, seconds=_BEAT_SECONDS)
            self._beat(row)
            if session.step >= target or time.monotonic() - began > _REPORT_SECONDS or self.work.stop_requested():
                return row

    def _beat(self, row: dict[str, Any]) -> None:
        known = ("step", "samples", "train_loss", "tokens_per_second", "train_seconds")
        beat = {key: row[key] for key in known}
        files.write_json(self.trial.path / "progress.json", beat | {"total": self.plan.total_steps, "time": time.time()})

    def _evaluated(self, session: TrainingSession) -> dict[str, Any]:
        scores = session.evaluate("validation")
        metric = self.job.metric
        score = scores.metrics[metric.name]
        if is_better(score, self.best, metric.goal):
            self.best = score
            session.save_adapter(self.trial.adapter)
        rungs = [index for index, step in enumerate(self.plan.rung_steps) if step == session.step]
        return {
            "evaluated": True,
            "rung": rungs[-1] if rungs else None,
            **scores.metrics,
            "intervals": scores.intervals,
            "eval_seconds": round(session.meter.eval_seconds, 3),
        }

    def _save_due(self) -> bool:
        return time.monotonic() - self.saved_at > 60 * self.job.train.checkpoint_minutes or self.work.stop_requested()

    def close(self) -> None:
        """Give the base back."""
        if self.session is not None:
            self.session.close()
            self.session = None


class WarmTrial(tune.Trainable):
    """One actor: set up once, then a trial after another through `reset_config`."""

    def setup(self, config: dict[str, Any], work: Work) -> None:  # type: ignore[override]
        """Import, load the base, begin the first trial."""
        began = time.monotonic()
        self.work = work
        os.chdir(work.run)
        torch.set_num_threads(max(1, work.job.resources.cpus_per_worker))
        self.base: Base | None = None
        self.base_loads = 0
        self.current: TrialRun | None = None
        self.refused: dict[str, Any] | None = None
        self.data = open_tokens(Path(work.tokens))
        self._begin(config)
        self.setup_seconds = time.monotonic() - began

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Swap the trial; the base stays."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._end()
        self.trial_folder = Run(Path(self.work.run)).trial(config["trial_id"])
        self.refused = None
        try:
            self.current = TrialRun(self.work, config, self.data)
            self.current.open(self._base(self.current.job))
        except Exception as error:  # the edge of a trial: what goes wrong in it is its result, and the sweep goes on
            self.refused = self._failure(error)

    def _base(self, job: JobSpec) -> Base:
        labels = len(self.data.labels)
        if self.base is None or self.base.key != base_key(job, labels):
            self.base = None  # two bases would not fit where one does
            self.base = load_base(job, labels, resolve_device(self.work.gpus))
            self.base_loads += 1
        return self.base

    def step(self) -> dict[str, Any]:  # type: ignore[override]
        """One report, packed as Tune wants it (see `pack`)."""
        loads = {"name": f"{os.uname().nodename}:{os.getpid()}", "base_loads": self.base_loads,
                 "seconds": getattr(self, "setup_seconds", 0.0)}
        return pack(self._step() | {"actor": loads})

    def _step(self) -> dict[str, Any]:
        """`row` for metrics.jsonl and whether the trial is `done`, or its `failure`."""
        if self.refused is not None:
            return {"failure": self.refused}
        assert self.current is not None
        try:
            return self.current.advance(by_clock=True)
        except torch.OutOfMemoryError as error:
            return self._with_half_the_batch(error)
        except Exception as error:  # see _begin
            return {"failure": self._failure(error)}

    def _with_half_the_batch(self, error: BaseException) -> dict[str, Any]:
        """Go on from the last checkpoint with half the rows a pass and twice the passes: the searched batch stays."""
        assert self.current is not None
        smaller = halved(self.current.job)
        if smaller is None:
            return {"failure": self._failure(error)}
        self.current.close()
        torch.cuda.empty_cache()
        self.current.job = smaller
        self.current.open(self._base(smaller))
        return {"row": None, "done": False}

    def _failure(self, error: BaseException) -> dict[str, Any]:
        folder = Path(self.work.run) / "trials" / self.trial_folder.id
        files.write_text(folder / "traceback.txt", "".join(traceback.format_exception(error)))
        return classify(error)

    def _end(self) -> None:
        if self.current is not None:
            self.current.close()
            self.current = None

    def cleanup(self) -> None:
        """The actor goes."""
        self._end()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any] | None:
        """Nothing: a trial's checkpoint is in its own folder, and the next actor finds it there."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: see `save_checkpoint`."""


def classify(error: BaseException) -> dict[str, Any]:
    """`{"failure_class", "sentence"}` of an exception: ours by type, the rest as a fault of the code."""
    if isinstance(error, TrainingFailure):
        return {"failure_class": error.failure_class, "sentence": error.sentence}
    first = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return {"failure_class": "oom", "sentence": f"out of memory: {first}"}
    if isinstance(error, UserError | ValueError) and "linked" not in first:
        kind = "config" if isinstance(error, UserError) else "code"
        return {"failure_class": kind, "sentence": first}
    return {"failure_class": "code", "sentence": f"{type(error).__name__}: {first} (see traceback.txt of the trial)"}


def halved(job: JobSpec) -> JobSpec | None:
    """The job with half the rows a pass and twice the passes a step, or None when a pass has one row."""
    train, world_size = job.train, job.resources.world_size
    rows = train.per_device_train_batch_size
    if rows % 2:
        return None
    update = {
        "per_device_train_batch_size": rows // 2,
        "gradient_accumulation_steps": 2 * train.accumulation_steps(world_size),
        "global_batch_size": None,
    }
    return job.model_copy(update={"train": train.model_copy(update=update)})
