"""Mirror the record to Weights & Biases, in a thread.

There is one W&B run per trial, written by a thread of the driver from the run's own record.

The W&B id of a trial consists of the run's and the trial's name. A resumed sweep
rewrites the W&B run of an unfinished trial from `metrics.jsonl`, so that each trial has
one folder with its whole history, whatever was killed.
"""

from __future__ import annotations

import contextlib
import math
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lorafleet.evaluation.render.wandb import (
    MAX_WAIT_SECONDS,
    Mode,
    end_wandb_processes,
    find_wandb_folders,
    get_requested_mode,
    open_wandb,
    record_tracking_error,
    resolve_wandb_mode,
)
from lorafleet.evaluation.report.search import find_best_evaluation
from lorafleet.jobs import files
from lorafleet.jobs.data.hub import resolve_public_base
from lorafleet.jobs.runs.events import NoteEvent
from lorafleet.jobs.runs.lease import StaleAttempt
from lorafleet.jobs.runs.records import MetricsRow, TrialParams
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.schema.job import JobSpec

_MAX_WAITING = 10_000
"""Calls that may wait for W&B; a result is about 2 kB."""
_STOP_SECONDS = 5.0
"""Seconds that a run waits for W&B if it is asked to stop."""
_JOIN_SECONDS = 0.2
"""Seconds between two checks whether the run is asked to stop."""
_NOT_LOGGED = {
    "schema_version",
    "time",
    "intervals",
    "evaluated",
    "trainable_parameters",
    "host",
    "first_gradient_at",
    "attempt",
}


@contextlib.contextmanager
def open_tracker(
    run: Run, job: JobSpec, trials: Iterable[Trial], is_stopping: Callable[[], bool]
) -> Iterator[BackgroundTracker | None]:
    """Yield the tracker that a job asks for, and close it on exit.

    None if tracking is disabled. Errors of W&B never leave this function: they are recorded as
    events.

    Args:
        run: Its `wandb/` folder is created.
        trials: Its trials of earlier attempts.
        is_stopping: Returns whether the run is asked to stop, so that the exit must be quick.
    """
    mode = resolve_wandb_mode(job)
    if mode == "disabled":
        yield None
        return
    if mode == "offline" and get_requested_mode(job) == "online":
        run.add_event(
            NoteEvent(
                sentence="tracking.mode is online, but you are not logged in to W&B, so the run is "
                "tracked offline: log in with `wandb login`, then upload it with `lorafleet sync`"
            )
        )
    earlier = {trial.id: trial.state.has_ended for trial in trials}
    tracker = BackgroundTracker(run, WandbMirror(run, job, mode, earlier))
    try:
        yield tracker
    except BaseException:
        tracker.close(lambda: True)
        raise
    tracker.close(is_stopping)


class _Mirror(Protocol):
    """Interface that a `BackgroundTracker` calls in its thread. Arguments are ids of trials."""

    def write_missing(self) -> None: ...
    def begin(self, trial_id: str) -> None: ...
    def log(self, trial_id: str, row: MetricsRow) -> None: ...
    def end(self, trial_id: str) -> None: ...
    def close(self) -> None: ...


