"""The report's plots, as SVG: loss curves, metric against each searched field, the rungs, and quality against cost."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from lorafleet.evaluation.render.trial_table import short
from lorafleet.evaluation.report.choose_arm import COSTS, Choice, front
from lorafleet.jobs.runs.report import Arm, Report, Row
from lorafleet.jobs.schema.comparison import Cost
from lorafleet.jobs.schema.search import SEED
from lorafleet.jobs.trials.sampling import without_fold

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_USUAL: tuple[Cost, ...] = ("inference_memory_gib", "latency_ms", "train_seconds")
"""Costs that are drawn whatever the rule weighs."""
_MOST_COLOURS = 8
"""More values than these are not told apart by colour."""
_STATE_MARKS = {"finished": "o", "stopped": "x", "failed": "X", "running": ">", "pending": "."}
_PALETTE = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#666666")
"""ColorBrewer's Dark2."""
_GREY = "#9aa3ad"
_ACCENT = "#c2410c"
_DARK = "#1c2430"
_NEAR = 0.04
"""Share of a plot's width and height within which two points are one to the eye."""
_MOST_LINES = 100
"""Trials whose curves are drawn, the best first: more lines than these are one grey area."""
_MOST_MARKS = 400
"""Points that are drawn as shapes; more of them as a picture, which has a bounded size."""
_AT_RUNGS = " at the rungs. A line that ends at a cross was cut there."


def plots(report: Report) -> list[tuple[str, str]]:
    """(caption, SVG) of each plot that the report has data for."""
    several, by_arm = len(report.trials) > 1, bool(_arm_colours(report))
    whose = "by arm" if by_arm else "by trial. The recommended trial is drawn in colour"
    few, which = _best(report)
    makers: list[tuple[str, Callable[[Axes, Report], bool]]] = [
        (f"Training loss{f' {whose}' if several else ''}.{which}", lambda axes, _: _loss_curves(axes, few)),
        (
            f"Validation {report.metric}{_AT_RUNGS if several else ' while it was trained.'}{which}",
            lambda axes, _: _rungs(axes, few),
        ),
    ]
    for path in _by_most_values(_values(_configurations(report))):
        caption = f"Validation {report.metric} against {path}; crosses were cut early."
        makers.append((caption, partial(_against_parameter, across=path)))
    drawn = [(caption, _draw(report, maker)) for caption, maker in makers]
    return [(caption, svg) for caption, svg in drawn if svg]


def _best(report: Report) -> tuple[Report, str]:
    """Return the report with as many trials as curves can be told apart of, and a sentence where some are left out."""
    if len(report.trials) <= _MOST_LINES:
        return report, ""
    chosen = [row for row in report.trials[_MOST_LINES:] if row.trial_id == report.recommendation.trial_id]
    rows = [*report.trials[:_MOST_LINES], *chosen]
    return report.model_copy(update={"trials": rows}), f" The best {len(rows)} of {len(report.trials):,} are drawn."


def arm_plots(report: Report) -> list[tuple[str, str]]:
    """(caption, SVG) of a comparison's quality against each cost that tells its arms apart."""
    found = []
    asked: list[Cost] = [cost for cost in get_args(Cost) if cost == report.recommendation.cost]
    for cost in dict.fromkeys([*asked, *_USUAL]):
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
    from matplotlib.figure import Figure  # without pyplot, which takes half a second

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
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        if not maker(figure.subplots(), report):
            return ""
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()


