"""Draw the plots of a report as SVG.

Plots: loss curves, metric against each searched field, rungs, and quality against cost.
The same report gives the same bytes: no dates and no random ids are written. Texts stay
text (`svg.fonttype: none`), and no text of the data is parsed as a formula.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from lorafleet.evaluation.report.choose_arm import COSTS, Choice, find_pareto_front
from lorafleet.evaluation.report.format import format_short_params
from lorafleet.jobs.runs.report import Arm, Report, Row
from lorafleet.jobs.schema.comparison import Cost
from lorafleet.jobs.schema.search import SEED
from lorafleet.jobs.trials.sampling import remove_fold

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DEFAULT_COSTS: tuple[Cost, ...] = ("inference_memory_gib", "latency_ms", "train_seconds")
"""Costs that are always drawn, whatever cost the rule uses."""
_MAX_COLOURS = 8
"""Most values of a field that can be told apart by colour."""
_STATE_MARKS = {
    "finished": "o",
    "stopped": "x",
    "failed": "X",
    "running": ">",
    "pending": ".",
    "paused": ".",
}
_PALETTE = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#666666")
"""ColorBrewer's Dark2."""
_GREY = "#9aa3ad"
_ACCENT = "#c2410c"
_DARK = "#1c2430"
_NEAR = 0.04
"""Share of a plot's width and height within which two points look like one."""
_MAX_LINES = 100
"""Most trials whose curves are drawn, the best first. More lines would merge into one area."""
_MAX_MARKS = 400
"""Most points drawn as vector shapes. More are drawn as a picture, whose size is bounded."""
_AT_RUNGS = " at the rungs. A line that ends with a cross was stopped early."


def draw_plots(report: Report) -> list[tuple[str, str]]:
    """Draw every plot that the report has data for.

    Returns:
        (caption, SVG) of each plot. Plots with nothing to show are left out.
    """
    has_several, by_arm = len(report.trials) > 1, bool(_choose_arm_colours(report))
    grouping = "by arm" if by_arm else "by trial. The recommended trial is coloured"
    shown_report, omission = _select_best_trials(report)
    makers: list[tuple[str, Callable[[Axes, Report], bool]]] = [
        (
            f"Training loss{f' {grouping}' if has_several else ''}.{omission}",
            lambda axes, _: _draw_loss_curves(axes, shown_report),
        ),
        (
            "Validation "
            f"{report.metric}{_AT_RUNGS if has_several else ' while it was trained.'}{omission}",
            lambda axes, _: _draw_rungs(axes, shown_report),
        ),
    ]
    for path in _sort_by_value_count(_collect_values(_list_configurations(report))):
        caption = (
            f"Validation {report.metric} against {path}; crosses mark trials that were stopped "
            "early."
        )
        makers.append((caption, partial(_draw_against_field, across=path)))
    drawn = [(caption, _draw_figure(report, maker)) for caption, maker in makers]
    return [(caption, svg) for caption, svg in drawn if svg]


def _select_best_trials(report: Report) -> tuple[Report, str]:
    """Return the report with its best trials, and a sentence if some were left out.

    At most `_MAX_LINES` trials are kept, and the recommended trial in any case. A report of
    2,000 trials took 20 seconds and 4.7 MB with all curves.
    """
    if len(report.trials) <= _MAX_LINES:
        return report, ""
    chosen = [
        row for row in report.trials[_MAX_LINES:] if row.trial_id == report.recommendation.trial_id
    ]
    rows = [*report.trials[:_MAX_LINES], *chosen]
    return report.model_copy(
        update={"trials": rows}
    ), f" Only the best {len(rows)} of {len(report.trials):,} are drawn."


