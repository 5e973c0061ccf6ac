"""The live view of a run: one row per trial and the best trial so far."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorafleet.evaluation.report.format import (
    format_duration,
    format_number,
    format_params,
    format_short_params,
)
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.records import raise_damaged_file
from lorafleet.jobs.runs.run import Run, Trial, TrialState
from lorafleet.jobs.schema.metrics import is_better
from lorafleet.jobs.schema.search import FOLD
from lorafleet.jobs.text import format_count
from lorafleet.jobs.trials.sampling import remove_fold

if TYPE_CHECKING:
    from rich.console import RenderableType

_FRESH_SECONDS = 10.0
"""A trial whose heartbeat is younger than this, in seconds, is training."""
_MARKS = {"running": "▶", "finished": "✔", "stopped": "✂", "failed": "✘", "pending": "·"}
_STYLES = {
    "running": "cyan",
    "finished": "green",
    "stopped": "dim",
    "failed": "red",
    "pending": "dim",
}


def collect_trial_rows(run: Run) -> list[dict[str, Any]]:
    """Return the state of each trial as data. Trials with damaged files are left out.

    `status --format json` prints these rows, so their keys are public.

    Raises:
        RunError: The run's plan.json is damaged.
    """
    with raise_damaged_file(run.path / "plan.json"):
        name, goal = _get_metric(files.read_json(run.path / "plan.json").get("job", {}))
    rows = []
    for trial in run.list_trials():
        with (
            contextlib.suppress(RunError),
            raise_damaged_file(trial.path),
        ):  # the run's remarks name it
            rows.append(_build_trial_row(trial, name, goal))
    return rows


def _get_metric(job: dict[str, Any]) -> tuple[str, str]:
    """Return (name, goal) of a job's metric.

    Args:
        job: The job as plan.json stores it. It is not validated, so that runs of other
            versions can be shown.
    """
    from lorafleet.jobs.schema.metrics import DEFAULT_METRIC, METRICS

    metric = (job.get("search") or job.get("compare") or {}).get("metric")
    name = metric["name"] if metric else DEFAULT_METRIC[job.get("task", "classification")]
    goal = metric["goal"] if metric else METRICS[name].goal
    return name, str(goal)


def _build_trial_row(trial: Trial, metric: str, goal: Any) -> dict[str, Any]:
    params, status, rows = trial.read_params(), trial.read_status(), trial.read_metrics()
    last = rows[-1] if rows else {}
    heartbeat = trial.read_progress()
    # Between two reports the heartbeat is further; after a report, the row is.
    latest = last
    if heartbeat.step > int(last.get("step", 0)):
        latest = heartbeat.to_dict()
    best = None
    for row in rows:
        score = row.get(metric) if row.get("evaluated") else None
        if score is not None and is_better(score, best, goal):
            best = score
    state = status.state or "pending"
    if state == "pending" and time.time() - (heartbeat.time or 0.0) < _FRESH_SECONDS:
        state = "running"  # it is training and has not reported yet
    step, total = int(latest.get("step", 0)), params.total_steps or 0
    seconds = latest.get("train_seconds")
    seconds_left = (
        seconds / step * (total - step) if seconds and step and state == "running" else None
    )
    return {
        "trial_id": trial.id,
        "arm": trial.arm,
        "state": state,
        "params": params.assignment,
        "rung": status.rung,
        "rungs": len(params.rung_levels),
        "step": step,
        "total_steps": total,
        "train_loss": latest.get("train_loss")
        if latest.get("train_loss") is not None
        else last.get("train_loss"),
        "metric": metric,
        "goal": goal,
        "score": best,
        "tokens_per_second": latest.get("tokens_per_second"),
        "seconds_left": seconds_left,
        "failure": status.failure.failure_class if status.failure else None,
    }


def find_best_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the trial with the best score so far. Trials of a single fold are not candidates.

    None if no trial has a score. The score of a trial is the best of its evaluations.
    """
    best: dict[str, Any] | None = None
    for row in (row for row in rows if FOLD not in row["params"]):
        best_score = best["score"] if best else None
        if row["score"] is not None and is_better(row["score"], best_score, row["goal"]):
            best = row
    return best


