"""Define every error that lorafleet raises on purpose, by what the caller does about it.

LorafleetError              exit code 1: an error in lorafleet
├── UserError               exit code 2: one clear message, no traceback
│   ├── JobFileError        a job file that cannot be read or run (holds every problem)
│   ├── DataError           rows that cannot be trained on, named by file and line
│   ├── AssetError          a model or data set that is missing, unreachable or not as pinned
│   ├── DiskFull            no space for a checkpoint or a record; earlier files are complete
│   ├── PlacementRefused    the hardware cannot hold what one trial needs
│   ├── RunError            no such run, or a run in the wrong state for the command
│   ├── CommandFailed       a command on a cluster's machine failed
│   └── MissingExtra        an optional package is needed
└── TrainingFailure         a trial that cannot continue; the sweep continues without it
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from lorafleet.jobs.text import escape_line_breaks


class ExitCode(IntEnum):
    """Exit codes of the command line; docs/concepts.md describes them for users.

    OUR_FAULT is an error in lorafleet, USER_INPUT one that the user can fix. GATE_REFUSED:
    a check refused the result. TAKEN: in a job of a queue, another driver has the run.
    REQUEUE: saved after a signal, `lorafleet resume` continues. Batch scripts and the
    driver compare these numbers, so they must not change.
    """

    OK = 0
    OUR_FAULT = 1
    USER_INPUT = 2
    GATE_REFUSED = 3
    SOME_TRIALS_FAILED = 4
    TAKEN = 75
    REQUEUE = 85
    INTERRUPTED = 130


class LorafleetError(Exception):
    """Base class of all errors that lorafleet raises on purpose."""

    exit_code = ExitCode.OUR_FAULT


class UserError(LorafleetError):
    """An error that the user can fix; its text is the whole message.

    The command line prints it without a traceback and ends with exit code 2. The text says
    what happened, with the value, and what to do next.
    """

    exit_code = ExitCode.USER_INPUT


@dataclass(frozen=True)
class Problem:
    """One problem of a job file: the dotted key that it is about, and a message.

    `path` is empty for a problem of the whole file. `line` counts from 1, and is None if
    the value is not in the file, such as an override.
    """

    path: str
    sentence: str
    line: int | None = None

    def format_with_location(self, file: str) -> str:
        """Return `file:line: message`, a form that editors can jump to."""
        location = f"{file}:{self.line}" if self.line else file
        return escape_line_breaks(f"{location}: {self.sentence}")


class SpecProblems(ValueError):
    """Raised inside validation: several fields that do not fit together, each with a message.

    Pydantic reports one error for a validator. This one carries a problem for each field;
    `list_problems` unpacks them.
    """

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(problem.sentence for problem in problems))


class JobFileError(UserError):
    """A job file with at least one problem; the message has one line for each problem.

    `rest` is the LoadedJob of the valid fields, if they make a job. `validate` and `plan`
    use it to check names and data too, and so report all problems at once. Site files and
    the user's config raise this error as well, without `rest`.
    """

    def __init__(self, file: str, problems: list[Problem], rest: object = None) -> None:
        self.file = file
        self.problems = problems
        self.rest = rest  # the LoadedJob of the valid fields, if they make one
        super().__init__("\n".join(problem.format_with_location(file) for problem in problems))

    # Pickle would call the class with the message alone. `rest` is left out: it serves only the
    # process that loaded the file.
    def __reduce__(self) -> tuple[type[JobFileError], tuple[str, list[Problem]]]:
        return (JobFileError, (self.file, self.problems))


class DataError(UserError):
    """Rows that cannot be trained on."""


class AssetError(UserError):
    """A model or data set that is not available."""


class DiskFull(UserError):
    """A disk that the run writes to is full."""


_RESUME = "continue the run from its last complete checkpoints with `lorafleet resume`"


def make_disk_full_error(
    error: BaseException, folder: Path, then: str = _RESUME
) -> DiskFull | None:
    """Return a DiskFull error if a full disk or a spent quota explains an error, else None.

    The native code of torch and safetensors raises errors without an errno: these are
    recognised by their text and by how much space is left.

    Args:
        error: The error to explain.
        folder: Folder that was written to.
        then: What the user can do after freeing space.
    """
    text = str(error)
    has_errno = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    names_full_disk = "No space left" in text or "Disk quota" in text
    if (
        not has_errno
        and not names_full_disk
        and not ("failed writing file" in text and _get_free_bytes(folder) < _LOW_SPACE_BYTES)
    ):
        return None
    return DiskFull(
        f"the disk of {folder} is full ({_get_free_bytes(folder) / 1e6:,.0f} MB free): free some "
        f"space, then {then}"
    )


# The text `failed writing file` does not name the cause, so it counts as a full disk only if little
# space is left.
_LOW_SPACE_BYTES = 16_000_000
"""Less free space than this, in bytes, explains a failed write."""


def _get_free_bytes(folder: Path) -> float:
    """Return the free bytes on the disk of a folder, which may not exist yet."""
    # The folder may be the one whose creation failed.
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return float(shutil.disk_usage(existing).free)


class PlacementRefused(UserError):
    """The hardware cannot hold what one trial needs."""


class RunError(UserError):
    """A run that does not exist, or is in the wrong state for the command."""


class CommandFailed(UserError):
    """A command on a cluster's machine that failed; the text is the end of its output."""


class MissingExtra(UserError):
    """An optional package that the command needs is missing."""


class TrainingFailure(LorafleetError):
    """A trial that cannot continue; the search goes on without it.

    Args:
        failure_class: One of FAILURE_CLASSES. It selects the retry policy (`retries` in the
            job file) and is shown in the report.
        sentence: The message for the user.
    """

    final = False
    """True if a retry is known not to help."""

    def __init__(self, failure_class: str, sentence: str) -> None:
        self.failure_class = failure_class
        self.sentence = sentence
        super().__init__(sentence)

    # Ray pickles the error on its way from a trial's process to the driver. Pickle would call the
    # class with the message alone.
    def __reduce__(self) -> tuple[type[TrainingFailure], tuple[str, str]]:
        return (TrainingFailure, (self.failure_class, self.sentence))


FAILURE_CLASSES = ("oom", "nan", "preempted", "worker_lost", "hang", "data", "config", "code")
