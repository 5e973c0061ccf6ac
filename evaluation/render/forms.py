"""Report -> terminal, Markdown, HTML and CSV. Every form draws the same object."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorafleet.evaluation.render.arm_table import (
    arm_columns,
    arm_records,
    batch_records,
    batches_table,
    pair_cells,
    pairs_table,
    terminal_arm_columns,
)
from lorafleet.evaluation.render.trial_table import (
    BENCHMARK,
    Cell,
    class_cells,
    columns,
    duration,
    folds_table,
    headline,
    notes,
    number,
    parameter_columns,
    plain,
    ratings_table,
    shown_metrics,
    terminal_columns,
    with_interval,
)
from lorafleet.jobs.runs.report import Arm, Report, Row

if TYPE_CHECKING:
    from rich.console import RenderableType


def terminal(report: Report, width: int) -> RenderableType:
    """A rich table of at most `width` characters, with the recommendation under it.

    Data and names are shown as they are, never read as markup. Where the width is short, the columns that say least
    about the choice are left out whole: no number is cut.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if report.arms is not None:
        return _terminal_arms(report, width)
    table = Table(header_style="bold", box=None, pad_edge=False)
    shown = _fitting(report, width)
    for heading, _ in shown:
        table.add_column(Text(heading), justify="left" if heading in ("trial", "state") else "right", no_wrap=True)
    for row in report.shown:
        table.add_row(*(Text(cell(row)) for _, cell in shown), style=_style(row, report))
    parts: list[RenderableType] = [Text(headline(report)), Text(""), table, Text("")]
    parts += [Text(f"! {caution}", style="yellow") for caution in report.cautions]
    parts.append(Text(report.recommendation.sentence, style="bold"))
    parts += _terminal_table(*folds_table(report)) + _terminal_table(*ratings_table(report))
    parts += [Text(f"- {note}", style="dim") for note in notes(report)]
    if len(shown) < len(terminal_columns(report)):
        parts.append(Text("- more columns: report.html, report.csv, or a wider terminal", style="dim"))
    return Group(*parts)


def _terminal_table(headings: list[str], rows: list[list[str]]) -> list[RenderableType]:
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


def _terminal_arms(report: Report, width: int) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    arms, shown = report.shown_arms, terminal_arm_columns(report)
    whole = len(shown)
    for dropped in (*_ARMS_LEAST_FIRST, *reversed(shown_metrics(report))):
        if sum(2 + max(len(heading), *(len(cell(arm)) for arm in arms)) for heading, cell in shown) <= width:
            break
        shown = [(heading, cell) for heading, cell in shown if heading != dropped]
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading, _ in shown:
        table.add_column(Text(heading), justify="left" if heading == "arm" else "right", no_wrap=True)
    for arm in arms:
        style = "bold green" if arm.arm == report.recommendation.arm else "" if arm.comparable else "dim"
        table.add_row(*(Text(cell(arm)) for _, cell in shown), style=style)
    parts: list[RenderableType] = [Text(headline(report)), Text(""), table, Text("")]
    parts += [Text(f"! {caution}", style="yellow") for caution in report.cautions]
    parts.append(Text(report.recommendation.sentence, style="bold"))
    parts.append(Text(f"Rule: {report.recommendation.rule}.", style="dim"))
    for table_of in (pairs_table(report, whole=False), batches_table(report), ratings_table(report)):
        parts += _terminal_table(*table_of)
    parts += [Text(f"- {note}", style="dim") for note in notes(report)]
    if len(shown) < whole:
        parts.append(Text("- more columns: report.html, arms.csv, or a wider terminal", style="dim"))
    return Group(*parts)


_ARMS_LEAST_FIRST = ("parameters", "train GiB", "samples/s", "row ms", "first ms", "tokens/s", "infer GiB", "train")
_LEAST_FIRST = ("peak GiB", "tokens/s", "train time", "rung", "parameters", "state")


def _fitting(report: Report, width: int) -> list[tuple[str, Cell]]:
    shown = terminal_columns(report)
    further = [heading for heading, _ in shown if heading.rpartition(" ")[2] in shown_metrics(report)]
    for dropped in (*_LEAST_FIRST, *reversed(further)):
        if _table_width(report, shown) <= width:
            break
        shown = [(heading, cell) for heading, cell in shown if heading != dropped]
    return shown


def _table_width(report: Report, shown: list[tuple[str, Cell]]) -> int:
    return sum(2 + max(len(heading), *(len(cell(row)) for row in report.shown)) for heading, cell in shown)


