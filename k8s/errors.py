"""Errors of requests to a Kubernetes cluster."""

from __future__ import annotations

from lorafleet.jobs.errors import UserError


class ClusterError(UserError):
    """Raised when the API server refuses a request or does not answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        self.status = status
        """The HTTP status; None where there was no answer."""
        super().__init__(message)

    @property
    def is_refused(self) -> bool:
        """Return True if the server refused the request, so that nothing was changed.

        Without an answer, the request may have been carried out.
        """
        return self.status is not None and 400 <= self.status < 500

    @property
    def is_forbidden(self) -> bool:
        """Return True if the user lacks a permission."""
        return self.status == 403


class Conflict(ClusterError):
    """Raised when an object of this name already exists."""
