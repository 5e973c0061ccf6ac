"""`lorafleet validate`: check a job file and everything that it names."""

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
    get_backend,
    print_json,
    print_message,
    print_notes,
    print_text,
)

if TYPE_CHECKING:
    from lorafleet.jobs.errors import Problem
    from lorafleet.jobs.loading.job_file import LoadedJob
    from lorafleet.jobs.schema.job import JobSpec


def validate(
    job: Job,
    overrides: Overrides = None,
    on: On = None,
    data: Annotated[
        bool, typer.Option("--data/--no-data", help="Also read and check the data files.")
    ] = True,
    output: Output = Format.TEXT,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Check a job file and print every problem with its line and the closest right key.

    With --on, the cluster checks it too.
    """
    from lorafleet.jobs.errors import ExitCode, JobFileError

    loaded, problems, notes = _check_job(
        job, tuple(overrides or ()), data=data, on_this_machine=on is None
    )
    if loaded is None or problems:
        if output is Format.TEXT:
            raise JobFileError(str(job), problems)
        listed = [{"path": p.path, "line": p.line, "sentence": p.sentence} for p in problems]
        print_json({"valid": False, "file": str(job), "problems": listed})
        raise typer.Exit(ExitCode.USER_INPUT)
    refused = _check_on_cluster(loaded, on)
    if output is Format.JSON:
        listed = [{"path": "", "line": None, "sentence": message} for message in refused]
        print_json({"valid": not refused, "file": str(job), "problems": listed, "notes": notes})
        raise typer.Exit(ExitCode.GATE_REFUSED if refused else ExitCode.OK)
    print_notes(tuple(notes))
    for message in refused:
        print_message(f"refused: {message}")
    if refused:
        raise typer.Exit(ExitCode.GATE_REFUSED)
    print_text(f"{job} is valid: {loaded.job.task}, {loaded.job.model.model_name_or_path}")


def _check_job(
    path: Path, overrides: tuple[str, ...], *, data: bool, on_this_machine: bool
) -> tuple[LoadedJob | None, list[Problem], list[str]]:
    """Check a job file, the names in it and its rows.

    If the file has problems, the valid part of the job is still checked, so that all problems are
    reported together.

    Args:
        data: Read the data files too.
        on_this_machine: Also check what this machine refuses.

    Returns:
        (the job or None, problems, notes).
    """
    from lorafleet.cluster.planning.preflight import find_name_problems
    from lorafleet.jobs.errors import JobFileError, Problem
    from lorafleet.jobs.loading.job_file import LoadedJob, load_job
    from lorafleet.jobs.loading.unused_fields import collect_unused_notes

    problems: list[Problem] = []
    try:
        loaded = load_job(path, overrides)
    except JobFileError as error:
        problems += error.problems
        if not isinstance(error.rest, LoadedJob):
            return None, problems, []
        loaded = error.rest
    problems += find_name_problems(loaded)
    if on_this_machine:
        problems += _list_local_problems(loaded)
    command = "sweep" if loaded.job.search else "compare" if loaded.job.compare else "train"
    notes = [*loaded.notes, *collect_unused_notes(loaded, command)]
    # Rows of a file that is missing or named wrongly cannot be read.
    if data and not any(problem.path.startswith("data") for problem in problems):
        # With other problems, the model or its template may be the wrong one: only the rows are
        # read.
        row_problems, row_notes = _check_rows(loaded.job, with_model=not problems)
        problems += [Problem("data", message) for message in row_problems]
        notes += row_notes
    return loaded, problems, list(dict.fromkeys(notes))


def _list_local_problems(loaded: LoadedJob) -> list[Problem]:
    """Return the reasons why this machine cannot run the job.

    These are variables that a job may not set, and attention that needs a GPU or a package.
    A cluster has rules of its own.
    """
    from lorafleet.cluster.local_site import detect_local_site
    from lorafleet.cluster.planning.refusals import (
        list_attention,
        refuse_attention,
        refuse_environment,
    )
    from lorafleet.jobs.errors import JobFileError

    problems: list[Problem] = []
    try:
        refuse_environment(loaded, ())
    except JobFileError as error:
        problems += error.problems
    if list_attention(loaded.job) == ["auto"]:
        return problems  # nothing depends on this machine, which need not be examined
    try:
        refuse_attention(loaded.job, detect_local_site(), str(loaded.path))
    except JobFileError as error:
        problems += [loaded.locate(problem) for problem in error.problems]
    return problems


def _check_rows(job: JobSpec, *, with_model: bool) -> tuple[list[str], list[str]]:
    """Check the rows and what the chat templates make of them.

    What is not on this machine is not checked, and a note says so. Without `with_model` only the
    rows are read.

    Returns:
        (problems, notes).
    """
    from lorafleet.evaluation.tokens import prepare
    from lorafleet.jobs.data.rows import load_rows
    from lorafleet.jobs.errors import AssetError, UserError
    from lorafleet.jobs.trials.arms import build_arm_job

    notes: list[str] = []
    arms = (
        [build_arm_job(job, name) for name in (job.compare.arms if job.compare else ())]
        if with_model
        else []
    )
    for checked_job in [job, *arms]:
        try:
            if job.is_generative and with_model:
                notes += prepare(checked_job).warnings
            else:
                notes += load_rows(checked_job).warnings
        except AssetError as missing:
            notes.append(f"{missing}; tokenization was not checked")
        except UserError as error:
            return str(error).splitlines(), notes
    return [], notes


def _check_on_cluster(loaded: LoadedJob, on: str | None) -> list[str]:
    """Return the reasons why a cluster refuses the job; print what it could not check.

    Args:
        on: Value of `--on`. None: the result is empty.

    Raises:
        UserError: The job cannot be planned for the cluster.
    """
    if on is None:
        return []
    backend = get_backend(on, None)
    refused, unchecked = backend.check(
        backend.plan(loaded, "sweep" if loaded.job.search else "train")
    )
    for message in unchecked:
        print_message(f"note: {message}")
    return refused
