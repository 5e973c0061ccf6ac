"""What mirrors a search never slows it down, and never ends it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.events import Event, TrackingFailedEvent
from lorafleet.jobs.runs.records import MetricsRow
from lorafleet.jobs.runs.run import Run, Trial, TrialState
from lorafleet.tuning.tracking import BackgroundTracker, WandbMirror
from tests.conftest import JobMaker


class Mirror:
    """Records its calls. Each waits for `gate`, as W&B may for the network."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.gate = threading.Event()
        self.failing = failing

    def _call(self, *call: Any) -> None:
        self.gate.wait(30)
        if call[0] == self.failing:
            raise RunError("W&B is not there")
        self.calls.append(call)

    def write_missing(self) -> None:
        self._call("missing")

    def begin(self, trial_id: str) -> None:
        self._call("begin", trial_id)

    def log(self, trial_id: str, row: MetricsRow) -> None:
        self._call("log", trial_id, row.step)

    def end(self, trial_id: str) -> None:
        self._call("end", trial_id)

    def close(self) -> None:
        self._call("close")


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Run.create(tmp_path, "tracked").add_trial("aaaa", 0, {})


def get_run(trial: Trial) -> Run:
    return Run(trial.path.parent.parent)


def train(tracker: BackgroundTracker, trial: Trial, steps: int) -> None:
    tracker.on_begin(trial)
    for step in range(steps):
        tracker.on_row(trial, MetricsRow(step=step))
    tracker.on_end(trial)


def test_the_search_does_not_wait_and_nothing_is_lost(trial: Trial) -> None:
    mirror = Mirror()
    tracker = BackgroundTracker(get_run(trial), mirror)
    before = time.monotonic()
    train(tracker, trial, 1000)
    assert time.monotonic() - before < 1.0
    assert mirror.calls == []
    mirror.gate.set()
    tracker.close(lambda: False)
    logged = [("log", "aaaa", step) for step in range(1000)]
    assert mirror.calls == [
        ("missing",),
        ("begin", "aaaa"),
        *logged,
        ("end", "aaaa"),
        ("close",),
    ]
    assert get_run(trial).read_events(TrackingFailedEvent) == []


def test_results_that_do_not_fit_are_left_out_and_the_end_is_not(trial: Trial) -> None:
    mirror = Mirror()
    tracker = BackgroundTracker(get_run(trial), mirror, max_waiting=10)
    tracker.on_begin(trial)
    for step in range(100):
        tracker.on_row(trial, MetricsRow(step=step))
    mirror.gate.set()
    time.sleep(0.5)
    tracker.on_row(trial, MetricsRow(step=100))  # there is room again, but it would leave a gap
    tracker.on_end(trial)
    tracker.close(lambda: False)
    names = [call[0] for call in mirror.calls]
    assert 5 < names.count("log") <= 10
    assert names[-2:] == ["end", "close"]
    assert ("log", "aaaa", 100) not in mirror.calls


@pytest.mark.parametrize("failing", ["missing", "begin", "log", "end", "close"])
def test_an_error_of_the_tracker_costs_a_note(failing: str, trial: Trial) -> None:
    mirror = Mirror(failing)
    mirror.gate.set()
    tracker = BackgroundTracker(get_run(trial), mirror)
    train(tracker, trial, 3)
    time.sleep(0.2)
    train(tracker, trial, 3)
    tracker.close(lambda: False)
    (event,) = get_run(trial).read_events(TrackingFailedEvent)
    assert event.error == "RunError: W&B is not there"
    assert not tracker.is_stuck
    closed = 0 if failing == "close" else 1
    assert [call[0] for call in mirror.calls].count("close") == closed
    # An earlier attempt's run that cannot be written does not concern those of this one.
    logged = 6 if failing in ("missing", "close") else 0
    assert [call[0] for call in mirror.calls].count("log") >= logged


def test_a_run_that_stops_does_not_wait_for_what_is_left(trial: Trial) -> None:
    mirror = Mirror()
    tracker = BackgroundTracker(get_run(trial), mirror)
    train(tracker, trial, 1000)
    threading.Timer(0.3, mirror.gate.set).start()
    tracker.close(lambda: True)
    names = [call[0] for call in mirror.calls]
    assert names[0] == "missing"
    assert names[-1] == "close"
    assert names.count("log") == 0
    assert get_run(trial).list_remarks() == []


def test_a_stop_that_comes_while_the_end_waits_is_heard(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafleet.tuning.tracking._STOP_SECONDS", 0.3)
    tracker, asked_at = BackgroundTracker(get_run(trial), Mirror()), time.monotonic() + 0.5
    tracker.close(lambda: time.monotonic() > asked_at)
    assert 0.7 < time.monotonic() - asked_at + 0.5 < 3.0
    assert tracker.is_stuck
    assert get_run(trial).list_remarks() == []


def test_the_end_of_a_search_does_not_wait_for_ever(trial: Trial) -> None:
    tracker = BackgroundTracker(get_run(trial), Mirror(), close_seconds=0.2)
    train(tracker, trial, 3)
    tracker.close(lambda: False)
    assert tracker.is_stuck
    (sentence,) = get_run(trial).list_remarks()
    assert sentence.startswith("W&B did not take everything within 0 seconds.")


class WandbRun:
    """Stands for a W&B run, whose files are read in the tests of whole sweeps."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.steps, self.summary, self.finished = step, [], {}, False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.steps.append(step)

    def finish(self, exit_code: int = 0) -> None:
        self.finished = True


@pytest.mark.parametrize(
    ("mode", "known", "logged"), [("offline", 7, [1, 2, 3]), ("online", 2, [2, 3])]
)
def test_rows_that_were_left_out_are_read_from_the_record(
    mode: Any,
    known: int,
    logged: list[int],
    trial: Trial,
    bert_job: JobMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wandb_run = WandbRun(known)
    monkeypatch.setattr("lorafleet.tuning.tracking.open_wandb", lambda *_, **__: wandb_run)
    run = get_run(trial)
    mirror = WandbMirror(run, bert_job().job, mode, {})
    trial.add_rows(MetricsRow(step=1))
    mirror.begin(trial.id)
    trial.add_rows(MetricsRow(step=2), MetricsRow(step=3))
    mirror.log(trial.id, MetricsRow(step=2))
    mirror.log(trial.id, MetricsRow(step=2))
    trial.set_state(TrialState.FINISHED)
    mirror.end(trial.id)
    assert wandb_run.steps == logged
    assert wandb_run.summary["state"] == "finished"
    assert wandb_run.finished
    assert [event.event for event in run.read_events(Event)] == ["trial"]


@pytest.mark.parametrize("begins", [False, True])
def test_records_of_an_unfinished_trial_stay_until_it_begins_again(
    begins: bool, trial: Trial, bert_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafleet.tuning.tracking.open_wandb", lambda *_, **__: WandbRun())
    run = get_run(trial)
    mirror = WandbMirror(run, bert_job().job, "offline", {trial.id: False})
    earlier = mirror.folder / "wandb" / f"offline-run-20260101_000000-{run.id}-{trial.id}"
    other = mirror.folder / "wandb" / f"offline-run-20260101_000000-{run.id}-report"
    for folder in (earlier, other):
        folder.mkdir(parents=True)
    mirror.write_missing()
    if begins:
        mirror.begin(trial.id)
    assert earlier.is_dir() is not begins
    assert other.is_dir()
