"""One array task a group of trials, and one report."""

from __future__ import annotations

import json

import pytest

from tests.conftest import JobMaker
from tests.slurm.conftest import Login

pytestmark = pytest.mark.ray

GRID = """
search:
  method: grid
  scheduler: {type: none, time_attr: samples, max_t: 512}
  parameters: {train.learning_rate: {values: [1e-4, 1e-3, 1e-2]}}
"""


def test_an_array_and_one_report(login: Login, bert_job: JobMaker) -> None:
    login.write_site(launch="array", array={"trials_per_task": 2, "max_running": 2}, nodes=1)
    path = login.home / "job.yaml"
    job = bert_job(GRID)
    path.write_text(job.text)
    said = login.lorafleet("plan", path, "--on", "rig").stdout
    assert "--array=0-1%2" in said
    run = login.submit(job)
    array, last = (run.path / "slurm" / "jobs").read_text().split()
    status = login.lorafleet("status", run.id).stdout
    assert f"job {array}" in status
    login.when(run, lambda: not login.rig.asked("squeue", "-h"), 300)
    report = json.loads((run.path / "report" / "report.json").read_text())
    assert report["recommendation"]["trial_id"]
    assert [trial.read_params().index for trial in run.list_trials()] == [0, 1, 2]
    assert {str(trial.state) for trial in run.list_trials()} == {"finished"}
    assert not (run.path / "parts").exists()
    assert (
        len(list(run.path.glob("wandb/wandb/offline-run-*"))) == 4
    )  # three trials and the sweep's own
    assert login.rig.asked("scontrol", "show", "job", "-o", last).count("JobState=COMPLETED") == 1
    assert login.left_behind() == []


def test_what_an_array_cannot_do(login: Login, bert_job: JobMaker) -> None:
    login.write_site(launch="array", nodes=1)
    for change, sentence in (
        (
            {"search__scheduler": {"type": "asha", "max_t": 512}},
            "array tasks cannot compare trials at rungs: use scheduler: {type: none}",
        ),
        (
            {"search__method": "random", "search__budget": {"wall_hours": 1}},
            "array tasks do not know what the other",
        ),
        ({"resources__num_nodes": 2}, "an array task runs on one node"),
    ):
        job = bert_job(GRID, **change)
        path = login.home / "job.yaml"
        path.write_text(job.text)
        done = login.lorafleet("sweep", path, *job.overrides, "--on", "rig", check=False)
        assert done.returncode == 2
        assert sentence in done.stderr
    assert not login.runs.exists()
