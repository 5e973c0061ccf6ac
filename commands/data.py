"""`lorafleet data`: report on a job's rows before anything runs."""

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
    make_console,
    print_notes,
    silence_libraries,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from lorafleet.evaluation.report.data import DataReport, ShownRow, SplitReport
    from lorafleet.jobs.schema.job import JobSpec


class SplitName(StrEnum):
    """Splits whose rows can be shown."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


_BAR_WIDTH = 30
_MAX_TOKENS_SHOWN = 600
_MAX_BAD_ROWS = 20
_LEARNT, _CONTEXT, _BETWEEN = "bold green", "dim", "bright_black"


def data(
    job: Job,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Print this many rows as tokens.")] = 0,
    split: Annotated[
        SplitName, typer.Option("--split", help="Split whose rows --show prints.")
    ] = SplitName.TRAIN,
    output: Output = Format.TEXT,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Check a job's rows: bad rows, repetitions, leaks, classes, lengths and learnt tokens."""
    from lorafleet.cluster.planning.preflight import load_checked
    from lorafleet.evaluation.report.data import build_data_report
    from lorafleet.jobs.errors import ExitCode

    silence_libraries()
    loaded = load_checked(job, tuple(overrides or ()), require_weights=False)
    _convert_gguf(loaded.job)
    report = build_data_report(loaded.job, show, split)
    if output is Format.JSON:
        from lorafleet.jobs.text import make_json_printable

        typer.echo(make_json_printable(report.model_dump_json(indent=2)))
    else:
        print_notes(loaded.notes)
        screen = make_console()
        screen.print(render_report(report, coloured=screen.is_terminal))
    if report.bad_rows:
        raise typer.Exit(ExitCode.USER_INPUT)


def _convert_gguf(job: JobSpec) -> None:
    """Convert a GGUF model if that was not done yet: its tokenizer is inside the file.

    The only step of this command that loads torch. A model that is not on this machine is
    left alone.
    """
    from lorafleet.jobs.data.hub import get_converted_folder, get_model_folder
    from lorafleet.jobs.errors import AssetError

    try:
        folder = get_model_folder(job.model.model_name_or_path, job.model.revision)
    except AssetError:
        return  # the report says so
    if (folder / "model.gguf").is_file() and not get_converted_folder(folder).is_dir():
        from lorafleet.training.model import resolve_safetensors_folder

        resolve_safetensors_folder(job.model.model_name_or_path, job.model.revision)


def render_report(report: DataReport, *, coloured: bool) -> RenderableType:
    """Lay out a report for a terminal. Without colours, learnt tokens stand between « and ».

    Args:
        coloured: The output has colours. False for pipes and files.
    """
    from rich.console import Group
    from rich.text import Text

    from lorafleet.evaluation.report.data import shorten_path
    from lorafleet.jobs.text import format_count

    files = dict.fromkeys(shorten_path(split.file) for split in report.splits)
    parts: list[RenderableType] = [
        Text(f"{report.format} rows of {', '.join(files)}"),
        Text(""),
        _build_table(report),
    ]
    train = report.splits[0]
    if train.histogram:
        parts += [
            Text(""),
            Text(f"tokens of the training examples (model.max_length is {report.max_length})"),
        ]
        parts += [Text(line) for line in _draw_bars(train)]
    for split in report.splits:
        parts += _list_findings(split)
    if report.notes:
        parts += [Text(""), Text("notes"), *map(_render_item, report.notes)]
    if report.bad_rows:
        parts += [Text(""), Text(format_count(len(report.bad_rows), "bad row"), style="bold red")]
        parts += [Text(line) for line in report.bad_rows[:_MAX_BAD_ROWS]]
        hidden_count = len(report.bad_rows) - _MAX_BAD_ROWS
        parts += (
            [Text(f"and {hidden_count} more (--format json has all)")] if hidden_count > 0 else []
        )
    if report.shown:
        learnt = "green" if coloured else "between « and »"
        parts += [
            Text(""),
            Text(
                "rows as tokens: `·` separates tokens, `↵` is a line feed; learnt tokens are "
                f"{learnt}"
            ),
        ]
    for row in report.shown:
        parts += [Text(""), *_render_row(row, coloured=coloured)]
    return Group(*parts)