class BackgroundTracker:
    """Passes what the ledger records on to a mirror, in a thread.

    A `Listener`. The search never waits for it: opening a W&B run takes seconds. If a result does
    not fit into the queue, it and the later ones of its trial are left out; the mirror reads them
    from the record when the trial ends. After an error nothing more is mirrored, and the report
    says so.

    Args:
        run: The run; this thread writes its events.
        mirror: Used in the new thread only.
        max_waiting: Number of calls that may wait before results are left out.
        close_seconds: Seconds that `close` waits for the mirror.
    """

    def __init__(
        self,
        run: Run,
        mirror: _Mirror,
        max_waiting: int = _MAX_WAITING,
        close_seconds: float = MAX_WAIT_SECONDS,
    ) -> None:
        self.run, self.mirror = run, mirror
        self.max_waiting, self.close_seconds = max_waiting, close_seconds
        self.is_stuck = False
        """True if the mirror did not end in time: its thread still runs."""
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self._skips = False
        # Trials with results that were left out.
        self._incomplete: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def on_begin(self, trial: Trial) -> None:
        """Mirror the start of a trial."""
        self._put(partial(self.mirror.begin, trial.id))

    def on_row(self, trial: Trial, row: MetricsRow) -> None:
        """Mirror a result."""
        if trial.id in self._incomplete or self._calls.qsize() >= self.max_waiting:
            self._incomplete.add(trial.id)
        else:
            self._put(partial(self.mirror.log, trial.id, row))

    def on_end(self, trial: Trial) -> None:
        """Mirror the end of a trial."""
        self._put(partial(self.mirror.end, trial.id))

    def close(self, is_stopping: Callable[[], bool]) -> None:
        """Wait until everything is mirrored, but not for ever. W&B's process is then ended.

        Args:
            is_stopping: Returns whether the run is asked to stop, now or while this waits. What is
                left is then left out: the machine may be needed, and the next attempt mirrors it.
        """
        self._calls.put(None)
        deadline, stops_at = time.monotonic() + self.close_seconds, math.inf
        while self._thread.is_alive() and time.monotonic() < min(deadline, stops_at):
            if is_stopping() and stops_at == math.inf:
                self._skips, stops_at = True, time.monotonic() + _STOP_SECONDS
            self._thread.join(_JOIN_SECONDS)
        self._record_errors()
        self.is_stuck = self._thread.is_alive()
        if self.is_stuck:
            end_wandb_processes()
        if self.is_stuck and not is_stopping():
            sentence = (
                f"W&B did not take everything within {self.close_seconds:.0f} seconds. The run's "
                "own record is complete: upload what W&B has written with `lorafleet sync`"
            )
            self.run.add_event(NoteEvent(sentence=sentence))

    def _put(self, call: Callable[[], None]) -> None:
        """Let the thread make a call."""
        self._record_errors()
        if not self._skips:
            self._calls.put(call)

    def _record_errors(self) -> None:
        """Record the errors of the thread, which must not write events itself."""
        while not self._errors.empty():
            record_tracking_error(self.run, self._errors.get())

    def _work(self) -> None:
        """Make the calls in their order, until `close`."""
        # A run of an earlier attempt that cannot be written again does not concern the others.
        self._try(self.mirror.write_missing)
        while (call := self._calls.get()) is not None:
            if not self._skips:
                self._skips |= not self._try(call)
        self._try(self.mirror.close)

    def _try(self, call: Callable[[], None]) -> bool:
        """Make a call, and return whether it raised no error."""
        try:
            call()
        # Whatever W&B's client may raise, even to end the process: tracking must not end a run.
        except BaseException as error:  # noqa: BLE001
            self._errors.put(error)
            return False
        return True


