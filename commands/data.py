"""`lorafleet data`: what the rows of a job are, before anything runs."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from lorafleet.commands.common import (
    DEFAULT_RUNS,
    AnyRuns,
    Format,
    Job,
    Output,
    Overrides,
    console,
    hush_libraries,
    note_aliases,
)

if TYPE_CHECKING:
    from lorafleet.evaluation.report.data import DataReport, ShownRow, SplitReport
    from lorafleet.jobs.schema.job import JobSpec
    from rich.console import RenderableType
    from rich.text import Text


class SplitName(StrEnum):
    """Splits whose rows can be shown."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


_BAR = 30
_MAX_TOKENS_SHOWN = 600
_MAX_BAD_ROWS = 20
_LEARNT, _CONTEXT, _BETWEEN = "bold green", "dim", "bright_black"


def data(
    job: Job,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Print so many rows as tokens.")] = 0,
    split: Annotated[SplitName, typer.Option("--split", help="Whose rows --show prints.")] = SplitName.TRAIN,
    output: Output = Format.TEXT,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Look at the rows: bad ones, repetitions, leaks, classes, lengths, and what of them is learnt."""
    from lorafleet.cluster.planning.preflight import load_checked
    from lorafleet.evaluation.report.data import data_report
    from lorafleet.jobs.errors import ExitCode

    hush_libraries()
    loaded = load_checked(job, tuple(overrides or ()), whole=False)
    _convert(loaded.job)
    report = data_report(loaded.job, show, split)
    if output is Format.JSON:
        from lorafleet.jobs.text import printable_json

        typer.echo(printable_json(report.model_dump_json(indent=2)))
    else:
        note_aliases(loaded.notes)
        screen = console()
        screen.print(data_view(report, coloured=screen.is_terminal))
    if report.bad_rows:
        raise typer.Exit(ExitCode.USER_INPUT)


def _convert(job: JobSpec) -> None:
    """Convert a GGUF model where that was not done yet: its tokenizer is in the file."""
    from lorafleet.jobs.data.hub import converted_folder, model_folder
    from lorafleet.jobs.errors import AssetError

    try:
        folder = model_folder(job.model.model_name_or_path, job.model.revision)
    except AssetError:
        return  # the report says so
    if (folder / "model.gguf").is_file() and not converted_folder(folder).is_dir():
        from lorafleet.training.model import safetensors_folder

        safetensors_folder(job.model.model_name_or_path, job.model.revision)


def data_view(report: DataReport, *, coloured: bool) -> RenderableType:
    """Lay a report out for a terminal. Without colours what is learnt stands between « and »."""
    from lorafleet.evaluation.report.data import relative_file
    from lorafleet.jobs.text import counted
    from rich.console import Group
    from rich.text import Text

    files = dict.fromkeys(relative_file(split.file) for split in report.splits)
    parts: list[RenderableType] = [Text(f"{report.format} rows of {', '.join(files)}"), Text(""), _table(report)]
    train = report.splits[0]
    if train.histogram:
        parts += [Text(""), Text(f"tokens of the training examples (model.max_length is {report.max_length})")]
        parts += [Text(line) for line in _bars(train)]
    for split in report.splits:
        parts += _findings(split)
    if report.notes:
        parts += [Text(""), Text("notes"), *map(_item, report.notes)]
    if report.bad_rows:
        parts += [Text(""), Text(counted(len(report.bad_rows), "bad row"), style="bold red")]
        parts += [Text(line) for line in report.bad_rows[:_MAX_BAD_ROWS]]
        more = len(report.bad_rows) - _MAX_BAD_ROWS
        parts += [Text(f"and {more} more (--format json has all)")] if more > 0 else []
    if report.shown:
        learnt = "green" if coloured else "between « and »"
        parts += [Text(""), Text(f"rows as tokens: `·` between two, `↵` for a line's end; what is learnt is {learnt}")]
    for row in report.shown:
        parts += [Text(""), *_shown(row, coloured=coloured)]
    return Group(*parts)


def _item(text: str) -> RenderableType:
    """Lay out one point of a list, its further lines below its first word."""
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=0)
    line.add_column(width=2)
    line.add_column()
    line.add_row("-", Text(text))
    return line


def _table(report: DataReport) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("split")
    for name in ("rows", "examples", "tokens", "learnt", "median", "95 %", "longest", "too long"):
        table.add_column(name, justify="right")
    for split in report.splits:
        lengths = split.lengths
        cells = ["-"] * 7
        if lengths is not None and split.examples:
            cells = [
                f"{split.examples:,}",
                f"{split.tokens:,}",
                "-" if split.learnt_tokens is None else f"{split.learnt_tokens:,}",
                *(f"{value:,}" for value in (lengths.median, lengths.percentile_95, lengths.longest)),
                f"{split.longer / split.examples:.1%}",
            ]
        table.add_row(split.split, f"{split.rows:,}", *cells)
    return table


def _bars(split: SplitReport) -> list[str]:
    most = max(bucket.examples for bucket in split.histogram)
    width = len(f"{split.histogram[-1].up_to:,}")
    return [
        f"  up to {bucket.up_to:>{width},}  {'█' * round(_BAR * bucket.examples / most):<{_BAR}} {bucket.examples:,}"
        for bucket in split.histogram
    ]


def _findings(split: SplitReport) -> list[RenderableType]:
    """Say what is odd about a split, a point each."""
    from lorafleet.jobs.text import counted
    from rich.text import Text

    lines = []
    if split.classes:
        lines.append(f"classes: {', '.join(f'{label} {count:,}' for label, count in split.classes.items())}")
    if split.repeated:
        lines.append(f"prompt or text of another row: {counted(split.repeated, 'row')}")
    if split.also_in_train:
        lines.append(f"also among the training rows: {counted(split.also_in_train, 'row')}")
    if split.shortened:
        lines.append(f"longer than model.max_length, without the oldest turns: {counted(split.shortened, 'row')}")
    if split.cut:
        lines.append(f"longer than model.max_length, cut: {counted(split.cut, 'row')}")
    if split.empty_answers:
        lines.append(f"empty answers: {split.empty_answers:,}")
    if split.special_tokens:
        named = ", ".join(f"{token} in {counted(count, 'row')}" for token, count in split.special_tokens.items())
        lines.append(f"special tokens inside texts: {named}")
    return [Text(""), Text(split.split), *map(_item, lines)] if lines else []


def _shown(row: ShownRow, *, coloured: bool) -> list[Text]:
    """Lay out one row as tokens: `·` between tokens, `↵` for a line's end."""
    from rich.text import Text

    of = f", class {row.label}" if row.label else ""
    parts = [Text(f"{row.split} row, line {row.line}{of}", style="bold")]
    for number, tokens in enumerate(row.examples, start=1):
        if len(row.examples) > 1:
            parts.append(Text(f"example {number} of {len(row.examples)}"))
        line = Text()
        before = False
        for place, token in enumerate(tokens[:_MAX_TOKENS_SHOWN]):
            if token.learnt != before and not coloured:
                line.append("«" if token.learnt else "»")
            elif place:
                line.append("·", style=_BETWEEN)
            before = token.learnt
            line.append(token.text.replace("\n", "↵\n"), style=_LEARNT if token.learnt else _CONTEXT)
        if before and not coloured:
            line.append("»")
        parts.append(line)
        if len(tokens) > _MAX_TOKENS_SHOWN:
            parts.append(Text(f"... {len(tokens) - _MAX_TOKENS_SHOWN} tokens more (--format json has all)"))
    return parts
