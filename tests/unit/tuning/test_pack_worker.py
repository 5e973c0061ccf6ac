"""The process of a pool that trains a pack, called as its actor calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.tuning.pack_pool import Entry, PackWorker
from lorafleet.tuning.trial_run import Work
from tests.unit.tuning.test_pack_host import SIZE, config, work

__all__ = ["work"]


@pytest.fixture
def worker(work: Work, tmp_path: Path) -> PackWorker:
    return PackWorker(work, tmp_path / "stacks.txt")


def enter(*names: str, alone: str = "") -> list[Entry]:
    return [Entry(config(name), name in alone) for name in names]


def test_a_trial_to_train_alone_waits_and_those_behind_it_too(worker: PackWorker) -> None:
    """Only then it is trained: its rows say that no other one was beside it."""
    leaving: list[str] = []
    entering = enter("a", "b", "c", alone="b")
    left, packs = {"a", "b", "c"}, {}
    while left:
        reply = worker.step(SIZE, leaving, entering)
        entering = []
        for name, report in reply.reports:
            assert report.row is not None
            packs[name] = report.row.pack
        leaving = [name for name, report in reply.reports if report.ends_trial]
        left -= set(leaving)
    assert packs == {"a": 3, "b": None, "c": 3}
    assert worker.leave(leaving)
    assert worker.pack is not None
    assert worker.pack.is_empty


def test_a_stop_sends_back_what_only_waited(worker: PackWorker, work: Work) -> None:
    """It has never been in the pack; the others go on until they have seen the stop too."""
    (Path(work.run) / "stop").touch()
    reply = worker.step(SIZE, [], enter("a", "b", alone="b"))
    ended = {name: report for name, report in reply.reports if report.ends_trial}
    assert ended["b"].stopping
    assert ended["b"].failure is None
    while "a" not in ended:
        reply = worker.step(SIZE, list(ended), [])
        ended |= {name: report for name, report in reply.reports if report.ends_trial}
    assert worker.leave(["a", "b"])
    assert worker.pack is not None
    assert worker.pack.is_empty


@pytest.mark.parametrize("alone", ["", "a"])
def test_trials_leave_a_machine_that_will_be_preempted(
    alone: str, worker: PackWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved, with the failure that costs a restart elsewhere; the process gets no other trial."""
    monkeypatch.setattr("lorafleet.tuning.trial_run.NOTICE_SECONDS", -1.0)
    monkeypatch.setattr("lorafleet.tuning.pack_host.NOTICE_SECONDS", -1.0)
    monkeypatch.setattr("lorafleet.tuning.pack_host.HEARTBEAT_SECONDS", -1.0)
    worker.host.is_node_leaving = lambda: True
    reply = worker.step(SIZE, [], enter("a", alone=alone))
    ((name, report),) = reply.reports
    assert name == "a"
    assert report.failure is not None
    assert report.failure.failure_class == "preempted"
    assert reply.is_leaving
