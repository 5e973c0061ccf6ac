"""From a comparison's files to its Report, at any time."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lorafleet.evaluation.metrics.paired import Candidate, Comparison, comparable_candidates
from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.evaluation.metrics.scores import Scores, confusion, per_class, scores
from lorafleet.evaluation.metrics.summary import read_results
from lorafleet.evaluation.render.trial_table import short
from lorafleet.evaluation.report import verdict
from lorafleet.evaluation.report.choose_arm import Choice, choose
from lorafleet.evaluation.report.samples import differing, mistakes, worst
from lorafleet.evaluation.report.search import build_report
from lorafleet.jobs import files
from lorafleet.jobs.runs.report import Arm, BatchSpeed, Inference, Intervals, Metrics, Pair, Report, Row
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema.comparison import ArmSpec
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.search import SEED, NamedMetric

_WHAT = {
    "base": "the base, untuned",
    "lora": "LoRA",
    "qlora": "LoRA on a quantised base (QLoRA)",
    "prompt_tuning": "a learnt prompt",
    "full": "every weight",
}


def trained_rows(report: Report, spec: ArmSpec) -> list[Row]:
    """An arm's models that were trained to the end: its best configuration, and that with the further seeds.

    Of an arm that searches nothing, one for each seed. Cut trials count where there is no other.
    """
    scored = [row for row in report.trials if row.metrics.get(report.metric) is not None and row.fold is None]
    whole = [row for row in scored if row.state == "finished"] or [row for row in scored if row.state == "stopped"]
    if not spec.parameters:
        return sorted(whole, key=seed_of)
    best = [row for row in whole if not row.repeats][:1]
    return best + sorted((row for row in whole if row.repeats), key=seed_of) if best else []


def seed_of(row: Row) -> int:
    """The seed of a trial, where it was given one of its own; else -1, before all others."""
    return int(row.params.get(SEED, -1))


def arms_of_run(run: Run, job: JobSpec, split: str) -> tuple[list[Arm], dict[str, dict[int, RowResults]], list[Row]]:
    """(the arms, what their models did with each row: arm -> seed -> results, all trials of all arms)."""
    assert job.compare is not None
    judged = judged_results(run, job, split)
    reports = {arm.path.name: build_report(arm) for arm in run.arms()}
    arms = _comparable([_arm(run, job, name, reports, judged[name]) for name in job.compare.arms], judged, job)
    trials = [
        row.model_copy(update={"arm": name})
        for name in job.compare.arms
        if name in reports
        for row in reports[name].trials
    ]
    return arms, judged, trials


def _comparable(arms: list[Arm], judged: dict[str, dict[int, RowResults]], job: JobSpec) -> list[Arm]:
    """The arms, those marked whose likelihoods are of other tokens than most arms': no loss ranks them."""
    firsts = {name: next(iter(results.values())) for name, results in judged.items() if results}
    if job.metric.name not in ("loss", "perplexity") or not firsts:
        return arms
    alike = {
        name: [other for other, found in firsts.items() if np.array_equal(found.targets_R, one.targets_R)]
        for name, one in firsts.items()
    }
    name = max(alike, key=lambda name: len(alike[name]))  # the first of equals
    odd = firsts.keys() - set(alike[name])
    remark = f"not ranked by {job.metric.name}: its model reads the rows as other tokens than that of {name}"
    return [
        arm.model_copy(update={"comparable": False, "remarks": [*arm.remarks, remark]}) if arm.arm in odd else arm
        for arm in arms
    ]


def judged_results(run: Run, job: JobSpec, split: str) -> dict[str, dict[int, RowResults]]:
    """What the models of each arm did with each row: arm -> seed -> results."""
    assert job.compare is not None
    found: dict[str, dict[int, RowResults]] = {}
    for name in job.compare.arms:
        arm = run.arm(name)
        results = {seed: _judged(arm.judged(seed), split) for seed in arm.judged_seeds()}
        found[name] = {seed: one for seed, one in results.items() if one is not None}
    return found


Judged = Mapping[str, Mapping[int, RowResults]]
"""Arm -> seed -> what its model did with each row."""


def compare_arms(
    judged: Judged, metric: NamedMetric, draws: int, origins: Mapping[str, str] | None = None
) -> list[Comparison]:
    """Compare the arms that were evaluated on the same rows, the largest group first.

    Args:
        judged: Arm -> seed -> per-row results.
        metric: What to compare by. Losses of different tokens form different groups.
        draws: Draws of the bootstrap.
        origins: Arm -> the arm whose adapters it has, if they are not its own.
    """
    candidates = []
    for name, results in judged.items():
        if results:
            models = [results[seed] for seed in sorted(results)]
            candidates.append(Candidate(name, models, (origins or {}).get(name)))
    groups: list[list[Candidate]] = []
    for candidate in comparable_candidates(candidates, metric.name):
        first = candidate.models[0]
        group = next((group for group in groups if _share_rows(group[0].models[0], first, metric.name)), None)
        if group is None:
            groups.append([candidate])
        else:
            group.append(candidate)
    groups.sort(key=len, reverse=True)
    return [Comparison(group, metric.name, metric.goal, draws) for group in groups if len(group) > 1]


