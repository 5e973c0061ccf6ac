"""The Ray backend: submits runs to the job server of a running Ray cluster.

Each submission of a run is one Ray job.
"""

from __future__ import annotations

import contextlib
import functools
import re
import secrets
import shlex
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorafleet.cluster import submitted_runs as registry
from lorafleet.cluster.backend import RunStatus, Say, WeightSelection, ignore_message
from lorafleet.cluster.planning.earlier_runs import read_earlier_trials
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.remote.backend import RemoteBackend
from lorafleet.cluster.remote.place import CommandRunner, download_record
from lorafleet.cluster.submission import (
    SubmissionRecord,
    compute_exit_code,
    find_record,
    infer_unknown_status,
    read_last_status,
    read_own_state,
    read_record,
    record_final_state,
    record_if_missing,
    record_submission,
    update_record,
    write_run,
)
from lorafleet.jobs import files
from lorafleet.jobs.errors import PlacementRefused, RunError, UserError
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.bundle import DOCUMENT, TEXTS, pack
from lorafleet.jobs.runs.plan import Plan
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.schema.environment import OFFLINE
from lorafleet.jobs.sites.base import RaySite
from lorafleet.jobs.sites.ray import RayClusterSite

if TYPE_CHECKING:
    from lorafleet.cluster.doctor import Finding
    from lorafleet.cluster.ray.client import JobCommandRunner, JobInfo, RayJobs

_POLL_SECONDS = 3.0
_MAX_UNKNOWN_POLLS = 3
"""Consecutive polls without a job before it counts as lost: a head that is starting knows no
jobs.
"""
_REFRESH_SECONDS = 30.0
"""Seconds between two downloads of the run's record: each download is a Ray job."""


