"""Protocols that every backend implements.

A backend plans, submits and watches; it never trains. Commands use only these
protocols, so a new kind of cluster needs no change in them
(docs/development/add-a-backend.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from lorafleet.jobs.runs.run import Run, RunState

if TYPE_CHECKING:
    from lorafleet.jobs.loading.job_file import LoadedJob
    from lorafleet.jobs.runs.plan import Plan
    from lorafleet.jobs.schema.job import JobSpec

Say = Callable[[str], None]
"""Takes progress messages."""
WeightSelection = Literal["none", "best", "all", "exports"]
"""The weights to transfer: of no trial, the best or all; or the models exported from them."""


def ignore_message(message: str) -> None:
    """Ignore a progress message."""


@dataclass(frozen=True)
class RunStatus:
    """The status of a run, as the backend reports it."""

    state: RunState
    message: str = ""
    """Why the run waits, how it ended, or what happens to it now."""
    fresh: bool = True
    """True if the backend just reported this state; False if it was unreachable and this is the
    last recorded state.
    """
    problem: str = ""
    """Why the backend was unreachable."""


class Watch(Protocol):
    """A submitted run, for a caller that waits for its end.

    `RunBackend.watch` returns it. Call `poll` regularly and `close` at the end, also after
    an error: a watch may have a thread or a connection.
    """

    detaches: bool
    """True if Ctrl-C leaves the run alone because it is in a queue and not a child of this
    process.
    """
    status: RunStatus
    """The last status that the backend reported."""

    def poll(self) -> int | None:
        """Return the driver's exit code once it has ended, and None before.

        Never waits; a watch limits by itself how often it asks a cluster. After the end, the
        run's final record is in its local folder.
        """

    def send_signal(self, number: int) -> None:
        """Pass a signal on to the run.

        Does nothing if the run is not a child of this process (`detaches`).
        """

    def close(self) -> None:
        """Stop watching and release what the watch holds."""


class RunBackend(Protocol):
    """The operations on a submitted run. All methods return soon: none waits for the job.

    All of them work from any process and any later shell, from what the run's folder
    records.
    """

    def resume(self, run: Run) -> None:
        """Submit an unfinished run again.

        Raises:
            RunError: The run is still active, or may only be read.
        """

    def status(self, run: Run) -> RunStatus:
        """Return the status of a run.

        Does not raise if the cluster is unreachable: it then returns the last recorded state,
        with `fresh` set to False.
        """

    def refresh(self, run: Run, say: Say = ignore_message) -> None:
        """Download what a run has written since the last call.

        Do nothing if the local folder is the run itself and not a record of a remote one.
        """

    def pull(self, run: Run, weights: WeightSelection, say: Say) -> int:
        """Download a run's whole record and the selected weights; return the number of files.

        Raises:
            RunError: There is nothing to download, because this machine sees the run itself.
        """

    def watch(self, run: Run) -> Watch:
        """Return a watch on the newest submission of a run."""

    def cancel(self, run: Run) -> str:
        """Ask a run to save and end; return a message that says what happens.

        A job that still waits in a queue is removed from it.

        Raises:
            RunError: The run is not active.
        """


class Backend(RunBackend, Protocol):
    """A backend that runs jobs."""

    @property
    def shares_disk(self) -> bool:
        """Return whether its machines read and write this machine's folders."""

    def describe_run_location(self, run: str, runs: Path) -> str:
        """Return where a run of this name is or will be, for people.

        Args:
            run: Id of the run.
            runs: Folder of the runs that the user named.
        """

    def resolve_runs_dir(self, requested: Path) -> Path:
        """Return the backend's folder of runs, when the user names `requested`."""

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Return the plan of everything that would happen.

        Writes nothing and starts nothing.

        Args:
            loaded: A checked job.
            command: `sweep`, `train`, `compare`, `export` or `benchmark`.

        Raises:
            UserError: The job could not start.
        """

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """Check a plan without submitting anything.

        Returns:
            The problems that the backend has with the plan, and what could not be checked; one
                message each.
        """

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Write the run's folder and submit the run.

        Backends of clusters remove the folder again if the cluster surely has no job of it.

        Args:
            plan: What `plan` returned.
            loaded: The job as the user wrote it, for the run's folder.
            runs: What `resolve_runs_dir` returned.

        Raises:
            UserError: The submission failed.
        """


class Cluster(Backend, Protocol):
    """A backend that runs jobs on other machines."""

    @property
    def site_name(self) -> str:
        """Return the name of the site."""

    def adopt_caches(self) -> None:
        """Make this process look for models and data where the machines of the site do.

        Does nothing for sites that do not see this machine's disks.
        """

    def upload_inputs(self, job: JobSpec, say: Say) -> str:
        """Upload everything that a job names to where its processes look for it; return a
        message.
        """

    def upload_asset(self, name: str, say: Say) -> str:
        """Upload an asset; return its folder on the cluster."""

    def attach(self, name: str, runs: Path, say: Say) -> Run:
        """Create the local record of a run that this machine has none of.

        Raises:
            UserError: There is no such run on the storage, or the runs need no record because
                this machine sees their folders.
        """

    def check_site(self, runs: Path) -> Run:
        """Submit a short job that inspects nodes and writes `findings.json` into its folder.

        The caller watches the returned run like any other, and removes its folder.
        """

    def read_statuses(self, runs: Sequence[Run]) -> list[RunStatus]:
        """Return the statuses of several runs of the site, with as few queries as possible.

        Unlike `status`, records nothing. A damaged run is reported as not fresh.
        """

    def submit_probe(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Submit a short job that runs `lorafleet node probe` on one node; return its run.

        The job writes `pace.json` into the run's folder.

        Raises:
            UserError: The submission failed, or the backend has no probe.
        """

    def kill(self, run: Run) -> None:
        """Kill a run's jobs, waiting or running; nothing is saved.

        For jobs that have nothing to save, such as the check of a site. `cancel` is for
        everything else.
        """
