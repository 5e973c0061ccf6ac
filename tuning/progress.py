"""Carry the progress of running trials to the driver, and its request to stop to them.

Between two results, a trial sends its progress every moment, and asks whether the run must
stop. On a shared disk, that would cost some operations a second for each trial. So it goes
through Ray (`RayLink`), or is a call where the trial runs in the driver itself
(`LocalLink`), and the driver writes the progress of all trials to one file.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorafleet.jobs import files
from lorafleet.jobs.runs.records import MetricsRow, Progress, ProgressRecord

if TYPE_CHECKING:
    from lorafleet.jobs.runs.run import Trial
    from lorafleet.tuning.trial_table import TrialTable

_WRITE_SECONDS = 2.0
"""Seconds between two writes of the progress of all trials."""
ASK_SECONDS = 1.5
"""Seconds between two requests of a trial whether the run must stop."""
_STOP_FILE_SECONDS = 1.0
"""Seconds between two checks of the stop file."""
_ANSWER_SECONDS = 0.5
"""Seconds that a trial waits for the driver's answer. It continues without one."""
_REQUESTS_WITHOUT_WAIT = 20
"""Requests for whose answers a trial does not wait, after one that was late."""


class Pace:
    """Tells when something is due that must not happen more often than every few seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last = -seconds

    def is_due(self) -> bool:
        """Return whether it is time again. If it is, the time starts anew."""
        now = time.monotonic()
        if now - self._last < self.seconds:
            return False
        self._last = now
        return True


class StopFile:
    """The file that asks a run to stop. It is checked at most once a second.

    Once it was there, the answer stays: a request is never withdrawn while a driver runs.
    """

    def __init__(self, path: Path, seconds: float = _STOP_FILE_SECONDS) -> None:
        self.path = path
        self._pace = Pace(seconds)
        self._exists = False

    def exists(self) -> bool:
        """Return whether the run is asked to stop."""
        if not self._exists and self._pace.is_due():
            self._exists = self.path.exists()
        return self._exists

    def touch(self) -> None:
        """Create the file. `exists` returns True from now on."""
        self.path.touch()
        self._exists = True


class DriverLink(Protocol):
    """Connection of a trial with the driver. Neither method waits long."""

    def send_progress(self, trial_id: str, progress: Progress) -> None:
        """Send the progress of a trial."""

    def is_stop_requested(self) -> bool:
        """Return whether the run is asked to stop: the answer may be some seconds old."""


class ProgressBoard:
    """The progress of all trials that have not ended, in the driver, and the file that shows it.

    Who follows a run reads this file, and the files of those trials alone that have changed
    according to it. A `Listener` of the ledger.
    """

    def __init__(self) -> None:
        self.trials: TrialTable | None = None
        """Trials of the search; None until it begins. Nothing is written before."""
        self._progress: dict[str, Progress] = {}
        self._results = Counter[str]()
        self._pace = Pace(_WRITE_SECONDS)

    def update(self, trial_id: str, progress: Progress) -> None:
        """Take the progress of a trial."""
        self._progress[trial_id] = progress

    def on_begin(self, trial: Trial) -> None:
        """Do nothing: the table has the state."""

    def on_row(self, trial: Trial, row: MetricsRow) -> None:
        """Take a result, which may be written to the trial's own file much later."""
        self._results[trial.id] += 1
        total = self._progress.get(trial.id, Progress()).total
        self.update(trial.id, make_progress(row, total))

    def on_end(self, trial: Trial) -> None:
        """Forget the progress of a trial."""
        self._progress.pop(trial.id, None)

    def write_if_due(self) -> None:
        """Write the file, if the last time is long enough ago."""
        if self._pace.is_due():
            self.write()

    def close(self) -> None:
        """Write how far the trials are that have not ended, and that none of them runs."""
        for trial_id, progress in self._progress.items():
            # A heartbeat without a time is not recent: the trial is not shown as running.
            self._progress[trial_id] = progress.model_copy(update={"time": None})
        self.write()

    def write(self) -> None:
        """Write the file. Errors are ignored: it is only shown."""
        if self.trials is None:
            return
        trials = {}
        for trial in self.trials.unended.values():
            update = {"state": trial.state.value, "results": self._results[trial.id]}
            trials[trial.id] = self._progress.get(trial.id, Progress()).model_copy(update=update)
        run = self.trials.run
        record = ProgressRecord(attempt=run.attempt, trials=trials)
        # Neither flushed to the disk nor checked against newer attempts, for the same reason.
        with contextlib.suppress(OSError):
            files.write_json(run.progress_file, record.to_dict(), durable=False)


def make_progress(row: MetricsRow, total_steps: int) -> Progress:
    """Return the progress of a trial whose newest values are a row."""
    return Progress(
        step=row.step,
        total=total_steps,
        time=time.time(),
        train_loss=row.train_loss,
        train_seconds=row.train_seconds,
        tokens_per_second=row.tokens_per_second,
    )


class LocalLink:
    """`DriverLink` of trials that the driver trains itself."""

    def __init__(self, board: ProgressBoard, stop_file: StopFile) -> None:
        self.board, self.stop_file = board, stop_file

    def send_progress(self, trial_id: str, progress: Progress) -> None:
        """Show the progress."""
        self.board.update(trial_id, progress)
        self.board.write_if_due()

    def is_stop_requested(self) -> bool:
        """Return whether the stop file exists."""
        return self.stop_file.exists()


