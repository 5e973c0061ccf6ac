"""Whoever ends a run, and however: its trials save, it is `stopped`, and `resume` finishes it
(docs/security.md).
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.events import AttemptEvent
from lorafleet.jobs.runs.run import RunState
from lorafleet.training.checkpoint import find_newest_intact
from tests.conftest import JobMaker, lorafleet, read_step
from tests.processes.conftest import begin, newest, save, wait_for

STEPS = 3000
LONG = {"train__max_steps": STEPS, "train__eval_steps": 100}


def training(place: Path) -> bool:
    """Whether the run's trial has trained for some steps."""
    if not (place / "runs").is_dir() or not list((place / "runs").iterdir()):
        return False
    trials = newest(place).list_trials()
    return bool(trials) and read_step(trials[0]) > 4


def to_the_pid(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGINT)


def to_the_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def to_both(process: subprocess.Popen[str]) -> None:
    """As `timeout -s INT` does."""
    os.kill(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)


def by_a_supervisor(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGTERM)


def to_the_whole_tree(process: subprocess.Popen[str]) -> None:
    """As a supervisor that ends a group of processes: the command and its driver."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True)
                             if "exec" in child.cmdline())]  # fmt: skip
    for pid in family:
        os.kill(pid, signal.SIGTERM)


WAYS: dict[str, tuple[Callable[[Any], None], int]] = {
    "pid": (to_the_pid, ExitCode.INTERRUPTED),
    "group": (to_the_group, ExitCode.INTERRUPTED),
    "both": (to_both, ExitCode.INTERRUPTED),
    "supervisor": (by_a_supervisor, ExitCode.REQUEUE),
    "tree": (to_the_whole_tree, ExitCode.REQUEUE),
}


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[] if way == "both" else [pytest.mark.long]) for way in WAYS],
)
def test_a_signal_stops_a_run(way: str, bert_job: JobMaker, place: Path) -> None:
    send, code = WAYS[way]
    process = begin(bert_job(**LONG), place, command="train")
    wait_for(lambda: training(place))
    send(process)
    said, _ = process.communicate(timeout=120)
    check_stopped(place, said)
    assert process.returncode == code, said
    assert said.count("stopping:") == 1


def check_stopped(place: Path, said: str = "") -> None:
    """The run has saved and ended; `resume` finishes what is left."""
    run = newest(place)
    assert run.state is RunState.STOPPED, said
    (trial,) = run.list_trials()
    # Not metrics.jsonl: a run that stops in its first evaluation has no row yet, that row is in the
    # checkpoint.
    assert 0 < read_step(trial) < STEPS
    assert find_newest_intact(trial.checkpoint)[0] is not None
    done = lorafleet("resume", run.path, cwd=place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert newest(place).state is RunState.FINISHED
    assert max(int(row.step) for row in trial.read_metrics()) == STEPS


@pytest.mark.long
def test_timeout_stops_a_run(bert_job: JobMaker, place: Path) -> None:
    job = save(bert_job(), place)
    command = [
        str(Path(sys.executable).with_name("lorafleet")),
        "train",
        str(job),
        *bert_job(**LONG).overrides,
    ]
    done = subprocess.run(
        ["timeout", "-s", "INT", "45", *command, "train.max_steps=100000"], cwd=place, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 124, done.stdout + done.stderr
    assert newest(place).state is RunState.STOPPED, done.stdout + done.stderr


@pytest.mark.parametrize(
    "hangup", [pytest.param(signal.SIG_DFL, marks=pytest.mark.long), signal.SIG_IGN]
)
def test_a_terminal_that_closes_stops_a_run(
    hangup: signal.Handlers, bert_job: JobMaker, place: Path
) -> None:
    """With the live view in it, which has nowhere to be drawn any more. If SIGHUP is ignored, as
    after `trap '' HUP`, the run continues.
    """
    job = save(bert_job(**LONG), place)
    line = [
        str(Path(sys.executable).with_name("lorafleet")),
        "train",
        str(job),
        *bert_job(**LONG).overrides,
    ]
    child, terminal = pty.fork()
    if not child:
        try:
            # Under nohup, pytest and this process ignore it.
            signal.signal(signal.SIGHUP, hangup)
            os.chdir(place)
            os.execv(line[0], line)
        finally:  # never a second pytest
            os._exit(1)
    os.set_blocking(terminal, False)

    def drained() -> bool:
        try:
            while os.read(terminal, 65536):
                pass
        except BlockingIOError:
            pass
        return training(place)

    wait_for(drained)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if hangup is signal.SIG_IGN:
        assert (code, newest(place).state) == (ExitCode.OK, RunState.FINISHED)
        return
    assert code == ExitCode.REQUEUE
    check_stopped(place)


def test_nohup_goes_on(bert_job: JobMaker, place: Path) -> None:
    job = save(bert_job(**LONG), place)
    line = [
        str(Path(sys.executable).with_name("lorafleet")),
        "train",
        str(job),
        *bert_job(**LONG).overrides,
    ]
    process = subprocess.Popen(
        ["nohup", *line], cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: training(place))
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(300) == ExitCode.OK
    assert newest(place).state is RunState.FINISHED


def test_the_second_signal_is_the_end(bert_job: JobMaker, place: Path) -> None:
    process = begin(bert_job(train__max_steps=100_000), place, command="train")
    wait_for(lambda: training(place))
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.3)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert not newest(place).is_alive()
    done = lorafleet("resume", newest(place).path, "--detach", cwd=place)
    assert done.returncode == ExitCode.OK, done.stderr
    # At once: the driver of the second attempt has only just started.
    stopped = lorafleet("stop", newest(place).path, cwd=place)
    assert stopped.returncode == ExitCode.OK, stopped.stderr
    wait_for(lambda: not newest(place).is_alive())
    assert newest(place).state is RunState.STOPPED


@pytest.mark.long
def test_of_three_that_resume_at_once_one_trains(bert_job: JobMaker, place: Path) -> None:
    """The others say who does, and end with the code for it; none says that the run has failed."""
    process = begin(bert_job(**LONG), place, command="train")
    wait_for(lambda: training(place))
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    run = newest(place)
    line = [str(Path(sys.executable).with_name("lorafleet")), "resume", str(run.path)]
    several = [
        subprocess.Popen(
            line, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(3)
    ]
    said = [one.communicate(timeout=300)[0] for one in several]
    codes = [one.returncode for one in several]
    assert codes.count(ExitCode.OK) == 1, said
    for code, text in zip(codes, said, strict=True):
        if code != ExitCode.OK:
            assert code in (ExitCode.TAKEN, ExitCode.USER_INPUT), text
            assert "already has a driver" in text, text
            assert "failed" not in text, text
    assert newest(place).state is RunState.FINISHED
    assert len(run.read_events(AttemptEvent)) == 2