def draw_arm_plots(report: Report) -> list[tuple[str, str]]:
    """Draw a comparison's quality against each cost that tells its arms apart.

    Returns:
        (caption, SVG) of each plot, the cost of the rule first. Costs in which all arms are
            equal have no plot.
    """
    drawn = []
    rule_costs: list[Cost] = [cost for cost in get_args(Cost) if cost == report.recommendation.cost]
    for cost in dict.fromkeys([*rule_costs, *_DEFAULT_COSTS]):
        cost_text = COSTS[cost][0]
        svg = _draw_figure(report, partial(_draw_pareto, cost=cost))
        if svg:
            drawn.append(
                (
                    f"{report.held_out} {report.metric} against {cost_text}. The line connects the "
                    "arms that no other arm beats in both.",
                    svg,
                )
            )
    return drawn


def _draw_pareto(axes: Axes, report: Report, cost: Cost) -> bool:
    """Draw quality against one cost. Return False if the arms do not differ in the cost."""
    choice = Choice("pareto", report.metric, report.goal, cost)
    arms = [
        arm
        for arm in report.arms or []
        if arm.metrics.get(report.metric) is not None and arm.comparable
    ]
    priced = [(arm, price) for arm in arms if (price := choice.get_cost(arm)) is not None]
    if len({price for _, price in priced}) < 2:
        return False
    best = find_pareto_front(arms, choice)
    points = [(choice.get_cost(arm) or 0.0, arm.metrics[report.metric] or 0.0) for arm in best]
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
    _place_labels(axes, _build_labels(priced, report))
    return True


