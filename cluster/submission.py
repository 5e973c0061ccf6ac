"""The local record of a submitted run: site.json, its writers and its readers.

A submission is recorded before it is made, and the record is completed when the cluster
has accepted it. Whatever is lost in between, `status` and `resume` can find out what
happened. site.json belongs to this side: no download replaces it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from lorafleet.cluster.backend import RunStatus
from lorafleet.jobs import files
from lorafleet.jobs.errors import ExitCode, RunError, UserError, make_disk_full_error
from lorafleet.jobs.runs.run import Run, RunState, TrialState
from lorafleet.jobs.schema.base import Spec

if TYPE_CHECKING:
    from lorafleet.jobs.loading.job_file import LoadedJob
    from lorafleet.jobs.runs.plan import Plan

SITE_FILE = "site.json"
"""File in the folder of a submitted run: the site as it was at submission."""
_SCHEMA_VERSION = 1


class FinalState(Spec):
    """State in which a submission ended. The cluster forgets it after some time."""

    state: RunState
    sentence: str = ""
    """Message beside the state."""


class SubmissionRecord(Spec):
    """Contents of site.json.

    It has the site as it was at submission: the site file may be changed or deleted later,
    and the run must still be found. Change it only with `update_record`.
    """

    schema_version: int = _SCHEMA_VERSION
    """Version of this format. A file without it was written before versions were recorded."""
    kind: Literal["slurm", "kubernetes", "ray"]
    site: dict[str, Any]
    """The site file's contents at submission."""
    nodes: int = 1
    submission: int = 1
    """Number of the submission, from 1. Each `resume` makes a new one."""
    call: str = ""
    """Random mark of the call that submits. A repeated call recognises its own objects by it."""
    handed_over: bool = False
    """True once the cluster has accepted the job."""
    taken_back: bool = True
    """False if objects of a failed submission may still exist on the cluster."""
    stopping: bool = False
    """True once this submission was asked to stop."""
    missing: str | None = None
    """Why the final record could not be downloaded."""
    tries: int = 0
    """Failed downloads of the final record."""
    collected: bool = False
    """True once the final record was downloaded."""
    last: FinalState | None = None

    @property
    def site_name(self) -> str:
        """Return the name of the site."""
        return str(self.site.get("name", ""))

    @property
    def is_remote(self) -> bool:
        """Return whether the run itself is on a storage that this machine cannot read."""
        return self.kind != "slurm"


def find_record(run: Run) -> SubmissionRecord | None:
    """Return the record of a submitted run; None for a run that was started on this machine.

    Raises:
        RunError: The record is damaged, or from a newer version of lorafleet.
    """
    path = run.path / SITE_FILE
    record = files.read_json(path)
    if not record:
        return None
    version = record.get("schema_version", 1)
    if not isinstance(version, int) or version > _SCHEMA_VERSION:
        raise RunError(
            f"{path} has schema_version {version}, and this lorafleet reads versions up to "
            f"{_SCHEMA_VERSION}: use the version of lorafleet that submitted the run"
        )
    try:
        return SubmissionRecord.from_record(record)
    except ValidationError as error:
        from lorafleet.jobs.schema.validation_messages import describe_unreadable_file

        raise RunError(describe_unreadable_file(path, error)) from None


def read_record(run: Run) -> SubmissionRecord:
    """Return the record of a submitted run.

    Raises:
        RunError: There is no record, it is damaged, or it is from a newer version of lorafleet.
    """
    record = find_record(run)
    if record is None:
        raise RunError(f"{run.path / SITE_FILE} does not exist: {run.id} was never submitted")
    return record


def is_remote(run: Run) -> bool:
    """Return whether a run's local folder is only a record of a run on remote storage.

    Raises:
        RunError: The record is damaged, or from a newer version.
    """
    record = find_record(run)
    return record is not None and record.is_remote


def write_record(run: Run, record: SubmissionRecord) -> None:
    """Write the record of a submission."""
    files.write_json(run.path / SITE_FILE, record.model_dump(mode="json", exclude_none=True))


def update_record(run: Run, submission: int, **values: Any) -> None:
    """Change values in the record of a submission; do nothing if a newer submission exists.

    Several processes may watch one run. The lock makes read and write one step, and the
    number keeps a late answer about an old submission out of the new one's record.

    Args:
        submission: Number of the submission that the values are about.
    """
    with files.hold_lock(run.path / ".site"):
        record = find_record(run)
        if record is not None and record.submission == submission:
            write_record(run, record.model_copy(update=values))


