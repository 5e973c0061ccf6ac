"""A run folder that this user's lorafleet has not made: it is read, and nothing that it names is asked or touched."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from cluster.backend import Say, Seen, Watch, quietly
from cluster.transfer import Which
from jobs.errors import RunError
from jobs.load import LoadedJob
from jobs.plan import Plan
from jobs.run import Run
from jobs.trust import what_runs


class Stranger:
    """The place of such a run: what its files say last is all that is known of it."""

    def __init__(self, why: str) -> None:
        self.why = why

    def look(self, run: Run) -> Seen:
        """Its state as it was written. Its processes, its queue and its cluster are not asked."""
        return Seen(run.state, f"{self.why}; nobody was asked", asked=False)

    def refresh(self, run: Run, say: Say = quietly) -> None:
        """Nothing: where it lies elsewhere, that place is not asked."""

    def resume(self, run: Run) -> None:
        """Raises RunError."""
        self._refuse("resume", run)

    def cancel(self, run: Run) -> str:
        """Raises RunError: a process or a job that it names may be another's."""
        self._refuse("stop", run)

    def pull(self, run: Run, which: Which, say: Say) -> int:
        """Raises RunError."""
        self._refuse("pull", run)

    def watch(self, run: Run) -> Watch:
        """Raises RunError."""
        self._refuse("resume", run)

    def _refuse(self, command: str, run: Run) -> NoReturn:
        raise RunError(
            f"{self.why}. `{command}` would act on what it says: {'; '.join(what_runs(run.path))}. Look into it first; "
            "--trust goes on (docs/security.md)"
        )

    def runs_dir(self, given: Path) -> Path:
        """Nothing is submitted here."""
        raise NotImplementedError

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Nothing is submitted here."""
        raise NotImplementedError

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """Nothing is submitted here."""
        raise NotImplementedError

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Nothing is submitted here."""
        raise NotImplementedError
