"""Run Slurm's commands, each with a timeout.

A controller that does not answer must not hang the user. A SlurmError of a query says
nothing about the job, which may still wait or run.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.run import RunState
from lorafleet.slurm.accounting import (
    JobRecord,
    parse_json,
    parse_sacct,
    parse_scontrol,
    parse_squeue,
)
from lorafleet.slurm.states import get_job_state

_LOGGER = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 20.0
_SUBMIT_TIMEOUT_SECONDS = 60.0
_PASSED_VARIABLES = ("HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "SLURM_CONF")
"""The only variables of the submitting shell that a job inherits."""
_DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_SQUEUE_FORMAT = "%i|%T|%r|%N"
_SACCT_FORMAT = "JobID,State,ExitCode,Reason,NodeList,Restarts"


class SlurmError(UserError):
    """One of Slurm's commands failed, is missing, or did not answer."""


@dataclass(frozen=True)
class CommandOutput:
    """Output of a command."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """Return the error message of the command on one line."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return "; ".join(
            line.removeprefix("sbatch: error: ").removeprefix("error: ") for line in lines[:3]
        )


def run_command(
    command: Sequence[str], seconds: float = _TIMEOUT_SECONDS, env: Mapping[str, str] | None = None
) -> CommandOutput:
    """Run one of Slurm's commands.

    Without a controller the commands try again for up to a minute by themselves, hence the
    timeout.

    Args:
        command: The command and its arguments.
        seconds: Timeout.
        env: Complete environment of the command; None: that of this process.

    Returns:
        The output, also for an exit code other than 0.

    Raises:
        SlurmError: The command is missing or does not answer.
    """
    began = time.monotonic()
    try:
        completed = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env=env,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"{command[0]} is not installed on this machine: run the command on a login node of "
            "the cluster"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{command[0]} did not answer within {seconds:g} s: Slurm's controller may be down"
        ) from error
    level = logging.INFO if command[0] in ("sbatch", "scancel") else logging.DEBUG
    _LOGGER.log(
        level,
        "%s ended with %d after %.2f s",
        " ".join(command),
        completed.returncode,
        time.monotonic() - began,
    )
    return CommandOutput(completed.returncode, completed.stdout, completed.stderr)


def build_job_environment() -> dict[str, str]:
    """Return the environment of `sbatch`, which the job inherits.

    It is a short list of variables, never the complete environment of the shell.
    """
    variables = {name: os.environ[name] for name in _PASSED_VARIABLES if name in os.environ}
    sbatch = shutil.which("sbatch")
    # The job itself runs srun, scontrol and scancel, which may be installed outside of the usual
    # folders.
    sbatch_folders = [str(Path(sbatch).parent)] if sbatch else []
    return {
        **variables,
        "PATH": ":".join(dict.fromkeys([*sbatch_folders, *_DEFAULT_PATH.split(":")])),
    }


def submit(command: Sequence[str]) -> str:
    """Submit a job and return its id.

    `sbatch --parsable` prints JOB, or JOB;CLUSTER with several clusters.

    Args:
        command: The result of `render.build_submit_command`.

    Raises:
        SlurmError: sbatch is missing, does not answer or rejects the job; its message is
            included.
    """
    output = run_command(command, _SUBMIT_TIMEOUT_SECONDS, build_job_environment())
    if output.code:
        raise SlurmError(f"sbatch rejected the job: {output.sentence}")
    return output.out.strip().partition(";")[0]


def find_submission_error(command: Sequence[str]) -> str | None:
    """Return the error of `sbatch --test-only` for a job, or None. This submits nothing.

    Observed on Slurm 22.05: it accepts a time limit above the partition's, an unknown
    account or QOS without accounting, and a script with bash syntax errors.
    `SlurmBackend.check` looks for these itself.

    Raises:
        SlurmError: sbatch is missing or does not answer.
    """
    output = run_command(
        [command[0], "--test-only", *command[1:]], _SUBMIT_TIMEOUT_SECONDS, build_job_environment()
    )
    return output.sentence if output.code else None


def find_job(job_id: str) -> JobRecord | None:
    """Return the record of a job; None if Slurm does not know it.

    Raises:
        SlurmError: See `find_jobs`.
    """
    return find_jobs([job_id]).get(job_id)


def find_jobs(job_ids: Sequence[str]) -> dict[str, JobRecord]:
    """Return the records of jobs from squeue, else sacct, else scontrol.

    squeue is asked first because it answers everywhere, but it has no exit codes. sacct
    needs accounting, and squeue and scontrol forget a job some minutes after its end
    (MinJobAge). squeue is asked once for all jobs, and so is sacct, unless its version knows
    only JSON; scontrol is asked once for each job that both do not know.

    Several lines for one id (array tasks, components of a heterogeneous job) are reduced to
    one: a running one if there is any, else a pending one.

    Returns:
        id -> record; jobs that no command knows are left out.

    Raises:
        SlurmError: No command answered. If the controller is down, the jobs may still exist.
    """
    records: dict[str, JobRecord] = {}
    error: SlurmError | None = None
    is_any_unknown = False
    for fetch in (_fetch_from_squeue, _fetch_from_sacct, _fetch_from_scontrol):
        # The exit code of an ended job is worth another query.
        missing = [job_id for job_id in job_ids if _is_incomplete(records.get(job_id))]
        if not missing:
            break
        try:
            answer = fetch(missing)
        except SlurmError as slurm_error:
            error = error or slurm_error
            continue
        is_any_unknown = is_any_unknown or not all(answer.get(job_id) for job_id in missing)
        for job_id, candidates in answer.items():
            record = min(candidates, key=_rank_record)
            if job_id not in records or not _is_incomplete(record):
                records[job_id] = record
    if error is not None and not is_any_unknown and len(records) < len(set(job_ids)):
        raise error
    return records


