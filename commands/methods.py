"""`lorafleet methods`: print which methods run under which strategies."""

from __future__ import annotations

from lorafleet.commands.common import DEFAULT_RUNS, AnyRuns, Format, Output, print_json, print_text


def methods(output: Output = Format.TEXT, runs: AnyRuns = DEFAULT_RUNS) -> None:
    """Print which method runs under which strategy, and the limits of each combination."""
    from lorafleet.jobs.schema.compatibility import build_support_table

    if output is Format.JSON:
        fields = ("method", "strategy", "devices", "supported", "reason")
        print_json(
            {
                "cells": [
                    {name: getattr(cell, name) for name in fields} for cell in build_support_table()
                ]
            }
        )
        return
    print_text(format_table())


def format_table() -> str:
    """Return the table as text, with limits as numbered notes below it.

    The table comes from the same rules that refuse a job, so it cannot disagree with them.
    `scripts/make_docs.py` uses the rules for docs/methods.md.
    """
    from lorafleet.jobs.schema.compatibility import build_support_table
    from lorafleet.jobs.schema.types import METHODS, STRATEGIES

    notes: dict[str, int] = {}
    rows = [("", *STRATEGIES)]
    for method in METHODS:
        cells = [cell for cell in build_support_table() if cell.method == method]
        rows.append(
            (
                method,
                *(
                    f"{'yes' if cell.supported else 'no'}{_number_notes(cell.limits, notes)}"
                    for cell in cells
                ),
            )
        )
    widths = [2 + max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows
    ]
    lines += ["", *(f"[{number}] {limit}" for limit, number in notes.items())]
    lines += [
        "",
        "On CPU and CUDA; docs/gpu-status.md lists what has been tested on which hardware. A "
        "single process needs no strategy.",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _number_notes(limits: tuple[str, ...], notes: dict[str, int]) -> str:
    """Return the note numbers of some limits, such as ` [2,5]`; new limits are added to `notes`.

    Args:
        limits: Texts of the limits.
        notes: Text -> number, in the order in which they appear.
    """
    numbers = sorted(notes.setdefault(limit, len(notes) + 1) for limit in limits)
    return f" [{','.join(map(str, numbers))}]" if numbers else ""