def _style(row: Row, report: Report) -> str:
    if row.trial_id == report.recommendation.trial_id:
        return "bold green"
    return "red" if row.failure else "dim" if row.state in ("stopped", "pending") else ""


def one_trial(report: Report, row: Row) -> RenderableType:
    """Render the details of one trial, or of the base, for a terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(f"{row.trial_id} of {report.run}: {row.state}", style="bold")]
    facts = {
        "values": ", ".join(f"{path}={value}" for path, value in row.params.items()),
        "trained": f"{row.step:,} steps, {row.samples:,} rows, {duration(row.train_seconds)}" if row.step else "",
        "evaluated": f"{row.eval_samples_per_second:,.0f} rows a second" if row.eval_samples_per_second else "",
        "parameters": f"{row.trainable_parameters:,} trained" if row.trainable_parameters else "",
        "formats": row.number_formats or "",
        "memory": f"{number(row.peak_memory_gib, 2)} GiB at most" if row.peak_memory_gib else "",
        "reason": row.reason or "",
        "failure": f"{row.failure.failure_class}: {row.failure.sentence}" if row.failure else "",
    }
    parts += [Text(f"{name:<11} {value}") for name, value in facts.items() if value]
    names = [name for name in report.metrics if name in row.metrics or name in (row.test_metrics or {})]
    headings = ["metric", "validation", report.held_out]
    tested = row.test_metrics or {}
    measured = [
        [name, with_interval(row.metrics, row.intervals, name), with_interval(tested, row.test_intervals, name)]
        for name in names
    ]
    parts += _terminal_table(headings, measured)
    if row.per_class:
        lines = [[label, *class_cells(values)] for label, values in row.per_class.items()]
        parts += _terminal_table(["class", "precision", "recall", "F1", "rows"], lines)
    known = [name for name in ("step", "samples", "train_loss", *report.metrics) if any(name in at for at in row.curve)]
    points = [[number(at.get(name), 0 if name in ("step", "samples") else 3) for name in known] for at in row.curve]
    parts += _terminal_table(known, points) if known else []
    return Group(*parts)


def markdown(report: Report) -> str:
    """A page of GitHub Markdown."""
    shown = columns(report)
    lines = [
        f"# {plain(report.run)}",
        "",
        plain(headline(report)),
        "",
        *(f"- **Caution:** {plain(caution)}" for caution in report.cautions),
        *([""] if report.cautions else []),
        f"**{plain(report.recommendation.sentence)}**",
    ]
    lines += ["", f"Rule: {plain(report.recommendation.rule)}.", ""]
    if report.arms is not None:
        columns_of_arms = arm_columns(report)
        lines += ["| " + " | ".join(plain(heading) for heading, _ in columns_of_arms) + " |"]
        lines += ["|" + "---|" * len(columns_of_arms)]
        lines += ["| " + " | ".join(map(plain, cells)) + " |" for _, cells in _arm_rows(report)]
    if report.arms is not None and report.shown:
        lines += ["", "## Every configuration", ""]
    if report.shown:
        lines += ["| " + " | ".join(plain(heading) for heading, _ in shown) + " |", "|" + "---|" * len(shown)]
        lines += ["| " + " | ".join(plain(cell(row)) for _, cell in shown) + " |" for row in report.shown]
    tables = (pairs_table(report, whole=True), batches_table(report), folds_table(report), ratings_table(report))
    for headings, rows in tables:
        if rows:
            lines += ["", "| " + " | ".join(map(plain, headings)) + " |", "|" + "---|" * len(headings)]
            lines += ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
    lines += ["", *(f"- {plain(note)}" for note in notes(report)), ""]
    return "\n".join(lines)


def arms_csv(report: Report) -> str:
    """One line an arm, full precision, one column a number."""
    return _csv(*arm_records(report))


def batches_csv(report: Report) -> str:
    """One line an arm and size of a batch."""
    return _csv(*batch_records(report))


def _csv(headings: list[str], rows: list[list[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def table_csv(report: Report, rows: Sequence[Row] | None = None) -> str:
    """Return one line per row with full precision. `rows` defaults to all rows of the table."""
    parameters = parameter_columns(report)
    names = report.metrics
    plain = (
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
            *plain,
            "failure",
        ]
    )
    for row in report.shown if rows is None else rows:
        values: list[object] = [row.trial_id, *([row.arm] if arm else []), row.state, row.rung]
        values += [row.trial_id == report.recommendation.trial_id]
        values += [row.params.get(path) for path in parameters]
        values += [row.metrics.get(name) for name in names]
        values += [(row.test_metrics or {}).get(name) for name in names]
        values += [getattr(row, name) for name in plain]
        writer.writerow([_cell(value) for value in [*values, row.failure.sentence if row.failure else None]])
    return buffer.getvalue()


def _cell(value: object) -> object:
    """A value for CSV. A text that a spreadsheet would run as a formula is made a text again."""
    if value is None:
        return ""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t"):
        return f"'{value}"
    return value


def html(report: Report) -> str:
    """One self-contained page: no script, no request, all texts escaped, plots as images inside."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from lorafleet.evaluation.render.plots import arm_plots, plots

    environment = Environment(
        loader=PackageLoader("lorafleet.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["zip"] = zip
    shown = columns(report)
    chosen = report.recommendation.trial_id
    table = [(row, [cell(row) for _, cell in shown]) for row in report.shown]
    chosen_last = [pair for pair in table[_UNFOLDED:] if pair[0].trial_id == chosen]
    if chosen_last:
        table = [
            *table[: _UNFOLDED - 1],
            *chosen_last,
            *(pair for pair in table[_UNFOLDED - 1 :] if pair not in chosen_last),
        ]
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=headline(report),
        headings=[heading for heading, _ in shown],
        rows=table[:_UNFOLDED],
        folded=table[_UNFOLDED:],
        images=_encoded(plots(report)),
        arm_images=_encoded(arm_plots(report)),
        notes=notes(report),
        facts=_facts(report),
        tiles=_arm_tiles(report) if report.arms is not None else _tiles(report, report.row(chosen)) if chosen else [],
        arm_headings=[heading for heading, _ in arm_columns(report)],
        arms=_arm_rows(report),
        pairs=pair_cells(report),
        ratings=ratings_table(report),
        folds=folds_table(report),
        batches=batches_table(report),
        number=number,
        class_cells=class_cells,
    )


_UNFOLDED = 100
"""Rows of the table that are seen at once."""


def _encoded(drawn: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(caption, base64.b64encode(svg.encode()).decode()) for caption, svg in drawn]


def _arm_rows(report: Report) -> list[tuple[Arm, list[str]]]:
    """Return (an arm, its cells) for each row of a comparison's table."""
    if report.arms is None:
        return []
    columns_of_arms = arm_columns(report)
    return [(arm, [cell(arm) for _, cell in columns_of_arms]) for arm in report.shown_arms]


def _arm_tiles(report: Report) -> list[tuple[str, str]]:
    """The recommended arm in a few numbers."""
    arm = next((arm for arm in report.arms or [] if arm.arm == report.recommendation.arm), None)
    if arm is None:
        return []
    found = [("arm", arm.arm), (f"{report.held_out} {report.metric}", number(arm.metrics.get(report.metric)))]
    base = report.base.test_metrics
    if base and report.state != BENCHMARK:  # of other rows
        found.append((f"untuned base, {report.metric}", number(base.get(report.metric))))
    if arm.train_seconds:
        found.append(("one training", duration(arm.train_seconds)))
    if arm.inference and arm.inference.peak_memory_gib:
        found.append(("memory in inference", f"{number(arm.inference.peak_memory_gib, 2)} GiB"))
    return found


def _tiles(report: Report, row: Row) -> list[tuple[str, str]]:
    """The recommended trial in a few numbers."""
    base = report.base.test_metrics or report.base.metrics
    held_out = row.test_metrics or {}
    found = [(f"validation {report.metric}", number(row.metrics.get(report.metric)))]
    if held_out:
        found.append((f"{report.held_out} {report.metric}", number(held_out.get(report.metric))))
    if base:
        found.append((f"untuned base, {report.metric}", number(base.get(report.metric))))
    size = f"{row.trainable_parameters:,}" if row.trainable_parameters else "-"
    return [*found, ("trained parameters", size)]


def _facts(report: Report) -> list[tuple[str, str]]:
    found = [("base model", report.model), ("data", report.data)]
    if len(report.rungs) > 1:
        found.append(("rungs", f"{'; '.join(f'{level:,}' for level in report.rungs)} {report.time_attr}"))
    found += [(f"SHA-256 of {split}", digest) for split, digest in report.facts.get("data_sha256", {}).items()]
    found += [(f"revision of {name}", revision) for name, revision in report.facts.get("model_revisions", {}).items()]
    found += [(f"BERTScore with {name}", what) for name, what in report.facts.get("bertscore", {}).items()]
    if report.facts.get("labels"):
        found.append(("labels", ", ".join(map(str, report.facts["labels"]))))
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())))
    return found
