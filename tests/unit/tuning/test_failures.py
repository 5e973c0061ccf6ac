"""What ended a trial is told from what is left of it, and whether it begins again is plain
arithmetic.
"""

from __future__ import annotations

import errno
import importlib
import operator
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorafleet.jobs.errors import (
    FAILURE_CLASSES,
    DataError,
    RunError,
    TrainingFailure,
    make_disk_full_error,
)
from lorafleet.jobs.runs.records import FailureRecord
from lorafleet.jobs.runs.run import Run, Trial, TrialState
from lorafleet.jobs.schema.job import RetriesSpec
from lorafleet.jobs.trials.retries import get_retry_number
from lorafleet.training.watchdog import Watchdog
from lorafleet.tuning.failures import (
    WorkerUnusable,
    classify_crash,
    classify_exception,
    is_device_error,
    make_disk_full_failure,
)
from lorafleet.tuning.ledger import Ledger
from lorafleet.tuning.trial_run import SingleRowOutOfMemory
from tests.conftest import ROOT, JobMaker, lorafleet_here


def test_where_faults_are_planted_there_is_something() -> None:
    """A function that is renamed would leave its long tests to fail, which are not run every day."""
    texts = [path.read_text() for path in (ROOT / "tests" / "processes").glob("*.py")]
    places = {
        found
        for text in texts
        for found in re.findall(r'"(lorafleet\.(?:training|tuning)[a-z_.]*:[A-Za-z_.]+)"', text)
    }
    assert len(places) >= 6
    for place in places:
        module, _, path = place.partition(":")
        assert callable(operator.attrgetter(path)(importlib.import_module(module))), place


def test_each_class_has_its_own_limit() -> None:
    retries = RetriesSpec(oom=2, worker_lost=1, hang_minutes=5)
    assert get_retry_number(FailureRecord(failure_class="oom"), {}, retries) == 1
    assert (
        get_retry_number(FailureRecord(failure_class="oom"), {"oom": 1, "worker_lost": 1}, retries)
        == 2
    )
    assert get_retry_number(FailureRecord(failure_class="oom"), {"oom": 2}, retries) is None
    assert get_retry_number(FailureRecord(failure_class="oom", final=True), {}, retries) is None
    assert get_retry_number(FailureRecord(failure_class="worker_lost"), {"oom": 2}, retries) == 1
    for kind in ("nan", "code", "data", "config"):
        assert get_retry_number(FailureRecord(failure_class=kind), {}, retries) is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TrainingFailure("nan", "the loss became NaN or infinite"), "nan"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "oom"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
            ),
            "oom",
        ),
        (MemoryError(), "oom"),
        (RuntimeError("CUDA error: device-side assert triggered"), "worker_lost"),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"), "worker_lost"),
        (
            RuntimeError(
                "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:35"
            ),
            "worker_lost",
        ),
        (DataError("row 3 has no text"), "data"),
        (RunError("linked to a run that is gone"), "config"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "code"),
    ],
)
def test_exceptions_have_classes(error: Exception, kind: str) -> None:
    assert classify_exception(error).failure_class == kind
    assert kind in FAILURE_CLASSES


