"""Parse Slurm's output about jobs, in any of its formats, into records. Pure.

`squeue --json` and `sacct --json` changed between 22.05 and 23.11: a state became a list,
and a number an object with `set` and `infinite`. `scontrol show job -o` prints KEY=VALUE
pairs on one line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from lorafleet.slurm.states import get_job_state, parse_state

_NO_NODES = ("", "(null)", "None assigned")
"""Words of Slurm's commands for a job that has no nodes."""
_PAIR = re.compile(r"(?:^|\s)([A-Za-z][A-Za-z0-9/:_]*)=")


@dataclass(frozen=True)
class JobRecord:
    """Information about one job, as Slurm reports it."""

    job_id: str
    state: str
    """Slurm's name of the state, one of `STATES` if it is known."""
    reason: str = ""
    """Slurm's reason why the job is pending or why it ended."""
    exit_code: int | None = None
    """Exit code of the batch script; None before its end."""
    signal: int | None = None
    """Signal that ended the batch script, if any."""
    restarts: int = 0
    """Number of times the job was requeued."""
    nodes: str = ""
    """Nodes of the job, in Slurm's short form."""


def parse_scontrol(text: str) -> list[JobRecord]:
    """Parse the output of `scontrol show job -o`: one job per line, one array task per line."""
    return [
        _build_record_from_pairs(_parse_pairs(line))
        for line in text.splitlines()
        if line.startswith("JobId=")
    ]


def _parse_pairs(line: str) -> dict[str, str]:
    """Parse the KEY=VALUE pairs of one line.

    Values may contain spaces; a value ends where the next key begins.
    """
    matches = list(_PAIR.finditer(line))
    ends = [match.start() for match in matches[1:]] + [len(line)]
    return {
        match[1]: line[match.end() : end].strip() for match, end in zip(matches, ends, strict=True)
    }


def _build_record_from_pairs(pairs: dict[str, str]) -> JobRecord:
    state = parse_state(pairs.get("JobState", ""))
    code, _, signal = pairs.get("ExitCode", "").partition(":")
    return JobRecord(
        job_id=pairs["JobId"],
        state=state,
        reason=_clean_reason(pairs.get("Reason", "")),
        # scontrol prints ExitCode=0:0 for a job that has not ended.
        exit_code=int(code) if code.isdigit() and get_job_state(state).ended else None,
        signal=int(signal) if signal.isdigit() and int(signal) else None,
        restarts=int(restarts) if (restarts := pairs.get("Restarts", "")).isdigit() else 0,
        nodes="" if pairs.get("NodeList", "") in _NO_NODES else pairs["NodeList"],
    )


def parse_squeue(text: str) -> list[JobRecord]:
    """Parse the output of `squeue --noheader --format='%i|%T|%r|%N'`.

    Every version of Slurm supports this format.
    """
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 3]
    return [
        JobRecord(
            job_id=row[0].strip(),
            state=parse_state(row[1]),
            reason=_clean_reason(row[2]),
            nodes=row[3].strip(),
        )
        for row in rows
    ]


def parse_sacct(text: str) -> list[JobRecord]:
    """Parse the output of `sacct --parsable2 --allocations`.

    The option is `--format=JobID,State,ExitCode,Reason,NodeList,Restarts`.
    """
    records = []
    for line in text.splitlines():
        # Warnings can stand between the rows.
        if line.count("|") != 5:
            continue
        job_id, state, code, reason, nodes, restarts = (part.strip() for part in line.split("|"))
        pairs = {
            "JobId": job_id,
            "JobState": state,
            "ExitCode": code,
            "Reason": _clean_reason(reason),
            "Restarts": restarts,
        }
        node_pairs = {} if nodes in _NO_NODES else {"NodeList": nodes}
        records.append(_build_record_from_pairs(pairs | node_pairs))
    return records


def _clean_reason(reason: str) -> str:
    return "" if reason.strip() in ("None", "(null)") else reason.strip()


def parse_json(text: str) -> list[JobRecord]:
    """Parse the output of `squeue --json` or `sacct --json`, of old and new versions.

    Raises:
        ValueError: The text is not such output.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or not isinstance(document.get("jobs"), list):
        raise ValueError("the output has no list of jobs")
    return [_build_record_from_json(job) for job in document["jobs"]]


def _build_record_from_json(job: dict[str, Any]) -> JobRecord:
    state: Any = job.get("job_state")
    if state is None:  # sacct's: {"current": "FAILED" or ["FAILED"], "reason": ...}
        state = (job.get("state") or {}).get("current", "")
    state = parse_state(state)
    # A job that has not ended is reported with exit code 0.
    has_ended = get_job_state(state).ended
    code, signal = _parse_exit_status(job.get("exit_code")) if has_ended else (None, None)
    nodes = str(job.get("nodes") or "")
    reason = job.get("state_reason") or (job.get("state") or {}).get("reason") or ""
    return JobRecord(
        job_id=str(job.get("job_id")),
        state=state,
        reason="" if reason == "None" else str(reason),
        exit_code=code,
        signal=signal,
        restarts=_parse_number(job.get("restart_cnt")) or 0,
        nodes="" if nodes in _NO_NODES else nodes,
    )


def _parse_number(value: Any) -> int | None:
    """Return the value of a number or of `{"set": true, "infinite": false, "number": 3}`."""
    if isinstance(value, dict):
        return int(value["number"]) if value.get("set", True) and "number" in value else None
    return int(value) if isinstance(value, int | float) else None


def _parse_exit_status(value: Any) -> tuple[int | None, int | None]:
    """Return (exit code, signal).

    Old versions report wait(2)'s status word, newer ones an object.
    """
    if isinstance(value, dict):
        signal = value.get("signal") or {}
        number = _parse_number(signal.get("id", signal.get("signal_id")))
        return _parse_number(value.get("return_code")), number or None
    if isinstance(value, int):
        # The high byte is the exit code, the low seven bits are the signal.
        return value >> 8, (value & 0x7F) or None
    return None, None
