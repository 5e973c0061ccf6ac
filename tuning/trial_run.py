"""Run a trial around its session, for any host: resume, report, and save.

In a group, every process runs this code, and a decision that one process made alone
would leave the others waiting in a collective. Clocks, files and signals are therefore
read by the first process and broadcast.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from lorafleet.evaluation.metrics.predictions import serialize
from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs import files
from lorafleet.jobs.errors import TrainingFailure
from lorafleet.jobs.runs.records import FailureRecord, MetricsRow
from lorafleet.jobs.runs.run import Run, Trial, TrialState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.metrics import is_better
from lorafleet.jobs.text import format_count
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.schedule import Schedule, build_schedule
from lorafleet.training.checkpoint import find_newest_intact
from lorafleet.training.model import Base, describe_missing_bfloat16
from lorafleet.training.packed.session import PackedSession
from lorafleet.training.session import TrainingSession
from lorafleet.training.strategies import Ranks
from lorafleet.training.watchdog import Watchdog
from lorafleet.tuning.progress import ASK_SECONDS, DriverLink, make_progress
from lorafleet.tuning.trial_report import TrialReport

HEARTBEAT_SECONDS = ASK_SECONDS
"""Seconds between two heartbeats, which tell the driver the progress of the trial."""
_MAX_STEPS = 100
"""Maximum number of steps of a group between two heartbeats."""
NOTICE_SECONDS = 5.0
"""Seconds between two checks whether this node will be preempted."""
_NODE_LEAVES = FailureRecord(
    failure_class="preempted", sentence="its node is being preempted; the trial was saved first"
)
_REPORT_SECONDS = 15.0
"""Maximum seconds without a result. At least this often, Tune can stop a trial."""


@dataclass(frozen=True)
class Work:
    """Data that all trials of a sweep share. It is sent to each actor once."""

    job: JobSpec
    run: str
    """Folder of the run."""
    tokens: str
    """Folder of the tokenised rows."""
    gpus: int
    """Number of GPUs of one process."""
    threads: int
    """Number of CPU threads of one process, unless a trial has a number of its own."""
    searching: bool
    """True to use the search's schedule, False to use that of a single training."""
    attempt: int | None = None
    """Number of the driver's attempt at the run, which is recorded with every write."""
    link: DriverLink | None = None
    """Connection to the driver. None without a driver: the stop file is read, and progress is not
    shown."""

    @property
    def attempt_run(self) -> Run:
        """Run that writes on behalf of this attempt."""
        return Run(Path(self.run), self.attempt)

    def is_stop_requested(self) -> bool:
        """Return whether the run is asked to stop (Ctrl-C, `lorafleet stop`, preemption)."""
        if self.link is not None:
            return self.link.is_stop_requested()
        return (Path(self.run) / "stop").exists()


def _to_row(values: dict[str, Any]) -> MetricsRow:
    """Return the values of a report as a line of metrics.jsonl, NaN and infinity as None."""
    return MetricsRow.model_validate(files.replace_non_finite(values))


class EvaluationAborted(Exception):
    """Raised to leave an evaluation when the run is asked to stop or the node is preempted."""


class SingleRowOutOfMemory(TrainingFailure):
    """Out of memory with the smallest possible micro-batch."""

    final = True


