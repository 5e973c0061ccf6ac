"""Select a model of a run: that of a named trial, or the recommended one.

`evaluate`, `export` and `benchmark` begin here. Nothing is loaded: the result says
which job and which folder of weights belong together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorafleet.evaluation.report.build import build_report
from lorafleet.evaluation.report.search import load_run_job
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.arms import build_evaluation_job, get_arm
from lorafleet.jobs.trials.trial_id import get_prompt_format


@dataclass(frozen=True)
class SelectedModel:
    """One model of a run: the job to load it with, and its weights."""

    run: Run
    job: JobSpec
    """Job with the base and the method of the model."""
    weights: Path | None
    """Folder of the trained weights; None for an arm that is the unchanged base."""
    trial_id: str | None
    arm: str | None = None
    untrained: bool = False
    """True for an arm without training: an untrained base, or an adapter on another base."""


def select_model(run: Run, trial_id: str = "") -> SelectedModel:
    """Return the model of a trial, or the recommended model if `trial_id` is empty.

    Args:
        run: The run.
        trial_id: Id of a trial, also of one of a comparison's arms.

    Raises:
        RunError: There is no such model, its weights are not on this machine, or another
            version trained the run with another prompt format.
    """
    check_prompt_format(run)
    if trial_id:
        # Trials of arms lie below their arm's folder. `get_trial` finds only the run's own, but its
        # path makes the message for a trial that does not exist.
        trial = next(
            (existing for existing in run.list_trials() if existing.id == trial_id),
            run.get_trial(trial_id),
        )
        return SelectedModel(
            run, load_trial_job(trial), _check_weights(run, trial.weights), trial_id, trial.arm
        )
    report = build_report(run)
    chosen = report.recommendation
    weights = run.path / chosen.adapter if chosen.adapter else None
    if report.arms is not None and chosen.arm:
        job = load_run_job(run)
        best = next(arm.configuration for arm in report.arms if arm.arm == chosen.arm)
        existing = _check_weights(run, weights) if weights else None
        untrained = not get_arm(job, chosen.arm).needs_training
        return SelectedModel(
            run,
            build_evaluation_job(job, chosen.arm, best),
            existing,
            chosen.trial_id,
            chosen.arm,
            untrained,
        )
    if chosen.trial_id is None or weights is None:
        raise RunError(f"{run.id} does not recommend a trial yet: name one, as {run.id}:TRIAL")
    return SelectedModel(
        run, load_trial_job(Trial(weights.parent)), _check_weights(run, weights), chosen.trial_id
    )


def check_prompt_format(run: Run) -> None:
    """Check that this version of lorafleet makes the tokens that a run was trained on.

    With another prompt format, prompts and end tokens would differ from those of the
    training, and every number measured with them would be wrong.

    Raises:
        RunError: The run was trained with another prompt format.
    """
    trained = run.read_metadata().prompt_format
    job = load_run_job(run)
    if trained is not None and trained != get_prompt_format(job):
        raise RunError(
            f"{run.id} was trained with prompt format {trained}, but this version of lorafleet has "
            f"{get_prompt_format(job)}, with other prompts and end tokens than in the training. "
            "Use the version that trained it, or train it again; its report and `lorafleet compare "
            "RUN RUN` still work"
        )


def load_trial_job(trial: Trial) -> JobSpec:
    """Return the job that a trial trained: the job of its run with the values of the trial."""
    return search.build_trial_job(
        load_run_job(Run(trial.path.parent.parent)), trial.read_params().assignment
    )


def _check_weights(run: Run, weights: Path) -> Path:
    """Return the folder of weights. Raises RunError if it is not on this machine."""
    if weights.is_dir():
        return weights
    if not weights.parent.is_dir():
        raise RunError(f"{weights} is not on this machine: the run has no such trial")
    raise RunError(
        f"{weights} is not on this machine. If the run is on a cluster, download it with "
        f"`lorafleet pull {run.id} --adapters all`; otherwise it was deleted, because only the "
        "best search.keep trials keep their weights"
    )
