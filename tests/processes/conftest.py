"""Real sweeps: the command line, real Ray, several workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import rungs
from jobs.load import LoadedJob
from jobs.run import Run
from tests.conftest import lorafleet

pytestmark = pytest.mark.ray


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "processes" in str(item.path):
            item.add_marker(pytest.mark.ray)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder to run in, with a foreign package that must not be imported."""
    folder = tmp_path / "place"
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "__init__.py").write_text("raise SystemExit('a foreign package was imported')")
    yield folder
    for process in psutil.process_iter(["cmdline"]):  # what a failed test may have left
        if any(str(folder) in word for word in process.info["cmdline"] or []):
            process.kill()


def save(loaded: LoadedJob, folder: Path) -> Path:
    """A job as a file in the folder that the command runs in."""
    path = folder / "job.yaml"
    path.write_text(loaded.text)
    return path


def sweep(
    loaded: LoadedJob, place: Path, *words: str, command: str = "sweep"
) -> tuple[Run, subprocess.CompletedProcess[str]]:
    """Run a sweep to its end."""
    done = lorafleet(command, save(loaded, place), *loaded.overrides, *words, cwd=place)
    return newest(place), done


def newest(place: Path) -> Run:
    folders = sorted((place / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    assert folders, "no run was made"
    return Run(folders[-1])


def begin(loaded: LoadedJob, place: Path, *words: str) -> subprocess.Popen[str]:
    """Start a sweep in a process group of its own, as a terminal does."""
    command = [str(Path(sys.executable).with_name("lorafleet")), "sweep", str(save(loaded, place)), *loaded.overrides]
    return subprocess.Popen(
        [*command, *words],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def kill_tree(process: subprocess.Popen[str]) -> None:
    """kill -9 of a process and all that it started."""
    parent = psutil.Process(process.pid)
    for victim in [parent, *parent.children(recursive=True)]:
        victim.kill()
    process.wait()


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C: the terminal signals every process of the group."""
    os.killpg(process.pid, signal.SIGINT)


def base_loads(run: Run) -> int:
    return sum({event["actor"]: event["count"] for event in run.events("base_loaded")}.values())


def check_cuts(run: Run) -> int:
    """Compare every decision at a rung with what the scores recorded until then imply; returns how many there were."""
    plan = json.loads((run.path / "plan.json").read_text())
    metric = plan["job"]["search"]["metric"] or {"name": "accuracy", "goal": "maximize"}
    eta = plan["job"]["search"]["scheduler"]["reduction_factor"]
    rows = [
        (row["time"], row["rung"], row[metric["name"]], row["loss"])
        for trial in run.trials()
        for row in trial.metrics()
        if row.get("rung") is not None
    ]
    events = run.events("rung")
    for event in events:
        recorded = [
            rungs.place(score, loss, metric["goal"])
            for when, rung, score, loss in rows
            if rung == event["rung"] and when <= event["time"]
        ]
        own = rungs.place(event["score"], event["loss"], metric["goal"])
        assert own in recorded
        assert len(recorded) == event["scores"]
        assert event["goes_on"] == rungs.goes_on(own, recorded, eta)
    stopped = {trial.id for trial in run.trials() if trial.state == "stopped"}
    assert stopped == {event["trial_id"] for event in events if not event["goes_on"]}
    assert len({(event["trial_id"], event["rung"]) for event in events}) == len(events)  # none was made twice
    return len(events)
