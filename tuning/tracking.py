"""Mirror the record to Weights & Biases.

There is one W&B run per trial, written by the driver from the ledger's own record.

The W&B id of a trial consists of the run's and the trial's name. A resumed sweep
rewrites the W&B run of an unfinished trial from `metrics.jsonl`, so that each trial has
one folder with its whole history, whatever was killed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafleet.evaluation.render.wandb import (
    Mode,
    get_requested_mode,
    ignore_tracking_errors,
    open_wandb,
    resolve_wandb_mode,
)
from lorafleet.evaluation.report.search import find_best_evaluation
from lorafleet.jobs import files
from lorafleet.jobs.data.hub import resolve_public_base
from lorafleet.jobs.runs.events import NoteEvent
from lorafleet.jobs.runs.records import MetricsRow, TrialParams
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.schema.job import JobSpec

if TYPE_CHECKING:
    from lorafleet.tuning.ledger import Listener

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
def open_trackers(run: Run, job: JobSpec) -> Iterator[list[Listener]]:
    """Yield the listeners that a job asks for, and close what they hold open on exit.

    The list is empty if tracking is disabled. Errors of W&B never leave this function: they
    are recorded as events.

    Args:
        run: Its `wandb/` folder is created.
    """
    mode = resolve_wandb_mode(job)
    if mode == "disabled":
        yield []
        return
    if mode == "offline" and get_requested_mode(job) == "online":
        run.add_event(
            NoteEvent(
                sentence="tracking.mode is online, but you are not logged in to W&B, so the run is "
                "tracked offline: log in with `wandb login`, then upload it with `lorafleet sync`"
            )
        )
    mirror = WandbMirror(run, job, mode)
    with ignore_tracking_errors(run):
        mirror.write_missing()
    try:
        yield [mirror]
    finally:
        with ignore_tracking_errors(run):
            mirror.close()


class WandbMirror:
    """Mirror with one open W&B run for each running trial.

    A `Listener` of the ledger, in the driver: trials need no connection to W&B, and a trial
    that waits does not wait for it. Use `open_trackers`, which closes it.
    """

    def __init__(self, run: Run, job: JobSpec, mode: Mode) -> None:
        self.run, self.job, self.mode = run, job, mode
        self.open: dict[str, Any] = {}
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
        for trial in self.run.list_trials():
            if trial.state.has_ended and trial.id not in closed:
                self.on_begin(trial)
                self.on_end(trial)

    def on_begin(self, trial: Trial) -> None:
        """Open a trial's W&B run, and log what the trial has recorded so far."""
        if trial.id in self.open:
            return
        params = trial.read_params()
        config = {"assignment": params.assignment, **params.resolved}
        wandb_run = open_wandb(
            self.run,
            self.job,
            self.mode,
            f"{self.run.id}-{trial.id}",
            trial.id,
            job_type="trial",
            config=config,
        )
        self.open[trial.id] = wandb_run
        # Online, W&B has the rows of earlier attempts. Offline, the new folder starts empty.
        next_step = int(wandb_run.step) if self.mode == "online" else 0
        for row in trial.read_metrics():
            if row.step >= next_step:
                self._log_row(wandb_run, row)

    def on_row(self, trial: Trial, row: MetricsRow) -> None:
        """Log one report."""
        wandb_run = self.open.get(trial.id)
        if wandb_run is not None:
            self._log_row(wandb_run, row)

    def _log_row(self, wandb_run: Any, row: MetricsRow) -> None:
        """Log a row's values under W&B names."""
        logged = {
            key: value
            for key, value in files.replace_non_finite(row.to_dict()).items()
            if key not in _NOT_LOGGED and value is not None
        }
        names = self.job.metric_names if row.evaluated else ()
        metrics = {_to_wandb_name(key, names): value for key, value in logged.items()}
        wandb_run.log(metrics, step=row.step)

    def on_end(self, trial: Trial) -> None:
        """Write a trial's summary and close its W&B run.

        The trial is then listed in `closed.jsonl`, after W&B has written everything.
        """
        wandb_run = self.open.pop(trial.id, None)
        if wandb_run is None:
            return
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
        files.append_jsonl(self.closed_file, {"trial_id": trial.id})

    def close(self) -> None:
        """Close the W&B runs that are still open after an interrupted sweep."""
        for wandb_run in self.open.values():
            wandb_run.finish()
        self.open.clear()


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
