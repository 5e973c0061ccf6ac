"""The Python interface: load, plan and submit jobs, and read runs, from a notebook or a script.

`import lorafleet` offers these names. Everything else is private, and may change in any release.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lorafleet.cluster import run_index
from lorafleet.cluster.backend import (
    Backend,
    RunBackend,
    RunStatus,
    Say,
    Watch,
    WeightSelection,
)
from lorafleet.cluster.backend import ignore_message as ignore_progress
from lorafleet.cluster.backends import (
    create_cluster_backend,
    create_local_backend,
    get_backend,
)
from lorafleet.cluster.fetch import fetch_job
from lorafleet.cluster.local_site import detect_site
from lorafleet.cluster.planning.preflight import check_names, load_checked
from lorafleet.evaluation.report.build import build_report
from lorafleet.jobs.data.rows import forget_rows
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.loading.job_file import LoadedJob, load_text
from lorafleet.jobs.loading.site_file import load_site
from lorafleet.jobs.runs.plan import Plan
from lorafleet.jobs.runs.report import Report
from lorafleet.jobs.runs.run import Run, RunState

Overrides = Mapping[str, Any] | Iterable[str]
"""Fields to set: {"train.seed": 7}, or "train.seed=7" as on the command line."""
DEFAULT_RUNS = "runs"
_ACTIVE_STATES = (RunState.PENDING, RunState.RUNNING)


def load_job(job: str | Path | Mapping[str, Any], overrides: Overrides = ()) -> LoadedJob:
    """Load and check a job.

    Model folders need only a config here: weights may be downloaded later.

    Args:
        job: A job file, or the contents of one. Relative paths start at the file's folder;
            for contents, at the working directory.
        overrides: Fields to set after the job was read.

    Raises:
        JobFileError: The job has problems. The error lists all of them.
    """
    settings = _format_overrides(overrides)
    if isinstance(job, Mapping):
        # Contents go through the same reader as a file, so that aliases, hints and the copy in the
        # run folder are the same.
        text = yaml.safe_dump(dict(job), sort_keys=False, allow_unicode=True)
        loaded = load_text(text, Path.cwd() / "job.yaml", settings)
        check_names(loaded, require_weights=False)
        return loaded
    return load_checked(Path(job), settings, require_weights=False)


def _format_overrides(overrides: Overrides) -> tuple[str, ...]:
    if isinstance(overrides, Mapping):
        # JSON is YAML, which the overrides are parsed as: a string stays a string.
        return tuple(f"{name}={json.dumps(value)}" for name, value in overrides.items())
    return tuple(overrides)


def plan(
    job: LoadedJob, command: str | None = None, *, on: str | None = None, nodes: int | None = None
) -> Plan:
    """Return everything that a run of the job would do. Nothing is started.

    Args:
        job: What `load_job` returned.
        command: "sweep", "train" or "compare". By default it follows from the job's blocks.
        on: Name or path of a site file; None means this machine.
        nodes: Number of nodes; None uses the site's default.

    Raises:
        UserError: The job could not start there.
    """
    try:
        return _make_backend(on, nodes).plan(job, command or _choose_command(job))
    finally:
        forget_rows()


def submit(
    job: LoadedJob,
    command: str | None = None,
    *,
    on: str | None = None,
    nodes: int | None = None,
    runs: str | Path = DEFAULT_RUNS,
    progress: Say = ignore_progress,
) -> SubmittedRun:
    """Start a run and return at once.

    On this machine the run is a process of its own: it continues if this process ends. Models and
    data that are missing on this machine are downloaded first.

    Args:
        job: What `load_job` returned.
        command: "sweep", "train" or "compare". By default it follows from the job's blocks.
        on: Name or path of a site file; None means this machine.
        nodes: Number of nodes; None uses the site's default.
        runs: Folder in which the run's folder is created.
        progress: Takes messages about downloads.

    Raises:
        UserError: The job could not start there.
    """
    backend = _make_backend(on, nodes)
    if on is None:
        fetch_job(job.job, progress)
    try:
        job_plan = backend.plan(job, command or _choose_command(job))
        run = backend.submit(job_plan, job, backend.resolve_runs_dir(Path(runs)))
    finally:
        forget_rows()  # waiting for the run needs no rows
    return SubmittedRun(run, backend, backend.watch(run))


def run_here(
    job: LoadedJob,
    command: str | None = None,
    *,
    runs: str | Path = DEFAULT_RUNS,
    on_update: Callable[[Report], object] | None = None,
    progress: Say = ignore_progress,
) -> Report:
    """Run a job on this machine, wait for its end and return its report.

    Args:
        job: What `load_job` returned.
        command: "sweep", "train" or "compare". By default it follows from the job's blocks.
        runs: Folder in which the run's folder is created.
        on_update: Called with the report so far, every few seconds.
        progress: Takes messages about downloads.

    Raises:
        UserError: The job could not start.
        RunError: The run failed or was stopped.
    """
    return submit(job, command, runs=runs, progress=progress).wait(on_update)


def find_run(run: str | Path | None = None, *, runs: str | Path = DEFAULT_RUNS) -> SubmittedRun:
    """Return a run by its id, name or folder; None means the newest.

    Raises:
        RunError: There is no such run.
    """
    found_run = run_index.find_run(Path(runs), None if run is None else str(run))
    return SubmittedRun(found_run, get_backend(found_run))


def _make_backend(on: str | None, nodes: int | None) -> Backend:
    if on is None:
        return create_local_backend(detect_site(nodes))
    site = load_site(on)
    site.check_nodes(nodes)
    return create_cluster_backend(site, nodes)


def _choose_command(job: LoadedJob) -> str:
    if job.job.search is not None:
        return "sweep"
    return "train" if job.job.compare is None else "compare"


class SubmittedRun:
    """A run on this machine or on a cluster.

    `submit` and `find_run` return it. It holds no connection or process: a second object
    for the same run, in another process, works the same.
    """

    def __init__(self, run: Run, backend: RunBackend, watch: Watch | None = None) -> None:
        self._run = run
        self._backend = backend
        # Only while this process waits for a submission of its own. Until the new driver starts,
        # the recorded state is that of the submission before.
        self._watch = watch

    def __repr__(self) -> str:
        """Return the run's id and folder."""
        return f"SubmittedRun({self.id!r}, {str(self.path)!r})"

    @property
    def id(self) -> str:
        """Return the run's id, which every command accepts."""
        return self._run.id

    @property
    def path(self) -> Path:
        """Return the run's folder, or the local record of a run on remote storage."""
        return self._run.path

    def status(self) -> RunStatus:
        """Return the run's status, from its cluster if it has one.

        If the cluster does not answer, the last recorded state is returned, with `fresh` set to
        False.
        """
        return self._backend.status(self._run)

    def report(self) -> Report:
        """Return the report of what the run has so far: trials, baselines, recommendation.

        For a run on remote storage, new files are downloaded first.
        """
        self._backend.refresh(self._run)
        return build_report(self._run)

    def wait(
        self,
        on_update: Callable[[Report], object] | None = None,
        *,
        poll_seconds: float = 2.0,
    ) -> Report:
        """Wait for the run's end and return its report.

        An interrupt (Ctrl-C, or a notebook's stop button) ends the waiting and not the run: call
        `stop` for that.

        Args:
            on_update: Called with the report so far, after every poll.
            poll_seconds: Seconds between two polls.

        Raises:
            RunError: The run failed or was stopped.
        """
        while self._is_active():
            if on_update is not None:
                on_update(self.report())
            time.sleep(poll_seconds)
        status = self.status()
        if status.state is not RunState.FINISHED:
            raise RunError(
                f"{self.id} {status.state}{f': {status.message}' if status.message else ''}; "
                f"`lorafleet logs {self.id}` shows why"
            )
        return self.report()

    def _is_active(self) -> bool:
        if self._watch is None:
            return self.status().state in _ACTIVE_STATES
        if self._watch.poll() is None:
            return True
        self._watch.close()
        self._watch = None
        return False

    def stop(self) -> str:
        """Ask the run to save and end; return a message that says what happens.

        Returns before the run has ended: use `wait` for that.

        Raises:
            RunError: The run is not active.
        """
        return self._backend.cancel(self._run)

    def resume(self) -> None:
        """Continue a run that was stopped or killed.

        Raises:
            RunError: The run is still active.
        """
        self._backend.resume(self._run)
        self._watch = self._backend.watch(self._run)

    def pull(self, weights: WeightSelection = "best", progress: Say = ignore_progress) -> int:
        """Download a remote run's record and weights; return the number of files.

        Raises:
            RunError: The run is on this machine's own disks.
        """
        return self._backend.pull(self._run, weights, progress)
