"""Log reports to Weights & Biases.

All writers to it share its mode and settings. Tracking is never needed for a result:
errors of the client become events of the run (`record_tracking_error`). Nothing ever
asks for a login; without an API key W&B writes offline files, which `lorafleet sync`
uploads later.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorafleet.evaluation.render.arm_table import list_arm_records, list_batch_records
from lorafleet.evaluation.render.trial_table import (
    build_columns,
    build_folds_table,
    build_ratings_table,
)
from lorafleet.jobs.runs.events import TrackingFailedEvent
from lorafleet.jobs.runs.lease import StaleAttempt
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.runs.stale_folders import PREFIX, write_owner
from lorafleet.jobs.schema.job import JobSpec

if TYPE_CHECKING:
    from lorafleet.jobs.runs.report import Report, Sample

Mode = Literal["online", "offline", "disabled"]
MAX_WAIT_SECONDS = 300.0
"""Maximum seconds that the end of a search, or a report, waits for W&B."""
_MODES: tuple[Mode, ...] = ("online", "offline", "disabled")


def track_report(run: Run, job: JobSpec, report: Report, name: str = "report") -> None:
    """Log the tables of a report and its recommendation as a W&B run of its own.

    Does nothing if tracking is disabled. Errors of W&B are recorded in the run and not
    raised, and W&B is not waited for longer than `MAX_WAIT_SECONDS`.

    Args:
        run: The run, whose `wandb` folder is written.
        job: Its job, with the `tracking` block.
        report: The report.
        name: Name and job type of the W&B run: report or benchmark.

    Raises:
        StaleAttempt: Another driver has taken over the run, so this one must stop writing.
    """
    mode = resolve_wandb_mode(job)
    if mode == "disabled":
        return
    errors: list[BaseException] = []

    def log() -> None:
        try:
            _log_report(run, job, report, mode, name)
        # Whatever W&B's client may raise: tracking must not end a run.
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=log, name="tracking", daemon=True)
    thread.start()
    thread.join(MAX_WAIT_SECONDS)
    if thread.is_alive():
        end_wandb_processes()
        run.add_event(TrackingFailedEvent(error=f"no answer for {MAX_WAIT_SECONDS:.0f} seconds"))
    elif errors:
        record_tracking_error(run, errors[0])


def record_tracking_error(run: Run, error: BaseException) -> None:
    """Record an error of W&B's client as an event; the results are stored in the run anyway.

    Raises:
        StaleAttempt: Another driver has taken over the run, so this one must stop writing.
    """
    if isinstance(error, StaleAttempt):
        raise error
    run.add_event(TrackingFailedEvent(error=f"{type(error).__name__}: {error}"[:500]))


def end_wandb_processes() -> None:
    """End W&B's service, which does not answer.

    Otherwise this process would wait for it at its end. What it has written can be uploaded.
    """
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("wandb-core"):
                process.kill()


def _log_report(run: Run, job: JobSpec, report: Report, mode: Mode, name: str) -> None:
    wandb = _import_wandb()
    for folder in find_wandb_folders(run).get(f"{run.id}-{name}", ()):
        shutil.rmtree(folder, ignore_errors=True)
    wandb_run = open_wandb(run, job, mode, f"{run.id}-{name}", name, job_type=name, config={})
    tables = _build_tables(report, samples=job.tracking.upload_samples)
    wandb_run.log(
        {key: wandb.Table(columns=headings, data=rows) for key, (headings, rows) in tables.items()}
    )
    wandb_run.summary["recommended_arm"] = report.recommendation.arm
    wandb_run.summary["recommendation"] = report.recommendation.sentence
    wandb_run.summary["recommended_trial"] = report.recommendation.trial_id
    for key, value in _describe_recommended_weights(run, report).items():
        wandb_run.summary[key] = value
    wandb_run.finish()


def _describe_recommended_weights(run: Run, report: Report) -> dict[str, Any]:
    """Return the manifest's data on the recommended weights, by the names of W&B's summary."""
    from lorafleet.evaluation.render.model_card import find_recommended_weights, read_manifest

    folder = find_recommended_weights(run, report)
    manifest = read_manifest(folder) if folder is not None else None
    if manifest is None:
        return {}
    held_out = manifest.get_held_out_metrics(report.held_out)
    summary: dict[str, Any] = {"base_model": manifest.base_model}
    summary |= {f"weights/{name}": value for name, value in manifest.weights.to_dict().items()}
    summary |= {f"validation/{name}": value for name, value in (manifest.validation or {}).items()}
    summary |= {f"{report.held_out}/{name}": value for name, value in held_out.items()}
    return {name: value for name, value in summary.items() if value is not None}


def _build_tables(report: Report, *, samples: bool) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Return the report's tables by name, as (headings, rows).

    Args:
        report: The report.
        samples: True to include texts of rows and models. They leave this machine then, so
            the job must ask for it (`tracking.upload_samples`).
    """
    shown = build_columns(report)
    rows = [[cell(row) for _, cell in shown] for row in report.table_rows]
    tables: dict[str, tuple[list[str], list[list[Any]]]] = {
        "configurations": ([heading for heading, _ in shown], rows),
        "arms": list_arm_records(report),
        "batches": list_batch_records(report),
        "pairs": (
            ["one", "other", "metric", "difference", "low", "high", "p_value"],
            [
                [
                    pair.one,
                    pair.other,
                    pair.metric,
                    pair.difference,
                    *(pair.interval or (None, None)),
                    pair.p_value,
                ]
                for pair in report.pairs
            ],
        ),
        "folds": build_folds_table(report),
        "ratings": build_ratings_table(report),
    }
    if report.per_class:
        names = list(next(iter(report.per_class.values())))
        tables["per_class"] = (
            ["class", *names],
            [[class_name, *values.values()] for class_name, values in report.per_class.items()],
        )
        tables["confusion"] = (
            ["truth", *report.per_class],
            [
                [class_name, *counts]
                for class_name, counts in zip(report.per_class, report.confusion, strict=True)
            ],
        )
    if samples:
        tables |= {
            name: _build_samples_table(getattr(report, name))
            for name in ("samples", "mistakes", "worst")
        }
    return {name: table for name, table in tables.items() if table[1]}