class WandbMirror:
    """Mirror with one open W&B run for each running trial.

    Trials need no connection to W&B. Everything is read from the run's files, as a reader of
    the run would: the driver's own view of them changes meanwhile.

    Args:
        earlier: Trial of an earlier attempt -> whether it has ended.
    """

    def __init__(self, run: Run, job: JobSpec, mode: Mode, earlier: Mapping[str, bool]) -> None:
        self.run, self.job, self.mode, self.earlier = run, job, mode, earlier
        self.open: dict[str, Any] = {}
        # Trial id -> last step that was logged.
        self.last_step: dict[str, int] = {}
        # W&B id -> folders of earlier attempts.
        self._stale_folders: dict[str, list[Path]] = {}
        self.folder = run.path / "wandb"
        self.folder.mkdir(exist_ok=True)

    @property
    def closed_file(self) -> Path:
        """File with the trials whose W&B runs were closed completely.

        W&B writes asynchronously, so a kill loses what it has not written yet.
        """
        return self.folder / "closed.jsonl"

    def write_missing(self) -> None:
        """Rewrite the W&B runs of ended trials that an earlier attempt did not close."""
        closed = {row["trial_id"] for row in files.read_jsonl(self.closed_file)}
        self._stale_folders = find_wandb_folders(self.run)
        _call_for_each(
            [name for name, has_ended in self.earlier.items() if has_ended and name not in closed],
            self._rewrite,
        )

    def _rewrite(self, trial_id: str) -> None:
        """Write the whole W&B run of an ended trial."""
        self.begin(trial_id)
        try:
            self.end(trial_id)
        finally:
            self.open.pop(trial_id, None)

    def _get_wandb_id(self, trial_id: str) -> str:
        return f"{self.run.id}-{trial_id}"

    def begin(self, trial_id: str) -> None:
        """Open a trial's W&B run, and log what the trial has recorded so far."""
        if trial_id in self.open:
            return
        params = self.run.get_trial(trial_id).read_params()
        config = {"assignment": params.assignment, **params.resolved}
        wandb_run = open_wandb(
            self.run,
            self.job,
            self.mode,
            self._get_wandb_id(trial_id),
            trial_id,
            job_type="trial",
            config=config,
        )
        # Only now, when they are written again: a search that ends before may still be uploaded.
        for folder in self._stale_folders.pop(self._get_wandb_id(trial_id), ()):
            shutil.rmtree(folder, ignore_errors=True)
        self.open[trial_id] = wandb_run
        # Online, W&B has the rows of earlier attempts. Offline, the new folder starts empty.
        self.last_step[trial_id] = int(wandb_run.step) - 1 if self.mode == "online" else -1
        self._log_rows(trial_id, wandb_run)

    def _log_rows(self, trial_id: str, wandb_run: Any) -> None:
        """Log the rows of the record that were not logged yet."""
        for row in self.run.get_trial(trial_id).read_metrics():
            self._log_row(trial_id, wandb_run, row)

    def log(self, trial_id: str, row: MetricsRow) -> None:
        """Log a result, unless that was done."""
        wandb_run = self.open.get(trial_id)
        if wandb_run is not None:
            self._log_row(trial_id, wandb_run, row)

    def _log_row(self, trial_id: str, wandb_run: Any, row: MetricsRow) -> None:
        if row.step <= self.last_step[trial_id]:
            return
        self.last_step[trial_id] = row.step
        logged = {
            key: value
            for key, value in files.replace_non_finite(row.to_dict()).items()
            if key not in _NOT_LOGGED and value is not None
        }
        names = self.job.metric_names if row.evaluated else ()
        metrics = {_to_wandb_name(key, names): value for key, value in logged.items()}
        wandb_run.log(metrics, step=row.step)

    def end(self, trial_id: str) -> None:
        """Write a trial's summary and close its W&B run.

        The trial is then listed in `closed.jsonl`, after W&B has written everything.
        """
        if trial_id not in self.open:
            return
        self._log_rows(trial_id, self.open[trial_id])
        trial, wandb_run = self.run.get_trial(trial_id), self.open.pop(trial_id)
        status, params = trial.read_status(), trial.read_params()
        wandb_run.summary["state"] = status.state
        wandb_run.summary["rung"] = status.rung
        wandb_run.summary["reason"] = status.reason
        best = find_best_evaluation(trial.read_metrics(), self.job)
        if best is not None:
            name = self.job.metric.name
            wandb_run.summary[f"best/{name}"] = best.get_metric(name)
        for name, value in _describe_weights(self.job, params, best).items():
            wandb_run.summary[name] = value
        # An older attempt that wakes up must not close a run that a newer one writes.
        self.run.check_current()
        wandb_run.finish(exit_code=1 if status.state == "failed" else 0)
        files.append_jsonl(self.closed_file, {"trial_id": trial_id})

    def close(self) -> None:
        """Close the W&B runs that are still open after an interrupted sweep.

        Raises StaleAttempt if a newer attempt writes them.
        """
        self.run.check_current()
        _call_for_each(list(self.open), self._finish)

    def _finish(self, trial_id: str) -> None:
        """Close the W&B run of a trial that has not ended."""
        wandb_run = self.open.pop(trial_id)
        self._log_rows(trial_id, wandb_run)
        wandb_run.finish()


def _call_for_each(trial_ids: Iterable[str], call: Callable[[str], None]) -> None:
    """Call a function for each trial. One that fails does not concern the others.

    Raises the first error, when all were called; StaleAttempt at once.
    """
    errors = []
    for trial_id in trial_ids:
        try:
            call(trial_id)
        except StaleAttempt:
            raise
        # Whatever W&B's client may raise.
        except Exception as error:  # noqa: BLE001
            errors.append(error)
    if errors:
        raise errors[0]


def _describe_weights(job: JobSpec, params: TrialParams, best: MetricsRow | None) -> dict[str, Any]:
    """Return the summary fields of the saved weights, which are those of the best evaluation."""
    model = params.resolved.get("model", {})
    name = model.get("model_name_or_path", job.model.model_name_or_path)
    fields: dict[str, Any] = {
        "base_model": resolve_public_base(name, model.get("revision"))[0],
    }
    if best is not None:
        fields |= {
            "weights/step": best.step,
            "weights/samples": best.samples,
            "weights/number_formats": best.number_formats,
            "weights/trainable_parameters": best.trainable_parameters,
        }
    return {name: value for name, value in fields.items() if value is not None}


def _to_wandb_name(key: str, evaluated: Sequence[str]) -> str:
    """Return the W&B name of a value.

    W&B groups panels by prefix: eval/accuracy, train/loss, and perf/ for all other values.
    """
    training = {
        "train_loss": "train/loss",
        "learning_rate": "train/learning_rate",
        "epoch": "train/epoch",
        "samples": "train/samples",
        "step": "train/step",
        "tokens": "train/tokens",
    }
    if key in training:
        return training[key]
    if key in evaluated or (evaluated and key == "rung"):
        return f"eval/{key}"
    return f"perf/{key}"
