"""The report's three plots, as SVG: loss curves, metric against a searched number, and the rungs."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from evaluation.choose import COSTS, Choice, front
from evaluation.report import short
from jobs.compare import Cost
from jobs.report import Arm, Report, Row
from jobs.search import without_fold

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STATE_MARKS = {"finished": "o", "stopped": "x", "failed": "X", "running": ">", "pending": "."}
_GREY = "#9aa3ad"
_ACCENT = "#c2410c"
_DARK = "#1c2430"
_NEAR = 0.04
"""Share of a plot's width and height within which two points are one to the eye."""
_AT_RUNGS = " at the rungs. A line that ends at a cross was cut there."


def plots(report: Report) -> list[tuple[str, str]]:
    """(caption, SVG) of each plot that the report has data for."""
    several = len(report.trials) > 1
    makers: list[tuple[str, Callable[[Axes, Report], bool]]] = [
        (f"Training loss{' by trial. The recommended trial is drawn in colour' if several else ''}.", _loss_curves),
        (f"Validation {report.metric} against what was searched; crosses were cut early.", _against_parameter),
        (f"Validation {report.metric}{_AT_RUNGS if several else ' while it was trained.'}", _rungs),
    ]
    drawn = [(caption, _draw(report, maker)) for caption, maker in makers]
    return [(caption, svg) for caption, svg in drawn if svg]


def arm_plots(report: Report) -> list[tuple[str, str]]:
    """(caption, SVG) of a comparison's quality against each cost that tells its arms apart."""
    found = []
    for cost in ("inference_memory_gib", "latency_ms", "train_seconds"):
        words = COSTS[cost][0]
        svg = _draw(report, partial(_pareto, cost=cost))
        if svg:
            found.append((f"{report.held_out} {report.metric} against {words}. The line joins what none beats.", svg))
    return found


def _pareto(axes: Axes, report: Report, cost: Cost) -> bool:
    choice = Choice("pareto", report.metric, report.goal, cost)
    arms = [arm for arm in report.arms or [] if arm.metrics.get(report.metric) is not None and arm.comparable]
    priced = [(arm, price) for arm in arms if (price := choice.price(arm)) is not None]
    if len({price for _, price in priced}) < 2:
        return False
    best = front(arms, choice)
    points = [(choice.price(arm) or 0.0, arm.metrics[report.metric] or 0.0) for arm in best]
    axes.plot(*zip(*points, strict=True), color=_GREY, linewidth=1.1, zorder=1)
    for arm, price in priced:
        chosen = arm.arm == report.recommendation.arm
        value, ends = arm.metrics[report.metric] or 0.0, arm.interval.get(report.metric)
        colour = _ACCENT if chosen else _DARK if arm in best else _GREY
        if ends:
            axes.plot([price, price], ends, color=colour, linewidth=0.8, alpha=0.6)
        axes.plot(price, value, marker="o", color=colour, markersize=7, linestyle="none", zorder=3)
    axes.margins(x=0.18)
    axes.set_xlabel(COSTS[cost][0])
    axes.set_ylabel(f"{report.held_out} {report.metric}")
    _write_beside(axes, _labels(priced, report))
    return True


