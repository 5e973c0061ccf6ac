"""A run as a person watches it: a line a trial, and the best so far."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorafleet.evaluation.render.trial_table import describe, duration, number, short
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.records import damaged_where_wrong
from lorafleet.jobs.runs.run import Run, Trial, TrialState
from lorafleet.jobs.schema.metrics import is_better
from lorafleet.jobs.schema.search import FOLD
from lorafleet.jobs.text import counted
from lorafleet.jobs.trials.sampling import without_fold

if TYPE_CHECKING:
    from rich.console import RenderableType

_FRESH_SECONDS = 10.0
"""A heartbeat this young means that a trial trains."""
_MARKS = {"running": "▶", "finished": "✔", "stopped": "✂", "failed": "✘", "pending": "·"}
_STYLES = {"running": "cyan", "finished": "green", "stopped": "dim", "failed": "red", "pending": "dim"}


def trial_lines(run: Run) -> list[dict[str, Any]]:
    """What is known of each trial, as data."""
    with damaged_where_wrong(run.path / "plan.json"):
        name, goal = _metric(files.read_json(run.path / "plan.json").get("job", {}))
    lines = []
    for trial in run.trials():
        with contextlib.suppress(RunError), damaged_where_wrong(trial.path):  # named among the run's remarks
            lines.append(_trial_line(trial, name, goal))
    return lines


def _metric(job: dict[str, Any]) -> tuple[str, str]:
    from lorafleet.jobs.schema.metrics import DEFAULT_METRIC, METRICS

    given = (job.get("search") or job.get("compare") or {}).get("metric")
    name = given["name"] if given else DEFAULT_METRIC[job.get("task", "classification")]
    goal = given["goal"] if given else METRICS[name].goal
    return name, str(goal)


def _trial_line(trial: Trial, metric: str, goal: Any) -> dict[str, Any]:
    params, status, rows = trial.params(), trial.status(), trial.metrics()
    last = rows[-1] if rows else {}
    beat = trial.progress()
    now = beat if int(beat.get("step", 0)) > int(last.get("step", 0)) else last
    best = None
    for row in rows:
        score = row.get(metric) if row.get("evaluated") else None
        if score is not None and is_better(score, best, goal):
            best = score
    state = status.get("state", "pending")
    if state == "pending" and time.time() - float(beat.get("time", 0)) < _FRESH_SECONDS:
        state = "running"  # it trains, and has not reported yet
    step, total = int(now.get("step", 0)), int(params.get("total_steps", 0))
    seconds = now.get("train_seconds")
    left = seconds / step * (total - step) if seconds and step and state == "running" else None
    return {
        "trial_id": trial.id,
        "arm": trial.arm,
        "state": state,
        "params": params.get("assignment", {}),
        "rung": status.get("rung"),
        "rungs": len(params.get("rung_levels", [])),
        "step": step,
        "total_steps": total,
        "train_loss": now.get("train_loss") if now.get("train_loss") is not None else last.get("train_loss"),
        "metric": metric,
        "goal": goal,
        "score": best,
        "tokens_per_second": now.get("tokens_per_second"),
        "seconds_left": left,
        "failure": (status.get("failure") or {}).get("failure_class"),
    }


def best_line(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The trial with the best score so far; one fold's trial alone is none."""
    best: dict[str, Any] | None = None
    for line in (line for line in lines if FOLD not in line["params"]):
        better_than = best["score"] if best else None
        if line["score"] is not None and is_better(line["score"], better_than, line["goal"]):
            best = line
    return best


def best_over_folds(lines: list[dict[str, Any]]) -> str | None:
    """Describe the configuration with the best mean so far, among those with the most finished folds.

    Returns None outside of a cross-validation.
    """
    scores_of: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for line in lines:
        if FOLD in line["params"] and line["score"] is not None:
            params = without_fold(line["params"])
            scores_of.setdefault(repr(params), (params, []))[1].append(line["score"])
    if not scores_of:
        return None
    folds = max(len(scores) for _, scores in scores_of.values())
    means = [(fmean(scores), params) for params, scores in scores_of.values() if len(scores) == folds]
    pick = max if lines[0]["goal"] == "maximize" else min
    mean, params = pick(means, key=lambda pair: pair[0])
    score = f"{lines[0]['metric']} {number(mean)}"
    return f"best mean so far: {short(params)} with {score} over {counted(folds, 'fold')}"


