"""`lorafleet logs`: print the log of a run's driver or the record of a trial."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.commands.common import DEFAULT_RUNS, RunName, Runs, print_message, print_text
from lorafleet.jobs.errors import RunError

if TYPE_CHECKING:
    from lorafleet.cluster.backend import RunBackend
    from lorafleet.jobs.runs.run import Run


def logs(
    run: RunName = None,
    trial: Annotated[
        str | None,
        typer.Argument(
            metavar="[TRIAL]", help="Id of a trial. Default: print the log of the driver."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep printing new lines until the run ends.")
    ] = False,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Print the log of a run, or the record of one of its trials."""
    from lorafleet.cluster.backends import get_backend
    from lorafleet.cluster.run_index import find_run

    selected_run = find_run(runs, run)
    backend = get_backend(selected_run)
    offsets: dict[Path, int] = {}
    backend.refresh(selected_run, print_message)
    refreshed_at = time.monotonic()
    # Asked before the first print: lines that are written in between are printed in the next round.
    is_live = follow and _is_live(backend, selected_run)
    is_explained = trial is not None
    while True:
        for line in _read_new_lines(_list_log_files(selected_run, trial), offsets):
            is_explained = True
            print_text(
                line.rstrip("\r").rpartition("\r")[2]
            )  # keep only the last state of a progress bar
        if not is_explained:
            is_explained = True
            _explain_empty_log(backend, selected_run)
        if not is_live:
            return
        if time.monotonic() - refreshed_at > _REFRESH_SECONDS:
            is_live = _is_live(backend, selected_run)
            backend.refresh(selected_run, print_message)
            refreshed_at = time.monotonic()
        time.sleep(0.5)


_REFRESH_SECONDS = 5.0
"""Seconds between two checks whether the run has ended; each may query a queue."""


def _explain_empty_log(backend: RunBackend, run: Run) -> None:
    """Print why a run has no log: for example because it waits in a queue."""
    from lorafleet.jobs.runs.run import RunState

    status = backend.status(run)
    if status.state not in (RunState.PENDING, RunState.RUNNING):
        return
    message = f": {status.message}" if status.message else ""
    print_message(f"{run.id} has no log yet. It is {status.state}{message}")


def _is_live(backend: RunBackend, run: Run) -> bool:
    """Return True if more may be written to the run's logs.

    A pending run counts: its driver may start at any moment.
    """
    from lorafleet.jobs.runs.run import RunState

    return backend.status(run).state in (RunState.PENDING, RunState.RUNNING)


def find_driver_log(run: Run) -> Path:
    """Return the path of the driver's log.

    If the driver's own file could not be downloaded from a cluster, this is the log of its pod.
    """
    driver, submitter = run.path / "logs" / "driver.log", run.path / "logs" / "submitter.log"
    return submitter if submitter.is_file() and not driver.is_file() else driver


def _list_log_files(run: Run, trial: str | None) -> list[Path]:
    """Return the files that can be read now, the jobs of a chain in order.

    Raises RunError if `trial` is not the beginning of exactly one trial's id.
    """
    if trial is None:
        jobs = sorted((run.path / "slurm").glob("*.out"), key=lambda path: path.stat().st_mtime)
        part_logs = [
            array_task.path / "logs" / "driver.log" for array_task in run.list_array_tasks()
        ]
        return [*jobs, find_driver_log(run), *part_logs, run.path / "events.jsonl"]
    trials = run.list_trials()
    matching = [candidate for candidate in trials if candidate.id.startswith(trial)]
    if len(matching) != 1:
        ids = ", ".join(candidate.id for candidate in matching or trials)
        problem = f"several trials that begin with {trial!r}" if matching else f"no trial {trial!r}"
        raise RunError(
            f"{run.id} has {problem}; {'they are' if matching else 'it has'} {ids or 'none yet'}"
        )
    return [matching[0].path / "metrics.jsonl", matching[0].path / "traceback.txt"]


def _read_new_lines(files: list[Path], offsets: dict[Path, int]) -> Iterator[str]:
    for path in files:
        if not path.is_file():  # opening a named pipe would block
            continue
        with path.open(errors="replace") as file:
            # Offsets instead of open files: a download replaces a file by a new one with the same
            # beginning.
            file.seek(offsets.get(path, 0))
            for line in file:
                yield (
                    _format_record(line.rstrip("\n"))
                    if path.suffix == ".jsonl"
                    else line.rstrip("\n")
                )
            offsets[path] = file.tell()


def _format_record(line: str) -> str:
    """Format a JSON record as text: `14:03:22 step=42 accuracy=0.743 ...`.

    Other lines stay unchanged. Missing values and those that are only for programs are left
    out.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if not isinstance(row, dict):
        return line
    row.pop("schema_version", None)
    for name in ("intervals", "first_gradient_at"):
        row.pop(name, None)
    try:
        stamp = time.strftime("%H:%M:%S", time.localtime(row.pop("time", 0)))
    except (TypeError, ValueError, OverflowError, OSError):  # a damaged line
        return line
    return f"{stamp} " + " ".join(
        f"{key}={_format_value(value)}" for key, value in row.items() if value is not None
    )


def _format_value(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
