"""Sweeps whose trials are trained together in one process, against the same trials alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.events import RayEvent, RungEvent
from lorafleet.jobs.runs.run import Run, TrialState
from tests.conftest import JobMaker
from tests.processes.conftest import base_loads, sweep

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


def assert_same_results(packed: Run, alone: Run) -> None:
    """The same trials with the same decisions, and scores that differ by rounding alone."""
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
            for key in ("loss", "train_loss"):
                assert math.isclose(row[key], other[key], rel_tol=1e-3), (trial_id, key)


@pytest.mark.parametrize("task", ["classification", "generation"])
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