def _share_rows(results: RowResults, other: RowResults, metric: str) -> bool:
    """Return True if a metric of both is over the same rows and, for a loss, over the same tokens."""
    if len(results) != len(other):
        return False
    return metric not in ("loss", "perplexity") or np.array_equal(results.targets_R, other.targets_R)


def list_pairs(comparisons: Iterable[Comparison]) -> list[Pair]:
    """Return every pair of arms that was compared."""
    return [
        Pair(
            one=one,
            other=other,
            metric=comparison.metric,
            difference=comparison.difference(one, other),
            interval=comparison.interval(one, other),
            p_value=comparison.p_value(one, other),
        )
        for comparison in comparisons
        for one, other in itertools.combinations(comparison.names, 2)
    ]


def _judged(folder: Path, split: str) -> RowResults | None:
    record = files.read_json(folder / "test.json").get(split, {})
    return read_results(folder / f"predictions-{split}.jsonl", record) if record else None


def _arm(run: Run, job: JobSpec, name: str, reports: dict[str, Report], there: dict[int, RowResults]) -> Arm:
    assert job.compare is not None
    spec = job.compare.arms[name]
    names = job.metric_names
    found = scores(list(there.values()), names) if there else None
    own = {str(seed): scores(one, names).metrics for seed, one in there.items()}
    trained = spec.trains or spec.adapter_of is not None
    origin = spec.adapter_of or name
    source, source_spec, report = run.arm(origin), job.compare.arms[origin], reports.get(origin)
    given = source_spec.weights
    rows = trained_rows(report, source_spec) if report is not None and trained else []
    best = rows[0] if rows else None
    searched = [row for row in report.trials if not row.repeats] if report is not None and rows else []
    folded = any(row.fold is not None for row in searched)
    tried = [row for row in searched if row.fold == 0 or not folded]
    weights = source.trial(best.trial_id).weights if best else None
    return Arm(
        arm=name,
        what=_what(spec, best),
        metrics=finite_metrics(found) if found else {},
        interval=finite_intervals(found) if found else {},
        seeds={seed: files.finite(metrics) for seed, metrics in own.items()},
        configuration=best.params if best else {},
        tried=len(tried) if source_spec.parameters else 0,
        trial_id=best.trial_id if best else None,
        weights=str(weights.relative_to(run.path)) if weights else given,
        weights_mb=_size_mb(Path(given)) if given else _size_mb(weights) if weights else 0.0,
        train_seconds=None if given else _mean([row.train_seconds for row in rows]) if trained else 0.0,
        search_seconds=sum(row.train_seconds or 0.0 for row in searched) if source_spec.parameters else 0.0,
        gpu_hours=None if given else _mean([row.gpu_hours for row in rows]) if trained else 0.0,
        peak_memory_gib=_mean([row.peak_memory_gib for row in rows]),
        trainable_parameters=best.trainable_parameters if best else None if given else 0,
        inference=inference_of(files.read_jsonl(run.arm(name).inference_file)),
        remarks=_remarks(spec, best, rows, job),
    )


def finite_metrics(found: Scores) -> Metrics:
    """Metrics with None for what is no number, as the loss of a model that gives NaN."""
    return {name: value if math.isfinite(value) else None for name, value in found.metrics.items()}


def finite_intervals(found: Scores) -> Intervals:
    """Intervals without those that have no ends."""
    return {name: ends for name, ends in found.intervals.items() if all(map(math.isfinite, ends))}


def _what(spec: ArmSpec, best: Row | None) -> str:
    base = {"none": "", "nf4": "4-bit (NF4)", "fp4": "4-bit (FP4)", "int8": "INT8"}[spec.quantization]
    if spec.adapter_of:
        return f"{spec.adapter_of}'s adapter on {f'the {base} base' if base else 'the base'}, no further training"
    said = _WHAT[str(spec.method)] + (f", {base}" if base else "")
    if spec.weights:
        return f"{said}, from {spec.weights}"
    found = {path: value for path, value in best.params.items() if path != SEED} if best else {}
    shown = short(spec.set | found)
    return f"{said}: {shown}" if shown else said


def _remarks(spec: ArmSpec, best: Row | None, rows: list[Row], job: JobSpec) -> list[str]:
    assert job.compare is not None
    if not spec.trains:
        return []
    if best is None:
        return ["it has no trained weights"]
    said = []
    if not spec.parameters:
        said.append("nothing of it was searched: it was trained with the values that the file gives it")
    if len(rows) < job.compare.seeds:
        said.append(f"{len(rows)} of {job.compare.seeds} seeds were trained to the end")
    values = {path: parameter.values for path, parameter in spec.parameters.items() if parameter.values}
    for path, tried in values.items():
        numbers = [value for value in tried if isinstance(value, int | float)]
        if len(numbers) == len(tried) > 2 and best.params.get(path) in (min(numbers), max(numbers)):
            end = "smallest" if best.params[path] == min(numbers) else "largest"
            said.append(f"its best {path} is the {end} that was tried: a wider search may find a better one")
    return said


