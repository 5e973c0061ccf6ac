"""Format the arms of a comparison as text.

All output formats share these functions. Benchmarks are shown with them too: their
variants are arms, and the report's state (`BENCHMARK`) changes a few headings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorafleet.evaluation.report.format import (
    BENCHMARK,
    MISSING,
    format_duration,
    format_number,
    format_p_value,
    list_shown_metrics,
)
from lorafleet.jobs.runs.report import Arm, BatchSpeed, Inference, Pair, Report
from lorafleet.jobs.text import format_count

Cell = Callable[[Arm], str]


def build_arm_columns(report: Report) -> list[tuple[str, Cell]]:
    """Return the columns of the arm table.

    Columns that are empty for all arms are left out.

    Returns:
        (heading, function that formats an arm's cell) of each column.
    """
    columns: list[tuple[str, Cell]] = [("arm", lambda arm: arm.arm), ("what", lambda arm: arm.what)]
    columns.append((f"{report.held_out} {report.metric}", _make_quality_cell(report.metric)))
    columns.append((f"{report.metric} over seeds", _make_seeds_cell(report.metric)))
    columns.append(("p vs best", _make_p_value_cell(report)))
    columns += [
        (f"{report.held_out} {name}", _make_metric_cell(name))
        for name in report.metrics
        if name != report.metric
    ]
    columns += [
        (
            "train time",
            lambda arm: "none" if arm.train_seconds == 0 else format_duration(arm.train_seconds),
        ),
        (
            "search time",
            lambda arm: format_duration(arm.search_seconds) if arm.search_seconds else MISSING,
        ),
        ("tried", lambda arm: str(arm.tried) if arm.tried else MISSING),
        ("GPU-hours", lambda arm: format_number(arm.gpu_hours, 3) if arm.gpu_hours else MISSING),
        ("train GiB", lambda arm: format_number(arm.peak_memory_gib, 2)),
        (
            "trained parameters",
            lambda arm: f"{arm.trainable_parameters:,}" if arm.trainable_parameters else MISSING,
        ),
        (
            _get_size_heading(report),
            lambda arm: format_number(arm.weights_mb, 1) if arm.weights_mb else MISSING,
        ),
        *_build_speed_columns(),
    ]
    arms = report.arms or []
    return [
        (heading, cell) for heading, cell in columns if any(cell(arm) != MISSING for arm in arms)
    ]


def build_terminal_arm_columns(report: Report) -> list[tuple[str, Cell]]:
    """Return the columns that fit a terminal, with short headings."""
    short_headings = {
        "arm": "arm",
        f"{report.held_out} {report.metric}": f"{report.held_out} {report.metric}",
        f"{report.metric} over seeds": "over seeds",
        "p vs best": "p",
        **{f"{report.held_out} {name}": name for name in list_shown_metrics(report)},
        "train time": "train",
        "train GiB": "train GiB",
        "trained parameters": "parameters",
        "first token ms": "first ms",
        "row ms": "row ms",
        "tokens/s": "tokens/s",
        "samples/s": "samples/s",
        "inference GiB": "infer GiB",
        **(
            {"load s": "load s", _get_size_heading(report): "MB"}
            if report.state == BENCHMARK
            else {}
        ),
    }
    return [
        (short_headings[heading], cell)
        for heading, cell in build_arm_columns(report)
        if heading in short_headings
    ]


def _get_size_heading(report: Report) -> str:
    """Return the heading of the size column. For an exported target, the tokenizer is included."""
    return "MB on disk" if report.state == BENCHMARK else "weights MB"


def _build_speed_columns() -> list[tuple[str, Cell]]:
    """Return the columns of speed, memory and loading time at inference."""

    def make_cell(read: Callable[[Inference], float | None], digits: int) -> Cell:
        return lambda arm: format_number(read(arm.inference), digits) if arm.inference else MISSING

    return [
        ("first token ms", make_cell(lambda inference: inference.ttft_ms, 0)),
        ("row ms", make_cell(lambda inference: inference.latency_ms, 1)),
        ("tokens/s", make_cell(lambda inference: inference.tokens_per_second, 1)),
        ("samples/s", make_cell(lambda inference: inference.samples_per_second, 1)),
        ("inference GiB", make_cell(lambda inference: inference.peak_memory_gib, 2)),
        (
            "load s",
            lambda arm: _format_seconds(arm.inference.load_seconds) if arm.inference else MISSING,
        ),
    ]


def _format_seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _make_quality_cell(name: str) -> Cell:
    """Return a function that formats a metric of an arm with its interval."""

    def format_cell(arm: Arm) -> str:
        value, ends = format_number(arm.metrics.get(name)), arm.interval.get(name)
        return (
            f"{value} [{format_number(ends[0])}, {format_number(ends[1])}]"
            if ends and value != MISSING
            else value
        )

    return format_cell


def _make_metric_cell(name: str) -> Cell:
    return lambda arm: format_number(arm.metrics.get(name))


def _make_seeds_cell(name: str) -> Cell:
    """Return a function that formats the range of a metric over the seeds of an arm."""

    def format_cell(arm: Arm) -> str:
        values = [
            value for metrics in arm.seeds.values() if (value := metrics.get(name)) is not None
        ]
        return (
            f"{format_number(min(values))} to {format_number(max(values))} ({len(values)})"
            if len(values) > 1
            else MISSING
        )

    return format_cell


def find_best_arm(report: Report) -> Arm | None:
    """Return the comparable arm with the best metric; None if no arm has one."""
    scored = [
        arm
        for arm in report.arms or []
        if arm.comparable and arm.metrics.get(report.metric) is not None
    ]
    pick = max if report.goal == "maximize" else min
    return pick(scored, key=lambda arm: arm.metrics[report.metric] or 0.0) if scored else None


def _make_p_value_cell(report: Report) -> Cell:
    """Return a function that formats the p-value of an arm against the best arm.

    The p-values are adjusted for the number of arms, so reading the whole column is fair.
    """
    best = find_best_arm(report)

    def format_cell(arm: Arm) -> str:
        if best is None or arm.arm == best.arm:
            return MISSING
        p_values = [
            pair.p_value for pair in report.pairs if {pair.one, pair.other} == {arm.arm, best.arm}
        ]
        return format_p_value(p_values[0]) if p_values else MISSING

    return format_cell


def build_pair_matrix(report: Report) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return (headings, rows) with the differences of every two arms.

    Returns:
        Names of the compared arms, and for each of them (name, cells). A cell holds the
            metric of the row's arm minus that of the column's arm, the p-value and the
            interval.
    """
    names = [
        arm.arm
        for arm in report.arms or []
        if any(arm.arm in (pair.one, pair.other) for pair in report.pairs)
    ]
    pairs_by_names = {(pair.one, pair.other): pair for pair in report.pairs}
    pairs_by_names |= {(pair.other, pair.one): _swap_pair(pair) for pair in report.pairs}

    def format_cell(row: str, column: str) -> str:
        pair = pairs_by_names.get((row, column))
        if pair is None:
            return MISSING
        ends = f"\n[{pair.interval[0]:+.3f}, {pair.interval[1]:+.3f}]" if pair.interval else ""
        p_value = "" if pair.p_value is None else f" (p {format_p_value(pair.p_value)})"
        return f"{pair.difference:+.3f}{p_value}{ends}"

    return names, [(row, [format_cell(row, column) for column in names]) for row in names]


def _swap_pair(pair: Pair) -> Pair:
    """Return a pair with its two arms swapped."""
    ends = (-pair.interval[1], -pair.interval[0]) if pair.interval else None
    update = {
        "one": pair.other,
        "other": pair.one,
        "difference": -pair.difference,
        "interval": ends,
    }
    return pair.model_copy(update=update)


def _format_difference(pair: Pair) -> str:
    """Format the difference of a pair with its interval."""
    return f"{pair.difference:+.3f}" + (
        f" [{pair.interval[0]:+.3f}, {pair.interval[1]:+.3f}]" if pair.interval else ""
    )


_MAX_PAIRS = 3
"""Up to this many pairs are all shown where space is limited."""


def build_pairs_table(report: Report, *, all_pairs: bool) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows) with the differences of arms on the same rows.

    Pairs with the best arm are shown as the other arm minus the best.

    Args:
        report: The report of a comparison.
        all_pairs: True shows every pair. False shows only pairs with the best arm if there
            are more than a few.
    """
    best = find_best_arm(report)
    shown = list(report.pairs)
    if best is not None and not all_pairs and len(shown) > _MAX_PAIRS:
        shown = [pair for pair in shown if best.arm in (pair.one, pair.other)]
    oriented = [
        _swap_pair(pair) if best is not None and pair.one == best.arm else pair for pair in shown
    ]
    headings = ["difference", f"{report.held_out} {report.metric} [95 %]", "p"]
    return headings, [
        [f"{pair.one} - {pair.other}", _format_difference(pair), format_p_value(pair.p_value)]
        for pair in oriented
    ]


def build_batches_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows) with the speed at each batch size. Empty columns are left out."""
    headings = [
        "arm",
        "rows",
        "tokens/row",
        "first token ms",
        "tokens/s",
        "batch ms",
        "samples/s",
    ]
    rows = [
        [
            arm.arm,
            str(point.batch_size),
            str(point.length),
            format_number(point.ttft_ms, 0),
            format_number(point.tokens_per_second, 1),
            format_number(point.latency_ms, 1),
            format_number(point.samples_per_second, 1),
        ]
        for arm in report.arms or []
        for point in arm.batches
    ]
    indices = [
        index for index in range(len(headings)) if any(row[index] != MISSING for row in rows)
    ]
    return [headings[index] for index in indices], [
        [row[index] for index in indices] for row in rows
    ]


