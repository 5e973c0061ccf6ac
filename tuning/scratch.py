"""A folder of our own for all that Ray and its processes leave in the temporary folder, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from jobs.lease import machine, started

_PREFIX = "lf-"
_OWNER = "owner.json"
_LONGEST_TMPDIR = 24
_LONGEST_LOG = 5_000_000
"""Bytes of one of Ray's logs that are worth keeping."""


def make_scratch() -> Path:
    """A new folder, which this process and its children get as TMPDIR; those of drivers that were killed go.

    Its name is short, since the paths of Ray's sockets lie in it and must have less than 108 characters.
    """
    usual = tempfile.gettempdir()
    parent = Path(usual if len(usual) <= _LONGEST_TMPDIR else "/tmp")
    _clear_orphans(parent)
    scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    owner = {"machine": machine(), "pid": os.getpid(), "started": started(os.getpid())}
    (scratch / _OWNER).write_text(json.dumps(owner))
    os.environ["TMPDIR"] = str(scratch)
    return scratch


def _clear_orphans(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            owner = json.loads(path.read_text())
            ours = path.stat().st_uid == os.getuid() and owner["machine"] == machine()
            if ours and started(int(owner["pid"])) != owner["started"]:
                shutil.rmtree(path.parent, ignore_errors=True)


def keep_logs(scratch: Path, target: Path) -> None:
    """Copy what Ray's processes said: after an error it is all that tells of them."""
    for path in sorted(scratch.glob("ray/session_2*/logs/*")):
        with contextlib.suppress(OSError):
            if path.is_file() and 0 < path.stat().st_size <= _LONGEST_LOG:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.name)
