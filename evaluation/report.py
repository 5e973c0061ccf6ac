"""From a run's files to its Report, at any time: nothing here needs torch, ray or a network."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from evaluation.recommend import MOST_COMPARED, Choosing, over_folds, recommend, recommend_over_folds
from jobs import files
from jobs.errors import RunError
from jobs.messages import of_another_version
from jobs.metrics import is_better
from jobs.records import FACTS, DamagedFile, damaged_where_wrong, read_record
from jobs.report import Baseline, Failure, Intervals, Metrics, Report, Row
from jobs.run import Run, Trial
from jobs.search import without_fold
from jobs.search_spec import FOLD
from jobs.spec import JobSpec
from jobs.words import printable_json

if TYPE_CHECKING:
    from evaluation.results import RowResults


def run_job(run: Run) -> JobSpec:
    """The job of a run."""
    plan = files.read_json(run.path / "plan.json")
    if "job" not in plan:
        raise RunError(f"{run.path} holds no plan.json: it is not a run, or was not submitted whole")
    try:
        return JobSpec.model_validate_json(json.dumps(plan["job"]))
    except ValidationError as error:
        raise RunError(of_another_version(run.path / "plan.json", error)) from None


def job_here(run: Run) -> JobSpec:
    """The job of a run with the paths of the machine that submitted it: its plan has those of where it ran."""
    raw = run_job(run).model_dump(mode="json")
    for path, told in files.read_json(run.path / "resolved.json").get("fields", {}).items():
        *blocks, name = path.split(".")
        block = raw
        for key in blocks:
            block = block.get(key) or {}
        if isinstance(block.get(name), str) and isinstance(told.get("value"), str):
            block[name] = told["value"]
    return JobSpec.model_validate_json(json.dumps(raw))


def _data_name(job: JobSpec) -> str:
    """Return the data set of a run; of one that trains nothing, the file that it was evaluated on."""
    trains = job.compare is None or any(arm.trains for arm in job.compare.arms.values())
    if not trains and job.data.test_file:
        return job.data.test_file
    return str(job.data.dataset_name or job.data.train_file)


def build_report(run: Run) -> Report:
    """Read a run and say what it found so far."""
    job = run_job(run)
    facts = read_record(run.path / "facts.json", FACTS)
    metric = job.metric
    plan = files.read_json(run.path / "plan.json")
    written = run.path / "report" / "report.json"
    if plan.get("command") == "benchmark" and written.is_file():  # it has no trials to be built from
        with damaged_where_wrong(written):
            return Report.model_validate_json(written.read_text())
    rows = rows_of(run, job) if plan.get("command") != "compare" else []
    labels = {row.trial_id: describe(row.params) for row in rows}
    ordered = sorted(rows, key=lambda row: _rank(row, metric.name, metric.goal))
    folds = over_folds(rows, metric.name, metric.goal)
    choosing = choosing_of(job, facts.get("rows", {}).get("validation", 0), labels)
    if folds:
        chosen = recommend_over_folds(ordered, folds, choosing, results_over_folds(run, job))
    else:
        chosen = recommend(ordered, choosing, _results_of_best(run, ordered, job))
    wanted = ("data_sha256", "model_revisions", "labels")
    shown_facts: dict[str, Any] = {str(key): facts[key] for key in wanted if key in facts}
    if facts.get("encoders"):
        layer = job.evaluate.bertscore_layer
        of = f"layer {layer}" if layer is not None else "its last layer"
        shown_facts["bertscore"] = {name: f"{of}, {revision}" for name, revision in facts["encoders"].items()}
    damages = run.damages({row.trial_id for row in rows})
    with damaged_where_wrong(run.path / "plan.json"):
        plain = Report(
            run=run.id,
            state=run.state,
            task=job.task,
            metrics=list(job.metric_names),
            model=job.model.model_name_or_path,
            data=_data_name(job),
            metric=metric.name,
            goal=metric.goal,
            rows_count=facts.get("rows", {}),
            rungs=plan.get("rung_levels", []),
            time_attr=job.search.scheduler.time_attr if job.search and plan.get("command") == "sweep" else "step",
            held_out="validation" if facts.get("chosen_on_test") else "test",
            base=_checked_base(run, facts),
            baselines=_baselines(run, facts, job),
            trials=ordered,
            folds=folds,
            recommendation=chosen.model_copy(update={"adapter": _weights(run, chosen.trial_id)}),
            wall_seconds=run.status().get("wall_seconds"),
            warnings=[*facts.get("warnings", []), *_optimism(facts), *run.remarks(), *damages],
            versions=facts.get("versions", {}),
            facts=shown_facts,
        )
    if plan.get("command") != "compare":
        whole = _with_verdict(_with_samples(run, plain), facts)
    else:
        from evaluation.comparison import comparison_report

        whole = comparison_report(run, job, plain, facts.get("class_counts", {}))
    if not (run.path / "ratings").is_dir():
        return whole
    from evaluation.rating import ratings_of

    return whole.model_copy(update={"ratings": ratings_of(run)})


def _baselines(run: Run, facts: dict[str, Any], job: JobSpec) -> list[Baseline]:
    """Return what needs no training; nothing where a run of an earlier version did not count its classes."""
    held_out = "validation" if facts.get("chosen_on_test") else "test"
    counts = facts.get("class_counts") or {}
    if counts.get("train"):
        from evaluation.baselines import of_classes

        common, metrics = of_classes(counts["train"], counts.get("validation", {}))
        tested = of_classes(counts["train"], counts.get(held_out, {}))[1]
        what = f"always saying {common!r}"
        return [Baseline(name=f"always {common}", what=what, metrics=dict(metrics), test_metrics=dict(tested))]
    with damaged_where_wrong(run.baselines_file):
        stored = files.read_json(run.baselines_file)
        chosen, judged = stored.get("validation") or {}, stored.get(held_out) or {}
        return [
            Baseline(name=name, what=name, metrics=chosen.get(name, {}), test_metrics=judged.get(name, {}))
            for name in dict.fromkeys([*chosen, *judged])
        ]


def _with_verdict(report: Report, facts: dict[str, Any]) -> Report:
    """The report of a search, with what is to be said before its recommendation is followed."""
    from evaluation import verdict

    chosen = next((row for row in report.trials if row.trial_id == report.recommendation.trial_id), None)
    metric, goal = report.metric, report.goal
    baselines = list(report.baselines)
    if report.base.metrics.get(metric) is not None:
        baselines.append(Baseline(what="the untrained base", metrics=report.base.metrics))
    recommendation, cautions = verdict.checked(
        report.recommendation,
        metric,
        goal,
        chosen.metrics.get(metric) if chosen else None,
        chosen.intervals.get(metric) if chosen else None,
        baselines,
        "validation rows",
    )
    counts = facts.get("class_counts") or {}
    if report.task == "classification" and not counts:
        cautions.append(
            "an earlier version made the run and did not count its classes: it is compared with no baseline"
        )
    cautions += verdict.of_rows(counts, "validation", int(report.rows_count.get("validation", 0)))
    cautions += verdict.of_model(metric, goal, chosen, report.confusion, [str(one) for one in facts.get("labels", [])])
    cautions += verdict.of_scores(metric, [row.metrics.get(metric) for row in report.trials])
    return report.model_copy(update={"recommendation": recommendation, "cautions": cautions})


def choosing_of(job: JobSpec, rows: int = 0, labels: dict[str, str] | None = None) -> Choosing:
    """Return by what a job's search chooses; `rows` are its validation rows, `labels` its trials in words."""
    search = job.search
    return Choosing(
        job.metric.name,
        job.metric.goal,
        job.tolerances,
        tuple((one.name, one.goal) for one in job.metric.also),
        search.keep if search else 1,
        rows,
        job.evaluate.bootstrap_samples,
        labels or {},
    )


