"""Backends without a shared file system.

Inputs are uploaded before a run, results are downloaded during and after it. The run's local
folder is a record: its plan, its last reported status, and copies of what the run wrote
remotely.
"""

from __future__ import annotations

import contextlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

from lorafleet.cluster import submitted_runs as registry
from lorafleet.cluster.backend import RunStatus, Say
from lorafleet.cluster.fetch import fetch_asset, fetch_job
from lorafleet.cluster.remote import staging
from lorafleet.cluster.remote.place import CommandRunner, download_new_record, upload_items
from lorafleet.cluster.remote.transfer import (
    UploadItem,
)
from lorafleet.cluster.submission import SubmissionRecord, write_record
from lorafleet.jobs import files
from lorafleet.jobs.data.assets import get_asset
from lorafleet.jobs.errors import RunError, UserError
from lorafleet.jobs.runs.plan import Plan
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.runs.trust import record_own_run
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.jobs.sites.ray import RayClusterSite
from lorafleet.jobs.text import format_count

if TYPE_CHECKING:
    from lorafleet.cluster.doctor import Finding
    from lorafleet.jobs.loading.job_file import LoadedJob


AwaySite = TypeVar("AwaySite", KubernetesSite, RayClusterSite)


class RemoteBackend(ABC, Generic[AwaySite]):
    """The shared part of all backends without a shared file system.

    Subclasses set the five attributes and implement the abstract methods. The storage has
    `runs/`, with the runs, and `cache/`, with models, data and uploaded inputs.
    """

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
        # The name becomes part of a path on this machine and on the storage.
        if not name or Path(name).name != name:
            raise RunError(f"RUN is {name!r}, which is not the id of a run")
        if run.path.exists():
            raise RunError(
                f"this machine already has a record of {name}: update it with `lorafleet pull "
                f"{name}`"
            )
        submission = self.find_newest_submission(name)
        runs.mkdir(parents=True, exist_ok=True)
        with self.open_storage(say) as runner:
            download_new_record(runner, self.get_run_folder(name), run.path)
        # The folder was created here, by this user: later commands may act on it.
        record_own_run(run.path)
        nodes = run.read_plan().nodes
        record = SubmissionRecord(
            kind=self.site.kind,
            site=self.site.model_dump(mode="json"),
            nodes=nodes,
            submission=submission,
            handed_over=True,
        )
        write_record(run, record)
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
            f"{error or type(error).__name__}\nIt is not known whether the cluster accepted the "
            f"job. Check with `lorafleet status {run.id}`; `lorafleet resume {run.id}` submits it "
            "if the cluster did not"
        ) from error

    @abstractmethod
    def observe(self, run: Run) -> RunStatus:
        """Return the run's status from the cluster, and record nothing.

        Raises:
            UserError: The cluster does not answer.
        """

    def read_statuses(self, runs: Sequence[Run]) -> list[RunStatus]:
        """Return the statuses of runs.

        A cluster that does not answer is asked once, not once for each run.
        """
        statuses: list[RunStatus] = []
        problem = ""
        for run in runs:
            try:
                if problem:
                    raise RunError(problem)
                statuses.append(self.observe(run))
            except UserError as error:
                problem = str(error)
                statuses.append(RunStatus(run.state, problem, fresh=False, problem=problem))
        return statuses

    @abstractmethod
    def collect_findings(self) -> list[Finding]:
        """Check that the cluster has everything a job needs.

        Raises:
            UserError: The cluster cannot be reached.
        """

    def check_site(self, runs: Path) -> Run:
        """Check the site and write the findings into a new run's folder.

        Unlike on Slurm, the checks are done when it returns.
        """
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

    def submit_probe(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Raise UserError: a probe needs a folder that this machine sees too."""
        raise UserError(
            f"--probe measures on this machine or on a Slurm site, and {self.called} is neither: "
            "leave it out"
        )

    shares_disk = False

    @property
    def site_name(self) -> str:
        """Return the name of the site."""
        return self.site.name

    def describe_run_location(self, run: str, runs: Path) -> str:
        """Return where a run of this name is, for people."""
        return (
            f"{self.get_run_folder(run)} on the storage; its record on this machine in {runs / run}"
        )

    def adopt_caches(self) -> None:
        """Do nothing: the machines of the site have caches of their own."""

    def resolve_runs_dir(self, requested: Path) -> Path:
        """Return the local folder of the records; the runs themselves are on the site's storage."""
        return requested

    @property
    def cache(self) -> str:
        """Return the folder where its machines look for models and data."""
        return f"{self.mount}/cache"

    def apply_remote_paths(self, plan: Plan) -> Plan:
        """Return a plan in which uploaded inputs are named by their path on the storage.

        An input that has changed since its upload keeps its local path, which
        `list_invisible_paths` then reports. Models and data that may be missing on the storage
        are notes of the plan.
        """
        remote_paths = staging.map_uploaded_paths(self.storage, plan.job, self.cache)
        remote: Plan = Plan.from_record(
            staging.replace_paths(plan.model_dump(mode="json"), remote_paths)
        )
        notes = [*remote.notes, *self.list_missing_uploads(plan.job)]
        return remote.model_copy(update={"notes": notes})

    def list_invisible_paths(self, job: JobSpec) -> list[str]:
        """Return a message for every path in a job that the site's machines cannot read.

        Args:
            job: The job of a plan, after `apply_remote_paths`.
        """
        return [
            f"{field} is {path}, which {self.called} cannot read: upload it with `lorafleet fetch "
            "JOB.yaml --on SITE` (again after each change)"
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
            f"internet of {self.called} is false, and {', '.join(missing)} was not uploaded to its "
            "storage from this machine: run `lorafleet fetch JOB.yaml --on SITE`"
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
            "; the hub models, data sets and assets that it names are downloaded by the cluster"
            if self.internet
            else ""
        )
        return f"{format_count(len(items), 'input')} uploaded to the storage of {self.called}{note}"

    def upload_asset(self, name: str, say: Say) -> str:
        """Upload an asset to the storage; return its folder there.

        It is fetched to this machine first, if necessary.
        """
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
