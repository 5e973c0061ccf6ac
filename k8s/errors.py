"""What can go wrong between this machine and a cluster."""

from __future__ import annotations

from lorafleet.jobs.errors import UserError


class ClusterError(UserError):
    """The API server refused something, or does not answer."""

    def __init__(self, sentence: str, status: int | None = None) -> None:
        self.status = status
        """The HTTP status; None where there was no answer."""
        super().__init__(sentence)

    @property
    def refused(self) -> bool:
        """Whether the server has said no, so that nothing was done: no answer at all leaves it open."""
        return self.status is not None and 400 <= self.status < 500

    @property
    def forbidden(self) -> bool:
        """Whether a right is missing."""
        return self.status == 403


class Conflict(ClusterError):
    """There is an object of this name already."""
