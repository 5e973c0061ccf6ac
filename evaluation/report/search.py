"""Build the report of a run from its files, at any time.

The files are those of a sweep or a training; `comparison.py` uses the same functions
for each arm. The run may still be training, be killed or be copied from elsewhere:
missing results leave gaps, and a damaged trial costs its own row. Needs no torch, Ray
or network.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lorafleet.evaluation.report.format import format_params
from lorafleet.evaluation.report.recommend_trial import (
    MAX_COMPARED,
    SearchRule,
    recommend,
    recommend_over_folds,
    summarize_folds,
)
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.records import (
    DamagedFile,
    MetricsRow,
    RunMetadata,
    SplitScores,
    raise_damaged_file,
)
from lorafleet.jobs.runs.report import Baseline, Failure, Intervals, Report, Row
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.metrics import is_better
from lorafleet.jobs.schema.types import FOLD
from lorafleet.jobs.schema.validation_messages import describe_unreadable_file
from lorafleet.jobs.trials.sampling import remove_fold

if TYPE_CHECKING:
    from lorafleet.evaluation.metrics.predictions import RowResults


def load_run_job(run: Run) -> JobSpec:
    """Load the job of a run.

    Its paths are those of the machine on which the run ran; `load_local_job` has those of
    the machine that submitted it.

    Raises:
        RunError: The folder is not a complete run, or its job is of another version.
    """
    plan = run.read_plan()
    if not plan.job:
        raise RunError(
            f"{run.path} has no plan.json: it is not a run's folder, or the submission was not "
            "completed. Submit the job again"
        )
    try:
        return JobSpec.from_record(plan.job)
    except ValidationError as error:
        raise RunError(describe_unreadable_file(run.path / "plan.json", error)) from None


def load_local_job(run: Run) -> JobSpec:
    """Load the job of a run with the paths of the machine that submitted it.

    The plan of a run has the paths of the machine on which it ran. `resolved.json`, which
    the client wrote at the submission, has the values as the user's machine knows them.

    Raises:
        RunError: The folder is not a complete run, or its job is of another version.
    """
    raw = load_run_job(run).model_dump(mode="json")
    for path, field_record in files.read_json(run.path / "resolved.json").get("fields", {}).items():
        *blocks, name = path.split(".")
        block = raw
        for key in blocks:
            block = block.get(key) or {}
        if isinstance(block.get(name), str) and isinstance(field_record.get("value"), str):
            block[name] = field_record["value"]
    return JobSpec.from_record(raw)


def _get_data_name(job: JobSpec) -> str:
    """Return the data set of a run, or the evaluated file if the run trains nothing."""
    trains = job.compare is None or any(arm.needs_training for arm in job.compare.arms.values())
    if not trains and job.data.test_file:
        return job.data.test_file
    return str(job.data.dataset_name or job.data.train_file)


def build_search_report(run: Run) -> Report:
    """Build the report of a sweep or a training from the results that it has so far.

    Raises:
        RunError: The folder is not a complete run, or a file that the whole report needs is
            damaged.
    """
    report = collect_results(run)
    return _add_verdict(_add_samples(run, report), run.read_metadata())


def collect_results(run: Run) -> Report:
    """Return the report of a run before samples, arms and cautions are added to it.

    Comparisons start from it as well; their trials are those of the arms, so it has none
    then.
    """
    job = load_run_job(run)
    metadata = run.read_metadata()
    metric = job.metric
    plan = run.read_plan()
    validation_rows = metadata.rows.get("validation", 0)
    rows = load_trial_rows(run, job, validation_rows) if plan.command != "compare" else []
    labels = {row.trial_id: format_params(row.params) for row in rows}
    ordered = sorted(rows, key=lambda row: _compute_rank(row, metric.name, metric.goal))
    folds = summarize_folds(rows, metric.name, metric.goal)
    rule = build_search_rule(job, validation_rows, labels)
    if folds:
        chosen = recommend_over_folds(ordered, folds, rule, load_fold_results(run, rows))
    else:
        chosen = recommend(ordered, rule, _load_best_results(run, ordered, metric.name))
    damages = run.list_damages({row.trial_id for row in rows})
    with raise_damaged_file(run.path / "plan.json"):
        return Report(
            run=run.id,
            state=run.state,
            task=job.task,
            metrics=list(job.metric_names),
            model=job.model.model_name_or_path,
            data=_get_data_name(job),
            metric=metric.name,
            also=[further_metric.name for further_metric in metric.also],
            goal=metric.goal,
            rows_count=metadata.rows,
            rungs=plan.rung_levels,
            time_attr=job.search.scheduler.time_attr
            if job.search and plan.command == "sweep"
            else "step",
            held_out=metadata.held_out_split,
            base=_build_base_row(run, metadata),
            baselines=_load_baselines(run, metadata),
            trials=ordered,
            folds=folds,
            recommendation=chosen.model_copy(
                update={"adapter": _get_weights_path(run, chosen.trial_id)}
            ),
            wall_seconds=run.read_status().wall_seconds,
            warnings=[
                *metadata.warnings,
                *_list_optimism_warnings(metadata),
                *run.list_remarks(),
                *damages,
            ],
            versions=metadata.versions,
            facts=_select_shown_metadata(metadata, job),
        )


def _select_shown_metadata(metadata: RunMetadata, job: JobSpec) -> dict[str, Any]:
    """Return the metadata that a report shows, under the keys of report.json."""
    shown = metadata.model_dump(
        include={"data_sha256", "model_revisions", "labels"}, exclude_unset=True, exclude_none=True
    )
    if metadata.encoders:
        layer = job.evaluate.bertscore_layer
        layer_text = f"layer {layer}" if layer is not None else "its last layer"
        shown["bertscore"] = {
            name: f"{layer_text}, {revision}" for name, revision in metadata.encoders.items()
        }
    return shown


def _load_baselines(run: Run, metadata: RunMetadata) -> list[Baseline]:
    """Return the baselines that need no training.

    For classification they are computed from the stored class counts. For generated answers
    the driver stored them in the run, because they need the rows. Empty for classification
    runs of earlier versions.
    """
    held_out, counts = metadata.held_out_split, metadata.class_counts
    if counts.get("train"):
        from lorafleet.evaluation.metrics.baselines import evaluate_majority_class

        label, metrics = evaluate_majority_class(counts["train"], counts.get("validation", {}))
        _, test_metrics = evaluate_majority_class(counts["train"], counts.get(held_out, {}))
        return [
            Baseline(
                name=f"always {label}",
                what=f"always predicting {label!r}",
                metrics=dict(metrics),
                test_metrics=dict(test_metrics),
            )
        ]
    with raise_damaged_file(run.baselines_file):
        stored = files.read_json(run.baselines_file)
        metrics_of, test_metrics_of = stored.get("validation") or {}, stored.get(held_out) or {}
        return [
            Baseline(
                name=name,
                what=name,
                metrics=metrics_of.get(name, {}),
                test_metrics=test_metrics_of.get(name, {}),
            )
            for name in dict.fromkeys([*metrics_of, *test_metrics_of])
        ]


def _add_verdict(report: Report, metadata: RunMetadata) -> Report:
    """Check the recommendation of a search against the baselines and add cautions.

    Args:
        report: The report with its samples.
        metadata: Metadata of the run.
    """
    from lorafleet.evaluation.report import verdict

    metric, goal = report.metric, report.goal
    recommended = next(
        (row for row in report.trials if row.trial_id == report.recommendation.trial_id), None
    )
    # The untrained base is a baseline too: training that does not improve it is not worth shipping.
    base = Baseline(what="the untrained base model", metrics=report.base.metrics)
    recommendation, cautions = verdict.check_against_baselines(
        report.recommendation,
        metric,
        goal,
        recommended.metrics.get(metric) if recommended else None,
        recommended.intervals.get(metric) if recommended else None,
        [*report.baselines, base],
        "validation rows",
    )
    counts = metadata.class_counts
    if report.task == "classification" and not counts:
        cautions.append(
            "An earlier version made the run and stored no class counts, so there is no baseline."
        )
    labels = [str(label) for label in metadata.labels or []]
    cautions += verdict.check_rows(counts, "validation", report.rows_count.get("validation", 0))
    cautions += verdict.check_predictions(report.confusion, labels)
    cautions += verdict.check_convergence(report.recommendation.trial_id, recommended, metric, goal)
    cautions += verdict.check_scores(metric, [row.metrics.get(metric) for row in report.trials])
    return report.model_copy(update={"recommendation": recommendation, "cautions": cautions})


def build_search_rule(
    job: JobSpec, rows: int = 0, labels: dict[str, str] | None = None
) -> SearchRule:
    """Return the rule by which a job's search chooses.

    Args:
        job: The job.
        rows: Number of validation rows; 0 if unknown.
        labels: Trial id -> its searched values as text.
    """
    return SearchRule(
        metric=job.metric.name,
        goal=job.metric.goal,
        tolerances=job.tolerances,
        also=tuple((metric.name, metric.goal) for metric in job.metric.also),
        keep=job.search.keep if job.search else 1,
        rows=rows,
        draws=job.evaluate.bootstrap_samples,
        labels=labels or {},
    )


def _load_best_results(run: Run, ordered: list[Row], metric: str) -> dict[str, RowResults]:
    """Load the validation results of the best trials that have stored results.

    At most `MAX_COMPARED` trials are read: a search may have thousands.

    Args:
        run: The run.
        ordered: All trials, the best first.
        metric: Trials without it, and trials of folds, are left out.
    """
    candidates = [
        row for row in ordered if row.metrics.get(metric) is not None and row.fold is None
    ]
    results = {row.trial_id: load_validation_results(run, row) for row in candidates[:MAX_COMPARED]}
    return {
        trial_id: row_results
        for trial_id, row_results in results.items()
        if row_results is not None
    }


def load_fold_results(run: Run, rows: list[Row]) -> dict[str, RowResults]:
    """Load the validation results of each configuration of a cross-validation.

    The results of all folds are joined in the order of the folds, so that configurations
    are compared on the same rows.

    Returns:
        `get_configuration_key` -> results, for the configurations with the most stored
            folds.
    """
    from lorafleet.evaluation.metrics.predictions import concatenate

    by_fold: dict[str, dict[int, RowResults]] = {}
    for row in rows:
        results = (
            load_validation_results(run, row)
            if row.fold is not None and row.state == "finished"
            else None
        )
        if results is not None and row.fold is not None:
            by_fold.setdefault(repr(remove_fold(row.params)), {})[row.fold] = results
    max_folds = max((len(folds) for folds in by_fold.values()), default=0)
    complete = {key: folds for key, folds in by_fold.items() if len(folds) == max_folds}
    return {
        key: concatenate([folds[fold] for fold in sorted(folds)]) for key, folds in complete.items()
    }


def load_validation_results(run: Run, row: Row) -> RowResults | None:
    """Load the results of a trial's best weights on each validation row.

    Returns:
        The results. None if nothing is stored (runs of earlier versions), or if the file is
            damaged or of another step: a driver may be killed between writing results and
            metrics.
    """
    from lorafleet.evaluation.metrics.predictions import deserialize

    try:
        results, step = deserialize(
            files.read_regular_file(run.get_trial(row.trial_id).validation_results)
        )
    except (OSError, ValueError):
        return None
    return results if step == row.weights_step else None


def _add_samples(run: Run, report: Report) -> Report:
    """Add held-out rows to a report.

    These are answers of base and recommended trial side by side, and the recommended trial's
    errors.
    """
    from lorafleet.evaluation.report.samples import select_differing, select_mistakes, select_worst

    chosen = report.recommendation.trial_id
    rows = files.read_jsonl(run.get_rows_file(report.held_out))
    if chosen is None or not rows:
        return report
    labels = [str(label) for label in report.facts.get("labels", [])]
    results_by_model = load_chosen_results(run, report)
    update: dict[str, Any] = {"samples": select_differing(rows, results_by_model, labels)}
    if chosen in results_by_model:
        row = report.get_row(chosen)
        update |= {"per_class": row.per_class, "confusion": row.confusion}
        update["mistakes"] = select_mistakes(rows, chosen, results_by_model[chosen], labels)
        update["worst"] = select_worst(rows, chosen, results_by_model[chosen], labels)
    return report.model_copy(update=update)


def clear_run_results(report: Report) -> Report:
    """Return a report without the results of its own run, to be filled with other tables.

    Trials, samples, folds, ratings, warnings and the run time are removed.
    """
    return report.model_copy(
        update={
            "trials": [],
            "pairs": [],
            "samples": [],
            "mistakes": [],
            "worst": [],
            "rungs": [],
            "folds": [],
            "confusion": [],
            "per_class": {},
            "ratings": None,
            "wall_seconds": None,
            "warnings": [],
        }
    )


def load_chosen_results(run: Run, report: Report) -> dict[str, RowResults]:
    """Load the held-out results of a search's untuned base and recommended trial.

    Args:
        run: The run.
        report: Its report, with the recommendation.

    Returns:
        `base` and the id of the trial -> results. A model that was not evaluated on the
            held-out rows is left out.
    """
    from lorafleet.evaluation.metrics.summary import read_results

    split, chosen = report.held_out, report.recommendation.trial_id
    base_scores = run.read_base_scores().get_split(split)
    results_by_model = {"base": read_results(run.get_base_predictions_file(split), base_scores)}
    if chosen is not None:
        trial = run.get_trial(chosen)
        results_by_model[chosen] = read_results(
            trial.get_predictions_file(split), trial.read_held_out().get_split(split)
        )
    return {name: results for name, results in results_by_model.items() if results is not None}


def _get_weights_path(run: Run, trial_id: str | None) -> str | None:
    """Return the recommended weights' path relative to the run; None without a trial."""
    return str(run.get_trial(trial_id).weights.relative_to(run.path)) if trial_id else None


