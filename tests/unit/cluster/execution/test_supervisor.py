"""When a driver is started again, and how its supervisor ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorafleet.cluster.execution.supervisor import RESTART_STATUS, explain_end
from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.run import Run, TrialState


@pytest.mark.parametrize(
    ("status", "oom_kills", "failure"),
    [
        (-signal.SIGALRM, 0, "hang"),
        (-signal.SIGSEGV, 0, "worker_lost"),
        (-signal.SIGABRT, 0, "worker_lost"),
        (-signal.SIGBUS, 0, "worker_lost"),
        (-signal.SIGKILL, 1, "oom"),
    ],
)
def test_a_driver_that_died_of_its_training_is_started_again(
    status: int, oom_kills: int, failure: str
) -> None:
    restart = explain_end(status, oom_kills)
    assert restart is not None
    assert restart.failure is not None
    assert restart.failure.failure_class == failure


def test_a_driver_that_recorded_its_failure_is_started_again() -> None:
    restart = explain_end(RESTART_STATUS, 0)
    assert restart is not None
    assert restart.failure is None


@pytest.mark.parametrize(
    "status",
    [*ExitCode, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP],
)
def test_any_other_end_is_that_of_the_run(status: int) -> None:
    assert explain_end(status, 0) is None


DRIVER = """
import os, signal, sys, time
from pathlib import Path
from lorafleet.cluster.execution.supervisor import fork_driver
from lorafleet.jobs.runs.run import Run

run = Run(Path(sys.argv[1]))
restart = fork_driver(run)
with open(run.path / "starts", "a") as file:
    print(restart.failure.failure_class if restart and restart.failure else restart, file=file)
starts = (run.path / "starts").read_text().count("\\n")
{code}
"""


def supervise(run: Run, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", DRIVER.replace("{code}", code), str(run.path)])


def make_run(folder: Path, state: TrialState = TrialState.RUNNING) -> Run:
    run = Run.create(folder / "runs", "supervised")
    run.add_trial("0123456789", 0, {}).set_state(state)
    return run


def starts(run: Run) -> list[str]:
    return (run.path / "starts").read_text().split()


def test_the_supervisor_ends_as_the_last_driver_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    code = "os.kill(os.getpid(), signal.SIGSEGV) if starts < 3 else sys.exit(4)"
    assert supervise(run, code).wait(60) == 4
    assert starts(run) == ["None", "worker_lost", "worker_lost"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_supervisor_dies_of_the_same_signal(tmp_path: Path, number: int) -> None:
    run = make_run(tmp_path)
    code = f"signal.signal({int(number)}, signal.SIG_DFL) if {int(number)} != 9 else None"
    assert supervise(run, f"{code}; os.kill(os.getpid(), {int(number)})").wait(60) == -number
    assert starts(run) == ["None"]


def test_a_driver_that_dies_while_nothing_trains_is_not_started_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, TrialState.PENDING)
    assert supervise(run, "os.kill(os.getpid(), signal.SIGSEGV)").wait(60) == -signal.SIGSEGV
    assert starts(run) == ["None"]


def test_a_lost_evaluation_is_tried_again(tmp_path: Path) -> None:
    """As long as each one leaves a trace: the tries are counted by it."""
    run = make_run(tmp_path, TrialState.FINISHED)
    code = (
        "(run.path / f'exam-stacks-base-{min(starts, 2)}.txt').touch();"
        "os.kill(os.getpid(), signal.SIGABRT)"
    )
    assert supervise(run, code).wait(60) == -signal.SIGABRT
    assert len(starts(run)) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_the_driver(tmp_path: Path, number: int) -> None:
    run = make_run(tmp_path)
    code = (
        f"signal.signal({int(number)}, lambda *_: sys.exit(85));"
        "(run.path / 'ready').touch(); time.sleep(60)"
    )
    supervisor = supervise(run, code)
    wait_for(run.path / "ready")
    supervisor.send_signal(number)
    assert supervisor.wait(60) == 85
    assert len(starts(run)) == 1


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a child of its parent's death"
)
def test_a_driver_is_told_that_its_supervisor_died(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: ((run.path / 'told').touch(), sys.exit(0)));"
        "(run.path / 'ready').touch(); time.sleep(60)"
    )
    supervisor = supervise(run, code)
    wait_for(run.path / "ready")
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.wait(60)
    wait_for(run.path / "told")


def wait_for(path: Path) -> None:
    ends = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < ends, f"{path} did not appear"
        time.sleep(0.05)
