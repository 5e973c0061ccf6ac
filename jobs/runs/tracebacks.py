"""Save the traceback of an internal error to a file of its own.

The file is in the logs of the current run, or else a temporary one. Users see the path
of the file. The traceback itself is shown only if no file can be written.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from pathlib import Path

from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs import client_log

_CURRENT_RUN: list[Path] = []


def set_current_run(run: Path) -> None:
    """Set the run that this process works on; the last call counts.

    Tracebacks and the command's log go to the run's logs/.
    """
    _CURRENT_RUN[:] = [run]
    client_log.attach(run)


def save_traceback(error: BaseException) -> Path | str:
    """Write a traceback to its own file.

    Returns:
        The file, or the text of the traceback if no file can be written.
    """
    try:
        return _write_traceback(error)
    except (OSError, UserError):  # a full disk, or user settings that cannot be read
        return "".join(traceback.format_exception(error))


def _write_traceback(error: BaseException) -> Path:
    from lorafleet.jobs.runs.trust import find_distrust_reason

    name = f"lorafleet-{time.strftime('%Y%m%d-%H%M%S')}-"
    folder = None
    # A run that is not this user's own is read-only (docs/security.md): its logs/ could be a link.
    if _CURRENT_RUN and _CURRENT_RUN[0].is_dir() and find_distrust_reason(_CURRENT_RUN[0]) is None:
        folder = _CURRENT_RUN[0] / "logs"
    try:
        if folder is not None:
            folder.mkdir(exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=name, suffix=".txt", dir=folder)
    except OSError:  # a full or read-only disk
        handle, path = tempfile.mkstemp(prefix=name, suffix=".txt")
    with os.fdopen(handle, "w", errors="backslashreplace") as file:
        file.write("".join(traceback.format_exception(error)))
    return Path(path)
