"""From a comparison's files to its Report, at any time."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.choose import Choice, choose
from evaluation.metrics import difference, scores
from evaluation.report import build_report, describe
from evaluation.results import RowResults
from evaluation.summary import read_results
from jobs import files
from jobs.compare import ArmSpec
from jobs.report import Arm, Inference, Pair, Report, Row
from jobs.run import ArmFolder, Run
from jobs.spec import JobSpec

_WHAT = {
    "base": "the base, untuned",
    "lora": "LoRA",
    "qlora": "LoRA on a quantised base (QLoRA)",
    "prompt_tuning": "a learnt prompt",
    "full": "every weight",
}


def best_row(run: Run) -> Row | None:
    """The best trial of an arm's search that was trained to the end, or else of those that were cut."""
    rows = [row for row in build_report(run).trials if row.state in ("finished", "stopped")]
    metric = build_report(run).metric
    return next((row for row in rows if row.metrics.get(metric) is not None), None)


def arms_of_run(run: Run, job: JobSpec, split: str) -> tuple[list[Arm], list[Pair], list[Row]]:
    """(the arms, every two of them on the same rows, all trials of all arms)."""
    assert job.compare is not None
    arms, judged, trials = [], {}, []
    for name, spec in job.compare.arms.items():
        folder = run.arm(name)
        results = {seed: _judged(folder.judged(seed), split) for seed in folder.judged_seeds()}
        judged[name] = [found for found in results.values() if found is not None]
        source = run.arm(spec.adapter_of) if spec.adapter_of else folder
        arms.append(_arm(run, job, spec, folder, source, results))
        for own in folder.runs():
            trials += [row.model_copy(update={"arm": name}) for row in build_report(own).trials]
    return arms, pairs_of(judged, job.metric.name, job.evaluate.bootstrap_samples), trials


def pairs_of(judged: dict[str, list[RowResults]], metric: str, resamples: int) -> list[Pair]:
    """Every two arms that have results, compared on the same rows."""
    found = []
    for one, other in itertools.combinations([name for name, results in judged.items() if results], 2):
        ours, theirs = judged[one], judged[other]
        if len(ours[0]) != len(theirs[0]) or not (ours[0].has(metric) and theirs[0].has(metric)):
            continue
        apart = difference(ours, theirs, metric, resamples)
        found.append(
            Pair(
                one=one,
                other=other,
                metric=metric,
                difference=apart.value,
                interval=apart.interval,
                p_value=apart.p_value,
            )
        )
    return found


def _judged(folder: Path, split: str) -> RowResults | None:
    record = files.read_json(folder / "test.json").get(split, {})
    return read_results(folder / f"predictions-{split}.jsonl", record) if record else None


def _arm(
    run: Run,
    job: JobSpec,
    spec: ArmSpec,
    folder: ArmFolder,
    source: ArmFolder,
    results: dict[int, RowResults | None],
) -> Arm:
    there = {seed: found for seed, found in results.items() if found is not None}
    resamples, names = job.evaluate.bootstrap_samples, job.metric_names
    found = scores(list(there.values()), names, resamples) if there else None
    own = {str(seed): scores(one, names, _FEWEST_RESAMPLES).metrics for seed, one in there.items()}
    trained = spec.trains or spec.adapter_of is not None
    best = best_row(source.search) if trained and source.runs() else None
    rows = [best] if best else []
    if source.seeds in source.runs():
        rows += [row for row in build_report(source.seeds).trials if row.state == "finished"]
    tried = build_report(source.search).trials if source.runs() else []
    weights = source.search.trial(best.trial_id).weights if best else None
    return Arm(
        arm=folder.name,
        what=_what(spec, best),
        metrics=dict(found.metrics) if found else {},
        interval=found.intervals if found else {},
        seeds={seed: dict(metrics) for seed, metrics in own.items()},
        configuration=best.params if best else {},
        tried=len(tried) if spec.parameters or spec.adapter_of else 0,
        trial_id=best.trial_id if best else None,
        weights=str(weights.relative_to(run.path)) if weights else None,
        weights_mb=_size_mb(weights) if weights else 0.0,
        train_seconds=_mean([row.train_seconds for row in rows]) if trained else 0.0,
        search_seconds=sum(row.train_seconds or 0.0 for row in tried) if trained else 0.0,
        gpu_hours=_mean([row.gpu_hours for row in rows]) if trained else 0.0,
        peak_memory_gib=_mean([row.peak_memory_gib for row in rows]),
        trainable_parameters=best.trainable_parameters if best else 0,
        inference=_inference(files.read_jsonl(folder.inference)),
        remarks=_remarks(spec, best, rows, job),
    )


_FEWEST_RESAMPLES = 1
"""Where only the values are wanted."""


def _what(spec: ArmSpec, best: Row | None) -> str:
    base = {"none": "", "nf4": "4-bit (NF4)", "fp4": "4-bit (FP4)", "int8": "INT8"}[spec.quantization]
    if spec.adapter_of:
        return f"{spec.adapter_of}'s adapter on {f'the {base} base' if base else 'the base'}, no further training"
    said = _WHAT[str(spec.method)] + (f", {base}" if base else "")
    values = {path: f"{value:.3g}" if isinstance(value, float) else value for path, value in spec.set.items()}
    found = {} if best is None else {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in best.params.items()}
    found.pop("train.seed", None)
    shown = describe(values | found)
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


def _inference(rows: list[dict[str, Any]]) -> Inference | None:
    if not rows:
        return None
    names = [name for name in Inference.model_fields if name not in ("rounds", "spread", "threads")]
    columns = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    found = {name: statistics.median(values) for name, values in columns.items() if values}
    spread = {name: (min(values), max(values)) for name, values in columns.items() if len(values) > 1}
    return Inference(**found, rounds=len(rows), spread=spread, threads=rows[-1].get("threads"))


def _size_mb(folder: Path) -> float | None:
    if not folder.is_dir():
        return None
    kept = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json")]
    return sum(path.stat().st_size for path in kept) / 1e6


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def comparison_report(run: Run, job: JobSpec, plain: Report) -> Report:
    """A report with the arms of a comparison in it; `plain` has what every run has."""
    assert job.compare is not None
    arms, pairs, trials = arms_of_run(run, job, plain.held_out)
    compare = job.compare
    choice = Choice(compare.rule, job.metric.name, job.metric.goal, compare.cost, compare.within)
    base = next((arm for arm in arms if arm.arm in _untuned(job)), None)
    update: dict[str, Any] = {
        "arms": arms,
        "pairs": pairs,
        "trials": trials,
        "recommendation": choose(arms, pairs, choice),
        "rungs": [],
    }
    if base is not None and base.metrics:
        update["base"] = plain.base.model_copy(
            update={"state": "finished", "test_metrics": base.metrics, "test_intervals": base.interval}
        )
    return plain.model_copy(update=update)


def _untuned(job: JobSpec) -> list[str]:
    assert job.compare is not None
    return [name for name, arm in job.compare.arms.items() if arm.method == "base" and arm.quantization == "none"]
