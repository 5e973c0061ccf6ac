"""`lorafleet methods`: what runs under what."""

from __future__ import annotations

import typer

from commands.common import Format, Output, print_json


def methods(output: Output = Format.TEXT) -> None:
    """Show which method runs under which strategy, and what of it does not."""
    from jobs.support import table

    if output is Format.JSON:
        fields = ("method", "strategy", "devices", "supported", "reason")
        print_json({"cells": [{name: getattr(cell, name) for name in fields} for cell in table()]})
        return
    typer.echo(table_text())


def table_text() -> str:
    """The table in words, its limits as numbered notes below it."""
    from jobs.support import METHODS, STRATEGIES, table

    width = max(map(len, METHODS)) + 2
    notes: dict[str, int] = {}
    lines = [" " * width + "".join(f"{strategy:<12}" for strategy in STRATEGIES)]
    for method in METHODS:
        row = ""
        for cell in (cell for cell in table() if cell.method == method):
            numbers = [str(notes.setdefault(limit, len(notes) + 1)) for limit in cell.limits]
            row += f"{('yes' if cell.supported else 'no') + (' [' + ','.join(numbers) + ']' if numbers else ''):<12}"
        lines.append(f"{method:<{width}}{row}")
    lines += ["", *(f"[{number}] {limit}" for limit, number in notes.items())]
    lines += ["", "On CPU and CUDA; docs/gpu-status.md says what was run where. One process alone needs no strategy."]
    return "\n".join(line.rstrip() for line in lines)
