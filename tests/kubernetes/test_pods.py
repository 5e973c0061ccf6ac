"""Real sweeps in the pods of rendered RayJobs: Ray's own start lines, the submitter's script, hooks
and mounts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.events import AttemptEvent, Event, RetryEvent
from lorafleet.jobs.runs.run import Run
from tests.conftest import JobMaker, hears_ctrl_c
from tests.kubernetes.conftest import PLANTED, User

pytestmark = pytest.mark.ray

GRID = """
search:
  method: grid
  scheduler: {type: none, time_attr: samples, max_t: 4000}
  parameters: {train.learning_rate: {values: [1e-3, 3e-3, 1e-2]}}
"""
LONG = GRID.replace("4000", "60000")


def ended(run: Run) -> int:
    return sum(trial.state.has_ended for trial in run.list_trials())


def checkpoints(run: Run) -> int:
    return sum((trial.checkpoint / "checksums.json").is_file() for trial in run.list_trials())


def no_step_twice(run: Run) -> None:
    for trial in run.list_trials():
        steps = [row.step for row in trial.read_metrics()]
        assert steps == sorted(set(steps)), trial.id


def following(user: User, job: Path) -> subprocess.Popen[str]:
    """`lorafleet sweep` in a terminal of its own."""
    return subprocess.Popen(
        user.command("sweep", job, "--on", "pods"), cwd=user.home, env=user.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=hears_ctrl_c,
    )  # fmt: skip


def planted_in(folder: Path) -> list[Path]:
    """Files that hold the secret."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and PLANTED.encode() in path.read_bytes()
    ]


