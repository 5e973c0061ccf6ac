"""The live view of a run: one row per trial and the best trial so far."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from lorafleet.commands.followed_run import FollowedRun, FollowedTrial
from lorafleet.evaluation.report.format import (
    format_duration,
    format_number,
    format_params,
    format_short_params,
)
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.events import Event, SearchEndedEvent, SearchEvent
from lorafleet.jobs.runs.records import MetricsRow, raise_damaged_file
from lorafleet.jobs.runs.run import TrialState
from lorafleet.jobs.schema.metrics import is_better
from lorafleet.jobs.schema.types import FOLD, Goal
from lorafleet.jobs.text import format_count

if TYPE_CHECKING:
    from rich.console import RenderableType

_FRESH_SECONDS = 10.0
"""A trial whose heartbeat is younger than this, in seconds, is training."""
_MARKS = {
    "running": "▶",
    "finished": "✔",
    "stopped": "✂",
    "failed": "✘",
    "pending": "·",
    "paused": "‖",
}
_STYLES = {
    "running": "cyan",
    "finished": "green",
    "stopped": "dim",
    "failed": "red",
    "pending": "dim",
    "paused": "dim",
}


class TrialView(BaseModel):
    """State of one trial, as the live view and `status --format json` show it.

    The names of the fields are public: they are the keys of that JSON.
    """

    model_config = ConfigDict(frozen=True)

    trial_id: str
    arm: str | None
    """Arm of a comparison that the trial belongs to."""
    state: str
    params: dict[str, Any]
    """Dotted field -> value that the search assigned."""
    rung: int | None
    """Index of the last rung that was reached."""
    rungs: int
    """Number of rungs."""
    step: int
    total_steps: int
    train_loss: float | None
    metric: str
    goal: Goal
    score: float | None
    """Best validation score so far."""
    tokens_per_second: float | None
    seconds_left: float | None
    """Estimated time to the last step, for a trial that is training."""
    failure: str | None
    """Class of the failure that ended the trial."""

    @property
    def is_fold(self) -> bool:
        """Return whether the trial is one fold of a cross-validation."""
        return FOLD in self.params


def collect_trials(followed: FollowedRun) -> list[TrialView]:
    """Return the state of each trial. Trials with damaged files are left out.

    Raises:
        RunError: The run's plan.json is damaged.
    """
    with raise_damaged_file(followed.run.path / "plan.json"):
        name, goal = _get_metric(followed.read_plan().job)
    views = []
    for trial in followed.read_trials():
        # A damaged trial is named by the run's remarks.
        with contextlib.suppress(RunError), raise_damaged_file(trial.trial.path):
            views.append(_build_trial_view(trial, name, goal))
    return views


def _get_metric(job: dict[str, Any]) -> tuple[str, Goal]:
    """Return (name, goal) of a job's metric.

    Args:
        job: The job as plan.json stores it. It is not validated, so that runs of other
            versions can be shown.
    """
    from lorafleet.jobs.schema.metrics import DEFAULT_METRIC, METRICS

    metric = (job.get("search") or job.get("compare") or {}).get("metric")
    name = metric["name"] if metric else DEFAULT_METRIC[job.get("task", "classification")]
    goal = metric["goal"] if metric else METRICS[name].goal
    return name, "minimize" if goal == "minimize" else "maximize"


def _build_trial_view(followed: FollowedTrial, metric: str, goal: Goal) -> TrialView:
    trial, params, status = followed.trial, followed.params, followed.status
    rows, heartbeat = followed.rows, followed.progress
    last = rows[-1] if rows else MetricsRow(step=0)
    # Between two reports the heartbeat is further; after a report, the row is.
    latest = heartbeat if heartbeat.step > last.step else last
    best: float | None = None
    for row in rows:
        score = row.get_metric(metric) if row.evaluated else None
        if score is not None and is_better(score, best, goal):
            best = score
    state = status.state or "pending"
    if state == "pending" and time.time() - (heartbeat.time or 0.0) < _FRESH_SECONDS:
        state = "running"  # it is training and has not reported yet
    step, total = latest.step, params.total_steps or 0
    seconds_left = None
    if state == "running" and step and latest.train_seconds:
        seconds_left = latest.train_seconds / step * (total - step)
    train_loss = latest.train_loss if latest.train_loss is not None else last.train_loss
    return TrialView(
        trial_id=trial.id,
        arm=trial.arm,
        state=state,
        params=params.assignment,
        rung=followed.rung,
        rungs=len(params.rung_levels),
        step=step,
        total_steps=total,
        train_loss=train_loss,
        metric=metric,
        goal=goal,
        score=best,
        tokens_per_second=latest.tokens_per_second,
        seconds_left=seconds_left,
        failure=status.failure.failure_class if status.failure else None,
    )


def find_best_trial(trials: list[TrialView]) -> TrialView | None:
    """Return the trial with the best score so far. Trials of a single fold are not candidates.

    None if no trial has a score. The score of a trial is the best of its evaluations.
    """
    best: TrialView | None = None
    for trial in trials:
        if trial.is_fold or trial.score is None:
            continue
        if is_better(trial.score, best.score if best else None, trial.goal):
            best = trial
    return best


def describe_best_over_folds(trials: list[TrialView]) -> str | None:
    """Describe the best mean so far among the configurations with the most finished folds.

    Returns None if the run is not a cross-validation.
    """
    scored = [trial for trial in trials if trial.is_fold and trial.score is not None]
    if not scored:
        return None
    # Imported here: the live view of any other run needs no schema of jobs.
    from lorafleet.jobs.trials.sampling import remove_fold

    scores_of: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for trial in scored:
        if trial.score is not None:
            params = remove_fold(trial.params)
            scores_of.setdefault(repr(params), (params, []))[1].append(trial.score)
    # A mean over fewer folds is of other rows, so it is not comparable.
    folds = max(len(scores) for _, scores in scores_of.values())
    means = [
        (fmean(scores), params) for params, scores in scores_of.values() if len(scores) == folds
    ]
    pick = max if trials[0].goal == "maximize" else min
    mean, params = pick(means, key=lambda pair: pair[0])
    score = f"{trials[0].metric} {format_number(mean)}"
    return (
        f"best mean so far: {format_short_params(params)} with {score} over "
        f"{format_count(folds, 'fold')}"
    )


def render_run(followed: FollowedRun, message: str = "") -> RenderableType:
    """Return the live table of a run.

    Args:
        message: What the queue or cluster reports of the run.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    run, trials = followed.run, collect_trials(followed)
    status = run.read_status()
    elapsed = format_duration(float(status.ended or time.time()) - run.created)
    # The driver records how many trials there will be; until then only those that exist are known.
    events = followed.read_events()
    searches = [event for event in events if isinstance(event, SearchEvent)]
    total = searches[-1].trials if searches else None
    if total is None:
        total = len(trials)
    ended = sum(TrialState(trial.state).has_ended for trial in trials)
    phase = status.phase or status.state
    head = Text.assemble((run.id, "bold"), f"  {phase}  {ended} of {total} trials ended  {elapsed}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    parameters = list(dict.fromkeys(path for trial in trials for path in trial.params))
    arms = any(trial.arm for trial in trials)
    for name in (
        "",
        *(["arm"] if arms else []),
        "trial",
        *(path.rpartition(".")[2] for path in parameters),
        "rung",
        "step",
        "loss",
        trials[0].metric if trials else "score",
        "tokens/s",
        "left",
    ):
        table.add_column(
            name, justify="left" if name in ("", "trial", "arm") else "right", no_wrap=True
        )
    best = find_best_trial(trials)
    for trial in trials:
        style = "bold green" if trial is best else _STYLES[trial.state]
        table.add_row(
            *(Text(cell) for cell in _format_cells(trial, parameters, arms=arms)), style=style
        )
    parts: list[RenderableType] = [head, *([Text(message, style="dim")] if message else []), table]
    over_folds = describe_best_over_folds(trials)
    recommended = describe_recommendation(events)
    if recommended:
        parts.append(Text(recommended, style="bold"))
    elif best:
        parts.append(
            Text(
                f"best so far: {best.trial_id} with {best.metric} {format_number(best.score)}",
                style="bold",
            )
        )
    elif over_folds:
        parts.append(Text(over_folds, style="bold"))
    return Group(*parts)


def _format_cells(trial: TrialView, parameters: list[str], *, arms: bool) -> list[str]:
    values = [trial.params.get(path, "-") for path in parameters]
    value_texts = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
    rung = "-" if trial.rung is None else f"{trial.rung + 1}/{trial.rungs}"
    return [
        _MARKS[trial.state],
        *([trial.arm or "-"] if arms else []),
        trial.trial_id,
        *value_texts,
        rung,
        f"{trial.step}/{trial.total_steps}" if trial.total_steps else "-",
        format_number(trial.train_loss),
        trial.failure or format_number(trial.score),
        format_number(trial.tokens_per_second, 0),
        format_duration(trial.seconds_left),
    ]


def describe_recommendation(events: Sequence[Event]) -> str | None:
    """Return the trial that a search recommends, as text; None while it searches.

    Args:
        events: All events of a run.
    """
    # A resumed run may search again after it has recommended a trial.
    last = next(
        (event for event in reversed(events) if isinstance(event, SearchEvent | SearchEndedEvent)),
        None,
    )
    if not isinstance(last, SearchEndedEvent):
        return None
    rows = f" on {format_count(last.rows, 'validation row')}" if last.rows else ""
    folder = f" ({last.adapter})" if last.adapter else ""
    return (
        f"recommended by the search: {last.trial_id}{folder} with {last.metric} "
        f"{format_number(last.score)}{rows}"
    )


def iterate_news(followed: FollowedRun, shown_lines: set[str]) -> Iterator[str]:
    """Yield log lines that are not in `shown_lines` yet: each phase, evaluation and end, once.

    Args:
        shown_lines: Lines that were printed before. New lines are added.
    """
    for line in _iterate_all_news(followed):
        if line not in shown_lines:
            shown_lines.add(line)
            yield line


def _iterate_all_news(followed: FollowedRun) -> Iterator[str]:
    run = followed.run
    metric, _ = _get_metric(followed.read_plan().job)
    for warning in followed.read_metadata().warnings:
        yield f"note: {warning}"
    for item in followed.read_trials():
        trial, values = item.trial, format_params(item.params.assignment)
        name = " ".join(filter(None, (trial.arm, trial.id, f"({values})" if values else "")))
        for row in item.rows:
            if row.evaluated:
                yield (
                    f"{name} step {row.step}: {metric} {format_number(row.get_metric(metric))}, "
                    f"train loss {format_number(row.train_loss)}, "
                    f"{format_number(row.tokens_per_second, 0)} tokens/s"
                )
        if item.has_ended:
            reason = f": {item.status.reason}" if item.status.reason else ""
            yield f"{name} {item.status.state}{reason}"
    yield from followed.list_remarks()
    recommended = describe_recommendation(followed.read_events())
    if recommended:
        yield recommended
    phase = run.read_status().phase
    if phase:
        yield f"{run.id}: {phase}"
