"""The arms of a comparison as words, the same in every form they are drawn in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorafleet.evaluation.render.trial_table import BENCHMARK, MISSING, duration, format_p_value, number, shown_metrics
from lorafleet.jobs.runs.report import Arm, BatchSpeed, Inference, Pair, Report
from lorafleet.jobs.text import counted

Cell = Callable[[Arm], str]


def arm_columns(report: Report) -> list[tuple[str, Cell]]:
    """Every column: heading, and how an arm fills it. Columns that no arm fills are left out."""
    found: list[tuple[str, Cell]] = [("arm", lambda arm: arm.arm), ("what", lambda arm: arm.what)]
    found.append((f"{report.held_out} {report.metric}", _quality(report.metric)))
    found.append((f"{report.metric} over seeds", _over_seeds(report.metric)))
    found.append(("p against the best", _p_value(report)))
    found += [(f"{report.held_out} {name}", _metric(name)) for name in report.metrics if name != report.metric]
    found += [
        ("train time", lambda arm: "none" if arm.train_seconds == 0 else duration(arm.train_seconds)),
        ("search time", lambda arm: duration(arm.search_seconds) if arm.search_seconds else MISSING),
        ("tried", lambda arm: str(arm.tried) if arm.tried else MISSING),
        ("GPU-hours", lambda arm: number(arm.gpu_hours, 3) if arm.gpu_hours else MISSING),
        ("train GiB", lambda arm: number(arm.peak_memory_gib, 2)),
        ("trained parameters", lambda arm: f"{arm.trainable_parameters:,}" if arm.trainable_parameters else MISSING),
        (_mb(report), lambda arm: number(arm.weights_mb, 1) if arm.weights_mb else MISSING),
        *_speeds(),
    ]
    arms = report.arms or []
    return [(heading, cell) for heading, cell in found if any(cell(arm) != MISSING for arm in arms)]


def terminal_arm_columns(report: Report) -> list[tuple[str, Cell]]:
    """The columns that fit a terminal."""
    wanted = {
        "arm": "arm",
        f"{report.held_out} {report.metric}": f"{report.held_out} {report.metric}",
        f"{report.metric} over seeds": "over seeds",
        "p against the best": "p",
        **{f"{report.held_out} {name}": name for name in shown_metrics(report)},
        "train time": "train",
        "train GiB": "train GiB",
        "trained parameters": "parameters",
        "first token ms": "first ms",
        "row ms": "row ms",
        "tokens/s": "tokens/s",
        "samples/s": "samples/s",
        "inference GiB": "infer GiB",
        **({"load s": "load s", _mb(report): "MB"} if report.state == BENCHMARK else {}),
    }
    return [(wanted[heading], cell) for heading, cell in arm_columns(report) if heading in wanted]


def _mb(report: Report) -> str:
    """What the MB are of: of an exported target they are its tokenizer's too."""
    return "MB on disk" if report.state == BENCHMARK else "weights MB"


def _speeds() -> list[tuple[str, Cell]]:
    def speed(read: Callable[[Inference], float | None], digits: int) -> Cell:
        return lambda arm: number(read(arm.inference), digits) if arm.inference else MISSING

    return [
        ("first token ms", speed(lambda found: found.ttft_ms, 0)),
        ("row ms", speed(lambda found: found.latency_ms, 1)),
        ("tokens/s", speed(lambda found: found.tokens_per_second, 1)),
        ("samples/s", speed(lambda found: found.samples_per_second, 1)),
        ("inference GiB", speed(lambda found: found.peak_memory_gib, 2)),
        ("load s", lambda arm: _seconds(arm.inference.load_seconds) if arm.inference else MISSING),
    ]


def _seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _quality(name: str) -> Cell:
    def cell(arm: Arm) -> str:
        value, ends = number(arm.metrics.get(name)), arm.interval.get(name)
        return f"{value} [{number(ends[0])}, {number(ends[1])}]" if ends and value != MISSING else value

    return cell


def _metric(name: str) -> Cell:
    return lambda arm: number(arm.metrics.get(name))


def _over_seeds(name: str) -> Cell:
    def cell(arm: Arm) -> str:
        values = [value for metrics in arm.seeds.values() if (value := metrics.get(name)) is not None]
        return f"{number(min(values))} to {number(max(values))} ({len(values)})" if len(values) > 1 else MISSING

    return cell


def best_arm(report: Report) -> Arm | None:
    """The arm with the best metric among those that may be compared."""
    scored = [arm for arm in report.arms or [] if arm.comparable and arm.metrics.get(report.metric) is not None]
    pick = max if report.goal == "maximize" else min
    return pick(scored, key=lambda arm: arm.metrics[report.metric] or 0.0) if scored else None


def _p_value(report: Report) -> Cell:
    best = best_arm(report)

    def cell(arm: Arm) -> str:
        if best is None or arm.arm == best.arm:
            return MISSING
        found = [pair.p_value for pair in report.pairs if {pair.one, pair.other} == {arm.arm, best.arm}]
        return format_p_value(found[0]) if found else MISSING

    return cell