def inference_of(rows: list[dict[str, Any]]) -> Inference | None:
    """Medians and spread of what was measured, a row a round."""
    if not rows:
        return None
    names = [name for name in Inference.model_fields if name not in _NOT_MEDIANS]
    columns = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    found = {name: statistics.median(values) for name, values in columns.items() if values}
    spread = {name: (min(values), max(values)) for name, values in columns.items() if len(values) > 1}
    last = {name: rows[-1].get(name) for name in ("threads", "cpu", "cpu_flags")}
    return Inference(**found, rounds=len(rows), spread=spread, **last)


_NOT_MEDIANS = ("rounds", "spread", "threads", "cpu", "cpu_flags")


def batches_of(rows: list[dict[str, Any]]) -> list[BatchSpeed]:
    """Medians over rounds of what was measured at each size of a batch."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for point in (point for row in rows for point in row.get("at", [])):
        found.setdefault((point["batch_size"], point["length"]), []).append(point)
    return [
        BatchSpeed(
            batch_size=size,
            length=length,
            **{name: statistics.median(point[name] for point in points) for name in _numbers_of(points[0])},
        )
        for (size, length), points in found.items()
    ]


def _numbers_of(point: dict[str, Any]) -> list[str]:
    return [name for name in point if name not in ("batch_size", "length")]


def _size_mb(folder: Path) -> float | None:
    if not folder.is_dir():
        return None
    kept = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]  # cards come and go
    return sum(path.stat().st_size for path in kept) / 1e6


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def comparison_report(run: Run, job: JobSpec, plain: Report, counts: Mapping[str, Mapping[str, int]]) -> Report:
    """A report with the arms of a comparison in it; `plain` has what every run has, `counts` the rows of each class."""
    assert job.compare is not None
    arms, judged, trials = arms_of_run(run, job, plain.held_out)
    compare = job.compare
    origins = {name: arm.adapter_of for name, arm in compare.arms.items() if arm.adapter_of}
    metric, draws = job.metric, job.evaluate.bootstrap_samples
    by_metric = [compare_arms(judged, one, draws, origins) for one in job.decision_metrics]
    rows = files.read_jsonl(run.rows_file(plain.held_out))
    choice = Choice(
        compare.rule,
        metric.name,
        metric.goal,
        compare.cost,
        compare.within,
        job.tolerances,
        len(rows),
    )
    base = next((arm for arm in arms if arm.arm in _untuned(job)), None)
    update: dict[str, Any] = {
        "arms": arms,
        "pairs": list_pairs(by_metric[0]),
        "trials": trials,
        "recommendation": choose(arms, [groups[0] for groups in by_metric if groups], choice),
        "rungs": [],
    }
    firsts = {name: next(iter(results.values())) for name, results in judged.items() if results}
    labels = [str(label) for label in plain.facts.get("labels", [])]
    update["samples"] = differing(rows, firsts, labels)
    chosen = update["recommendation"].arm
    if chosen in firsts:
        found = firsts[chosen]
        update["mistakes"] = mistakes(rows, chosen, found, labels)
        update["worst"] = worst(rows, chosen, found, labels)
        if found.classified and labels:
            update["confusion"], update["per_class"] = confusion(found.classified), per_class(found.classified, labels)
    arm = next((arm for arm in arms if arm.arm == chosen), None)
    update["recommendation"], cautions = verdict.check_against_baselines(
        update["recommendation"],
        metric.name,
        metric.goal,
        arm.metrics.get(metric.name) if arm else None,
        arm.interval.get(metric.name) if arm else None,
        [one.model_copy(update={"metrics": one.test_metrics}) for one in plain.baselines],
        "held-out rows",
    )
    trial = next((row for row in trials if arm and arm.trial_id and row.trial_id == arm.trial_id), None)
    cautions += verdict.check_rows(counts, plain.held_out, len(rows))
    cautions += verdict.check_predictions(update.get("confusion", []), labels)
    cautions += verdict.check_convergence(chosen, trial, metric.name, metric.goal)
    cautions += verdict.check_scores(metric.name, [one.metrics.get(metric.name) for one in arms])
    update["cautions"] = cautions
    if base is not None and base.metrics:
        update["base"] = plain.base.model_copy(
            update={"state": "finished", "test_metrics": base.metrics, "test_intervals": base.interval}
        )
    return plain.model_copy(update=update)


def _untuned(job: JobSpec) -> list[str]:
    assert job.compare is not None
    return [name for name, arm in job.compare.arms.items() if arm.method == "base" and arm.quantization == "none"]