def _loss_curves(axes: Axes, report: Report) -> bool:
    drawn, colours = False, _arm_colours(report)
    for row in _recommended_last(report):
        points = [(p["samples"], p["train_loss"]) for p in row.curve if p.get("train_loss") is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", **_line(row, report, colours))
            drawn = True
    axes.set_xlabel("training rows seen")
    axes.set_ylabel("training loss")
    _legend(axes, report, colours)
    return drawn


def _rungs(axes: Axes, report: Report) -> bool:
    drawn, colours = False, _arm_colours(report)
    for row in _recommended_last(report):
        points = [(p["samples"], p[report.metric]) for p in row.curve if p.get(report.metric) is not None]
        if points:
            line = _line(row, report, colours)
            axes.plot(*zip(*points, strict=True), marker=".", **line)
            axes.plot(*points[-1], marker=_STATE_MARKS[row.state], color=line["color"], markersize=7, linestyle="none")
            drawn = drawn or len(points) > 1  # points alone say no more than the table
    axes.set_xlabel("training rows seen")
    axes.set_ylabel(f"validation {report.metric}")
    _legend(axes, report, colours)
    return drawn


def _configurations(report: Report) -> list[Row]:
    """The trials that a search tried and that have a score: a point each, a point a fold of a cross-validation."""
    scored = [row for row in report.trials if row.metrics.get(report.metric) is not None and not row.repeats]
    if report.folds:
        scored = [row for row in scored if row.fold is not None]
    return [row.model_copy(update={"params": without_fold(row.params)}) for row in scored]


def _values(rows: list[Row]) -> dict[str, list[Any]]:
    """Searched field -> its different values, in order; a seed is none, nor what has one value alone."""
    found: dict[str, set[Any]] = {}
    for row in rows:
        for path, value in row.params.items():
            if path != SEED and isinstance(value, str | int | float):
                found.setdefault(path, set()).add(value)
    numbers = {path: all(isinstance(value, int | float) for value in values) for path, values in found.items()}
    return {
        path: sorted(values) if numbers[path] else sorted(values, key=str)
        for path, values in found.items()
        if len(values) > 1
    }


def _by_most_values(values: dict[str, list[Any]]) -> list[str]:
    return sorted(values, key=lambda path: -len(values[path]))


@dataclass(frozen=True)
class _Colouring:
    """What the points of one plot are coloured by."""

    colours: dict[Any, Any]
    """Key -> colour; None is the key of points that have none."""
    key: Callable[[Row], Any]
    name: str = ""
    """What stands before a key in the legend."""


def _colouring(report: Report, values: dict[str, list[Any]], across: str) -> _Colouring:
    """By arm; else by the other searched field with the most values that can be told apart."""
    import matplotlib

    arms = _arm_colours(report)
    if arms:
        return _Colouring(dict(arms), lambda row: row.arm)
    others = [path for path in _by_most_values(values) if path != across and len(values[path]) <= _MOST_COLOURS]
    if not others:
        return _Colouring({None: _DARK}, lambda _: None)
    shades, last = matplotlib.colormaps["viridis"], len(values[others[0]]) - 1
    by_value = {value: shades(place / last * 0.85) for place, value in enumerate(values[others[0]])}
    name = f"{others[0].rpartition('.')[2]} "
    return _Colouring({None: _GREY} | by_value, lambda row: row.params.get(others[0]), name)


def _against_parameter(axes: Axes, report: Report, across: str) -> bool:
    """x is one searched field."""
    tried = _configurations(report)
    values = _values(tried)
    rows, along = [row for row in tried if across in row.params], values[across]
    numbers = all(isinstance(value, int | float) for value in along)
    coloured = _colouring(report, values, across)
    named: set[Any] = set()
    for key, state in itertools.product(coloured.colours, _STATE_MARKS):
        chosen = [row for row in rows if row.state == state and coloured.key(row) == key]
        if not chosen:
            continue
        axes.plot(
            [row.params[across] if numbers else along.index(row.params[across]) for row in chosen],
            [row.metrics[report.metric] or 0.0 for row in chosen],
            marker=_STATE_MARKS[state],
            linestyle="none",
            color=coloured.colours[key],
            markersize=7 if len(rows) <= _MOST_MARKS else 4,
            rasterized=len(rows) > _MOST_MARKS,
            label=None if key is None or key in named else f"{coloured.name}{key}",
        )
        named |= {key} - {None}
    if not numbers:
        axes.set_xticks(range(len(along)), [str(value) for value in along])
        axes.margins(x=0.2)
    elif along[0] > 0 and along[-1] / along[0] >= _MANY_TIMES:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # data may hold dollar signs: no TeX is parsed
    axes.set_xlabel(across)
    axes.set_ylabel(f"validation {report.metric}")
    if named and len(rows) <= _MOST_MARKS:
        axes.legend(frameon=False)
    elif named:
        _legend_above(axes, *axes.get_legend_handles_labels())
    return True


_MANY_TIMES = 10
"""Where the largest is so many times the smallest, values are drawn by their logarithms."""


def _arm_colours(report: Report) -> dict[str, str]:
    """Arm that trained something -> its colour; empty where only one did, or where there are too many."""
    names = list(dict.fromkeys(row.arm for row in report.trials if row.arm is not None))
    return dict(zip(names, _PALETTE, strict=False)) if 1 < len(names) <= len(_PALETTE) else {}


def _recommended_last(report: Report) -> list[Row]:
    return sorted(report.trials, key=lambda row: row.trial_id == report.recommendation.trial_id)


def _line(row: Row, report: Report, colours: dict[str, str]) -> dict[str, Any]:
    chosen = row.trial_id == report.recommendation.trial_id
    colour = colours.get(row.arm or "", _ACCENT if chosen else _GREY)
    return {"color": colour, "linewidth": 2.2 if chosen else 1.1, "zorder": 3 if chosen else 2}


def _legend_above(axes: Axes, handles: Sequence[Any], words: Sequence[str]) -> None:
    """Draw the legend above a crowded plot, where matplotlib would search long for a free place inside."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(handles, words, frameon=False, loc="outside upper left", ncols=4)


def _legend(axes: Axes, report: Report, colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    chosen = report.recommendation.trial_id
    if colours:
        handles = [Line2D([], [], color=colour) for colour in colours.values()]
        axes.legend(handles, list(colours), frameon=False)
        return
    if chosen is None or len(report.trials) == 1:
        return
    row = report.row(chosen)
    handles = [Line2D([], [], color=_ACCENT, linewidth=2.2), Line2D([], [], color=_GREY)]
    words = [f"recommended: {short(row.params) or chosen}", "the other trials"]
    if len(report.trials) < _MOST_LINES:
        axes.legend(handles, words, frameon=False)
    else:
        _legend_above(axes, handles, words)