class ProgressActor:
    """Ray actor between the processes of the trials and the driver, which cannot be called.

    It holds nothing that must survive: it is restarted empty, and what a trial sends next is
    newer.
    """

    def __init__(self) -> None:
        self._received: dict[str, Progress] = {}
        self._is_stopping = False

    def send_progress(self, trial_id: str, progress: Progress) -> bool:
        """Take the progress of a trial, and return whether the run is asked to stop."""
        self._received[trial_id] = progress
        return self._is_stopping

    def is_stop_requested(self) -> bool:
        """Return whether the run is asked to stop."""
        return self._is_stopping

    def exchange(self, is_stopping: bool) -> dict[str, Progress]:
        """Return the progress since the last call, and take the driver's request to stop."""
        self._is_stopping = is_stopping
        received, self._received = self._received, {}
        return received


class RayLink:
    """`DriverLink` of trials in Ray's processes. It is pickled into each of them.

    A driver's machine that is busy must not slow down the training: after a late answer, the
    trial does not wait for the next ones, and a request without an answer is the only open one.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._answer: Any = None
        self._pace = Pace(ASK_SECONDS)
        self._is_stopping = False
        self._requests_without_wait = 0

    def __reduce__(self) -> tuple[type[RayLink], tuple[Any]]:
        return RayLink, (self.actor,)

    def send_progress(self, trial_id: str, progress: Progress) -> None:
        """Send the progress, and take the answer whether the run must stop."""
        if self._take_answer():
            self._pace.is_due()
            self._answer = self.actor.send_progress.remote(trial_id, progress)
            self._wait_for_answer()

    def is_stop_requested(self) -> bool:
        """Return the last answer, or ask if that is too long ago."""
        if not self._is_stopping and self._take_answer() and self._pace.is_due():
            self._answer = self.actor.is_stop_requested.remote()
            self._wait_for_answer()
        return self._is_stopping

    def _wait_for_answer(self) -> None:
        """Wait a moment for the answer to the new request, unless answers are late."""
        if self._requests_without_wait:
            self._requests_without_wait -= 1
        elif not self._take_answer(_ANSWER_SECONDS):
            self._requests_without_wait = _REQUESTS_WITHOUT_WAIT

    def _take_answer(self, timeout: float = 0.0) -> bool:
        """Take the answer to the open request. Return False if it is still open.

        Args:
            timeout: Seconds to wait for it.
        """
        import ray

        if self._answer is None:
            return True
        ready, _ = ray.wait([self._answer], timeout=timeout)
        if ready:
            # While a lost actor is restarted, its last answer stays.
            with contextlib.suppress(ray.exceptions.RayError):
                self._is_stopping = ray.get(self._answer)
            self._answer = None
        return bool(ready)


class ProgressExchange:
    """The driver's side of a `ProgressActor`. Call `poll` often: it never waits."""

    def __init__(self, actor: Any, board: ProgressBoard | None, stop_file: StopFile) -> None:
        self.actor, self.board, self.stop_file = actor, board, stop_file
        self._reply: Any = None
        self._pace = Pace(_WRITE_SECONDS)
        self._has_sent_stop = False

    def poll(self) -> None:
        """Take the progress of all trials, write it, and pass the request to stop on."""
        import ray

        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            self._take_reply()
        if self._reply is None:
            is_stopping = self.stop_file.exists()
            if self._pace.is_due() or (is_stopping and not self._has_sent_stop):
                self._has_sent_stop = is_stopping
                self._reply = self.actor.exchange.remote(is_stopping)
        if self.board is not None:
            self.board.write_if_due()

    def close(self) -> None:
        """Take the last progress of all trials, but do not wait long."""
        if self._reply is None:
            self._reply = self.actor.exchange.remote(self.stop_file.exists())
        self._take_reply(_ANSWER_SECONDS)

    def _take_reply(self, timeout: float | None = None) -> None:
        """Show the progress that the actor has sent.

        Args:
            timeout: Seconds to wait for it, if it may not be there yet.
        """
        import ray

        reply, self._reply = self._reply, None
        # A lost actor is restarted; what the trials send next is newer.
        with contextlib.suppress(ray.exceptions.RayError):
            for trial_id, progress in ray.get(reply, timeout=timeout).items():
                if self.board is not None:
                    self.board.update(trial_id, progress)


@contextlib.contextmanager
def open_exchange(board: ProgressBoard | None, stop_file: StopFile) -> Iterator[ProgressExchange]:
    """Yield the driver's side of a new actor on this machine, and end the actor on exit.

    Args:
        board: Shows the progress; None if nothing is trained.
        stop_file: The run's.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    driver_node = ray.get_runtime_context().get_node_id()
    # It needs no CPU of its own, and lives as long as the driver's machine does.
    actor = (
        ray.remote(ProgressActor)
        .options(
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(driver_node, soft=False),
        )
        .remote()
    )
    exchange = ProgressExchange(actor, board, stop_file)
    yield exchange
    # Not after an error: Ray may be gone, and would be waited for. The actor ends with the driver.
    exchange.close()
    ray.kill(actor)
