"""The base of every driver of a run: its lease, its signal handling, and a recorded end.

Runs as `lorafleet exec RUN` in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafleet.cluster.execution.allocation import (
    compute_progress_digest,
    get_allocation,
    make_attempt_record,
    record_restart,
)
from lorafleet.cluster.execution.supervisor import RESTART_STATUS, Restart, RestartNeeded
from lorafleet.jobs import files
from lorafleet.jobs.errors import DiskFull, ExitCode, LorafleetError, RunError, make_disk_full_error
from lorafleet.jobs.runs.bundle import SUBMISSION
from lorafleet.jobs.runs.events import AttemptEvent
from lorafleet.jobs.runs.lease import Lease, StaleAttempt
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.placement import Placement

_RECORD_SECONDS = 10.0
_REPEATED_SIGNAL_SECONDS = 1.0
"""A second signal within this many seconds counts as a repetition of the first."""


class Driver(ABC):
    """One attempt at a run.

    `lorafleet exec` creates it from the run's folder alone and calls `execute`, in a
    process of its own. Subclasses implement `_run_attempt`: search, comparison, or
    delivery. The driver is the only writer of the run's record while it has the lease.

    Args:
        run: The run's folder, with plan.json.
        restart: Why the supervisor of this process has started it again; None for the first
            driver of a command.

    Raises:
        RunError: The folder has no plan.
    """

    def __init__(self, run: Run, restart: Restart | None = None) -> None:
        self.restart = restart
        self.plan = run.read_plan()
        if self.plan.is_empty:
            raise RunError(
                f"{run.path} has no plan.json: it is not a run's folder, or the submission was not "
                "completed. Submit the job again"
            )
        self.run = run
        self.job = JobSpec.from_record(self.plan.job)
        self.placement = Placement.model_validate(self.plan.placement)
        self.began = self.noted = time.time()
        self.earlier_seconds = float(run.read_status().wall_seconds or 0.0)
        self.stop_signal: signal.Signals | None = None  # the signal that asked the run to end
        self.stop_signal_at = 0.0
        self.disk_full: str | None = None

    @abstractmethod
    def _run_attempt(self, attempt: int) -> ExitCode:
        """Do what is left of the run and return its exit code.

        Called with the lease held and signal handlers installed. It must check `stop_file`
        often, and end soon when the file exists.

        Args:
            attempt: Number of this attempt, from 1.
        """

    def _prepare_attempt(self) -> None:
        """Prepare the attempt, before the results of earlier attempts are read.

        Raises:
            RunError: The job was restarted too often without saving anything new.
        """
        record_restart(self.run)

    @property
    def stop_file(self) -> Path:
        """Return the path of the stop file, which asks every process of the run to save and end."""
        return self.run.path / "stop"

    def execute(self) -> int:
        """Do what is left of the run, and record how it ended.

        Changes the environment of this process for good.

        Returns:
            The exit code of the process. RESTART_STATUS asks the supervisor for another one.

        Raises:
            HasDriver: Another driver has the run.
            StaleAttempt: A newer attempt took the run; nothing may be written any more.
            DiskFull: The disk is full.
            LorafleetError: The run failed; its state says so.
        """
        # `share: group` was set when the folder was created: the group may read what this process
        # writes.
        if self.run.path.stat().st_mode & 0o040:
            files.share_with_group()
        os.environ.update(self.job.environment)  # before the threads and the libraries that read it
        progress = compute_progress_digest(self.run)
        number = files.read_json(self.run.path / SUBMISSION).get("number", 1)
        submission = number if type(number) is int else 1  # the file may be damaged
        metadata = make_attempt_record(submission, progress)
        try:
            lease = Lease.acquire(self.run.path, metadata, say=log)
        except OSError as error:
            raise make_disk_full_error(error, self.run.path) or error from error
        try:
            self.run = dataclasses.replace(self.run, attempt=lease.attempt)
            lease.start_heartbeat(_exit_immediately)
            return self._execute_with_lease(lease.attempt)
        finally:
            lease.release()

    def _execute_with_lease(self, attempt: int) -> int:
        if self.stop_file.is_file() and not self.stop_file.read_text():
            # Empty: from a signal, which has been handled; a user's request stays until `resume`.
            self.stop_file.unlink()
        # A file that is deleted when the disk is full, so that the last state can still be written.
        self.run.create_reserve()
        self.run.mark_running(reason=None)
        self.run.add_event(AttemptEvent(number=attempt))
        log(f"attempt {attempt} of {self.run.id} on {os.uname().nodename} (process {os.getpid()})")
        with self._catch_signals():
            try:
                self._prepare_attempt()
                self.earlier_seconds = float(self.run.read_status().wall_seconds or 0.0)
                outcome = self._run_attempt(attempt)
            # Another attempt has the run: not even its state may be changed.
            except StaleAttempt:
                raise
            # The state stays `running`: the next process continues at once.
            except RestartNeeded as error:
                if self.stop_file.exists():  # nothing is left to save, so the run may end here
                    self.run.set_state(
                        RunState.STOPPED,
                        reason=_CUT_OFF_REASON,
                        wall_seconds=self._compute_wall_seconds(),
                    )
                    return self._get_stop_code()
                log(f"this process is replaced: {error}")
                return RESTART_STATUS
            except LorafleetError as error:
                if isinstance(error, DiskFull):  # the failed step has reported it already
                    self.run.release_reserve()
                self.run.set_state(RunState.FAILED, reason=str(error))
                raise
            # BaseException, because a second signal or an exit must be recorded as an end, too.
            except BaseException as error:
                disk_error = make_disk_full_error(error, self.run.path)
                if disk_error:
                    self.run.release_reserve()
                    self.run.set_state(RunState.FAILED, reason=str(disk_error))
                    raise disk_error from error
                if (
                    self.stop_signal is not None
                ):  # Slurm ended Ray and the driver at the same time, so nothing could save
                    self.run.set_state(
                        RunState.STOPPED,
                        reason=_CUT_OFF_REASON,
                        wall_seconds=self._compute_wall_seconds(),
                    )
                    return ExitCode.REQUEUE
                self.run.set_state(RunState.FAILED, reason=f"{type(error).__name__}: {error}")
                raise
        return outcome

    def _get_stop_code(self) -> ExitCode:
        """Return the exit code of a run that was asked to stop.

        SIGTERM, SIGUSR1 and SIGHUP usually come from a queue or a supervisor, which may start
        the run again.
        """
        by_user = self.stop_signal in (None, signal.SIGINT)
        return ExitCode.INTERRUPTED if by_user else ExitCode.REQUEUE

    def _record_wall_seconds(self) -> None:
        """Record the time spent at most every 10 seconds, so that a killed attempt counts too."""
        if time.time() - self.noted > _RECORD_SECONDS:
            self.noted = time.time()
            self.run.set_state(RunState.RUNNING, wall_seconds=self._compute_wall_seconds())

    def _compute_wall_seconds(self) -> float:
        """Return the wall-clock seconds over all attempts."""
        return self.earlier_seconds + time.time() - self.began

    def _record_phase(self, phase: str) -> None:
        """Record what the driver does now, and log it with the time.

        Args:
            phase: A short text for `status` and the live view.
        """
        log(f"{time.strftime('%H:%M:%S')} {phase}")
        self.run.set_state(RunState.RUNNING, phase=phase)

    def _handle_signal(self, number: int, _frame: Any) -> None:
        """Handle a signal: the first asks the run to save and end, a second ends the process.

        Only creates the stop file, which the driver passes on to its trials. Signals within a
        second count as one: timeout and terminals signal the process and its group.
        """
        if self.stop_signal is signal.SIGUSR1 and number == signal.SIGUSR1:
            return  # a queue may warn twice
        if (
            self.stop_signal is not None
            and time.monotonic() - self.stop_signal_at < _REPEATED_SIGNAL_SECONDS
        ):
            return  # the same signal, sent to the process and to its group
        self.stop_signal_at = time.monotonic()
        # The default action ends the process at once, and tells the parent which signal it was.
        if self.stop_signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stop_signal = signal.Signals(number)
        self._request_stop()

    def _request_stop(self) -> None:
        """Ask every process of the run to save and end."""
        self.stop_file.touch()

    def _install_signal_handlers(self) -> dict[signal.Signals, Any]:
        """Install the signal handlers; return the previous handlers.

        Called again after Ray and Tune have started, because both replace handlers.
        """
        signals = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup set it: keep ignoring it
            signals.append(signal.SIGHUP)
        return {number: signal.signal(number, self._handle_signal) for number in signals}

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """Install the signal handlers for the duration of a block.

        SIGINT, SIGTERM, SIGUSR1 and SIGHUP ask the run to end; a second signal ends the process.
        """
        previous_handlers = self._install_signal_handlers()
        try:
            yield
        finally:
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)


_CUT_OFF_REASON = (
    "the run was killed before it could save everything: `lorafleet resume` continues from the "
    "last checkpoints"
)


def log(message: str) -> None:
    """Write a line to the driver's log."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def _exit_immediately(message: str) -> None:
    """Exit a driver whose lease another attempt has taken, without any further write.

    Called by the heartbeat thread. `os._exit` skips clean-up handlers, which would write.
    """
    log(message)
    os._exit(ExitCode.TAKEN if get_allocation() else ExitCode.USER_INPUT)
