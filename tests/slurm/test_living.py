"""What a scheduler does to jobs, and that the same sweep goes on: nothing that ended is trained
again.
"""

from __future__ import annotations

import json
import re
import signal
from collections import Counter

import pytest

from lorafleet.jobs import files
from lorafleet.jobs.runs.events import AttemptEvent
from lorafleet.jobs.runs.run import Run, RunState
from tests.conftest import JobMaker, read_step
from tests.slurm.conftest import Login

pytestmark = pytest.mark.ray

GRID = """
search:
  method: grid
  scheduler: {type: none, time_attr: samples, max_t: 5000}
  parameters: {train.learning_rate: {values: [1e-4, 1e-3, 3e-3, 1e-2]}}
"""


def begun(login: Login, bert_job: JobMaker, *words: str, site: str = "rig") -> Run:
    """A sweep of which a trial has ended, and others train and have saved."""
    job = bert_job(GRID, train__checkpoint_minutes=0.02, search__max_concurrent_trials=2)
    run = login.submit(job, *words, site=site)
    login.when(run, lambda: any(trial.state.has_ended for trial in run.list_trials()))
    login.when(
        run,
        lambda: any((trial.checkpoint / "checksums.json").is_file() for trial in run.list_trials()),
    )
    return run


def record_of_ended(run: Run) -> dict[str, bytes]:
    return {
        trial.id: (trial.path / "metrics.jsonl").read_bytes()
        for trial in run.list_trials()
        if trial.state.has_ended
    }


def check_whole(run: Run, before: dict[str, bytes]) -> None:
    """Every step once, in order, and what had ended byte for byte as it was."""
    assert before
    after = record_of_ended(run)
    assert {name: after[name] for name in before} == before
    check_steps(run)


def check_steps(run: Run) -> None:
    """Every step of all four trials once, in order, and a decision."""
    assert len(record_of_ended(run)) == 4
    for trial in run.list_trials():
        steps = [row.step for row in trial.read_metrics()]
        assert steps == sorted(set(steps)), trial.id
    report = json.loads((run.path / "report" / "report.json").read_text())
    assert report["recommendation"]["trial_id"]


def check_wandb(run: Run) -> None:
    """One record a trial, whole: a requeued one replaced what the first attempt had left."""
    names = Counter(
        folder.name.rpartition("-")[2] for folder in run.path.glob("wandb/wandb/offline-run-*")
    )
    assert {trial.id for trial in run.list_trials()} <= set(names)
    assert set(names.values()) == {1}


@pytest.mark.long
def test_a_preemption_with_notice(login: Login, bert_job: JobMaker) -> None:
    login.write_site(partition="low")
    run = begun(login, bert_job)
    before = record_of_ended(run)
    job = login.job(run)
    urgent = login.rig.sbatch("sleep 5", "--partition=main", "--nodes=2", "--exclusive")
    login.when(
        run, lambda: "back into the queue" in (run.path / "slurm" / f"{job}.out").read_text()
    )
    before |= record_of_ended(run)
    said = login.lorafleet("status", run.id).stdout
    assert "pending" in said or "is being requeued" in said
    login.start_now(run)
    login.rig.asked("scontrol", "update", f"jobid={urgent}", "TimeLimit=1")
    record = login.ended(run)
    # Slurm since 24.11 would start it once more, since it was preempted before. 24.11 itself, that
    # of trixie, keeps the earlier preemption as its state.
    state = "PREEMPTED" if "trixie" in str(login.rig.root) else "COMPLETED"
    assert (record.state, record.restarts) == (state, 1)
    assert run.state == "finished"
    check_whole(run, before)
    check_wandb(run)
    (remark,) = run.list_remarks()
    assert remark == f"Slurm started job {job} again (restart 1): it was preempted, after saving"
    assert login.left_behind() == []


@pytest.mark.long
def test_requeued_without_notice(login: Login, bert_job: JobMaker) -> None:
    run = begun(login, bert_job)
    before = record_of_ended(run)
    login.rig.asked("scontrol", "requeue", login.job(run))
    login.start_now(run)
    before |= record_of_ended(run)
    assert login.ended(run).state == "COMPLETED"
    check_whole(run, before)
    check_wandb(run)
    assert "restart 1): it was killed" in run.list_remarks()[0]
    assert login.left_behind() == []


@pytest.mark.long
def test_the_time_limit(login: Login, bert_job: JobMaker) -> None:
    login.write_site(time_limit="3:00")
    run = login.submit(bert_job(GRID.replace("5000", "60000"), search__max_concurrent_trials=2))
    login.start_now(run)
    saved = {
        path: files.read_jsonl(path)
        for path in (trial.path / "metrics.jsonl" for trial in run.list_trials())
    }
    assert login.ended_however_often(run).state == "COMPLETED"
    check_steps(run)
    assert any(saved.values())
    for path, rows in saved.items():  # nothing that had been trained was trained again
        assert files.read_jsonl(path)[: len(rows)] == rows
    assert "it reached its time limit, after saving" in run.list_remarks()[0]
    assert login.left_behind() == []


def test_a_node_dies(login: Login, bert_job: JobMaker) -> None:
    """The node without the driver: its trial begins again on the other, from its checkpoint."""
    run = begun(login, bert_job)
    before = record_of_ended(run)
    login.rig.lose_node(2)
    try:
        record = login.ended(run, 400)
        assert (record.state, record.exit_code) == ("COMPLETED", 0)
        check_whole(run, before)
        assert len(run.read_events(AttemptEvent)) == 1
    finally:
        login.rig.bring_back(2)
    assert login.left_behind() == []


