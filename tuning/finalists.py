"""Choose the finalists of a search, which are evaluated on the held-out rows like the base."""

from __future__ import annotations

from collections.abc import Mapping

from lorafleet.evaluation.metrics.summary import write_baselines
from lorafleet.evaluation.report.build import build_report
from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs import files
from lorafleet.jobs.runs.events import WarningEvent
from lorafleet.jobs.runs.run import Run, Trial, TrialState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials import sampling as search
from lorafleet.tuning.held_out import (
    HeldOutEvaluation,
    build_base_evaluation,
    build_trial_evaluation,
)
from lorafleet.tuning.trial_run import Work


def select_evaluations(
    run: Run, job: JobSpec, work: Work, data: TokenData
) -> list[HeldOutEvaluation]:
    """Return the evaluations of the base and the finalists on the held-out rows.

    A model that an earlier attempt has evaluated is left out. Writes the rows and the scores
    of the baselines, which the report shows beside the models.

    Args:
        run: The run.
        job: Its job.
        work: What its trials share.
        data: The tokenised rows.
    """
    # First: the report that chooses them must not know the baselines of the held-out rows yet.
    finalists = select_finalists(run)
    split = "validation" if data.chosen_on_test else "test"
    shown_rows = (row.to_display_record() for row in data.read_rows(split))
    files.write_jsonl(run.get_rows_file(split), shown_rows)
    base_splits = tuple(dict.fromkeys(("validation", split)))
    write_baselines(run, job, {name: data.read_rows(name) for name in base_splits})
    evaluations = []
    if not (run.path / "report" / "base.json").is_file():
        evaluations.append(build_base_evaluation(run, work.job, work.tokens, base_splits))
    for trial in finalists:
        trial_job = search.build_trial_job(work.job, trial.read_params().assignment)
        evaluations.append(build_trial_evaluation(trial, trial_job, work.tokens, (split,)))
    return evaluations


def record_unevaluated(run: Run, reasons: Mapping[str, str]) -> None:
    """Record a warning for each model that could not be evaluated on the held-out rows.

    Args:
        reasons: Model name -> reason.
    """
    for name, reason in reasons.items():
        sentence = f"not evaluated on the held-out rows: {reason}"
        run.add_event(WarningEvent(trial_id=name, sentence=sentence))


def select_finalists(run: Run) -> list[Trial]:
    """Return the recommended trial and the trials that reached as high a rung as any.

    Those without weights, and those that were evaluated already, are left out.
    """
    report = build_report(run)
    # Trials that stopped early have weights too, of their best evaluation.
    candidates = [
        trial
        for trial in run.list_trials()
        if trial.state in (TrialState.FINISHED, TrialState.STOPPED)
        and trial.weights.is_dir()
        and not (trial.path / "test.json").is_file()
    ]
    last_rungs = {row.trial_id: row.rung if row.rung is not None else -1 for row in report.trials}
    highest_rung = max((last_rungs.get(trial.id, -1) for trial in candidates), default=-1)
    chosen = report.recommendation.trial_id
    return [
        trial
        for trial in candidates
        if trial.id == chosen or last_rungs.get(trial.id, -1) >= highest_rung
    ]
