"""Print the result of an export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafleet.commands.common import (
    Format,
    make_console,
    print_json,
    print_message,
    print_text,
)

if TYPE_CHECKING:
    from rich.table import Table

    from lorafleet.jobs.runs.export_result import ExportResult, TargetResult
    from lorafleet.jobs.runs.run import Run


def read_export(run: Run) -> ExportResult | None:
    """Return the record of an export; None for other runs and for an unfinished export."""
    from lorafleet.jobs.runs.export_result import EXPORTED, ExportResult, read_record

    path = run.path / EXPORTED
    return read_record(path, ExportResult) if path.is_file() else None


def print_export(exported: ExportResult, output: Format) -> None:
    """Print an export's targets as a table or as JSON.

    Below the table, each target that was not accepted is printed with its reason, and
    remarks on the others.
    """
    if output is Format.JSON:
        targets = {
            result.target: result.model_dump(mode="json", exclude={"target"}) | {"ms": result.ms}
            for result in exported.targets
        }
        print_json(
            {
                "targets": targets,
                "picked": exported.picked,
                "sentence": exported.sentence,
                "output": exported.output,
            }
        )
        return
    make_console().print(_build_table(exported))
    for result in exported.targets:
        reason = (
            result.failure
            or result.unavailable
            or ("; ".join(result.parity.reasons) if result.parity else "")
        )
        if reason:
            print_text(f"{result.target}: {_describe_state(result)}: {reason}")
        for remark in result.parity.remarks if result.parity else []:
            print_text(f"{result.target}: {remark}")
    if exported.sentence:
        print_text(exported.sentence)
    print_message(f"in {exported.output}")


def _describe_state(result: TargetResult) -> str:
    if result.parity is not None:
        return "accepted" if result.accepted else "rejected"
    return "failed" if result.failure else "unavailable"


def _build_table(exported: ExportResult) -> Table:
    from rich import box
    from rich.table import Table

    from lorafleet.evaluation.report.format import format_number

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in (
        "target",
        "",
        "MB",
        "ms",
        "max logit diff",
        "agreement",
        "metric",
        "before",
        "after",
    ):
        table.add_column(
            title, justify="left" if title in ("target", "") else "right", no_wrap=True
        )
    for result in exported.targets:
        cells = [result.target, _describe_state(result)]
        if result.parity is not None:
            comparison = result.parity.judged
            cells += [
                format_number(result.files_mb, 1),
                format_number(result.ms, 1),
                format_number(comparison.max_logit_difference),
            ]
            cells += [
                f"{comparison.agreement:.3f}",
                comparison.metric,
                format_number(comparison.before),
                format_number(comparison.after),
            ]
        table.add_row(*cells)
    return table
