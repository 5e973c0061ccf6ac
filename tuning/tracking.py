"""Weights & Biases as a mirror: one run a trial, written by the driver, from the ledger's own record.

A trial's W&B id is the run's and the trial's name together. A resumed sweep writes a trial that had not ended anew from
`metrics.jsonl`, so that each trial has one folder with its whole history, whatever was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evaluation.arms_text import arm_records
from evaluation.report_text import columns, folds_table, ratings_table
from jobs import files
from jobs.run import Run, Trial
from jobs.spec import JobSpec

if TYPE_CHECKING:
    from jobs.report import Report
    from tuning.ledger import Listener

Mode = Literal["online", "offline", "disabled"]
_MODES: tuple[Mode, ...] = ("online", "offline", "disabled")
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
    if mode == "offline" and _wanted(job) == "online":
        run.event("note", sentence="tracking.mode is online, but nobody is logged in to W&B: its record is offline")
    mirror = WandbMirror(run, job, mode)
    with _not_fatal(run):
        mirror.catch_up()
    try:
        yield [mirror]
    finally:
        with _not_fatal(run):
            mirror.close()


@contextlib.contextmanager
def _not_fatal(run: Run) -> Iterator[None]:
    """A tracker that fails is noted; the record is in the run, and the sweep goes on."""
    try:
        yield
    except Exception as error:  # whatever W&B's client may raise
        run.event("tracking_failed", error=f"{type(error).__name__}: {error}"[:500])


def track_report(run: Run, job: JobSpec, report: Report) -> None:
    """One more W&B run beside the trials': the table of all of them, and the recommendation."""
    mode = wandb_mode(job)
    if mode == "disabled":
        return
    with _not_fatal(run):
        _track_table(run, job, report, mode)


def _track_table(run: Run, job: JobSpec, report: Report, mode: Mode) -> None:
    import wandb

    opened = WandbMirror(run, job, mode).init(f"{run.id}-report", "report", job_type="report", config={})
    tables = _tables(report, samples=job.tracking.upload_samples)
    opened.log({name: wandb.Table(columns=headings, data=rows) for name, (headings, rows) in tables.items()})
    opened.summary["recommended_arm"] = report.recommendation.arm
    opened.summary["recommendation"] = report.recommendation.sentence
    opened.summary["recommended_trial"] = report.recommendation.trial_id
    opened.finish()


def _tables(report: Report, *, samples: bool) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """The report's tables by name; texts of rows and models only where they may be sent."""
    shown = columns(report)
    rows = [[cell(row) for _, cell in shown] for row in report.shown]
    found: dict[str, tuple[list[str], list[list[Any]]]] = {
        "configurations": ([heading for heading, _ in shown], rows),
        "arms": arm_records(report),
        "pairs": (
            ["one", "other", "metric", "difference", "low", "high", "p_value"],
            [[p.one, p.other, p.metric, p.difference, *p.interval, p.p_value] for p in report.pairs],
        ),
        "folds": folds_table(report),
        "ratings": ratings_table(report),
    }
    models = list(report.samples[0].answers) if report.samples else []
    if samples:
        found["samples"] = (
            ["row", "prompt", "reference", *models],
            [[s.row, s.prompt, s.reference, *(s.answers[name].text for name in models)] for s in report.samples],
        )
    return {name: table for name, table in found.items() if table[1]}


def wandb_mode(job: JobSpec) -> Mode:
    """online, offline or disabled; online only with a key at hand, and nothing ever prompts."""
    wanted = _wanted(job)
    if wanted in ("offline", "disabled"):
        return wanted
    return "online" if _logged_in(job) else "offline"


def _wanted(job: JobSpec) -> Mode | None:
    wanted = job.tracking.mode if job.tracking.mode != "auto" else os.environ.get("WANDB_MODE", "auto")
    return next((mode for mode in _MODES if wanted == mode), None)


def _logged_in(job: JobSpec) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlparse

    host = urlparse(job.tracking.base_url or os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(str(path)).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


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

    def init(self, name: str, shown: str, *, job_type: str, config: dict[str, Any]) -> Any:
        """Open a W&B run of this sweep's group; what a killed attempt left of it is removed."""
        import wandb

        self.run.check_current()
        for left in self.folder.glob(f"wandb/*run-*-{name}"):
            shutil.rmtree(left, ignore_errors=True)
        tracking = self.job.tracking
        settings: dict[str, Any] = {
            "silent": True,
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "console": "off",
            "disable_job_creation": True,
        }
        if tracking.base_url:
            settings["base_url"] = tracking.base_url
        return wandb.init(
            mode=self.mode,
            id=name,
            name=shown,
            group=self.run.id,
            job_type=job_type,
            project=tracking.project,
            entity=tracking.entity,
            tags=list(tracking.tags),
            dir=str(self.folder),
            config=config,
            reinit="create_new",
            resume="allow" if self.mode == "online" else None,
            settings=wandb.Settings(**settings),
        )

    def on_begin(self, trial: Trial) -> None:
        """Open a trial's run, with what it has trained so far."""
        if trial.id in self.open:
            return
        params = trial.params()
        config = {"assignment": params.get("assignment", {}), **params.get("resolved", {})}
        opened = self.init(f"{self.run.id}-{trial.id}", trial.id, job_type="trial", config=config)
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
        status = trial.status()
        best = [row for row in trial.evaluations() if row.get(self.job.metric.name) is not None]
        opened.summary["state"] = status.get("state")
        opened.summary["rung"] = status.get("rung")
        opened.summary["reason"] = status.get("reason")
        if best:
            pick = max if self.job.metric.goal == "maximize" else min
            name = self.job.metric.name
            opened.summary[f"best/{name}"] = pick(row[name] for row in best)
        self.run.check_current()
        opened.finish(exit_code=1 if status.get("state") == "failed" else 0)
        files.append_jsonl(self.closed_file, {"trial_id": trial.id})

    def close(self) -> None:
        """Close what is still open (an interrupted sweep)."""
        for opened in self.open.values():
            opened.finish()
        self.open.clear()


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
