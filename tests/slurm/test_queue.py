"""Runs that never reach their driver: what `list`, `status` and `logs` say of them."""

from __future__ import annotations

import json
import time

from tests.conftest import JobMaker
from tests.slurm.conftest import Login
from tests.slurm.test_launch import SEARCH


def list_states(login: Login) -> dict[str, str]:
    done = login.lorafleet("list", "--runs", login.runs, "--format", "json")
    return {row["run"]: row["state"] for row in json.loads(done.stdout)["runs"]}


def test_list_follows_the_queue(login: Login, bert_job: JobMaker) -> None:
    blockers = [login.rig.sbatch("sleep 600", "--exclusive") for _ in range(login.rig.nodes)]
    waiting, cancelled = login.submit(bert_job(SEARCH)), login.submit(bert_job(SEARCH))
    assert list_states(login) == {waiting.id: "pending", cancelled.id: "pending"}
    assert "has no log yet. It is pending: job" in login.lorafleet("logs", waiting.id).stderr
    # By an administrator, for instance: nothing of the run itself notices.
    login.rig.asked("scancel", login.job(cancelled))
    login.when(cancelled, lambda: login.over(cancelled))
    assert list_states(login) == {waiting.id: "pending", cancelled.id: "stopped"}
    assert "was cancelled" in login.lorafleet("status", cancelled.id).stdout
    login.lorafleet("resume", cancelled.id, "--detach")
    assert list_states(login)[cancelled.id] == "pending"
    login.rig.asked("scancel", *blockers, login.job(cancelled))

    # The job of `waiting` starts now, and Slurm ends it while its set-up lines run.
    login.when(waiting, lambda: login.record(waiting).state == "RUNNING")
    deadline = time.monotonic() + 10
    while list_states(login)[waiting.id] != "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert list_states(login)[waiting.id] == "running"
    login.rig.asked("scancel", login.job(waiting))
    login.ended(waiting)
    assert list_states(login)[waiting.id] == "stopped"