def _results_of_best(run: Run, ordered: list[Row], job: JobSpec) -> dict[str, RowResults]:
    """Return what the best trials did with each validation row, of those of which it is known."""
    wanted = [row.trial_id for row in ordered if row.metrics.get(job.metric.name) is not None and row.fold is None]
    found = {name: stored_results(run.trial(name), job) for name in wanted[:MOST_COMPARED]}
    return {name: results for name, results in found.items() if results is not None}


def results_over_folds(run: Run, job: JobSpec) -> dict[str, RowResults]:
    """Return what each configuration did with every row of all folds (`recommend.name_of`), where that is known."""
    from evaluation.results import joined

    parts: dict[str, dict[int, RowResults]] = {}
    for trial in run.trials():
        if trial.fold is None or trial.state.value != "finished":
            continue
        found = stored_results(trial, job)
        if found is not None:
            assignment = without_fold(trial.params().get("assignment", {}))
            parts.setdefault(repr(assignment), {})[trial.fold] = found
    most = max((len(folds) for folds in parts.values()), default=0)
    return {name: joined([folds[n] for n in sorted(folds)]) for name, folds in parts.items() if len(folds) == most}


def stored_results(trial: Trial, job: JobSpec) -> RowResults | None:
    """Return what a trial's best weights did with each validation row; None where that is not there, or damaged."""
    from evaluation.results import unpacked

    try:
        found, step = unpacked(files.read_plain(trial.validation_results))
    except (OSError, ValueError):
        return None
    return found if step == _best_evaluation(trial.metrics(), job).get("step") else None


