"""Every error that lorafleet raises on purpose, by what the caller would do differently.

LorafleetError                      exit code 1: ours
├── UserError                       exit code 2: one clear sentence, no traceback
│   ├── JobFileError                a job file that cannot be read or run (holds every problem found)
│   ├── DataError                   rows that cannot be trained on, named by file and line
│   ├── AssetError                  a model or data set that is missing, unreachable or not what was pinned
│   ├── DiskFull                    no room for a checkpoint or a record; what was written before is whole
│   ├── PlacementRefused            the hardware cannot hold what one trial needs
│   ├── RunError                    no such run, or a run in the wrong state for what was asked
│   ├── CommandFailed               a command on a cluster's machine failed
│   └── MissingExtra                an optional package is needed
└── TrainingFailure                 a trial that cannot go on: it has a class, the sweep goes on without it
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from lorafleet.jobs.text import one_line


class ExitCode(IntEnum):
    """What the command line answers to the shell."""

    OK = 0
    OUR_FAULT = 1
    USER_INPUT = 2
    GATE_REFUSED = 3
    SOME_TRIALS_FAILED = 4
    TAKEN = 75
    REQUEUE = 85
    INTERRUPTED = 130


class LorafleetError(Exception):
    """The root of the tree."""

    exit_code = ExitCode.OUR_FAULT


class UserError(LorafleetError):
    """Something the user can mend; its text is the whole message."""

    exit_code = ExitCode.USER_INPUT


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a job file: the dotted key it is about, and a sentence."""

    path: str
    sentence: str
    line: int | None = None

    def located(self, file: str) -> str:
        """`file:line: sentence`, the form editors can jump to."""
        where = f"{file}:{self.line}" if self.line else file
        return one_line(f"{where}: {self.sentence}")


class SpecProblems(ValueError):
    """Raised inside validation: several fields that do not go together, each with its own sentence."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(problem.sentence for problem in problems))


class JobFileError(UserError):
    """A job file with at least one problem; the message is one line a problem."""

    def __init__(self, file: str, problems: list[Problem], rest: object = None) -> None:
        self.file = file
        self.problems = problems
        self.rest = rest  # the LoadedJob of all fields that are right, where they make one
        super().__init__("\n".join(problem.located(file) for problem in problems))

    def __reduce__(self) -> tuple[type[JobFileError], tuple[str, list[Problem]]]:
        return (JobFileError, (self.file, self.problems))


class DataError(UserError):
    """Rows that cannot be trained on."""


class AssetError(UserError):
    """A model or data set that cannot be had."""


class DiskFull(UserError):
    """There is no room on a disk that the run writes to."""


_RESUME = "`lorafleet resume` goes on from the last good checkpoints"


def disk_full(error: BaseException, folder: Path, then: str = _RESUME) -> DiskFull | None:
    """The sentence for an error that a full disk (or a spent quota) explains, or None; `then`: what to do.

    torch and safetensors write with code of their own, whose errors have no errno: theirs are known by their words, and
    by how much room there is.
    """
    words = str(error)
    known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    likely = "No space left" in words or "Disk quota" in words
    if not known and not likely and not ("failed writing file" in words and _free(folder) < _LITTLE):
        return None
    return DiskFull(f"the disk of {folder} is full ({_free(folder) / 1e6:,.0f} MB free): free some space, then {then}")


_LITTLE = 16_000_000
"""Bytes; less room than this explains a write that failed."""


def _free(folder: Path) -> float:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return float(shutil.disk_usage(existing).free)


class PlacementRefused(UserError):
    """What one trial needs does not fit the hardware."""


class RunError(UserError):
    """No such run, or it is not in a state for what was asked."""


class CommandFailed(UserError):
    """A command on a cluster's machine ended with another code than 0; the text is its last words."""


class MissingExtra(UserError):
    """An optional package is needed for what was asked."""


class TrainingFailure(LorafleetError):
    """A trial that cannot go on. `failure_class` is one of FAILURE_CLASSES."""

    final = False
    """Whether trying again is known to change nothing."""

    def __init__(self, failure_class: str, sentence: str) -> None:
        self.failure_class = failure_class
        self.sentence = sentence
        super().__init__(sentence)

    def __reduce__(self) -> tuple[type[TrainingFailure], tuple[str, str]]:
        return (TrainingFailure, (self.failure_class, self.sentence))


FAILURE_CLASSES = ("oom", "nan", "preempted", "worker_lost", "hang", "data", "config", "code")
