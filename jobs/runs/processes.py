"""Identify a process, also after its id was given to another one."""

from __future__ import annotations

import os
from pathlib import Path


def get_machine_id() -> list[str]:
    """Return the host name and the PID namespace of this process.

    A process id is only meaningful within both: containers and machines may share a folder.
    """
    try:
        return [os.uname().nodename, str(Path("/proc/self/ns/pid").readlink())]
    except OSError:
        return [os.uname().nodename]


def get_process_start(pid: int) -> int | None:
    """Return when a process started, or None if it does not run.

    The value is in clock ticks since boot (field 22 of /proc/PID/stat). A reused process id
    has a different value.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return _get_process_start_with_psutil(pid)
    # The second field is the name of the program in brackets, which may itself contain spaces and
    # brackets. Splitting begins after it, at field 3.
    fields = text.rpartition(")")[2].split()
    # A zombie has ended; only its parent has not asked for its exit status yet.
    return None if fields[0] == "Z" else int(fields[19])


def _get_process_start_with_psutil(pid: int) -> int | None:
    """Return when a process started on a system without /proc (macOS); None if it does not run."""
    if Path("/proc/self").is_dir():
        return None
    import psutil

    try:
        return int(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None
