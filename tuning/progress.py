"""Carry the progress of running trials to the driver, and its request to stop to them.

Between two results, a trial tells the driver every moment how far it is, and asks whether
the run must stop. On a shared disk, that would cost some operations a second for each
trial. So it goes through Ray (`RayLink`), or is a call where the trial runs in the driver
itself (`LocalLink`), and the driver writes the progress of all trials to one file.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorafleet.jobs import files

if TYPE_CHECKING:
    from lorafleet.jobs.runs.records import MetricsRow
    from lorafleet.jobs.runs.run import Trial
    from lorafleet.tuning.trial_table import TrialTable

WRITE_SECONDS = 2.0
"""Seconds between two writes of the progress of all trials."""
ASK_SECONDS = 1.5
"""Seconds between two questions of a trial whether the run must stop."""
_LOOK_SECONDS = 1.0
"""Seconds between two looks for the stop file."""
_ANSWER_SECONDS = 0.5
"""Seconds that a trial waits for the driver's answer. It continues without one."""
_FIELDS = ("step", "samples", "train_loss", "tokens_per_second", "train_seconds")


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
    """The file that asks a run to stop. It is looked for at most once a second.

    Once it was seen, the answer stays: a request is never withdrawn while a driver runs.
    """

    def __init__(self, path: Path, seconds: float = _LOOK_SECONDS) -> None:
        self.path = path
        self._pace = Pace(seconds)
        self._exists = False

    def exists(self) -> bool:
        """Return whether the run is asked to stop."""
        if not self._exists and self._pace.is_due():
            self._exists = self.path.exists()
        return self._exists


class DriverLink(Protocol):
    """What a trial uses to talk to the driver. Neither method waits long."""

    def send_progress(self, trial_id: str, progress: dict[str, Any]) -> None:
        """Tell how far a trial is; the values are those of `Progress`."""

    def is_stop_requested(self) -> bool:
        """Return whether the run is asked to stop: the answer may be some seconds old."""


class ProgressBoard:
    """The progress of all trials that have not ended, in the driver, and the file that shows it.

    Who watches a run reads this file, and the files of those trials alone of which it says that
    they have changed. A `Listener` of the ledger.
    """

    def __init__(self) -> None:
        self.trials: TrialTable | None = None
        """Trials of the search; None until it begins. Nothing is written before."""
        self._progress: dict[str, dict[str, Any]] = {}
        self._results = Counter[str]()
        self._pace = Pace(WRITE_SECONDS)

    def update(self, trial_id: str, progress: dict[str, Any]) -> None:
        """Take the progress of a trial."""
        self._progress[trial_id] = progress

    def on_begin(self, trial: Trial) -> None:
        """Do nothing: the table knows the state."""

    def on_row(self, trial: Trial, row: MetricsRow) -> None:
        """Take a result, which may be written to the trial's own file much later."""
        self._results[trial.id] += 1
        values = {key: getattr(row, key) for key in _FIELDS} | {"time": time.time()}
        self.update(trial.id, self._progress.get(trial.id, {}) | values)

    def on_end(self, trial: Trial) -> None:
        """Forget the progress of a trial."""
        self._progress.pop(trial.id, None)

    def write_if_due(self) -> None:
        """Write the file, if the last time is long enough ago."""
        if self._pace.is_due():
            self.write()

    def write(self) -> None:
        """Write the file."""
        if self.trials is None:
            return
        trials = {
            trial.id: {"state": trial.state.value, "results": self._results[trial.id]}
            | self._progress.get(trial.id, {})
            for trial in self.trials.unended.values()
        }
        # Only shown: neither flushed to the disk nor checked against newer attempts.
        run = self.trials.run
        values = {"attempt": run.attempt, "trials": trials}
        files.write_json(run.progress_file, values, durable=False)


def describe_progress(row: dict[str, Any], total_steps: int) -> dict[str, Any]:
    """Return the values of `Progress` for a row of a trial that trains."""
    return {key: row[key] for key in _FIELDS} | {"total": total_steps, "time": time.time()}


