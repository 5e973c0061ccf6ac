"""Temporary folders that a killed process could not take away: each says whose it is, and the next one clears it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

from jobs.lease import machine, started

PREFIX = "lf-"
OWNER = "owner.json"
_TOKENS = f"{PREFIX}*-token-*"
_TOKEN_SECONDS = 3600.0
"""The step of a job that takes a token comes within moments; between the two no process is there to own it."""


def write_owner(folder: Path) -> None:
    """Say that a folder is this process's."""
    owner = {"machine": machine(), "pid": os.getpid(), "started": started(os.getpid())}
    (folder / OWNER).write_text(json.dumps(owner))


def clear_orphans(parent: Path) -> None:
    """Remove this user's folders below `parent` whose process on this machine does not live any more.

    A token that no step of its job took goes after an hour.
    """
    for path in parent.glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            owner = json.loads(path.read_text())
            ours = path.stat().st_uid == os.getuid() and owner["machine"] == machine()
            if ours and started(int(owner["pid"])) != owner["started"]:
                shutil.rmtree(path.parent, ignore_errors=True)
    for path in parent.glob(_TOKENS):
        with contextlib.suppress(OSError):
            found = path.stat(follow_symlinks=False)
            if found.st_uid == os.getuid() and time.time() - found.st_mtime > _TOKEN_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
