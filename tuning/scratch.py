"""A folder of our own for all that Ray and its processes leave in the temporary folder, and its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from jobs.orphans import PREFIX, clear_orphans, write_owner

_LONGEST_TMPDIR = 24
_LONGEST_LOG = 5_000_000
"""Bytes of one of Ray's logs that are worth keeping."""


def make_scratch() -> Path:
    """A new folder, which this process and its children get as TMPDIR; those of drivers that were killed go.

    Its name is short, since the paths of Ray's sockets lie in it and must have less than 108 characters.
    """
    usual = tempfile.gettempdir()
    parent = Path(usual if len(usual) <= _LONGEST_TMPDIR else "/tmp")
    clear_orphans(parent)
    scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    write_owner(scratch)
    os.environ["TMPDIR"] = str(scratch)
    return scratch


def keep_logs(scratch: Path, target: Path) -> None:
    """Copy what Ray's processes said: after an error it is all that tells of them."""
    for path in sorted(scratch.glob("ray/session_2*/logs/*")):
        with contextlib.suppress(OSError):
            if path.is_file() and 0 < path.stat().st_size <= _LONGEST_LOG:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.name)