class RayBackend(RemoteBackend[RayClusterSite]):
    """A backend that submits jobs to the job server of a Ray cluster.

    Every access to the storage is a short Ray job, so it costs seconds. The cluster's
    machines are shared with other jobs and are what they are: `--nodes` is refused.

    Args:
        nodes: Must be None.

    Raises:
        PlacementRefused: `nodes` is set.
    """

    def __init__(self, site: RayClusterSite, nodes: int | None = None) -> None:
        if nodes is not None:
            raise PlacementRefused(
                f"--nodes is {nodes}, but jobs on site {site.name} use all machines of its Ray "
                "cluster: leave out --nodes"
            )
        self.site = site
        self.called = f"site {site.name}"
        self.mount = site.storage
        self.storage = f"{site.address} {site.storage}"
        self.internet = site.internet

    @classmethod
    def from_record(cls, record: SubmissionRecord) -> RayBackend:
        """Return the backend of a submitted run, with the site as it was then."""
        return cls(RayClusterSite.from_record(record.site))

    @functools.cached_property
    def jobs(self) -> RayJobs:
        """Return the client of the job server. Raises RayUnreachable."""
        from lorafleet.cluster.ray.client import RayJobs

        return RayJobs(self.site.address)

    @contextlib.contextmanager
    def open_storage(self, say: Say) -> Iterator[CommandRunner]:
        """Open access to the storage; each command runs as a short Ray job."""
        yield self._build_runner()

    def _build_runner(self) -> JobCommandRunner:
        from lorafleet.cluster.ray.client import JobCommandRunner

        return JobCommandRunner(self.jobs, self._build_environment())

    def _build_environment(self) -> dict[str, str]:
        variables = {"LORAFLEET_CACHE": self.cache, "HF_HUB_CACHE": f"{self.cache}/hub"}
        variables |= {"LORAFLEET_TRUSTED_FOLDERS": self.mount, "TOKENIZERS_PARALLELISM": "false"}
        return variables | ({} if self.internet else OFFLINE) | self.site.environment

    # --- before a run

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Return the plan of everything that would happen on the machines that the cluster has now.

        Raises:
            UserError: The job could not start.
        """
        remote_site = RaySite(
            address=self.site.address,
            nodes=self.jobs.get_nodes(),
            gpu_memory_gib=self.site.gpu_memory_gb * 1e9 / 2**30,
        )
        plan = self.apply_remote_paths(
            make_plan(
                loaded,
                remote_site,
                command,
                self.site.allow_environment,
                read_earlier_trials(loaded.job.model.model_name_or_path, self.site.name),
            )
        )
        line = shlex.join(self._build_entrypoint("RUN"))
        return plan.model_copy(
            update={
                "site": self.site.name,
                "command_line": f"ray job submit --address {self.site.address} -- {line}",
            }
        )

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """Check the job against the cluster.

        Returns:
            The problems, and what could not be checked; one message each.
        """
        return self.list_invisible_paths(plan.job), []

    def _build_entrypoint(self, run: str) -> list[str]:
        assignments = [f"{name}={value}" for name, value in self._build_environment().items()]
        return [
            "env",
            *assignments,
            "lorafleet",
            "exec",
            self.get_run_folder(run),
            "--job",
            DOCUMENT,
        ]

    def get_run_folder(self, run: str) -> str:
        """Return the folder of a run as the machines see it."""
        return f"{self.mount}/runs/{run}"

    def find_newest_submission(self, run: str) -> int:
        """Return the number of a run's newest submission; 1 if Ray has forgotten all of them.

        A restarted head node forgets its jobs; their record on the storage remains.
        """
        numbers = [
            name.removeprefix(f"{run}-")
            for name in self.jobs.list_names()
            if name.startswith(f"{run}-")
        ]
        return max((int(number) for number in numbers if number.isdigit()), default=1)

    # --- submission

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Create the run's local record and submit the job.

        Raises:
            UserError: The submission failed; nothing is left behind, unless the job may have been
                accepted.
        """
        problems = self.list_invisible_paths(plan.job)
        if problems:
            raise PlacementRefused("\n".join(problems))
        run = write_run(plan, loaded, runs)
        try:
            self._submit_job(run, 1)
        # Also an interrupt: the job may have been accepted.
        except BaseException as error:  # noqa: BLE001
            self._raise_submission_failure(run, error, for_sure=self._is_surely_unsubmitted(run))
        registry.add(run, self.site.name)
        return run

    def _is_surely_unsubmitted(self, run: Run) -> bool:
        """Return whether the cluster surely has no job of the run."""
        try:
            return find_record(run) is None or self.jobs.get_info(self.get_job_name(run)) is None
        except UserError:
            return False

    def _submit_job(self, run: Run, submission: int, call: str = "") -> None:
        # Recorded before the request: a job with this mark is ours, even if the response is lost.
        call = call or secrets.token_hex(8)
        record = SubmissionRecord(
            kind=self.site.kind,
            site=self.site.model_dump(mode="json"),
            submission=submission,
            call=call,
        )
        record_submission(run, record)
        texts = {name: (run.path / name).read_text() for name in TEXTS}
        name = self.get_job_name(run)
        # Ray uploads the folder as the job's working directory.
        with tempfile.TemporaryDirectory(prefix="lorafleet-") as folder:
            for file, text in pack(str(run.read_status().name), texts, submission).items():
                (Path(folder) / file).write_text(text)
            line, metadata = (
                shlex.join(self._build_entrypoint(run.id)),
                {"run": run.id, "call": call},
            )
            try:
                self.jobs.submit(name, line, Path(folder), metadata)
            except UserError:
                info = self.jobs.get_info(
                    name
                )  # the job may exist: the first response may have been lost
                if info is None or info.metadata.get("call") != call:
                    raise
        update_record(run, submission, handed_over=True)

    def resume(self, run: Run) -> None:
        """Submit an unfinished run again, as a new job.

        Raises:
            RunError: A job of the run is still active.
        """
        record, info = read_record(run), self.jobs.get_info(self.get_job_name(run))
        if info is not None and not info.ended:
            raise RunError(
                f"{run.id} already has job {self.get_job_name(run)}, which is {info.status}"
            )
        if record.handed_over or info is not None:
            return self._submit_job(run, record.submission + 1)
        # The same submission again, under the same name and with the same mark: if the first
        # request was accepted after all, its job is recognised.
        return self._submit_job(run, record.submission, record.call)

    # --- during a run

    def get_job_name(self, run: Run) -> str:
        """Return the submission id of the run's newest job."""
        return f"{run.id}-{read_record(run).submission}"

    def status(self, run: Run) -> RunStatus:
        """Return the run's status from the cluster.

        Returns the last recorded status if the cluster does not answer.
        """
        try:
            info = self.jobs.get_info(self.get_job_name(run))
        except UserError as error:
            return read_last_status(run) or RunStatus(
                run.state, f"{error}; the last recorded state is {run.state}", fresh=False
            )
        status = derive_status(run, self.get_job_name(run), info)
        return (
            record_final_state(run, read_record(run).submission, status)
            if info is not None and info.ended
            else status
        )

    def observe(self, run: Run) -> RunStatus:
        """Return the run's status from the cluster, and record nothing.

        Raises RayUnreachable.
        """
        name = self.get_job_name(run)
        return derive_status(run, name, self.jobs.get_info(name))

    def refresh(self, run: Run, say: Say = ignore_message) -> None:
        """Download what the run has written since the last call.

        The driver's output is downloaded too if its own log is not here.
        """
        with contextlib.suppress(UserError):
            download_record(self._build_runner(), self.get_run_folder(run.id), run, wait=False)
        self._save_driver_output(run)

    def _save_driver_output(self, run: Run) -> None:
        with contextlib.suppress(UserError):
            if not (run.path / "logs" / "driver.log").is_file():
                output = self.jobs.read_output(self.get_job_name(run))
                if output:
                    files.write_text(run.path / "logs" / "submitter.log", output)

    def collect(self, run: Run, submission: int) -> None:
        """Download the record of a submission that has ended; a failure is recorded.

        Does not raise if the cluster is unreachable: `pull` can be repeated later.

        Args:
            submission: Number of the submission that has ended.
        """
        with record_if_missing(run, submission):
            download_record(self._build_runner(), self.get_run_folder(run.id), run)
        self._save_driver_output(run)

    def pull(self, run: Run, weights: WeightSelection, say: Say) -> int:
        """Download a run's record, W&B's files and the selected weights; return the number of
        files.
        """
        count = download_record(
            self._build_runner(), self.get_run_folder(run.id), run, weights, include_wandb=True
        )
        update_record(run, read_record(run).submission, missing=None, collected=True)
        return count

    def watch(self, run: Run) -> RayWatch:
        """Return a watch that queries the run's job every few seconds."""
        return RayWatch(self, run)

    def cancel(self, run: Run) -> str:
        """Ask the run to save and end; stop its job if the driver has not started.

        Raises:
            RunError: The run has no job that waits or runs.
        """
        name, info = self.get_job_name(run), self.jobs.get_info(self.get_job_name(run))
        if info is None or info.ended:
            raise RunError(
                f"{run.id} has no pending or running job: it is {self.status(run).state}"
            )
        update_record(run, read_record(run).submission, stopping=True)
        if (
            info.status == "RUNNING"
        ):  # not Ray's own stop, which gives a job only three seconds to save
            self._build_runner().run(
                ["lorafleet", "node", "stop", self.get_run_folder(run.id)], lambda _: None
            )
            return (
                f"{run.id} is saving its trials and will stop (job {name}); continue it with "
                f"`lorafleet resume {run.id}`"
            )
        self.jobs.stop(name)
        return (
            f"{run.id} was cancelled before it started; `lorafleet resume {run.id}` submits it "
            "again"
        )

    def kill(self, run: Run) -> None:
        """Stop the run's job; nothing is saved."""
        self.jobs.stop(self.get_job_name(run))

    def collect_findings(self) -> list[Finding]:
        """Check that the cluster has what a job needs, and run a short job."""
        from lorafleet.cluster.ray.doctor import collect_findings

        return collect_findings(self.site, self.jobs, self._build_runner())


