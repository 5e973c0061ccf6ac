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
from tests.conftest import hears_ctrl_c


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
from lorafleet.jobs.runs.run import Run, TrialState

run = Run(Path(sys.argv[1]))
restart = fork_driver(run, trains=True)
run.get_trial("0123456789").set_state(TrialState(sys.argv[2]))
with open(run.path / "starts", "a") as file:
    print(restart.failure.failure_class if restart and restart.failure else restart, file=file)
starts = (run.path / "starts").read_text().count("\\n")
{code}
"""


def supervise(run: Run, code: str, state: TrialState = TrialState.RUNNING) -> subprocess.Popen[str]:
    """A driver that sets its trial to a state, and then runs the code."""
    program = DRIVER.replace("{code}", code)
    command = [sys.executable, "-c", program, str(run.path), str(state)]
    return subprocess.Popen(command, preexec_fn=hears_ctrl_c)


def supervise_until_ready(run: Run, code: str) -> subprocess.Popen[str]:
    """A driver that runs the code, and then waits."""
    supervisor = supervise(run, f"{code}; (run.path / 'ready').touch(); time.sleep(60)")
    wait_for(run.path / "ready")
    return supervisor


def make_run(folder: Path) -> Run:
    run = Run.create(folder / "runs", "supervised")
    run.add_trial("0123456789", 0, {}).set_state(TrialState.RUNNING)
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
    run = make_run(tmp_path)
    code = "os.kill(os.getpid(), signal.SIGSEGV)"
    assert supervise(run, code, TrialState.PENDING).wait(60) == -signal.SIGSEGV
    assert starts(run) == ["None"]


def test_a_driver_that_dies_before_it_trains_is_not_started_again(tmp_path: Path) -> None:
    """Although its trial still says `running`, from the driver before it."""
    run = make_run(tmp_path)
    code = DRIVER.replace(
        'run.get_trial("0123456789")', "os.kill(os.getpid(), 11), run.get_trial('')"
    )
    done = subprocess.Popen([sys.executable, "-c", code, str(run.path), "running"])
    assert done.wait(60) == -signal.SIGSEGV


def test_a_run_that_was_asked_to_stop_is_not_started_again(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    code = "(run.path / 'stop').touch(); os.kill(os.getpid(), signal.SIGSEGV)"
    assert supervise(run, code).wait(60) == -signal.SIGSEGV
    assert starts(run) == ["None"]


def test_a_driver_that_hangs_is_killed_after_a_second_signal(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    code = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])"
    supervisor = supervise_until_ready(run, code)
    supervisor.send_signal(signal.SIGINT)
    time.sleep(1.2)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(30) == -signal.SIGKILL
    assert starts(run) == ["None"]


def test_a_lost_evaluation_is_tried_again(tmp_path: Path) -> None:
    """Its file of stacks shows that there was one. An older file does not count."""
    run = make_run(tmp_path)
    (run.path / "exam-stacks-base-1.txt").touch()  # of an earlier command
    os.utime(run.path / "exam-stacks-base-1.txt", (0, 0))
    code = (
        "(run.path / f'exam-stacks-base-{starts}.txt').touch() if starts < 3 else None;"
        "os.kill(os.getpid(), signal.SIGABRT)"
    )
    assert supervise(run, code, TrialState.FINISHED).wait(60) == -signal.SIGABRT
    assert len(starts(run)) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_the_driver(tmp_path: Path, number: int) -> None:
    run = make_run(tmp_path)
    code = f"signal.signal({int(number)}, lambda *_: sys.exit(85))"
    supervisor = supervise_until_ready(run, code)
    supervisor.send_signal(number)
    assert supervisor.wait(60) == 85
    assert len(starts(run)) == 1


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a child of its parent's death"
)
def test_a_driver_is_told_that_its_supervisor_died(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    code = "signal.signal(signal.SIGTERM, lambda *_: ((run.path / 'told').touch(), sys.exit(0)))"
    supervisor = supervise_until_ready(run, code)
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.wait(60)
    wait_for(run.path / "told")


def wait_for(path: Path) -> None:
    ends = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < ends, f"{path} did not appear"
        time.sleep(0.05)
