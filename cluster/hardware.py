"""What this machine has, asked without torch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lorafleet.jobs.errors import PlacementRefused
from lorafleet.jobs.sites.base import LocalSite, RaySite, Site
from lorafleet.jobs.text import counted


@dataclass(frozen=True)
class Gpus:
    """What nvidia-smi says."""

    count: int
    name: str = ""
    memory_gib: float = 0.0
    driver: str = ""


def site_here(nodes: int | None = None) -> Site:
    """The Ray that RAY_ADDRESS names, or this machine; of its machines that take work at most `nodes`.

    Raises PlacementRefused when there are not so many.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        from lorafleet.cluster.ray.nodes import ray_site

        return limited(ray_site(address), nodes)
    if nodes and nodes > 1:
        raise PlacementRefused(
            f"--nodes is {nodes}, and this is one machine: start Ray on each (`ray start`) and name it in RAY_ADDRESS"
        )
    return local_site()


def limited(site: RaySite, nodes: int | None) -> RaySite:
    """A cluster's largest machines, `nodes` of them; trials that run at once are then as many as these hold."""
    able = [node for node in site.nodes if node.cpus]
    if nodes is None:
        return site
    if nodes > len(able):
        raise PlacementRefused(f"--nodes is {nodes}, and {site.called} has {counted(len(able), 'machine')} for work")
    largest = sorted(able, key=lambda node: (node.gpus, node.cpus), reverse=True)[:nodes]
    return site.model_copy(update={"nodes": tuple(largest)})


def local_site() -> LocalSite:
    """This machine as a site: cores of this process's affinity and cgroup, free memory, GPUs of the driver."""
    gpus = find_gpus()
    return LocalSite(
        cpus=cpu_count(),
        memory_gib=free_memory_gib(),
        gpus=gpus.count,
        gpu_memory_gib=gpus.memory_gib,
        gpu_name=gpus.name,
        without_gpu="" if gpus.count else why_no_gpu(gpus.driver),
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
    rows = _ask_driver()
    memory = [float(row[1]) / 1024 for row in rows if row[1].replace(".", "").isdigit()]  # [N/A] where it is shared
    if not rows:
        return Gpus(0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = (
        len(rows) if visible is None else len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    )
    return Gpus(min(count, len(rows)), rows[0][0], min(memory, default=0.0), rows[0][2])


def _ask_driver() -> list[list[str]]:
    """(name, MiB, driver) of each GPU that nvidia-smi lists."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    return [] if done.returncode else rows


def torch_cuda() -> str | None:
    """The CUDA that the installed torch was built for, or None for a CPU build; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text()
    found = re.search(r"^cuda[^=]*= *'([^']+)'", text, re.MULTILINE)
    return found[1] if found else None


def why_no_gpu(driver: str) -> str:
    """What a job that asks for GPUs is told on a machine without: the driver, torch's CUDA, and what to install."""
    if not driver:
        return "no driver answers (nvidia-smi is not there, fails, or lists no GPU)"
    built = torch_cuda()
    if built is None:
        return f"driver {driver}, but the installed torch is a CPU build: {install_line(driver)}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"driver {driver}, torch built for CUDA {built}, but CUDA_VISIBLE_DEVICES is {hidden!r}"


def install_line(driver: str) -> str:
    """How to get a torch that fits a driver."""
    found = re.match(r"[0-9]+", driver)
    number = int(found[0]) if found else 0
    wheel = next((name for least, name in _WHEELS if number >= least), None)
    if wheel is None:
        return f"no build of torch 2.9 or newer runs with it: update the driver to {_WHEELS[-1][0]} or newer"
    return f"pip install 'torch>=2.9,<2.14' --index-url https://download.pytorch.org/whl/{wheel}"


_WHEELS = ((580, "cu130"), (525, "cu128"))
"""(oldest driver, torch's builds that it runs): CUDA 13 needs 580, CUDA 12 with its minor-version compatibility 525."""


def check_torch(gpus_per_worker: int) -> None:
    """Raise PlacementRefused when a job would use GPUs that the installed torch cannot reach."""
    if gpus_per_worker and torch_cuda() is None:
        driver = find_gpus().driver
        raise PlacementRefused(
            f"this job would use GPUs (driver {driver}), but the installed torch is a CPU build: "
            f"{install_line(driver)}, or set resources.device to cpu"
        )