def pair_cells(report: Report) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(headings, rows) of every two arms' difference: the row's metric less the column's, p-value and interval."""
    names = [arm.arm for arm in report.arms or [] if any(arm.arm in (pair.one, pair.other) for pair in report.pairs)]
    between = {(pair.one, pair.other): pair for pair in report.pairs}
    between |= {(pair.other, pair.one): _turned(pair) for pair in report.pairs}

    def cell(row: str, column: str) -> str:
        found = between.get((row, column))
        if found is None:
            return MISSING
        ends = f"\n[{found.interval[0]:+.3f}, {found.interval[1]:+.3f}]" if found.interval else ""
        p_value = "" if found.p_value is None else f" (p {format_p_value(found.p_value)})"
        return f"{found.difference:+.3f}{p_value}{ends}"

    return names, [(row, [cell(row, column) for column in names]) for row in names]


def _turned(pair: Pair) -> Pair:
    """The same pair from the other side."""
    ends = (-pair.interval[1], -pair.interval[0]) if pair.interval else None
    turned = {"one": pair.other, "other": pair.one, "difference": -pair.difference, "interval": ends}
    return pair.model_copy(update=turned)


def _difference(pair: Pair) -> str:
    return f"{pair.difference:+.3f}" + (f" [{pair.interval[0]:+.3f}, {pair.interval[1]:+.3f}]" if pair.interval else "")


_FEW = 3
"""So many pairs are shown whole where there is little room."""


def pairs_table(report: Report, *, whole: bool) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of arms' differences on the same rows: every two (`whole`), or each against the best."""
    best = best_arm(report)
    shown = list(report.pairs)
    if best is not None and not whole and len(shown) > _FEW:
        shown = [pair for pair in shown if best.arm in (pair.one, pair.other)]
    turned = [_turned(pair) if best is not None and pair.one == best.arm else pair for pair in shown]
    headings = ["difference", f"{report.held_out} {report.metric} [95 %]", "p"]
    return headings, [
        [f"{pair.one} - {pair.other}", _difference(pair), format_p_value(pair.p_value)] for pair in turned
    ]


def batches_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of what sizes of batches take; columns that nothing fills are left out."""
    headings = ["arm", "rows", "tokens a row", "first token ms", "tokens/s", "batch ms", "samples/s"]
    rows = [
        [
            arm.arm,
            str(point.batch_size),
            str(point.length),
            number(point.ttft_ms, 0),
            number(point.tokens_per_second, 1),
            number(point.latency_ms, 1),
            number(point.samples_per_second, 1),
        ]
        for arm in report.arms or []
        for point in arm.batches
    ]
    kept = [place for place in range(len(headings)) if any(row[place] != MISSING for row in rows)]
    return [headings[place] for place in kept], [[row[place] for place in kept] for row in rows]


def batch_records(report: Report) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows) of the same numbers, in full."""
    names = list(BatchSpeed.model_fields)
    rows = [[arm.arm, *(getattr(point, name) for name in names)] for arm in report.arms or [] for point in arm.batches]
    return ["arm", *names], rows


def arm_notes(report: Report) -> list[str]:
    """What a reader of the arms must know."""
    found = [f"{arm.arm}: {remark}." for arm in report.arms or [] for remark in arm.remarks]
    if report.held_out == "test" and any(arm.seeds for arm in report.arms or []):
        if any(arm.tried for arm in report.arms or []):
            found.append("Each arm's configuration was chosen on the validation rows.")
        found.append(
            "The arms are compared on the test rows, which no training or search has looked at; the number of the arm "
            "that ships is the best of several there, and so a little optimistic."
        )
    several = any(len(arm.seeds) > 1 for arm in report.arms or [])
    if several:
        found.append("Metrics are means over an arm's seeds; brackets hold 95 % intervals over rows and seeds.")
    elif any(arm.tried or (arm.train_seconds and arm.seeds) for arm in report.arms or []):
        found.append("One training an arm: how far another seed would move it is in no interval and no p-value.")
    if report.pairs:
        units = "rows and seeds" if several else "rows"
        found.append(
            f"p-values and intervals of differences: paired by {units}, two-sided, adjusted for the number of arms."
        )
    measured = [arm.inference for arm in report.arms or [] if arm.inference]
    if measured:
        rounds, threads = measured[0].rounds, measured[0].threads
        on_cpu = f", {threads} CPU thread{'s' if threads != 1 else ''}" if measured[0].begun_gib is not None else ""
        whose = "whole process's, its libraries included" if measured[0].begun_gib is not None else "GPU's"
        found.append(
            f"Inference: each arm alone in a fresh process, in turn, {counted(rounds, 'time')}{on_cpu}; medians. "
            f"Memory is the {whose}."
        )
    return found


def arm_records(report: Report) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows) of all numbers of the arms, for CSV."""
    plain = ("train_seconds", "search_seconds", "gpu_hours", "peak_memory_gib", "trainable_parameters", "weights_mb")
    speeds = [name for name in Inference.model_fields if name not in ("spread", "threads", "cpu", "cpu_flags")]
    metrics = [column for name in report.metrics for column in (name, f"{name}_low", f"{name}_high")]
    columns = ["arm", "what", "recommended", "trial_id", *metrics, *plain, *(f"inference_{name}" for name in speeds)]
    rows = []
    for arm in report.arms or []:
        values: list[Any] = [arm.arm, arm.what, arm.arm == report.recommendation.arm, arm.trial_id]
        for name in report.metrics:
            values += [arm.metrics.get(name), *(arm.interval.get(name) or (None, None))]
        values += [getattr(arm, name) for name in plain]
        values += [getattr(arm.inference, name) if arm.inference else None for name in speeds]
        rows.append(values)
    return columns, rows
