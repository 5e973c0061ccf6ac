"""Noticing that a process hangs: a collective that never returns, a file system that never answers.

faulthandler's timer is a thread in C: it fires when the interpreter is stuck inside a call that holds its lock, writes
every thread's stack and ends the process, which frees the others of its group.
"""

from __future__ import annotations

import faulthandler
import time
from pathlib import Path

_REARM_SECONDS = 1.0


class Watchdog:
    """Ends this process when `beat` is not called for `seconds`; there can be one in a process."""

    def __init__(self, stacks: Path, seconds: float) -> None:
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self.seconds = seconds
        self.armed_at = 0.0
        self.file = stacks.open("w") if seconds else None

    def beat(self) -> None:
        """A sign of life."""
        now = time.monotonic()
        if self.file is not None and now - self.armed_at > min(_REARM_SECONDS, self.seconds / 4):
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.file)
            self.armed_at = now

    def rest(self) -> None:
        """Nothing is expected until the next beat."""
        if self.armed_at:
            faulthandler.cancel_dump_traceback_later()
            self.armed_at = 0.0

    def close(self) -> None:
        """Rest for good; a file that nothing was written to goes."""
        self.rest()
        if self.file is not None:
            self.file.close()
            path = Path(self.file.name)
            if path.is_file() and not path.stat().st_size:
                path.unlink()