def _is_incomplete(record: JobRecord | None) -> bool:
    """Return whether another command may know more about a job."""
    return record is None or (get_job_state(record.state).ended and record.exit_code is None)


def _rank_record(record: JobRecord) -> int:
    state = get_job_state(record.state)
    return 2 if state.ended else 0 if state.run is RunState.RUNNING else 1


def find_queued_jobs(job_ids: Sequence[str]) -> dict[str, JobRecord]:
    """Return the records of those jobs that wait or run, from one query to squeue.

    Raises:
        SlurmError: squeue did not answer.
    """
    answer = _query_squeue(job_ids) if job_ids else {}
    return {job_id: min(records, key=_rank_record) for job_id, records in answer.items()}


def _fetch_from_squeue(job_ids: Sequence[str]) -> dict[str, list[JobRecord]]:
    # By default squeue leaves out jobs that have ended.
    return _query_squeue(job_ids, "--states=all")


def _query_squeue(job_ids: Sequence[str], *options: str) -> dict[str, list[JobRecord]]:
    output = run_command(
        [
            "squeue",
            "--noheader",
            *options,
            f"--jobs={','.join(job_ids)}",
            f"--format={_SQUEUE_FORMAT}",
        ]
    )
    return _group_by_id(_parse_output(output, parse_squeue), job_ids)


def _fetch_from_sacct(job_ids: Sequence[str]) -> dict[str, list[JobRecord]]:
    output = run_command(
        [
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            f"--jobs={','.join(job_ids)}",
            f"--format={_SACCT_FORMAT}",
        ]
    )
    if not output.code:
        return _group_by_id(parse_sacct(output.out), job_ids)
    # sacct does not know one of the fields; without accounting the JSON query fails too. One job
    # at a time: JSON has another id for each task of an array.
    return _fetch_each(
        job_ids,
        lambda job_id: _parse_output(
            run_command(["sacct", "--json", f"--jobs={job_id}"]), parse_json
        ),
    )


def _fetch_from_scontrol(job_ids: Sequence[str]) -> dict[str, list[JobRecord]]:
    return _fetch_each(
        job_ids,
        lambda job_id: _parse_output(
            run_command(["scontrol", "show", "job", "-o", job_id]), parse_scontrol
        ),
    )


def _fetch_each(
    job_ids: Sequence[str], fetch: Callable[[str], list[JobRecord]]
) -> dict[str, list[JobRecord]]:
    answers = {job_id: fetch(job_id) for job_id in job_ids}
    return {job_id: records for job_id, records in answers.items() if records}


def _group_by_id(
    records: Sequence[JobRecord], job_ids: Sequence[str]
) -> dict[str, list[JobRecord]]:
    """Return the records of each job: 12_3, 12_[4-9] and 12+1 belong to job 12."""
    groups: dict[str, list[JobRecord]] = {}
    for record in records:
        for job_id in {record.job_id, re.split(r"[_+]", record.job_id, maxsplit=1)[0]}:
            if job_id in job_ids:
                groups.setdefault(job_id, []).append(record)
    return groups


def _parse_output(
    output: CommandOutput, parse: Callable[[str], list[JobRecord]]
) -> list[JobRecord]:
    """Return the records in a command's output; an empty list if the job id is not known.

    Raises:
        SlurmError: The command failed for another reason, or its output cannot be parsed.
    """
    if output.code and "invalid job id" in (output.err + output.out).lower():
        return []
    if output.code:
        raise SlurmError(
            f"Slurm did not answer the query: {output.sentence or f'code {output.code}'}"
        )
    try:
        return parse(output.out)
    except ValueError as error:
        raise SlurmError(f"the output of Slurm cannot be parsed: {error}") from error


def cancel(job_ids: Sequence[str], *, pending_only: bool = False) -> None:
    """Cancel jobs, or only those that are pending. scancel itself skips jobs that have ended.

    Raises:
        SlurmError: scancel failed.
    """
    if job_ids:
        output = run_command(["scancel", *(["--state=PENDING"] if pending_only else []), *job_ids])
        if output.code:
            raise SlurmError(f"scancel failed: {output.sentence}")


def get_partition_limit(partition: str | None) -> tuple[str, str] | None:
    """Return (name, MaxTime) of a partition or of the default one; None if it cannot be read.

    MaxTime is in Slurm's format.
    """
    output = run_command(
        ["scontrol", "show", "partition", "-o", *([partition] if partition else [])]
    )
    if output.code:
        return None
    for line in output.out.splitlines():
        pairs = dict(part.split("=", 1) for part in line.split() if "=" in part)
        if partition or pairs.get("Default") == "YES":
            return pairs.get("PartitionName", ""), pairs.get("MaxTime", "UNLIMITED")
    return None


def get_max_array_size() -> int | None:
    """Return the largest number of tasks of a job array; None if it cannot be read.

    Slurm's MaxArraySize is one above the largest index.
    """
    output = run_command(["scontrol", "show", "config"])
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", output.out, re.MULTILINE)
    return int(match[1]) if match and not output.code else None


def list_accounts() -> set[str] | None:
    """Return the accounts that this user may charge; None if there is no accounting."""
    user = os.environ.get("USER") or ""
    output = run_command(
        [
            "sacctmgr",
            "--noheader",
            "--parsable2",
            "show",
            "associations",
            f"user={user}",
            "format=account",
        ]
    )
    # Slurm stores names of accounts in lower case, and site files may have them otherwise.
    names = {line.strip().lower() for line in output.out.splitlines() if line.strip()}
    return names if output.code == 0 and names else None
