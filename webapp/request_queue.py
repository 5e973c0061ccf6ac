"""Limit how many requests of a server run and how many wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lorafleet.webapp.request_models import RequestRefused


@dataclass(frozen=True)
class Limits:
    """Limits of one server."""

    body_kb: int = 256
    """Largest size of a request in KB. Default: 256."""
    new_tokens: int = 512
    """Largest number of tokens in an answer. Default: 512."""
    at_once: int = 1
    """Number of answers that are generated at the same time. Default: 1."""
    waiting: int = 8
    """Number of requests that may wait for their turn. Further ones get status 429. Default:
    8.
    """


class TurnQueue:
    """Limits how many requests run and how many wait.

    Two semaphores: one for turns, one for places in the whole queue. Waiting requests hold
    a thread of the server's pool, so their number must be limited; further ones are refused
    at once.
    """

    def __init__(self, limits: Limits) -> None:
        self.free = threading.Semaphore(limits.at_once)
        self.places = threading.Semaphore(limits.at_once + limits.waiting)

    @contextmanager
    def take_turn(self, gone: threading.Event) -> Iterator[None]:
        """Wait for a turn and hold it while the block runs.

        Args:
            gone: Event that is set when the client leaves.

        Raises:
            RequestRefused: Too many requests wait (429), or the client leaves meanwhile (499).
        """
        if not self.places.acquire(blocking=False):
            raise RequestRefused("too many requests are waiting: try again soon", 429)
        try:
            # A client that leaves while it waits must give its place back, so the wait is
            # interrupted now and then.
            while not self.free.acquire(timeout=_POLL_SECONDS):
                check_connected(gone)
            try:
                yield
            finally:
                self.free.release()
        finally:
            self.places.release()


_POLL_SECONDS = 0.2
"""Seconds between two checks whether the client of a waiting request is still connected."""


def check_connected(gone: threading.Event) -> None:
    """Raise RequestRefused if the client has left, so that its turn is released.

    Status 499 is nginx's code for it. Nobody receives it.
    """
    if gone.is_set():
        raise RequestRefused("the client closed the connection", 499)
