"""Choose the models of a search that are evaluated on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping

from lorafleet.evaluation.metrics.summary import write_baselines
from lorafleet.evaluation.report.search import collect_results
from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs import files
from lorafleet.jobs.runs.events import SearchEndedEvent, WarningEvent
from lorafleet.jobs.runs.run import Run, TrialState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.tuning.held_out import BASE, get_held_out_split


def end_search(run: Run, job: JobSpec, data: TokenData) -> list[str]:
    """Record the recommended trial, and return the models to evaluate on held-out rows.

    Models that were evaluated already are left out. Writes the rows and the scores of the
    baselines, which the report shows beside the models.

    Args:
        run: The run.
        job: Its job.
        data: The tokenised rows.

    Returns:
        `BASE` and ids of trials.
    """
    split = get_held_out_split(data)
    shown_rows = (row.to_display_record() for row in data.read_rows(split))
    files.write_jsonl(run.get_rows_file(split), shown_rows)
    base_splits = tuple(dict.fromkeys(("validation", split)))
    write_baselines(run, job, {name: data.read_rows(name) for name in base_splits})
    # Not the whole report: its check against the baselines would depend on what was evaluated
    # before.
    report = collect_results(run)
    chosen = next(
        (row for row in report.trials if row.trial_id == report.recommendation.trial_id), None
    )
    if chosen is not None and run.read_plan().command == "sweep":
        run.add_event(
            SearchEndedEvent(
                trial_id=chosen.trial_id,
                metric=report.metric,
                score=chosen.metrics.get(report.metric),
                rows=report.rows_count.get("validation"),
                adapter=report.recommendation.adapter,
            )
        )
    last_rungs = {row.trial_id: row.rung if row.rung is not None else -1 for row in report.trials}
    chosen_id = chosen.trial_id if chosen is not None else None
    return [*list_base(run), *_select_finalists(run, last_rungs, chosen_id)]


def list_base(run: Run) -> list[str]:
    """Return `[BASE]`, or an empty list if the base was evaluated already."""
    return [] if (run.path / "report" / "base.json").is_file() else [BASE]


def _select_finalists(run: Run, last_rungs: Mapping[str, int], chosen: str | None) -> list[str]:
    """Return the recommended trial and the trials that reached as high a rung as any.

    Those without weights, and those that were evaluated already, are left out.

    Args:
        last_rungs: Trial id -> last rung that it reached; -1 for none.
        chosen: Id of the recommended trial.
    """
    candidates = [trial for trial in run.list_trials() if can_be_evaluated(run, trial.id)]
    highest_rung = max((last_rungs.get(trial.id, -1) for trial in candidates), default=-1)
    return [
        trial.id
        for trial in candidates
        if (trial.id == chosen or last_rungs.get(trial.id, -1) >= highest_rung)
        and not (trial.path / "test.json").is_file()
    ]


def can_be_evaluated(run: Run, name: str) -> bool:
    """Return whether a model has weights to evaluate. Those of a fold are always deleted."""
    if name == BASE:
        return True
    trial = run.get_trial(name)
    # Trials that stopped early have weights too, of their best evaluation.
    has_ended = trial.state in (TrialState.FINISHED, TrialState.STOPPED)
    return has_ended and trial.fold is None and trial.weights.is_dir()


def record_unevaluated(run: Run, reasons: Mapping[str, str]) -> None:
    """Record a warning for each model that could not be evaluated on the held-out rows.

    Args:
        reasons: Model name -> reason.
    """
    for name, reason in reasons.items():
        sentence = f"not evaluated on the held-out rows: {reason}"
        run.add_event(WarningEvent(trial_id=name, sentence=sentence))
