"""Benchmark every variant of one model: base, adapter and exported targets.

Each measurement is a process of its own (`lorafleet measure`), so that memory and
loading time are those of one variant. All variants compute in float32 on the CPU with
the same threads and tokens; only TensorRT runs on a GPU. The result is a `Report` whose
arms are the variants, so that all renderers of comparisons work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.cluster.execution.subprocess_measurement import measure_in_subprocess
from lorafleet.deployment.export import SUMMARY
from lorafleet.deployment.merge import convert_to_float32
from lorafleet.deployment.runtime import compute_files_mb, read_artefact
from lorafleet.evaluation.report.build import build_report
from lorafleet.evaluation.report.comparison import summarize_batches, summarize_inference
from lorafleet.evaluation.report.format import BENCHMARK, format_number
from lorafleet.evaluation.report.model_of_run import SelectedModel
from lorafleet.evaluation.report.search import clear_run_results
from lorafleet.evaluation.tokens import TokenData, make_row_encoder
from lorafleet.jobs import files
from lorafleet.jobs.data.rows import forget_rows
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.export_result import Parity, ParityMeasurement, read_record
from lorafleet.jobs.runs.report import Arm, Recommendation, Report
from lorafleet.jobs.schema.export import TARGET_DESCRIPTIONS, TARGETS
from lorafleet.training.data import prepare_tokens
from lorafleet.training.model import resolve_safetensors_folder

LEDGER = "measured.jsonl"


@dataclass(frozen=True)
class Variant:
    """One variant to measure, or the reason why it cannot be measured.

    `build_variants` makes them. A variant that cannot run stays in the table with its
    reason: a missing row would look as if nobody had asked.
    """

    name: str
    what: str
    request: dict[str, Any] | None = None
    """The request for the measuring process. None if the variant cannot run on this machine."""
    unavailable: str | None = None
    folder: Path | None = None
    parity: Parity | None = None
    score: dict[str, Any] | None = None
    """Quality of the variant (metric, value, interval) where no parity record has it."""
    remarks: tuple[str, ...] = ()
    """Remarks for the report, such as batches that the target cannot run."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """Size of a benchmark: rounds, rows, tokens and threads."""

    rounds: int
    rows: int
    new_tokens: int
    threads: int
    points: tuple[tuple[int, int], ...] = ()
    """Additional batches to measure: (rows, tokens per row)."""


def build_variants(
    selected: SelectedModel, out: Path, settings: BenchmarkSettings
) -> list[Variant]:
    """Return the base, the adapter and every target of an export, including those that failed.

    Args:
        selected: The model to benchmark.
        out: Folder of the export.
        settings: Size of the benchmark.

    Returns:
        The variants in the order of the table. Targets that were made from another model
            are marked as unavailable.

    Raises:
        UserError: The folder holds no export, or a batch is longer than the model allows.
    """
    summary = files.read_json(out / SUMMARY)
    targets = summary.get("targets", {})
    if not targets:
        raise UserError(
            f"{out} has no {SUMMARY}: run `lorafleet export` first, or name the folder of an "
            "export with --export"
        )
    # A base in bfloat16 or with quantised arithmetic would be compared with float32 targets.
    measured_job = convert_to_float32(selected.job)
    data = prepare_tokens(measured_job)
    forget_rows()
    split = "validation" if data.chosen_on_test else "test"
    job = measured_job.model_dump(mode="json")
    base_request = {
        "what": "inference",
        "job": job,
        "tokens": str(data.folder),
        "split": split,
        "gpus": 0,
    }
    base_request |= {
        "rows": settings.rows,
        "new_tokens": settings.new_tokens,
        "points": settings.points,
    }
    _check_batch_lengths(selected, settings)
    base_description = "the untrained base"
    if selected.job.method == "qlora":
        base_description += f", {selected.job.qlora.quant_type.upper()}"
    score = summary.get("base") or {}
    # export.json may hold the targets of several exports; the base's score is that of the last one.
    is_same_model = (score.get("run"), score.get("trial_id")) == (
        selected.run.id,
        selected.trial_id,
    )
    entries = [
        Variant(
            "base",
            base_description,
            base_request | {"weights": None},
            score=score if is_same_model else None,
        )
    ]
    if selected.weights is not None:
        entries.append(
            Variant(
                "adapter",
                f"{selected.job.method}, as trained",
                base_request | {"weights": str(selected.weights)},
            )
        )
    rows = _load_token_rows(selected, data, split, settings)
    answer_tokens, longest = (
        settings.new_tokens if selected.job.is_generative else 0,
        max(map(len, rows), default=0),
    )
    for target in TARGETS:
        if target not in targets:
            continue
        origin = (targets[target]["run"], targets[target]["trial_id"])
        if origin != (selected.run.id, selected.trial_id):
            entries.append(
                Variant(
                    target,
                    TARGET_DESCRIPTIONS[target],
                    unavailable=f"it was made from {origin[0]}, trial {origin[1]}",
                )
            )
            continue
        folder = out / str(targets[target]["folder"] or target)
        if targets[target]["folder"] is None or not folder.is_dir():
            entries.append(
                Variant(
                    target,
                    TARGET_DESCRIPTIONS[target],
                    unavailable=str(targets[target]["unavailable"] or "its folder is missing"),
                )
            )
            continue
        points, reason = select_fitting_points(
            read_artefact(folder).positions, longest, answer_tokens, settings.points
        )
        if points is None:
            entries.append(Variant(target, TARGET_DESCRIPTIONS[target], unavailable=reason))
            continue
        request = {
            "what": "artefact",
            "folder": str(folder),
            "rows": rows,
            "new_tokens": settings.new_tokens,
            "points": points,
            "batch_rows": selected.job.train.per_device_eval_batch_size,
            "threads": settings.threads,
        }
        parity = read_record(folder / "parity.json", Parity)
        remarks = (*([reason] if reason else []), *parity.remarks)
        entries.append(
            Variant(
                target,
                TARGET_DESCRIPTIONS[target],
                request,
                folder=folder,
                parity=parity,
                remarks=remarks,
            )
        )
    return entries


Points = Sequence[tuple[int, int]]


def select_fitting_points(
    max_positions: int | None, longest: int, answer_tokens: int, points: Points
) -> tuple[Points | None, str]:
    """Return the batches that a target has room for, and a message about those it has not.

    The first value is None if not even the longest row fits. A program that was compiled
    for known sizes can have fewer positions than its model.

    Args:
        max_positions: Positions of the target in tokens. None: no limit.
        longest: Tokens of the longest row.
        answer_tokens: Tokens of an answer; 0 for a classifier.
        points: Batches to measure: (rows, tokens per row).
    """
    if max_positions is None:
        return points, ""
    if longest + answer_tokens > max_positions:
        return (
            None,
            f"it supports at most {max_positions} tokens, but the longest row needs "
            f"{longest + answer_tokens}",
        )
    fitting_points = [point for point in points if point[1] + answer_tokens <= max_positions]
    dropped_lengths = sorted(
        {length for _, length in points} - {length for _, length in fitting_points}
    )
    return (
        fitting_points,
        f"batches of {', '.join(map(str, dropped_lengths))} tokens are not possible: it supports "
        f"at most {max_positions}"
        if dropped_lengths
        else "",
    )


def _check_batch_lengths(selected: SelectedModel, settings: BenchmarkSettings) -> None:
    """Raise UserError if a batch is longer than the model's positions."""
    spec = selected.job.model
    positions = read_max_positions(spec.model_name_or_path, spec.revision)
    answer_tokens = settings.new_tokens if selected.job.is_generative else 0
    longest = max((length for _, length in settings.points), default=0)
    if positions is not None and longest + answer_tokens > positions:
        answer_note = f", of which an answer needs {answer_tokens}" if answer_tokens else ""
        raise UserError(
            f"--lengths has {longest}, but the model has only {positions} positions{answer_note}"
        )


