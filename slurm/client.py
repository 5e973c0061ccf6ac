"""Slurm's own commands, each with a timeout: a login node whose controller does not answer must not hang a user."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.run import RunState
from lorafleet.slurm.accounting import JobRecord, from_json, from_sacct, from_scontrol, from_squeue
from lorafleet.slurm.states import job_state

_SECONDS = 20.0
_SUBMIT_SECONDS = 60.0
_PASSED = ("HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "SLURM_CONF")
"""All that a job gets of the environment of the shell that submits it."""
_USUAL_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_SQUEUE = "%i|%T|%r|%N"
_SACCT = "JobID,State,ExitCode,Reason,NodeList,Restarts"


class SlurmError(UserError):
    """One of Slurm's commands refused, is not there, or did not answer."""


@dataclass(frozen=True)
class Said:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """Its complaint on one line."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return "; ".join(line.removeprefix("sbatch: error: ").removeprefix("error: ") for line in lines[:3])


def ask(command: Sequence[str], seconds: float = _SECONDS, env: Mapping[str, str] | None = None) -> Said:
    """Run one of Slurm's commands. Raises SlurmError when it is not there or does not answer."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=env, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise SlurmError(f"there is no {command[0]} here: is this a login node of the cluster?") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} did not answer within {seconds:g} s: Slurm's controller may be down") from error
    return Said(done.returncode, done.stdout, done.stderr)


def job_environment() -> dict[str, str]:
    """The environment that `sbatch` is run with, and so the job's: a short list, never the whole shell's."""
    kept = {name: os.environ[name] for name in _PASSED if name in os.environ}
    sbatch = shutil.which("sbatch")
    own = [str(Path(sbatch).parent)] if sbatch else []
    return {**kept, "PATH": ":".join(dict.fromkeys([*own, *_USUAL_PATH.split(":")]))}


def submit(command: Sequence[str]) -> str:
    """Hand a job over; returns its number. Raises SlurmError with what sbatch says."""
    said = ask(command, _SUBMIT_SECONDS, job_environment())
    if said.code:
        raise SlurmError(f"sbatch refused the job: {said.sentence}")
    return said.out.strip().partition(";")[0]


def test_only(command: Sequence[str]) -> str | None:
    """What `sbatch --test-only` has against a job, or None. It submits nothing."""
    said = ask([command[0], "--test-only", *command[1:]], _SUBMIT_SECONDS, job_environment())
    return said.sentence if said.code else None


def job(job_id: str) -> JobRecord | None:
    """What is known of a job: asked of squeue, then of sacct, then of scontrol; None where it is known to none of them.

    Of several lines for one number (tasks of an array, parts of a heterogeneous job) one that runs stands for all, else
    one that waits. Raises SlurmError when nobody can say: a controller that is down is not a job that is gone.
    """
    found: JobRecord | None = None
    error: SlurmError | None = None
    forgotten = False
    for look in (_of_squeue, _of_sacct, _of_scontrol):
        try:
            records = look(job_id)
        except SlurmError as refused:
            error = error or refused
            continue
        forgotten = forgotten or not records
        if records:
            record = min(records, key=_rank)
            if not job_state(record.state).ended or record.exit_code is not None:
                return record
            found = found or record
    if found is None and error is not None and not forgotten:
        raise error
    return found


def _rank(record: JobRecord) -> int:
    state = job_state(record.state)
    return 2 if state.ended else 0 if state.run is RunState.RUNNING else 1


def _of_squeue(job_id: str) -> list[JobRecord]:
    said = ask(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", f"--format={_SQUEUE}"])
    return _unless_refused(said, from_squeue)


def _of_sacct(job_id: str) -> list[JobRecord]:
    said = ask(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", f"--format={_SACCT}"])
    if said.code:  # a field that it does not know; where there is no accounting this is refused too
        return _unless_refused(ask(["sacct", "--json", f"--jobs={job_id}"]), from_json)
    return from_sacct(said.out)


def _of_scontrol(job_id: str) -> list[JobRecord]:
    return _unless_refused(ask(["scontrol", "show", "job", "-o", job_id]), from_scontrol)


def _unless_refused(said: Said, read: Callable[[str], list[JobRecord]]) -> list[JobRecord]:
    """The records of an answer; none where the number is not known. Raises SlurmError for every other refusal."""
    if said.code and "invalid job id" in (said.err + said.out).lower():
        return []
    if said.code:
        raise SlurmError(f"Slurm does not answer: {said.sentence or f'code {said.code}'}")
    try:
        return read(said.out)
    except ValueError as error:
        raise SlurmError(f"Slurm's answer cannot be read: {error}") from error


def cancel(job_ids: Sequence[str], *, waiting: bool = False) -> None:
    """Cancel jobs, or only what of them waits; those that have ended are passed over by scancel itself.

    Raises SlurmError.
    """
    if job_ids:
        said = ask(["scancel", *(["--state=PENDING"] if waiting else []), *job_ids])
        if said.code:
            raise SlurmError(f"scancel refused: {said.sentence}")


def partition_limit(partition: str | None) -> tuple[str, str] | None:
    """(name, MaxTime in Slurm's form) of a partition, or of the default one; None where it cannot be known."""
    said = ask(["scontrol", "show", "partition", "-o", *([partition] if partition else [])])
    if said.code:
        return None
    for line in said.out.splitlines():
        words = dict(part.split("=", 1) for part in line.split() if "=" in part)
        if partition or words.get("Default") == "YES":
            return words.get("PartitionName", ""), words.get("MaxTime", "UNLIMITED")
    return None


def accounts() -> set[str] | None:
    """The accounts that this user may charge; None where there is no accounting to ask."""
    user = os.environ.get("USER") or ""
    said = ask(["sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}", "format=account"])
    found = {line.strip().lower() for line in said.out.splitlines() if line.strip()}
    return found if said.code == 0 and found else None