def test_what_spoils_a_process_is_known() -> None:
    assert is_device_error(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_device_error(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_device_error(ValueError("CUDA error"))


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    run = Run.create(tmp_path, "faults")
    return run.add_trial("0123456789", 0, {})


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (
            "ActorDiedError: The actor died because its worker process was killed: SIGKILL",
            "worker_lost",
        ),
        ("NodeDiedError: the node was preempted=True", "preempted"),
        (
            "The actor died unexpectedly before finishing this task: exception in its creation "
            "task",
            "code",
        ),
        (
            "Traceback ...\nWorkerGroupError: A worker health check failed.\nThe actor ab is "
            "unavailable",
            "worker_lost",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory", "oom"),
        ("Traceback (most recent call last):\n  File 'x'\nKeyError: 'y'", "code"),
        (
            "Traceback ...\nPreemptionError: Training was interrupted by node preemption "
            "(preempted_ranks=[1], drain_timed_out=True).",
            "preempted",
        ),
        (
            "Traceback ...\nWorkerGroupStartupTimeoutError: The worker group startup timed out",
            "worker_lost",
        ),
        ("Traceback ...\nWorkerHealthCheckTimeoutError: no answer", "hang"),
    ],
)
def test_a_death_without_a_report_is_told_from_rays_words(
    trial: Trial, said: str, kind: str
) -> None:
    assert classify_crash(said, trial).failure_class == kind


def test_what_a_process_carried_out_comes_first(trial: Trial) -> None:
    """Processes of one group: the others say that they lost a peer, the cause is the one that ran
    out of memory.
    """
    oom = WorkerUnusable(
        FailureRecord(
            failure_class="oom", sentence="out of memory: {'a \"quoted\" thing'}", final=True
        )
    )
    lost = WorkerUnusable(
        FailureRecord(failure_class="worker_lost", sentence="another process was lost")
    )
    said = f"Traceback ...\nTrainingFailedError: 2 failed: {lost!r} and {oom!r}\n"
    assert classify_crash(said, trial).failure_class == "oom"
    assert classify_crash(said, trial).final is True
    assert str(pickle.loads(pickle.dumps(oom))) == str(oom)
    full = WorkerUnusable(make_disk_full_failure("the disk is full"))
    disk_full = classify_crash(f"{oom!r} {full!r}", trial)
    assert (disk_full.failure_class, disk_full.sentence) == ("disk_full", "the disk is full")


def test_stacks_that_were_written_mean_a_hang(trial: Trial) -> None:
    trial.get_hang_file(0).write_text("")
    trial.get_hang_file(1).write_text("Thread 0x1 (most recent call first):\n")
    failure = classify_crash("ActorDiedError: exit code 1", trial)
    assert (failure.failure_class, "are in stacks-1-1.txt of" in failure.sentence) == (
        "hang",
        True,
    )
    assert [path.name for path in trial.path.glob("*.txt")] == ["stacks-1-1.txt"]
    assert classify_crash("ActorDiedError: exit code 1", trial).failure_class == "worker_lost"


def test_stacks_come_before_what_the_others_say_of_a_hang(trial: Trial) -> None:
    """The process that hung was ended first; the one that waited for it reports a lost peer, or an
    error of its own.
    """
    for kind, told in (("worker_lost", "hang"), ("code", "hang"), ("oom", "oom")):
        trial.get_hang_file(1).write_text("Thread 0x1 (most recent call first):\n")
        said = (
            "Traceback "
            f"...\n{WorkerUnusable(FailureRecord(failure_class=kind, sentence='another process was lost'))!r}"
        )
        assert classify_crash(said, trial).failure_class == told
    assert len(list(trial.path.glob("stacks-1-*.txt"))) == 3


def test_a_retry_is_counted_where_a_resume_finds_it(bert_job: JobMaker, trial: Trial) -> None:
    job = bert_job(retries={"worker_lost": 2}).job
    ledger = Ledger(Run(trial.path.parent.parent), job, False)
    tracked = ledger.trials.get(trial.id)
    for number in (1, 2):
        ledger.record_failure(
            tracked, FailureRecord(failure_class="worker_lost", sentence="killed")
        )
        assert (trial.state, trial.read_status().retries) == (
            TrialState.PENDING,
            {"worker_lost": number},
        )
    ledger.record_failure(tracked, FailureRecord(failure_class="worker_lost", sentence="killed"))
    assert trial.state is TrialState.FAILED
    assert (
        ledger.run.list_remarks()[1] == "0123456789 restarted (retry 2 after worker_lost): killed"
    )


def test_one_row_is_the_end(trial: Trial) -> None:
    assert (
        classify_exception(SingleRowOutOfMemory("oom", "out of memory with 1 row a pass")).final
        is True
    )


def test_a_full_disk_is_known_by_its_number_or_its_words(tmp_path: Path) -> None:
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ):
        found = make_disk_full_error(error, tmp_path)
        assert found is not None
        assert f"the disk of {tmp_path} is full" in str(found)
    assert make_disk_full_error(OSError(errno.EACCES, "Permission denied"), tmp_path) is None
    assert (
        make_disk_full_error(RuntimeError("PytorchStreamWriter failed writing file"), tmp_path)
        is None
    )  # there is room