def _render_item(text: str) -> RenderableType:
    """Lay out one list item with a hanging indent."""
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=0)
    line.add_column(width=2)
    line.add_column()
    line.add_row("-", Text(text))
    return line


def _build_table(report: DataReport) -> RenderableType:
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
                *(
                    f"{value:,}"
                    for value in (lengths.median, lengths.percentile_95, lengths.longest)
                ),
                f"{split.longer / split.examples:.1%}",
            ]
        table.add_row(split.split, f"{split.rows:,}", *cells)
    return table


def _draw_bars(split: SplitReport) -> list[str]:
    max_examples = max(bucket.examples for bucket in split.histogram)
    width = len(f"{split.histogram[-1].up_to:,}")
    return [
        f"  up to {bucket.up_to:>{width},}  "
        f"{'█' * round(_BAR_WIDTH * bucket.examples / max_examples):<{_BAR_WIDTH}} "
        f"{bucket.examples:,}"
        for bucket in split.histogram
    ]


def _list_findings(split: SplitReport) -> list[RenderableType]:
    """Return the oddities of a split, one list item each.

    Returns:
        The lines to print, with a heading; empty if there is nothing to say.
    """
    from rich.text import Text

    from lorafleet.jobs.text import format_count

    lines = []
    if split.classes:
        lines.append(
            f"classes: {', '.join(f'{label} {count:,}' for label, count in split.classes.items())}"
        )
    if split.repeated:
        lines.append(f"same prompt or text as another row: {format_count(split.repeated, 'row')}")
    if split.also_in_train:
        lines.append(f"also among the training rows: {format_count(split.also_in_train, 'row')}")
    if split.shortened:
        lines.append(
            "longer than model.max_length, oldest turns removed: "
            f"{format_count(split.shortened, 'row')}"
        )
    if split.cut:
        lines.append(f"longer than model.max_length, truncated: {format_count(split.cut, 'row')}")
    if split.empty_answers:
        lines.append(f"empty answers: {split.empty_answers:,}")
    if split.special_tokens:
        named = ", ".join(
            f"{token} in {format_count(count, 'row')}"
            for token, count in split.special_tokens.items()
        )
        lines.append(f"special tokens inside texts: {named}")
    return [Text(""), Text(split.split), *map(_render_item, lines)] if lines else []


def _render_row(row: ShownRow, *, coloured: bool) -> list[Text]:
    """Lay out one row as tokens: `·` between tokens, `↵` for a line feed.

    Long examples are cut after 600 tokens. A row of several examples has a heading for
    each.
    """
    from rich.text import Text

    class_text = f", class {row.label}" if row.label else ""
    parts = [Text(f"{row.split} row, line {row.line}{class_text}", style="bold")]
    for number, tokens in enumerate(row.examples, start=1):
        if len(row.examples) > 1:
            parts.append(Text(f"example {number} of {len(row.examples)}"))
        line = Text()
        was_learnt = False
        for index, token in enumerate(tokens[:_MAX_TOKENS_SHOWN]):
            # The mark also separates the tokens, so no `·` is needed.
            if token.learnt != was_learnt and not coloured:
                line.append("«" if token.learnt else "»")
            elif index:
                line.append("·", style=_BETWEEN)
            was_learnt = token.learnt
            line.append(
                token.text.replace("\n", "↵\n"), style=_LEARNT if token.learnt else _CONTEXT
            )
        if was_learnt and not coloured:
            line.append("»")
        parts.append(line)
        if len(tokens) > _MAX_TOKENS_SHOWN:
            parts.append(
                Text(f"... {len(tokens) - _MAX_TOKENS_SHOWN} tokens more (--format json has all)")
            )
    return parts
