"""What a driver knows of the job of a queue that it runs in, and when starting again and again leads nowhere."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs import lease
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.text import counted

_ENDED = {
    "time-limit": "it had come to its time limit, and had saved",
    "preemption": "it was preempted, and had saved",
    "nodes-lost": "too few of its nodes were left for one trial, and it had saved",
    "ray-died": "the Ray of its head node had died",
}
"""What the batch script notes before it goes back into the queue."""
_CUT_OFF = "it was cut off (a preemption without notice, a lost node, or `scontrol requeue`)"


def allocation_here() -> dict[str, Any]:
    """`{"slurm_job", "slurm_restart", "submission"}` of the job that this process is in; empty outside of one."""
    job = os.environ.get("LF_JOB")
    if job is None:
        return {}
    restart = int(os.environ.get("LF_RESTART") or 0)
    return {"slurm_job": job, "slurm_restart": restart, "submission": os.environ.get("LF_SUBMISSION", "")}


def saved_mark(run: Run) -> str:
    """What a run has saved, as a digest: ended trials, the newest checkpoints of the others, arms that were judged."""
    digest = hashlib.sha256()
    for trial in run.trials():
        seal = trial.checkpoint / "checksums.json"
        state = str(trial.state) if trial.state.ended else seal.read_text() if seal.is_file() else ""
        if state:
            digest.update(f"{trial.id}:{state}\n".encode())
    for path in sorted([*run.path.glob("arms/*/judged/*/test.json"), *run.path.glob("arms/*/inference.jsonl")]):
        digest.update(f"{path.relative_to(run.path)}:{path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def begin_in_allocation(run: Run) -> None:
    """Note why a job was started again. Raises RunError when it was so too often without a new checkpoint."""
    here = allocation_here()
    if not here:
        return
    own = lease.attempts(run.path)
    sentence = how_the_last_ended(files.read_jsonl(run.path / "slurm" / "history.jsonl"), here)
    if sentence:
        run.event("note", sentence=sentence)
    most = int(os.environ.get("LF_MAX_RESTARTS") or 0)
    idle = restarts_without_progress(own)
    if idle > most:
        raise RunError(
            f"given up after {counted(idle, 'restart')} that brought no new checkpoint (requeue.max_restarts is {most}"
            "): a longer time limit, or a smaller train.checkpoint_minutes, lets each restart save something"
        )


def restarts_without_progress(attempts: list[dict[str, Any]]) -> int:
    """How many of the newest attempts of one submission found just what the one before them had found."""
    newest, idle = attempts[-1], 0
    for earlier in reversed(attempts[:-1]):
        same = earlier.get("submission") == newest.get("submission") and earlier.get("saved") == newest.get("saved")
        if not same:
            break
        idle += 1
    return idle


def how_the_last_ended(history: list[dict[str, Any]], here: dict[str, Any]) -> str | None:
    """One line on the incarnation of the job before this one; None for the first of a submission."""
    before = [line for line in history if (line["job"], line["restart"]) != (here["slurm_job"], here["slurm_restart"])]
    if not before:
        return None
    last = before[-1]
    if last["job"] != here["slurm_job"] and last["event"] not in (*_ENDED, "began"):
        return None  # an earlier submission that came to its own end
    why = _ENDED.get(last["event"], _CUT_OFF)
    if last["job"] == here["slurm_job"]:
        return f"Slurm started job {last['job']} again (restart {here['slurm_restart']}): {why}"
    return f"job {here['slurm_job']} goes on after job {last['job']}: {why}"