class LocalLink:
    """`DriverLink` of trials that the driver trains itself."""

    def __init__(self, board: ProgressBoard, stop_file: StopFile) -> None:
        self.board, self.stop_file = board, stop_file

    def send_progress(self, trial_id: str, progress: dict[str, Any]) -> None:
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
        self._news: dict[str, dict[str, Any]] = {}
        self._is_stopping = False

    def send_progress(self, trial_id: str, progress: dict[str, Any]) -> bool:
        """Take the progress of a trial, and return whether the run is asked to stop."""
        self._news[trial_id] = progress
        return self._is_stopping

    def is_stop_requested(self) -> bool:
        """Return whether the run is asked to stop."""
        return self._is_stopping

    def exchange(self, is_stopping: bool) -> dict[str, dict[str, Any]]:
        """Return the progress since the last call, and take the driver's request to stop."""
        self._is_stopping = is_stopping
        news, self._news = self._news, {}
        return news


class RayLink:
    """`DriverLink` of trials in Ray's processes. It is pickled into each of them.

    A question that is not answered in time stays open, and no other is asked meanwhile: a
    driver's machine that is busy must not slow down the training.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._answer: Any = None
        self._pace = Pace(ASK_SECONDS)
        self._is_stopping = False

    def __reduce__(self) -> tuple[type[RayLink], tuple[Any]]:
        return RayLink, (self.actor,)

    def send_progress(self, trial_id: str, progress: dict[str, Any]) -> None:
        """Send the progress, and take the answer whether the run must stop."""
        if self._take_answer():
            self._answer = self.actor.send_progress.remote(trial_id, progress)
            self._pace.is_due()
            self._take_answer(wait=True)

    def is_stop_requested(self) -> bool:
        """Return the last answer, or ask if that is too long ago."""
        if not self._is_stopping and self._take_answer() and self._pace.is_due():
            self._answer = self.actor.is_stop_requested.remote()
            self._take_answer(wait=True)
        return self._is_stopping

    def _take_answer(self, *, wait: bool = False) -> bool:
        """Take the answer to the open question. Return False if it is still open.

        Args:
            wait: Wait a moment for it.
        """
        import ray

        if self._answer is None:
            return True
        ready, _ = ray.wait([self._answer], timeout=_ANSWER_SECONDS if wait else 0)
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
        self._news: Any = None
        self._pace = Pace(WRITE_SECONDS)
        self._has_told_stop = False

    def poll(self) -> None:
        """Take the progress of all trials, write it, and pass the request to stop on."""
        import ray

        if self._news is not None and ray.wait([self._news], timeout=0)[0]:
            self._take_news()
        if self._news is None:
            is_stopping = self.stop_file.exists()
            must_tell = is_stopping and not self._has_told_stop
            if self._pace.is_due() or must_tell:
                self._has_told_stop = is_stopping
                self._news = self.actor.exchange.remote(is_stopping)
        if self.board is not None:
            self.board.write_if_due()

    def close(self) -> None:
        """Take the last progress of all trials, but do not wait long."""
        if self._news is None:
            self._news = self.actor.exchange.remote(self.stop_file.exists())
        self._take_news(_ANSWER_SECONDS)

    def _take_news(self, timeout: float | None = None) -> None:
        """Show the progress that the actor has sent.

        Args:
            timeout: Seconds to wait for it, if it may not be there yet.
        """
        import ray

        news, self._news = self._news, None
        # A lost actor is restarted; what the trials send next is newer.
        with contextlib.suppress(ray.exceptions.RayError):
            for trial_id, progress in ray.get(news, timeout=timeout).items():
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

    here = ray.get_runtime_context().get_node_id()
    # It needs no CPU of its own, and lives as long as the driver's machine does.
    actor = (
        ray.remote(ProgressActor)
        .options(
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote()
    )
    exchange = ProgressExchange(actor, board, stop_file)
    try:
        yield exchange
    finally:
        exchange.close()
        ray.kill(actor)
