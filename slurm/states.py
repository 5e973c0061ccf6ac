"""Map Slurm's job states to states of a run. Pure.

The names are those of squeue(1) and sacct(1), "JOB STATE CODES" and "JOB REASON CODES", of
Slurm 22.05 to 25.05.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorafleet.jobs.runs.run import RunState


@dataclass(frozen=True)
class JobState:
    """Meaning of one of Slurm's job states."""

    run: RunState
    """State of the run if its own status file does not say more."""
    ended: bool
    """True if the job is over for good: it has no processes and will get none."""
    sentence: str
    """Description of the state, with the job as its subject."""


_WAITS, _RUNS, _FAILED, _STOPPED = (
    RunState.PENDING,
    RunState.RUNNING,
    RunState.FAILED,
    RunState.STOPPED,
)

STATES: dict[str, JobState] = {
    "PENDING": JobState(_WAITS, False, "waits in the queue"),
    "CONFIGURING": JobState(_WAITS, False, "has nodes, which are being prepared"),
    "REQUEUED": JobState(_WAITS, False, "is being requeued"),
    "REQUEUE_FED": JobState(_WAITS, False, "is being requeued in a federation"),
    "REQUEUE_HOLD": JobState(
        _WAITS, False, "was requeued and is held: release it with `scontrol release JOB`"
    ),
    "SPECIAL_EXIT": JobState(
        _WAITS,
        False,
        (
            "was requeued in the special-exit state and is held: release it with `scontrol release "
            "JOB`"
        ),
    ),
    "RESV_DEL_HOLD": JobState(_WAITS, False, "is held because its reservation was deleted"),
    "RUNNING": JobState(_RUNS, False, "runs"),
    # Not ended: its last processes can still write the run's folder.
    "COMPLETING": JobState(_RUNS, False, "has ended, and its last processes are being cleaned up"),
    "STAGE_OUT": JobState(_RUNS, False, "has ended, and its files are being staged out"),
    "SIGNALING": JobState(_RUNS, False, "is being sent a signal"),
    "RESIZING": JobState(_RUNS, False, "is about to change its size"),
    "SUSPENDED": JobState(_RUNS, False, "is suspended, and keeps its memory on the nodes"),
    "STOPPED": JobState(_RUNS, False, "was stopped by a signal, and keeps its cores"),
    "COMPLETED": JobState(RunState.FINISHED, True, "ended with exit code 0"),
    # These ends say nothing about the job itself: `resume` continues the run.
    "CANCELLED": JobState(_STOPPED, True, "was cancelled"),
    "PREEMPTED": JobState(_STOPPED, True, "was preempted by a job of higher priority"),
    "REVOKED": JobState(_STOPPED, True, "was taken over by another cluster of the federation"),
    "TIMEOUT": JobState(_STOPPED, True, "reached its time limit"),
    "DEADLINE": JobState(_STOPPED, True, "reached its deadline"),
    "NODE_FAIL": JobState(_STOPPED, True, "lost a node"),
    "FAILED": JobState(_FAILED, True, "failed with a non-zero exit code"),
    "OUT_OF_MEMORY": JobState(_FAILED, True, "used more memory than it requested"),
    "BOOT_FAIL": JobState(_FAILED, True, "was assigned nodes that did not boot"),
    "LAUNCH_FAILED": JobState(_FAILED, True, "could not be launched on its nodes"),
    "RECONFIG_FAIL": JobState(_FAILED, True, "was assigned nodes that could not be reconfigured"),
}

_SHORT_CODES = {
    "PD": "PENDING",
    "CF": "CONFIGURING",
    "RQ": "REQUEUED",
    "RF": "REQUEUE_FED",
    "RH": "REQUEUE_HOLD",
    "SE": "SPECIAL_EXIT",
    "RD": "RESV_DEL_HOLD",
    "R": "RUNNING",
    "CG": "COMPLETING",
    "SO": "STAGE_OUT",
    "SI": "SIGNALING",
    "RS": "RESIZING",
    "S": "SUSPENDED",
    "ST": "STOPPED",
    "CD": "COMPLETED",
    "CA": "CANCELLED",
    "PR": "PREEMPTED",
    "RV": "REVOKED",
    "TO": "TIMEOUT",
    "DL": "DEADLINE",
    "NF": "NODE_FAIL",
    "F": "FAILED",
    "OOM": "OUT_OF_MEMORY",
    "BF": "BOOT_FAIL",
}
"""Short state codes of squeue."""
_STATE_FLAGS = (
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
    "RESV_DEL_HOLD",
)
"""Flags that newer versions report besides a base state (`["COMPLETED", "COMPLETING"]`). A
flag is more specific than the base state.
"""


