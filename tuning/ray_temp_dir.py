"""Create a temporary folder for the files of Ray's processes, and delete it at the end.

Ray leaves sockets, logs and its token in its folder. A driver that is killed cannot
delete them, so each folder names its owner, and the next driver on the machine removes
folders whose owner is gone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorafleet.jobs.runs.stale_folders import (
    PREFIX,
    kill_processes,
    remove_folder,
    remove_orphans,
    write_owner,
)

TOKEN_FILE = "token"
"""File name of Ray's token in the temporary folder. Only the owner can read it."""
_MAX_TMPDIR_LENGTH = 24
_MAX_LOG_BYTES = 5_000_000
"""Maximum size of a Ray log that is copied, in bytes."""
_EXIT_SECONDS = 3.0
"""Seconds that Ray's processes have to exit before they are killed."""


def get_temp_parent() -> Path:
    """Return the parent of the temporary folders.

    Its path is short, because the paths of Ray's sockets in it must have less than 108
    characters.
    """
    default = tempfile.gettempdir()
    return Path(default if len(default) <= _MAX_TMPDIR_LENGTH else "/tmp")  # nosec B108  # mkdtemp


@contextlib.contextmanager
def create_ray_temp_dir() -> Iterator[Path]:
    """Yield a new folder (0700) with a token file (0600), and delete it on exit.

    It is the TMPDIR of this process and its children until then. Folders of killed drivers
    are deleted first.
    """
    parent = get_temp_parent()
    remove_orphans(parent)
    temp_dir = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    write_owner(temp_dir)
    # Created with its mode: a later chmod would leave a moment in which others can read it.
    handle = os.open(temp_dir / TOKEN_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    previous = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(temp_dir)
    try:
        yield temp_dir
    finally:
        if previous is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = previous
        # Processes that outlive Ray would write into the folder while it is deleted.
        kill_processes(temp_dir, patience=_EXIT_SECONDS)
        remove_folder(temp_dir)


def save_ray_logs(temp_dir: Path, target: Path) -> None:
    """Copy the logs of Ray's processes: after an error they are the only source of information.

    Empty and very large files are left out, and errors are ignored.

    Args:
        temp_dir: Folder of `create_ray_temp_dir`.
        target: Created if there is anything to copy.
    """
    for path in sorted(temp_dir.glob("ray/session_2*/logs/*")):
        with contextlib.suppress(OSError):
            if path.is_file() and 0 < path.stat().st_size <= _MAX_LOG_BYTES:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.name)
