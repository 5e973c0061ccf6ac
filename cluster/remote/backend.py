"""Backends without a shared file system.

Inputs are uploaded before a run, results are downloaded during and after it. The run's local
folder is a record: its plan, its last reported status, and copies of what the run wrote
remotely.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar

from lorafleet.cluster import submitted_runs as registry
from lorafleet.cluster.backend import RunStatus, Say
from lorafleet.cluster.backends import SITE_FILE
from lorafleet.cluster.fetch import fetch_asset, fetch_job
from lorafleet.cluster.remote import staging
from lorafleet.cluster.remote.transfer import (
    Unpacker,
    UploadItem,
    WeightSelection,
    collect_file_stats,
    iterate_frames,
)
from lorafleet.jobs import files
from lorafleet.jobs.data.assets import get_asset
from lorafleet.jobs.errors import CommandFailed, ExitCode, RunError, UserError
from lorafleet.jobs.runs.plan import Plan
from lorafleet.jobs.runs.run import Run, RunState, TrialState
from lorafleet.jobs.runs.trust import record_own_run
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.jobs.sites.ray import RayClusterSite
from lorafleet.jobs.text import format_count

if TYPE_CHECKING:
    from lorafleet.cluster.doctor import Finding


class CommandRunner(Protocol):
    """Runs commands on a machine or container that mounts the storage."""

    def run(
        self, command: list[str], take: Callable[[bytes], object], feed: Iterable[bytes] = ()
    ) -> None:
        """Run a command: `feed` goes to its input, and `take` gets its output.

        Raises:
            UserError: The command fails.
        """


def run_json_command(runner: CommandRunner, command: list[str], request: Any) -> Any:
    """Run a command that reads one line of JSON and prints JSON; return the parsed output.

    Raises:
        UserError: The command fails, or its output is not JSON.
    """
    output = bytearray()
    runner.run(command, output.extend, [json.dumps(request).encode() + b"\n"])
    try:
        return json.loads(output)
    except ValueError as error:
        raise CommandFailed(
            f"{' '.join(command)} printed no answer: {bytes(output[:200])!r}"
        ) from error


def download_record(
    runner: CommandRunner,
    remote_folder: str,
    run: Run,
    weights: WeightSelection = "none",
    *,
    include_wandb: bool = False,
    wait: bool = True,
) -> int:
    """Download the new and changed files of the run in `remote_folder`.

    Only one transfer runs at a time: an older one that ends later would restore outdated
    files. Nothing changes here if the download is cut off.

    Args:
        weights: Which trials' weights to download.
        include_wandb: Download W&B's files too.
        wait: If False, return at once while another transfer is running.

    Returns:
        The number of files.

    Raises:
        UserError: The command fails, or the download is cut off.
    """
    options = ["--weights", weights, *(["--whole"] if include_wandb else [])]
    with files.hold_lock(run.path / ".record", wait=wait) as has_lock:
        if not has_lock:
            return 0
        unpacker = Unpacker(run.path)
        try:
            request = json.dumps(collect_file_stats(run.path)).encode() + b"\n"
            runner.run(
                ["lorafleet", "node", "send", remote_folder, *options],
                unpacker.add_block,
                [request],
            )
            return unpacker.finish()
        finally:
            unpacker.discard()


def download_new_record(runner: CommandRunner, remote_folder: str, folder: Path) -> None:
    """Download the record of a run into a new folder, completely or not at all.

    Raises:
        UserError: The download fails, or the remote folder holds no run.
    """
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        unpacker = Unpacker(scratch, texts=True)
        try:
            runner.run(
                ["lorafleet", "node", "send", remote_folder, "--texts"],
                unpacker.add_block,
                [b"{}\n"],
            )
            unpacker.finish()
        finally:
            unpacker.discard()
        if not (scratch / "plan.json").is_file():
            raise RunError(f"there is no run in {remote_folder} on the storage")
        scratch.chmod(0o700)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def upload_items(runner: CommandRunner, items: Iterable[UploadItem], say: Say) -> None:
    """Upload files and folders to the storage, except those already present. Raises UserError."""
    items = list(items)
    requests = [{"target": item.target, "digest": item.digest} for item in items]
    missing = set(run_json_command(runner, ["lorafleet", "node", "lacks"], requests))
    for item in items:
        if item.target not in missing:
            say(f"{item.source} is there already, as {item.target}")
            continue
        say(f"{item.source} ({item.bytes / 1e6:,.1f} MB) goes to {item.target}")
        kind = ["--file"] if item.source.is_file() else []
        command = ["lorafleet", "node", "receive", item.target, item.digest, *kind]
        runner.run(command, lambda _: None, iterate_frames(item.source))


AwaySite = TypeVar("AwaySite", KubernetesSite, RayClusterSite)


class RemoteBackend(ABC, Generic[AwaySite]):
    """The shared part of all backends without a shared file system."""

    site: AwaySite
    """The settings of its site file."""
    called: str
    """The site's name in messages."""
    mount: str
    """The folder where its machines mount the storage."""
    storage: str
    """A key that distinguishes its storage from that of other sites."""
    internet: bool
    """True if its machines download from the hub themselves."""

    @abstractmethod
    def open_storage(self, say: Say) -> contextlib.AbstractContextManager[CommandRunner]:
        """Open access to the storage: a context manager that yields a command runner.

        Raises:
            UserError: The storage cannot be reached.
        """

    @abstractmethod
    def get_run_folder(self, run: str) -> str:
        """Return the folder of a run as its machines see it."""

    @abstractmethod
    def find_newest_submission(self, run: str) -> int:
        """Return the number of a run's newest submission that the backend knows.

        Raises:
            UserError: The backend cannot be asked.
        """

    def attach(self, name: str, runs: Path, say: Say) -> Run:
        """Create the local record of a run that this machine has none of.

        The run may have been submitted on another machine, or without lorafleet.

        Raises:
            UserError: The storage has no run of this name; nothing is left behind here.
        """
        run = Run(runs.absolute() / name)
        if not name or Path(name).name != name:
            raise RunError(f"RUN is {name!r}, which is no run's id")
        if run.path.exists():
            raise RunError(f"there is a record of {name} already: `lorafleet pull {name}`")
        submission = self.find_newest_submission(name)
        runs.mkdir(parents=True, exist_ok=True)
        with self.open_storage(say) as runner:
            download_new_record(runner, self.get_run_folder(name), run.path)
        record_own_run(run.path)
        nodes = int(files.read_json(run.path / "plan.json").get("nodes") or 1)
        site = {"kind": self.site.kind, "site": self.site.model_dump(mode="json")}
        submission_record = {
            "submission": submission,
            "nodes": nodes,
            "call": "",
            "handed_over": True,
        }
        files.write_json(run.path / SITE_FILE, site | submission_record)
        registry.add(run, self.site.name)
        return run

    def _raise_submission_failure(
        self, run: Run, error: BaseException, *, for_sure: bool
    ) -> NoReturn:
        """Raise the error of a failed submission.

        The run's folder is removed if the cluster surely has no job of it (`for_sure`); else the
        record is kept, because the job may have been accepted.
        """
        if for_sure:
            shutil.rmtree(run.path, ignore_errors=True)
            raise error
        registry.add(run, self.site.name)
        raise RunError(
            f"{error or type(error).__name__}\nWhether the job was taken is not known: `lorafleet "
            f"status {run.id}` "
            f"asks, and `lorafleet resume {run.id}` hands it over if it was not"
        ) from error

    @abstractmethod
    def collect_findings(self) -> list[Finding]:
        """Check that the cluster has everything a job needs.

        Raises:
            UserError: The cluster cannot be reached.
        """

    def check_site(self, runs: Path) -> Run:
        """Check the site and write the findings into a new run's folder."""
        run = Run.create(runs, "doctor")
        try:
            files.write_json(
                run.path / "findings.json",
                {"findings": [finding.to_dict() for finding in self.collect_findings()]},
            )
        except BaseException:
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        return run

    def resolve_runs_dir(self, requested: Path) -> Path:
        """Return the local folder of the records; the runs themselves are on the site's storage."""
        return requested

    @property
    def cache(self) -> str:
        """Return the folder where its machines look for models and data."""
        return f"{self.mount}/cache"

    def apply_remote_paths(self, plan: Plan) -> Plan:
        """Return a plan in which uploaded inputs are named by their path on the storage."""
        remote_paths = staging.map_uploaded_paths(self.storage, plan.job, self.cache)
        return Plan.model_validate_json(
            json.dumps(staging.replace_paths(plan.model_dump(mode="json"), remote_paths))
        )

    def list_invisible_paths(self, job: JobSpec) -> list[str]:
        """Return a message for every path in a job that the site's machines cannot read."""
        return [
            f"{field} is {path}, which {self.called} does not see: `lorafleet fetch JOB.yaml --on "
            "SITE` brings it to "
            "the storage as it is now"
            for field, path in staging.list_local_inputs(job)
            if not self._is_on_storage(path)
        ]

    def list_missing_uploads(self, job: JobSpec) -> list[str]:
        """Return a message about hub models and assets that were never uploaded from here.

        The list is empty if the site's machines have internet access.
        """
        missing = [] if self.internet else staging.list_missing_uploads(self.storage, job)
        if not missing:
            return []
        return [
            f"internet of {self.called} is false, and {', '.join(missing)} was not brought to its "
            "storage from here: "
            "`lorafleet fetch JOB.yaml --on SITE` does so"
        ]

    def upload_inputs(self, job: JobSpec, say: Say) -> str:
        """Upload the inputs of a job to the storage; return a message.

        These are the local files and folders that it names. For machines without internet access
        they include its hub models, data and assets, which are fetched to this machine first.
        """
        items = [
            staging.build_upload_item(path)
            for _, path in staging.list_local_inputs(job)
            if not self._is_on_storage(path)
        ]
        if not self.internet:
            fetch_job(job, say)
            items += staging.list_fetched_items(job)
        if items:
            self._upload(items, say)
        note = (
            "; what it names of the hub and of the assets is fetched there" if self.internet else ""
        )
        return (
            f"{format_count(len(items), 'part')} of it brought to the storage of "
            f"{self.called}{note}"
        )

    def upload_asset(self, name: str, say: Say) -> str:
        """Upload an asset to the storage; return its folder there."""
        item = staging.build_asset_item(fetch_asset(get_asset(name), say))
        self._upload([item], say)
        return f"{self.cache}/{item.target}"

    def _upload(self, items: list[UploadItem], say: Say) -> None:
        with self.open_storage(say) as runner:
            upload_items(runner, items, say)
        staging.record_uploads(self.storage, items)

    def _is_on_storage(self, path: str) -> bool:
        return path.startswith(f"{self.mount}/")


