"""What every driver of a run has: its lease, its signals, and an end that is written down.

Runs as `lorafleet exec RUN` in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafleet.cluster.execution.allocation import allocation_here, begin_in_allocation, saved_mark
from lorafleet.jobs import files
from lorafleet.jobs.errors import DiskFull, ExitCode, LorafleetError, RunError, disk_full
from lorafleet.jobs.runs.bundle import SUBMISSION
from lorafleet.jobs.runs.lease import Lease, StaleAttempt
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.placement import Placement

_NOTE_SECONDS = 10.0
_SAME_WISH_SECONDS = 1.0
"""A second signal this soon is the first one once more."""


class Driver(ABC):
    """One attempt at a run."""

    def __init__(self, run: Run) -> None:
        self.stored = files.read_json(run.path / "plan.json")
        if not self.stored:
            raise RunError(f"{run.path} holds no plan.json: it is not a run, or was not submitted whole")
        self.run = run
        self.job = JobSpec.model_validate_json(json.dumps(self.stored["job"]))
        self.placement = Placement.model_validate(self.stored["placement"])
        self.began = self.noted = time.time()
        self.earlier_seconds = float(run.status().get("wall_seconds") or 0.0)
        self.told: signal.Signals | None = None  # the signal that asked for the end
        self.told_at = 0.0
        self.disk_full: str | None = None

    @abstractmethod
    def _attempt(self, attempt: int) -> ExitCode:
        """Do what is left of the run."""

    def _begin(self) -> None:
        """What comes before anything is read of what earlier attempts did."""
        begin_in_allocation(self.run)

    @property
    def stop_file(self) -> Path:
        """Its presence asks every process of the run to save and end."""
        return self.run.path / "stop"

    def execute(self) -> ExitCode:
        """Do what is left of the run, and write down how it ended."""
        if self.run.path.stat().st_mode & 0o040:  # `share: group`: what is written is for the group's eyes as well
            files.share_with_group()
        os.environ.update(self.job.environment)  # before the threads and the libraries that read it
        allocation = allocation_here()
        saved = saved_mark(self.run)
        submission = files.read_json(self.run.path / SUBMISSION).get("number", 1)
        facts = {"submission": submission} | allocation | {"saved": saved}
        try:
            lease = Lease.take(self.run.path, facts, say=log)
        except OSError as error:
            raise disk_full(error, self.run.path) or error from error
        try:
            self.run = dataclasses.replace(self.run, attempt=lease.attempt)
            lease.keep(_end_at_once)
            return self._leased_execute(lease.attempt)
        finally:
            lease.release()

    def _leased_execute(self, attempt: int) -> ExitCode:
        if self.stop_file.is_file() and not self.stop_file.read_text():
            self.stop_file.unlink()  # a signal's, which is answered; a user's holds until `resume`
        self.run.keep_reserve()
        self.run.mark_running(reason=None)
        self.run.event("attempt", number=attempt)
        log(f"attempt {attempt} of {self.run.id} on {os.uname().nodename} (process {os.getpid()})")
        with self._stopped_by_signals():
            try:
                self._begin()
                self.earlier_seconds = float(self.run.status().get("wall_seconds") or 0.0)
                outcome = self._attempt(attempt)
            except StaleAttempt:
                raise
            except LorafleetError as error:
                if isinstance(error, DiskFull):  # what it was at has said so already
                    self.run.release_reserve()
                self.run.set_state(RunState.FAILED, reason=str(error))
                raise
            except BaseException as error:
                full = disk_full(error, self.run.path)
                if full:
                    self.run.release_reserve()
                    self.run.set_state(RunState.FAILED, reason=str(full))
                    raise full from error
                if self.told is not None:  # Slurm ends Ray and the driver in one instant: there was nobody to save
                    self.run.set_state(RunState.STOPPED, reason=_CUT_OFF, wall_seconds=self._wall())
                    return ExitCode.REQUEUE
                self.run.set_state(RunState.FAILED, reason=f"{type(error).__name__}: {error}")
                raise
        return outcome

    def _note_wall(self) -> None:
        """Write down the time spent, now and then: a killed attempt counts too."""
        if time.time() - self.noted > _NOTE_SECONDS:
            self.noted = time.time()
            self.run.set_state(RunState.RUNNING, wall_seconds=self._wall())

    def _wall(self) -> float:
        """Seconds on the clock, over all attempts."""
        return self.earlier_seconds + time.time() - self.began

    def _phase(self, what: str) -> None:
        """Record what the driver does now, and log it with the time."""
        log(f"{time.strftime('%H:%M:%S')} {what}")
        self.run.set_state(RunState.RUNNING, phase=what)

    def _ask(self, number: int, _frame: Any) -> None:
        """The handler: the first signal asks for the end, the second is it."""
        if self.told is signal.SIGUSR1 and number == signal.SIGUSR1:
            return  # a queue may warn twice
        if self.told is not None and time.monotonic() - self.told_at < _SAME_WISH_SECONDS:
            return  # one that was sent to a process and to its group
        self.told_at = time.monotonic()
        if self.told is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.told = signal.Signals(number)
        self.stop_file.touch()

    def _hear_signals(self) -> dict[signal.Signals, Any]:
        """Install the handlers; returns those that were there."""
        heard = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's wish is respected
            heard.append(signal.SIGHUP)
        return {number: signal.signal(number, self._ask) for number in heard}

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM, SIGUSR1 and SIGHUP ask for the end; a second one is it."""
        before = self._hear_signals()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_CUT_OFF = "it was ended before all could be saved: it goes on from the last checkpoints (`lorafleet resume`)"


def log(sentence: str) -> None:
    """A line of the driver's log."""
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()


def _end_at_once(sentence: str) -> None:
    """What becomes of a driver that was overtaken: not one write more."""
    log(sentence)
    os._exit(ExitCode.TAKEN if allocation_here() else ExitCode.USER_INPUT)
