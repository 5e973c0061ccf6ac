"""Build the report of a comparison from its files, at any time.

An arm's training is a run of its own below the folder of the comparison
(`run.list_arms`), so its trials are read as those of any search. Per-row results of all
seeds come from the held-out evaluation. Needs no torch, Ray or network.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorafleet.evaluation.metrics.paired import Candidate, Comparison, select_comparable_candidates
from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.evaluation.metrics.scores import (
    Scores,
    compute_confusion,
    compute_per_class,
    compute_scores,
)
from lorafleet.evaluation.metrics.summary import read_results
from lorafleet.evaluation.report import verdict
from lorafleet.evaluation.report.choose_arm import Choice, choose
from lorafleet.evaluation.report.format import format_short_params
from lorafleet.evaluation.report.samples import select_differing, select_mistakes, select_worst
from lorafleet.evaluation.report.search import build_search_report
from lorafleet.jobs import files
from lorafleet.jobs.runs.records import HeldOutScores, read_typed
from lorafleet.jobs.runs.report import (
    Arm,
    BatchSpeed,
    Inference,
    Intervals,
    Metrics,
    Pair,
    Report,
    Row,
)
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema.comparison import ArmSpec
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.search import SEED, NamedMetric

_METHOD_TEXTS = {
    "base": "the untrained base",
    "lora": "LoRA",
    "qlora": "LoRA on a quantised base (QLoRA)",
    "prompt_tuning": "a learnt prompt",
    "full": "every weight",
}


def select_trained_rows(report: Report, spec: ArmSpec) -> list[Row]:
    """Return the trials of an arm that were trained to the end.

    Stopped trials count only if no trial was trained to the end.

    Args:
        report: The report of the arm's own search.
        spec: The arm.

    Returns:
        For an arm with a search: the best configuration, then its repetitions with further
            seeds. For an arm without a search: one trial per seed.
    """
    scored = [
        row
        for row in report.trials
        if row.metrics.get(report.metric) is not None and row.fold is None
    ]
    completed = [row for row in scored if row.state == "finished"] or [
        row for row in scored if row.state == "stopped"
    ]
    if not spec.parameters:
        return sorted(completed, key=get_seed)
    best = [row for row in completed if not row.repeats][:1]
    return best + sorted((row for row in completed if row.repeats), key=get_seed) if best else []


def get_seed(row: Row) -> int:
    """Return the seed of a trial, or -1 (sorted first) if it has no seed of its own."""
    return int(row.params.get(SEED, -1))


def load_arms(
    run: Run, job: JobSpec, split: str
) -> tuple[list[Arm], dict[str, dict[int, RowResults]], list[Row]]:
    """Load the arms of a comparison.

    Args:
        run: The comparison.
        job: Its job.
        split: The held-out split.

    Returns:
        The arms, arm -> seed -> per-row results, and all trials of all arms.
    """
    results_by_arm = load_row_results(run, job, split)
    reports = {arm.path.name: build_search_report(arm) for arm in run.list_arms()}
    arms = _mark_incomparable(
        [_build_arm(run, job, name, reports, results_by_arm[name]) for name in job.comparison.arms],
        results_by_arm,
        job,
    )
    trials = [
        row.model_copy(update={"arm": name})
        for name in job.comparison.arms
        if name in reports
        for row in reports[name].trials
    ]
    return arms, results_by_arm, trials


def _mark_incomparable(
    arms: list[Arm], results_by_arm: dict[str, dict[int, RowResults]], job: JobSpec
) -> list[Arm]:
    """Mark the arms that a loss cannot rank, and return all arms.

    These are arms whose likelihoods are over other tokens than those of most arms. A model
    that splits the rows into fewer tokens has a higher loss per token for the same text.
    """
    first_results = {
        name: next(iter(results.values())) for name, results in results_by_arm.items() if results
    }
    if job.metric.name not in ("loss", "perplexity") or not first_results:
        return arms
    names_by_tokens = {
        name: [
            other_name
            for other_name, other_results in first_results.items()
            if np.array_equal(other_results.targets_R, row_results.targets_R)
        ]
        for name, row_results in first_results.items()
    }
    name = max(
        names_by_tokens, key=lambda name: len(names_by_tokens[name])
    )  # the first arm wins ties
    marked_names = first_results.keys() - set(names_by_tokens[name])
    remark = (
        f"not ranked by {job.metric.name}: its model splits the rows into other tokens than that "
        f"of {name}"
    )
    return [
        arm.model_copy(update={"comparable": False, "remarks": [*arm.remarks, remark]})
        if arm.arm in marked_names
        else arm
        for arm in arms
    ]


def load_row_results(run: Run, job: JobSpec, split: str) -> dict[str, dict[int, RowResults]]:
    """Load the per-row results of the models of each arm: arm -> seed -> results."""
    results_by_arm: dict[str, dict[int, RowResults]] = {}
    for name in job.comparison.arms:
        arm = run.get_arm(name)
        results = {
            seed: _read_row_results(arm.get_evaluation_folder(seed), split)
            for seed in arm.list_evaluated_seeds()
        }
        results_by_arm[name] = {
            seed: row_results for seed, row_results in results.items() if row_results is not None
        }
    return results_by_arm


ResultsByArm = Mapping[str, Mapping[int, RowResults]]
"""Arm -> seed -> per-row results of its model."""


def compare_arms(
    results_by_arm: ResultsByArm,
    metric: NamedMetric,
    draws: int,
    origins: Mapping[str, str] | None = None,
) -> list[Comparison]:
    """Compare the arms that were evaluated on the same rows, the largest group first.

    Args:
        results_by_arm: Arm -> seed -> per-row results.
        metric: What to compare by. Losses of different tokens form different groups.
        draws: Draws of the bootstrap.
        origins: Arm -> the arm whose adapters it has, if they are not its own.

    Returns:
        One comparison per group of at least two arms. Arms of different groups are never
            compared.
    """
    candidates = []
    for name, results in results_by_arm.items():
        if results:
            # In the order of the seeds: arms that share adapters are compared seed by seed.
            models = [results[seed] for seed in sorted(results)]
            candidates.append(Candidate(name, models, (origins or {}).get(name)))
    groups: list[list[Candidate]] = []
    for candidate in select_comparable_candidates(candidates, metric.name):
        first = candidate.models[0]
        group = next(
            (group for group in groups if _has_same_rows(group[0].models[0], first, metric.name)),
            None,
        )
        if group is None:
            groups.append([candidate])
        else:
            group.append(candidate)
    groups.sort(key=len, reverse=True)
    return [
        Comparison(group, metric.name, metric.goal, draws) for group in groups if len(group) > 1
    ]


def _has_same_rows(results: RowResults, other: RowResults, metric: str) -> bool:
    """Return True if a metric of both is over the same rows and, for a loss, the same tokens."""
    if len(results) != len(other):
        return False
    return metric not in ("loss", "perplexity") or np.array_equal(
        results.targets_R, other.targets_R
    )


def list_pairs(comparisons: Iterable[Comparison]) -> list[Pair]:
    """Return every pair of arms that was compared, each once."""
    return [
        Pair(
            one=name,
            other=other_name,
            metric=comparison.metric,
            difference=comparison.compute_difference(name, other_name),
            interval=comparison.compute_interval(name, other_name),
            p_value=comparison.compute_p_value(name, other_name),
        )
        for comparison in comparisons
        for name, other_name in itertools.combinations(comparison.names, 2)
    ]


def _read_row_results(folder: Path, split: str) -> RowResults | None:
    """Read the per-row results of one model; None if it was not evaluated on the split."""
    scores = read_typed(folder / "test.json", HeldOutScores).get_split(split)
    return read_results(folder / f"predictions-{split}.jsonl", scores)


def _build_arm(
    run: Run,
    job: JobSpec,
    name: str,
    reports: dict[str, Report],
    results_by_seed: dict[int, RowResults],
) -> Arm:
    """Build one arm from its trials, per-row results and inference measurements.

    Args:
        run: The comparison.
        job: Its job.
        name: Name of the arm.
        reports: Arm -> the report of its search. An arm that trains nothing has none.
        results_by_seed: Seed -> per-row results on the held-out rows.
    """
    spec = job.comparison.arms[name]
    # An arm with another arm's adapters was not trained: its trials, costs and weights are those of
    # the other arm.
    origin = spec.adapter_of or name
    training = _collect_training(run, origin, job.comparison.arms[origin], reports.get(origin))
    best = training.best
    return Arm(
        arm=name,
        what=_describe_arm(spec, best),
        **_collect_scores(results_by_seed, job.metric_names),
        configuration=best.params if best else {},
        tried=len(training.tried),
        trial_id=best.trial_id if best else None,
        weights=training.weights,
        weights_mb=training.weights_mb,
        train_seconds=training.train_seconds,
        search_seconds=training.search_seconds,
        gpu_hours=training.gpu_hours,
        peak_memory_gib=_compute_mean([row.peak_memory_gib for row in training.rows]),
        trainable_parameters=training.trainable_parameters,
        inference=summarize_inference(files.read_jsonl(run.get_arm(name).inference_file)),
        remarks=_list_remarks(spec, best, training.rows, job),
    )


def _collect_scores(results_by_seed: dict[int, RowResults], names: Sequence[str]) -> dict[str, Any]:
    """Return an arm's scores over its seeds and of each seed; empty without results."""
    if not results_by_seed:
        return {}
    scores = compute_scores(list(results_by_seed.values()), names)
    seeds = {
        str(seed): files.replace_non_finite(compute_scores(row_results, names).metrics)
        for seed, row_results in results_by_seed.items()
    }
    return {
        "metrics": get_finite_metrics(scores),
        "interval": get_finite_intervals(scores),
        "seeds": seeds,
    }