def _place_labels(axes: Axes, labels: list[tuple[str, tuple[float, float], str]]) -> None:
    """Write each label beside its point, without overlap with the other labels.

    Labels are placed from left to right. Each tries the offsets in order and keeps the last
    one if none is free.

    Args:
        axes: The plot, with all its points.
        labels: What `_build_labels` returned.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # positions are known only after the layout
    boxes: list[Any] = []
    for names, point, colour in sorted(labels, key=lambda label: label[1]):
        text = axes.annotate(
            names,
            point,
            textcoords="offset points",
            xytext=_LABEL_OFFSETS[0],
            fontsize=9,
            color=colour,
        )
        for offset in _LABEL_OFFSETS:
            text.xyann = offset
            box = text.get_window_extent()
            if not any(box.overlaps(other_box) for other_box in boxes):
                break
        boxes.append(box)


_LABEL_OFFSETS = ((7, 5), (7, -13), (7, 19), (7, -27), (7, 33), (7, -41))
"""Offsets of a label from its point (right, up) in points, the nearest first."""


def _build_labels(
    priced: list[tuple[Arm, float]], report: Report
) -> list[tuple[str, tuple[float, float], str]]:
    """Return (names, point, colour) of each label. Arms with nearly the same point share one."""
    values = [arm.metrics[report.metric] or 0.0 for arm, _ in priced]
    width = (max(price for _, price in priced) - min(price for _, price in priced)) or 1.0
    height = (max(values) - min(values)) or 1.0
    groups: list[tuple[list[str], tuple[float, float]]] = []
    for (arm, price), value in zip(priced, values, strict=True):
        matches = [
            names
            for names, (x, y) in groups
            if abs(x - price) < _NEAR * width and abs(y - value) < _NEAR * height
        ]
        if matches:
            matches[0].append(arm.arm)
        else:
            groups.append(([arm.arm], (price, value)))
    chosen = report.recommendation.arm
    return [
        (", ".join(names), point, _ACCENT if chosen in names else _DARK) for names, point in groups
    ]


def _draw_figure(report: Report, maker: Callable[[Any, Report], bool]) -> str:
    """Draw one figure and return it as SVG; empty if there is nothing to draw."""
    import matplotlib
    from matplotlib.figure import Figure  # importing pyplot would take half a second

    settings = {
        # Without a fixed salt, ids in the SVG are random and equal reports differ.
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


def _draw_loss_curves(axes: Axes, report: Report) -> bool:
    """Draw the training loss of each trial. Return False if no trial has one."""
    has_data, colours = False, _choose_arm_colours(report)
    for row in _sort_recommended_last(report):
        points = [
            (p["samples"], p["train_loss"]) for p in row.curve if p.get("train_loss") is not None
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), marker=".", **_get_line_style(row, report, colours)
            )
            has_data = True
    axes.set_xlabel("training rows seen")
    axes.set_ylabel("training loss")
    _draw_legend(axes, report, colours)
    return has_data


def _draw_rungs(axes: Axes, report: Report) -> bool:
    """Draw the validation metric of each trial. Return False if no trial has several points."""
    has_data, colours = False, _choose_arm_colours(report)
    for row in _sort_recommended_last(report):
        points = [
            (p["samples"], p[report.metric]) for p in row.curve if p.get(report.metric) is not None
        ]
        if points:
            line = _get_line_style(row, report, colours)
            axes.plot(*zip(*points, strict=True), marker=".", **line)
            axes.plot(
                *points[-1],
                marker=_STATE_MARKS[row.state],
                color=line["color"],
                markersize=7,
                linestyle="none",
            )
            has_data = has_data or len(points) > 1  # single points add nothing to the table
    axes.set_xlabel("training rows seen")
    axes.set_ylabel(f"validation {report.metric}")
    _draw_legend(axes, report, colours)
    return has_data


def _list_configurations(report: Report) -> list[Row]:
    """Return the scored trials of a search; with cross-validation, those of the folds."""
    scored = [
        row
        for row in report.trials
        if row.metrics.get(report.metric) is not None and not row.repeats
    ]
    if report.folds:
        scored = [row for row in scored if row.fold is not None]
    return [row.model_copy(update={"params": remove_fold(row.params)}) for row in scored]


def _collect_values(rows: list[Row]) -> dict[str, list[Any]]:
    """Return searched field -> its different values, in order.

    The seed and fields with a single value are left out.
    """
    values_by_path: dict[str, set[Any]] = {}
    for row in rows:
        for path, value in row.params.items():
            if path != SEED and isinstance(value, str | int | float):
                values_by_path.setdefault(path, set()).add(value)
    numbers = {
        path: all(isinstance(value, int | float) for value in values)
        for path, values in values_by_path.items()
    }
    return {
        path: sorted(values) if numbers[path] else sorted(values, key=str)
        for path, values in values_by_path.items()
        if len(values) > 1
    }


def _sort_by_value_count(values: dict[str, list[Any]]) -> list[str]:
    """Return the fields, those with the most values first."""
    return sorted(values, key=lambda path: -len(values[path]))


@dataclass(frozen=True)
class _Colouring:
    """The colours of the points of one plot."""

    colours: dict[Any, Any]
    """Key -> colour. None is the key of points without a value."""
    key: Callable[[Row], Any]
    name: str = ""
    """Text before a key in the legend."""


def _choose_colouring(report: Report, values: dict[str, list[Any]], across: str) -> _Colouring:
    """Choose what to colour the points by.

    Points are coloured by arm. Without arms, they are coloured by the other searched field
    with the most values that can be told apart.

    Args:
        report: The report.
        values: Searched field -> its values.
        across: Field on the x axis, which needs no colour.
    """
    import matplotlib

    arms = _choose_arm_colours(report)
    if arms:
        return _Colouring(dict(arms), lambda row: row.arm)
    others = [
        path
        for path in _sort_by_value_count(values)
        if path != across and len(values[path]) <= _MAX_COLOURS
    ]
    if not others:
        return _Colouring({None: _DARK}, lambda _: None)
    shades, last = matplotlib.colormaps["viridis"], len(values[others[0]]) - 1
    by_value = {value: shades(index / last * 0.85) for index, value in enumerate(values[others[0]])}
    name = f"{others[0].rpartition('.')[2]} "
    return _Colouring({None: _GREY} | by_value, lambda row: row.params.get(others[0]), name)


def _draw_against_field(axes: Axes, report: Report, across: str) -> bool:
    """Draw the metric against the searched field `across` (x axis)."""
    tried = _list_configurations(report)
    values = _collect_values(tried)
    rows, x_values = [row for row in tried if across in row.params], values[across]
    is_numeric = all(isinstance(value, int | float) for value in x_values)
    colouring = _choose_colouring(report, values, across)
    labelled_keys: set[Any] = set()
    for key, state in itertools.product(colouring.colours, _STATE_MARKS):
        chosen = [row for row in rows if row.state == state and colouring.key(row) == key]
        if not chosen:
            continue
        axes.plot(
            [
                row.params[across] if is_numeric else x_values.index(row.params[across])
                for row in chosen
            ],
            [row.metrics[report.metric] or 0.0 for row in chosen],
            marker=_STATE_MARKS[state],
            linestyle="none",
            color=colouring.colours[key],
            markersize=7 if len(rows) <= _MAX_MARKS else 4,
            rasterized=len(rows) > _MAX_MARKS,
            label=None if key is None or key in labelled_keys else f"{colouring.name}{key}",
        )
        labelled_keys |= {key} - {None}
    if not is_numeric:
        axes.set_xticks(range(len(x_values)), [str(value) for value in x_values])
        axes.margins(x=0.2)
    # Learning rates are searched over powers of ten; a linear axis would press most into a corner.
    elif x_values[0] > 0 and x_values[-1] / x_values[0] >= _MIN_LOG_RATIO:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(
            lambda value, _: f"{value:g}"
        )  # data may contain dollar signs, so no TeX is parsed
    axes.set_xlabel(across)
    axes.set_ylabel(f"validation {report.metric}")
    if labelled_keys and len(rows) <= _MAX_MARKS:
        axes.legend(frameon=False)
    elif labelled_keys:
        _draw_legend_above(axes, *axes.get_legend_handles_labels())
    return True


_MIN_LOG_RATIO = 10
"""Smallest ratio of largest to smallest value for a logarithmic axis."""


def _choose_arm_colours(report: Report) -> dict[str, str]:
    """Return arm -> colour, for arms with trials; empty for a single arm or too many arms."""
    names = list(dict.fromkeys(row.arm for row in report.trials if row.arm is not None))
    return dict(zip(names, _PALETTE, strict=False)) if 1 < len(names) <= len(_PALETTE) else {}


def _sort_recommended_last(report: Report) -> list[Row]:
    """Return the trials, the recommended one last: it is drawn on top."""
    return sorted(report.trials, key=lambda row: row.trial_id == report.recommendation.trial_id)


def _get_line_style(row: Row, report: Report, colours: dict[str, str]) -> dict[str, Any]:
    chosen = row.trial_id == report.recommendation.trial_id
    colour = colours.get(row.arm or "", _ACCENT if chosen else _GREY)
    return {"color": colour, "linewidth": 2.2 if chosen else 1.1, "zorder": 3 if chosen else 2}


def _draw_legend_above(axes: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Draw the legend above a crowded plot.

    Inside the plot, matplotlib would search long for free space.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(handles, labels, frameon=False, loc="outside upper left", ncols=4)


def _draw_legend(axes: Axes, report: Report, colours: dict[str, str]) -> None:
    """Draw the legend: the arms, or the recommended trial and the others."""
    from matplotlib.lines import Line2D

    chosen = report.recommendation.trial_id
    if colours:
        handles = [Line2D([], [], color=colour) for colour in colours.values()]
        axes.legend(handles, list(colours), frameon=False)
        return
    if chosen is None or len(report.trials) == 1:
        return
    row = report.get_row(chosen)
    handles = [Line2D([], [], color=_ACCENT, linewidth=2.2), Line2D([], [], color=_GREY)]
    labels = [f"recommended: {format_short_params(row.params) or chosen}", "the other trials"]
    if len(report.trials) < _MAX_LINES:
        axes.legend(handles, labels, frameon=False)
    else:
        _draw_legend_above(axes, handles, labels)
