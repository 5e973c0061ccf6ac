"""Sweeps whose trials are trained together in one process, against the same trials alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.events import NoteEvent, RayEvent, RungEvent
from lorafleet.jobs.runs.run import Run, TrialState
from tests.conftest import JobMaker, lorafleet
from tests.processes.conftest import (
    base_loads,
    begin,
    kill_tree,
    newest,
    planted,
    save,
    sweep,
    wait_for,
)

SEARCH = """
search:
  num_samples: 9
  keep: 9
  scheduler: {type: asha, max_t: 288, reduction_factor: 3}
  parameters:
    lora.lora_r: {values: [2, 4, 8]}
    lora.lora_dropout: {values: [0.0, 0.2]}
    train.learning_rate: {distribution: log_uniform_values, min: 1e-3, max: 3e-2}
"""
ALONE = {"search__max_concurrent_trials": 1}
"""One trial after another, in the driver's own process."""


def read_scores(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Evaluations of each trial."""
    return {
        trial.id: [row.to_dict() for row in trial.read_metrics() if row.evaluated]
        for trial in run.list_trials()
    }


def assert_same_results(
    packed: Run, alone: Run, keys: tuple[str, ...] = ("loss", "train_loss")
) -> None:
    """The same trials with the same decisions, and scores that differ by rounding alone.

    Args:
        keys: The training loss is a mean since the last report, or since a restart.
    """
    states = {trial.id: trial.state for trial in alone.list_trials()}
    assert {trial.id: trial.state for trial in packed.list_trials()} == states
    assert TrialState.STOPPED in states.values()
    decisions = [
        {(event.trial_id, event.rung): event.goes_on for event in run.read_events(RungEvent)}
        for run in (packed, alone)
    ]
    assert decisions[0] == decisions[1]
    expected = read_scores(alone)
    for trial_id, rows in read_scores(packed).items():
        assert len(rows) == len(expected[trial_id])
        for row, other in zip(rows, expected[trial_id], strict=True):
            for key in ("step", "samples", "rung", "tokens", "trainable_parameters"):
                assert row.get(key) == other.get(key), key
            for key in keys:
                assert math.isclose(row[key], other[key], rel_tol=1e-3), (trial_id, key)


@pytest.mark.parametrize(
    "task", [pytest.param("classification", marks=pytest.mark.long), "generation"]
)
def test_a_packed_sweep_decides_as_one_trial_after_another(
    task: str, bert_job: JobMaker, llama_job: JobMaker, place: Path
) -> None:
    make = bert_job if task == "classification" else llama_job
    packed, done = sweep(make(SEARCH, resources__pack=4), place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert packed.read_events(RayEvent) == []
    assert base_loads(packed) == 1
    record = packed.read_pack()
    assert record is not None
    assert record.trials == 4
    alone, done = sweep(make(SEARCH, **ALONE), place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert alone.read_pack() is None
    assert_same_results(packed, alone)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Run]:
    """Kept between the tests of this module: the packed sweep to which nothing happened."""
    return {}


FAULTS = {
    "out of memory": ("PackedGroup._backward", "oom", 100),
    "a crash": ("PackedGroup._backward", "crash", 100),
    "a GPU that fails": ("PackedGroup._backward", "device", 100),
    "an error at a trial's begin": ("PackedGroup.enter", "oom", 8),
    "a crash while it is measured": ("PackedGroup.copy", "crash", 3),
}
"""Fault -> the function in whose call, how, and the number of the call.

The first calls measure the speed of a pack: at most 63 micro-batches.
"""


@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.long
def test_what_happens_to_a_pack_changes_no_result(
    what: str, bert_job: JobMaker, place: Path, undisturbed: dict[str, Run]
) -> None:
    loaded = bert_job(SEARCH.replace("288", "1440"), resources__pack=4)
    if not undisturbed:
        undisturbed["run"], done = sweep(loaded, place)
        assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    function, act, call = FAULTS[what]
    fault = planted(place, f"lorafleet.training.packed.group:{function}", act, call=call)
    process = begin(loaded, place, **fault)
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == ExitCode.OK, shown
    run = newest(place)
    assert (place / "it-happened").exists()
    assert_same_results(run, undisturbed["run"], keys=("loss",))
    notes = " ".join(note.sentence for note in run.read_events(NoteEvent))
    retries = [trial.read_status().retries for trial in run.list_trials()]
    if function == "PackedGroup.copy":
        assert "the process died while 4 trials were measured" in notes
    elif act == "oom":
        assert "did not fit into memory together" in notes or {"oom": 1} in retries
    else:
        assert "they were continued one at a time" in notes
        assert not any(retries)
        assert any(trial.read_status().trains_alone for trial in run.list_trials())


@pytest.mark.long
def test_a_killed_pack_has_the_table_of_an_undisturbed_one(bert_job: JobMaker, place: Path) -> None:
    loaded = bert_job(
        SEARCH.replace("288", "1440"), resources__pack=4, train__checkpoint_minutes=0.01
    )
    expected, done = sweep(loaded, place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    process = begin(loaded, place)
    wait_for(lambda: len(list((place / "runs").iterdir())) == 2)
    run = newest(place)
    wait_for(lambda: sum(trial.state.has_ended for trial in run.list_trials()) >= 2)
    kill_tree(process)
    assert not all(trial.state.has_ended for trial in run.list_trials())
    done = lorafleet("resume", run.id, cwd=place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert_same_results(run, expected, keys=("loss",))
    assert not any(trial.read_status().retries for trial in run.list_trials())


def test_a_pack_that_gains_nothing_is_not_packed(bert_job: JobMaker, place: Path) -> None:
    """A micro-batch that keeps a CPU busy alone: the plan says so, and Ray's processes train."""
    loaded = bert_job(
        SEARCH.replace("num_samples: 9", "num_samples: 2"),
        resources__pack="auto",
        train__per_device_train_batch_size=64,
        search__scheduler__max_t=64,
    )
    planned = lorafleet(
        "plan", save(loaded, place), *loaded.overrides, cwd=place, check=True
    ).stdout
    assert "packing         none: a micro-batch has about" in planned
    assert "above 160 a CPU gains nothing" in " ".join(planned.split())
