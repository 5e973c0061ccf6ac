"""Report -> terminal, Markdown, HTML and CSV. Every form draws the same object."""

from __future__ import annotations

import base64
import csv
import io
from typing import TYPE_CHECKING

from evaluation.report_text import Cell, columns, headline, notes, number, parameter_columns
from jobs.metrics import TASK_METRICS
from jobs.report import Report, Row

if TYPE_CHECKING:
    from rich.console import RenderableType


def terminal(report: Report) -> RenderableType:
    """A rich table with the recommendation under it. Data and names are shown as they are, never read as markup."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(headline(report)), title_justify="left", header_style="bold", box=None, pad_edge=False)
    shown = _narrow(report)
    for heading, _ in shown:
        table.add_column(Text(heading), justify="left" if heading in ("trial", "state") else "right", no_wrap=True)
    for row in report.shown:
        table.add_row(*(Text(cell(row)) for _, cell in shown), style=_style(row, report))
    parts: list[RenderableType] = [table, Text(""), Text(report.recommendation.sentence, style="bold")]
    parts += [Text(f"- {note}", style="dim") for note in notes(report)]
    return Group(*parts)


def _narrow(report: Report) -> list[tuple[str, Cell]]:
    """The columns that fit a terminal: the choice's metric on both splits, time and size."""
    dropped = {f"{report.held_out} {name}" for name in TASK_METRICS[report.task] if name != report.metric}
    dropped |= {"samples/s"}
    return [(heading, cell) for heading, cell in columns(report) if heading not in dropped]


def _style(row: Row, report: Report) -> str:
    if row.trial_id == report.recommendation.trial_id:
        return "bold green"
    return "red" if row.failure else "dim" if row.state in ("stopped", "pending") else ""


def markdown(report: Report) -> str:
    """A page of GitHub Markdown."""
    shown = columns(report)
    lines = [
        f"# {_plain(report.run)}",
        "",
        _plain(headline(report)),
        "",
        f"**{_plain(report.recommendation.sentence)}**",
    ]
    lines += ["", f"Rule: {report.recommendation.rule}.", ""]
    lines += ["| " + " | ".join(heading for heading, _ in shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(_plain(cell(row)) for _, cell in shown) + " |" for row in report.shown]
    lines += ["", *(f"- {_plain(note)}" for note in notes(report)), ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A text that Markdown shows as it is."""
    for mark in ("\\", "`", "*", "<", ">", "|", "["):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.splitlines())


def table_csv(report: Report) -> str:
    """One line a row, full precision, one column a number."""
    parameters = parameter_columns(report)
    names = TASK_METRICS[report.task]
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
    found = [("base model", report.model), ("data", report.data), ("rungs", f"{report.rungs} {report.time_attr}")]
    found += [(f"SHA-256 of {split}", digest) for split, digest in report.facts.get("data_sha256", {}).items()]
    found += [(f"revision of {name}", revision) for name, revision in report.facts.get("model_revisions", {}).items()]
    if report.facts.get("labels"):
        found.append(("labels", ", ".join(map(str, report.facts["labels"]))))
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())))
    return found
