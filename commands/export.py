"""`lorafleet export`: convert a run's model into deployable files and check them against it."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    Format,
    On,
    OneRun,
    Output,
    Runs,
    Trust,
    confirm_trust,
    exit_on_signals,
    print_message,
    silence_libraries,
)
from lorafleet.commands.deliver import submit_delivery
from lorafleet.commands.options import Detach, DryRun, Wait, refuse_dry_run
from lorafleet.commands.show import print_export

if TYPE_CHECKING:
    from lorafleet.jobs.runs.export_result import DeviceBudget
    from lorafleet.jobs.schema.export import Target

_DEFAULT_TARGETS = "merged,onnx,onnx-int8"
_BUDGET_TARGETS = "onnx,onnx-fp16,onnx-int8,onnx-int4"


def export(
    run: OneRun,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="TARGET,...",
            help="Targets to export, separated by commas, or `all`.",
            show_default=f"{_DEFAULT_TARGETS}; with a budget {_BUDGET_TARGETS}",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for the targets.",
            show_default="RUN/export",
        ),
    ] = None,
    budget_mb: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help=(
                "Space for the model on the device, in MB: the best target that fits is selected."
            ),
        ),
    ] = None,
    max_ms_per_token: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Maximum milliseconds per token (for a classifier: per row) on this machine.",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Held-out rows to compare on.", show_default="export.rows of the job, 64"
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads to measure targets with.")] = 1,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="Measure the targets that pass, for the model card and a budget.",
        ),
    ] = True,
    runs: Runs = DEFAULT_RUNS,
    on: On = None,
    form: Output = Format.TEXT,
    detach: Detach = False,
    wait: Wait = False,
    trust: Trust = False,
    dry_run: DryRun = False,
) -> None:
    """Convert a run's model into deployable files and reject those that differ from it.

    RUN means the recommended model, RUN:TRIAL one trial's.
    """
    from lorafleet.jobs.runs.export_result import ExportRequest

    silence_libraries()
    budget = _make_budget(budget_mb, max_ms_per_token, measure=measure)
    name, _, trial_id = run.partition(":")
    delivery = ExportRequest(
        run=name,
        trial_id=trial_id,
        output=str(output.absolute()) if output else "",
        targets=tuple(_parse_targets(to or (_BUDGET_TARGETS if budget else _DEFAULT_TARGETS))),
        # 0 threads: do not measure.
        threads=threads if measure else 0,
        held_out=rows,
        budget=budget,
    )
    if on is not None:
        submit_delivery(
            "export",
            delivery,
            runs,
            on,
            output=form,
            detach=detach,
            wait=wait,
            trust=trust,
            dry_run=dry_run,
        )
        return
    refuse_dry_run(dry_run)
    from lorafleet.cluster.run_index import find_run
    from lorafleet.deployment.export import run_delivery
    from lorafleet.evaluation.report.model_of_run import select_model

    selected_run = find_run(runs, name)
    confirm_trust(selected_run, "export", trust=trust)
    export_dir = (output or selected_run.path / "export").absolute()
    # Libraries print greetings, and standard output is for programs.
    with (
        exit_on_signals(),
        redirect_stdout(sys.stderr),
    ):
        exported = run_delivery(
            select_model(selected_run, trial_id), delivery, export_dir, print_message
        )
    print_export(exported, form)
    # 3 if a target was rejected: a script must not ship it unseen.
    raise typer.Exit(exported.code)


def _make_budget(files_mb: float | None, ms: float | None, *, measure: bool) -> DeviceBudget | None:
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.runs.export_result import DeviceBudget

    if files_mb is None and ms is None:
        return None
    if ms is not None and not measure:
        raise UserError(
            "--max-ms-per-token needs the measurement that --no-measure turns off: use only one of "
            "the two"
        )
    return DeviceBudget(files_mb=files_mb, ms=ms)


def _parse_targets(text: str) -> list[Target]:
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.schema.export import TARGETS
    from lorafleet.jobs.schema.field_paths import find_closest

    if text.strip() == "all":
        return list(TARGETS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    targets_by_name = {str(target): target for target in TARGETS}
    for name in names:
        if name not in targets_by_name:
            suggestion = find_closest(name, TARGETS)
            hint = f"; did you mean {suggestion}?" if suggestion else ""
            raise UserError(
                f"--to has {name!r}, but must be some of {', '.join(TARGETS)}, or all{hint}"
            )
    if not names:
        raise UserError(f"--to is empty, but must be some of {', '.join(TARGETS)}, or all")
    return [targets_by_name[name] for name in names]
