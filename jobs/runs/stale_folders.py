"""Remove temporary folders that killed processes left behind.

Each folder has an owner file that names its process. Only folders of this user's
lorafleet are touched: they have its prefix, belong to the user, hold an owner file that
belongs to the user, and their process is dead. Files of a run's folder are not trusted.
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

from lorafleet.jobs.runs.processes import get_machine_id, get_process_start

if TYPE_CHECKING:
    import psutil

PREFIX = "lf-"
OWNER = "owner.json"
_FOLDER_NAME = re.compile(r"lf-[A-Za-z0-9_.-]{6,80}")
_TOKENS = f"{PREFIX}*-token-*"
_TOKEN_SECONDS = 3600.0
"""Maximum age of an unused token. A job step takes its token within moments; until then no
process owns the folder.
"""
# Ray's folder is called `ray` in a local run and `r` in a Slurm job (node.sh).
_LEFT_BY_RAY = {"ray", "r"}
_UNOWNED_SECONDS = 600.0
_END_SECONDS = 10.0
_ROUNDS = 5


def write_owner(folder: Path) -> None:
    """Write the owner file that marks a folder as this process's.

    The start time is stored beside the process id, because ids are reused.
    """
    owner = {
        "machine": get_machine_id(),
        "pid": os.getpid(),
        "started": get_process_start(os.getpid()),
    }
    (folder / OWNER).write_text(json.dumps(owner))


def remove_orphans(parent: Path) -> None:
    """Remove this user's folders below `parent` whose process on this machine is dead.

    Processes that still run in them are killed. Two kinds have no owner: a token that no job
    step took is removed after an hour, and a folder that Ray's processes created again after
    its removal is removed after ten minutes.
    """
    with contextlib.suppress(OSError):
        for path in parent.glob(f"{PREFIX}*"):
            # A folder that cannot be read or has a damaged owner file is left alone. It must not
            # stop the command.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if _is_orphan(path):
                    remove_folder(path)


def _is_orphan(path: Path) -> bool:
    """Return whether a folder is surely this user's and its process is surely dead.

    In doubt the answer is False: the folder of somebody else must not be deleted, and one
    of ours that stays costs only space.
    """
    folder_status = path.lstat()
    if (
        not stat.S_ISDIR(folder_status.st_mode)
        or folder_status.st_uid != os.geteuid()
        or not _FOLDER_NAME.fullmatch(path.name)
    ):
        return False
    age = time.time() - folder_status.st_mtime
    if path.match(_TOKENS):
        return age > _TOKEN_SECONDS
    try:
        # Everybody can create names in /tmp: a link must not lead elsewhere, and a pipe must not
        # block.
        handle = os.open(path / OWNER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        inner = {child.name for child in path.iterdir()}
        return (
            bool(inner)
            and inner <= _LEFT_BY_RAY
            and age > _UNOWNED_SECONDS
            and not _find_processes(path)
        )
    with os.fdopen(handle) as file:
        file_status = os.fstat(file.fileno())
        if not stat.S_ISREG(file_status.st_mode) or file_status.st_uid != os.geteuid():
            return False
        owner = json.loads(file.read(4096))
    return bool(
        owner["machine"] == get_machine_id()
        and get_process_start(int(owner["pid"])) != owner["started"]
    )


def remove_folder(folder: Path) -> None:
    """Kill this user's processes that use a folder of ours, and remove the folder.

    Ray's processes create it again while they end, so removal is repeated.
    """
    deadline = time.monotonic() + _END_SECONDS
    kill_processes(folder)
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def kill_processes(folder: Path, *, patience: float = 0.0) -> None:
    """Kill this user's processes that have a folder of ours on their command line.

    They get `patience` seconds to end by themselves.
    """
    import psutil

    remaining = _find_processes(folder)
    if remaining and patience:
        _, remaining = psutil.wait_procs(remaining, timeout=patience)
    for _ in range(
        _ROUNDS
    ):  # a process may have started another one meanwhile; the next round finds it
        for process in remaining:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(remaining, timeout=_END_SECONDS)
        remaining = _find_processes(folder)
        if not remaining:
            return


def _find_processes(folder: Path) -> list[psutil.Process]:
    """Return this user's processes that use a folder, except this one.

    A process uses it if its command line has the folder's path, or if it is a Ray process
    with open files there.
    """
    import psutil

    path_prefix, user_id = f"{folder}/", os.geteuid()
    processes = []
    for process in psutil.process_iter(["cmdline", "uids"]):
        uids, arguments = process.info["uids"], process.info["cmdline"] or []
        if uids is None or uids.real != user_id or process.pid == os.getpid():
            continue
        if any(
            path_prefix in word or word.endswith(str(folder)) for word in arguments
        ) or _has_open_file_in(process, arguments, path_prefix):
            processes.append(process)
    return processes


def _has_open_file_in(process: psutil.Process, arguments: list[str], path_prefix: str) -> bool:
    """Return whether a Ray process has open files in a folder.

    Ray's processes show a title instead of their command line, so their log files are
    checked.
    """
    import psutil

    if not arguments or not arguments[0].startswith("ray::"):
        return False
    with contextlib.suppress(psutil.Error, OSError):
        return any(file.path.startswith(path_prefix) for file in process.open_files())
    return False
