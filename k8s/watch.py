"""Watches a run on Kubernetes: follows its RayJob and downloads its record while it grows."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from lorafleet.cluster.backend import RunStatus
from lorafleet.cluster.submission import (
    compute_exit_code,
    read_record,
    record_final_state,
)
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.k8s.connections import Connections
from lorafleet.k8s.job_status import JobStatusReader
from lorafleet.k8s.record_sync import RecordSync

_REFRESH_SECONDS = 10.0
"""Seconds between two downloads of the run's record."""
_EXPLAIN_SECONDS = 20.0
"""Seconds between two queries why the run's pods wait."""
_CLOSE_TIMEOUT_SECONDS = 3.0
"""Seconds that a closed watch waits for its threads to end."""
_UNKNOWN_JOB: Any = object()


def has_started_driver(job: dict[str, Any] | None) -> bool:
    """Return whether a driver started, so that there is something to download.

    Before that the storage has no folder of the run, and starting a storage pod would be in
    vain.
    """
    return ((job or {}).get("status") or {}).get("jobStatus") not in (None, "", "PENDING")


def get_driver_exit_code(job: dict[str, Any] | None) -> int | None:
    """Return the driver's exit code as Ray reported it to the operator, or None.

    No field has it: it is part of a message such as `Job entrypoint command failed with
    exit code 2`.
    """
    match = re.search(
        r"exit code (\d+)", str(((job or {}).get("status") or {}).get("message") or "")
    )
    return int(match[1]) if match else None


class KubernetesWatch:
    """A watch with two threads: one follows the RayJob, one downloads what the run writes.

    The threads start with the object and end with `close`, or when `poll` has seen the end
    of the job. They only store what they learn: `poll`, in the caller's thread, derives the
    status and raises their exceptions.
    """

    detaches = True

    def __init__(
        self, run: Run, connections: Connections, job_status: JobStatusReader, sync: RecordSync
    ) -> None:
        self.run = run
        self.connections, self.job_status, self.sync = connections, job_status, sync
        self.name = job_status.get_object_name(run)
        self.submission = read_record(run).submission
        self.status = RunStatus(run.state)
        self._job: Any = _UNKNOWN_JOB
        self._why, self._asked_why = "", -_EXPLAIN_SECONDS
        self._trouble = ""
        # Trials in the record prove that a driver ran, even if this watch sees only the end.
        self._ran = bool(run.list_trials())
        self._end = threading.Event()
        self._changed = threading.Event()
        self._broken: Exception | None = None
        tasks = (self._follow_job, self._refresh)
        self._threads = [
            threading.Thread(target=self._run_and_record_failure, args=(task,), daemon=True)
            for task in tasks
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads.

        A thread that still waits for the network when the process exits may crash the process.
        """
        self._end.set()
        deadline = time.monotonic() + _CLOSE_TIMEOUT_SECONDS
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < deadline:
            # Repeated: a watch that is just being opened misses the first call.
            self.connections.client.stop_following()
            for thread in self._threads:
                thread.join(0.05)

    def _run_and_record_failure(self, task: Callable[[], None]) -> None:
        """Run a thread's work and keep its exception: `poll` raises it where the user sees it."""
        try:
            task()
        # The boundary of a thread: `poll` raises it again.
        except Exception as error:  # noqa: BLE001
            self._broken = error

    def _follow_job(self) -> None:
        self.connections.client.follow(self.name, self._update_job, self._record_failure, self._end)

    def _update_job(self, job: dict[str, Any] | None) -> None:
        self._job, self._trouble = job, ""
        self._changed.set()

    def _record_failure(self, message: str) -> None:
        self._trouble = message

    def _refresh(self) -> None:
        while not self._end.wait(_REFRESH_SECONDS):
            if (
                self._job not in (None, _UNKNOWN_JOB)
                and self._get_status().state is RunState.RUNNING
            ):
                with contextlib.suppress(UserError):  # `poll` reports the cluster's errors
                    self.sync.download_from_head(self.run, self.submission)

    def _get_status(self) -> RunStatus:
        return self.job_status.derive(self.run, self._job)

    def poll(self) -> int | None:
        """Return the driver's exit code once the RayJob has ended or is gone.

        The run's final record has been downloaded by then.
        """
        if self._broken is not None:
            raise self._broken
        if self._job is _UNKNOWN_JOB:
            self.status = RunStatus(self.run.state, self._trouble)
            return None
        job, status = self._job, self._get_status()
        self._ran = self._ran or status.state is RunState.RUNNING
        if status.state in (RunState.PENDING, RunState.RUNNING):
            self.status = RunStatus(
                status.state, self._trouble or status.message + self._describe_wait(status.state)
            )
            return None
        # No further refresh: one transfer at a time writes the record, and this one is the last.
        self._end.set()
        self.sync.collect(self.run, self.submission, ran=self._ran or has_started_driver(job))
        self.status = record_final_state(
            self.run, self.submission, self.job_status.derive(self.run, job)
        )
        return compute_exit_code(self.run, self.status, get_driver_exit_code(job))

    def _describe_wait(self, state: RunState) -> str:
        """Return why the run's pods do not start, queried from time to time."""
        if state is not RunState.PENDING:
            return ""
        if time.monotonic() - self._asked_why > _EXPLAIN_SECONDS or self._changed.is_set():
            self._changed.clear()
            self._asked_why = time.monotonic()
            self._why = self.job_status.explain_pending(self.run, self._job)
        return f": {self._why}" if self._why else ""

    def send_signal(self, number: int) -> None:
        """Do nothing: a RayJob does not receive this process's signals."""
