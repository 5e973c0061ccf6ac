"""Classify what ended a trial, and whether its process can still be used.

A failure is a `FailureRecord`; its class selects the retry limit in the job's `retries`.
There are two ways: an exception in a living process
(`classify_exception`), and a process that died, of which only Ray's output and the
trial's files are left (`classify_crash`).
"""

from __future__ import annotations

import base64
import json
import re
import time
import traceback
from pathlib import Path

import torch

from lorafleet.jobs import files
from lorafleet.jobs.errors import DataError, TrainingFailure, UserError
from lorafleet.jobs.runs.records import FailureRecord
from lorafleet.jobs.runs.run import Trial
from lorafleet.training.meter import is_out_of_memory

_FAILURE_MARKER = "lorafleet-failure:"
_DEVICE_ERRORS = (
    "CUDA error",
    "cuDNN error",
    "CUBLAS_STATUS",
    "NCCL error",
    "HIP error",
    "device-side assert",
)

_PEER_ERRORS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Read error",
    "Write error",
    "Broken pipe",
)
"""Messages of gloo in the remaining processes when another one has ended."""

_LOST_WORKER_ERRORS = (
    "health check failed",
    "is unavailable",
    "ActorDiedError",
    "ActorUnavailableError",
    "NodeDiedError",
)
"""Messages of Ray about lost processes and machines."""
_PREEMPTION_ERRORS = ("preempted=True", "was preempted", "PreemptionError")
DISK_FULL = "disk_full"
"""Class of a failure that ends the run, not the trial: the disk is full."""
_CAUSE_ORDER = (
    DISK_FULL,
    "oom",
    "hang",
    "nan",
    "preempted",
    "data",
    "config",
    "code",
    "worker_lost",
)
"""Failure classes from cause to consequence.

If processes of one group ended for different reasons, the first of these is the cause.
"""


class WorkerUnusable(RuntimeError):
    """Raised out of a process that must not take another trial. Carries its trial's failure.

    Ray quotes and truncates messages, so the failure is encoded in base64 next to the text.
    """

    def __init__(self, failure: FailureRecord) -> None:
        self.failure = failure
        # Base64 has no quotes, spaces or line breaks that Ray could change.
        encoded = base64.b64encode(json.dumps(failure.to_dict()).encode()).decode()
        super().__init__(f"{failure.sentence} [{_FAILURE_MARKER}{encoded}]")

    # Without this, unpickling in the driver would pass the message to __init__ in place of the
    # failure.
    def __reduce__(self) -> tuple[type[WorkerUnusable], tuple[FailureRecord]]:
        return (WorkerUnusable, (self.failure,))


def classify_exception(error: BaseException) -> FailureRecord:
    """Return the failure of an exception.

    lorafleet's own exceptions are classified by type, others by their message; the rest
    count as errors in the code.
    """
    if isinstance(error, TrainingFailure):
        return _make_failure(error.failure_class, error.sentence, final=error.final)
    first_line = (str(error).strip().splitlines() or [""])[0][:300]
    if is_out_of_memory(error):
        return _make_failure("oom", f"out of memory: {first_line}")
    if any(word in str(error) for word in _PEER_ERRORS):
        return _make_failure("worker_lost", f"another process of the trial was lost: {first_line}")
    if is_device_error(error):
        return _make_failure(
            "worker_lost", f"a GPU or the connection between GPUs failed: {first_line}"
        )
    if isinstance(error, DataError):
        return _make_failure("data", first_line)
    if isinstance(error, UserError):
        return _make_failure("config", first_line)
    return _make_failure(
        "code", f"{type(error).__name__}: {first_line} (see traceback.txt of the trial)"
    )


def _make_failure(failure_class: str, sentence: str, *, final: bool = False) -> FailureRecord:
    return FailureRecord(failure_class=failure_class, sentence=sentence, final=final)


def make_disk_full_failure(sentence: str) -> FailureRecord:
    """Return the failure of a process that could not write, for `WorkerUnusable`."""
    return _make_failure(DISK_FULL, sentence)


def is_device_error(error: BaseException) -> bool:
    """Return whether the process's CUDA context may be lost after this error.

    Later results of such a process cannot be trusted, so it must end. Out of memory does
    not count.
    """
    if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _DEVICE_ERRORS)


def save_traceback(run: Path, trial_id: str, error: BaseException) -> None:
    """Write a failed trial's traceback to its folder."""
    text = "".join(traceback.format_exception(error))
    files.write_text(run / "trials" / trial_id / "traceback.txt", text)


