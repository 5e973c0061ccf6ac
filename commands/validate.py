"""`lorafleet validate`: is this job file right, and is what it names there?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from commands.common import (
    DEFAULT_RUNS,
    AnyRuns,
    Format,
    Job,
    On,
    Output,
    Overrides,
    backend_for,
    note_aliases,
    print_json,
    say,
)

if TYPE_CHECKING:
    from jobs.load import LoadedJob


def validate(
    job: Job,
    overrides: Overrides = None,
    on: On = None,
    output: Output = Format.TEXT,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Check a job file: every problem with its line and the closest right key; with --on, what the cluster says too."""
    from cluster.check import check_names
    from jobs.errors import DataError, ExitCode, JobFileError
    from jobs.load import load_job

    notes: list[str] = []
    try:
        loaded = load_job(job, tuple(overrides or ()))
        check_names(loaded)
        notes = [*loaded.notes, *_data_notes(loaded)]
    except DataError as error:
        if output is Format.TEXT:
            raise
        bad_rows = [{"path": "data", "line": None, "sentence": line} for line in str(error).splitlines()]
        print_json({"valid": False, "file": str(job), "problems": bad_rows})
        raise typer.Exit(ExitCode.USER_INPUT) from None
    except JobFileError as error:
        if output is Format.TEXT:
            raise
        problems = [{"path": p.path, "line": p.line, "sentence": p.sentence} for p in error.problems]
        print_json({"valid": False, "file": str(job), "problems": problems})
        raise typer.Exit(ExitCode.USER_INPUT) from None
    refused = _refused(loaded, on)
    if output is Format.JSON:
        problems = [{"path": "", "line": None, "sentence": sentence} for sentence in refused]
        print_json({"valid": not refused, "file": str(job), "problems": problems, "notes": notes})
        raise typer.Exit(ExitCode.GATE_REFUSED if refused else ExitCode.OK)
    note_aliases(tuple(notes))
    for sentence in refused:
        say(f"refused: {sentence}")
    if refused:
        raise typer.Exit(ExitCode.GATE_REFUSED)
    typer.echo(f"{job} is valid: {loaded.job.task}, {loaded.job.model.model_name_or_path}")


def _data_notes(loaded: LoadedJob) -> list[str]:
    """Say what the chat template makes of the rows, where both are on this machine. Raises DataError for bad rows."""
    from evaluation.tokens import prepare
    from jobs.errors import AssetError

    if not loaded.job.generates:
        return []
    try:
        return list(prepare(loaded.job).warnings)
    except AssetError as missing:
        return [f"{missing}; how rows become tokens was not looked at"]


def _refused(loaded: LoadedJob, on: str | None) -> list[str]:
    """What a cluster has against the job."""
    if on is None:
        return []
    backend = backend_for(on, None)
    refused, unasked = backend.check(backend.plan(loaded, "sweep" if loaded.job.search else "train"))
    for sentence in unasked:
        say(f"note: {sentence}")
    return refused
