"""`lorafleet export`: an adapter as something that can be deployed, checked against what it was made from."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.common import DEFAULT_RUNS, Format, OneRun, Output, Runs, console, hush_libraries, print_json, say

if TYPE_CHECKING:
    from rich.table import Table

    from deployment.export import Outcome
    from jobs.export import Budget, Target

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
        float | None, typer.Option(min=0, help="MB that a device has for the model: the best that fits is picked.")
    ] = None,
    max_ms_per_token: Annotated[
        float | None, typer.Option(min=0, help="Milliseconds that a token (of a classifier: a row) may take here.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads with which targets are measured.")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure what passes, for its card and a budget.")
    ] = True,
    runs: Runs = DEFAULT_RUNS,
    form: Output = Format.TEXT,
) -> None:
    """Make a run's model (RUN, or RUN:TRIAL) into files to deploy, and set aside what no longer does as its source."""
    from cluster.store import find_run
    from deployment.export import export as make
    from evaluation.shipped import shipped
    from jobs.export import pick

    hush_libraries()
    budget = _budget(budget_mb, max_ms_per_token, measure=measure)
    targets = _targets(to or (_SMALL if budget else _USUAL))
    name, _, trial_id = run.partition(":")
    found = find_run(runs, name)
    out = (output or found.path / "export").absolute()
    with redirect_stdout(sys.stderr):  # libraries greet; what we print is for programs too
        outcomes = make(shipped(found, trial_id), targets, out, say, threads if measure else 0)
    picked, sentence = None, ""
    if budget:
        picked, sentence = pick([outcome.offer for outcome in outcomes if outcome.offer], budget)
    if form is Format.JSON:
        targets_made = {outcome.target: _record(outcome) for outcome in outcomes}
        print_json({"targets": targets_made, "picked": picked.target if picked else None, "sentence": sentence})
    else:
        console().print(_table(outcomes))
        if sentence:
            typer.echo(sentence)
        say(f"in {out}")
    _end(outcomes, nothing_fits=budget is not None and picked is None)


def _end(outcomes: list[Outcome], *, nothing_fits: bool) -> None:
    """The exit code."""
    from jobs.errors import ExitCode

    if any(outcome.failure for outcome in outcomes):
        raise typer.Exit(ExitCode.OUR_FAULT)
    if nothing_fits or any(outcome.parity and not outcome.accepted for outcome in outcomes):
        raise typer.Exit(ExitCode.GATE_REFUSED)
    if not any(outcome.accepted for outcome in outcomes):
        raise typer.Exit(ExitCode.USER_INPUT)


def _budget(files_mb: float | None, ms: float | None, *, measure: bool) -> Budget | None:
    from jobs.errors import UserError
    from jobs.export import Budget

    if files_mb is None and ms is None:
        return None
    if ms is not None and not measure:
        raise UserError("--max-ms-per-token needs what --no-measure leaves out: use one of them")
    return Budget(files_mb=files_mb or None, ms=ms or None)


def _targets(text: str) -> list[Target]:
    from jobs.errors import UserError
    from jobs.export import TARGETS
    from jobs.fields import closest

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


def _record(outcome: Outcome) -> dict[str, object]:
    return {
        "accepted": outcome.accepted,
        "folder": str(outcome.folder) if outcome.folder else None,
        "unavailable": outcome.unavailable,
        "failure": outcome.failure,
        "parity": outcome.parity.model_dump(mode="json") if outcome.parity else None,
        "seconds": outcome.seconds,
        "inference": outcome.speed.model_dump(mode="json") if outcome.speed else None,
    }


def _table(outcomes: list[Outcome]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from deployment.export import ms_each
    from deployment.runtime import files_mb
    from evaluation.report_text import number

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)  # texts, not markup: an extra's brackets are none
    for title in ("target", "", "MB", "ms", "logits within", "agreement", "metric", "before", "after"):
        table.add_column(title, justify="left" if title in ("target", "") else "right", overflow="fold")
    for outcome in outcomes:
        if outcome.parity is None:
            failed = f"failed: {outcome.failure}" if outcome.failure else f"unavailable: {outcome.unavailable}"
            table.add_row(outcome.target, Text(failed))
            continue
        judged = outcome.parity.judged
        assert outcome.folder is not None
        verdict = "accepted" if outcome.accepted else f"rejected: {'; '.join(outcome.parity.reasons)}"
        table.add_row(
            outcome.target,
            Text(verdict),
            f"{files_mb(outcome.folder):.1f}",
            number(ms_each(outcome.speed), 1),
            number(judged.max_logit_difference),
            f"{judged.agreement:.3f}",
            judged.metric,
            number(judged.before),
            number(judged.after),
        )
    return table
