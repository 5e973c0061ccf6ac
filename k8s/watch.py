"""A run on Kubernetes, for somebody who waits for its end: what its RayJob says, and its record as it grows."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lorafleet.cluster.backend import Seen
from lorafleet.cluster.remote.backend import exit_code, settled, stored, unknown_there, written
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.k8s.states import job_state

if TYPE_CHECKING:
    from lorafleet.k8s.backend import KubernetesBackend

_REFRESH_SECONDS = 10.0
"""Between two looks into the run's folder."""
_WHY_SECONDS = 20.0
"""Between two questions why its pods wait."""
_SECONDS_TO_END = 3.0
"""For a watch's threads, once it is closed."""
_UNSEEN: Any = object()


def seen(run: Run, name: str, job: dict[str, Any] | None, *, queued: bool) -> Seen:
    """Where a run is, from its RayJob (None: there is none) and from what is here of its own record."""
    if job is None:
        return unknown_there(run, f"RayJob {name} is not on the cluster any more, and lorafleet did not take it away")
    state = job_state(job.get("status"), queued=queued)
    if job.get("metadata", {}).get("deletionTimestamp") and not state.ended:
        return Seen(RunState.RUNNING, f"RayJob {name} is being taken away: its trials are saved first")
    if not state.ended:
        return Seen(state.run, f"RayJob {name} {state.sentence}")
    own, reason = written(run)
    if state.run is RunState.FINISHED and own in (RunState.STOPPED, RunState.FAILED):
        return Seen(own, reason)  # for Ray the job has succeeded: there is nothing that another cluster could do
    if state.run is RunState.FINISHED:
        return Seen(state.run, reason)
    if state.run is RunState.FAILED and own is RunState.FAILED and reason:
        return Seen(RunState.FAILED, reason)
    if state.run is RunState.STOPPED:
        return Seen(RunState.STOPPED, f"RayJob {name} {state.sentence}; `lorafleet resume {run.id}` goes on")
    missing = reason if own is None else ""
    return Seen(state.run, "; ".join(filter(None, [f"RayJob {name} {state.sentence}", missing])))


def has_run(job: dict[str, Any] | None) -> bool:
    """Whether a driver began, so that there is something to bring."""
    return ((job or {}).get("status") or {}).get("jobStatus") not in (None, "", "PENDING")


def drivers_code(job: dict[str, Any] | None) -> int | None:
    """What the driver ended with, as Ray told the operator."""
    said = re.search(r"exit code (\d+)", str(((job or {}).get("status") or {}).get("message") or ""))
    return int(said[1]) if said else None


class KubernetesWatch:
    """Two threads: one follows the RayJob, one brings what the run has written since."""

    detaches = True

    def __init__(self, backend: KubernetesBackend, run: Run) -> None:
        self.backend, self.run = backend, run
        self.name = backend.name_of(run)
        self.submission = int(stored(run)["submission"])
        self.seen = Seen(run.state)
        self._job: Any = _UNSEEN
        self._why, self._asked_why = "", -_WHY_SECONDS
        self._trouble = ""
        self._ran = bool(run.trials())
        self._end = threading.Event()
        self._changed = threading.Event()
        self._broken: Exception | None = None
        works = (self._follow, self._refresh)
        self._threads = [threading.Thread(target=self._until_broken, args=(work,), daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads: one that still waits for the network when the process ends may take it down."""
        self._end.set()
        ends = time.monotonic() + _SECONDS_TO_END
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < ends:
            self.backend.client.stop_following()  # not once: a watch that is being opened does not hear it yet
            for thread in self._threads:
                thread.join(0.05)

    def _until_broken(self, work: Callable[[], None]) -> None:
        """What breaks a thread is a fault of ours: `poll` raises it, where somebody sees it."""
        try:
            work()
        except Exception as error:  # the edge of a thread
            self._broken = error

    def _follow(self) -> None:
        self.backend.client.follow(self.name, self._take, self._fail, self._end)

    def _take(self, job: dict[str, Any] | None) -> None:
        self._job, self._trouble = job, ""
        self._changed.set()

    def _fail(self, sentence: str) -> None:
        self._trouble = sentence

    def _refresh(self) -> None:
        while not self._end.wait(_REFRESH_SECONDS):
            if self._job not in (None, _UNSEEN) and self._now().state is RunState.RUNNING:
                with contextlib.suppress(UserError):  # `poll` tells what the cluster says
                    self.backend.peek(self.run, self.submission)

    def _now(self) -> Seen:
        return self.backend.seen(self.run, self._job)

    def poll(self) -> int | None:
        """The driver's exit code once the RayJob has ended or is gone, with the run's record here as it is then."""
        if self._broken is not None:
            raise self._broken
        if self._job is _UNSEEN:
            self.seen = Seen(self.run.state, self._trouble)
            return None
        job, now = self._job, self._now()
        self._ran = self._ran or now.state is RunState.RUNNING
        if now.state in (RunState.PENDING, RunState.RUNNING):
            self.seen = Seen(now.state, self._trouble or now.sentence + self._waits(now.state))
            return None
        self._end.set()
        self.backend.collect(self.run, self.submission, ran=self._ran or has_run(job))
        self.seen = settled(self.run, self.submission, self.backend.seen(self.run, job))
        return exit_code(self.run, self.seen, drivers_code(job))

    def _waits(self, state: RunState) -> str:
        """Why its pods do not start, asked now and then."""
        if state is not RunState.PENDING:
            return ""
        if time.monotonic() - self._asked_why > _WHY_SECONDS or self._changed.is_set():
            self._changed.clear()
            self._asked_why = time.monotonic()
            self._why = self.backend.why(self.run, self._job)
        return f": {self._why}" if self._why else ""

    def send_signal(self, number: int) -> None:
        """A RayJob does not hear this process's signals."""
