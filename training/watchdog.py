"""Noticing that a process hangs: a collective that never returns, a file system that never answers.

faulthandler's timer is a thread in C: it fires when the interpreter is stuck inside a call that holds its lock, and
writes every thread's stack. Some seconds later the kernel's own alarm ends the process, which frees the others of its
group; until then all of them, whose timers run out together, have written theirs.
"""

from __future__ import annotations

import faulthandler
import signal
import time
from pathlib import Path

_REARM_SECONDS = 1.0
_LAST_SECONDS = 10.0
"""Between the stacks and the end."""
_SET_UP = 4.0
"""So many times as long as a pass may take loading a model, converting it, or working out PiSSA's first values."""


class Watchdog:
    """Ends this process when `beat` is not called for `seconds`; there can be one in a process."""

    def __init__(self, stacks: Path, seconds: float) -> None:
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self.seconds = seconds
        self.armed_at = 0.0
        self.file = stacks.open("w") if seconds else None

    def beat(self, *, setting_up: bool = False) -> None:
        """A sign of life."""
        now = time.monotonic()
        if self.file is None or now - self.armed_at <= min(_REARM_SECONDS, self.seconds / 4):
            return
        seconds = self.seconds * (_SET_UP if setting_up else 1)
        faulthandler.dump_traceback_later(seconds, file=self.file)
        signal.setitimer(signal.ITIMER_REAL, seconds + _LAST_SECONDS)  # SIGALRM, which no one here handles, is the end
        self.armed_at = now
        if self.file.tell():  # it had been given up, and came back in its last seconds
            self.file.seek(0)
            self.file.truncate()

    def rest(self) -> None:
        """Nothing is expected until the next beat."""
        if self.armed_at:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.armed_at = 0.0

    def close(self) -> None:
        """Rest for good; a file that nothing was written to goes."""
        self.rest()
        if self.file is not None:
            self.file.close()
            path = Path(self.file.name)
            if path.is_file() and not path.stat().st_size:
                path.unlink()