# --- the local record of a run


def read_record(run: Run) -> dict[str, Any]:
    """Return the record of a run: its site at submission, the submission, its last status."""
    return files.read_json(run.path / SITE_FILE)


def update_record(run: Run, submission: int, **values: Any) -> None:
    """Add values to the record of a submission; do nothing if a newer submission exists."""
    path = run.path / SITE_FILE
    with files.hold_lock(run.path / ".site"):
        record = files.read_json(path)
        if record.get("submission") == submission:
            files.write_json(path, record | values)


def record_submission(run: Run, record: dict[str, Any]) -> None:
    """Record a submission before it is made, and set the run to pending.

    The downloaded status of an earlier submission says nothing about this one.
    """
    with files.hold_lock(run.path / ".site"):
        files.write_json(run.path / SITE_FILE, record)
    status = run.read_status()
    files.write_json(run.path / "status.json", status | {"state": RunState.PENDING, "reason": None})


def record_final_state(run: Run, submission: int, status: RunStatus) -> RunStatus:
    """Record how a submission ended, for when the cluster has forgotten it; return the status."""
    update_record(run, submission, last={"state": str(status.state), "sentence": status.sentence})
    return status


def read_last_status(run: Run) -> RunStatus | None:
    """Return the recorded final status of the current submission, or None."""
    last = read_record(run).get("last")
    return RunStatus(RunState(last["state"]), last["sentence"]) if last else None


