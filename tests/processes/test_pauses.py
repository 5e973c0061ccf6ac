"""Searches whose trials pause at rungs, with every kind of host."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.events import PauseEvent, RayEvent, RungEvent
from lorafleet.jobs.runs.run import Run, TrialState
from tests.conftest import JobMaker, lorafleet
from tests.processes.conftest import begin, kill_tree, newest, sweep, wait_for

SEARCH = """
search:
  num_samples: 7
  keep: 7
  scheduler: {type: asha, mode: synchronous, max_t: 288, reduction_factor: 2, grace_period: 72}
  parameters:
    lora.lora_r: {values: [2, 4, 8]}
    train.learning_rate: {distribution: log_uniform_values, min: 1e-3, max: 3e-2}
"""
ALONE = {"search__max_concurrent_trials": 1}
PACKED = {"resources__pack": 3}


def read_states(run: Run) -> dict[str, TrialState]:
    return {trial.id: trial.state for trial in run.list_trials()}


def count_finished(run: Run) -> int:
    return list(read_states(run).values()).count(TrialState.FINISHED)


def test_synchronous_halving_decides_alike_however_trials_run(
    bert_job: JobMaker, place: Path
) -> None:
    """Two at once with Ray, three in a pack: 7 trials, of which 3 pass a rung, and of them 1."""
    with_ray, done = sweep(bert_job(SEARCH, search__max_concurrent_trials=2), place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert with_ray.read_events(RayEvent)
    packed, done = sweep(bert_job(SEARCH, **PACKED), place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert packed.read_events(RayEvent) == []
    assert read_states(packed) == read_states(with_ray)
    assert count_finished(packed) == 1
    for run in (with_ray, packed):
        passed = [event.rung for event in run.read_events(RungEvent) if event.goes_on]
        assert passed == [0, 0, 0, 1]
        assert len(run.read_events(PauseEvent)) == 7 + 3


@pytest.mark.parametrize("hosts", [ALONE, pytest.param(PACKED, marks=pytest.mark.long)])
def test_a_killed_search_promotes_what_was_paused(
    bert_job: JobMaker, place: Path, hosts: dict[str, object]
) -> None:
    loaded = bert_job(
        SEARCH.replace("synchronous", "promote").replace("288", "1440"),
        train__checkpoint_minutes=0.01,
        **hosts,
    )
    process = begin(loaded, place)
    wait_for(lambda: (place / "runs").exists() and list((place / "runs").iterdir()))
    run = newest(place)
    wait_for(lambda: len(run.read_events(PauseEvent)) >= 2)
    kill_tree(process)
    assert TrialState.PAUSED in read_states(run).values()
    done = lorafleet("resume", run.id, cwd=place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert set(read_states(run).values()) == {TrialState.FINISHED, TrialState.STOPPED}
    for trial in run.list_trials():
        steps = [row.step for row in trial.read_metrics()]
        assert steps == sorted(set(steps))


@pytest.mark.long
def test_groups_of_processes_pause(bert_job: JobMaker, place: Path) -> None:
    run, done = sweep(
        bert_job(SEARCH, resources__workers_per_node=2, train__per_device_train_batch_size=4), place
    )
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert count_finished(run) == 1
    assert len(run.read_events(PauseEvent)) == 7 + 3
