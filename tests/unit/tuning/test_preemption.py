"""Lost processes at the end of a run, and in the middle of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lorafleet.tuning import preemption
from lorafleet.tuning.preemption import EndOfRun
from lorafleet.tuning.progress import StopFile


def ask(end_of_run: EndOfRun) -> tuple[bool, float]:
    before = time.monotonic()
    return end_of_run.has_begun(), time.monotonic() - before


def test_only_the_first_of_many_lost_processes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "_STOP_FILE_SECONDS", 0.3)
    monkeypatch.setattr(preemption, "_LOSS_SECONDS", 0.2)
    lost = EndOfRun(StopFile(tmp_path / "stop"))
    ending, seconds = ask(lost)
    assert (ending, seconds > 0.25) == (False, True)
    for _ in range(10):  # the other processes of its node
        ending, seconds = ask(lost)
        assert (ending, seconds < 0.1) == (False, True)
    # A later loss is another one: perhaps its job is being ended.
    time.sleep(0.25)
    (tmp_path / "stop").touch()
    ending, seconds = ask(lost)
    assert (ending, seconds < 0.1) == (True, True)