def _list_optimism_warnings(metadata: RunMetadata) -> list[str]:
    """Return a warning if the trial was chosen on the rows that its metrics are reported on."""
    return (
        ["selected on these rows, so optimistic (there is no test set)"]
        if metadata.chosen_on_test
        else []
    )


def _build_base_row(run: Run, metadata: RunMetadata) -> Row:
    """Return the row of the untrained base from base.json; pending if it has no results.

    Raises DamagedFile if base.json is damaged.
    """
    scores = run.read_base_scores()
    validation, held_out = scores.get_split("validation"), scores.get_split(metadata.held_out_split)
    return Row(
        trial_id="base",
        state="pending" if scores.is_empty else "finished",
        metrics=validation.metrics,
        intervals=_parse_intervals(validation.intervals),
        test_metrics=held_out.metrics or None,
        test_intervals=_parse_intervals(held_out.intervals),
        trainable_parameters=0,
    )


def _parse_intervals(raw: Mapping[str, Sequence[float | None] | None] | None) -> Intervals:
    """Return the intervals whose two ends are numbers."""
    intervals: Intervals = {}
    for name, ends in (raw or {}).items():
        low, high = ends or (None, None)
        if low is not None and high is not None:
            intervals[name] = (float(low), float(high))
    return intervals


def load_trial_rows(run: Run, job: JobSpec, validation_rows: int = 0) -> list[Row]:
    """Return a row for each trial that can be read.

    Trials whose files are damaged are left out here; `Run.list_damages` names them for the
    report.

    Args:
        run: The run.
        job: Its job.
        validation_rows: Number of validation rows, for the speed of evaluation; 0 if
            unknown.
    """
    rows = []
    for trial in run.list_trials():
        with contextlib.suppress(DamagedFile), raise_damaged_file(trial.path):
            rows.append(_build_row(trial, job, validation_rows))
    return rows


