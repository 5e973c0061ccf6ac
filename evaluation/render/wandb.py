"""Weights & Biases, the same for everything that writes to it: which mode, which settings, a report's tables."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorafleet.evaluation.render.arm_table import arm_records, batch_records
from lorafleet.evaluation.render.trial_table import columns, folds_table, ratings_table
from lorafleet.jobs import files
from lorafleet.jobs.runs.lease import StaleAttempt
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema.job import JobSpec

if TYPE_CHECKING:
    from lorafleet.jobs.runs.report import Report, Sample

Mode = Literal["online", "offline", "disabled"]
_MODES: tuple[Mode, ...] = ("online", "offline", "disabled")


@contextlib.contextmanager
def not_fatal(run: Run) -> Iterator[None]:
    """A tracker that fails is noted; the record is in the run, and the sweep goes on."""
    try:
        yield
    except StaleAttempt:
        raise
    except Exception as error:  # whatever W&B's client may raise
        run.event("tracking_failed", error=f"{type(error).__name__}: {error}"[:500])


def track_report(run: Run, job: JobSpec, report: Report, name: str = "report") -> None:
    """One more W&B run beside the trials': the tables of a report, and the recommendation."""
    mode = wandb_mode(job)
    if mode == "disabled":
        return
    with not_fatal(run):
        _track_table(run, job, report, mode, name)


def _track_table(run: Run, job: JobSpec, report: Report, mode: Mode, name: str) -> None:
    import wandb

    opened = open_wandb(run, job, mode, f"{run.id}-{name}", name, job_type=name, config={})
    tables = _tables(report, samples=job.tracking.upload_samples)
    opened.log({key: wandb.Table(columns=headings, data=rows) for key, (headings, rows) in tables.items()})
    opened.summary["recommended_arm"] = report.recommendation.arm
    opened.summary["recommendation"] = report.recommendation.sentence
    opened.summary["recommended_trial"] = report.recommendation.trial_id
    for key, value in _recommended_weights(run, report).items():
        opened.summary[key] = value
    opened.finish()


def _recommended_weights(run: Run, report: Report) -> dict[str, Any]:
    """Return what the manifest beside the recommended weights says of them, by the names of W&B's summary."""
    from lorafleet.evaluation.render.model_card import recommended_weights

    folder = recommended_weights(run, report)
    manifest = files.read_json(folder / "manifest.json") if folder is not None else {}
    if not manifest:
        return {}
    summary = {"base_model": manifest["base_model"]}
    summary |= {f"weights/{name}": value for name, value in manifest["weights"].items()}
    summary |= {f"validation/{name}": value for name, value in (manifest["validation"] or {}).items()}
    summary |= {f"{report.held_out}/{name}": value for name, value in (manifest[report.held_out] or {}).items()}
    return {name: value for name, value in summary.items() if value is not None}


def _tables(report: Report, *, samples: bool) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """The report's tables by name; texts of rows and models only where they may be sent."""
    shown = columns(report)
    rows = [[cell(row) for _, cell in shown] for row in report.shown]
    found: dict[str, tuple[list[str], list[list[Any]]]] = {
        "configurations": ([heading for heading, _ in shown], rows),
        "arms": arm_records(report),
        "batches": batch_records(report),
        "pairs": (
            ["one", "other", "metric", "difference", "low", "high", "p_value"],
            [[p.one, p.other, p.metric, p.difference, *(p.interval or (None, None)), p.p_value] for p in report.pairs],
        ),
        "folds": folds_table(report),
        "ratings": ratings_table(report),
    }
    if report.per_class:
        names = list(next(iter(report.per_class.values())))
        found["per_class"] = (["class", *names], [[of, *values.values()] for of, values in report.per_class.items()])
        found["confusion"] = (
            ["truth", *report.per_class],
            [[of, *counts] for of, counts in zip(report.per_class, report.confusion, strict=True)],
        )
    if samples:
        found |= {name: _samples(getattr(report, name)) for name in ("samples", "mistakes", "worst")}
    return {name: table for name, table in found.items() if table[1]}


def _samples(rows: list[Sample]) -> tuple[list[str], list[list[Any]]]:
    models = list(rows[0].answers) if rows else []
    said = [[row.answers[name] for name in models] for row in rows]
    sure = any(answer.confidence is not None for answers in said for answer in answers)
    headings = ["row", "prompt", "reference", *models, *([f"{name} confidence" for name in models] if sure else [])]
    values = [
        [answer.text for answer in answers] + ([answer.confidence for answer in answers] if sure else [])
        for answers in said
    ]
    return headings, [[row.row, row.prompt, row.reference, *more] for row, more in zip(rows, values, strict=True)]


def wandb_mode(job: JobSpec) -> Mode:
    """online, offline or disabled; online only with a key at hand, and nothing ever prompts."""
    wanted = wanted_mode(job)
    if wanted in ("offline", "disabled"):
        return wanted
    return "online" if _logged_in(job) else "offline"


def wanted_mode(job: JobSpec) -> Mode | None:
    """What the job or the environment asks for; None: whatever there is."""
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


def open_wandb(
    run: Run, job: JobSpec, mode: Mode, name: str, shown: str, *, job_type: str, config: dict[str, Any]
) -> Any:
    """Open a W&B run in a run's group; what a killed attempt left of it is removed."""
    import wandb

    run.check_current()
    folder = run.path / "wandb"
    folder.mkdir(exist_ok=True)
    for left in folder.glob(f"wandb/*run-*-{name}"):
        shutil.rmtree(left, ignore_errors=True)
    tracking = job.tracking
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
        mode=mode,
        id=name,
        name=shown,
        group=run.id,
        job_type=job_type,
        project=tracking.project,
        entity=tracking.entity,
        tags=list(tracking.tags),
        dir=str(folder),
        config=config,
        reinit="create_new",
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(**settings),
    )
