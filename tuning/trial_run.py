"""A trial around its session, whoever hosts it: where it resumes, what it reports, what it keeps."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lorafleet.evaluation.metrics.predictions import serialize
from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs import files
from lorafleet.jobs.errors import TrainingFailure
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.metrics import is_better
from lorafleet.jobs.text import counted
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.schedule import Schedule, schedule
from lorafleet.training.checkpoint import newest_good
from lorafleet.training.model import Base
from lorafleet.training.session import TrainingSession
from lorafleet.training.strategies import Ranks
from lorafleet.training.watchdog import Watchdog
from torch import distributed

_BEAT_SECONDS = 1.5
"""Between two looks at the stop flag, and two heartbeats."""
_MOST_STEPS = 100
"""Of a group between two of them."""
_NOTICE_SECONDS = 5.0
"""Between two questions whether this node will be taken away."""
_NODE_LEAVES = {"failure_class": "preempted", "sentence": "its node is being taken away; it was saved first"}
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
    attempt: int | None = None
    """The driver's attempt at the run, which every write carries."""

    @property
    def written(self) -> Run:
        """The run as this attempt writes it."""
        return Run(Path(self.run), self.attempt)

    def stop_requested(self) -> bool:
        """Whether the run is asked to end (Ctrl-C, `lorafleet stop`, preemption)."""
        return (Path(self.run) / "stop").exists()


def pack(report: dict[str, Any]) -> dict[str, Any]:
    """A report as a Tune result: one text, since Tune flattens what it hands to schedulers and reads `done` itself."""
    return {"report": json.dumps(files.finite(report))}


class _Stopped(Exception):
    """An evaluation was left because the run is to stop, or the node is taken away."""


class OneRowTooMany(TrainingFailure):
    """Out of memory with the smallest pass there is."""

    final = True


