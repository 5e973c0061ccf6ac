"""`lorafleet validate`: is this job file right, and is what it names there?"""

from __future__ import annotations

import typer

from commands.common import DEFAULT_RUNS, AnyRuns, Format, Job, Output, Overrides, note_aliases, print_json


def validate(job: Job, overrides: Overrides = None, output: Output = Format.TEXT, runs: AnyRuns = DEFAULT_RUNS) -> None:
    """Check a job file: every problem with its line and the closest right key."""
    from cluster.check import check_names
    from jobs.errors import ExitCode, JobFileError
    from jobs.load import load_job

    try:
        loaded = load_job(job, tuple(overrides or ()))
        check_names(loaded)
    except JobFileError as error:
        if output is Format.TEXT:
            raise
        problems = [{"path": p.path, "line": p.line, "sentence": p.sentence} for p in error.problems]
        print_json({"valid": False, "file": str(job), "problems": problems})
        raise typer.Exit(ExitCode.USER_INPUT) from None
    if output is Format.JSON:
        print_json({"valid": True, "file": str(job), "problems": [], "notes": list(loaded.notes)})
        return
    note_aliases(loaded.notes)
    typer.echo(f"{job} is valid: {loaded.job.task}, {loaded.job.model.model_name_or_path}")
