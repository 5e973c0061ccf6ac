"""`lorafleet doctor --on SITE`, on the nodes: whether they can do what trials do there, each thing really done once."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafleet.cluster.doctor import Finding
from lorafleet.cluster.hardware import find_gpus
from lorafleet.cluster.ray.nodes import environment_for_workers, on_each
from lorafleet.jobs import files
from lorafleet.jobs.data.assets import cache_dir
from lorafleet.jobs.text import counted

FINDINGS = "findings.json"
_SECONDS = 300.0
_TENSOR = 2**22
"""Numbers that the nodes sum up together: 16 MiB."""
_SCRATCH_MB = 256


def examine(folder: Path) -> bool:
    """Look at every node of the Ray that RAY_ADDRESS names, and at the link between two; write what was found.

    Returns whether nothing that is needed is missing.
    """
    import ray

    os.chdir(folder)
    variables = environment_for_workers(os.environ)
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, runtime_env={"env_vars": variables})
    try:
        rows = sorted((row for row in ray.nodes() if row["Alive"]), key=lambda row: row["NodeManagerHostname"])
        found = [Finding("Ray", "ok", f"{counted(len(rows), 'node')}, {_resources(ray.cluster_resources())}")]
        for row, answer in zip(rows, on_each(rows, look_at_node, folder), strict=True):
            name = row["NodeManagerHostname"]
            try:
                found += [Finding(f"{name}: {what}", *rest) for what, *rest in ray.get(answer, timeout=_SECONDS)]
            except ray.exceptions.RayError as error:
                found.append(Finding(name, "missing", f"{type(error).__name__}", str(error).strip().splitlines()[-1]))
        found.append(_collective([row for row in rows if row["Resources"].get("CPU")][:2]))
    finally:
        ray.shutdown()
    files.write_json(folder / FINDINGS, {"findings": [finding.as_dict() for finding in found]})
    return not any(finding.verdict == "missing" for finding in found)


def _resources(of: dict[str, float]) -> str:
    return f"{counted(int(of.get('CPU', 0)), 'CPU core')} and {counted(int(of.get('GPU', 0)), 'GPU')}"


def look_at_node(folder: Path) -> list[tuple[str, str, str, str]]:
    """(what, verdict, found, advice) of this node."""
    looks: tuple[Callable[[], tuple[str, str, str, str]], ...] = (
        _device,
        _four_bits,
        _compilers,
        _scratch,
        _cache,
        lambda: _writes(folder),
    )
    return [look() for look in looks]


def _device() -> tuple[str, str, str, str]:
    import torch

    gpus = find_gpus()
    if not gpus.count:
        return ("device", "ok", f"CPU ({os.cpu_count()} cores), torch {torch.__version__}", "")
    driver = f"{gpus.count} x {gpus.name}, driver {gpus.driver}"
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} cannot use them"
        return ("device", "missing", f"{driver}, and {built}", "install the torch that fits the driver")
    value = float(torch.ones(8, device="cuda").sum())
    return ("device", "ok" if value == 8 else "missing", f"{driver}, torch for CUDA {torch.version.cuda}", "")


def _four_bits() -> tuple[str, str, str, str]:
    import torch

    try:
        from bitsandbytes import functional

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = torch.randn(64, 64, device=device)
        packed, state = functional.quantize_4bit(weights, quant_type="nf4")
        error = float((functional.dequantize_4bit(packed, state) - weights).abs().mean())
    except (ImportError, OSError, RuntimeError) as missing:  # a package, a library, a kernel for this device
        return ("bitsandbytes", "note", f"{type(missing).__name__}: {missing}"[:160], "method: qlora does not run here")
    good = error < 0.2
    return ("bitsandbytes", "ok" if good else "missing", f"NF4 on {device}, mean error {error:.3f}", "")


def _compilers() -> tuple[str, str, str, str]:
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if not missing:
        said = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=False).stdout.strip()
        return ("compiler", "ok", f"g++ {said} and ninja", "")
    return ("compiler", "note", f"no {' and no '.join(missing)}", "DeepSpeed's ZeRO strategies need both (setup lines)")


def _scratch() -> tuple[str, str, str, str]:
    folder = Path(os.environ.get("TMPDIR", "/tmp"))  # nosec B108  # asked how fast it is
    block, path = os.urandom(2**20), folder / "lorafleet-speed"
    began = time.monotonic()
    try:
        with path.open("wb") as file:
            for _ in range(_SCRATCH_MB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        speed = _SCRATCH_MB / (time.monotonic() - began)
    except OSError as error:
        return ("scratch", "missing", f"{folder}: {error.strerror}", "scratch_dir in the site file")
    finally:
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    return ("scratch", "ok" if free > 5 else "note", f"{folder} writes {speed:,.0f} MB/s, {free:,.0f} GB free", "")


def _cache() -> tuple[str, str, str, str]:
    folder = cache_dir()
    if not os.access(folder, os.R_OK | os.X_OK):
        advice = "cache_dir in the site file must be a folder that all nodes share"
        return ("cache", "missing", f"{folder} cannot be read", advice)
    count = len(list((folder / "assets").glob("*"))) if (folder / "assets").is_dir() else 0
    return ("cache", "ok", f"{folder}, {counted(count, 'asset')}", "")


def _writes(folder: Path) -> tuple[str, str, str, str]:
    path = folder / f"written-by-{socket.gethostname()}"
    try:
        path.write_text("x")
        path.unlink()
    except OSError as error:
        return ("runs", "missing", f"{folder}: {error.strerror}", "runs_dir in the site file")
    return ("runs", "ok", f"{folder.parent} can be written", "")


class _Member:
    """One process of a group over two nodes."""

    def address(self) -> str:
        """Where the group may meet."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def sum_up(self, meet: str, rank: int, world: int) -> tuple[float, float, str]:
        """(the sum's value, GB/s, backend) of an all-reduce over the group."""
        from datetime import timedelta

        import torch
        from torch import distributed

        cuda = torch.cuda.is_available()
        backend = "nccl" if cuda else "gloo"
        distributed.init_process_group(
            backend, f"tcp://{meet}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
        )
        tensor = torch.full((_TENSOR,), rank + 1.0, device="cuda" if cuda else "cpu")
        distributed.all_reduce(tensor.clone())  # connections are made at the first
        began = time.monotonic()
        distributed.all_reduce(tensor)
        value = float(tensor[-1])
        seconds = time.monotonic() - began
        distributed.destroy_process_group()
        return value, 4 * _TENSOR / seconds / 1e9, backend


def _collective(rows: list[dict[str, Any]]) -> Finding:
    """Processes on two nodes sum up a tensor."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if len(rows) < 2:
        return Finding("collective", "note", "one node: not tried", "a site with `nodes: 2` is tried over both")
    names = " and ".join(row["NodeManagerHostname"] for row in rows)
    members = []
    for row in rows:
        place = NodeAffinitySchedulingStrategy(row["NodeID"], soft=False)
        gpus = 1 if row["Resources"].get("GPU") else 0
        members.append(ray.remote(_Member).options(num_cpus=1, num_gpus=gpus, scheduling_strategy=place).remote())
    try:
        meet = ray.get(members[0].address.remote(), timeout=_SECONDS)
        sums = [member.sum_up.remote(meet, rank, len(members)) for rank, member in enumerate(members)]
        answers = ray.get(sums, timeout=_SECONDS)
    except ray.exceptions.RayError as error:  # what a network that blocks raises in a member, or its silence
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
        return Finding("collective", "missing", f"between {names}: {last}", "network_interface in the site file")
    value, speed, backend = answers[0]
    right = value == 3.0
    return Finding("collective", "ok" if right else "missing", f"{backend} between {names}, {speed:.2f} GB/s", "")
