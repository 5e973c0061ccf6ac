"""Where the traceback of a fault of ours goes: the logs of the run that a command is at, else a temporary file."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from pathlib import Path

from lorafleet.jobs.errors import UserError

_RUN: list[Path] = []


def at_run(run: Path) -> None:
    """Note which run this process is at; the last one counts."""
    _RUN[:] = [run]


def keep(error: BaseException) -> Path | str:
    """Write a traceback to a file of its own; returns the file, or the traceback where no file can be written."""
    try:
        return _kept(error)
    except (OSError, UserError):  # a full disk; settings of the user's that cannot be read
        return "".join(traceback.format_exception(error))


def _kept(error: BaseException) -> Path:
    from lorafleet.jobs.runs.trust import distrust

    name = f"lorafleet-{time.strftime('%Y%m%d-%H%M%S')}-"
    folder = None
    if _RUN and _RUN[0].is_dir() and distrust(_RUN[0]) is None:
        folder = _RUN[0] / "logs"
    try:
        if folder is not None:
            folder.mkdir(exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=name, suffix=".txt", dir=folder)
    except OSError:  # a full or read-only disk
        handle, path = tempfile.mkstemp(prefix=name, suffix=".txt")
    with os.fdopen(handle, "w", errors="backslashreplace") as file:
        file.write("".join(traceback.format_exception(error)))
    return Path(path)