@dataclass(frozen=True)
class _ArmTraining:
    """Results and costs of the training of an arm."""

    rows: list[Row]
    """Trials of its chosen configuration, one for each seed."""
    tried: list[Row]
    """One trial of each configuration that was searched."""
    weights: str | None = None
    """Folder of the weights, relative to the run; absolute for weights from elsewhere."""
    weights_mb: float | None = 0.0
    train_seconds: float | None = 0.0
    """Mean over the seeds; None if unknown."""
    search_seconds: float = 0.0
    gpu_hours: float | None = 0.0
    trainable_parameters: int | None = 0

    @property
    def best(self) -> Row | None:
        """Return the trial whose weights are the arm's; None if none was trained."""
        return self.rows[0] if self.rows else None


def _collect_training(run: Run, name: str, spec: ArmSpec, report: Report | None) -> _ArmTraining:
    """Return what an arm's training produced and cost.

    Args:
        run: The comparison.
        name: Name of the arm.
        spec: The arm.
        report: The report of its search; None for an arm that trains nothing.
    """
    if spec.weights:
        # Trained elsewhere: its costs are unknown.
        return _ArmTraining(
            rows=[],
            tried=[],
            weights=spec.weights,
            weights_mb=_compute_size_mb(Path(spec.weights)),
            train_seconds=None,
            gpu_hours=None,
            trainable_parameters=None,
        )
    if not spec.needs_training:
        return _ArmTraining(rows=[], tried=[])
    rows = select_trained_rows(report, spec) if report is not None else []
    train_seconds = _compute_mean([row.train_seconds for row in rows])
    gpu_hours = _compute_mean([row.gpu_hours for row in rows])
    if report is None or not rows:
        return _ArmTraining(rows=[], tried=[], train_seconds=train_seconds, gpu_hours=gpu_hours)
    weights = run.get_arm(name).get_trial(rows[0].trial_id).weights
    training = _ArmTraining(
        rows=rows,
        tried=[],
        weights=str(weights.relative_to(run.path)),
        weights_mb=_compute_size_mb(weights),
        train_seconds=train_seconds,
        gpu_hours=gpu_hours,
        trainable_parameters=rows[0].trainable_parameters,
    )
    if not spec.parameters:
        return training
    searched = [row for row in report.trials if not row.repeats]
    has_folds = any(row.fold is not None for row in searched)
    # With folds, each configuration has one trial per fold; the first fold counts it once.
    tried = [row for row in searched if row.fold == 0 or not has_folds]
    search_seconds = sum(row.train_seconds or 0.0 for row in searched)
    return dataclasses.replace(training, tried=tried, search_seconds=search_seconds)


