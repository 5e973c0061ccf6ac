"""One driver at a time, by numbers and not by clocks: who may begin, who is refused, what a stale
writer can do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs import lease
from lorafleet.jobs.runs.events import NoteEvent
from lorafleet.jobs.runs.lease import Lease, StaleAttempt
from lorafleet.jobs.runs.records import AttemptRecord, MetricsRow
from lorafleet.jobs.runs.run import Run, RunState, TrialState


def as_if_elsewhere(run: Path, attempt: int, **more: object) -> Path:
    """Make an attempt look like another machine's; returns the file with its signs of life."""
    path = run / "attempts" / f"{attempt}.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"machine": ["elsewhere", "pid:[1]"], **more})
    )
    return run / "attempts" / f"{attempt}.beat"


def test_one_after_the_other(tmp_path: Path) -> None:
    first = Lease.acquire(tmp_path, AttemptRecord())
    with pytest.raises(RunError, match="already has a driver, which is still running"):
        Lease.acquire(tmp_path, AttemptRecord())
    first.release()
    second = Lease.acquire(tmp_path, AttemptRecord(saved="x"))
    assert (first.attempt, second.attempt, lease.find_newest_attempt(tmp_path)) == (1, 2, 2)
    assert [row.attempt for row in lease.read_attempts(tmp_path)] == [1, 2]


def test_a_killed_driver_of_this_machine_is_gone_at_once(tmp_path: Path) -> None:
    begin = f"Lease.acquire(Path({str(tmp_path)!r}), AttemptRecord())"
    code = (
        "import os; from pathlib import Path; from lorafleet.jobs.runs.lease import Lease; "
        "from lorafleet.jobs.runs.records import AttemptRecord; "
        f"{begin}; os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    began = time.monotonic()
    assert Lease.acquire(tmp_path, AttemptRecord()).attempt == 2
    assert time.monotonic() - began < 1


def test_a_driver_elsewhere_that_gives_signs_of_life_is_refused(tmp_path: Path) -> None:
    Lease.acquire(tmp_path, AttemptRecord())
    beat = as_if_elsewhere(tmp_path, 1, slurm_job="12")
    said: list[str] = []
    threading.Timer(0.3, lambda: beat.write_text("2")).start()
    with pytest.raises(RunError, match=r"still running \(elsewhere, job 12\)"):
        Lease.acquire(tmp_path, AttemptRecord(), say=said.append, seconds=3)
    assert "started on elsewhere and did not record its end: watching" in said[0]
    assert (
        Lease.acquire(tmp_path, AttemptRecord(), seconds=0.3).attempt == 2
    )  # nothing changed in that time


def test_the_driver_of_an_earlier_submission_may_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives signs of life while it saves: the next one waits for it, but not for ever."""
    Lease.acquire(tmp_path, AttemptRecord(submission=1))
    beat = as_if_elsewhere(tmp_path, 1, submission=1)
    threading.Timer(0.3, lambda: beat.write_text("2")).start()
    threading.Timer(1.2, lambda: beat.write_text("3")).start()
    began = time.monotonic()
    said: list[str] = []
    assert (
        Lease.acquire(tmp_path, AttemptRecord(submission=2), say=said.append, seconds=2).attempt
        == 2
    )
    assert time.monotonic() - began > 3
    assert "attempt 1 of an earlier submission may still be saving on elsewhere" in said[0]
    beat = as_if_elsewhere(tmp_path, 2, submission=2)
    monkeypatch.setattr(lease, "_REPLACED_SECONDS", 0.0)
    threading.Timer(0.3, lambda: beat.write_text("4")).start()
    with pytest.raises(RunError, match="still running"):
        Lease.acquire(tmp_path, AttemptRecord(submission=3), seconds=2)


def test_the_same_job_started_again_by_slurm_need_not_wait(tmp_path: Path) -> None:
    Lease.acquire(tmp_path, AttemptRecord())
    as_if_elsewhere(tmp_path, 1, slurm_job="12", slurm_restart=0)
    began = time.monotonic()
    assert Lease.acquire(tmp_path, AttemptRecord(slurm_job="12", slurm_restart=1)).attempt == 2
    assert time.monotonic() - began < 1


def test_of_many_that_begin_at_once_one_does(tmp_path: Path) -> None:
    def take(_: int) -> int | str:
        try:
            return Lease.acquire(tmp_path, AttemptRecord()).attempt
        except RunError:
            return "refused"

    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(take, range(16)))
    assert sorted(map(str, got)) == ["1", *["refused"] * 15]


def test_without_hard_links_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", refuse)
    Lease.acquire(tmp_path, AttemptRecord()).release()
    assert Lease.acquire(tmp_path, AttemptRecord()).attempt == 2


def test_a_stale_writer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.5)
    run = Run.create(tmp_path, "x")
    Lease.acquire(run.path, AttemptRecord()).release()
    old = Run(run.path, attempt=1)
    old.mark_running()
    trial = old.add_trial("t", 0, {})
    trial.add_rows(MetricsRow.model_validate({"step": 1}))
    told: list[str] = []
    Lease(run.path, 1).start_heartbeat(told.append)
    Lease.acquire(run.path, AttemptRecord()).release()
    new = Run(run.path, attempt=2)
    new.get_trial("t").add_rows(MetricsRow.model_validate({"step": 2}))
    for write in (
        lambda: old.set_state(RunState.RUNNING),
        lambda: old.add_event(NoteEvent(sentence="x")),
        lambda: trial.set_state(TrialState.RUNNING),
        lambda: trial.add_rows(MetricsRow.model_validate({"step": 2})),
    ):
        with pytest.raises(
            StaleAttempt, match=r"attempt 1 of x-.* was replaced by attempt 2, and stops writing"
        ):
            write()
    ends = time.monotonic() + 15
    while not told and time.monotonic() < ends:
        time.sleep(0.05)
    assert "was replaced by attempt 2" in told[0]
    assert new.read_status().attempt == 1
    new.set_state(RunState.RUNNING)
    assert new.read_status().attempt == 2


def test_rows_that_a_stale_writer_slipped_in_are_passed_over(tmp_path: Path) -> None:
    trial = Run(tmp_path).get_trial("t")
    for step, attempt in ((1, 1), (2, 1), (3, 2), (3, 1), (4, 1), (4, 2)):
        files.append_jsonl(trial.path / "metrics.jsonl", {"step": step, "attempt": attempt})
    assert [(row.step, row.attempt) for row in trial.read_metrics()] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
    ]
