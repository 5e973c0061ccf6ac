"""Slurm's own commands, each with a timeout: a login node whose controller does not answer must not hang a user."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import UserError
from slurm.records import JobRecord, from_json, from_sacct, from_scontrol, from_squeue
from slurm.states import job_state

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
    """What is known of a job: asked of squeue, then of sacct, then of scontrol; None where nobody knows it any more.

    Raises SlurmError only when none of them answers.
    """
    found: JobRecord | None = None
    errors: list[SlurmError] = []
    for look in (_of_squeue, _of_sacct, _of_scontrol):
        try:
            record = look(job_id)
        except SlurmError as error:
            errors.append(error)
            continue
        if record is not None:
            if not job_state(record.state).ended or record.exit_code is not None:
                return record
            found = found or record
    if found is None and len(errors) == 3:
        raise errors[0]
    return found


def _of_squeue(job_id: str) -> JobRecord | None:
    said = ask(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", f"--format={_SQUEUE}"])
    return _newest(from_squeue(said.out)) if said.code == 0 else None


def _of_sacct(job_id: str) -> JobRecord | None:
    said = ask(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", f"--format={_SACCT}"])
    if said.code:  # no accounting, or a field that it does not know
        said = ask(["sacct", "--json", f"--jobs={job_id}"])
        try:
            return _newest(from_json(said.out)) if said.code == 0 else None
        except ValueError:
            return None
    return _newest(from_sacct(said.out))


def _of_scontrol(job_id: str) -> JobRecord | None:
    said = ask(["scontrol", "show", "job", "-o", job_id])
    return _newest(from_scontrol(said.out)) if said.code == 0 else None


def _newest(records: list[JobRecord]) -> JobRecord | None:
    """Of several lines for one job (tasks of an array, parts of a heterogeneous job) the one that has not ended."""
    live = [record for record in records if not job_state(record.state).ended]
    return next(iter(live or records), None)


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are passed over by scancel itself. Raises SlurmError."""
    if job_ids:
        said = ask(["scancel", *job_ids])
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
    found = {line.strip() for line in said.out.splitlines() if line.strip()}
    return found if said.code == 0 and found else None
