"""`lorafleet validate`: is this job file right, and is what it names there?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from lorafleet.commands.common import (
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
    tell,
)

if TYPE_CHECKING:
    from lorafleet.jobs.errors import Problem
    from lorafleet.jobs.loading.job_file import LoadedJob
    from lorafleet.jobs.schema.job import JobSpec


def validate(
    job: Job,
    overrides: Overrides = None,
    on: On = None,
    data: Annotated[bool, typer.Option("--data/--no-data", help="Read the data files too.")] = True,
    output: Output = Format.TEXT,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Check a job file: every problem with its line and the closest right key; with --on, what the cluster says too."""
    from lorafleet.jobs.errors import ExitCode, JobFileError

    loaded, problems, notes = _looked_at(job, tuple(overrides or ()), data=data, here=on is None)
    if loaded is None or problems:
        if output is Format.TEXT:
            raise JobFileError(str(job), problems)
        listed = [{"path": p.path, "line": p.line, "sentence": p.sentence} for p in problems]
        print_json({"valid": False, "file": str(job), "problems": listed})
        raise typer.Exit(ExitCode.USER_INPUT)
    refused = _refused(loaded, on)
    if output is Format.JSON:
        listed = [{"path": "", "line": None, "sentence": sentence} for sentence in refused]
        print_json({"valid": not refused, "file": str(job), "problems": listed, "notes": notes})
        raise typer.Exit(ExitCode.GATE_REFUSED if refused else ExitCode.OK)
    note_aliases(tuple(notes))
    for sentence in refused:
        say(f"refused: {sentence}")
    if refused:
        raise typer.Exit(ExitCode.GATE_REFUSED)
    tell(f"{job} is valid: {loaded.job.task}, {loaded.job.model.model_name_or_path}")


def _looked_at(
    path: Path, overrides: tuple[str, ...], *, data: bool, here: bool
) -> tuple[LoadedJob | None, list[Problem], list[str]]:
    """Return (the job, every problem of its file, its names and its rows, notes).

    With problems the job is what is right of it, so that the rest is looked at as well.
    """
    from lorafleet.cluster.planning.preflight import name_problems
    from lorafleet.jobs.errors import JobFileError, Problem
    from lorafleet.jobs.loading.job_file import LoadedJob, load_job
    from lorafleet.jobs.loading.unused_fields import unused_notes

    problems: list[Problem] = []
    try:
        loaded = load_job(path, overrides)
    except JobFileError as error:
        problems += error.problems
        if not isinstance(error.rest, LoadedJob):
            return None, problems, []
        loaded = error.rest
    problems += name_problems(loaded)
    if here:
        problems += _refused_here(loaded)
    command = "sweep" if loaded.job.search else "compare" if loaded.job.compare else "train"
    notes = [*loaded.notes, *unused_notes(loaded, command)]
    if data and not any(problem.path.startswith("data") for problem in problems):
        wrong, of_rows = _looked_at_rows(loaded.job, with_model=not problems)
        problems += [Problem("data", sentence) for sentence in wrong]
        notes += of_rows
    return loaded, problems, list(dict.fromkeys(notes))


def _refused_here(loaded: LoadedJob) -> list[Problem]:
    """Return what this machine has against the job."""
    from lorafleet.cluster.hardware import local_site
    from lorafleet.cluster.planning.plan import refuse_attention, refuse_environment
    from lorafleet.jobs.errors import JobFileError

    problems: list[Problem] = []
    try:
        refuse_environment(loaded, ())
    except JobFileError as error:
        problems += error.problems
    try:
        refuse_attention(loaded.job, local_site(), str(loaded.path))
    except JobFileError as error:
        problems += [loaded.located(problem) for problem in error.problems]
    return problems


def _looked_at_rows(job: JobSpec, *, with_model: bool) -> tuple[list[str], list[str]]:
    """Return (what is wrong with the rows, notes on them), and what the chat templates make of them.

    What is not on this machine is not looked at, and said. Without `with_model` the rows alone are.
    """
    from lorafleet.evaluation.tokens import prepare
    from lorafleet.jobs.data.rows import load_rows
    from lorafleet.jobs.errors import AssetError, UserError
    from lorafleet.jobs.trials.arms import own_job

    notes: list[str] = []
    arms = [own_job(job, name) for name in (job.compare.arms if job.compare else ())] if with_model else []
    for one in [job, *arms]:
        try:
            if job.generates and with_model:
                notes += prepare(one).warnings
            else:
                notes += load_rows(one).warnings
        except AssetError as missing:
            notes.append(f"{missing}; how rows become tokens was not looked at")
        except UserError as error:
            return str(error).splitlines(), notes
    return [], notes


def _refused(loaded: LoadedJob, on: str | None) -> list[str]:
    """What a cluster has against the job."""
    if on is None:
        return []
    backend = backend_for(on, None)
    refused, unasked = backend.check(backend.plan(loaded, "sweep" if loaded.job.search else "train"))
    for sentence in unasked:
        say(f"note: {sentence}")
    return refused