def classify_crash(output: str, trial: Trial) -> FailureRecord:
    """Return the failure of a trial's process that ended without a report.

    Args:
        output: The text that Ray wrote about the process's end.
        trial: Stacks of a hang are renamed in its folder, so that they are kept.
    """
    return classify_crash_output(output, classify_hang(trial))


def classify_crash_output(output: str, hang: FailureRecord | None) -> FailureRecord:
    """Return the failure of a process that ended without a report.

    It is derived from failures that the processes sent with `WorkerUnusable`, then from stacks
    of a hang, then from Ray's own words.

    Args:
        output: The text that Ray wrote about the process's end.
        hang: The failure if the process left stacks.

    Returns:
        The failure; its class is DISK_FULL if a process reported that it could not write.
    """
    reported = [
        FailureRecord.model_validate_json(base64.b64decode(text))
        for text in re.findall(re.escape(_FAILURE_MARKER) + r"([A-Za-z0-9+/=]+)", output)
    ]
    # When a hanging process is ended, the others report a lost peer: the stacks show that the hang
    # came first.
    causes = [
        failure
        for failure in reported
        if hang is None or failure.failure_class not in ("worker_lost", "code")
    ]
    if causes:
        return min(causes, key=_rank_cause)
    if hang is not None:
        return hang
    # From here on, only Ray's wording is left. Specific causes come before a lost process, which is
    # a consequence of all of them.
    if any(word in output for word in _PREEMPTION_ERRORS):
        return _make_failure("preempted", "its node was preempted or removed")
    if "WorkerHealthCheckTimeoutError" in output:
        return _make_failure("hang", "a process did not answer Ray Train for ten minutes")
    if "WorkerGroupStartupTimeoutError" in output:
        sentence = (
            "the machines needed to continue did not start in time "
            "(RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S)"
        )
        return _make_failure("worker_lost", sentence)
    if "OutOfMemoryError" in output:
        return _make_failure(
            "oom",
            "out of memory; use a smaller train.per_device_train_batch_size with more accumulation",
        )
    if any(word in output for word in _DEVICE_ERRORS):
        return _make_failure(
            "worker_lost", "a GPU or the connection between GPUs failed (see traceback.txt)"
        )
    # A traceback without a lost process is an error in the code, for example in the actor's set-up.
    is_lost = any(word in output for word in _LOST_WORKER_ERRORS)
    if "creation task" in output or ("Traceback" in output and not is_lost):
        last_line = next(
            (line.strip() for line in reversed(output.splitlines()) if line.strip()), ""
        )
        return _make_failure(
            "code", f"its process could not start: {last_line[:200]} (see traceback.txt)"
        )
    sentence = "its process died (killed, out of memory, or its node was lost)"
    return _make_failure("worker_lost", sentence)


def classify_hang(trial: Trial) -> FailureRecord | None:
    """Return the failure of a trial whose processes left stacks; None if there are none.

    The stacks are renamed, so that a later hang keeps them.
    """
    stacks = trial.save_stacks()
    if not stacks:
        return None
    sentence = (
        "it hung (no progress for retries.hang_minutes); the stacks of its processes are in "
        f"{', '.join(stacks)} of the trial"
    )
    return _make_failure("hang", sentence)


def classify_pack_hang(stacks: Path) -> FailureRecord | None:
    """Return the failure of a pack whose process left stacks; None if there are none.

    Args:
        stacks: The file of that process. It is renamed, so that a later hang keeps it.
    """
    if not stacks.is_file() or not stacks.stat().st_size:
        return None
    kept = stacks.with_name(f"{stacks.stem}-{time.strftime('%Y%m%d-%H%M%S')}{stacks.suffix}")
    stacks.rename(kept)
    sentence = (
        "it hung (no progress for retries.hang_minutes); the stacks of its process are in "
        f"logs/{kept.name} of the run"
    )
    return _make_failure("hang", sentence)


def _rank_cause(failure: FailureRecord) -> int:
    """Return the rank of a failure as the cause of the others; lower is more likely."""
    return _CAUSE_ORDER.index(failure.failure_class)


def save_crash_output(trial: Trial, error_file: str | None) -> str:
    """Return what Ray wrote about a process's end, and copy it to the trial's folder.

    Args:
        error_file: Path of Tune's file for the trial. None or missing: the result is empty.
    """
    if not error_file or not Path(error_file).is_file():
        return ""
    output = Path(error_file).read_text(errors="replace")
    files.write_text(trial.path / "traceback.txt", output)
    return output