def _build_samples_table(rows: list[Sample]) -> tuple[list[str], list[list[Any]]]:
    """Return (headings, rows) of sample rows with the answers of all models."""
    models = list(rows[0].answers) if rows else []
    answer_rows = [[row.answers[name] for name in models] for row in rows]
    has_confidence = any(
        answer.confidence is not None for answers in answer_rows for answer in answers
    )
    headings = [
        "row",
        "prompt",
        "reference",
        *models,
        *([f"{name} confidence" for name in models] if has_confidence else []),
    ]
    values = [
        [answer.text for answer in answers]
        + ([answer.confidence for answer in answers] if has_confidence else [])
        for answers in answer_rows
    ]
    return headings, [
        [row.row, row.prompt, row.reference, *cells]
        for row, cells in zip(rows, values, strict=True)
    ]


def resolve_wandb_mode(job: JobSpec) -> Mode:
    """Return the mode: online, offline or disabled.

    It is online only if an API key is available: `wandb.init` would otherwise ask for one
    and block a driver that nobody watches.
    """
    requested = get_requested_mode(job)
    if requested in ("offline", "disabled"):
        return requested
    return "online" if _is_logged_in(job) else "offline"


def get_requested_mode(job: JobSpec) -> Mode | None:
    """Return the mode that the job or the environment requests; None to use what is available.

    `tracking.mode` wins over WANDB_MODE.
    """
    requested = (
        job.tracking.mode if job.tracking.mode != "auto" else os.environ.get("WANDB_MODE", "auto")
    )
    return next((mode for mode in _MODES if requested == mode), None)


def _is_logged_in(job: JobSpec) -> bool:
    """Return True if an API key is in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlparse

    host = urlparse(
        job.tracking.base_url or os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    ).hostname
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(str(path)).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _import_wandb() -> Any:
    """Import W&B's client with a temporary folder that the next command removes after a kill.

    The client creates temporary folders when it is imported and when it starts its service,
    which a killed process leaves behind. From the first call on, this folder is the default of
    `tempfile` in this process.
    """
    if "wandb" not in sys.modules:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        write_owner(folder)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        tempfile.tempdir = str(folder)
    import wandb

    return wandb


def find_wandb_folders(run: Run) -> dict[str, list[Path]]:
    """Return the folders that W&B has written for a run, by the id of the W&B run."""
    folders: dict[str, list[Path]] = {}
    for folder in (run.path / "wandb" / "wandb").glob("*run-*-*"):
        # The name is `run-` or `offline-run-`, the time of its start, `-`, the id.
        wandb_id = folder.name.partition("run-")[2].partition("-")[2]
        folders.setdefault(wandb_id, []).append(folder)
    return folders


def open_wandb(
    run: Run,
    job: JobSpec,
    mode: Mode,
    name: str,
    display_name: str,
    *,
    job_type: str,
    config: dict[str, Any],
) -> Any:
    """Open a W&B run in the group of a run.

    Remove the folders of a killed attempt first (`find_wandb_folders`).

    Args:
        run: The run. All its W&B runs are grouped under its id.
        job: Its job, with the `tracking` block.
        mode: What `resolve_wandb_mode` returned.
        name: Id of the W&B run. It is fixed, so that a resumed run continues it.
        display_name: Name that W&B shows.
        job_type: Job type that W&B shows.
        config: Values that W&B shows as the run's configuration.

    Raises:
        StaleAttempt: Another driver has taken over the run.
    """
    wandb = _import_wandb()
    run.check_current()
    folder = run.path / "wandb"
    folder.mkdir(exist_ok=True)
    tracking = job.tracking
    # W&B would otherwise upload source code, the git state and the console's output, and write to a
    # terminal that shows the live view.
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
        name=display_name,
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