def describe_best_over_folds(rows: list[dict[str, Any]]) -> str | None:
    """Describe the best mean so far among the configurations with the most finished folds.

    Returns None if the run is not a cross-validation.
    """
    scores_of: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for row in rows:
        if FOLD in row["params"] and row["score"] is not None:
            params = remove_fold(row["params"])
            scores_of.setdefault(repr(params), (params, []))[1].append(row["score"])
    if not scores_of:
        return None
    # A mean over fewer folds is of other rows, so it is not comparable.
    folds = max(len(scores) for _, scores in scores_of.values())
    means = [
        (fmean(scores), params) for params, scores in scores_of.values() if len(scores) == folds
    ]
    pick = max if rows[0]["goal"] == "maximize" else min
    mean, params = pick(means, key=lambda pair: pair[0])
    score = f"{rows[0]['metric']} {format_number(mean)}"
    return (
        f"best mean so far: {format_short_params(params)} with {score} over "
        f"{format_count(folds, 'fold')}"
    )


def render_run(run: Run, message: str = "") -> RenderableType:
    """Return the live table of a run.

    Args:
        message: What the queue or cluster reports of the run.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = collect_trial_rows(run)
    status = run.read_status()
    elapsed = format_duration(float(status.ended or time.time()) - run.created)
    # The driver records how many trials there will be; until then only those that exist are known.
    total = (run.read_events("search") or [{}])[-1].get("trials", len(rows))
    ended = sum(TrialState(row["state"]).has_ended for row in rows)
    phase = status.phase or status.state
    head = Text.assemble((run.id, "bold"), f"  {phase}  {ended} of {total} trials ended  {elapsed}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    parameters = list(dict.fromkeys(path for row in rows for path in row["params"]))
    arms = any(row["arm"] for row in rows)
    for name in (
        "",
        *(["arm"] if arms else []),
        "trial",
        *(path.rpartition(".")[2] for path in parameters),
        "rung",
        "step",
        "loss",
        rows[0]["metric"] if rows else "score",
        "tokens/s",
        "left",
    ):
        table.add_column(
            name, justify="left" if name in ("", "trial", "arm") else "right", no_wrap=True
        )
    best = find_best_row(rows)
    for row in rows:
        style = "bold green" if row is best else _STYLES[row["state"]]
        table.add_row(
            *(Text(cell) for cell in _format_cells(row, parameters, arms=arms)), style=style
        )
    parts: list[RenderableType] = [head, *([Text(message, style="dim")] if message else []), table]
    over_folds = describe_best_over_folds(rows)
    if best:
        parts.append(
            Text(
                f"best so far: {best['trial_id']} with {best['metric']} "
                f"{format_number(best['score'])}",
                style="bold",
            )
        )
    elif over_folds:
        parts.append(Text(over_folds, style="bold"))
    return Group(*parts)


def _format_cells(row: dict[str, Any], parameters: list[str], *, arms: bool) -> list[str]:
    values = [row["params"].get(path, "-") for path in parameters]
    value_texts = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
    rung = "-" if row["rung"] is None else f"{row['rung'] + 1}/{row['rungs']}"
    return [
        _MARKS[row["state"]],
        *([row["arm"] or "-"] if arms else []),
        row["trial_id"],
        *value_texts,
        rung,
        f"{row['step']}/{row['total_steps']}" if row["total_steps"] else "-",
        format_number(row["train_loss"]),
        row["failure"] or format_number(row["score"]),
        format_number(row["tokens_per_second"], 0),
        format_duration(row["seconds_left"]),
    ]


def iterate_news(run: Run, shown_lines: set[str]) -> Iterator[str]:
    """Yield log lines that are not in `shown_lines` yet: each phase, evaluation and end, once.

    Reads all of the run's files in each call, which makes it independent of how they were
    written or downloaded.

    Args:
        shown_lines: Lines that were printed before. New lines are added.
    """
    for line in _iterate_all_news(run):
        if line not in shown_lines:
            shown_lines.add(line)
            yield line


def _iterate_all_news(run: Run) -> Iterator[str]:

    plan = files.read_json(run.path / "plan.json").get("job", {})
    metric, _ = _get_metric(plan)
    for warning in files.read_json(run.path / "facts.json").get("warnings", []):
        yield f"note: {warning}"
    for trial in run.list_trials():
        values = format_params(trial.read_params().assignment)
        name = " ".join(filter(None, (trial.arm, trial.id, f"({values})" if values else "")))
        for row in trial.read_evaluations():
            yield (
                f"{name} step {row['step']}: {metric} {format_number(row.get(metric))}, train loss "
                f"{format_number(row.get('train_loss'))}, "
                f"{format_number(row.get('tokens_per_second'), 0)} tokens/s"
            )
        status = trial.read_status()
        if TrialState(status.state or "pending").has_ended:
            reason = f": {status.reason}" if status.reason else ""
            yield f"{name} {status.state}{reason}"
    yield from run.list_remarks()
    phase = run.read_status().phase
    if phase:
        yield f"{run.id}: {phase}"