def get_finite_metrics(metric_scores: Scores) -> Metrics:
    """Return the metrics, with None for NaN and infinite values."""
    return {
        name: value if math.isfinite(value) else None
        for name, value in metric_scores.metrics.items()
    }


def get_finite_intervals(metric_scores: Scores) -> Intervals:
    """Return the intervals whose two ends are finite."""
    return {
        name: ends
        for name, ends in metric_scores.intervals.items()
        if all(map(math.isfinite, ends))
    }


def _describe_arm(spec: ArmSpec, best: Row | None) -> str:
    """Return a short description of an arm: its method, quantization and values."""
    base = {"none": "", "nf4": "4-bit (NF4)", "fp4": "4-bit (FP4)", "int8": "INT8"}[
        spec.quantization
    ]
    if spec.adapter_of:
        return (
            f"{spec.adapter_of}'s adapter on {f'the {base} base' if base else 'the base'}, no "
            "further training"
        )
    text = _METHOD_TEXTS[str(spec.method)] + (f", {base}" if base else "")
    if spec.weights:
        return f"{text}, from {spec.weights}"
    values = {path: value for path, value in best.params.items() if path != SEED} if best else {}
    value_text = format_short_params(spec.set | values)
    return f"{text}: {value_text}" if value_text else text


def _list_remarks(spec: ArmSpec, best: Row | None, rows: list[Row], job: JobSpec) -> list[str]:
    """Return remarks on the training and the search of an arm.

    A best value at the end of its range is a remark, because a wider search may find a
    better one, and published comparisons often fail here: one method gets a well-searched
    learning rate, another not.
    """
    if not spec.needs_training:
        return []
    if best is None:
        return ["it has no trained weights"]
    remarks = []
    if not spec.parameters:
        remarks.append("no field was searched: it was trained with the values of the job file")
    if len(rows) < job.comparison.seeds:
        remarks.append(f"only {len(rows)} of {job.comparison.seeds} seeds were trained to the end")
    values = {
        path: parameter.values for path, parameter in spec.parameters.items() if parameter.values
    }
    for path, tried in values.items():
        numbers = [value for value in tried if isinstance(value, int | float)]
        if len(numbers) == len(tried) > 2 and best.params.get(path) in (min(numbers), max(numbers)):
            end = "smallest" if best.params[path] == min(numbers) else "largest"
            remarks.append(
                f"its best {path} is the {end} value that was tried: a wider search may find a "
                "better one"
            )
    return remarks