def test_a_run_keeps_room_for_its_last_words(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "room")
    assert (run.path / ".reserve").stat().st_size == 2**20
    run.release_reserve()
    run.release_reserve()
    assert not (run.path / ".reserve").exists()


def test_the_watchdog_rests_and_leaves_no_empty_file(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path / "hang-0.txt", 60)
    dog.reset()
    dog.pause()
    dog.close()
    assert not list(tmp_path.iterdir())
    Watchdog(tmp_path / "hang-0.txt", 0).reset()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("comes_back", [False, True])
def test_the_watchdog_writes_stacks_and_then_ends_a_process_that_sleeps_on(
    tmp_path: Path, comes_back: bool
) -> None:
    stacks = tmp_path / "hang-0.txt"
    code = f"""
import time
from pathlib import Path
from lorafleet.training import watchdog
watchdog._GRACE_SECONDS = 3.0
dog = watchdog.Watchdog(Path({str(stacks)!r}), 0.5)
dog.reset()
time.sleep({2 if comes_back else 30})
dog.reset()
dog.close()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=25)
    assert done.returncode == (0 if comes_back else -signal.SIGALRM)
    assert stacks.exists() is not comes_back
    if not comes_back:
        assert "most recent call first" in stacks.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
@pytest.mark.parametrize("kilobytes", [4, 40, 600])
def test_a_disk_that_is_full_at_the_start(
    kilobytes: int, bert_job: JobMaker, tmp_path: Path
) -> None:
    """One sentence, code 2, and nothing half-made.

    The disk has room for less than a run's first files.
    """
    loaded = bert_job()
    (tmp_path / "job.yaml").write_text(loaded.text)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("no mount is allowed here")
    try:
        done = lorafleet_here("train", "job.yaml", "--runs", disk / "runs", cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "full" in done.stderr.splitlines()[-1]
        assert len(done.stderr.splitlines()) <= 2
        assert "bug in lorafleet" not in done.stderr
        assert not list((disk / "runs").glob("*")) if (disk / "runs").is_dir() else True
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_ray_that_does_not_come_up_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more time each, and what its processes said is kept. Their failure itself is a stand-in."""
    from lorafleet.tuning import local_ray

    tried: list[int] = []

    def started(_options: object, scratch: Path, seconds: int) -> str:
        tried.append(seconds)
        log = scratch / "ray" / "session_2026-01-01" / "logs" / "gcs_server.out"
        log.parent.mkdir(parents=True)
        log.write_text(f"try {len(tried)}")
        if len(tried) < comes_up_at:
            raise RuntimeError("no node is known\nmore")
        return "a Ray"

    monkeypatch.setattr(local_ray, "_start_ray", started)
    comes_up_at, told = 3, list[str]()
    with local_ray.start_local_ray({}, tmp_path / "logs", told.append) as context:
        assert context == "a Ray"
    assert tried == [30, 120, 240]
    assert told == [
        f"Ray did not start within {n} s (no node is known): trying again, with more time"
        for n in (30, 120)
    ]
    assert (tmp_path / "logs" / "gcs_server.out").read_text() == "try 2"
    comes_up_at = 9
    tried.clear()
    with (
        pytest.raises(
            RunError,
            match=r"in 3 tries \(no node is known; load \d+\)\. Ray's logs are in .*\. Run `lorafleet resume` when",
        ),
        local_ray.start_local_ray({}, tmp_path / "logs", told.append),
    ):
        pass
