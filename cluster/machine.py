"""What this machine has, asked without torch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import PlacementRefused
from jobs.site import LocalSite, Site

INSTALL_CUDA_TORCH = "pip install 'torch>=2.9,<2.14' --index-url https://download.pytorch.org/whl/cu128"


@dataclass(frozen=True)
class Gpus:
    """What nvidia-smi says."""

    count: int
    name: str = ""
    memory_gib: float = 0.0
    driver: str = ""


def site_here() -> Site:
    """The Ray that RAY_ADDRESS names, or this machine."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return local_site()
    from cluster.ray_site import ray_site

    return ray_site(address)


def local_site() -> LocalSite:
    """This machine as a site: cores of this process's affinity and cgroup, free memory, GPUs of the driver."""
    gpus = find_gpus()
    return LocalSite(
        cpus=cpu_count(),
        memory_gib=free_memory_gib(),
        gpus=gpus.count,
        gpu_memory_gib=gpus.memory_gib,
        gpu_name=gpus.name,
    )


def cpu_count() -> int:
    """Cores that this process may use: its affinity, cut by a cgroup's CPU quota (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def free_memory_gib() -> float:
    """Memory that can be had without swapping, in GiB."""
    import psutil

    return round(psutil.virtual_memory().available / 2**30, 1)


def find_gpus() -> Gpus:
    """The GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves; none where there is no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Gpus(0)
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    memory = [float(row[1]) / 1024 for row in rows if row[1].replace(".", "").isdigit()]  # [N/A] where it is shared
    if done.returncode or not rows:
        return Gpus(0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = (
        len(rows) if visible is None else len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    )
    return Gpus(min(count, len(rows)), rows[0][0], min(memory, default=0.0), rows[0][2])


def torch_cuda() -> str | None:
    """The CUDA that the installed torch was built for, or None for a CPU build; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text()
    found = re.search(r"^cuda[^=]*= *'([^']+)'", text, re.MULTILINE)
    return found[1] if found else None


def check_torch(gpus_per_worker: int) -> None:
    """Raise PlacementRefused when a job would use GPUs that the installed torch cannot reach."""
    if gpus_per_worker and torch_cuda() is None:
        driver = find_gpus().driver
        raise PlacementRefused(
            f"this job would use GPUs (driver {driver}), but the installed torch is a CPU build: {INSTALL_CUDA_TORCH}, "
            "or set resources.device to cpu"
        )
