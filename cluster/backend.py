"""The plug-point of places that run jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from jobs.load import LoadedJob
from jobs.plan import Plan
from jobs.run import Run, RunState


class Backend(Protocol):
    """A place jobs run. All methods return soon: none waits for the job."""

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Everything that would happen."""

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Write the run's folder and hand it over."""

    def resume(self, run: Run) -> None:
        """Hand an unfinished run over again."""

    def state(self, run: Run) -> RunState:
        """Where it is, asked of the place and not of the last thing written."""

    def cancel(self, run: Run) -> None:
        """Ask it to save and end."""
