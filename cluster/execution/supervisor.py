"""Start the driver of a local run again when it dies of what it trained.

A local driver may train in its own process. If the training hangs, crashes or runs out of
memory there, the driver dies with it. The supervisor is the process of `lorafleet exec`
before any heavy import: it forks the driver, waits for it, and forks another one if the run
can continue. It passes signals on, and ends as the last driver ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.records import FailureRecord
from lorafleet.jobs.runs.run import Run, TrialState

RESTART_STATUS = 99
"""Exit status of a driver whose process must not continue. Only the supervisor sees it."""
STACKS_PREFIX = "exam-stacks-"
"""Beginning of the names of the files for stacks of a hang during an evaluation."""
_CRASH_SIGNALS = (
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
)
_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_END_SECONDS = 5.0
"""Seconds that a driver has to end after a second signal."""
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_LIBC = ctypes.CDLL(None)  # loaded before any fork


class RestartNeeded(Exception):
    """Raised by a driver whose process must not train or evaluate anything else.

    What failed is recorded; the next process continues.
    """


@dataclass(frozen=True)
class Restart:
    """Why a driver is started again by its supervisor."""

    failure: FailureRecord | None
    """Failure that ended the previous driver; None if that driver has recorded it."""


def explain_end(status: int, oom_kills: int) -> Restart | None:
    """Return why the driver must be started again; None if its end is that of the run.

    Args:
        status: Exit code of the driver; negative: minus the signal that ended it.
        oom_kills: Number of processes that the kernel killed meanwhile for lack of memory.
    """
    if status == RESTART_STATUS:
        return Restart(None)
    if status >= 0:
        return None
    number = signal.Signals(-status)
    # The watchdog has written the stacks before its alarm.
    if number == signal.SIGALRM:
        return Restart(
            FailureRecord(
                failure_class="hang", sentence="it hung (no progress for retries.hang_minutes)"
            )
        )
    if number in _CRASH_SIGNALS:
        return Restart(
            FailureRecord(
                failure_class="worker_lost", sentence=f"its process crashed ({number.name})"
            )
        )
    # SIGKILL is also how a user ends a driver for good.
    if number == signal.SIGKILL and oom_kills:
        return Restart(
            FailureRecord(
                failure_class="oom",
                sentence="out of memory: the kernel killed its process; use a smaller "
                "train.per_device_train_batch_size with more accumulation",
            )
        )
    return None


def fork_driver(run: Run, *, trains: bool) -> Restart | None:
    """Fork the driver of a run, and return in its process only.

    The calling process becomes the supervisor: it ends when the last driver has ended, with
    the same exit code or signal.

    Args:
        trains: True if the driver trains itself. Otherwise it only evaluates itself.

    Returns:
        In the driver: why it was started again; None for the first.
    """
    restart: Restart | None = None
    forwarder = _SignalForwarder()
    while True:
        forked_at, oom_kills = time.time(), _count_oom_kills()
        supervisor = os.getpid()
        driver = forwarder.fork()
        if not driver:
            die_with(supervisor)
            return restart
        _, wait_status = os.waitpid(driver, 0)
        forwarder.driver = 0
        status = os.waitstatus_to_exitcode(wait_status)
        restart = explain_end(status, _count_oom_kills() - oom_kills)
        # Each restart costs a trial one of its retries, or an evaluation one of its tries. A
        # driver that dies of anything else would only die again.
        can_continue = (
            status == RESTART_STATUS
            or (trains and (_was_training(run, forked_at) or _was_measuring(run, forked_at)))
            or _was_evaluating(run, forked_at)
        )
        is_stopped = forwarder.last_signal or (run.path / "stop").exists()
        if restart is None or not can_continue or is_stopped:
            _end_like(status)


def _was_training(run: Run, since: float) -> bool:
    """Return whether a driver that started at `since` has left a trial that it trained."""
    return any(
        trial.state is TrialState.RUNNING and (trial.read_status().updated or 0.0) >= since
        for trial in run.list_trials()
    )


def _was_measuring(run: Run, since: float) -> bool:
    """Return whether a driver that started at `since` died while it measured a pack."""
    record = run.read_pack()
    if record is None or record.measuring is None:
        return False
    return (run.path / "pack.json").stat().st_mtime >= since


def _was_evaluating(run: Run, since: float) -> bool:
    """Return whether a driver that started at `since` has left an evaluation without an end."""
    return any(path.stat().st_mtime >= since for path in run.path.rglob(f"{STACKS_PREFIX}*"))


class _SignalForwarder:
    """Passes the signals that this process gets on to the driver that it forked last.

    A second signal means that the driver must end at once. A driver that hangs cannot handle
    it, so it is killed after `_END_SECONDS`.
    """

    def __init__(self) -> None:
        self.driver = 0
        """Process id; 0 while there is no driver."""
        self.last_signal = 0
        """Number of the last signal; 0 if there was none."""
        self._signalled_at = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def fork(self) -> int:
        """Fork. Return the process id of the driver, and 0 in the driver."""
        # Flushed first: otherwise both processes write what is buffered.
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal must not be lost between the fork and the handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED_SIGNALS)
        try:
            self.driver = os.fork()
            if self.driver:
                self._install_handlers()
                if self.last_signal:  # it came after the previous driver had ended
                    os.kill(self.driver, self.last_signal)
            else:
                self._restore_handlers()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED_SIGNALS)
        return self.driver

    def _install_handlers(self) -> None:
        if self._previous_handlers:
            return
        for number in _FORWARDED_SIGNALS:
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN:  # under nohup SIGHUP is ignored: it stays so
                self._previous_handlers[number] = signal.signal(number, self._forward)
        self._previous_handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._kill)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        # The same request may be sent to a process and to its group, and a queue may warn twice.
        is_second = self.last_signal and now - self._signalled_at > 1.0 and number != signal.SIGUSR1
        self.last_signal, self._signalled_at = number, now
        if self.driver:
            self._send(number)
        if is_second:
            signal.setitimer(signal.ITIMER_REAL, _END_SECONDS)

    def _kill(self, _number: int, _frame: FrameType | None) -> None:
        if self.driver:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.driver, number)


def die_with(parent: int) -> None:
    """Ask Linux to send SIGTERM to this process when `parent` dies, so that it saves and ends.

    Runs in a child process, before a driver starts in it.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before prctl took effect
            os._exit(ExitCode.INTERRUPTED)


def _end_like(status: int) -> None:
    """End this process as the driver ended: with its exit code, or by the same signal."""
    if status < 0:
        if -status != signal.SIGKILL:  # it has no handler, and none can be set
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _count_oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory; 0 if unknown."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
