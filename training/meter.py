"""What a trial costs: seconds, real tokens, peak memory; on CUDA the device's use and power too."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import torch

GIB = 2**30


class Meter:
    """Counts of one session. Everything here is a sum, so that it can be saved and go on after a resume."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.train_seconds = 0.0
        self.eval_seconds = 0.0
        self.tokens = 0
        self.samples = 0
        reset_peak_memory(device)

    def state(self) -> dict[str, float]:
        """The sums, for a checkpoint."""
        return {
            "train_seconds": self.train_seconds,
            "eval_seconds": self.eval_seconds,
            "tokens": self.tokens,
            "samples": self.samples,
        }

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's sums."""
        self.train_seconds = state["train_seconds"]
        self.eval_seconds = state["eval_seconds"]
        self.tokens = int(state["tokens"])
        self.samples = int(state["samples"])

    def rates(self) -> dict[str, float]:
        """What metrics.jsonl says of cost so far."""
        seconds = max(self.train_seconds, 1e-9)
        return {
            "train_seconds": round(self.train_seconds, 3),
            "eval_seconds": round(self.eval_seconds, 3),
            "tokens": self.tokens,
            "samples_per_second": round(self.samples / seconds, 3),
            "tokens_per_second": round(self.tokens / seconds, 2),
            "peak_memory_gib": round(peak_memory_gib(self.device), 4),
        }


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak. A process's high-water mark only grows until 5 is written to clear_refs (Linux 4.0)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(device: torch.device) -> float:
    """Peak since `reset_peak_memory`: allocated on the device (CUDA), or resident in the process (CPU), in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return memory_in_use_gib(device)
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return kib / 2**20


def free_unused_memory(device: torch.device) -> None:
    """Give back what no tensor holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_in_use_gib(device: torch.device) -> float:
    """What tensors hold on the device (CUDA), or this process in memory (CPU), in GiB."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / GIB
    import psutil

    return float(psutil.Process().memory_info().rss) / GIB


def gpu_metrics(device: torch.device) -> dict[str, float]:
    """Use in %, power in W and memory in GiB of this process's GPU; empty on CPU and where the driver does not say."""
    if device.type != "cuda":
        return {}
    found: dict[str, float] = {"gpu_memory_gib": torch.cuda.memory_allocated(device) / GIB}
    import pynvml

    with contextlib.suppress(pynvml.NVMLError, RuntimeError):  # some drivers and MIG slices do not say
        found["gpu_utilization_percent"] = float(torch.cuda.utilization(device))
        found["gpu_power_watts"] = torch.cuda.power_draw(device) / 1000
    return found
