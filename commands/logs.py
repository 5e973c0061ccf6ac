"""`lorafleet logs`: what a run's driver or one of its trials said."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from commands.common import DEFAULT_RUNS, RunName, Runs


def logs(
    run: RunName = None,
    trial: Annotated[
        str | None, typer.Argument(metavar="[TRIAL]", help="A trial's id; the driver if left out.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as more is written.")] = False,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Print the log of a run, or the record of one of its trials."""
    from cluster.store import find_run
    from jobs.errors import RunError

    found = find_run(runs, run)
    if trial is None:
        jobs = sorted((found.path / "slurm").glob("*.out"), key=lambda path: path.stat().st_mtime)
        parts = [part.path / "logs" / "driver.log" for part in found.parts()]
        files = [*jobs, found.path / "logs" / "driver.log", *parts, found.path / "events.jsonl"]
    else:
        matching = [known for known in found.trials() if known.id.startswith(trial)]
        if len(matching) != 1:
            known = ", ".join(known.id for known in matching or found.trials())
            what = f"several trials that begin with {trial!r}" if matching else f"no trial {trial!r}"
            raise RunError(f"{found.id} has {what}; {'they are' if matching else 'it has'} {known or 'none yet'}")
        files = [matching[0].path / "metrics.jsonl", matching[0].path / "traceback.txt"]
    done: dict[Path, int] = {}
    while True:
        for line in _new_lines(files, done):
            typer.echo(line)
        if not follow or not found.alive():
            return
        time.sleep(0.5)


def _new_lines(files: list[Path], done: dict[Path, int]) -> Iterator[str]:
    for path in files:
        if not path.exists():
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
    except json.JSONDecodeError:
        return line
    if not isinstance(row, dict):
        return line
    row.pop("schema_version", None)
    for name in ("intervals", "first_gradient_at"):
        row.pop(name, None)
    stamp = time.strftime("%H:%M:%S", time.localtime(row.pop("time", 0)))
    return f"{stamp} " + " ".join(f"{key}={_short(value)}" for key, value in row.items() if value is not None)


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
