"""Render a report for the terminal and as Markdown, HTML and CSV.

All formats draw the same `Report`, with the tables of `trial_table.py` and
`arm_table.py`. Texts of data, models and other people's runs are shown literally in
each of them: as rich `Text` in the terminal, escaped in Markdown and HTML, and not as
formulas in CSV.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorafleet.evaluation.render.arm_table import (
    build_arm_columns,
    build_batches_table,
    build_pair_matrix,
    build_pairs_table,
    build_terminal_arm_columns,
    list_arm_records,
    list_batch_records,
)
from lorafleet.evaluation.render.trial_table import (
    Cell,
    build_columns,
    build_folds_table,
    build_headline,
    build_ratings_table,
    build_terminal_columns,
    format_class_cells,
    format_with_interval,
    list_notes,
    list_searched_fields,
)
from lorafleet.evaluation.report.format import (
    BENCHMARK,
    escape_markdown,
    format_duration,
    format_number,
    list_shown_metrics,
)
from lorafleet.jobs.runs.report import Arm, Report, Row

if TYPE_CHECKING:
    from rich.console import RenderableType


def render_terminal(report: Report, width: int) -> RenderableType:
    """Return a rich table of at most `width` characters, with the recommendation below it.

    Texts of data and names are shown literally and never read as markup.

    Args:
        report: The report.
        width: Characters of a line. If they are too few, the columns that matter least for
            the choice are left out; no number is cut.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if report.arms is not None:
        return _render_terminal_arms(report, width)
    table = Table(header_style="bold", box=None, pad_edge=False)
    shown = _select_fitting_columns(report, width)
    for heading, _ in shown:
        table.add_column(
            Text(heading),
            justify="left" if heading in ("trial", "state") else "right",
            no_wrap=True,
        )
    for row in report.table_rows:
        table.add_row(*(Text(cell(row)) for _, cell in shown), style=_get_style(row, report))
    parts: list[RenderableType] = [Text(build_headline(report)), Text(""), table, Text("")]
    parts += [Text(f"! {caution}", style="yellow") for caution in report.cautions]
    parts.append(Text(report.recommendation.sentence, style="bold"))
    parts += _render_terminal_table(*build_folds_table(report)) + _render_terminal_table(
        *build_ratings_table(report)
    )
    parts += [Text(f"- {note}", style="dim") for note in list_notes(report)]
    if len(shown) < len(build_terminal_columns(report)):
        parts.append(
            Text("- more columns: report.html, report.csv, or a wider terminal", style="dim")
        )
    return Group(*parts)


