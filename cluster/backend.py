"""The plug-point of places that run jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorafleet.cluster.remote.transfer import Which
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.plan import Plan
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.schema.job import JobSpec

Say = Callable[[str], None]


def quietly(sentence: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Seen:
    """Where a run is, asked of the place and not of the last thing written."""

    state: RunState
    sentence: str = ""
    """What the place says beside it: why it waits, how it ended, what goes on with it."""
    asked: bool = True
    """Whether the place has said so; else it could not be asked, and this is what was written last."""


class Watch(Protocol):
    """A run that was handed over, for somebody who waits for its end."""

    detaches: bool
    """Whether Ctrl-C leaves the run alone: it is in a queue, and not a child of this process."""
    seen: Seen
    """What the place said last."""

    def poll(self) -> int | None:
        """The driver's exit code once it has ended."""

    def send_signal(self, number: int) -> None:
        """Pass a signal on."""

    def close(self) -> None:
        """Nobody waits any more."""


class RunBackend(Protocol):
    """What can be done with a run that was submitted. All methods return soon: none waits for the job."""

    def resume(self, run: Run) -> None:
        """Submit an unfinished run again."""

    def look(self, run: Run) -> Seen:
        """Return the state of a run."""

    def refresh(self, run: Run, say: Say = quietly) -> None:
        """Download what a run has written since, where its local folder is a record of a remote one."""

    def pull(self, run: Run, which: Which, say: Say) -> int:
        """Download all of a run's record and weights; returns the number of files."""

    def watch(self, run: Run) -> Watch:
        """Return a watch on the run that was submitted last."""

    def cancel(self, run: Run) -> str:
        """Ask a run to save and end; returns a sentence on what happens."""


class Backend(RunBackend, Protocol):
    """A place jobs run."""

    def runs_dir(self, given: Path) -> Path:
        """Where its runs lie, when the user names `given`."""

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Everything that would happen."""

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """(what the place has against a plan, what it could not be asked), a sentence each; nothing is submitted."""

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Write the run's folder and hand it over."""


class Cluster(Backend, Protocol):
    """A place of other machines."""

    def provide(self, job: JobSpec, say: Say) -> str:
        """Bring all that a job names to where its processes look for it; returns a sentence."""

    def provide_asset(self, name: str, say: Say) -> str:
        """Bring an asset there; returns its folder."""

    def examine(self, runs: Path) -> Run:
        """Submit a short job that looks at nodes and writes `findings.json` into its folder."""

    def end_at_once(self, run: Run) -> None:
        """Take a run's jobs away, waiting or running; nothing is saved."""