@pytest.mark.long
def test_the_heads_raylet_dies(login: Login, bert_job: JobMaker) -> None:
    run = begun(login, bert_job)
    before = record_of_ended(run)
    login.rig.on(1, "pkill", "-9", "raylet")
    login.start_now(run)
    before |= record_of_ended(run)
    assert login.ended(run).state == "COMPLETED"
    check_whole(run, before)
    assert "Ray on its head node died" in run.list_remarks()[0]
    assert login.left_behind() == []


def test_cancelled_while_ray_starts(login: Login, bert_job: JobMaker) -> None:
    """Slurm ends the steps of a job with it: that is no fault of theirs."""
    run = login.submit(bert_job(GRID))
    login.when(run, lambda: len(list(run.path.glob("slurm/ray-*.log"))) == 2)
    login.when(run, lambda: not any("-token-" in name for name in login.folders()))  # Ray has it
    login.rig.asked("scancel", login.job(run))
    assert login.ended(run).state == "CANCELLED"
    assert run.state is RunState.PENDING
    assert "was cancelled" in login.lorafleet("status", run.id).stdout
    assert "did not" not in login.lorafleet("logs", run.id).stdout  # nothing is blamed
    assert login.left_behind() == []


@pytest.mark.long
def test_requeued_while_its_nodes_are_asked(login: Login, bert_job: JobMaker) -> None:
    run = login.submit(bert_job(GRID.replace("5000", "500")))
    login.when(run, lambda: (run.path / "slurm" / "history.jsonl").is_file())
    login.rig.asked("scontrol", "requeue", login.job(run))
    login.start_now(run)
    assert run.state is RunState.PENDING
    assert login.ended(run).state == "COMPLETED"
    assert Run(run.path).state is RunState.FINISHED
    assert "restart 1): it was killed" in run.list_remarks()[0]


@pytest.mark.long
def test_cancelled_and_resumed(login: Login, bert_job: JobMaker) -> None:
    run = begun(login, bert_job)
    before = record_of_ended(run)
    login.rig.asked("scancel", login.job(run))
    assert login.ended(run).state == "CANCELLED"
    said = login.lorafleet("status", run.id).stdout
    assert f"stopped: job {login.job(run)} was cancelled" in said
    assert login.left_behind() == []
    before |= record_of_ended(run)
    cancelled = login.job(run)
    done = login.lorafleet("resume", run.id, "--wait")
    assert re.search(r"^(Ship |Do not ship)", done.stdout, re.MULTILINE), done.stdout
    check_whole(run, before)
    check_wandb(run)
    (remark,) = [text for text in run.list_remarks() if "continues after" in text]
    assert remark.endswith(f"continues after job {cancelled}: it was cancelled")


@pytest.mark.long
def test_a_chain_of_jobs(login: Login, bert_job: JobMaker) -> None:
    """Where nothing is requeued, a successor goes on; those that are not needed any more are
    withdrawn.
    """
    login.write_site(requeue={"policy": "chain", "max_walltime_chain": 3, "signal_seconds": 60})
    run = begun(login, bert_job)
    jobs = (run.path / "slurm" / "jobs").read_text().split()
    assert len(jobs) == 3
    before = record_of_ended(run)
    login.rig.asked("scancel", "--batch", "--signal=USR1", jobs[0])
    login.when(run, lambda: len(run.read_events(AttemptEvent)) == 2)
    before |= record_of_ended(run)
    login.when(run, lambda: not login.rig.asked("squeue", "-h"))
    check_whole(run, before)
    assert run.list_remarks()[0].startswith(f"job {jobs[1]} continues after job {jobs[0]}")
    assert "CANCELLED" in login.rig.asked("scontrol", "show", "job", "-o", jobs[2])
    assert login.left_behind() == []


@pytest.mark.long
def test_restarts_that_lead_nowhere(login: Login, bert_job: JobMaker) -> None:
    login.write_site(requeue={"max_restarts": 0, "signal_seconds": 60})
    run = login.submit(bert_job(GRID, train__checkpoint_minutes=60, train__eval_steps=625))
    login.when(run, lambda: any(read_step(trial) for trial in run.list_trials()))
    login.rig.asked("scontrol", "requeue", login.job(run))
    login.start_now(run)
    assert login.ended(run).exit_code == 2
    assert (
        "stopped after 1 restart without a new checkpoint"
        in login.lorafleet("status", run.id).stdout
    )


@pytest.mark.long
def test_what_follows_only_detaches(login: Login, bert_job: JobMaker) -> None:
    job = bert_job(train__max_steps=4000)
    path = login.home / "job.yaml"
    path.write_text(job.text)
    follower = login.begin("train", path, *job.overrides, "--on", "rig")
    run = login.when(
        Run(login.home), lambda: next((Run(p) for p in login.runs.glob("*/slurm/jobs")), None)
    ) and Run(next(login.runs.iterdir()))
    login.when(run, lambda: any(read_step(trial) for trial in run.list_trials()))
    follower.send_signal(signal.SIGINT)
    said, _ = follower.communicate(timeout=30)
    assert follower.returncode == 130
    assert f"{run.id} continues to run: follow it with `lorafleet logs -f {run.id}`" in said
    assert login.record(run).state == "RUNNING"
    login.lorafleet("stop", run.id)
    login.ended(run)