def _build_row(trial: Trial, job: JobSpec, validation_rows: int) -> Row:
    """Build the row of one trial from its files."""
    params, status, rows = trial.read_params(), trial.read_status(), trial.read_metrics()
    # Scores are those of the weights on disk, costs those of the whole training.
    best = find_best_evaluation(rows, job)
    last = rows[-1] if rows else MetricsRow(step=0)
    held_out = trial.read_held_out()
    # Without test rows, the held-out scores are those of the validation rows.
    scores = held_out.test or held_out.validation or SplitScores()
    failure = status.failure
    fold = params.assignment.get(FOLD)
    speed = EvaluationSpeed()
    if fold is None:
        speed = _compute_evaluation_speed(rows, job, validation_rows)
    gpu_hours = None
    if rows:
        seconds = (last.train_seconds or 0.0) + (last.eval_seconds or 0.0)
        gpu_hours = (params.gpus or 0.0) * seconds / 3600
    return Row(
        trial_id=trial.id,
        state=trial.state.value,
        rung=trial.find_rung(rows),
        params=params.assignment,
        repeats=params.repeats,
        fold=fold,
        metrics=best.get_metrics(job.metric_names) if best else {},
        intervals=_parse_intervals(best.intervals) if best else {},
        test_metrics=scores.metrics or None,
        test_intervals=_parse_intervals(scores.intervals),
        per_class=scores.per_class,
        confusion=scores.confusion,
        step=last.step,
        weights_step=best.step if best else None,
        samples=last.samples or 0,
        train_seconds=last.train_seconds,
        eval_seconds=last.eval_seconds,
        eval_runtime=speed.runtime,
        eval_samples_per_second=speed.samples_per_second,
        eval_steps_per_second=speed.steps_per_second,
        seconds_per_answer=speed.seconds_per_answer,
        samples_per_second=last.samples_per_second,
        tokens_per_second=last.tokens_per_second,
        peak_memory_gib=last.peak_memory_gib,
        gpu_hours=gpu_hours,
        trainable_parameters=last.trainable_parameters,
        number_formats=last.number_formats,
        failure=Failure(failure_class=failure.failure_class, sentence=failure.sentence)
        if failure
        else None,
        reason=status.reason,
        curve=[_build_curve_point(row, job) for row in rows],
    )