def _write_beside(axes: Axes, labels: list[tuple[str, tuple[float, float], str]]) -> None:
    """Each name beside its point, where it lies on no other name."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # until then nothing has its place
    taken: list[Any] = []
    for names, at, colour in sorted(labels, key=lambda label: label[1]):
        text = axes.annotate(names, at, textcoords="offset points", xytext=_BESIDE[0], fontsize=9, color=colour)
        for beside in _BESIDE:
            text.xyann = beside
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


_BESIDE = ((7, 5), (7, -13), (7, 19), (7, -27), (7, 33), (7, -41))
"""Points to the right and up from a mark, the nearest first."""


def _labels(priced: list[tuple[Arm, float]], report: Report) -> list[tuple[str, tuple[float, float], str]]:
    """(names, place, colour): arms that lie on each other share a label."""
    values = [arm.metrics[report.metric] or 0.0 for arm, _ in priced]
    wide = (max(price for _, price in priced) - min(price for _, price in priced)) or 1.0
    high = (max(values) - min(values)) or 1.0
    found: list[tuple[list[str], tuple[float, float]]] = []
    for (arm, price), value in zip(priced, values, strict=True):
        near = [names for names, (x, y) in found if abs(x - price) < _NEAR * wide and abs(y - value) < _NEAR * high]
        if near:
            near[0].append(arm.arm)
        else:
            found.append(([arm.arm], (price, value)))
    chosen = report.recommendation.arm
    return [(", ".join(names), at, _ACCENT if chosen in names else _DARK) for names, at in found]


def _draw(report: Report, maker: Callable[[Any, Report], bool]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    settings = {
        "svg.hashsalt": "lorafleet",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "text.usetex": False,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
        try:
            if not maker(axes, report):
                return ""
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            return buffer.getvalue()
        finally:
            pyplot.close(figure)


def _loss_curves(axes: Axes, report: Report) -> bool:
    drawn = False
    for row in _recommended_last(report):
        points = [(p["samples"], p["train_loss"]) for p in row.curve if p.get("train_loss") is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", **_line(row, report))
            drawn = True
    axes.set_xlabel("training rows seen")
    axes.set_ylabel("training loss")
    _legend(axes, report)
    return drawn


def _rungs(axes: Axes, report: Report) -> bool:
    drawn = False
    for row in _recommended_last(report):
        points = [(p["samples"], p[report.metric]) for p in row.curve if p.get(report.metric) is not None]
        if points:
            line = _line(row, report)
            axes.plot(*zip(*points, strict=True), marker=".", **line)
            axes.plot(*points[-1], marker=_STATE_MARKS[row.state], color=line["color"], markersize=7, linestyle="none")
            drawn = drawn or len(points) > 1  # points alone say no more than the table
    axes.set_xlabel("training rows seen")
    axes.set_ylabel(f"validation {report.metric}")
    _legend(axes, report)
    return drawn


def _against_parameter(axes: Axes, report: Report) -> bool:
    """x is the searched number with the most different values; colour is the searched value with the next most."""
    import matplotlib

    scored = [row for row in report.trials if row.metrics.get(report.metric) is not None and not row.repeats]
    if report.folds:  # a point a fold
        scored = [row for row in scored if row.fold is not None]
    rows = [row.model_copy(update={"params": without_fold(row.params)}) for row in scored]
    if report.arms is not None:
        return False  # arms search different fields, or the same at different values
    values = {
        path: {row.params[path] for row in rows if path in row.params} for path in (rows[0].params if rows else ())
    }
    numbers = [path for path, found in values.items() if all(isinstance(v, int | float) for v in found)]
    if not numbers:
        return False
    across = max(numbers, key=lambda path: len(values[path]))
    others = sorted((path for path in values if path != across), key=lambda path: -len(values[path]))
    groups: list[Any] = sorted(values[others[0]], key=str) if others else [None]
    if groups != [None] and all(isinstance(value, int | float) for value in groups):
        groups = sorted(groups)
    colours = matplotlib.colormaps["viridis"].resampled(max(2, len(groups)))
    scores: dict[str, Any] = {row.trial_id: row.metrics[report.metric] for row in rows}
    for index, group in enumerate(groups):
        colour = colours(index / max(1, len(groups) - 1) * 0.85)
        label = f"{others[0].rpartition('.')[2]} {group}" if others else None
        for state, mark in _STATE_MARKS.items():
            chosen = [r for r in rows if r.state == state and (not others or r.params[others[0]] == group)]
            if chosen:
                axes.plot(
                    [r.params[across] for r in chosen],
                    [scores[r.trial_id] for r in chosen],
                    marker=mark,
                    linestyle="none",
                    color=colour,
                    markersize=7,
                    label=label,
                )
                label = None
    ends = [value for value in values[across] if value > 0]
    if ends and len(ends) == len(values[across]) and max(ends) / min(ends) >= 10:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # data may hold dollar signs: no TeX is parsed
    axes.set_xlabel(across)
    axes.set_ylabel(f"validation {report.metric}")
    if others:
        axes.legend(frameon=False)
    return True


def _recommended_last(report: Report) -> list[Row]:
    return sorted(report.trials, key=lambda row: row.trial_id == report.recommendation.trial_id)


def _line(row: Row, report: Report) -> dict[str, Any]:
    chosen = row.trial_id == report.recommendation.trial_id
    return {"color": _ACCENT if chosen else _GREY, "linewidth": 2.2 if chosen else 1.1, "zorder": 3 if chosen else 2}


def _legend(axes: Axes, report: Report) -> None:
    from matplotlib.lines import Line2D

    chosen = report.recommendation.trial_id
    if chosen is None or len(report.trials) == 1:
        return
    row = report.row(chosen)
    handles = [Line2D([], [], color=_ACCENT, linewidth=2.2), Line2D([], [], color=_GREY)]
    axes.legend(handles, [f"recommended: {short(row.params) or chosen}", "the other trials"], frameon=False)
