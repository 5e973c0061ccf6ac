"""Classify what ended a trial, and whether its process can still be used.

A failure is a dict with `failure_class` and `sentence`; the class selects the retry
limit in `retries`. There are two ways: an exception in a living process
(`classify_exception`), and a process that died, of which only Ray's output and the
trial's files are left (`classify_crash`).
"""

from __future__ import annotations

import base64
import json
import re
import traceback
from pathlib import Path
from typing import Any

import torch

from lorafleet.jobs import files
from lorafleet.jobs.errors import DataError, TrainingFailure, UserError
from lorafleet.jobs.runs.run import Trial

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
_CAUSE_ORDER = ("oom", "hang", "nan", "preempted", "data", "config", "code", "worker_lost")
"""Failure classes from cause to consequence.

If processes of one group ended for different reasons, the first of these is the cause.
"""


class WorkerUnusable(RuntimeError):
    """Raised out of a process that must not take another trial. Carries its trial's failure.

    Ray quotes and truncates messages, so the failure is encoded in base64 next to the text.
    """

    def __init__(self, failure: dict[str, Any]) -> None:
        self.failure = failure
        # Base64 has no quotes, spaces or line breaks that Ray could change.
        encoded = base64.b64encode(json.dumps(files.replace_non_finite(failure)).encode()).decode()
        super().__init__(f"{failure.get('sentence') or failure} [{_FAILURE_MARKER}{encoded}]")

    # Without this, unpickling in the driver would pass the message to __init__ in place of the
    # failure.
    def __reduce__(self) -> tuple[type[WorkerUnusable], tuple[dict[str, Any]]]:
        return (WorkerUnusable, (self.failure,))


def classify_exception(error: BaseException) -> dict[str, Any]:
    """Return `{"failure_class", "sentence"}` of an exception.

    lorafleet's own exceptions are classified by type, others by their message; the rest
    count as errors in the code. `final` is added if the trial must not be retried.
    """
    if isinstance(error, TrainingFailure):
        failure: dict[str, Any] = {"failure_class": error.failure_class, "sentence": error.sentence}
        return failure | ({"final": True} if error.final else {})
    first_line = (str(error).strip().splitlines() or [""])[0][:300]
    if is_oom(error):
        return {"failure_class": "oom", "sentence": f"out of memory: {first_line}"}
    if any(word in str(error) for word in _PEER_ERRORS):
        return {
            "failure_class": "worker_lost",
            "sentence": f"another process of the trial was lost: {first_line}",
        }
    if is_device_error(error):
        return {
            "failure_class": "worker_lost",
            "sentence": f"a GPU or the connection between GPUs failed: {first_line}",
        }
    if isinstance(error, DataError):
        return {"failure_class": "data", "sentence": first_line}
    if isinstance(error, UserError):
        return {"failure_class": "config", "sentence": first_line}
    return {
        "failure_class": "code",
        "sentence": f"{type(error).__name__}: {first_line} (see traceback.txt of the trial)",
    }


def is_oom(error: BaseException) -> bool:
    """Return whether the error means that a GPU or the machine is out of memory.

    torch's CPU allocator raises a plain RuntimeError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in str(error) or "out of memory" in str(error)
    )


def is_device_error(error: BaseException) -> bool:
    """Return whether the process's CUDA context may be lost after this error.

    Later results of such a process cannot be trusted, so it must end. Out of memory does
    not count.
    """
    if isinstance(error, torch.AcceleratorError) and not is_oom(error):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _DEVICE_ERRORS)


def save_traceback(run: Path, trial_id: str, error: BaseException) -> None:
    """Write a failed trial's traceback to its folder."""
    text = "".join(traceback.format_exception(error))
    files.write_text(run / "trials" / trial_id / "traceback.txt", text)


def classify_crash(output: str, trial: Trial) -> dict[str, Any]:
    """Return the failure of a process that ended without a report.

    It is derived from Ray's output and the files in the trial's folder, in this order:
    failures that the processes sent with `WorkerUnusable`, stacks of a hang, then Ray's own
    words.

    Args:
        output: The text that Ray wrote about the process's end.
        trial: Stacks of a hang are renamed in its folder, so that they are kept.

    Returns:
        As `classify_exception`, or `{"full_disk": sentence}`.
    """
    reported = [
        json.loads(base64.b64decode(text))
        for text in re.findall(re.escape(_FAILURE_MARKER) + r"([A-Za-z0-9+/=]+)", output)
    ]
    stacks = trial.save_stacks()
    # When a hanging process is ended, the others report a lost peer: the stacks show that the hang
    # came first.
    causes = [
        failure
        for failure in reported
        if not stacks or failure.get("failure_class") not in ("worker_lost", "code")
    ]
    if causes:
        return min(causes, key=_rank_cause)
    if stacks:
        sentence = (
            "it hung (no progress for retries.hang_minutes); the stacks of its processes are in "
            f"{', '.join(stacks)} of the trial"
        )
        return {"failure_class": "hang", "sentence": sentence}
    # From here on, only Ray's wording is left. Specific causes come before a lost process, which is
    # a consequence of all of them.
    if any(word in output for word in _PREEMPTION_ERRORS):
        return {"failure_class": "preempted", "sentence": "its node was preempted or removed"}
    if "WorkerHealthCheckTimeoutError" in output:
        return {
            "failure_class": "hang",
            "sentence": "a process did not answer Ray Train for ten minutes",
        }
    if "WorkerGroupStartupTimeoutError" in output:
        sentence = (
            "the machines needed to continue did not start in time "
            "(RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S)"
        )
        return {"failure_class": "worker_lost", "sentence": sentence}
    if "OutOfMemoryError" in output:
        return {
            "failure_class": "oom",
            "sentence": (
                "out of memory; use a smaller train.per_device_train_batch_size with more "
                "accumulation"
            ),
        }
    if any(word in output for word in _DEVICE_ERRORS):
        return {
            "failure_class": "worker_lost",
            "sentence": "a GPU or the connection between GPUs failed (see traceback.txt)",
        }
    # A traceback without a lost process is an error in the code, for example in the actor's set-up.
    is_lost = any(word in output for word in _LOST_WORKER_ERRORS)
    if "creation task" in output or ("Traceback" in output and not is_lost):
        last_line = next(
            (line.strip() for line in reversed(output.splitlines()) if line.strip()), ""
        )
        return {
            "failure_class": "code",
            "sentence": f"its process could not start: {last_line[:200]} (see traceback.txt)",
        }
    sentence = "its process died (killed, out of memory, or its node was lost)"
    return {"failure_class": "worker_lost", "sentence": sentence}


def _rank_cause(failure: dict[str, Any]) -> int:
    """Return the rank of a failure as the cause of the others; lower is more likely."""
    return -1 if "full_disk" in failure else _CAUSE_ORDER.index(failure["failure_class"])


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
