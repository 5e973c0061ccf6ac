"""Detects the cores, memory and GPUs of this machine without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lorafleet.jobs.errors import PlacementRefused


@dataclass(frozen=True)
class Gpus:
    """The GPUs that nvidia-smi reports.

    `memory_gib` is that of the smallest GPU; `name` and `driver` are those of the first.
    All are empty or 0 without GPUs.
    """

    count: int
    name: str = ""
    memory_gib: float = 0.0
    driver: str = ""


def count_cpus() -> int:
    """Return the cores that this process may use.

    That is its CPU affinity, limited by a cgroup's CPU quota (containers).
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def get_free_memory_gib() -> float:
    """Return the memory that is available without swapping, in GiB."""
    import psutil

    return round(psutil.virtual_memory().available / 2**30, 1)


def get_total_memory_gib() -> float:
    """Return the memory of this machine, in GiB."""
    import psutil

    return round(psutil.virtual_memory().total / 2**30, 1)


def find_gpus() -> Gpus:
    """Return the GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES allows.

    Returns none if there is no nvidia-smi.
    """
    rows = _query_gpus()
    # nvidia-smi prints [N/A] for a GPU that shares the host's memory.
    memory = [float(row[1]) / 1024 for row in rows if row[1].replace(".", "").isdigit()]
    if not rows:
        return Gpus(0)
    # nvidia-smi ignores the variable, and Slurm sets it to the GPUs of a job.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = (
        len(rows)
        if visible is None
        else len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    )
    # Several MIG instances of one GPU are one row.
    if visible is None or "MIG-" not in visible:
        count = min(count, len(rows))
    return Gpus(count, rows[0][0], min(memory, default=0.0), rows[0][2])


def _query_gpus() -> list[list[str]]:
    """Return (name, MiB, driver) of each GPU that nvidia-smi lists."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader,nounits",
    ]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in process.stdout.splitlines() if line.count(", ") == 2]
    return [] if process.returncode else rows


def get_torch_cuda() -> str | None:
    """Return the CUDA version that the installed torch was built for, or None for a CPU build.

    Torch itself is not imported.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    # Importing torch takes seconds, and fails if its CUDA libraries are missing.
    text = (Path(spec.origin).parent / "version.py").read_text()
    match = re.search(r"^cuda[^=]*= *'([^']+)'", text, re.MULTILINE)
    return match[1] if match else None


def explain_missing_gpu(driver: str) -> str:
    """Explain why no GPU is usable here: the driver, torch's CUDA version, and what to install.

    Args:
        driver: Version of the driver; empty if nvidia-smi does not answer.
    """
    if not driver:
        return "no NVIDIA driver responds (nvidia-smi is missing, fails, or lists no GPU)"
    cuda_version = get_torch_cuda()
    if cuda_version is None:
        return (
            f"driver {driver}, but the installed torch is a CPU build: "
            f"{format_install_hint(driver)}"
        )
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        f"driver {driver}, torch built for CUDA {cuda_version}, but CUDA_VISIBLE_DEVICES is "
        f"{visible_devices!r}"
    )


def format_install_hint(driver: str) -> str:
    """Return how to install a torch build that fits a driver."""
    match = re.match(r"[0-9]+", driver)
    number = int(match[0]) if match else 0
    wheel = next((name for min_driver, name in _TORCH_WHEELS if number >= min_driver), None)
    if wheel is None:
        return (
            "no build of torch 2.9 or newer supports this driver: update it to "
            f"{_TORCH_WHEELS[-1][0]} or newer"
        )
    return f"pip install 'torch>=2.9,<2.14' --index-url https://download.pytorch.org/whl/{wheel}"


_TORCH_WHEELS = ((580, "cu130"), (525, "cu128"))
"""(oldest driver, torch build that runs with it): CUDA 13 needs driver 580, CUDA 12 with its
minor-version compatibility needs 525.
"""


def check_torch(gpus_per_worker: int) -> None:
    """Raise PlacementRefused when a job would use GPUs that the installed torch cannot reach.

    Otherwise every trial would fail in its own process, after Ray has started.
    """
    if gpus_per_worker and get_torch_cuda() is None:
        driver = find_gpus().driver
        raise PlacementRefused(
            f"this job would use GPUs (driver {driver}), but the installed torch is a CPU build: "
            f"{format_install_hint(driver)}, or set resources.device to cpu"
        )
