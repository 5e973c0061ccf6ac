"""`lorafleet methods`: what runs under what."""

from __future__ import annotations

from lorafleet.commands.common import DEFAULT_RUNS, AnyRuns, Format, Output, print_json, tell


def methods(output: Output = Format.TEXT, runs: AnyRuns = DEFAULT_RUNS) -> None:
    """Show which method runs under which strategy, and what of it does not."""
    from lorafleet.jobs.schema.compatibility import table

    if output is Format.JSON:
        fields = ("method", "strategy", "devices", "supported", "reason")
        print_json({"cells": [{name: getattr(cell, name) for name in fields} for cell in table()]})
        return
    tell(table_text())


def table_text() -> str:
    """The table in words, its limits as numbered notes below it."""
    from lorafleet.jobs.schema.compatibility import METHODS, STRATEGIES, table

    notes: dict[str, int] = {}
    rows = [("", *STRATEGIES)]
    for method in METHODS:
        cells = [cell for cell in table() if cell.method == method]
        rows.append((method, *(f"{'yes' if cell.supported else 'no'}{_numbers(cell.limits, notes)}" for cell in cells)))
    widths = [2 + max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += ["", *(f"[{number}] {limit}" for limit, number in notes.items())]
    lines += ["", "On CPU and CUDA; docs/gpu-status.md says what was run where. One process alone needs no strategy."]
    return "\n".join(line.rstrip() for line in lines)


def _numbers(limits: tuple[str, ...], notes: dict[str, int]) -> str:
    """` [2,5]`: the notes of some limits, new ones added."""
    numbers = sorted(notes.setdefault(limit, len(notes) + 1) for limit in limits)
    return f" [{','.join(map(str, numbers))}]" if numbers else ""
