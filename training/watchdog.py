"""Detect and end a process that hangs, for example in a collective or on a file system.

faulthandler's timer is a thread in C: it fires even when the interpreter is stuck
inside a call that holds its lock, and writes every thread's stack. Some seconds later
the kernel's own alarm ends the process, which frees the other processes of its group.
Their timers run out together, so by then all of them have written their stacks.
"""

from __future__ import annotations

import faulthandler
import signal
import time
from pathlib import Path

_REARM_SECONDS = 1.0
_GRACE_SECONDS = 10.0
"""Seconds between writing the stacks and ending the process."""
_SETUP_FACTOR = 4.0
"""Factor on the timeout during set-up.

Set-up is loading or converting a model, or computing PiSSA's first values.
"""


class Watchdog:
    """Ends this process if `reset` is not called for `seconds`.

    A process can have only one watchdog: it uses faulthandler's timer and SIGALRM.

    Args:
        stacks: File for the stacks. `tuning.failures` recognises a hang by it.
        seconds: 0 disables the watchdog.
    """

    def __init__(self, stacks: Path, seconds: float) -> None:
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self.seconds = seconds
        self.armed_at = 0.0
        self.file = stacks.open("w") if seconds else None

    def reset(self, *, setting_up: bool = False) -> None:
        """Reset the timer: the process is alive.

        Args:
            setting_up: Allow the longer timeout of model loading.
        """
        now = time.monotonic()
        # `reset` is called for every micro-batch. Arming the timer starts a thread, so it is done
        # at most once a second.
        if self.file is None or now - self.armed_at <= min(_REARM_SECONDS, self.seconds / 4):
            return
        seconds = self.seconds * (_SETUP_FACTOR if setting_up else 1)
        faulthandler.dump_traceback_later(seconds, file=self.file)
        # The kernel delivers SIGALRM without the interpreter, which may be stuck. It has no
        # handler, so it ends the process.
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)
        self.armed_at = now
        if self.file.tell():  # stacks were written, but the process recovered before the alarm
            self.file.seek(0)
            self.file.truncate()

    def pause(self) -> None:
        """Stop the timer until the next call of `reset`.

        `TrialRun` calls it after each report: the wait for the next call is not a hang.
        """
        if self.armed_at:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.armed_at = 0.0

    def close(self) -> None:
        """Stop the timer for good and delete the stack file if it is empty."""
        self.pause()
        if self.file is not None:
            self.file.close()
            path = Path(self.file.name)
            if path.is_file() and not path.stat().st_size:
                path.unlink()
