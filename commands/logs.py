"""`lorafleet logs`: what a run's driver or one of its trials said."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from lorafleet.commands.common import DEFAULT_RUNS, RunName, Runs, say, tell
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.run import Run, RunState

if TYPE_CHECKING:
    from lorafleet.cluster.backend import RunBackend


def logs(
    run: RunName = None,
    trial: Annotated[
        str | None, typer.Argument(metavar="[TRIAL]", help="A trial's id; the driver if left out.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as more is written.")] = False,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Print the log of a run, or the record of one of its trials."""
    from lorafleet.cluster.backends import backend_of
    from lorafleet.cluster.run_index import find_run

    found = find_run(runs, run)
    backend = backend_of(found)
    done: dict[Path, int] = {}
    backend.refresh(found, say)
    looked_at = time.monotonic()
    live = follow and _lives(backend, found)
    while True:
        for line in _new_lines(_files(found, trial), done):
            tell(line.rstrip("\r").rpartition("\r")[2])  # of a bar that draws over itself, its last state
        if not live:
            return
        if time.monotonic() - looked_at > _LOOK_SECONDS:
            live = _lives(backend, found)
            backend.refresh(found, say)
            looked_at = time.monotonic()
        time.sleep(0.5)


_LOOK_SECONDS = 5.0
"""Between two questions whether the run has ended, which may go to a queue."""


def _lives(backend: RunBackend, run: Run) -> bool:
    """Whether more may be written."""
    return backend.look(run).state in (RunState.PENDING, RunState.RUNNING)


def driver_log(run: Run) -> Path:
    """What the driver said; where its own file could not be brought from a cluster, what its pod did."""
    own, pods = run.path / "logs" / "driver.log", run.path / "logs" / "submitter.log"
    return pods if pods.is_file() and not own.is_file() else own


def _files(run: Run, trial: str | None) -> list[Path]:
    """What there is to read now: the jobs of a chain come one after the other."""
    if trial is None:
        jobs = sorted((run.path / "slurm").glob("*.out"), key=lambda path: path.stat().st_mtime)
        parts = [part.path / "logs" / "driver.log" for part in run.parts()]
        return [*jobs, driver_log(run), *parts, run.path / "events.jsonl"]
    matching = [known for known in run.trials() if known.id.startswith(trial)]
    if len(matching) != 1:
        known = ", ".join(known.id for known in matching or run.trials())
        what = f"several trials that begin with {trial!r}" if matching else f"no trial {trial!r}"
        raise RunError(f"{run.id} has {what}; {'they are' if matching else 'it has'} {known or 'none yet'}")
    return [matching[0].path / "metrics.jsonl", matching[0].path / "traceback.txt"]


def _new_lines(files: list[Path], done: dict[Path, int]) -> Iterator[str]:
    for path in files:
        if not path.is_file():  # a pipe would be waited for
            continue
        with path.open(errors="replace") as file:
            file.seek(done.get(path, 0))
            for line in file:
                yield _shown(line.rstrip("\n")) if path.suffix == ".jsonl" else line.rstrip("\n")
            done[path] = file.tell()


def _shown(line: str) -> str:
    """A record as words: `14:03:22 step 42 accuracy 0.743 ...`."""
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
    except (TypeError, ValueError, OverflowError, OSError):  # a line that was damaged
        return line
    return f"{stamp} " + " ".join(f"{key}={_short(value)}" for key, value in row.items() if value is not None)


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