def run_view(run: Run, place: str = "") -> RenderableType:
    """The live table; `place` is what a queue says of the run."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines = trial_lines(run)
    status = run.status()
    took = duration(float(status.get("ended") or time.time()) - run.created)
    total = (run.events("search") or [{}])[-1].get("trials", len(lines))
    ended = sum(TrialState(line["state"]).ended for line in lines)
    phase = status.get("phase") or status.get("state")
    head = Text.assemble((run.id, "bold"), f"  {phase}  {ended} of {total} trials ended  {took}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    parameters = list(dict.fromkeys(path for line in lines for path in line["params"]))
    arms = any(line["arm"] for line in lines)
    for name in (
        "",
        *(["arm"] if arms else []),
        "trial",
        *(path.rpartition(".")[2] for path in parameters),
        "rung",
        "step",
        "loss",
        lines[0]["metric"] if lines else "score",
        "tokens/s",
        "left",
    ):
        table.add_column(name, justify="left" if name in ("", "trial", "arm") else "right", no_wrap=True)
    best = best_line(lines)
    for line in lines:
        style = "bold green" if line is best else _STYLES[line["state"]]
        table.add_row(*(Text(cell) for cell in _cells(line, parameters, arms=arms)), style=style)
    parts: list[RenderableType] = [head, *([Text(place, style="dim")] if place else []), table]
    over_folds = best_over_folds(lines)
    if best:
        parts.append(
            Text(f"best so far: {best['trial_id']} with {best['metric']} {number(best['score'])}", style="bold")
        )
    elif over_folds:
        parts.append(Text(over_folds, style="bold"))
    return Group(*parts)


def _cells(line: dict[str, Any], parameters: list[str], *, arms: bool) -> list[str]:
    values = [line["params"].get(path, "-") for path in parameters]
    shown = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
    rung = "-" if line["rung"] is None else f"{line['rung'] + 1}/{line['rungs']}"
    return [
        _MARKS[line["state"]],
        *([line["arm"] or "-"] if arms else []),
        line["trial_id"],
        *shown,
        rung,
        f"{line['step']}/{line['total_steps']}" if line["total_steps"] else "-",
        number(line["train_loss"]),
        line["failure"] or number(line["score"]),
        number(line["tokens_per_second"], 0),
        duration(line["seconds_left"]),
    ]


def news(run: Run, seen: set[str]) -> Iterator[str]:
    """Lines for a log: each phase, each evaluation, each end, once."""
    for line in _all_news(run):
        if line not in seen:
            seen.add(line)
            yield line


def _all_news(run: Run) -> Iterator[str]:

    plan = files.read_json(run.path / "plan.json").get("job", {})
    metric, _ = _metric(plan)
    for warning in files.read_json(run.path / "facts.json").get("warnings", []):
        yield f"note: {warning}"
    for trial in run.trials():
        values = describe(trial.params().get("assignment", {}))
        name = " ".join(filter(None, (trial.arm, trial.id, f"({values})" if values else "")))
        for row in trial.evaluations():
            yield (
                f"{name} step {row['step']}: {metric} {number(row.get(metric))}, "
                f"train loss {number(row.get('train_loss'))}, {number(row.get('tokens_per_second'), 0)} tokens/s"
            )
        status = trial.status()
        if TrialState(status.get("state", "pending")).ended:
            reason = f": {status['reason']}" if status.get("reason") else ""
            yield f"{name} {status['state']}{reason}"
    yield from run.remarks()
    phase = run.status().get("phase")
    if phase:
        yield f"{run.id}: {phase}"
