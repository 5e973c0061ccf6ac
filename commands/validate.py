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
    from jobs.errors import ExitCode, JobFileError, UserError
    from jobs.load import load_job

    notes: list[str] = []
    try:
        loaded = load_job(job, tuple(overrides or ()))
        check_names(loaded)
        notes = [*loaded.notes, *_data_notes(loaded)]
    except JobFileError as error:
        if output is Format.TEXT:
            raise
        problems = [{"path": p.path, "line": p.line, "sentence": p.sentence} for p in error.problems]
        print_json({"valid": False, "file": str(job), "problems": problems})
        raise typer.Exit(ExitCode.USER_INPUT) from None
    except UserError as error:  # of the rows, or of the chat template
        if output is Format.TEXT:
            raise
        bad_rows = [{"path": "data", "line": None, "sentence": line} for line in str(error).splitlines()]
        print_json({"valid": False, "file": str(job), "problems": bad_rows})
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
    """Say what the chat templates make of the rows, where both are on this machine. Raises UserError for bad rows."""
    from evaluation.tokens import prepare
    from jobs.arms import own_job
    from jobs.errors import AssetError

    job = loaded.job
    if not job.generates:
        return []
    notes: list[str] = []
    for one in [job, *(own_job(job, name) for name in (job.compare.arms if job.compare else ()))]:
        try:
            notes += prepare(one).warnings
        except AssetError as missing:
            notes.append(f"{missing}; how rows become tokens was not looked at")
    return list(dict.fromkeys(notes))


def _refused(loaded: LoadedJob, on: str | None) -> list[str]:
    """What a cluster has against the job."""
    if on is None:
        return []
    backend = backend_for(on, None)
    refused, unasked = backend.check(backend.plan(loaded, "sweep" if loaded.job.search else "train"))
    for sentence in unasked:
        say(f"note: {sentence}")
    return refused