def parse_state(raw_state: str | list[str]) -> str:
    """Return the single state name for a state as Slurm reports it.

    Slurm reports `CANCELLED by 1000`, `CANCELLED+`, `CG`, or a list of a base state and its
    flags. An unknown name is returned as it is.
    """
    states = [
        _parse_state_name(part)
        for part in ([raw_state] if isinstance(raw_state, str) else raw_state)
    ]
    flags = [state for state in states if state in _STATE_FLAGS]
    return (flags or states or ["UNKNOWN"])[0]


def _parse_state_name(text: str) -> str:
    state = re.split(r"[\s+]", text.strip(), maxsplit=1)[0].upper()
    return _SHORT_CODES.get(state, state)


def get_job_state(raw_state: str | list[str]) -> JobState:
    """Return the meaning of a state as Slurm reports it.

    An unknown state of a newer Slurm counts as running, so that nothing is done about it.
    """
    state = parse_state(raw_state)
    return STATES.get(
        state,
        JobState(_RUNS, False, f"is {state}, a state that this version of lorafleet does not know"),
    )


_PENDING_REASONS = {
    "None": "the scheduler has not considered it yet",
    "Resources": "it is next, and waits for free nodes",
    "Priority": "jobs with a higher priority are ahead of it",
    "Dependency": "it waits for another job to end",
    "DependencyNeverSatisfied": (
        "it depends on a job that did not end as required: it will never start"
    ),
    "BeginTime": "its begin time has not been reached (a requeued job waits about two minutes)",
    "JobHeldUser": "you hold it: release it with `scontrol release JOB`",
    "JobHeldAdmin": "an administrator holds it",
    "JobHoldMaxRequeue": "it was requeued too often, and is held",
    "Reservation": "it waits for its reservation",
    "ReqNodeNotAvail": (
        "nodes that it needs are down, drained or reserved (perhaps for maintenance)"
    ),
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition does not start jobs",
    "PartitionTimeLimit": (
        "its time limit is above that of the partition: it will never start (reduce time_limit in "
        "the site file)"
    ),
    "PartitionNodeLimit": "it requests more nodes than the partition allows: it will never start",
    "BadConstraints": "no node has what it requests: it will never start",
    "NodeDown": "a node that it needs is down",
    "Licenses": "it waits for a licence",
    "InvalidAccount": (
        "its account is unknown or not allowed: it will never start (check account in the site "
        "file)"
    ),
    "InvalidQOS": (
        "its QOS is unknown or not allowed: it will never start (check qos in the site file)"
    ),
    "JobArrayTaskLimit": "the maximum number of tasks of its array is running",
    "JobLaunchFailure": "it could not be launched (perhaps the folder for its output is missing)",
    "Prolog": "the prolog of its nodes is running",
    "Cleaning": "it was requeued, and its previous start is being cleaned up",
    "SchedDefer": "the scheduler will consider it later",
}
_LIMIT_OWNERS = {
    "QOS": "its QOS",
    "Assoc": "your account",
    "MaxCpu": "your account",
    "MaxNode": "your account",
}


def describe_pending(reason: str) -> str:
    """Return Slurm's reason for a pending job in words; an unknown reason is quoted.

    Args:
        reason: As squeue prints it: possibly in brackets, or with details after a comma,
            such as `ReqNodeNotAvail, UnavailableNodes:node[1-2]`.
    """
    code = reason.strip().strip("()")
    name = re.split(r"[,\s(]", code, maxsplit=1)[0] or "None"
    if name in _PENDING_REASONS:
        return _PENDING_REASONS[name]
    for prefix, owner in _LIMIT_OWNERS.items():
        if name.startswith(prefix):
            return f"{owner} has reached a limit ({name})"
    return f"Slurm reports {code}"
