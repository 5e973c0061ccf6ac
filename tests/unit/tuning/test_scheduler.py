"""What the driver does when processes of trials are lost."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorafleet.tuning import scheduler
from lorafleet.tuning.progress import StopFile
from lorafleet.tuning.scheduler import RungScheduler


def ask(rung_scheduler: RungScheduler) -> tuple[bool, float]:
    """Whether the run is ending, and how long the answer took."""
    before = time.monotonic()
    return rung_scheduler._is_run_ending(), time.monotonic() - before


def test_only_the_first_of_many_lost_processes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_STOP_FILE_SECONDS", 0.3)
    monkeypatch.setattr(scheduler, "_LOSS_SECONDS", 0.2)
    recorder: Any = SimpleNamespace()
    searcher: Any = SimpleNamespace(stop_file=StopFile(tmp_path / "stop"))
    lost = RungScheduler(recorder, searcher, ends_itself=False)
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