def _with_samples(run: Run, report: Report) -> Report:
    """The report with held-out rows: base and recommended trial side by side, and what the latter gets wrong."""
    from evaluation.samples import differing, mistakes, worst

    chosen = report.recommendation.trial_id
    rows = files.read_jsonl(run.rows_file(report.held_out))
    if chosen is None or not rows:
        return report
    labels = [str(label) for label in report.facts.get("labels", [])]
    there = chosen_results(run, report)
    update: dict[str, Any] = {"samples": differing(rows, there, labels)}
    if chosen in there:
        row = report.row(chosen)
        update |= {"per_class": row.per_class, "confusion": row.confusion}
        update["mistakes"] = mistakes(rows, chosen, there[chosen], labels)
        update["worst"] = worst(rows, chosen, there[chosen], labels)
    return report.model_copy(update=update)


def bare(report: Report) -> Report:
    """A run's report without what is of its own trials and its own end: a table of something else is put into it."""
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


def chosen_results(run: Run, report: Report) -> dict[str, RowResults]:
    """What a search's untuned base and its recommended trial did with the held-out rows, where they were judged."""
    from evaluation.summary import read_results

    split, chosen = report.held_out, report.recommendation.trial_id
    base = files.read_json(run.path / "report" / "base.json").get(split, {})
    found = {"base": read_results(run.base_predictions(split), base)}
    if chosen is not None:
        own = files.read_json(run.trial(chosen).path / "test.json").get(split, {})
        found[chosen] = read_results(run.trial(chosen).predictions(split), own)
    return {name: results for name, results in found.items() if results is not None}


def write_report(run: Run) -> Report:
    """Build the report and write it in all its forms below report/, with a card beside the recommended weights."""
    from evaluation.card import write_card

    report = build_report(run)
    write_forms(report, run.path / "report")
    write_card(run, report)
    return report


def write_forms(report: Report, folder: Path) -> None:
    """A report as JSON, CSV, Markdown and a page."""
    from evaluation.render import arms_csv, batches_csv, html, markdown, table_csv

    files.write_text(folder / "report.json", report_json(report) + "\n")
    files.write_text(folder / "report.csv", table_csv(report))
    if report.arms is not None:
        files.write_text(folder / "arms.csv", arms_csv(report))
    if any(arm.batches for arm in report.arms or []):
        files.write_text(folder / "batches.csv", batches_csv(report))
    files.write_text(folder / "report.md", markdown(report))
    files.write_text(folder / "report.html", html(report))


def report_json(report: Report) -> str:
    """The report as JSON; a number that is none is null."""
    return printable_json(report.model_dump_json(indent=2))  # pydantic writes null for what is no number


def describe(params: dict[str, Any]) -> str:
    """Searched values in words: `lora_r=8, learning_rate=0.00126`."""
    return ", ".join(f"{path.rpartition('.')[2]}={value}" for path, value in params.items())


def short(params: dict[str, Any]) -> str:
    """`describe` with numbers of three digits."""
    return describe({path: f"{value:.3g}" if isinstance(value, float) else value for path, value in params.items()})


def _weights(run: Run, trial_id: str | None) -> str | None:
    return str(run.trial(trial_id).weights.relative_to(run.path)) if trial_id else None


def _optimism(facts: dict[str, Any]) -> list[str]:
    return ["chosen on these rows: optimistic (there is no test set)"] if facts.get("chosen_on_test") else []


def _base(run: Run, facts: dict[str, Any]) -> Row:
    measured = files.read_json(run.path / "report" / "base.json")
    test_split = "validation" if facts.get("chosen_on_test") else "test"
    return Row(
        trial_id="base",
        state="finished" if measured else "pending",
        metrics=_metrics(measured, "validation"),
        intervals=_intervals(measured.get("validation", {}).get("intervals")),
        test_metrics=_metrics(measured, test_split) or None,
        test_intervals=_intervals(measured.get(test_split, {}).get("intervals")),
        trainable_parameters=0,
    )


def _metrics(measured: dict[str, Any], split: str) -> Metrics:
    found: Metrics = measured.get(split, {}).get("metrics", {})
    return found


def _intervals(raw: dict[str, Any] | None) -> Intervals:
    return {name: (float(ends[0]), float(ends[1])) for name, ends in (raw or {}).items() if None not in ends}


def _checked_base(run: Run, facts: dict[str, Any]) -> Row:
    with damaged_where_wrong(run.path / "report" / "base.json"):
        return _base(run, facts)