def infer_unknown_status(run: Run, explanation: str) -> RunStatus:
    """Return the status of a run that the cluster does not know: not yet, or not any more."""
    record, state, reason = read_record(run), run.state, str(run.read_status().get("reason") or "")
    if not record.get("handed_over"):
        return RunStatus(state, "it was not handed over: `lorafleet resume` does so")
    last = read_last_status(run)
    if last:
        return last
    if record.get("stopping") and state is not RunState.FINISHED:
        return RunStatus(RunState.STOPPED, f"it was stopped: `lorafleet resume {run.id}` goes on")
    if state in (RunState.FINISHED, RunState.FAILED, RunState.STOPPED):
        return RunStatus(state, reason)
    message = (
        f"{explanation}; `lorafleet pull {run.id}` brings what is on the storage, "
        "`lorafleet resume` goes on"
    )
    return RunStatus(RunState.FAILED, message)


def compute_exit_code(run: Run, status: RunStatus, driver_code: int | None) -> int:
    """Return the shell's exit code for a run that has ended.

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
        message = f"its record is not here ({error}): `lorafleet pull {run.id}` brings it"
        update_record(
            run, submission, missing=message, tries=int(read_record(run).get("tries") or 0) + 1
        )
    else:
        update_record(run, submission, missing=None, collected=True)


def read_own_state(run: Run) -> tuple[RunState | None, str]:
    """Return (state, reason) as the run itself recorded them.

    Returns (None, reason) if that record could not be downloaded.
    """
    missing = str(read_record(run).get("missing") or "")
    return (None, missing) if missing else (run.state, str(run.read_status().get("reason") or ""))