def derive_status(run: Run, name: str, job: JobInfo | None) -> RunStatus:
    """Return the status of a run from its Ray job (None: Ray knows none) and the local record.

    Contacts nothing. Of an ended job, the run's own record says more than Ray: Ray knows
    only success and failure.

    Args:
        name: Name of the job, for messages.
    """
    if job is None:
        return infer_unknown_status(
            run, f"Ray does not know job {name} any more (a restarted head node forgets its jobs)"
        )
    if job.status == "PENDING":
        wait_reason = job.message.partition(".")[0]
        return RunStatus(
            RunState.PENDING, f"job {name} is pending" + (f": {wait_reason}" if wait_reason else "")
        )
    if job.status == "RUNNING":
        return RunStatus(RunState.RUNNING, f"job {name} is running")
    own_state, reason = read_own_state(run)
    if job.status == "SUCCEEDED":
        return RunStatus(
            own_state if own_state in (RunState.STOPPED, RunState.FAILED) else RunState.FINISHED,
            reason,
        )
    if job.status == "STOPPED" or own_state is RunState.STOPPED:
        return RunStatus(
            RunState.STOPPED,
            f"job {name} was stopped; continue it with `lorafleet resume {run.id}`",
        )
    message = reason if own_state is RunState.FAILED else ""
    message = message or f"job {name} failed: {' '.join(job.message.split())[:300]}"
    return RunStatus(
        RunState.FAILED, "; ".join(filter(None, [message, reason if own_state is None else ""]))
    )