def rows_of(run: Run, job: JobSpec) -> list[Row]:
    """Return a row for each trial that can be read; the others are among the run's remarks."""
    found = []
    validation = files.read_json(run.path / "facts.json").get("rows", {}).get("validation")
    for trial in run.trials():
        with contextlib.suppress(DamagedFile), damaged_where_wrong(trial.path):
            found.append(_row(trial, job, validation))
    return found


def _row(trial: Trial, job: JobSpec, validation: int | None) -> Row:
    params, status, rows = trial.params(), trial.status(), trial.metrics()
    best = _best_evaluation(rows, job)
    last = rows[-1] if rows else {}
    test = files.read_json(trial.path / "test.json")
    split = "test" if "test" in test else "validation"
    failure = status.get("failure")
    seconds = (last.get("train_seconds") or 0.0) + (last.get("eval_seconds") or 0.0)
    of_fold = params.get("assignment", {}).get(FOLD) is not None
    speed = _evaluation_speed(rows, job, None if of_fold else validation)
    return Row(
        trial_id=trial.id,
        state=trial.state.value,
        rung=status.get("rung"),
        params=params.get("assignment", {}),
        repeats=bool(params.get("repeats")),
        fold=params.get("assignment", {}).get(FOLD),
        metrics={name: best[name] for name in job.metric_names if name in best},
        intervals=_intervals(best.get("intervals")),
        test_metrics=_metrics(test, split) or None,
        test_intervals=_intervals(test.get(split, {}).get("intervals")),
        per_class=test.get(split, {}).get("per_class", {}),
        confusion=test.get(split, {}).get("confusion", []),
        step=int(last.get("step", 0)),
        samples=int(last.get("samples", 0)),
        train_seconds=last.get("train_seconds"),
        eval_seconds=last.get("eval_seconds"),
        eval_runtime=speed.get("eval_runtime"),
        eval_samples_per_second=speed.get("eval_samples_per_second"),
        eval_steps_per_second=speed.get("eval_steps_per_second"),
        seconds_per_answer=speed.get("seconds_per_answer"),
        samples_per_second=last.get("samples_per_second"),
        tokens_per_second=last.get("tokens_per_second"),
        peak_memory_gib=last.get("peak_memory_gib"),
        gpu_hours=params.get("gpus", 0) * seconds / 3600 if last else None,
        trainable_parameters=last.get("trainable_parameters"),
        number_formats=last.get("number_formats"),
        failure=Failure(**failure) if failure else None,
        reason=status.get("reason"),
        curve=[_point(row, job) for row in rows],
    )


def _evaluation_speed(rows: list[dict[str, Any]], job: JobSpec, validation: int | None) -> dict[str, float | None]:
    """Return how fast a trial was evaluated: Hugging Face's names, and seconds an answer; `validation` are its rows."""
    evaluations = sum(bool(row.get("evaluated")) for row in rows)
    seconds = rows[-1].get("eval_seconds") if rows else None
    if not (evaluations and seconds and isinstance(validation, int) and validation):
        return {}
    runtime = seconds / evaluations
    each = job.train.per_device_eval_batch_size * job.resources.world_size
    answers = any(one.name in job.text_metrics for one in job.decision_metrics)
    return {
        "eval_runtime": runtime,
        "eval_samples_per_second": validation / runtime,
        "eval_steps_per_second": math.ceil(validation / each) / runtime,
        "seconds_per_answer": runtime / validation if answers else None,
    }


def _best_evaluation(rows: list[dict[str, Any]], job: JobSpec) -> dict[str, Any]:
    """The evaluation whose adapter is on disk: the best by the metric, the earliest among equals."""
    best: dict[str, Any] = {}
    for row in rows:
        score = row.get(job.metric.name) if row.get("evaluated") else None
        if score is not None and is_better(score, best.get(job.metric.name), job.metric.goal):
            best = row
    return best


def _point(row: dict[str, Any], job: JobSpec) -> dict[str, Any]:
    keys = ("step", "samples", "train_loss", "learning_rate", "rung", *job.metric_names)
    return {key: row[key] for key in keys if row.get(key) is not None}


def _rank(row: Row, metric: str, goal: str) -> tuple[int, float]:
    """Finished first, then the cut ones by rung and score, the failed last; ties stay as they were made."""
    score = row.metrics.get(metric)
    order = {"finished": 0, "running": 1, "stopped": 2, "pending": 3, "failed": 4}[row.state]
    if score is None:
        return (order, float("inf"))
    signed = -score if goal == "maximize" else score
    return (order, signed - 1e6 * (row.rung or 0 if row.state == "stopped" else 0))
