"""What goes wrong in a trial costs that trial what it must, and no other; and nothing is left
behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.events import RetryEvent
from lorafleet.jobs.runs.run import Run
from tests.conftest import JobMaker, lorafleet, read_step
from tests.processes.conftest import (
    PAIR,
    accuracy_of,
    base_loads,
    begin,
    interrupt,
    kill_tree,
    newest,
    planted,
    save,
    wait_for,
)

THREE = """
search:
  method: grid
  max_concurrent_trials: 1
  scheduler: {type: none, max_t: 64}
  parameters: {train.learning_rate: {values: [1e-3, 3e-3, 1e-2]}}
"""
STEP = "lorafleet.training.session:TrainingSession._run_optimizer_step"


def driver_log(run: Run) -> str:
    return (run.path / "logs" / "driver.log").read_text()


def losses(run: Run) -> dict[float, list[float]]:
    """Learning rate -> validation losses."""
    return {
        trial.read_params().assignment["train.learning_rate"]: [
            row.loss for row in trial.read_evaluations()
        ]
        for trial in run.list_trials()
    }


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[float, list[float]]]:
    """Filled by the first test that needs it."""
    return {}


@pytest.mark.parametrize(
    ("fault", "loads", "retries"),
    [
        pytest.param(
            "oom", 1, {"oom": 1}, marks=pytest.mark.long
        ),  # given back: the actor, and its base, are used on
        ("oom_that_stays", 2, {"oom": 1}),
        pytest.param("device", 2, {"worker_lost": 1}, marks=pytest.mark.long),
        ("crash", 2, {"worker_lost": 1}),
    ],
)
def test_a_fault_costs_its_trial_a_restart_and_the_next_trials_nothing(
    bert_job: JobMaker,
    place: Path,
    undisturbed: dict[str, dict[float, list[float]]],
    fault: str,
    loads: int,
    retries: dict[str, int],
) -> None:
    loaded = bert_job(THREE, lora__lora_dropout=0.0)
    path = save(loaded, place)
    if not undisturbed:
        done = lorafleet("sweep", path, *loaded.overrides, cwd=place)
        assert done.returncode == ExitCode.OK, done.stderr
        undisturbed["losses"] = losses(newest(place))
    env = planted(place, STEP, fault, call=11)  # in the second trial
    done = lorafleet("sweep", path, *loaded.overrides, cwd=place, **env)
    run = newest(place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr + driver_log(run)
    assert (place / "it-happened").exists()
    assert {trial.read_params().index: trial.read_status().retries for trial in run.list_trials()} == {
        0: {}, 1: retries, 2: {},
    }  # fmt: skip
    assert base_loads(run) == loads
    for rate, found in losses(run).items():
        assert found == pytest.approx(undisturbed["losses"][rate], rel=1e-5)
    assert f"restarted{', with smaller micro-batches' if 'oom' in retries else ''}" in done.stdout


@pytest.mark.long
def test_a_trial_that_never_fits_is_given_up_and_the_others_go_on(
    bert_job: JobMaker, place: Path
) -> None:
    """Eight rows a pass are halved to one, which is planted to be too much as well."""
    loaded = bert_job(THREE)
    env = planted(
        place, STEP, "oom", flag="/dev/full/never"
    )  # a flag that cannot be made: it happens each time
    done = lorafleet("sweep", save(loaded, place), *loaded.overrides, cwd=place, **env)
    run = newest(place)
    assert done.returncode == ExitCode.SOME_TRIALS_FAILED, done.stdout + done.stderr
    for trial in run.list_trials():
        assert trial.read_status().failure.failure_class == "oom"
        assert (
            "out of memory with micro-batches of 1 row, which cannot be halved"
            in trial.read_status().reason
        )
        assert trial.read_status().retries == {"oom": 4}


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hang_ends_with_every_stack_and_the_trial_goes_on(
    bert_job: JobMaker, place: Path, workers: int
) -> None:
    """One process stops answering; with two, the other waits for it in a collective."""
    loaded = bert_job(resources__workers_per_node=workers, retries__hang_minutes=0.5, train__max_steps=24,
                      train__per_device_train_batch_size=4, train__eval_steps=4)  # fmt: skip
    env = planted(place, STEP, "pause", call=11, **({"rank": 1} if workers == 2 else {}))
    done = lorafleet("train", save(loaded, place), *loaded.overrides, cwd=place, **env)
    run = newest(place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr + driver_log(run)
    trial = run.list_trials()[0]
    assert trial.read_status().retries == {"hang": 1}
    assert [event.failure.failure_class for event in run.read_events(RetryEvent)] == ["hang"]
    assert (
        "restarted (retry 1 after hang): it hung (no progress for retries.hang_minutes)"
        in done.stdout
    )
    stacks = [path.read_text() for path in sorted(trial.path.glob("stacks-*"))]
    assert len(stacks) == workers
    assert any("in pause" in text for text in stacks)
    assert [row.step for row in trial.read_evaluations()] == [4, 8, 12, 16, 20, 24]


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can only be mounted by root")
def test_a_full_disk_stops_the_run_and_keeps_what_was_good(bert_job: JobMaker, place: Path) -> None:
    disk = place / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], check=False
    ).returncode:
        pytest.skip("this machine does not let us mount a small file system")
    try:
        loaded = bert_job(
            train__max_steps=100_000, train__eval_steps=50, train__checkpoint_minutes=0.01
        )
        process = begin(loaded, place, "--runs", str(disk), command="train")
        wait_for(lambda: list(disk.glob("*/trials/*/checkpoints/last")))
        run = Run(next(disk.glob("tiny-*")))
        wait_for(run.list_trials()[0].read_metrics)
        free = os.statvfs(disk)
        filler = disk / "filler"
        with filler.open("wb") as file:
            file.write(b"x" * max(0, free.f_bavail * free.f_frsize - 20_000))
        shown, _ = process.communicate(timeout=180)
        assert process.returncode == ExitCode.USER_INPUT, shown + driver_log(run)
        assert "is full" in shown
        assert "Traceback" not in shown
        assert run.state == "failed"
        assert "free some space, then continue the run" in run.read_status().reason
        trial = run.list_trials()[0]
        assert not trial.state.has_ended
        reached = trial.read_metrics()[-1].step
        filler.unlink()
        process = begin_resume(run, place, disk)
        wait_for(lambda: trial.read_metrics()[-1].step > reached)
        assert lorafleet("stop", run.id, "--runs", disk, cwd=place).returncode == ExitCode.OK
        process.communicate(timeout=120)
        steps = [row.step for row in trial.read_metrics()]
        assert steps == sorted(set(steps))
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


def begin_resume(run: Run, place: Path, runs: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("lorafleet")), "resume", run.id, "--runs", str(runs)],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "at", "code"),
    [
        pytest.param(
            signal.SIGTERM,
            "lorafleet.training.session:evaluate_rows",
            ExitCode.REQUEUE,
            id="in-evaluation",
        ),
        pytest.param(
            signal.SIGUSR1, "lorafleet.training.model:load_base", ExitCode.REQUEUE, id="in-set-up"
        ),
        pytest.param(
            signal.SIGINT,
            "lorafleet.training.methods:load_weights",
            ExitCode.INTERRUPTED,
            id="held-out",
        ),
    ],
)
def test_a_signal_saves_within_seconds_wherever_it_comes(
    bert_job: JobMaker, place: Path, number: signal.Signals, at: str, code: ExitCode
) -> None:
    """The planted `linger` makes the phase last, so that the signal meets it."""
    loaded = bert_job(
        train__max_steps=8, data__max_validation_samples=64, train__per_device_eval_batch_size=1
    )
    process = begin(loaded, place, command="train", **planted(place, at, "linger"))
    wait_for((place / "it-happened").exists)
    run = newest(place)
    asked = time.monotonic()
    if number is signal.SIGINT:
        interrupt(process)  # a terminal sends it to all of its processes
    else:
        process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == code, shown + driver_log(run)
    assert time.monotonic() - asked < 30
    assert run.state == "stopped"
    done = lorafleet("resume", run.id, cwd=place)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    trial = run.list_trials()[0]
    assert [row.step for row in trial.read_evaluations()] == [8]
    assert trial.state == "finished"


@pytest.mark.parametrize(
    ("fault", "at", "flag"),
    [
        pytest.param("crash", "lorafleet.tuning.held_out:Evaluator._evaluate_split", "", id="once"),
        pytest.param(
            "device",
            "lorafleet.tuning.held_out:Evaluator._evaluate_split",
            "",
            id="device",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "oom",
            "lorafleet.tuning.held_out:load_weights",
            "/dev/full/never",
            id="always",
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_happens_on_the_held_out_rows_costs_numbers_and_not_the_report(
    bert_job: JobMaker, place: Path, fault: str, at: str, flag: str
) -> None:
    """A process that dies there is replaced, and what it was at tried again; what never works is
    left out, aloud.
    """
    env = planted(place, at, fault, **({"flag": flag} if flag else {}))
    loaded = bert_job(train__max_steps=8)
    done = lorafleet("train", save(loaded, place), *loaded.overrides, cwd=place, **env)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    report = json.loads(lorafleet("report", "--format", "json", cwd=place).stdout)
    expected = accuracy_of(newest(place).get_base_predictions_file("test"))
    assert report["base"]["test_metrics"]["accuracy"] == expected
    assert (report["trials"][0]["test_metrics"] is None) is bool(flag)
    assert (
        "not evaluated on the held-out rows: MemoryError: no room (planted)" in done.stdout
    ) is bool(flag)


@pytest.mark.long
def test_nothing_is_left_behind(bert_job: JobMaker, place: Path) -> None:
    """No process, no session of Ray's, no file for a while: after an end, after a failure, after a
    stop.
    """
    before = left_behind()
    loaded = bert_job(THREE)
    done = lorafleet("sweep", save(loaded, place), *loaded.overrides, cwd=place)
    assert done.returncode == ExitCode.OK, done.stderr
    assert not left_behind() - before
    done = lorafleet("sweep", save(loaded, place), *loaded.overrides, "retries.worker_lost=0", cwd=place,
                     **planted(place, STEP, "crash"))  # fmt: skip
    assert done.returncode == ExitCode.SOME_TRIALS_FAILED, done.stdout
    assert not left_behind() - before
    process = begin(
        bert_job(train__max_steps=100_000, resources__workers_per_node=2), place, command="train"
    )
    wait_for(
        lambda: any(read_step(trial) > 3 for trial in newest(place).list_trials()),
        120,
    )
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert not left_behind() - before


def test_what_a_killed_driver_left_goes_with_the_next_start(
    bert_job: JobMaker, place: Path
) -> None:
    before = left_behind()
    process = begin(bert_job(PAIR), place)
    wait_for(lambda: (place / "runs").exists() and list((place / "runs").iterdir()))
    wait_for(
        lambda: any(read_step(trial) > 3 for trial in newest(place).list_trials()),
        120,
    )
    kill_tree(process)
    assert any(path.startswith("/tmp/lf-") for path in left_behind() - before)
    done = lorafleet(
        "train", save(bert_job(train__max_steps=2), place), "train.max_steps=2", cwd=place
    )
    assert done.returncode == ExitCode.OK, done.stderr
    assert not left_behind() - before


def left_behind() -> set[str]:
    """What runs of ours could leave on a machine."""
    names = ("raylet", "gcs_server", "ray::", "lorafleet")
    processes = {
        f"{process.pid} {process.name()}"
        for process in psutil.process_iter()
        if process.name().startswith(names) and process.status() != psutil.STATUS_ZOMBIE
    }
    return processes | {
        str(path) for folder in ("/tmp", "/dev/shm", "/tmp/ray") for path in Path(folder).glob("*")
    }