def summarize_inference(rows: list[dict[str, Any]]) -> Inference | None:
    """Return medians and spread of the measured rounds; None without rows.

    Args:
        rows: One record of `lorafleet measure` per round. Threads and CPU are taken from
            the last.
    """
    if not rows:
        return None
    names = [name for name in Inference.model_fields if name not in _NOT_MEDIANS]
    columns = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    medians = {name: statistics.median(values) for name, values in columns.items() if values}
    spread = {
        name: (min(values), max(values)) for name, values in columns.items() if len(values) > 1
    }
    last = {name: rows[-1].get(name) for name in ("threads", "cpu", "cpu_flags")}
    return Inference(**medians, rounds=len(rows), spread=spread, **last)


_NOT_MEDIANS = ("rounds", "spread", "threads", "cpu", "cpu_flags")


def summarize_batches(rows: list[dict[str, Any]]) -> list[BatchSpeed]:
    """Return the medians over rounds of the speed at each batch size and length.

    Args:
        rows: One record of `lorafleet measure` per round, each with the points under `at`.
    """
    points_by_size: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for point in (point for row in rows for point in row.get("at", [])):
        points_by_size.setdefault((point["batch_size"], point["length"]), []).append(point)
    return [
        BatchSpeed(
            batch_size=size,
            length=length,
            **{
                name: statistics.median(point[name] for point in points)
                for name in _list_measured_names(points[0])
            },
        )
        for (size, length), points in points_by_size.items()
    ]


def _list_measured_names(point: dict[str, Any]) -> list[str]:
    return [name for name in point if name not in ("batch_size", "length")]


def _compute_size_mb(folder: Path) -> float | None:
    """Return the size of the weight files in a folder in MB; None if there is no such folder."""
    if not folder.is_dir():
        return None
    weight_files = [
        path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")
    ]  # without the model card, which may be added later
    return sum(path.stat().st_size for path in weight_files) / 1e6


def _compute_mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    measured = [value for value in values if value is not None]
    return statistics.fmean(measured) if measured else None