@dataclass(frozen=True)
class EvaluationSpeed:
    """Speed of a trial's evaluations; None where it is unknown."""

    runtime: float | None = None
    """Seconds of one evaluation."""
    samples_per_second: float | None = None
    steps_per_second: float | None = None
    seconds_per_answer: float | None = None
    """Only if evaluations generate answers."""


def _compute_evaluation_speed(
    rows: list[MetricsRow], job: JobSpec, validation_rows: int
) -> EvaluationSpeed:
    """Compute the speed of the evaluations of a trial.

    Args:
        rows: Lines of the trial's metrics.jsonl.
        job: The job.
        validation_rows: Rows of one evaluation; 0 if unknown.
    """
    evaluations = sum(row.evaluated for row in rows)
    seconds = rows[-1].eval_seconds if rows else None
    if not evaluations or not seconds or not validation_rows:
        return EvaluationSpeed()
    runtime = seconds / evaluations
    batch_size = job.train.per_device_eval_batch_size * job.resources.world_size
    generates_answers = any(metric.name in job.text_metrics for metric in job.decision_metrics)
    return EvaluationSpeed(
        runtime=runtime,
        samples_per_second=validation_rows / runtime,
        steps_per_second=math.ceil(validation_rows / batch_size) / runtime,
        seconds_per_answer=runtime / validation_rows if generates_answers else None,
    )


