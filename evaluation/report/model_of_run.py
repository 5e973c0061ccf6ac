"""Which model of a run is meant: a named trial's, or what the run recommends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorafleet.evaluation.report.search import build_report, run_job
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.arms import arm_of, judged_job
from lorafleet.jobs.trials.trial_id import prompt_format


@dataclass(frozen=True)
class Shipped:
    """One model of a run: what it is loaded as, and its weights."""

    run: Run
    job: JobSpec
    """As what: its base and its method."""
    weights: Path | None
    """Folder of what was trained; None: an arm that is the base as it is."""
    trial_id: str | None
    arm: str | None = None
    untrained: bool = False
    """Whether it is an arm that trains nothing: an untrained base, or an adapter on another base than its own."""


def shipped(run: Run, trial_id: str = "") -> Shipped:
    """The model of a trial, or (no `trial_id`) what the run recommends.

    Raises RunError where there is none, or where its weights are not on this machine.
    """
    check_prompt_format(run)
    if trial_id:
        trial = next((found for found in run.trials() if found.id == trial_id), run.trial(trial_id))
        return Shipped(run, job_of(trial), _there(run, trial.weights), trial_id, trial.arm)
    report = build_report(run)
    chosen = report.recommendation
    weights = run.path / chosen.adapter if chosen.adapter else None
    if report.arms is not None and chosen.arm:
        job = run_job(run)
        best = next(arm.configuration for arm in report.arms if arm.arm == chosen.arm)
        found = _there(run, weights) if weights else None
        untrained = not arm_of(job, chosen.arm).trains
        return Shipped(run, judged_job(job, chosen.arm, best), found, chosen.trial_id, chosen.arm, untrained)
    if chosen.trial_id is None or weights is None:
        raise RunError(f"{run.id} recommends nothing yet: name a trial, as {run.id}:TRIAL")
    return Shipped(run, job_of(Trial(weights.parent)), _there(run, weights), chosen.trial_id)


def check_prompt_format(run: Run) -> None:
    """Raise RunError for a run that another version trained on other tokens than this one would make of its rows."""
    trained = files.read_json(run.path / "facts.json").get("prompt_format")
    job = run_job(run)
    if trained is not None and trained != prompt_format(job):
        raise RunError(
            f"{run.id} was trained with prompt format {trained}, and this version of lorafleet has "
            f"{prompt_format(job)}: it would build other prompts and end tokens than the training had. Use the version "
            "that trained it, or train it again; its report and `lorafleet compare RUN RUN` still work"
        )


def job_of(trial: Trial) -> JobSpec:
    """The job that a trial trained."""
    return search.trial(run_job(Run(trial.path.parent.parent)), trial.params().get("assignment", {}))


def _there(run: Run, weights: Path) -> Path:
    if not weights.is_dir():
        more = f"`lorafleet pull {run.id}` brings it" if weights.parent.is_dir() else "no such trial was kept"
        raise RunError(f"{weights} is not on this machine: {more}")
    return weights
