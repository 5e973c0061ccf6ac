"""Measure the cost of a trial: seconds, real tokens, memory, and GPU utilisation and power."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import torch

GIB = 2**30


class Meter:
    """Resource counters of one session.

    Every counter is a sum, so it can be saved in a checkpoint and continued after a resume.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.train_seconds = 0.0
        self.eval_seconds = 0.0
        self.tokens = 0
        self.samples = 0
        reset_peak_memory(device)

    def to_state(self) -> dict[str, float]:
        """Return the counters, for a checkpoint."""
        return {
            "train_seconds": self.train_seconds,
            "eval_seconds": self.eval_seconds,
            "tokens": self.tokens,
            "samples": self.samples,
        }

    def restore(self, state: dict[str, float]) -> None:
        """Continue from the counters of a checkpoint."""
        self.train_seconds = state["train_seconds"]
        self.eval_seconds = state["eval_seconds"]
        self.tokens = int(state["tokens"])
        self.samples = int(state["samples"])

    def summarize(self) -> dict[str, float]:
        """Return the counters and rates so far, as written to metrics.jsonl.

        Rates are per second of training, without evaluations. Tokens do not include padding.
        """
        seconds = max(self.train_seconds, 1e-9)
        return {
            "train_seconds": round(self.train_seconds, 3),
            "eval_seconds": round(self.eval_seconds, 3),
            "tokens": self.tokens,
            "samples_per_second": round(self.samples / seconds, 3),
            "tokens_per_second": round(self.tokens / seconds, 2),
            "peak_memory_gib": round(get_peak_memory_gib(self.device), 4),
        }


def limit_gpu_memory(processes: int, context_gib: float) -> None:
    """Limit this process to its share of its GPU's memory.

    A trial that needs more then runs out of memory itself, and not the one beside it.

    Args:
        processes: Number of processes that share the GPU.
        context_gib: GiB that CUDA itself takes for each process. torch does not count them.
    """
    if processes > 1 and torch.cuda.is_available():
        total_gib = torch.cuda.mem_get_info()[1] / GIB
        share = 1 / processes - context_gib / total_gib
        torch.cuda.set_per_process_memory_fraction(max(0.01, share))


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak memory measurement.

    The high-water mark of a process only grows until 5 is written to clear_refs (Linux
    4.0).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Other systems than Linux have no such file; the peak then includes earlier trials.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def get_peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory since `reset_peak_memory`, in GiB.

    On CUDA this is memory allocated on the device, on CPU the resident memory of the
    process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # `ru_maxrss` survives fork and exec: a small process of a large parent would report the
    # parent's peak. VmHWM is the process's own.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return get_memory_in_use_gib(device)
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return kib / 2**20


def free_unused_memory(device: torch.device) -> None:
    """Release memory that no tensor uses any more.

    The garbage collector runs first: objects in reference cycles keep their tensors until
    then.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means that a GPU or the machine is out of memory.

    torch's CPU allocator raises a plain RuntimeError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in str(error) or "out of memory" in str(error)
    )


def get_memory_in_use_gib(device: torch.device) -> float:
    """Return the memory in use, in GiB.

    On CUDA this is memory held by tensors on the device, on CPU the resident memory of the
    process.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / GIB
    import psutil

    return float(psutil.Process().memory_info().rss) / GIB


def read_gpu_metrics(device: torch.device) -> dict[str, float]:
    """Return utilisation in %, power in W and memory in GiB of this process's GPU.

    The result is empty on CPU. Utilisation and power are left out if the driver does not
    report them.
    """
    if device.type != "cuda":
        return {}
    metrics: dict[str, float] = {"gpu_memory_gib": torch.cuda.memory_allocated(device) / GIB}
    import pynvml

    # Some drivers and MIG slices do not report utilisation or power.
    with contextlib.suppress(pynvml.NVMLError, RuntimeError):
        metrics["gpu_utilization_percent"] = float(torch.cuda.utilization(device))
        metrics["gpu_power_watts"] = torch.cuda.power_draw(device) / 1000
    return metrics
