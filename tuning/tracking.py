"""Weights & Biases as a mirror: one run a trial, written by the driver, from the ledger's own record.

A trial's W&B id is the run's and the trial's name together. A resumed sweep writes a trial that had not ended anew from
`metrics.jsonl`, so that each trial has one folder with its whole history, whatever was killed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafleet.evaluation.render.wandb import Mode, not_fatal, open_wandb, wandb_mode, wanted_mode
from lorafleet.evaluation.report.search import best_evaluation
from lorafleet.jobs import files
from lorafleet.jobs.data.hub import public_base
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
def trackers(run: Run, job: JobSpec) -> Iterator[list[Listener]]:
    """The listeners that a job asks for; at the end what they hold open is closed."""
    mode = wandb_mode(job)
    if mode == "disabled":
        yield []
        return
    if mode == "offline" and wanted_mode(job) == "online":
        run.event("note", sentence="tracking.mode is online, but nobody is logged in to W&B: its record is offline")
    mirror = WandbMirror(run, job, mode)
    with not_fatal(run):
        mirror.catch_up()
    try:
        yield [mirror]
    finally:
        with not_fatal(run):
            mirror.close()


class WandbMirror:
    """One live W&B run for each live trial."""

    def __init__(self, run: Run, job: JobSpec, mode: Mode) -> None:
        self.run, self.job, self.mode = run, job, mode
        self.open: dict[str, Any] = {}
        self.folder = run.path / "wandb"
        self.folder.mkdir(exist_ok=True)

    @property
    def closed_file(self) -> Path:
        """Which trials' records were closed whole: W&B writes behind, and a kill takes what it held."""
        return self.folder / "closed.jsonl"

    def catch_up(self) -> None:
        """Write anew the trials that ended in an earlier attempt but whose record was not closed."""
        closed = {row["trial_id"] for row in files.read_jsonl(self.closed_file)}
        for trial in self.run.trials():
            if trial.state.ended and trial.id not in closed:
                self.on_begin(trial)
                self.on_end(trial)

    def on_begin(self, trial: Trial) -> None:
        """Open a trial's run, with what it has trained so far."""
        if trial.id in self.open:
            return
        params = trial.params()
        config = {"assignment": params.get("assignment", {}), **params.get("resolved", {})}
        opened = open_wandb(
            self.run, self.job, self.mode, f"{self.run.id}-{trial.id}", trial.id, job_type="trial", config=config
        )
        self.open[trial.id] = opened
        done = int(opened.step) if self.mode == "online" else 0
        for row in trial.metrics():
            if int(row["step"]) >= done:
                self._log(opened, row)

    def on_row(self, trial: Trial, row: dict[str, Any]) -> None:
        """Log one report."""
        opened = self.open.get(trial.id)
        if opened is not None:
            self._log(opened, row)

    def _log(self, opened: Any, row: dict[str, Any]) -> None:
        known = {key: value for key, value in files.finite(row).items() if key not in _NOT_LOGGED and value is not None}
        names = self.job.metric_names if row.get("evaluated") else ()
        metrics = {_wandb_name(key, names): value for key, value in known.items()}
        opened.log(metrics, step=int(row["step"]))

    def on_end(self, trial: Trial) -> None:
        """Write the summary and close."""
        opened = self.open.pop(trial.id, None)
        if opened is None:
            return
        status, params = trial.status(), trial.params()
        for name in ("state", "rung", "reason"):
            opened.summary[name] = status.get(name)
        best = best_evaluation(trial.metrics(), self.job)
        if best:
            opened.summary[f"best/{self.job.metric.name}"] = best[self.job.metric.name]
        for name, value in _describe_weights(self.job, params, best).items():
            opened.summary[name] = value
        self.run.check_current()
        opened.finish(exit_code=1 if status.get("state") == "failed" else 0)
        files.append_jsonl(self.closed_file, {"trial_id": trial.id})

    def close(self) -> None:
        """Close what is still open (an interrupted sweep)."""
        for opened in self.open.values():
            opened.finish()
        self.open.clear()


def _describe_weights(job: JobSpec, params: dict[str, Any], best: dict[str, Any]) -> dict[str, Any]:
    """Return what the summary says of the weights on disk, which are those of the best evaluation."""
    model = params.get("resolved", {}).get("model", {})
    name = model.get("model_name_or_path", job.model.model_name_or_path)
    facts = {
        "base_model": public_base(name, model.get("revision"))[0],
        "weights/step": best.get("step"),
        "weights/samples": best.get("samples"),
        "weights/number_formats": best.get("number_formats"),
        "weights/trainable_parameters": best.get("trainable_parameters"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _wandb_name(key: str, evaluated: Sequence[str]) -> str:
    """W&B's habit of panels by prefix: eval/accuracy, train/loss, system numbers by their own names."""
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