def list_batch_records(report: Report) -> tuple[list[str], list[list[Any]]]:
    """Return (columns, rows) with the speed at each batch size in full precision."""
    names = list(BatchSpeed.model_fields)
    rows = [
        [arm.arm, *(getattr(point, name) for name in names)]
        for arm in report.arms or []
        for point in arm.batches
    ]
    return ["arm", *names], rows


def list_arm_notes(report: Report) -> list[str]:
    """Return the notes that a reader of the arm table needs.

    They say what the intervals and p-values cover, how inference was measured, and what is
    remarkable about single arms.
    """
    arms = report.arms or []
    notes = [f"{arm.arm}: {remark}." for arm in arms for remark in arm.remarks]
    has_several_seeds = any(len(arm.seeds) > 1 for arm in arms)
    if report.held_out == "test" and any(arm.seeds for arm in arms):
        if any(arm.tried for arm in arms):
            notes.append("Each arm's configuration was chosen on the validation rows.")
        notes.append(
            "The arms are compared on the test rows, which were not used in training or search. "
            "The score of the shipped arm is slightly optimistic, because it is the best of "
            "several."
        )
    if has_several_seeds:
        notes.append(
            "Metrics are means over an arm's seeds; brackets are 95 % intervals over rows and "
            "seeds."
        )
    elif any(arm.tried or (arm.train_seconds and arm.seeds) for arm in arms):
        notes.append(
            "Each arm was trained once: the intervals and p-values do not include the variation "
            "between seeds."
        )
    if report.pairs:
        units = "rows and seeds" if has_several_seeds else "rows"
        notes.append(
            f"p-values and intervals of differences: paired by {units}, two-sided, adjusted for "
            "the number of arms."
        )
    inference = next((arm.inference for arm in arms if arm.inference), None)
    if inference is not None:
        notes.append(_describe_inference(inference))
    return notes


