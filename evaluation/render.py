"""Report -> terminal, Markdown, HTML and CSV. Every form draws the same object."""

from __future__ import annotations

import base64
import csv
import io
from typing import TYPE_CHECKING

from evaluation.report_text import Cell, columns, headline, notes, number, parameter_columns, plain, terminal_columns
from jobs.report import Report, Row

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

    table = Table(header_style="bold", box=None, pad_edge=False)
    shown = _fitting(report, width)
    for heading, _ in shown:
        table.add_column(Text(heading), justify="left" if heading in ("trial", "state") else "right", no_wrap=True)
    for row in report.shown:
        table.add_row(*(Text(cell(row)) for _, cell in shown), style=_style(row, report))
    parts: list[RenderableType] = [Text(headline(report)), Text(""), table, Text("")]
    parts.append(Text(report.recommendation.sentence, style="bold"))
    parts += [Text(f"- {note}", style="dim") for note in notes(report)]
    if len(shown) < len(terminal_columns(report)):
        parts.append(Text("- more columns: report.html, report.csv, or a wider terminal", style="dim"))
    return Group(*parts)


_LEAST_FIRST = ("peak GiB", "tokens/s", "train time", "rung", "parameters", "state")


def _fitting(report: Report, width: int) -> list[tuple[str, Cell]]:
    shown = terminal_columns(report)
    for dropped in _LEAST_FIRST:
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


def markdown(report: Report) -> str:
    """A page of GitHub Markdown."""
    shown = columns(report)
    lines = [
        f"# {plain(report.run)}",
        "",
        plain(headline(report)),
        "",
        f"**{plain(report.recommendation.sentence)}**",
    ]
    lines += ["", f"Rule: {report.recommendation.rule}.", ""]
    lines += ["| " + " | ".join(heading for heading, _ in shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(plain(cell(row)) for _, cell in shown) + " |" for row in report.shown]
    lines += ["", *(f"- {plain(note)}" for note in notes(report)), ""]
    return "\n".join(lines)


def table_csv(report: Report) -> str:
    """One line a row, full precision, one column a number."""
    parameters = parameter_columns(report)
    names = report.metrics
    plain = (
        "step",
        "samples",
        "train_seconds",
        "eval_seconds",
        "samples_per_second",
        "tokens_per_second",
        "peak_memory_gib",
        "gpu_hours",
        "trainable_parameters",
    )
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "trial_id",
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
    for row in report.shown:
        values: list[object] = [row.trial_id, row.state, row.rung, row.trial_id == report.recommendation.trial_id]
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

    from evaluation.plots import plots

    environment = Environment(
        loader=PackageLoader("evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = columns(report)
    images = [(caption, base64.b64encode(svg.encode()).decode()) for caption, svg in plots(report)]
    chosen = report.recommendation.trial_id
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=headline(report),
        headings=[heading for heading, _ in shown],
        rows=[(row, [cell(row) for _, cell in shown]) for row in report.shown],
        images=images,
        notes=notes(report),
        facts=_facts(report),
        tiles=_tiles(report, report.row(chosen)) if chosen else [],
    )


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
    if report.facts.get("labels"):
        found.append(("labels", ", ".join(map(str, report.facts["labels"]))))
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())))
    return found
