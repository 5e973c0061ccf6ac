"""`lorafleet export`: an adapter as something that can be deployed, checked against what it was made from."""

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
    ended_by_signals,
    hush_libraries,
    say,
)
from lorafleet.commands.deliver import deliver, show_exported
from lorafleet.commands.sweep import Detach, Wait

if TYPE_CHECKING:
    from lorafleet.jobs.runs.export_result import Budget
    from lorafleet.jobs.schema.export import Target

_USUAL = "merged,onnx,onnx-int8"
_SMALL = "onnx,onnx-fp16,onnx-int8,onnx-int4"


def export(
    run: OneRun,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="TARGET,...",
            help="What to make, separated by commas; `all` for all.",
            show_default=f"{_USUAL}; with a budget {_SMALL}",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the targets.", show_default="RUN/export"),
    ] = None,
    budget_mb: Annotated[
        float | None, typer.Option(min=0.001, help="MB that a device has for the model: the best that fits is picked.")
    ] = None,
    max_ms_per_token: Annotated[
        float | None, typer.Option(min=0.001, help="Milliseconds that a token (of a classifier: a row) may take here.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Held-out rows to compare on.", show_default="export.rows of the job, 64"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads with which targets are measured.")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure what passes, for its card and a budget.")
    ] = True,
    runs: Runs = DEFAULT_RUNS,
    on: On = None,
    form: Output = Format.TEXT,
    detach: Detach = False,
    wait: Wait = False,
    trust: Trust = False,
) -> None:
    """Make a run's model (RUN, or RUN:TRIAL) into files to deploy, and set aside what no longer does as its source."""
    from lorafleet.jobs.runs.export_result import Delivery

    hush_libraries()
    budget = _budget(budget_mb, max_ms_per_token, measure=measure)
    name, _, trial_id = run.partition(":")
    wanted = Delivery(
        run=name,
        trial_id=trial_id,
        output=str(output.absolute()) if output else "",
        targets=tuple(_targets(to or (_SMALL if budget else _USUAL))),
        threads=threads if measure else 0,
        held_out=rows,
        budget=budget,
    )
    if on is not None:
        deliver("export", wanted, runs, on, output=form, detach=detach, wait=wait, trust=trust)
        return
    from lorafleet.cluster.run_index import find_run
    from lorafleet.deployment.export import delivered
    from lorafleet.evaluation.report.model_of_run import shipped

    found = find_run(runs, name)
    confirm_trust(found, "export", trust=trust)
    out = (output or found.path / "export").absolute()
    with ended_by_signals(), redirect_stdout(sys.stderr):  # libraries greet; what we print is for programs too
        exported = delivered(shipped(found, trial_id), wanted, out, say)
    show_exported(exported, form)
    raise typer.Exit(exported.code)


def _budget(files_mb: float | None, ms: float | None, *, measure: bool) -> Budget | None:
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.runs.export_result import Budget

    if files_mb is None and ms is None:
        return None
    if ms is not None and not measure:
        raise UserError("--max-ms-per-token needs what --no-measure leaves out: use one of them")
    return Budget(files_mb=files_mb, ms=ms)


def _targets(text: str) -> list[Target]:
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.schema.export import TARGETS
    from lorafleet.jobs.schema.field_paths import closest

    if text.strip() == "all":
        return list(TARGETS)
    words = [word.strip() for word in text.split(",") if word.strip()]
    known = {str(target): target for target in TARGETS}
    for word in words:
        if word not in known:
            meant = closest(word, TARGETS)
            hint = f"; did you mean {meant}?" if meant else ""
            raise UserError(f"--to has {word!r}, but must be some of {', '.join(TARGETS)}, or all{hint}")
    if not words:
        raise UserError(f"--to is empty, but must be some of {', '.join(TARGETS)}, or all")
    return [known[word] for word in words]
