"""What ended a trial, and what that means for the process it was in."""

from __future__ import annotations

import base64
import json
import re
import traceback
from pathlib import Path
from typing import Any

import torch
from lorafleet.jobs import files
from lorafleet.jobs.errors import TrainingFailure, UserError
from lorafleet.jobs.runs.run import Trial

_MARK = "lorafleet-failure:"
_DEVICE_WORDS = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "NCCL error", "HIP error", "device-side assert")

_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Read error", "Write error", "Broken pipe")
"""What gloo says to the processes that are left."""

_LOST_WORDS = ("health check failed", "is unavailable", "ActorDiedError", "ActorUnavailableError", "NodeDiedError")
"""What Ray says of processes and machines that are gone."""
_PREEMPTED_WORDS = ("preempted=True", "was preempted", "PreemptionError")
_TELLING = ("oom", "hang", "nan", "preempted", "data", "config", "code", "worker_lost")
"""When processes of one group ended for different reasons: the first of these is the cause, the others followed."""


class SpoiledProcess(RuntimeError):
    """Raised out of a process that must not take another trial; carries what ended the one it had.

    Ray quotes and cuts messages as it likes: the failure is in base64 beside the words.
    """

    def __init__(self, failure: dict[str, Any]) -> None:
        self.failure = failure
        packed = base64.b64encode(json.dumps(files.finite(failure)).encode()).decode()
        super().__init__(f"{failure.get('sentence') or failure} [{_MARK}{packed}]")

    def __reduce__(self) -> tuple[type[SpoiledProcess], tuple[dict[str, Any]]]:
        return (SpoiledProcess, (self.failure,))


def classify(error: BaseException) -> dict[str, Any]:
    """`{"failure_class", "sentence"}` of an exception: ours by type, the rest as a fault of the code."""
    if isinstance(error, TrainingFailure):
        found: dict[str, Any] = {"failure_class": error.failure_class, "sentence": error.sentence}
        return found | ({"final": True} if error.final else {})
    first = (str(error).strip().splitlines() or [""])[0][:300]
    if is_oom(error):
        return {"failure_class": "oom", "sentence": f"out of memory: {first}"}
    if any(word in str(error) for word in _PEER_WORDS):
        return {"failure_class": "worker_lost", "sentence": f"another process of the trial was lost: {first}"}
    if is_device_error(error):
        return {"failure_class": "worker_lost", "sentence": f"a GPU or the link between GPUs failed: {first}"}
    if isinstance(error, UserError | ValueError) and "linked" not in first:
        kind = "config" if isinstance(error, UserError) else "code"
        return {"failure_class": kind, "sentence": first}
    return {"failure_class": "code", "sentence": f"{type(error).__name__}: {first} (see traceback.txt of the trial)"}


def is_oom(error: BaseException) -> bool:
    """Memory of a GPU or of the machine; torch's allocator for CPUs raises a bare RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in str(error) or "out of memory" in str(error))


def is_device_error(error: BaseException) -> bool:
    """An error after which a process's CUDA context may be lost: nothing that it says later can be trusted."""
    if isinstance(error, torch.AcceleratorError) and not is_oom(error):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _DEVICE_WORDS)


def keep_traceback(run: Path, trial_id: str, error: BaseException) -> None:
    """Write a failed trial's traceback beside its record."""
    text = "".join(traceback.format_exception(error))
    files.write_text(run / "trials" / trial_id / "traceback.txt", text)


def host_failure(said: str, trial: Trial) -> dict[str, Any]:
    """What a process that ended without a report died of, from Ray's words and what it left in the trial's folder."""
    carried = [json.loads(base64.b64decode(text)) for text in re.findall(re.escape(_MARK) + r"([A-Za-z0-9+/=]+)", said)]
    stacks = trial.keep_stacks()
    # When one process hangs and is ended, the others say that they lost it: the stacks tell which came first.
    told = [failure for failure in carried if not stacks or failure.get("failure_class") not in ("worker_lost", "code")]
    if told:
        return min(told, key=_telling)
    if stacks:
        sentence = f"no sign of life for retries.hang_minutes; where it stood is in {', '.join(stacks)} of the trial"
        return {"failure_class": "hang", "sentence": sentence}
    if any(word in said for word in _PREEMPTED_WORDS):
        return {"failure_class": "preempted", "sentence": "its node was taken away"}
    if "WorkerHealthCheckTimeoutError" in said:
        return {"failure_class": "hang", "sentence": "a process did not answer Ray Train for ten minutes"}
    if "WorkerGroupStartupTimeoutError" in said:
        sentence = "the machines to go on with did not come in time (RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S)"
        return {"failure_class": "worker_lost", "sentence": sentence}
    if "OutOfMemoryError" in said:
        return {"failure_class": "oom", "sentence": "out of memory; fewer rows a pass need less"}
    if any(word in said for word in _DEVICE_WORDS):
        return {"failure_class": "worker_lost", "sentence": "a GPU or the link between GPUs failed (see traceback.txt)"}
    lost = any(word in said for word in _LOST_WORDS)
    if "creation task" in said or ("Traceback" in said and not lost):
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
        return {"failure_class": "code", "sentence": f"its process could not run: {last[:200]} (see traceback.txt)"}
    sentence = "its process died (killed, out of memory, or its node was lost)"
    return {"failure_class": "worker_lost", "sentence": sentence}


def _telling(failure: dict[str, Any]) -> int:
    return -1 if "full_disk" in failure else _TELLING.index(failure["failure_class"])


def keep_last_words(trial: Trial, error_file: str | None) -> str:
    """What Ray wrote of a process's end; a copy of it is put beside the trial's record."""
    if not error_file or not Path(error_file).is_file():
        return ""
    said = Path(error_file).read_text(errors="replace")
    files.write_text(trial.path / "traceback.txt", said)
    return said
