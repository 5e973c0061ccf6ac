"""Sweeps and trainings through a real queue: real Slurm, real Ray on every node, real training."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from lorafleet.jobs.runs.events import AttemptEvent, RayLeftEvent
from lorafleet.jobs.runs.run import Run
from tests.conftest import JobMaker, read_step
from tests.slurm.conftest import PLANTED, Login

pytestmark = pytest.mark.ray

SEARCH = """
search:
  method: random
  num_samples: 8
  scheduler: {type: asha, time_attr: samples, max_t: 16384, grace_period: 2048, reduction_factor: 2}
  parameters:
    lora.lora_r: {values: [2, 4]}
    train.learning_rate: {distribution: log_uniform_values, min: 1e-4, max: 1e-2}
"""


def hosts(run: Run) -> set[str]:
    return {
        row.host.partition(":")[0]
        for trial in run.list_trials()
        for row in trial.read_metrics()
        if row.host is not None
    }


def text_of(folder: Path) -> str:
    return "".join(
        path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()
    )


def test_a_sweep_over_two_nodes(login: Login, bert_job: JobMaker) -> None:
    # trials that last longer than the time by which one node may be up before the other
    run = login.submit(bert_job(SEARCH.replace("grace_period: 2048", "grace_period: 8192")))
    assert f"job {login.job(run)} " in login.lorafleet("status", run.id).stdout
    tokens = f"cat {login.rig.local}/lf-*-job/token 2>/dev/null"
    token = login.when(run, lambda: login.rig.on(1, "sh", "-c", tokens, check=False)).strip()
    log = run.path / "slurm" / f"{login.job(run)}.out"
    login.when(run, lambda: "Ray is up" in log.read_text())
    host, port = re.search(r"nodes at ([\d.]+):(\d+)", log.read_text()).groups()  # type: ignore[union-attr]
    version = f"http://{host}:{int(port) + 7}/api/version"
    asked = ("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}")
    assert login.rig.on(1, *asked, version) == "401"
    assert login.rig.on(1, *asked, "-H", f"Authorization: Bearer {token}", version) == "200"
    login.when(run, lambda: any(trial.read_metrics() for trial in run.list_trials()))
    said = login.rig.asked("scontrol", "write", "batch_script", login.job(run), "-")
    said += login.rig.asked("scontrol", "show", "job", "-dd", login.job(run))
    said += "".join(line for number in login.rig.parents for line in login.rig.processes(number))
    said += login.rig.on(
        1, "sh", "-c", f"cat {login.rig.local}/lf-*/r/session_latest/logs/*", check=False
    )
    assert "ray::" in said
    assert login.ended(run).state == "COMPLETED"
    assert hosts(run) == {"node1", "node2"}
    report = json.loads((run.path / "report" / "report.json").read_text())
    assert report["recommendation"]["trial_id"]
    assert len(report["trials"]) == 8
    said += text_of(run.path)
    assert len(token) == 64
    assert token not in said
    assert PLANTED not in said
    assert login.left_behind() == []
    assert "finished" in login.lorafleet("status", run.id).stdout


@pytest.mark.long
def test_trials_of_two_nodes_and_what_they_leave(login: Login, bert_job: JobMaker) -> None:
    search = (
        SEARCH.replace("num_samples: 8", "num_samples: 3")
        .replace("16384", "2048")
        .replace("grace_period: 2048", "grace_period: 256")
    )
    run = login.submit(bert_job(search, resources__num_nodes=2))
    assert login.ended(run, 400).state == "COMPLETED"
    lasts = [trial.read_metrics()[-1] for trial in run.list_trials()]
    assert {row.nodes for row in lasts} == {2}
    assert "stopped" in {str(trial.state) for trial in run.list_trials()}
    assert [event.placement_groups for event in run.read_events(RayLeftEvent)] == [0]
    assert login.left_behind() == []


def test_a_driver_that_fails(login: Login, bert_job: JobMaker) -> None:
    job = bert_job()
    rows = login.home / "rows.jsonl"
    rows.write_text(Path(job.job.data.train_file or "").read_text())
    login.write_site(
        setup=[f"rm -f {rows}", f"export PATH={login.command()[0].rpartition('/')[0]}:$PATH"]
    )
    path = login.home / "job.yaml"
    path.write_text(job.text)
    done = login.lorafleet(
        "train", path, f"data.train_file={rows}", "--on", "rig", "--wait", check=False
    )
    assert done.returncode == 2
    assert "rows.jsonl" in done.stderr
    (run,) = [Run(folder) for folder in login.runs.iterdir()]
    record = login.ended(run)
    assert (record.state, record.exit_code) == ("FAILED", 2)
    said = login.lorafleet("status", run.id).stdout
    assert "rows.jsonl" in said
    assert "failed" in said
    assert login.left_behind() == []


def test_ray_that_does_not_start(login: Login, bert_job: JobMaker) -> None:
    """`ray start` fails on one node alone: the job ends in seconds and says where and why."""
    login.wrap(
        "ray", '[ "$(uname -n)" != node2 ] || { echo "no such GPU"; exit 3; }\nexec PROGRAM "$@"'
    )
    run = login.submit(bert_job(SEARCH))
    record = login.ended(run, 90)
    assert (record.state, record.exit_code) == ("FAILED", 71)
    assert "node2: Ray ended with code 3" in login.lorafleet("status", run.id).stdout
    assert login.left_behind() == []


@pytest.mark.parametrize(
    ("lines", "code", "sentence"),
    [
        (
            ["source /nowhere/bin/activate"],
            70,
            "the setup line `source /nowhere/bin/activate` failed with code 1: ",
        ),
        (
            ["echo 'no such module: cuda/99' >&2; exit 3"],
            3,
            "; exit 3` ended the job with code 3: no such module: cuda/99",
        ),
    ],
)
def test_a_setup_line_that_fails_is_named(
    login: Login, bert_job: JobMaker, lines: list[str], code: int, sentence: str
) -> None:
    login.write_site(setup=lines)
    run = login.submit(bert_job(SEARCH))
    record = login.ended(run, 60)
    assert (record.state, record.exit_code) == ("FAILED", code)
    said = " ".join(login.lorafleet("status", run.id).stdout.split())
    assert sentence in said
    assert login.left_behind() == []


def test_a_gpu_of_the_site_file_that_is_missing_ends_the_job(
    login: Login, bert_job: JobMaker
) -> None:
    """Slurm gives the job a GPU, and the node shows none."""
    login.write_site(gpus_per_node=1)
    run = login.submit(bert_job(SEARCH, resources__device="cpu"))
    record = login.ended(run, 60)
    assert (record.state, record.exit_code) == ("FAILED", 70)
    said = " ".join(login.lorafleet("status", run.id).stdout.split())
    assert "node1 has no GPU (nvidia-smi is missing, fails, or lists no visible GPU), but" in said
    assert run.list_trials() == []
    done = login.lorafleet("doctor", "--on", "rig", check=False)
    assert done.returncode != 0
    assert "node1 has no GPU" in " ".join((done.stdout + done.stderr).split())


def test_nodes_that_differ(login: Login, bert_job: JobMaker) -> None:
    """One node has another torch: one sentence names it, before Ray is started."""
    change = """sed -e 's/"torch":"/"torch":"9/'"""
    look = '[ "$(uname -n) $1 $2" = "node2 node look" ]'
    login.wrap("lorafleet", f'if {look}; then PROGRAM "$@" | {change}; else exec PROGRAM "$@"; fi')
    run = login.submit(bert_job(SEARCH))
    record = login.ended(run, 60)
    assert (record.state, record.exit_code) == ("FAILED", 70)
    assert re.search(
        r"node2 has torch 9\S+, but node1 has", login.lorafleet("status", run.id).stdout
    )


@pytest.mark.long
def test_two_sweeps_at_once_on_the_same_nodes(login: Login, bert_job: JobMaker) -> None:
    search = SEARCH.replace("num_samples: 8", "num_samples: 3")
    first, second = login.submit(bert_job(search)), login.submit(bert_job(search))
    login.when(second, lambda: login.record(first).state == login.record(second).state == "RUNNING")
    for run in (first, second):
        assert login.ended(run, 400).state == "COMPLETED"
        assert json.loads((run.path / "report" / "report.json").read_text())["recommendation"][
            "trial_id"
        ]
    assert login.left_behind() == []


def test_two_attempts_at_one_run(login: Login, bert_job: JobMaker) -> None:
    run = login.submit(bert_job(train__max_steps=4000), command="train")
    login.when(run, lambda: any(read_step(trial) for trial in run.list_trials()))
    refused = login.lorafleet("resume", run.id, check=False)
    assert refused.returncode == 2
    assert "runs on node" in refused.stderr
    began = time.monotonic()
    again = login.lorafleet("exec", run.path, check=False)  # on the login node: another machine
    assert again.returncode == 2
    assert "already has a driver, which is still running (node1, job" in again.stderr
    assert time.monotonic() - began < 45
    login.lorafleet("stop", run.id)
    record = login.ended(run)
    assert (record.state, record.exit_code) == ("FAILED", 130)
    assert "stopped" in login.lorafleet("status", run.id).stdout
    assert len(run.read_events(AttemptEvent)) == 1


def test_what_is_not_in_the_cache_is_not_submitted(login: Login, bert_job: JobMaker) -> None:
    path = login.home / "job.yaml"
    path.write_text(bert_job().text)
    done = login.lorafleet(
        "train", path, "model.model_name_or_path=org/name", "--on", "rig", check=False
    )
    assert done.returncode == 2
    assert "org/name, which is not on this machine" in done.stderr
    assert "`lorafleet fetch" in done.stderr
    assert list(login.runs.glob("*")) == []


@pytest.mark.long
def test_a_head_of_its_own(login: Login, bert_job: JobMaker) -> None:
    """A heterogeneous job: the driver and Ray's head on one machine, every trial on the other."""
    # The rig's GPUs are device files without a driver: a program stands in for its tool.
    login.wrap("nvidia-smi", "echo 'Stand-in, 81559, 580.1'")
    setup = [f"export PATH={login.home / 'bin'}:{Path(sys.executable).parent}:$PATH"]
    login.write_site(nodes=1, head={"cpus": 1, "memory_gb": 2}, gpus_per_node=1, setup=setup)
    run = login.submit(bert_job(SEARCH, resources__device="cpu"))
    assert login.ended(run).state == "COMPLETED"
    assert hosts(run) == {"node2"}
    assert run.read_status().host == "node1"
    assert login.left_behind() == []


@pytest.mark.long
def test_packs_on_two_nodes(login: Login, bert_job: JobMaker) -> None:
    """A process on each node trains several trials at once, on the cores of the node."""
    search = SEARCH.replace("16384", "2048").replace("grace_period: 2048", "grace_period: 1024")
    run = login.submit(bert_job(search, resources__pack=4))
    assert login.ended(run).state == "COMPLETED"
    rows = [row for trial in run.list_trials() for row in trial.read_metrics()]
    assert {row.pack for row in rows} == {4}
    assert hosts(run) == {"node1", "node2"}
    assert len({row.host for row in rows}) == 2
    report = json.loads((run.path / "report" / "report.json").read_text())
    assert report["recommendation"]["trial_id"]
    assert len(report["trials"]) == 8
