"""On PYTHONPATH of the runs that tests disturb: Python imports it at its start, in every process of
the run.

LORAFLEET_TEST_FAULT holds what goes wrong, as JSON: {"at": "module:name" or "module:Class.method",
"call": its number in the process from 1, "do": what, "flag": a file that is made when it happens;
where it is there already, nothing happens, "rank": only in this process of a group}.
"""

import errno
import importlib.abc
import importlib.util
import json
import os
import sys
import time

KEPT = []


def pause() -> None:
    """Stay here until the test has done what it wants to do."""
    time.sleep(600)


def linger() -> None:
    """Stay here for long enough to be met."""
    time.sleep(4)


def oom() -> None:
    raise MemoryError("no room (planted)")


def oom_that_stays() -> None:
    KEPT.append(bytearray(os.urandom(1) * 600_000_000))
    raise MemoryError("no room, and it was not given back (planted)")


def device() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered (planted)")


def disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def crash() -> None:
    """Die of a signal, as of a fault in a compiled library."""
    os.kill(os.getpid(), 11)


class Planter(importlib.abc.MetaPathFinder):
    """Wraps one function of one module as soon as that is imported."""

    def __init__(self, fault: dict) -> None:
        self.fault = fault
        self.module, _, self.target = fault["at"].partition(":")

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module) -> None:
            run(module)
            self.plant(module)

        spec.loader.exec_module = exec_module
        return spec

    def plant(self, module) -> None:
        owner = module
        *way, last = self.target.split(".")
        for name in way:
            owner = getattr(owner, name)
        real, count = getattr(owner, last), [0]
        act = globals()[
            self.fault["do"]
        ]  # by value: Ray may carry this function to another process

        def disturbed(*args, **kwargs):
            count[0] += 1
            if count[0] >= self.fault.get("call", 1) and self.mine():
                try:
                    os.close(os.open(self.fault["flag"], os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                except FileExistsError:
                    return real(*args, **kwargs)
                except NotADirectoryError:
                    pass  # a flag that cannot be made: it happens each time
                act()
            return real(*args, **kwargs)

        setattr(owner, last, disturbed)

    def mine(self) -> bool:
        if "rank" not in self.fault:
            return True
        from torch import distributed

        return distributed.is_initialized() and distributed.get_rank() == self.fault["rank"]


if "LORAFLEET_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, Planter(json.loads(os.environ["LORAFLEET_TEST_FAULT"])))
