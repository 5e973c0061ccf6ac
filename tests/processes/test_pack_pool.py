"""Packs on several machines: raylets on this one, each with a CPU core of its own.

Where each machine has GPUs, the same processes train, one on each GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.events import NoteEvent
from lorafleet.jobs.runs.run import Run
from tests.conftest import JobMaker, lorafleet
from tests.processes.conftest import Machines, begin, newest, save, sweep, wait_for
from tests.processes.test_nodes import drain, log
from tests.processes.test_packed import assert_same_results, read_scores

SEARCH = """
search:
  num_samples: 9
  keep: 9
  scheduler: {type: asha, mode: synchronous, max_t: 288, reduction_factor: 3}
  parameters:
    lora.lora_r: {values: [2, 4, 8]}
    lora.lora_dropout: {values: [0.0, 0.2]}
    train.learning_rate: {distribution: log_uniform_values, min: 5e-4, max: 3e-3}
"""
"""Its decisions do not depend on which trial comes first. With larger learning rates, so many steps
make a visible difference of rounding (seen: 5e-7 after 288 rows, 5e-2 after 864).
"""


def read_processes(run: Run) -> set[str | None]:
    """The processes that have trained."""
    return {row.host for trial in run.list_trials() for row in trial.read_metrics()}


def find_busy_processes() -> list[int]:
    """Processes that are training a pack; Ray writes what an actor does into its title."""
    done = subprocess.run(
        ["pgrep", "-f", "^ray::PackWorker.step"], capture_output=True, text=True, check=False
    )
    return [int(word) for word in done.stdout.split()]


def find_machine(machines: Machines, process: int) -> Any:
    """The machine of a process: its raylet is the parent."""
    parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    command = Path(f"/proc/{parent}/cmdline").read_text()
    return next(
        node for node in machines.workers if node.unique_id in command or node.node_id in command
    )


def notes(run: Run) -> str:
    return " ".join(note.sentence for note in run.read_events(NoteEvent))


def test_packs_on_three_machines_decide_as_one_trial_after_another(
    bert_job: JobMaker, place: Path, machines: Machines
) -> None:
    search = SEARCH.replace("288", "864")
    loaded = bert_job(search, resources__pack=3)
    path = save(loaded, place)
    planned = lorafleet("plan", path, *loaded.overrides, cwd=place, **machines.environment)
    assert planned.returncode == ExitCode.OK, planned.stderr
    text = " ".join(planned.stdout.split())
    assert "up to 3 trials at once in each of 3 processes, with 1 CPU core and 0 GPUs;" in text
    assert "packing in each of 3 processes, 3 trials share a base, limited by trials" in text
    done = lorafleet("sweep", path, *loaded.overrides, cwd=place, **machines.environment)
    run = newest(place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr + log(run)
    # The first begins while the others still import their libraries.
    assert len(read_processes(run)) >= 2
    assert {row.pack for trial in run.list_trials() for row in trial.read_metrics()} == {3}
    assert "trains up to 3 trials at once (resources.pack)" in notes(run)
    assert machines.left() == []
    report = lorafleet("report", run.id, "--format", "json", cwd=place, check=True)
    assert '"test"' in report.stdout  # the finalists were evaluated on held-out rows
    alone, done = sweep(bert_job(search, search__max_concurrent_trials=1), place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert_same_results(run, alone)


@pytest.mark.parametrize("loss", ["killed", "drained"])
@pytest.mark.long
def test_a_lost_pack_costs_no_result(
    loss: str, bert_job: JobMaker, place: Path, machines: Machines
) -> None:
    """One process is killed, or its machine leaves after a notice: its trials go on elsewhere."""
    loaded = bert_job(
        SEARCH.replace("288", "2880"), resources__pack=3, train__checkpoint_minutes=0.01
    )
    process = begin(loaded, place, **machines.environment)
    wait_for(lambda: (place / "runs").exists() and list((place / "runs").iterdir()))
    run = newest(place)
    busy = wait_for(lambda: find_busy_processes() if len(find_busy_processes()) > 1 else [], 300)
    if loss == "killed":
        os.kill(busy[0], signal.SIGKILL)
    else:
        drain(machines, find_machine(machines, busy[0]))
    shown, _ = process.communicate(timeout=900)
    assert process.returncode == ExitCode.OK, shown + log(run)
    retries: list[dict[str, Any]] = [trial.read_status().retries for trial in run.list_trials()]
    if loss == "killed":
        assert "they were continued one at a time" in notes(run)
        assert not any(retries)
    else:
        assert {"preempted": 1} in retries
        assert all(one in ({}, {"preempted": 1}) for one in retries)
    expected, done = sweep(
        bert_job(SEARCH.replace("288", "2880"), search__max_concurrent_trials=1), place
    )
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert_same_results(run, expected, keys=("loss",))


@pytest.mark.long
def test_packs_stop_and_go_on(bert_job: JobMaker, place: Path, machines: Machines) -> None:
    loaded = bert_job(
        SEARCH.replace("288", "2880"), resources__pack=3, train__checkpoint_minutes=0.01
    )
    process = begin(loaded, place, **machines.environment)
    wait_for(lambda: (place / "runs").exists() and list((place / "runs").iterdir()))
    run = newest(place)
    wait_for(lambda: sum(bool(rows) for rows in read_scores(run).values()) >= 2, 300)
    assert lorafleet("stop", run.id, cwd=place).returncode == ExitCode.OK
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == ExitCode.INTERRUPTED, shown + log(run)
    assert machines.left() == []
    done = lorafleet("resume", run.id, cwd=place, **machines.environment)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    expected, done = sweep(
        bert_job(SEARCH.replace("288", "2880"), search__max_concurrent_trials=1), place
    )
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert_same_results(run, expected, keys=("loss",))
    assert not any(trial.read_status().retries for trial in run.list_trials())
