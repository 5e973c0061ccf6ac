"""`lorafleet benchmark`: every variant of a model in one table, each measured in processes of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    hush_libraries,
    say,
    show_report,
    tell,
)
from lorafleet.commands.deliver import deliver
from lorafleet.commands.sweep import Detach, Wait


def benchmark(
    run: OneRun,
    exported: Annotated[
        Path | None,
        typer.Option("--export", metavar="DIR", help="Where an export put its targets.", show_default="RUN/export"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant is measured, in turn.")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows that are answered or classified one by one.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of every answer.")] = 32,
    batch_sizes: Annotated[
        str | None, typer.Option("--batch-sizes", metavar="N,...", help="Measure batches of so many rows as well.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", metavar="N,...", help="Tokens of a row in these batches.", show_default="64"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    runs: Runs = DEFAULT_RUNS,
    on: On = None,
    output: Output = Format.TEXT,
    detach: Detach = False,
    wait: Wait = False,
    trust: Trust = False,
) -> None:
    """Measure base, adapter and exported targets of a run (RUN, or RUN:TRIAL): size, speed, memory, metric."""
    from lorafleet.jobs.runs.export_result import Delivery

    hush_libraries()
    sizes, tokens = _numbers("--batch-sizes", batch_sizes), _numbers("--lengths", lengths)
    points = tuple((size, length) for length in tokens or (64,) for size in sizes or (1,)) if sizes or tokens else ()
    name, _, trial_id = run.partition(":")
    if on is not None:
        wanted = Delivery(
            run=name,
            trial_id=trial_id,
            output=str(exported.absolute()) if exported else "",
            threads=threads,
            rounds=rounds,
            rows=rows,
            new_tokens=new_tokens,
            points=points,
        )
        deliver("benchmark", wanted, runs, on, output=output, detach=detach, wait=wait, trust=trust)
        return
    from lorafleet.cluster.run_index import find_run
    from lorafleet.deployment.benchmark import Amount, variants
    from lorafleet.deployment.benchmark import benchmark as measure
    from lorafleet.evaluation.render.wandb import track_report
    from lorafleet.evaluation.report.model_of_run import shipped
    from lorafleet.evaluation.report.search import write_forms

    amount = Amount(rounds, rows, new_tokens, threads, points)
    found = find_run(runs, name)
    confirm_trust(found, "benchmark", trust=trust)
    given = shipped(found, trial_id)
    out = (exported or found.path / "export").absolute()
    report = measure(given, variants(given, out, amount), out, amount, say)
    write_forms(report, out / "benchmark")
    track_report(found, given.job, report, "benchmark")
    if show_report(report, output):
        tell(f"\n{out / 'benchmark' / 'report.html'}")


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    """The numbers of an option. Raises UserError for other words."""
    from lorafleet.jobs.errors import UserError

    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    wrong = next((word for word in words if not word.isdecimal() or int(word) < 1), None)
    if wrong is not None:
        raise UserError(f"{option} has {wrong!r}, but must be whole numbers above 0, separated by commas")
    return tuple(dict.fromkeys(int(word) for word in words))
