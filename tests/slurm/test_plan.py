"""Plans of jobs on Slurm: script, job array, speed and unused resources."""

from __future__ import annotations

import json

import pytest

from tests.conftest import JobMaker
from tests.slurm.conftest import Login
from tests.slurm.test_launch import SEARCH

pytestmark = pytest.mark.ray


def test_a_plan_is_folded_and_measured(login: Login, bert_job: JobMaker) -> None:
    path = login.home / "job.yaml"
    path.write_text(bert_job(SEARCH).text)
    folded = login.lorafleet("plan", path, "--on", "rig").stdout
    lines = folded.splitlines()
    (script,) = [line for line in lines if line.startswith("script ")]
    assert "job.sbatch (" in script
    assert "node.sh (" in script
    assert f"{'':<16}#SBATCH --nodes=2" in lines
    assert "set -uo pipefail" not in folded
    assert "\nduration " not in folded
    whole = login.lorafleet("plan", path, "--on", "rig", "--script").stdout
    assert "----- node.sh" in whole
    assert "set -uo pipefail" in whole

    probed = login.lorafleet("plan", path, "--on", "rig", "--probe", "--format", "json")
    assert "job " in probed.stderr  # that it waits or runs
    plan = json.loads(probed.stdout)
    assert 0 < plan["rate"]["seconds_per_row"] < 1
    assert "steps of the first trial just now" in plan["rate"]["source"]
    assert list(login.runs.glob("*")) == []
    assert login.left_behind() == []


def test_idle_nodes_and_cores_are_named(login: Login, bert_job: JobMaker) -> None:
    path = login.home / "job.yaml"
    path.write_text(bert_job(SEARCH.replace("num_samples: 8", "num_samples: 1")).text)
    output = " ".join(login.lorafleet("plan", path, "--on", "rig").stdout.split())
    assert (
        "unused 1 of 2 machines stays idle, because there is only one trial: request 1 with "
        "--nodes 1" in output
    )


def test_an_array_is_tested_and_counted(login: Login, bert_job: JobMaker) -> None:
    login.write_site(launch="array", array={"trials_per_task": 1, "max_running": 3}, nodes=1)
    rates = [round(1e-5 * number, 5) for number in range(1, 1003)]
    grid = f"""
search:
  method: grid
  scheduler: {{type: none, time_attr: samples, max_t: 512}}
  parameters: {{train.learning_rate: {{values: {rates}}}}}
"""
    path = login.home / "job.yaml"
    path.write_text(bert_job(grid).text)
    done = login.lorafleet("plan", path, "--on", "rig", check=False)
    assert done.returncode == 3
    assert (
        "the job array would have 1,002 tasks, but Slurm's MaxArraySize allows 1,001: raise "
        "array.trials_per_task of site rig from 1 to 2 or more" in " ".join(done.stderr.split())
    )
    login.write_site(launch="array", array={"trials_per_task": 4, "max_running": 3}, nodes=1)
    planned = login.lorafleet("plan", path, "--on", "rig")
    output = " ".join(planned.stdout.split())
    assert "2 trials in parallel in each of 251 array tasks (3 at once)" in output
    assert "2 waves if no trial is stopped early" in output
    assert "job 251 array tasks and a job that merges them, on site rig" in output
