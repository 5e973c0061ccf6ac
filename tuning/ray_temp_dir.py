"""A folder of our own for all that Ray and its processes leave in the temporary folder, and its end."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorafleet.jobs.runs.stale_folders import PREFIX, clear_orphans, end_processes, remove, write_owner

TOKEN = "token"
"""Ray's token in such a folder, which its owner alone can read."""
_LONGEST_TMPDIR = 24
_LONGEST_LOG = 5_000_000
"""Bytes of one of Ray's logs that are worth keeping."""
_PATIENCE_SECONDS = 3.0
"""How long Ray's processes may take to end before they are ended."""


def scratch_parent() -> Path:
    """Where such folders lie. Their paths are short: Ray's sockets lie in them, with less than 108 characters."""
    usual = tempfile.gettempdir()
    return Path(usual if len(usual) <= _LONGEST_TMPDIR else "/tmp")  # nosec B108  # mkdtemp


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder (0700) with a token in it (0600), which this process and its children have as TMPDIR until its end.

    Those of drivers that were killed go first.
    """
    parent = scratch_parent()
    clear_orphans(parent)
    scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    write_owner(scratch)
    handle = os.open(scratch / TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(scratch)
    try:
        yield scratch
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
        end_processes(scratch, patience=_PATIENCE_SECONDS)
        remove(scratch)


def keep_logs(scratch: Path, target: Path) -> None:
    """Copy what Ray's processes said: after an error it is all that tells of them."""
    for path in sorted(scratch.glob("ray/session_2*/logs/*")):
        with contextlib.suppress(OSError):
            if path.is_file() and 0 < path.stat().st_size <= _LONGEST_LOG:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.name)
