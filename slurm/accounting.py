"""Slurm's answers about a job, in any of its forms, as one record. Pure.

`squeue --json` and `sacct --json` changed between 22.05 and 23.11: a state became a list, a number an object with
`set` and `infinite`. `scontrol show job -o` is KEY=VALUE on one line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from lorafleet.slurm.states import job_state, state_word

_PAIR = re.compile(r"(?:^|\s)([A-Za-z][A-Za-z0-9/:_]*)=")


@dataclass(frozen=True)
class JobRecord:
    """What is known of one job."""

    job_id: str
    state: str
    """Slurm's word for it, one of `STATES` where it is known."""
    reason: str = ""
    """Why it waits, or why it ended, in Slurm's word."""
    exit_code: int | None = None
    """Of the batch script; None before its end."""
    signal: int | None = None
    """That ended the batch script, where one did."""
    restarts: int = 0
    """How often it was requeued."""
    nodes: str = ""
    """Its nodes, in Slurm's short form."""


def from_scontrol(text: str) -> list[JobRecord]:
    """The jobs of `scontrol show job -o`: one a line (an array has one a task)."""
    return [_of_pairs(_pairs(line)) for line in text.splitlines() if line.startswith("JobId=")]


def _pairs(line: str) -> dict[str, str]:
    """KEY=VALUE of one line; values may hold spaces, and stop where the next key begins."""
    found = list(_PAIR.finditer(line))
    ends = [match.start() for match in found[1:]] + [len(line)]
    return {match[1]: line[match.end() : end].strip() for match, end in zip(found, ends, strict=True)}


def _of_pairs(said: dict[str, str]) -> JobRecord:
    state = state_word(said.get("JobState", ""))
    code, _, signal = said.get("ExitCode", "").partition(":")
    return JobRecord(
        job_id=said["JobId"],
        state=state,
        reason=_said(said.get("Reason", "")),
        exit_code=int(code) if code.isdigit() and job_state(state).ended else None,
        signal=int(signal) if signal.isdigit() and int(signal) else None,
        restarts=int(restarts) if (restarts := said.get("Restarts", "")).isdigit() else 0,
        nodes="" if said.get("NodeList") in (None, "(null)") else said["NodeList"],
    )


def from_squeue(text: str) -> list[JobRecord]:
    """The jobs of `squeue --noheader --format='%i|%T|%r|%N'`, which every version understands."""
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 3]
    return [
        JobRecord(job_id=row[0].strip(), state=state_word(row[1]), reason=_said(row[2]), nodes=row[3].strip())
        for row in rows
    ]


def from_sacct(text: str) -> list[JobRecord]:
    """The jobs of `sacct --parsable2 --allocations --format=JobID,State,ExitCode,Reason,NodeList,Restarts`."""
    found = []
    for line in text.splitlines():
        if line.count("|") != 5:
            continue
        job_id, state, code, reason, nodes, restarts = (part.strip() for part in line.split("|"))
        pairs = {"JobId": job_id, "JobState": state, "ExitCode": code, "Reason": _said(reason), "Restarts": restarts}
        known_nodes = {} if nodes == "None assigned" else {"NodeList": nodes}
        found.append(_of_pairs(pairs | known_nodes))
    return found


def _said(reason: str) -> str:
    return "" if reason.strip() in ("None", "(null)") else reason.strip()


def from_json(text: str) -> list[JobRecord]:
    """The jobs of `squeue --json` or `sacct --json`, of old and new versions. Raises ValueError for anything else."""
    said = json.loads(text)
    if not isinstance(said, dict) or not isinstance(said.get("jobs"), list):
        raise ValueError("no jobs in what Slurm said")
    return [_of_json(job) for job in said["jobs"]]


def _of_json(job: dict[str, Any]) -> JobRecord:
    state: Any = job.get("job_state")
    if state is None:  # sacct's: {"current": "FAILED" or ["FAILED"], "reason": ...}
        state = (job.get("state") or {}).get("current", "")
    code, signal = _ended(job.get("exit_code"))
    reason = job.get("state_reason") or (job.get("state") or {}).get("reason") or ""
    return JobRecord(
        job_id=str(job.get("job_id")),
        state=state_word(state),
        reason="" if reason == "None" else str(reason),
        exit_code=code,
        signal=signal,
        restarts=_number(job.get("restart_cnt")) or 0,
        nodes=str(job.get("nodes") or ""),
    )


def _number(value: Any) -> int | None:
    """A number, or `{"set": true, "infinite": false, "number": 3}`."""
    if isinstance(value, dict):
        return int(value["number"]) if value.get("set", True) and "number" in value else None
    return int(value) if isinstance(value, int | float) else None


def _ended(value: Any) -> tuple[int | None, int | None]:
    """(exit code, signal): of wait(2)'s status word (old versions), or of an object."""
    if isinstance(value, dict):
        signal = value.get("signal") or {}
        number = _number(signal.get("id", signal.get("signal_id")))
        return _number(value.get("return_code")), number or None
    if isinstance(value, int):
        return value >> 8, (value & 0x7F) or None
    return None, None