def build_comparison_report(
    run: Run, job: JobSpec, common_report: Report, counts: Mapping[str, Mapping[str, int]]
) -> Report:
    """Return the report of a comparison.

    Args:
        run: The run.
        job: Its job.
        common_report: The report with the parts that every run has.
        counts: Split -> class -> number of rows.

    Returns:
        `common_report` with arms, pairs, trials, samples, recommendation and cautions.
    """
    arms, results_by_arm, trials = load_arms(run, job, common_report.held_out)
    compare, metric = job.comparison, job.metric
    origins = {name: arm.adapter_of for name, arm in compare.arms.items() if arm.adapter_of}
    by_metric = [
        compare_arms(results_by_arm, item, job.evaluate.bootstrap_samples, origins)
        for item in job.decision_metrics
    ]
    rows = files.read_jsonl(run.get_rows_file(common_report.held_out))
    choice = Choice(
        compare.rule,
        metric.name,
        metric.goal,
        compare.cost,
        compare.within,
        job.tolerances,
        len(rows),
    )
    recommendation = choose(arms, [groups[0] for groups in by_metric if groups], choice)
    labels = [str(label) for label in common_report.facts.get("labels", [])]
    samples = _build_samples(rows, labels, results_by_arm, recommendation.arm)
    arm = next((arm for arm in arms if arm.arm == recommendation.arm), None)
    recommendation, cautions = verdict.check_against_baselines(
        recommendation,
        metric.name,
        metric.goal,
        arm.metrics.get(metric.name) if arm else None,
        arm.interval.get(metric.name) if arm else None,
        [
            # A comparison decides on the held-out rows, so baselines on these rows are the ones to
            # beat.
            item.model_copy(update={"metrics": item.test_metrics})
            for item in common_report.baselines
        ],
        "held-out rows",
    )
    trial = None
    if arm is not None and arm.trial_id is not None:
        trial = next((row for row in trials if row.trial_id == arm.trial_id), None)
    cautions += verdict.check_rows(counts, common_report.held_out, len(rows))
    cautions += verdict.check_predictions(samples.get("confusion", []), labels)
    cautions += verdict.check_convergence(recommendation.arm, trial, metric.name, metric.goal)
    cautions += verdict.check_scores(metric.name, [item.metrics.get(metric.name) for item in arms])
    update = {
        "arms": arms,
        "pairs": list_pairs(by_metric[0]),
        "trials": trials,
        "rungs": [],
        "recommendation": recommendation,
        "cautions": cautions,
        "base": _build_base_row(common_report, arms, job),
    }
    return common_report.model_copy(update=update | samples)


def _build_samples(
    rows: list[dict[str, Any]],
    labels: list[str],
    results_by_arm: Mapping[str, Mapping[int, RowResults]],
    chosen: str | None,
) -> dict[str, Any]:
    """Return the fields of a report that show single rows. Each arm's first seed is shown.

    Args:
        rows: The held-out rows.
        labels: Class names.
        results_by_arm: Arm -> seed -> per-row results.
        chosen: The recommended arm, whose errors are shown.
    """
    first_results = {
        name: next(iter(results.values())) for name, results in results_by_arm.items() if results
    }
    fields: dict[str, Any] = {"samples": select_differing(rows, first_results, labels)}
    if chosen is None or chosen not in first_results:
        return fields
    results = first_results[chosen]
    fields["mistakes"] = select_mistakes(rows, chosen, results, labels)
    fields["worst"] = select_worst(rows, chosen, results, labels)
    if results.classified and labels:
        fields["confusion"] = compute_confusion(results.classified)
        fields["per_class"] = compute_per_class(results.classified, labels)
    return fields


def _build_base_row(report: Report, arms: list[Arm], job: JobSpec) -> Row:
    """Return the report's row of the base, with the scores of the arm that is the base."""
    base = next((arm for arm in arms if arm.arm in _list_untuned_arms(job)), None)
    if base is None or not base.metrics:
        return report.base
    return report.base.model_copy(
        update={
            "state": "finished",
            "test_metrics": base.metrics,
            "test_intervals": base.interval,
        }
    )


def _list_untuned_arms(job: JobSpec) -> list[str]:
    """Return the names of the arms that are the unquantised base without training."""
    return [
        name
        for name, arm in job.comparison.arms.items()
        if arm.method == "base" and arm.quantization == "none"
    ]
