"""A killed build of an extension does not make all later ones wait; one that goes on is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from lorafleet.training import build_locks
from lorafleet.training.build_locks import clear_stale_locks

BUILDER = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    folder = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    return folder / "lock"


def test_a_lock_goes_with_its_builder(lock: Path, tmp_path: Path) -> None:
    builder = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(lock)], stdout=subprocess.PIPE, text=True
    )
    assert builder.stdout is not None
    assert builder.stdout.readline() == "held\n"
    assert clear_stale_locks(tmp_path) == []
    builder.kill()
    builder.wait()
    assert lock.exists()
    assert clear_stale_locks(tmp_path) == [lock]
    assert FileBaton(str(lock)).try_acquire()


def test_of_another_machine_a_while_is_waited(
    lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.touch()
    monkeypatch.setattr(build_locks, "_is_on_network", lambda _: True)
    assert clear_stale_locks(tmp_path) == []
    os.utime(lock, (0, 0))
    (lock.parent / "main.o").touch()  # it still compiles
    assert clear_stale_locks(tmp_path) == []
    old = time.time() - 1000
    os.utime(lock.parent / "main.o", (old, old))
    assert clear_stale_locks(tmp_path) == [lock]


def test_nothing_else_is_taken(lock: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "thesis"
    elsewhere.touch()
    lock.symlink_to(elsewhere)
    (tmp_path / "lock").touch()
    assert clear_stale_locks(tmp_path) == []
    assert clear_stale_locks(tmp_path / "nowhere") == []
