"""Read-only access to runs that this user's lorafleet did not create."""

from __future__ import annotations

from typing import NoReturn

from lorafleet.cluster.backend import RunStatus, Say, Watch, WeightSelection, ignore_message
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.runs.trust import format_refusal


class UntrustedBackend:
    """Backend of an untrusted run: reports what its files say and contacts nothing they name.

    `get_backend` returns it for a run that was copied or created by someone else. Its files
    could name any process, queue or cluster, so everything but reading is refused
    (docs/security.md).
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        """Why the run is not trusted."""

    def status(self, run: Run) -> RunStatus:
        """Return the last recorded status. No process, queue or cluster is contacted."""
        return RunStatus(
            run.state,
            f"{self.reason}; its processes and its cluster were not contacted",
            fresh=False,
        )

    def refresh(self, run: Run, say: Say = ignore_message) -> None:
        """Do nothing: a cluster that the run names is not contacted."""

    def resume(self, run: Run) -> None:
        """Raise RunError."""
        self._refuse("resume", run)

    def cancel(self, run: Run) -> str:
        """Raise RunError: the process or job that the run names may belong to another run."""
        self._refuse("stop", run)

    def pull(self, run: Run, weights: WeightSelection, say: Say) -> int:
        """Raise RunError."""
        self._refuse("pull", run)

    def watch(self, run: Run) -> Watch:
        """Raise RunError."""
        self._refuse("resume", run)

    def _refuse(self, command: str, run: Run) -> NoReturn:
        raise RunError(format_refusal(self.reason, command, run.path))