def record_submission(run: Run, record: SubmissionRecord) -> None:
    """Record a submission before it is made, and set the run to pending.

    The downloaded status of an earlier submission says nothing about this one.
    """
    # A watch of an earlier submission may be updating the same file.
    with files.hold_lock(run.path / ".site"):
        write_record(run, record)
    status = run.read_status()
    files.write_json(
        run.path / "status.json", status.to_dict() | {"state": RunState.PENDING, "reason": None}
    )


def record_final_state(run: Run, submission: int, status: RunStatus) -> RunStatus:
    """Record how a submission ended, for when the cluster has forgotten it; return the status.

    Slurm forgets jobs after some minutes, and Ray's head node when it restarts.
    """
    final_state = FinalState(state=status.state, sentence=status.message)
    update_record(run, submission, last=final_state)
    return status


def read_last_status(run: Run) -> RunStatus | None:
    """Return the recorded final status of the current submission, or None."""
    last = read_record(run).last
    return RunStatus(last.state, last.sentence) if last else None


def infer_unknown_status(run: Run, explanation: str) -> RunStatus:
    """Return the status of a run that the cluster does not know: not yet, or not any more.

    The order matters: never accepted, then the recorded end, then a stop that was asked
    for, then what the run itself wrote last. Otherwise the run counts as failed.

    Args:
        explanation: Why the cluster does not know it, for the message.
    """
    record, state, reason = read_record(run), run.state, str(run.read_status().reason or "")
    if not record.handed_over:
        return RunStatus(state, "it was not submitted: submit it with `lorafleet resume`")
    if record.last:
        return RunStatus(record.last.state, record.last.sentence)
    if record.stopping and state is not RunState.FINISHED:
        return RunStatus(
            RunState.STOPPED, f"it was stopped: continue it with `lorafleet resume {run.id}`"
        )
    if state in (RunState.FINISHED, RunState.FAILED, RunState.STOPPED):
        return RunStatus(state, reason)
    message = (
        f"{explanation}; `lorafleet pull {run.id}` downloads what is on the storage, `lorafleet "
        "resume` continues the run"
    )
    return RunStatus(RunState.FAILED, message)


def compute_exit_code(run: Run, status: RunStatus, driver_code: int | None) -> int:
    """Return the shell's exit code for a run that has ended.

    The same codes as for a local run. They follow from the recorded states, because a
    cluster passes on only success and failure.

    Args:
        driver_code: The driver's own exit code, if known.
    """
    failed = [trial.state is TrialState.FAILED for trial in run.list_trials()]
    if status.state is RunState.FINISHED:
        return ExitCode.SOME_TRIALS_FAILED if any(failed) else ExitCode.OK
    if status.state is RunState.STOPPED:
        return ExitCode.INTERRUPTED
    if driver_code in frozenset(ExitCode) - {ExitCode.OK}:
        return int(driver_code)
    return ExitCode.SOME_TRIALS_FAILED if failed and all(failed) else ExitCode.OUR_FAULT


@contextlib.contextmanager
def record_if_missing(run: Run, submission: int) -> Iterator[None]:
    """Record the error if a run's record cannot be downloaded.

    The run's final status then shows it.
    """
    try:
        yield
    except UserError as error:
        message = f"its record was not downloaded ({error}): run `lorafleet pull {run.id}`"
        update_record(run, submission, missing=message, tries=read_record(run).tries + 1)
    else:
        update_record(run, submission, missing=None, collected=True)


def read_own_state(run: Run) -> tuple[RunState | None, str]:
    """Return (state, reason) as the run itself recorded them.

    Returns (None, reason) if that record could not be downloaded.
    """
    missing = read_record(run).missing
    return (None, missing) if missing else (run.state, str(run.read_status().reason or ""))


def write_run(plan: Plan, loaded: LoadedJob, runs: Path, share: str = "none") -> Run:
    """Create a new run's folder with all its files, in the pending state.

    Args:
        share: The site's `share` setting, as `make_run_folder` takes it.
    """
    from lorafleet.jobs.loading.job_file import dump_resolved

    run = Run.create(runs, plan.job.name, share)
    try:
        files.write_text(run.path / "job.yaml", loaded.text)
        files.write_text(run.path / "resolved.json", dump_resolved(loaded))
        files.write_json(run.path / "plan.json", plan.model_dump(mode="json"))
    except BaseException as error:
        # A folder without its plan would be no run, and nothing would ever remove it.
        shutil.rmtree(run.path, ignore_errors=True)
        disk_error = make_disk_full_error(error, runs, "run the command again")
        if disk_error is not None:
            raise disk_error from error
        raise
    return run