def _describe_inference(inference: Inference) -> str:
    """Return how the inference of the arms was measured."""
    memory_owner, on_cpu = "GPU's", ""
    # `begun_gib` is measured on CPUs only, so it tells a CPU's measurement from a GPU's.
    if inference.begun_gib is not None:
        memory_owner = "whole process's, including its libraries"
        on_cpu = f", {format_count(inference.threads or 0, 'CPU thread')}"
    return (
        "Inference: each arm runs alone in a new process; the arms take turns, "
        f"{format_count(inference.rounds, 'time')}{on_cpu}; values are medians. Memory is the "
        f"{memory_owner}."
    )


def list_arm_records(report: Report) -> tuple[list[str], list[list[Any]]]:
    """Return (columns, rows) with all numbers of the arms, for CSV.

    Metrics have three columns each: the value, and `_low` and `_high` of its interval.
    Missing numbers are None.
    """
    cost_names = (
        "train_seconds",
        "search_seconds",
        "gpu_hours",
        "peak_memory_gib",
        "trainable_parameters",
        "weights_mb",
    )
    speed_names = [
        name
        for name in Inference.model_fields
        if name not in ("spread", "threads", "cpu", "cpu_flags")
    ]
    metrics = [
        column for name in report.metrics for column in (name, f"{name}_low", f"{name}_high")
    ]
    columns = [
        "arm",
        "what",
        "recommended",
        "trial_id",
        *metrics,
        *cost_names,
        *(f"inference_{name}" for name in speed_names),
    ]
    rows = []
    for arm in report.arms or []:
        values: list[Any] = [arm.arm, arm.what, arm.arm == report.recommendation.arm, arm.trial_id]
        for name in report.metrics:
            values += [arm.metrics.get(name), *(arm.interval.get(name) or (None, None))]
        values += [getattr(arm, name) for name in cost_names]
        values += [getattr(arm.inference, name) if arm.inference else None for name in speed_names]
        rows.append(values)
    return columns, rows
