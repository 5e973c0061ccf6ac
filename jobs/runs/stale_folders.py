"""Temporary folders that a killed process could not take away: each says whose it is, and the next one clears it.

Only what this user's own lorafleet made is touched: a folder of its prefix that belongs to the user, with an owner file
that belongs to the user, whose process does not live. Nothing is believed of a run's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lorafleet.jobs.runs.lease import machine, started

if TYPE_CHECKING:
    import psutil

PREFIX = "lf-"
OWNER = "owner.json"
_OURS = re.compile(r"lf-[A-Za-z0-9_.-]{6,80}")
_TOKENS = f"{PREFIX}*-token-*"
_TOKEN_SECONDS = 3600.0
"""The step of a job that takes a token comes within moments; between the two no process is there to own it."""
_LEFT_BY_RAY = {"ray", "r"}
_UNOWNED_SECONDS = 600.0
_END_SECONDS = 10.0
_ROUNDS = 5


def write_owner(folder: Path) -> None:
    """Say that a folder is this process's."""
    owner = {"machine": machine(), "pid": os.getpid(), "started": started(os.getpid())}
    (folder / OWNER).write_text(json.dumps(owner))


def clear_orphans(parent: Path) -> None:
    """Remove this user's folders below `parent` whose process on this machine does not live any more, and end what
    still runs in them.

    A token that no step of its job took goes after an hour; a folder that Ray's processes made anew after its removal,
    without an owner, after ten minutes.
    """
    with contextlib.suppress(OSError):
        for path in parent.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if _is_orphan(path):
                    remove(path)


def _is_orphan(path: Path) -> bool:
    now = path.lstat()
    if not stat.S_ISDIR(now.st_mode) or now.st_uid != os.geteuid() or not _OURS.fullmatch(path.name):
        return False
    age = time.time() - now.st_mtime
    if path.match(_TOKENS):
        return age > _TOKEN_SECONDS
    try:
        handle = os.open(path / OWNER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        inner = {child.name for child in path.iterdir()}
        return bool(inner) and inner <= _LEFT_BY_RAY and age > _UNOWNED_SECONDS and not _processes_of(path)
    with os.fdopen(handle) as file:
        of_file = os.fstat(file.fileno())
        if not stat.S_ISREG(of_file.st_mode) or of_file.st_uid != os.geteuid():
            return False
        owner = json.loads(file.read(4096))
    return bool(owner["machine"] == machine() and started(int(owner["pid"])) != owner["started"])


def remove(folder: Path) -> None:
    """End this user's processes that live from a folder of ours, and remove it; Ray's make it anew while they end."""
    until = time.monotonic() + _END_SECONDS
    end_processes(folder)
    while folder.exists() and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def end_processes(folder: Path, *, patience: float = 0.0) -> None:
    """Kill this user's processes that have a folder of ours on their command line, `patience` seconds from now."""
    import psutil

    left = _processes_of(folder)
    if left and patience:
        _, left = psutil.wait_procs(left, timeout=patience)
    for _ in range(_ROUNDS):  # one that was just starting another is seen the next time
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=_END_SECONDS)
        left = _processes_of(folder)
        if not left:
            return


def _processes_of(folder: Path) -> list[psutil.Process]:
    import psutil

    inside, me = f"{folder}/", os.geteuid()
    found = []
    for process in psutil.process_iter(["cmdline", "uids"]):
        uids, words = process.info["uids"], process.info["cmdline"] or []
        if uids is None or uids.real != me or process.pid == os.getpid():
            continue
        if any(inside in word or word.endswith(str(folder)) for word in words) or _writes_into(process, words, inside):
            found.append(process)
    return found


def _writes_into(process: psutil.Process, words: list[str], inside: str) -> bool:
    """Whether one of Ray's processes, which has a title in the place of its command line, has its logs in a folder."""
    import psutil

    if not words or not words[0].startswith("ray::"):
        return False
    with contextlib.suppress(psutil.Error, OSError):
        return any(one.path.startswith(inside) for one in process.open_files())
    return False