class TrialRun:
    """A session with its trial's folder: what all hosts do around the training loop.

    The host calls `open` once, then `advance` until its report is `done` or `stopping` or
    has a `failure`, then `close`. The trial continues from its checkpoint if there is one.
    This class writes weights and checkpoints; metrics, states and progress are written by the
    driver.

    Args:
        config: `trial_id` and `assignment` of the trial.
        data: Tokens of all rows.
        watchdog: That of this process, if it trains several trials at once.
    """

    def __init__(
        self,
        work: Work,
        config: dict[str, Any],
        data: TokenData,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.work = work
        self.trial: Trial = work.attempt_run.get_trial(config["trial_id"])
        self.ranks = Ranks.from_environment()
        self.job = self._shrink_micro_batch(search.build_trial_job(work.job, config["assignment"]))
        rows = data.count_training_rows(self.job)
        self.data = data.for_fold(self.job)
        self.plan: Schedule = build_schedule(self.job, rows, searching=work.searching)
        self.best: float | None = None
        self.no_better = 0  # consecutive evaluations without a new best
        # The row of the last checkpoint, which the driver may not have received.
        self.unrecorded: dict[str, Any] | None = None
        self.warning: str | None = None
        self.session: TrainingSession | PackedSession | None = None
        self.target = 0
        """Step up to which the trial trains before its next report."""
        self.began_at = time.monotonic()
        self.saved_at = time.monotonic()
        self.stopping = False
        # `due`: the checkpoint was written just before an evaluation. `leaving`: this node will be
        # preempted.
        self.due = False
        self.leaving = False
        # Set by the host, because each has its own way to ask Ray.
        self.leaving_soon: Callable[[], bool] = lambda: False
        self.looked_at = time.monotonic()
        self.nodes = 1
        self.steps_a_beat = 1
        self.device = torch.device("cpu")
        self._owns_watchdog = watchdog is None
        self.watchdog = watchdog or Watchdog(
            self.trial.get_hang_file(self.ranks.rank), 60 * self.job.retries.hang_minutes
        )
        self.watchdog.reset(setting_up=True)

    def _shrink_micro_batch(self, job: JobSpec) -> JobSpec:
        """Return the job with a smaller micro-batch for each time that the trial ran out of memory.

        Raises SingleRowOutOfMemory if the micro-batch cannot be divided further.
        """
        # Use the first process's count: another machine may see an older state of a shared folder.
        for _ in range(self._broadcast(self.trial.read_status().retries.get("oom", 0))):
            smaller = halve_micro_batch(job)
            if smaller is None:
                rows = job.train.per_device_train_batch_size
                sentence = (
                    f"out of memory with micro-batches of {format_count(rows, 'row')}, which "
                    "cannot be halved. Use a smaller model.max_length, "
                    "train.gradient_checkpointing, or method: qlora"
                )
                raise SingleRowOutOfMemory("oom", sentence)
            job = smaller
        return job

    def warn_of_layout(self) -> None:
        """Set a warning if Ray placed the group on another number of machines than `num_nodes`."""
        requested = self.job.resources.num_nodes
        if self.nodes != requested:
            layout = (
                f"its {format_count(self.ranks.world_size, 'process')} run on "
                f"{format_count(self.nodes, 'machine')}"
            )
            self.warning = f"{layout}, but resources.num_nodes is {requested}"

    def open(self, base: Base) -> TrainingSession:
        """Build the session and continue from the trial's checkpoint, if there is one.

        Args:
            base: A base that fits the trial's job.

        Raises:
            UserError: The model does not support the job.
        """
        session = TrainingSession.build(self.job, base, self.data, self.plan)
        self.use(session, base)
        return session

    def use(self, session: TrainingSession | PackedSession, base: Base) -> None:
        """Train with a session that is at step 0, and continue from the trial's checkpoint."""
        self.device = base.device
        self.session = session
        session.on_pass = self._handle_pass
        folder, damage_warning = self._find_checkpoint()
        # Once for a trial, not once for each of its processes' starts.
        format_warning = describe_missing_bfloat16(self.job, base.device) if not folder else None
        warnings = filter(None, (self.warning, format_warning, damage_warning))
        self.warning = "; ".join(warnings) or None
        if folder is not None:
            extra = session.load(folder)
            self.best, self.no_better = extra.get("best"), extra.get("no_better", 0)
            # The last report before a kill may not have reached the driver. Repeat it: the driver
            # drops duplicates.
            self.unrecorded, self.due = extra.get("row"), bool(extra.get("due"))
        self.watchdog.pause()

    def _find_checkpoint(self) -> tuple[Path | None, str | None]:
        """Return the checkpoint to continue from, and a warning about a damaged one.

        Either is None if there is none. The result is the same on all processes.
        """
        choice = None
        if self.ranks.rank == 0:
            folder, problem = find_newest_intact(self.trial.checkpoint)
            resume_point = (
                "the previous one" if folder else "the start, because there is no other one"
            )
            choice = (
                folder,
                f"the newest checkpoint is damaged ({problem}): continuing from {resume_point}"
                if problem
                else None,
            )
        chosen: tuple[Path | None, str | None] = self._broadcast(choice)
        return chosen

    def _broadcast(self, value: Any) -> Any:
        """Return the first process's value on all processes."""
        values = [value]
        if self.ranks.world_size > 1:
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def advance(self) -> TrialReport:
        """Train to the next evaluation or for some seconds, save, and return the report.

        In a group, every process must call it and gets a report.

        Raises:
            TrainingFailure: The loss became NaN or infinite, or a single row does not fit into
                memory.
        """
        try:
            report = self.begin()
            if report is not None:
                return report
            session = self.session
            assert isinstance(session, TrainingSession)
            return self.finish({} if self.due else self._train(session, self.target))
        finally:
            self.watchdog.pause()

    def begin(self) -> TrialReport | None:
        """Set the step up to which the trial trains now.

        Returns:
            A report if there is one before anything is trained. Else None: `finish` follows when
            `is_over` is true.
        """
        session = self.session
        assert session is not None
        self.watchdog.reset()
        if self.unrecorded is not None and not self.due:
            unrecorded, self.unrecorded = self.unrecorded, None
            return self._complete(TrialReport(row=_to_row(unrecorded), done=self._is_done(session)))
        if self._is_pruned():
            return self._complete(TrialReport(done=True))
        # A checkpoint that was written just before an evaluation: the evaluation comes first now.
        self.target = session.step if self.due else self.plan.find_next_evaluation(session.step)
        self.began_at = time.monotonic()
        session.reset_loss()
        return None

    @property
    def must_evaluate(self) -> bool:
        """Return whether `finish` evaluates the trial now."""
        assert self.session is not None
        # A stop must not wait for a long evaluation. It is repeated after the resume (`due`).
        return self.session.step >= self.target and not self.stopping and not self.leaving

    @property
    def is_over(self) -> bool:
        """Return whether the training since `begin` must be reported now."""
        assert self.session is not None
        is_report_due = time.monotonic() - self.began_at > _REPORT_SECONDS
        has_arrived = self.session.step >= self.target
        return has_arrived or self.stopping or self.leaving or is_report_due

    def finish(self, row: dict[str, Any]) -> TrialReport:
        """Evaluate the trial if it has reached its target, save, and return the report.

        Args:
            row: The session's report of the training since `begin`; unused if `due`.
        """
        session = self.session
        assert session is not None
        if self.due:
            row, self.unrecorded, self.due = self.unrecorded or {}, None, False
        # Checked before writing: the adapter on disk must stay the one that was evaluated.
        if self._is_pruned():
            return self._complete(TrialReport(done=True))
        if self.must_evaluate:
            with contextlib.suppress(EvaluationAborted):
                row |= self._evaluate(session)
        has_arrived = session.step >= self.target
        if self.leaving or (self.stopping and has_arrived and not row.get("evaluated")):
            self.trial.check_current()
            session.save(
                self.trial.checkpoint,
                self._build_state() | {"row": row if has_arrived else None, "due": has_arrived},
            )
            failure = _NODE_LEAVES if self.leaving else None
            return self._complete(TrialReport(stopping=self.stopping, failure=failure))
        # Saved before the report is sent: a result that the driver knows must not be lost by a
        # kill.
        if (
            row.get("evaluated")
            or self.stopping
            or self._broadcast_ints(self._is_checkpoint_due())[0]
        ):
            self.trial.check_current()
            session.save(self.trial.checkpoint, self._build_state() | {"row": row})
            self.saved_at = time.monotonic()
        row |= {
            "host": f"{os.uname().nodename}:{os.getpid()}",
            "first_gradient_at": session.first_gradient_at,
        }
        if self.nodes > 1:
            row["nodes"] = self.nodes
        return self._complete(
            TrialReport(
                row=_to_row(row),
                done=self._is_done(session),
                pauses=self._pauses_at(row.get("rung")),
                stopping=self.stopping,
            )
        )

    def _pauses_at(self, rung: int | None) -> bool:
        """Return whether the trial waits at a rung.

        Its process ends the training then: a group that went on could meet the one that continues.
        """
        search_spec = self.work.job.search
        if rung is None or search_spec is None or not self.work.searching:
            return False
        is_last = rung + 1 >= len(self.plan.rung_steps)
        return search_spec.scheduler.mode != "stop" and not is_last and not self.trial.is_repeat

    def _complete(self, report: TrialReport) -> TrialReport:
        """Return a report with the warnings that go with it."""
        warning, self.warning = self.warning, None
        warning = "; ".join(filter(None, (warning, self._describe_early_stop(report)))) or None
        return report.model_copy(update={"warning": warning}) if warning else report

    def _build_state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores in addition to the session's."""
        return {"best": self.best, "no_better": self.no_better}

    def _is_done(self, session: TrainingSession | PackedSession) -> bool:
        """Return whether the last step was taken or the patience of early stopping is used up."""
        patience = self.job.train.early_stopping_patience
        return session.is_done or (patience is not None and self.no_better >= patience)

    def _describe_early_stop(self, report: TrialReport) -> str | None:
        """Return a message if the trial ends early for lack of a better evaluation, else None."""
        if not report.done or report.row is None or self.session is None or self.session.is_done:
            return None
        evaluations = format_count(self.no_better, "evaluation")
        return (
            f"stopped early after step {self.session.step}: {self.job.metric.name} did not improve "
            f"in {evaluations}"
        )

    def _train(self, session: TrainingSession, target: int) -> dict[str, Any]:
        """Train to the target step, the next report or a stop, with heartbeats in between."""
        while True:
            slice_started_at = time.monotonic()
            if self.ranks.world_size == 1:
                row = session.advance(target, seconds=HEARTBEAT_SECONDS)
            else:  # clocks differ between processes, so all must stop at the same step
                row = session.advance(min(target, session.step + self.steps_a_beat))
            if self.ranks.rank == 0:
                self.send_progress(row)
            now = time.monotonic()
            # A group stops by steps, so their number follows the measured speed.
            fitting_steps = round(
                self.steps_a_beat * HEARTBEAT_SECONDS / max(now - slice_started_at, 1e-3)
            )
            is_report_due, self.steps_a_beat = self._broadcast_ints(
                now - self.began_at > _REPORT_SECONDS, min(max(1, fitting_steps), _MAX_STEPS)
            )
            self._check_for_stop()
            if session.step >= target or self.stopping or self.leaving or is_report_due:
                return row

    def send_progress(self, row: dict[str, Any]) -> None:
        """Tell the driver how far the trial is.

        Args:
            row: The session's report.
        """
        if self.work.link is not None:
            progress = make_progress(_to_row(row), self.plan.total_steps)
            self.work.link.send_progress(self.trial.id, progress)

    def _check_for_stop(self) -> None:
        """Update whether the run is asked to stop and, less often, whether the node is
        preempted.
        """
        now = time.monotonic()
        # Only the first process asks: its answer is everybody's.
        must_stop = self.ranks.rank == 0 and self.work.is_stop_requested()
        stop, check_node = self._broadcast_ints(must_stop, now - self.looked_at > NOTICE_SECONDS)
        self.stopping = bool(stop)
        if check_node:
            self.looked_at = now
            self.leaving = self.leaving_soon()

    def _handle_pass(self, phase: str) -> None:
        """Reset the watchdog, and abort an evaluation if the run stops or the node is preempted.

        Raises EvaluationAborted in that case.
        """
        self.watchdog.reset()
        if phase == "evaluation":
            self._check_for_stop()
            if self.stopping or self.leaving:
                raise EvaluationAborted

    def _is_pruned(self) -> bool:
        """Return whether a group was stopped or paused while it continued to train.

        Its report and the ledger's decision can cross. Always False for a single process.
        """
        if self.ranks.world_size == 1:
            return False
        # The first process reads the file, which is newer than what the driver has sent.
        must_end = self.ranks.rank == 0 and (
            self.trial.state.has_ended or self.trial.state is TrialState.PAUSED
        )
        return bool(self._broadcast_ints(must_end)[0])

    def _broadcast_ints(self, *values: int) -> list[int]:
        """Return the first process's values on all processes.

        A process that stopped alone would leave the others waiting forever.
        """
        if self.ranks.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int32, device=self.device)
        distributed.broadcast(tensor, src=0)
        return tensor.tolist()

    def _evaluate(self, session: TrainingSession | PackedSession) -> dict[str, Any]:
        """Evaluate the adapter, save its weights if it is the best so far, and return the row.

        The results of the rows are saved with the best weights, for later paired comparisons.

        Raises:
            EvaluationAborted: The run is asked to stop, or the node is being preempted.
        """
        scores, results = session.evaluate_with_rows("validation")
        metric = self.job.metric
        score = scores.metrics[metric.name]
        if is_better(score, self.best, metric.goal):
            self.best, self.no_better = score, 0
            # A newer attempt may own the trial: weights on disk must be those of its best score.
            self.trial.check_current()
            session.save_weights(self.trial.get_weights_folder(self.job.method))
            if session.ranks.rank == 0:
                files.write_bytes(self.trial.validation_results, serialize(results, session.step))
        else:
            self.no_better += 1
        # Short trials may have several rungs in one step; the last one decides.
        rungs = [index for index, step in enumerate(self.plan.rung_steps) if step == session.step]
        return {
            "evaluated": True,
            "rung": rungs[-1] if rungs else None,
            **scores.metrics,
            "intervals": scores.intervals,
            "eval_seconds": round(session.meter.eval_seconds, 3),
        }

    def _is_checkpoint_due(self) -> bool:
        """Return whether the last checkpoint is older than `train.checkpoint_minutes`."""
        return time.monotonic() - self.saved_at > 60 * self.job.train.checkpoint_minutes

    def close(self) -> None:
        """Close the session, which releases the base.

        May be called more than once, and after a failed `open`.
        """
        if self._owns_watchdog:
            self.watchdog.close()
        if self.session is not None:
            self.session.close()
            self.session = None


def halve_micro_batch(job: JobSpec) -> JobSpec | None:
    """Return the job with half the micro-batch size and twice the micro-batches per step.

    For a size without a factor of two, its smallest factor is used (a third for 3 or 9
    rows). The number of rows of a step stays the same, so the result of the training does
    too.

    Returns:
        None if the micro-batch has one row.
    """
    train, world_size = job.train, job.resources.world_size
    rows = train.per_device_train_batch_size
    factor = next((number for number in range(2, rows + 1) if rows % number == 0), None)
    if factor is None:
        return None
    update = {
        "per_device_train_batch_size": rows // factor,
        "gradient_accumulation_steps": factor * train.compute_accumulation_steps(world_size),
        "global_batch_size": None,
    }
    return job.model_copy(update={"train": train.model_copy(update=update)})
