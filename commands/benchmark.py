"""`lorafleet benchmark`: compare all variants of a model in one table."""

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
    print_message,
    print_text,
    show_report,
    silence_libraries,
)
from lorafleet.commands.deliver import submit_delivery
from lorafleet.commands.options import Detach, DryRun, Wait, refuse_dry_run


def benchmark(
    run: OneRun,
    exported: Annotated[
        Path | None,
        typer.Option(
            "--export",
            metavar="DIR",
            help="Folder with the exported targets.",
            show_default="RUN/export",
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            min=1, help="Rounds: how often each variant is measured. The variants take turns."
        ),
    ] = 3,
    rows: Annotated[
        int, typer.Option(min=1, help="Held-out rows to answer or classify one at a time.")
    ] = 8,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens to generate for each answer.")
    ] = 32,
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            "--batch-sizes", metavar="N,...", help="Also measure batches of these sizes (rows)."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="N,...",
            help="Tokens per row in these batches.",
            show_default="64",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    runs: Runs = DEFAULT_RUNS,
    on: On = None,
    output: Output = Format.TEXT,
    detach: Detach = False,
    wait: Wait = False,
    trust: Trust = False,
    dry_run: DryRun = False,
) -> None:
    """Measure size, speed, memory and metric of a run's base, adapter and exported targets.

    RUN means the recommended model, RUN:TRIAL one trial's. Each variant is measured in its own
    processes.
    """
    from lorafleet.jobs.runs.export_result import ExportRequest

    silence_libraries()
    sizes, tokens = (
        _parse_numbers("--batch-sizes", batch_sizes),
        _parse_numbers("--lengths", lengths),
    )
    # Either option alone selects the extra measurements; the other one then has its default.
    points = (
        tuple((size, length) for length in tokens or (64,) for size in sizes or (1,))
        if sizes or tokens
        else ()
    )
    name, _, trial_id = run.partition(":")
    if on is not None:
        delivery = ExportRequest(
            run=name,
            trial_id=trial_id,
            output=str(exported.absolute()) if exported else "",
            threads=threads,
            rounds=rounds,
            rows=rows,
            new_tokens=new_tokens,
            points=points,
        )
        submit_delivery(
            "benchmark",
            delivery,
            runs,
            on,
            output=output,
            detach=detach,
            wait=wait,
            trust=trust,
            dry_run=dry_run,
        )
        return
    refuse_dry_run(dry_run)
    from lorafleet.cluster.run_index import find_run
    from lorafleet.deployment.benchmark import BenchmarkSettings, build_variants
    from lorafleet.deployment.benchmark import benchmark as measure
    from lorafleet.evaluation.render.wandb import track_report
    from lorafleet.evaluation.render.write import write_report_files
    from lorafleet.evaluation.report.model_of_run import select_model

    amount = BenchmarkSettings(rounds, rows, new_tokens, threads, points)
    selected_run = find_run(runs, name)
    confirm_trust(selected_run, "benchmark", trust=trust)
    model = select_model(selected_run, trial_id)
    export_dir = (exported or selected_run.path / "export").absolute()
    report = measure(
        model, build_variants(model, export_dir, amount), export_dir, amount, print_message
    )
    write_report_files(report, export_dir / "benchmark")
    track_report(selected_run, model.job, report, "benchmark")
    if show_report(report, output):
        print_text(f"\n{export_dir / 'benchmark' / 'report.html'}")


def _parse_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Return the numbers of a comma-separated option. Raises UserError for anything else.

    Args:
        option: Name of the option, for the message.
        text: Value of the option. None or empty: no numbers.

    Returns:
        The numbers in their order, each once.
    """
    from lorafleet.jobs.errors import UserError

    items = [item.strip() for item in (text or "").split(",") if item.strip()]
    invalid = next((item for item in items if not item.isdecimal() or int(item) < 1), None)
    if invalid is not None:
        raise UserError(
            f"{option} has {invalid!r}, but must be whole numbers above 0, separated by commas "
            "(such as 1,8,32)"
        )
    return tuple(dict.fromkeys(int(item) for item in items))