def test_a_sweep_in_two_worker_pods(user: User, bert_job: JobMaker) -> None:
    """fetch, sweep, status, the end with its table, pull: as a user types it."""
    job = user.job(bert_job(GRID, search__max_concurrent_trials=2))
    done = user.lorafleet("sweep", job, "--on", "pods")
    assert "report   " in done.stdout, done.stdout
    (folder,) = (user.home / "runs").iterdir()
    run, there = Run(folder), user.there(Run(folder))
    assert f"`lorafleet pull {run.id}` downloads the adapter" in done.stderr
    assert run.state == there.state == "finished"
    assert ended(run) == ended(there) == 3
    report = json.loads((run.path / "report" / "report.json").read_text())
    best = report["recommendation"]["trial_id"]
    assert not (run.path / "trials" / best / "adapter").exists()
    user.lorafleet("pull", run.id)
    assert (run.path / "trials" / best / "adapter" / "adapter_model.safetensors").read_bytes() == (
        there.path / "trials" / best / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert "attempt" in user.lorafleet("logs", run.id).stdout
    assert user.status(run)["state"] == "finished"
    user.when(run, lambda: not user.operator.running)  # a minute after success, as the rules say
    assert not planted_in(run.path)
    assert not planted_in(there.path)
    assert PLANTED not in json.dumps(user.server.all("RayJob") + user.server.all("ConfigMap"))


@pytest.mark.long
def test_a_model_is_exported_and_judged_where_it_lies(user: User, bert_job: JobMaker) -> None:
    """The head pod does the work; what it made is brought when it is asked for."""
    job = user.job(bert_job(train__max_steps=20))
    user.lorafleet("train", job, "--on", "pods", "--wait")
    (run,) = [Run(folder) for folder in (user.home / "runs").iterdir()]
    targets = ("--to", "merged,onnx,tensorrt")
    done = user.lorafleet("export", run.id, *targets, "--on", "pods", "--wait", "--format", "json")
    found = json.loads(done.stdout)["targets"]
    assert [name for name, one in found.items() if one["accepted"]] == ["merged", "onnx"]
    assert "needs an NVIDIA GPU, but this machine has none" in found["tensorrt"]["unavailable"]
    assert not (run.path / "export").exists()
    user.lorafleet("pull", run.id, "--adapters", "exports")
    there = user.there(run).path / "export" / "onnx" / "model.onnx.data"
    assert (run.path / "export" / "onnx" / "model.onnx.data").read_bytes() == there.read_bytes()
    user.lorafleet("pull", run.id)
    judged = user.lorafleet("evaluate", run.id, "--on", "pods", "--wait", "--format", "json")
    assert len(json.loads(judged.stdout)["arms"]) == 2
    elsewhere = user.lorafleet("export", run.id, "--on", "pods", "-o", "x", check=False)
    assert elsewhere.returncode == 2
    assert "is a folder of this machine, which pods cannot see" in elsewhere.stderr


@pytest.mark.long
def test_a_driver_that_fails(user: User, bert_job: JobMaker) -> None:
    """What the user can mend is told with its sentence and code; nothing is tried again where
    retries is 0.
    """
    user.write_site(more="deadlines: {retries: 0, save_seconds: 60}")
    job = user.job(bert_job(GRID))
    (staged,) = (user.operator.storage / "team" / "me" / "cache" / "staged").glob("*/train.jsonl")
    staged.write_text("")
    done = user.lorafleet("sweep", job, "--on", "pods", "--wait", check=False)
    assert done.returncode == ExitCode.USER_INPUT, done.stdout + done.stderr
    assert "train.jsonl" in done.stderr
    assert len(user.operator.attempts) == 1
    (folder,) = (user.home / "runs").iterdir()
    assert user.status(Run(folder))["state"] == "failed"


@pytest.mark.long
def test_a_worker_pod_is_killed(user: User, bert_job: JobMaker) -> None:
    """Its trial goes on from its checkpoint, in the pod that takes its place or in the other."""
    run = user.submit(
        bert_job(LONG, train__checkpoint_minutes=0.02, search__max_concurrent_trials=2)
    )
    there = user.there(run)
    user.when(run, lambda: checkpoints(there) == 2)
    lost = next(pod for name, pod in user.operator.pods.items() if "-workers-" in name)
    user.operator.kill(lost)
    user.when(run, lambda: user.status(run)["state"] == "finished", 420)
    assert len(user.operator.attempts) == 1
    no_step_twice(there)
    retries = there.read_events(RetryEvent)
    assert retries, there.read_events(Event)
    assert all(event.failure.failure_class in ("worker_lost", "preempted") for event in retries)
    assert ended(there) == 3


@pytest.mark.long
def test_the_head_is_killed(user: User, bert_job: JobMaker) -> None:
    """The second cluster's driver goes on with the run by its id; ended trials stay as they are."""
    run = user.submit(
        bert_job(LONG, train__checkpoint_minutes=0.02, search__max_concurrent_trials=2)
    )
    there = user.there(run)
    user.when(run, lambda: ended(there) >= 1 and checkpoints(there))
    before = {
        trial.id: (trial.path / "metrics.jsonl").read_bytes()
        for trial in there.list_trials()
        if trial.state.has_ended
    }
    user.operator.kill(
        next(pod for name, pod in user.operator.pods.items() if name.endswith("-head"))
    )
    user.when(run, lambda: user.status(run)["state"] == "finished", 420)
    assert len(user.operator.attempts) == 2
    assert {
        name: (there.get_trial(name).path / "metrics.jsonl").read_bytes() for name in before
    } == before
    no_step_twice(there)
    assert len(there.read_events(AttemptEvent)) == 2


@pytest.mark.long
@pytest.mark.parametrize("tolerates", [True, False])
def test_the_heads_node_is_lost(user: User, bert_job: JobMaker, tolerates: bool) -> None:
    """Kubernetes evicts the head before KubeRay gives the job up; with its own tolerations of 300
    seconds it would be too late, and the user is told how to go on.
    """
    if not tolerates:
        pod = {"template": {"spec": {"tolerations": []}}}
        patch = {"spec": {"rayClusterSpec": {"headGroupSpec": pod}}}
        user.write_site(more=f"patch: {json.dumps(patch)}")
    run = user.submit(
        bert_job(LONG, train__checkpoint_minutes=0.02, search__max_concurrent_trials=2)
    )
    there = user.there(run)
    user.when(run, lambda: checkpoints(there))
    head = next(pod for name, pod in user.operator.pods.items() if name.endswith("-head"))
    user.operator.lose_node(head)
    if tolerates:
        user.when(run, lambda: user.status(run)["state"] == "finished", 420)
        assert len(user.operator.attempts) == 2
        no_step_twice(there)
        return
    user.when(run, lambda: user.status(run)["state"] == "stopped", 120)
    place = user.status(run)["place"]
    assert "did not answer" in place
    assert f"continue it with `lorafleet resume {run.id}`" in place
    assert len(user.operator.attempts) == 1


@pytest.mark.long
def test_a_deadline(user: User, bert_job: JobMaker) -> None:
    """No other cluster is tried; the workers go at once, saving, and `resume` goes on."""
    user.write_site(more="deadlines: {hours: 0.02, save_seconds: 60}")
    run = user.submit(bert_job(LONG.replace("60000", "400000"), train__checkpoint_minutes=0.02))
    there = user.there(run)
    user.when(run, lambda: user.status(run)["state"] == "stopped", 200)
    assert "it reached deadlines.hours" in user.status(run)["place"]
    assert len(user.operator.attempts) == 1
    user.when(run, lambda: not any("-workers-" in name for name in user.operator.running), 90)
    assert checkpoints(there)
    assert ended(there) < 3
    user.lorafleet("resume", run.id, "--detach")
    user.when(
        run, lambda: len(there.read_events(AttemptEvent)) == 2
    )  # the next deadline is its own


@pytest.mark.long
def test_stop_leaves_no_process_and_resume_goes_on(user: User, bert_job: JobMaker) -> None:
    """Stopped while somebody follows it; all is saved first."""
    job = user.job(bert_job(LONG, train__checkpoint_minutes=5, search__max_concurrent_trials=2))
    follower = following(user, job)
    user.when(Run(user.home), lambda: list((user.home / "runs").glob("*/site.json")))
    (folder,) = (user.home / "runs").iterdir()
    run, there = Run(folder), user.there(Run(folder))
    user.when(run, lambda: sum(len(trial.read_metrics()) > 0 for trial in there.list_trials()) >= 2)
    assert user.status(run)["state"] == "running"
    assert "is saving its trials and will stop" in user.lorafleet("stop", run.id).stdout
    user.when(run, lambda: not user.operator.running, 120)
    said, _ = follower.communicate(timeout=120)
    assert follower.returncode == ExitCode.INTERRUPTED, said
    assert there.state == "stopped"
    assert checkpoints(there) >= 1  # none was due: they were saved for the end
    assert (
        user.server.all("RayJob")
        == user.server.all("ConfigMap")
        == user.server.all("NetworkPolicy")
        == []
    )
    left = subprocess.run(
        ["pgrep", "-af", f"{run.id}"], capture_output=True, text=True, check=False
    ).stdout
    assert not left, left
    done = user.lorafleet("resume", run.id, "--wait")
    assert run.state == there.state == "finished", done.stdout
    no_step_twice(there)
    assert len(there.read_events(AttemptEvent)) == 2


@pytest.mark.long
def test_ctrl_c_detaches_and_logs_follow(user: User, bert_job: JobMaker) -> None:
    job = user.job(bert_job(GRID, search__max_concurrent_trials=2))
    follower = following(user, job)
    user.when(Run(user.home), lambda: list((user.home / "runs").glob("*/site.json")))
    (folder,) = (user.home / "runs").iterdir()
    run = Run(folder)
    user.when(run, lambda: user.status(run)["state"] == "running")
    os.killpg(follower.pid, signal.SIGINT)
    said, _ = follower.communicate(timeout=30)
    assert (follower.returncode, "continues to run: follow it with `lorafleet logs -f" in said) == (
        ExitCode.INTERRUPTED,
        True,
    ), said
    logs: Any = user.lorafleet("logs", run.id, "--follow")
    assert "finished" in user.status(run)["state"]
    finished = [line for line in logs.stdout.splitlines() if "event=" in line]
    assert len(finished) >= len(user.there(run).read_events(Event)) - 1, (
        logs.stdout
    )  # all that there was, to the end
