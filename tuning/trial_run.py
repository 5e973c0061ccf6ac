"""A trial around its session, whoever hosts it: where it resumes, what it reports, what it keeps."""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from jobs import files, search
from jobs.errors import TrainingFailure, UserError
from jobs.metrics import is_better
from jobs.run import Run, Trial
from jobs.schedule import Schedule, schedule
from jobs.spec import JobSpec
from training.checkpoint import newest_good
from training.data import TokenData
from training.model import Base
from training.session import TrainingSession
from training.strategies import Ranks

_BEAT_SECONDS = 1.5
"""Between two looks at the stop flag, and two heartbeats."""
_BEAT_STEPS = 5
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
        self.warning: str | None = None
        self.session: TrainingSession | None = None
        self.saved_at = time.monotonic()
        self.stopping = False
        self.ranks = Ranks.here()
        self.device = torch.device("cpu")

    def open(self, base: Base) -> TrainingSession:
        """Build the session and go on from the trial's checkpoint, where there is one."""
        self.device = base.device
        self.session = TrainingSession.build(self.job, base, self.data, self.plan)
        folder, self.warning = self._checkpoint()
        if folder is not None:
            extra = self.session.load(folder)
            self.best = extra.get("best")
            # The last report before a kill may not have reached the driver: it is made again, the driver knows.
            self.unrecorded = extra.get("row")
        return self.session

    def _checkpoint(self) -> tuple[Path | None, str | None]:
        """The checkpoint to go on from, and what is to be said of one that is damaged; the same on all processes."""
        found: list[Any] = [None]
        if self.ranks.rank == 0:
            folder, wrong = newest_good(self.trial.checkpoint)
            where = "the one before it" if folder else "the beginning, since there is no other"
            found = [(folder, f"the newest checkpoint is damaged ({wrong}): going on from {where}" if wrong else None)]
        if self.ranks.world_size > 1:
            distributed.broadcast_object_list(found, src=0)
        chosen: tuple[Path | None, str | None] = found[0]
        return chosen

    def advance(self) -> dict[str, Any]:
        """Train to the next evaluation (or for some seconds), save, and say what is to be reported."""
        said, self.warning = self.warning, None
        return self._advance() | ({"warning": said} if said else {})

    def _advance(self) -> dict[str, Any]:
        session = self.session
        assert session is not None
        if self.unrecorded is not None:
            row, self.unrecorded = self.unrecorded, None
            return {"row": row, "done": session.done}
        if self._cut():
            return {"row": None, "done": True}
        target = self.plan.next_evaluation(session.step)
        row = self._train(session, target)
        if self._cut():  # before anything of it is written: the adapter on disk is the one that was judged
            return {"row": None, "done": True}
        if session.step >= target:
            row |= self._evaluated(session)
        if row.get("evaluated") or self.stopping or self._agreed(self._checkpoint_due()):
            session.save(self.trial.checkpoint, {"best": self.best, "row": row})
            self.saved_at = time.monotonic()
        where = {"host": f"{os.uname().nodename}:{os.getpid()}", "first_gradient_at": session.first_gradient_at}
        return {"row": row | where, "done": session.done, "stopping": self.stopping}

    def _train(self, session: TrainingSession, target: int) -> dict[str, Any]:
        """Until the target, the next report is due, or the run is to stop; with a heartbeat in between."""
        began = time.monotonic()
        session.begin_report()
        while True:
            if self.ranks.world_size == 1:
                row = session.advance(target, seconds=_BEAT_SECONDS)
            else:  # clocks differ between processes: only steps can be agreed on
                row = session.advance(min(target, session.step + _BEAT_STEPS))
            if self.ranks.rank == 0:
                self._beat(row)
            self.stopping = self._agreed(self.work.stop_requested())
            if session.step >= target or self.stopping or self._agreed(time.monotonic() - began > _REPORT_SECONDS):
                return row

    def _cut(self) -> bool:
        """Whether a group was cut while it trained on: its report and the decision crossed."""
        return self.ranks.world_size > 1 and self._agreed(self.trial.state.ended)

    def _agreed(self, own: bool) -> bool:
        """What the first process thinks: a process that stopped alone would leave the others waiting for ever."""
        if self.ranks.world_size == 1:
            return own
        word = torch.tensor([int(own)], device=self.device)
        distributed.broadcast(word, src=0)
        return bool(word.item())

    def _beat(self, row: dict[str, Any]) -> None:
        known = ("step", "samples", "train_loss", "tokens_per_second", "train_seconds")
        beat = {key: row[key] for key in known}
        files.write_json(
            self.trial.path / "progress.json", beat | {"total": self.plan.total_steps, "time": time.time()}
        )

    def _evaluated(self, session: TrainingSession) -> dict[str, Any]:
        scores = session.evaluate("validation")
        metric = self.job.metric
        score = scores.metrics[metric.name]
        if is_better(score, self.best, metric.goal):
            self.best = score
            session.save_weights(self.trial.weights_of(self.job.method))
        rungs = [index for index, step in enumerate(self.plan.rung_steps) if step == session.step]
        return {
            "evaluated": True,
            "rung": rungs[-1] if rungs else None,
            **scores.metrics,
            "intervals": scores.intervals,
            "eval_seconds": round(session.meter.eval_seconds, 3),
        }

    def _checkpoint_due(self) -> bool:
        return time.monotonic() - self.saved_at > 60 * self.job.train.checkpoint_minutes

    def close(self) -> None:
        """Give the base back."""
        if self.session is not None:
            self.session.close()
            self.session = None


def keep_traceback(work: Work, trial_id: str, error: BaseException) -> None:
    """Write a failed trial's traceback beside its record."""
    text = "".join(traceback.format_exception(error))
    files.write_text(Path(work.run) / "trials" / trial_id / "traceback.txt", text)


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
