"""A run that needs no Ray: the driver itself trains, and its numbers are those of a warm actor."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.events import RayEvent
from lorafleet.jobs.runs.run import Run
from tests.conftest import JobMaker, lorafleet, read_step
from tests.processes.conftest import (
    PAIR,
    RANDOM,
    Machines,
    base_loads,
    begin,
    interrupt,
    kill_tree,
    newest,
    save,
    sweep,
    wait_for,
)

SEARCH = (
    RANDOM.replace("num_samples: 8", "num_samples: 5")
    .replace("max_concurrent_trials: 2", "max_concurrent_trials: 1")
    .replace("max_t: 144", "max_t: 288")
)
TIMES = ("seconds", "_per_second", "_gib", "time", "host", "first_gradient_at", "base_loads")
"""Ends of the keys of what is measured, and may differ between two equal trainings."""


def numbers_of(run: Run) -> dict[str, Any]:
    """Every number of a run that does not depend on the machine's speed, and the bytes of its
    weights.
    """
    numbers: dict[str, Any] = {
        str(path.relative_to(run.path)): path.read_bytes()
        for pattern in ("trials/*/adapter/*.safetensors", "**/*predictions-*.jsonl")
        for path in run.path.glob(pattern)
    }
    for pattern in ("trials/*/metrics.jsonl", "**/test.json", "report/base.json"):
        for path in run.path.glob(pattern):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            numbers[str(path.relative_to(run.path))] = [
                {key: value for key, value in json.loads(line).items() if not key.endswith(TIMES)}
                for line in lines
            ]
    numbers["states"] = {trial.id: str(trial.state) for trial in run.list_trials()}
    return numbers


@pytest.mark.parametrize(
    ("command", "search"), [("train", ""), pytest.param("sweep", SEARCH, marks=pytest.mark.long)]
)
def test_the_numbers_are_those_of_a_warm_actor(
    bert_job: JobMaker, place: Path, machines: Machines, command: str, search: str
) -> None:
    loaded = bert_job(search, lora__lora_dropout=0.1, train__eval_steps=4)
    by_driver, done = sweep(loaded, place, command=command)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert by_driver.read_events(RayEvent) == []
    assert not (by_driver.path / "tune").exists()
    assert base_loads(by_driver) == 1
    done = lorafleet(
        command, save(loaded, place), *loaded.overrides, cwd=place, **machines.environment
    )
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    by_actor = newest(place)
    assert by_actor.read_events(RayEvent)
    expected, actual = numbers_of(by_actor), numbers_of(by_driver)
    assert len(actual) >= 6
    assert actual.keys() == expected.keys()
    for name, values in actual.items():
        assert values == expected[name], name


def test_nothing_of_ray_is_started(bert_job: JobMaker, place: Path) -> None:
    """One process trains and evaluates, besides the command and the supervisor of the driver."""
    process = begin(bert_job(train__max_steps=100_000), place, command="train")
    wait_for(lambda: (place / "runs").exists() and list((place / "runs").iterdir()))
    wait_for(lambda: any(read_step(t) > 3 for t in newest(place).list_trials()))
    family = psutil.Process(process.pid).children(recursive=True)
    supervisor, driver = sorted(
        (one for one in family if "exec" in one.cmdline()), key=lambda one: one.create_time()
    )
    assert driver.ppid() == supervisor.pid
    assert newest(place).read_status().pid == driver.pid
    others = [one.name() for one in family if one.pid not in (supervisor.pid, driver.pid)]
    assert not [name for name in others if "ray" in name or "gcs" in name]
    # Imports, not Ray itself: its libraries are never loaded.
    maps = Path(f"/proc/{driver.pid}/maps").read_text()
    assert "libtorch" in maps
    assert "_raylet" not in maps
    interrupt(process)
    process.communicate(timeout=60)


def test_a_driver_saves_and_ends_when_its_supervisor_is_killed(
    bert_job: JobMaker, place: Path
) -> None:
    process = begin(bert_job(train__max_steps=100_000), place, command="train")
    wait_for(lambda: (place / "runs").exists() and list((place / "runs").iterdir()))
    wait_for(lambda: any(read_step(t) > 3 for t in newest(place).list_trials()))
    run = newest(place)
    psutil.Process(psutil.Process(run.read_status().pid).ppid()).kill()
    shown, _ = process.communicate(timeout=60)
    wait_for(lambda: not run.is_alive(), 30)
    assert run.state == "stopped", shown
    (trial,) = run.list_trials()
    assert trial.checkpoint.is_dir()


def test_a_killed_driver_is_not_started_again(bert_job: JobMaker, place: Path) -> None:
    """SIGKILL is how a user ends it for good; `resume` continues, and no retry is spent."""
    loaded = bert_job(train__max_steps=1000, train__eval_steps=200, train__checkpoint_minutes=0.01)
    process = begin(loaded, place, command="train")
    wait_for(lambda: (place / "runs").exists() and list((place / "runs").iterdir()))
    run = newest(place)
    wait_for(lambda: any(t.checkpoint.is_dir() for t in run.list_trials()))
    psutil.Process(run.read_status().pid).kill()
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED, shown
    assert "continue it with `lorafleet resume" in shown
    time.sleep(1)
    assert not run.is_alive()
    done = lorafleet("resume", run.id, cwd=place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    (trial,) = run.list_trials()
    assert trial.state == "finished"
    assert trial.read_status().retries == {}


@pytest.mark.long
def test_a_killed_sweep_has_the_table_of_an_undisturbed_one(
    bert_job: JobMaker, place: Path
) -> None:
    loaded = bert_job(SEARCH.replace("288", "1440"), train__checkpoint_minutes=0.01)
    undisturbed, done = sweep(loaded, place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    process = begin(loaded, place)
    wait_for(lambda: len(list((place / "runs").iterdir())) == 2)
    run = newest(place)
    wait_for(lambda: sum(trial.state.has_ended for trial in run.list_trials()) >= 2)
    kill_tree(process)
    assert not all(trial.state.has_ended for trial in run.list_trials())
    done = lorafleet("resume", run.id, cwd=place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    expected, actual = numbers_of(undisturbed), numbers_of(run)
    assert actual["states"] == expected["states"]
    for name in actual:
        if name.endswith((".safetensors", "test.json")):
            assert actual[name] == expected[name], name


def test_two_trials_at_once_use_ray(bert_job: JobMaker, place: Path) -> None:
    run, done = sweep(bert_job(PAIR.replace("160000", "64")), place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert len(run.read_events(RayEvent)) == 1
