"""The Slurm allocation of a driver, and the limit on restarts that save nothing new.

The batch script passes the job to its driver in variables that begin with LF_. A job
that always requeues itself would run for ever, so restarts are counted in the run's own
attempts.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs import lease
from lorafleet.jobs.runs.events import NoteEvent
from lorafleet.jobs.runs.records import AttemptRecord, StartRecord, read_rows
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.text import format_count

_END_REASONS = {
    "time-limit": "it reached its time limit, after saving",
    "preemption": "it was preempted, after saving",
    "nodes-lost": "too few of its nodes were left for one trial; it saved first",
    "ray-died": "Ray on its head node died",
}
"""Reason by event: what the batch script records before it requeues itself."""
_CUT_OFF_REASON = "it was killed (a preemption without notice, a lost node, or `scontrol requeue`)"


@dataclass(frozen=True)
class Allocation:
    """The Slurm job of this process."""

    job: str
    restart: int
    """Number of times that Slurm had started the job before."""
    submission: str
    """Number of the run's submission."""


def get_allocation() -> Allocation | None:
    """Return the Slurm job of this process; None outside of one."""
    job = os.environ.get("LF_JOB")
    if job is None:
        return None
    restart = int(os.environ.get("LF_RESTART") or 0)
    return Allocation(job, restart, os.environ.get("LF_SUBMISSION", ""))


def make_attempt_record(submission: int | None = None, saved: str | None = None) -> AttemptRecord:
    """Return what this process stores in the lease of a run.

    Args:
        submission: Number of the submission, unless the Slurm job names it.
        saved: Digest of what the run has saved.
    """
    values: dict[str, Any] = {}
    if submission is not None:
        values["submission"] = submission
    if saved is not None:
        values["saved"] = saved
    allocation = get_allocation()
    if allocation is not None:
        values["slurm_job"] = allocation.job
        values["slurm_restart"] = allocation.restart
        values["submission"] = allocation.submission
    return AttemptRecord.model_validate(values)


def read_starts(run: Path) -> list[StartRecord]:
    """Return the starts and ends of a run's Slurm jobs, oldest first."""
    return read_rows(run / "slurm" / "history.jsonl", StartRecord)


def compute_progress_digest(run: Run) -> str:
    """Return a digest of what a run has saved.

    It covers ended trials, the newest checkpoints of the other trials, and the evaluated
    arms.
    """
    digest = hashlib.sha256()
    for trial in run.list_trials():
        # The checksums change with every checkpoint, and are small. Without them the checkpoint is
        # not complete.
        seal = trial.checkpoint / "checksums.json"
        state = (
            str(trial.state)
            if trial.state.has_ended
            else seal.read_text()
            if seal.is_file()
            else ""
        )
        if state:
            digest.update(f"{trial.id}:{state}\n".encode())
    # A comparison may spend a whole job on evaluations and measurements, which are progress too.
    for path in sorted(
        [*run.path.glob("arms/*/judged/*/test.json"), *run.path.glob("arms/*/inference.jsonl")]
    ):
        digest.update(f"{path.relative_to(run.path)}:{path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def record_restart(run: Run) -> None:
    """Record why a job was started again.

    Raises:
        RunError: The job was restarted more than requeue.max_restarts times without a new
            checkpoint.
    """
    allocation = get_allocation()
    if not allocation:
        return
    run_attempts = lease.read_attempts(run.path)
    message = describe_last_end(read_starts(run.path), allocation)
    if message:
        run.add_event(NoteEvent(sentence=message))
    max_restarts = int(os.environ.get("LF_MAX_RESTARTS") or 0)
    idle = count_idle_restarts(run_attempts)
    if idle > max_restarts:
        raise RunError(
            f"stopped after {format_count(idle, 'restart')} without a new checkpoint "
            f"(requeue.max_restarts is {max_restarts}): set a longer time_limit, or a smaller "
            "train.checkpoint_minutes, so that each restart can save a checkpoint"
        )


def count_idle_restarts(attempts: list[AttemptRecord]) -> int:
    """Return how many of the newest attempts saved nothing new.

    The attempts belong to one submission; each of them found the same saved progress as the
    one before it.
    """
    # `saved` is the digest that an attempt found at its start. A new submission by the user begins
    # a new count.
    newest, idle = attempts[-1], 0
    for earlier in reversed(attempts[:-1]):
        if (earlier.submission, earlier.saved) != (newest.submission, newest.saved):
            break
        idle += 1
    return idle


def describe_last_end(history: list[StartRecord], allocation: Allocation) -> str | None:
    """Return one line on how the job's previous start ended; None for the first of a submission.

    Args:
        history: Lines of slurm/history.jsonl.
        allocation: The job.
    """
    earlier_lines = [
        line for line in history if (line.job, line.restart) != (allocation.job, allocation.restart)
    ]
    if not earlier_lines:
        return None
    last = earlier_lines[-1]
    is_cut_off = last.event in (*_END_REASONS, "began") or bool(last.reason)
    if last.job != allocation.job and not is_cut_off:
        return None  # an earlier submission that ended normally
    # The history of a start that was killed ends with `began`.
    reason = last.reason or _END_REASONS.get(last.event, _CUT_OFF_REASON)
    if last.job == allocation.job:
        return f"Slurm started job {last.job} again (restart {allocation.restart}): {reason}"
    return f"job {allocation.job} continues after job {last.job}: {reason}"