def find_best_evaluation(rows: list[MetricsRow], job: JobSpec) -> MetricsRow | None:
    """Return the evaluation whose adapter is on disk: the best and earliest.

    The trial saves weights only when the metric improves, so of equal scores the first one
    counts.

    Args:
        rows: Lines of the trial's metrics.jsonl.
        job: The job, for its metric.

    Returns:
        The line; None without an evaluation that has a score.
    """
    metric = job.metric
    best, best_score = None, None
    for row in rows:
        score = row.get_metric(metric.name) if row.evaluated else None
        if score is not None and is_better(score, best_score, metric.goal):
            best, best_score = row, score
    return best


def _build_curve_point(row: MetricsRow, job: JobSpec) -> dict[str, Any]:
    """Return the values of a report that the curves of a report page show."""
    names = ("step", "samples", "train_loss", "learning_rate", "rung", *job.metric_names)
    values = row.to_dict()
    return {name: values[name] for name in names if values.get(name) is not None}


def _compute_rank(row: Row, metric: str, goal: str) -> tuple[int, float]:
    """Return the sort key of a trial.

    Order: finished, running, stopped, pending, failed. Stopped trials are sorted by rung and
    score, the others by score. Ties keep the order in which the trials were created.
    """
    score = row.metrics.get(metric)
    order = {"finished": 0, "running": 1, "stopped": 2, "paused": 3, "pending": 4, "failed": 5}[
        row.state
    ]
    if score is None:
        return (order, float("inf"))
    signed = -score if goal == "maximize" else score
    # A stopped trial that reached a higher rung beat others there, whatever its score says.
    return (order, signed - 1e6 * (row.rung or 0 if row.state == "stopped" else 0))