class RayWatch:
    """A watch on a job of a Ray cluster; a thread downloads what the run writes.

    `poll` asks the job server at most every 3 seconds. A cluster that does not answer is
    not the end of the run.
    """

    detaches = True

    def __init__(self, backend: RayBackend, run: Run) -> None:
        self.backend, self.run = backend, run
        self.name = backend.get_job_name(run)
        self.submission = read_record(run).submission
        self.status = RunStatus(run.state)
        self._unknown = 0
        self._looked_at = -_POLL_SECONDS
        self._end = threading.Event()
        threading.Thread(target=self._refresh, daemon=True, name=f"refresh {run.id}").start()

    def _refresh(self) -> None:
        while not self._end.wait(_REFRESH_SECONDS):
            # While the job is pending there is nothing to download.
            if self.status.state is RunState.RUNNING:
                self.backend.refresh(self.run)

    def poll(self) -> int | None:
        """Return the driver's exit code once the job has ended.

        The run's final record has been downloaded by then.
        """
        if time.monotonic() - self._looked_at < _POLL_SECONDS:
            return None
        self._looked_at = time.monotonic()
        try:
            job = self.backend.jobs.get_info(self.name)
        except UserError as error:
            self.status = RunStatus(self.status.state, str(error))
            return None
        self._unknown = self._unknown + 1 if job is None else 0
        status = derive_status(self.run, self.name, job)
        if (
            status.state in (RunState.PENDING, RunState.RUNNING)
            or 0 < self._unknown < _MAX_UNKNOWN_POLLS
        ):
            self.status = status
            return None
        # The thread first: no other download may begin beside the final one.
        self._end.set()
        self.backend.collect(self.run, self.submission)
        self.status = record_final_state(
            self.run, self.submission, derive_status(self.run, self.name, job)
        )
        code = job.code if job is not None else None
        if code is None and job is not None:
            # The exit code may be in the message only.
            match = re.search(r"exit code (\d+)", job.message)
            code = int(match[1]) if match else None
        return compute_exit_code(self.run, self.status, code)

    def send_signal(self, number: int) -> None:
        """Do nothing: a remote job does not receive this process's signals."""

    def close(self) -> None:
        """End the thread."""
        self._end.set()