def read_max_positions(name: str, revision: str | None) -> int | None:
    """Return the number of positions of a model, or None if its configuration does not state it.

    The configuration class maps the name that a model type uses to
    `max_position_embeddings`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        str(resolve_safetensors_folder(name, revision)), trust_remote_code=False
    )  # nosec B615  # a local folder
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


def _load_token_rows(
    selected: SelectedModel, data: TokenData, split_name: str, settings: BenchmarkSettings
) -> list[list[int]]:
    """Return the token rows for every variant: prompts with room for an answer, or texts.

    They are the rows that base and adapter are measured on, encoded in the same way.
    """
    if selected.job.is_generative:
        spec, encoder = selected.job.model, make_row_encoder(selected.job)
        rows = data.read_rows(split_name)[: settings.rows]
        positions = (
            read_max_positions(spec.model_name_or_path, spec.revision)
            or spec.max_length + settings.new_tokens
        )
        max_prompt_tokens = max(1, min(spec.max_length, positions - settings.new_tokens))
        return [encoder.encode_prompt(row, max_prompt_tokens) for row in rows]
    return data.get_tokens(split_name, settings.rows)


def benchmark(
    selected: SelectedModel,
    variants: Sequence[Variant],
    out: Path,
    settings: BenchmarkSettings,
    tell: Callable[[str], None],
) -> Report:
    """Measure each variant in fresh processes for several rounds, and build the report.

    The variants take turns, so that a temporarily busy machine slows all of them equally.
    The row of a variant that fails says why; it is not tried again in later rounds.

    Args:
        selected: The model that the variants come from.
        variants: What to measure, from `build_variants`.
        out: Folder of the export. Measurements go to its `benchmark` folder.
        settings: Size of the benchmark.
        tell: Called with a message before each measurement. An exception from it ends the
            benchmark.
    """
    ledger = out / "benchmark" / LEDGER
    # Measurements of an earlier benchmark may be of other settings or another state of the machine.
    ledger.unlink(missing_ok=True)
    failures: dict[str, str] = {}
    for round_index in range(settings.rounds):
        for variant in variants:
            if variant.request is None or variant.name in failures:
                continue
            tell(f"measuring {variant.name} (round {round_index + 1} of {settings.rounds})")
            try:
                measurement = measure_in_subprocess(
                    variant.request, selected.run.path, settings.threads
                )
            except RuntimeError as error:
                failures[variant.name] = str(error)
                continue
            files.append_jsonl(
                ledger, {"variant": variant.name, "round": round_index, **measurement}
            )
    rows = files.read_jsonl(ledger)
    judged = next((candidate.parity.judged for candidate in variants if candidate.parity), None)
    arms = [
        _build_arm(
            selected,
            candidate,
            [row for row in rows if row["variant"] == candidate.name],
            failures,
            judged,
        )
        for candidate in variants
    ]
    metric = "perplexity" if selected.job.is_generative else "accuracy"
    row_counts = sorted(
        {candidate.parity.judged.rows for candidate in variants if candidate.parity}
    )
    row_range = " to ".join(map(str, dict.fromkeys([*row_counts[:1], *row_counts[-1:]])))
    notes = (
        [
            (
                f"{metric} is measured on the {row_range} rows on which targets were compared with "
                "their source"
            )
        ]
        if judged
        else []
    )
    return clear_run_results(build_report(selected.run)).model_copy(
        update={
            "state": BENCHMARK,
            "arms": arms,
            "metric": metric,
            "metrics": [metric],
            "goal": "minimize" if selected.job.is_generative else "maximize",
            "warnings": notes,
            "recommendation": _recommend_fastest(arms, metric),
        }
    )


def _build_arm(
    selected: SelectedModel,
    variant: Variant,
    rows: list[dict[str, Any]],
    failures: dict[str, str],
    source: ParityMeasurement | None,
) -> Arm:
    """Build the report row of a variant.

    Args:
        selected: The model that was benchmarked.
        variant: The variant.
        rows: Its measurements, one per round.
        failures: Variant -> message of its failure.
        source: Metrics of the adapter, measured when a target was compared with it; None
            without one.
    """
    judged = variant.parity.judged if variant.parity else None
    metrics, interval = {}, {}
    if judged:
        metrics[judged.metric], bounds = judged.after, judged.after_interval
    elif source and variant.name == "adapter":
        metrics[source.metric], bounds = source.before, source.before_interval
    elif variant.score:
        metrics[variant.score["metric"]] = variant.score["value"]
        bounds = tuple(variant.score["interval"]) if variant.score["interval"] else None
    else:
        bounds = None
    if bounds:
        interval[next(iter(metrics))] = bounds
    remarks = [
        f"rejected: {reason}" for reason in (variant.parity.reasons if variant.parity else [])
    ]
    remarks += variant.remarks
    if variant.unavailable:
        remarks.append(f"unavailable: {variant.unavailable}")
    if variant.name in failures:
        remarks.append(f"not measured: {failures[variant.name]}")
    passed = variant.parity is None or variant.parity.accepted
    return Arm(
        arm=variant.name,
        what=variant.what,
        metrics=metrics,
        interval=interval,
        weights=str(variant.folder) if variant.folder else None,
        weights_mb=_compute_size_mb(selected, variant),
        inference=summarize_inference(rows),
        batches=summarize_batches(rows),
        comparable=passed and not variant.unavailable and variant.name not in failures,
        remarks=remarks,
    )


def _compute_size_mb(selected: SelectedModel, variant: Variant) -> float | None:
    """Return the size of a variant in MB, or None if it is unknown."""
    if variant.folder is not None:
        return compute_files_mb(variant.folder)
    if variant.name == "adapter" and selected.weights is not None:
        return compute_files_mb(selected.weights)
    if variant.name != "base":
        return None
    folder = resolve_safetensors_folder(
        selected.job.model.model_name_or_path, selected.job.model.revision
    )
    needed = [
        *folder.glob("*.safetensors"),
        *folder.glob("tokenizer.json"),
    ]  # hub folders may hold other formats
    return sum(path.stat().st_size for path in needed) / 1e6


def _recommend_fastest(arms: Sequence[Arm], metric: str) -> Recommendation:
    """Recommend the target with the lowest latency among those that passed their gate."""
    rule = "the fastest of the targets that passed their gate"
    measured_arms = [
        arm
        for arm in arms
        if arm.comparable
        and arm.arm in TARGETS
        and arm.inference
        and arm.inference.latency_ms is not None
    ]
    if not measured_arms:
        return Recommendation(
            trial_id=None, rule=rule, sentence="No target that passed its gate was measured."
        )
    best = min(measured_arms, key=lambda arm: (arm.inference and arm.inference.latency_ms) or 0.0)
    assert best.inference is not None
    unit = "ms per row" if best.inference.ttft_ms is None else "ms per answer"
    return Recommendation(
        trial_id=None,
        arm=best.arm,
        rule=rule,
        sentence=f"Deploy {best.arm}: {format_number(best.inference.latency_ms, 1)} {unit}, "
        f"{format_number(best.weights_mb, 1)} MB, "
        f"and it passed its gate{_format_metric_comparison(best, arms, metric)}.",
        adapter=best.weights,
    )


def _format_metric_comparison(best: Arm, arms: Sequence[Arm], metric: str) -> str:
    """Format the metric of the best arm next to that of the adapter it was made from."""
    source_value = next((arm.metrics.get(metric) for arm in arms if arm.arm == "adapter"), None)
    value = best.metrics.get(metric)
    if value is None or source_value is None:
        return ""
    return f" ({metric} {format_number(value)}; the adapter has {format_number(source_value)})"