def _render_terminal_table(headings: list[str], rows: list[list[str]]) -> list[RenderableType]:
    """Return a table between two empty lines; an empty list without rows."""
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return []
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(Text(heading), justify="left" if heading == headings[0] else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return [Text(""), table, Text("")]


def _render_terminal_arms(report: Report, width: int) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    arms, shown = report.table_arms, build_terminal_arm_columns(report)
    column_count = len(shown)
    for dropped in (*_DROPPED_ARM_COLUMNS, *reversed(list_shown_metrics(report))):
        if (
            sum(2 + max(len(heading), *(len(cell(arm)) for arm in arms)) for heading, cell in shown)
            <= width
        ):
            break
        shown = [(heading, cell) for heading, cell in shown if heading != dropped]
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading, _ in shown:
        table.add_column(
            Text(heading), justify="left" if heading == "arm" else "right", no_wrap=True
        )
    for arm in arms:
        style = (
            "bold green"
            if arm.arm == report.recommendation.arm
            else ""
            if arm.comparable
            else "dim"
        )
        table.add_row(*(Text(cell(arm)) for _, cell in shown), style=style)
    parts: list[RenderableType] = [Text(build_headline(report)), Text(""), table, Text("")]
    parts += [Text(f"! {caution}", style="yellow") for caution in report.cautions]
    parts.append(Text(report.recommendation.sentence, style="bold"))
    parts.append(Text(f"Rule: {report.recommendation.rule}.", style="dim"))
    for table_data in (
        build_pairs_table(report, all_pairs=False),
        build_batches_table(report),
        build_ratings_table(report),
    ):
        parts += _render_terminal_table(*table_data)
    parts += [Text(f"- {note}", style="dim") for note in list_notes(report)]
    if len(shown) < column_count:
        parts.append(
            Text("- more columns: report.html, arms.csv, or a wider terminal", style="dim")
        )
    return Group(*parts)


# Columns that a narrow terminal leaves out, the first one first. Name, metric and p-value stay.
_DROPPED_ARM_COLUMNS = (
    "parameters",
    "train GiB",
    "samples/s",
    "row ms",
    "first ms",
    "tokens/s",
    "infer GiB",
    "train",
)
_DROPPED_COLUMNS = ("peak GiB", "tokens/s", "train time", "rung", "parameters", "state")


def _select_fitting_columns(report: Report, width: int) -> list[tuple[str, Cell]]:
    """Return the columns that fit the width. The least important columns are left out first."""
    shown = build_terminal_columns(report)
    further = [
        heading for heading, _ in shown if heading.rpartition(" ")[2] in list_shown_metrics(report)
    ]
    for dropped in (*_DROPPED_COLUMNS, *reversed(further)):
        if _compute_table_width(report, shown) <= width:
            break
        shown = [(heading, cell) for heading, cell in shown if heading != dropped]
    return shown


def _compute_table_width(report: Report, shown: list[tuple[str, Cell]]) -> int:
    return sum(
        2 + max(len(heading), *(len(cell(row)) for row in report.table_rows))
        for heading, cell in shown
    )


def _get_style(row: Row, report: Report) -> str:
    if row.trial_id == report.recommendation.trial_id:
        return "bold green"
    return "red" if row.failure else "dim" if row.state in ("stopped", "paused", "pending") else ""


def render_trial(report: Report, row: Row) -> RenderableType:
    """Render the details of one trial, or of the base, for a terminal.

    Args:
        report: The report of the run.
        row: The trial: its values, costs, metrics, classes and curve are shown.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        Text(f"{row.trial_id} of {report.run}: {row.state}", style="bold")
    ]
    details = {
        "values": ", ".join(f"{path}={value}" for path, value in row.params.items()),
        "trained": f"{row.step:,} steps, {row.samples:,} rows, {format_duration(row.train_seconds)}"
        if row.step
        else "",
        "evaluated": f"{row.eval_samples_per_second:,.0f} rows per second"
        if row.eval_samples_per_second
        else "",
        "parameters": f"{row.trainable_parameters:,} trained" if row.trainable_parameters else "",
        "formats": row.number_formats or "",
        "memory": f"at most {format_number(row.peak_memory_gib, 2)} GiB"
        if row.peak_memory_gib
        else "",
        "reason": row.reason or "",
        "failure": f"{row.failure.failure_class}: {row.failure.sentence}" if row.failure else "",
    }
    parts += [Text(f"{name:<11} {value}") for name, value in details.items() if value]
    names = [
        name for name in report.metrics if name in row.metrics or name in (row.test_metrics or {})
    ]
    headings = ["metric", "validation", report.held_out]
    tested = row.test_metrics or {}
    measured = [
        [
            name,
            format_with_interval(row.metrics, row.intervals, name),
            format_with_interval(tested, row.test_intervals, name),
        ]
        for name in names
    ]
    parts += _render_terminal_table(headings, measured)
    if row.per_class:
        lines = [[label, *format_class_cells(values)] for label, values in row.per_class.items()]
        parts += _render_terminal_table(["class", "precision", "recall", "F1", "rows"], lines)
    curve_names = [
        name
        for name in ("step", "samples", "train_loss", *report.metrics)
        if any(name in point for point in row.curve)
    ]
    points = [
        [
            format_number(point.get(name), 0 if name in ("step", "samples") else 3)
            for name in curve_names
        ]
        for point in row.curve
    ]
    parts += _render_terminal_table(curve_names, points) if curve_names else []
    return Group(*parts)


def render_markdown(report: Report) -> str:
    """Return the report as GitHub Markdown."""
    shown = build_columns(report)
    lines = [
        f"# {escape_markdown(report.run)}",
        "",
        escape_markdown(build_headline(report)),
        "",
        *(f"- **Caution:** {escape_markdown(caution)}" for caution in report.cautions),
        *([""] if report.cautions else []),
        f"**{escape_markdown(report.recommendation.sentence)}**",
    ]
    lines += ["", f"Rule: {escape_markdown(report.recommendation.rule)}.", ""]
    if report.arms is not None:
        columns_of_arms = build_arm_columns(report)
        lines += [
            "| " + " | ".join(escape_markdown(heading) for heading, _ in columns_of_arms) + " |"
        ]
        lines += ["|" + "---|" * len(columns_of_arms)]
        lines += [
            "| " + " | ".join(map(escape_markdown, cells)) + " |"
            for _, cells in _build_arm_rows(report)
        ]
    if report.arms is not None and report.table_rows:
        lines += ["", "## Every configuration", ""]
    if report.table_rows:
        lines += [
            "| " + " | ".join(escape_markdown(heading) for heading, _ in shown) + " |",
            "|" + "---|" * len(shown),
        ]
        lines += [
            "| " + " | ".join(escape_markdown(cell(row)) for _, cell in shown) + " |"
            for row in report.table_rows
        ]
    tables = (
        build_pairs_table(report, all_pairs=True),
        build_batches_table(report),
        build_folds_table(report),
        build_ratings_table(report),
    )
    for headings, rows in tables:
        if rows:
            lines += [
                "",
                "| " + " | ".join(map(escape_markdown, headings)) + " |",
                "|" + "---|" * len(headings),
            ]
            lines += ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows]
    lines += ["", *(f"- {escape_markdown(note)}" for note in list_notes(report)), ""]
    return "\n".join(lines)


def render_arms_csv(report: Report) -> str:
    """Return one line per arm with full precision, one column per number."""
    return _render_csv(*list_arm_records(report))


def render_batches_csv(report: Report) -> str:
    """Return one line per arm and batch size."""
    return _render_csv(*list_batch_records(report))


def _render_csv(headings: list[str], rows: list[list[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([_format_csv_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def render_table_csv(report: Report, rows: Sequence[Row] | None = None) -> str:
    """Return the table of trials as CSV, one line per row with full precision.

    Args:
        report: The report.
        rows: Rows to write. None writes all rows of the table: base, baselines and trials.
    """
    parameters = list_searched_fields(report)
    names = report.metrics
    field_names = (
        "step",
        "samples",
        "train_seconds",
        "eval_seconds",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "seconds_per_answer",
        "samples_per_second",
        "tokens_per_second",
        "peak_memory_gib",
        "gpu_hours",
        "trainable_parameters",
    )
    arm = ["arm"] if report.arms is not None else []
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "trial_id",
            *arm,
            "state",
            "rung",
            "recommended",
            *parameters,
            *names,
            *(f"{report.held_out}_{name}" for name in names),
            *field_names,
            "failure",
        ]
    )
    for row in report.table_rows if rows is None else rows:
        values: list[object] = [row.trial_id, *([row.arm] if arm else []), row.state, row.rung]
        values += [row.trial_id == report.recommendation.trial_id]
        values += [row.params.get(path) for path in parameters]
        values += [row.metrics.get(name) for name in names]
        values += [(row.test_metrics or {}).get(name) for name in names]
        values += [getattr(row, name) for name in field_names]
        writer.writerow(
            [
                _format_csv_cell(value)
                for value in [*values, row.failure.sentence if row.failure else None]
            ]
        )
    return buffer.getvalue()


def _format_csv_cell(value: object) -> object:
    """Return a value for CSV; None becomes empty.

    A text that a spreadsheet would run as a formula gets a leading apostrophe. Numbers are
    left as they are, negative ones included.
    """
    if value is None:
        return ""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t"):
        return f"'{value}"
    return value


def render_html(report: Report) -> str:
    """Return the report as one self-contained HTML page.

    It has no script and sends no request, so it can be mailed or opened from a run of
    somebody else. All texts are escaped; plots are embedded images.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from lorafleet.evaluation.render.plots import draw_arm_plots, draw_plots

    environment = Environment(
        loader=PackageLoader("lorafleet.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Jinja has no such filter, and the template walks headings and cells together.
    environment.filters["zip"] = zip
    shown = build_columns(report)
    chosen = report.recommendation.trial_id
    table = [(row, [cell(row) for _, cell in shown]) for row in report.table_rows]
    chosen_last = [pair for pair in table[_MAX_VISIBLE_ROWS:] if pair[0].trial_id == chosen]
    # The recommended trial must be visible without unfolding the further rows.
    if chosen_last:
        table = [
            *table[: _MAX_VISIBLE_ROWS - 1],
            *chosen_last,
            *(pair for pair in table[_MAX_VISIBLE_ROWS - 1 :] if pair not in chosen_last),
        ]
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=build_headline(report),
        headings=[heading for heading, _ in shown],
        rows=table[:_MAX_VISIBLE_ROWS],
        folded=table[_MAX_VISIBLE_ROWS:],
        images=_encode_images(draw_plots(report)),
        arm_images=_encode_images(draw_arm_plots(report)),
        notes=list_notes(report),
        facts=_build_metadata(report),
        tiles=_build_arm_tiles(report)
        if report.arms is not None
        else _build_tiles(report, report.get_row(chosen))
        if chosen
        else [],
        arm_headings=[heading for heading, _ in build_arm_columns(report)],
        arms=_build_arm_rows(report),
        pairs=build_pair_matrix(report),
        ratings=build_ratings_table(report),
        folds=build_folds_table(report),
        batches=build_batches_table(report),
        number=format_number,
        class_cells=format_class_cells,
    )


_MAX_VISIBLE_ROWS = 100
"""Rows of the table that are visible at once. The other rows are folded."""


def _encode_images(images: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the images with their SVG encoded as Base64."""
    return [(caption, base64.b64encode(svg.encode()).decode()) for caption, svg in images]


def _build_arm_rows(report: Report) -> list[tuple[Arm, list[str]]]:
    """Return (arm, cells) of each row of a comparison's table."""
    if report.arms is None:
        return []
    columns_of_arms = build_arm_columns(report)
    return [(arm, [cell(arm) for _, cell in columns_of_arms]) for arm in report.table_arms]


def _build_arm_tiles(report: Report) -> list[tuple[str, str]]:
    """Return the most important numbers of the recommended arm as (label, text)."""
    arm = next((arm for arm in report.arms or [] if arm.arm == report.recommendation.arm), None)
    if arm is None:
        return []
    tiles = [
        ("arm", arm.arm),
        (f"{report.held_out} {report.metric}", format_number(arm.metrics.get(report.metric))),
    ]
    base = report.base.test_metrics
    if base and report.state != BENCHMARK:  # a benchmark measures the base on other rows
        tiles.append((f"untuned base, {report.metric}", format_number(base.get(report.metric))))
    if arm.train_seconds:
        tiles.append(("one training", format_duration(arm.train_seconds)))
    if arm.inference and arm.inference.peak_memory_gib:
        tiles.append(
            ("memory at inference", f"{format_number(arm.inference.peak_memory_gib, 2)} GiB")
        )
    return tiles


def _build_tiles(report: Report, row: Row) -> list[tuple[str, str]]:
    """Return the most important numbers of the recommended trial as (label, text)."""
    base = report.base.test_metrics or report.base.metrics
    held_out = row.test_metrics or {}
    tiles = [(f"validation {report.metric}", format_number(row.metrics.get(report.metric)))]
    if held_out:
        tiles.append(
            (f"{report.held_out} {report.metric}", format_number(held_out.get(report.metric)))
        )
    if base:
        tiles.append((f"untuned base, {report.metric}", format_number(base.get(report.metric))))
    size = f"{row.trainable_parameters:,}" if row.trainable_parameters else "-"
    return [*tiles, ("trained parameters", size)]


def _build_metadata(report: Report) -> list[tuple[str, str]]:
    """Return the metadata of a report as (label, text)."""
    metadata = [("base model", report.model), ("data", report.data)]
    if len(report.rungs) > 1:
        metadata.append(
            ("rungs", f"{'; '.join(f'{level:,}' for level in report.rungs)} {report.time_attr}")
        )
    metadata += [
        (f"SHA-256 of {split}", digest)
        for split, digest in report.facts.get("data_sha256", {}).items()
    ]
    metadata += [
        (f"revision of {name}", revision)
        for name, revision in report.facts.get("model_revisions", {}).items()
    ]
    metadata += [
        (f"BERTScore with {name}", description)
        for name, description in report.facts.get("bertscore", {}).items()
    ]
    if report.facts.get("labels"):
        metadata.append(("labels", ", ".join(map(str, report.facts["labels"]))))
    metadata.append(
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items()))
    )
    return metadata