class TrialRun:
    """A session with its trial's folder: what both hosts do around the loop."""

    def __init__(self, work: Work, config: dict[str, Any], data: TokenData) -> None:
        self.work = work
        self.trial: Trial = work.written.trial(config["trial_id"])
        self.ranks = Ranks.here()
        self.job = self._small_enough(search.trial(work.job, config["assignment"]))
        rows = data.training_rows(self.job)
        self.data = data.of_job(self.job)
        self.plan: Schedule = schedule(self.job, rows, searching=work.searching)
        self.best: float | None = None
        self.no_better = 0  # evaluations in a row since the best
        self.unrecorded: dict[str, Any] | None = None
        self.warning: str | None = None
        self.session: TrainingSession | None = None
        self.saved_at = time.monotonic()
        self.stopping = False
        self.due = False
        self.leaving = False
        self.leaving_soon: Callable[[], bool] = lambda: False
        self.looked_at = time.monotonic()
        self.nodes = 1
        self.steps_a_beat = 1
        self.device = torch.device("cpu")
        self.watchdog = Watchdog(self.trial.hang_file(self.ranks.rank), 60 * self.job.retries.hang_minutes)
        self.watchdog.beat(setting_up=True)

    def _small_enough(self, job: JobSpec) -> JobSpec:
        """The job with fewer rows a pass, once for each time that the trial ran out of memory.

        Raises TrainingFailure when a pass has one row and that is too much.
        """
        # The first process's count: another machine's view of a shared folder may be older.
        for _ in range(self._from_first(self.trial.status().get("retries", {}).get("oom", 0))):
            smaller = with_smaller_passes(job)
            if smaller is None:
                rows = job.train.per_device_train_batch_size
                sentence = f"out of memory with {counted(rows, 'row')} a pass, which cannot be halved"
                raise OneRowTooMany("oom", sentence)
            job = smaller
        return job

    def warn_of_layout(self) -> None:
        """Say when Ray laid a group over other machines than `num_nodes`: with several processes on each it only
        tries to."""
        wanted = self.job.resources.num_nodes
        if self.nodes != wanted:
            lie = f"its {counted(self.ranks.world_size, 'process')} are on {counted(self.nodes, 'machine')}"
            self.warning = f"{lie}, and resources.num_nodes is {wanted}"

    def open(self, base: Base) -> TrainingSession:
        """Build the session and go on from the trial's checkpoint, where there is one."""
        self.device = base.device
        self.session = TrainingSession.build(self.job, base, self.data, self.plan)
        self.session.on_pass = self._on_pass
        folder, damaged = self._checkpoint()
        self.warning = "; ".join(filter(None, (self.warning, damaged))) or None
        if folder is not None:
            extra = self.session.load(folder)
            self.best, self.no_better = extra.get("best"), extra.get("no_better", 0)
            # The last report before a kill may not have reached the driver: it is made again, the driver knows.
            self.unrecorded, self.due = extra.get("row"), bool(extra.get("due"))
        self.watchdog.rest()
        return self.session

    def _checkpoint(self) -> tuple[Path | None, str | None]:
        """The checkpoint to go on from, and what is to be said of one that is damaged; the same on all processes."""
        found = None
        if self.ranks.rank == 0:
            folder, wrong = newest_good(self.trial.checkpoint)
            where = "the one before it" if folder else "the beginning, since there is no other"
            found = (folder, f"the newest checkpoint is damaged ({wrong}): going on from {where}" if wrong else None)
        chosen: tuple[Path | None, str | None] = self._from_first(found)
        return chosen

    def _from_first(self, value: Any) -> Any:
        """What the first process has."""
        values = [value]
        if self.ranks.world_size > 1:
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def advance(self) -> dict[str, Any]:
        """Train to the next evaluation (or for some seconds), save, and say what is to be reported."""
        said, self.warning = self.warning, None
        try:
            report = self._advance()
            said = "; ".join(filter(None, (said, self._why_early(report)))) or None
            return report | ({"warning": said} if said else {})
        finally:
            self.watchdog.rest()

    def _advance(self) -> dict[str, Any]:
        session = self.session
        assert session is not None
        self.watchdog.beat()
        if self.unrecorded is not None and not self.due:
            row, self.unrecorded = self.unrecorded, None
            return {"row": row, "done": self._is_done(session)}
        if self._cut():
            return {"row": None, "done": True}
        if self.due:  # the checkpoint was written in front of an evaluation, which now comes first
            target, row = session.step, self.unrecorded or {}
            self.unrecorded, self.due = None, False
        else:
            target = self.plan.next_evaluation(session.step)
            row = self._train(session, target)
        if self._cut():  # before anything of it is written: the adapter on disk is the one that was judged
            return {"row": None, "done": True}
        if session.step >= target and not self.stopping and not self.leaving:
            with contextlib.suppress(_Stopped):
                row |= self._evaluated(session)
        if self.leaving or (self.stopping and session.step >= target and not row.get("evaluated")):
            due = session.step >= target
            self.trial.check_current()
            session.save(self.trial.checkpoint, self._own_state() | {"row": row if due else None, "due": due})
            taken = {"failure": _NODE_LEAVES} if self.leaving else {}
            return {"row": None, "done": False, "stopping": self.stopping} | taken
        if row.get("evaluated") or self.stopping or self._agreed(self._checkpoint_due())[0]:
            self.trial.check_current()
            session.save(self.trial.checkpoint, self._own_state() | {"row": row})
            self.saved_at = time.monotonic()
        where: dict[str, Any] = {"nodes": self.nodes} if self.nodes > 1 else {}
        where |= {"host": f"{os.uname().nodename}:{os.getpid()}", "first_gradient_at": session.first_gradient_at}
        return {"row": row | where, "done": self._is_done(session), "stopping": self.stopping}

    def _own_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the session's own state."""
        return {"best": self.best, "no_better": self.no_better}

    def _is_done(self, session: TrainingSession) -> bool:
        """Whether the last step was taken, or enough evaluations have passed without a better one."""
        patience = self.job.train.early_stopping_patience
        return session.done or (patience is not None and self.no_better >= patience)

    def _why_early(self, report: dict[str, Any]) -> str | None:
        """Say that a trial ends before its last step for want of a better evaluation."""
        if not report["done"] or report["row"] is None or self.session is None or self.session.done:
            return None
        evaluations = counted(self.no_better, "evaluation")
        return f"ended early, after step {self.session.step}: no better {self.job.metric.name} in {evaluations}"

    def _train(self, session: TrainingSession, target: int) -> dict[str, Any]:
        """Until the target, the next report is due, or the run is to stop; with a heartbeat in between."""
        began = time.monotonic()
        session.begin_report()
        while True:
            before = time.monotonic()
            if self.ranks.world_size == 1:
                row = session.advance(target, seconds=_BEAT_SECONDS)
            else:  # clocks differ between processes: only steps can be agreed on
                row = session.advance(min(target, session.step + self.steps_a_beat))
            if self.ranks.rank == 0:
                self._beat(row)
            now = time.monotonic()
            fitting = round(self.steps_a_beat * _BEAT_SECONDS / max(now - before, 1e-3))
            due, self.steps_a_beat = self._agreed(now - began > _REPORT_SECONDS, min(max(1, fitting), _MOST_STEPS))
            self._look_up()
            if session.step >= target or self.stopping or self.leaving or due:
                return row

    def _look_up(self) -> None:
        """Learn whether the run is to stop and, now and then, whether the node is taken away."""
        now = time.monotonic()
        stop, look = self._agreed(self.work.stop_requested(), now - self.looked_at > _NOTICE_SECONDS)
        self.stopping = bool(stop)
        if look:
            self.looked_at = now
            self.leaving = self.leaving_soon()

    def _on_pass(self, phase: str) -> None:
        """A sign of life; and an evaluation ends at once when the run is to stop or the node to go."""
        self.watchdog.beat()
        if phase == "evaluation":
            self._look_up()
            if self.stopping or self.leaving:
                raise _Stopped

    def _cut(self) -> bool:
        """Whether a group was cut while it trained on: its report and the decision crossed."""
        return self.ranks.world_size > 1 and bool(self._agreed(self.trial.state.ended)[0])

    def _agreed(self, *own: int) -> list[int]:
        """What the first process thinks: a process that stopped alone would leave the others waiting for ever."""
        if self.ranks.world_size == 1:
            return list(own)
        words = torch.tensor(own, dtype=torch.int32, device=self.device)
        distributed.broadcast(words, src=0)
        return words.tolist()

    def _beat(self, row: dict[str, Any]) -> None:
        known = ("step", "samples", "train_loss", "tokens_per_second", "train_seconds")
        beat = {key: row[key] for key in known}
        files.write_json(
            self.trial.path / "progress.json", beat | {"total": self.plan.total_steps, "time": time.time()}
        )

    def _evaluated(self, session: TrainingSession) -> dict[str, Any]:
        scores, results = session.evaluate_with_rows("validation")
        metric = self.job.metric
        score = scores.metrics[metric.name]
        if is_better(score, self.best, metric.goal):
            self.best, self.no_better = score, 0
            self.trial.check_current()
            session.save_weights(self.trial.weights_of(self.job.method))
            if session.ranks.rank == 0:
                files.write_bytes(self.trial.validation_results, serialize(results, session.step))
        else:
            self.no_better += 1
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
        self.watchdog.close()
        if self.session is not None:
            self.session.close()
            self.session = None


def with_smaller_passes(job: JobSpec) -> JobSpec | None:
    """The job with half the rows a pass and twice the passes a step (a third, for 3 or 9 rows, and so on), so that
    the rows of a step stay; None when a pass has one row."""
    train, world_size = job.train, job.resources.world_size
    rows = train.per_device_train_batch_size
    factor = next((number for number in range(2, rows + 1) if rows % number == 0), None)
    if factor is None:
        return None
    update = {
        "per_device_train_batch_size": rows // factor,
        "gradient_accumulation_steps": factor * train.accumulation_steps(world_size),
        "global_batch_size": None,
    }
    return job.model_copy(update={"train": train.model_copy(update=update)})
