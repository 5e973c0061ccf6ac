"""Check the nodes of a site for `lorafleet doctor --on SITE`.

Each operation is really executed once: a library may be installed and still fail on the
node's device or network. A check returns (check, verdict, result, advice), with the
verdicts of `Finding`. `missing` means that jobs fail; `note` that something optional
does not work.
"""

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
from lorafleet.cluster.ray.nodes import build_worker_environment, run_on_each_node
from lorafleet.jobs import files
from lorafleet.jobs.data.assets import get_cache_dir
from lorafleet.jobs.text import format_count

FINDINGS = "findings.json"
_SECONDS = 300.0
_TENSOR_ELEMENTS = 2**22
"""Number of elements of the tensor that the nodes all-reduce: 16 MiB."""
_SCRATCH_MB = 256


def check_site(folder: Path) -> bool:
    """Check every node of the Ray cluster at RAY_ADDRESS and the link between two of them.

    Args:
        folder: Folder of the check's run, which all nodes must see. `findings.json` is
            written to it.

    Returns:
        True if nothing that is needed is missing.
    """
    import ray

    os.chdir(folder)
    variables = build_worker_environment(os.environ)
    ray.init(
        address=os.environ["RAY_ADDRESS"], log_to_driver=False, runtime_env={"env_vars": variables}
    )
    try:
        rows = sorted(
            (row for row in ray.nodes() if row["Alive"]), key=lambda row: row["NodeManagerHostname"]
        )
        findings = [
            Finding(
                "Ray",
                "ok",
                f"{format_count(len(rows), 'node')}, "
                f"{_describe_resources(ray.cluster_resources())}",
            )
        ]
        for row, answer in zip(rows, run_on_each_node(rows, check_node, folder), strict=True):
            name = row["NodeManagerHostname"]
            try:
                findings += [
                    Finding(f"{name}: {check}", *details)
                    for check, *details in ray.get(answer, timeout=_SECONDS)
                ]
            except ray.exceptions.RayError as error:
                findings.append(
                    Finding(
                        name,
                        "missing",
                        f"{type(error).__name__}",
                        str(error).strip().splitlines()[-1],
                    )
                )
        # Two nodes are enough to find a blocked or wrong network.
        findings.append(_check_collective([row for row in rows if row["Resources"].get("CPU")][:2]))
    finally:
        ray.shutdown()
    files.write_json(folder / FINDINGS, {"findings": [finding.to_dict() for finding in findings]})
    return not any(finding.verdict == "missing" for finding in findings)


def _describe_resources(resources: dict[str, float]) -> str:
    """Return the CPU cores and GPUs of a Ray cluster as text."""
    return (
        f"{format_count(int(resources.get('CPU', 0)), 'CPU core')} and "
        f"{format_count(int(resources.get('GPU', 0)), 'GPU')}"
    )


def check_node(folder: Path) -> list[tuple[str, str, str, str]]:
    """Return (check, verdict, result, advice) of each check of this node."""
    checks: tuple[Callable[[], tuple[str, str, str, str]], ...] = (
        _check_device,
        _check_bitsandbytes,
        _check_compilers,
        _check_scratch,
        _check_cache,
        lambda: _check_runs_folder(folder),
    )
    return [check() for check in checks]


def _check_device() -> tuple[str, str, str, str]:
    """Check that torch can use this node's GPUs."""
    import torch

    gpus = find_gpus()
    if not gpus.count:
        return ("device", "ok", f"CPU ({os.cpu_count()} cores), torch {torch.__version__}", "")
    driver = f"{gpus.count} x {gpus.name}, driver {gpus.driver}"
    if not torch.cuda.is_available():
        problem = f"torch {torch.__version__} cannot use them"
        return (
            "device",
            "missing",
            f"{driver}, and {problem}",
            "install a torch build that supports the driver",
        )
    # `is_available` does not show whether kernels run on this GPU.
    value = float(torch.ones(8, device="cuda").sum())
    return (
        "device",
        "ok" if value == 8 else "missing",
        f"{driver}, torch for CUDA {torch.version.cuda}",
        "",
    )


def _check_bitsandbytes() -> tuple[str, str, str, str]:
    """Check that bitsandbytes quantises to 4 bits on this node."""
    import torch

    try:
        from bitsandbytes import functional

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = torch.randn(64, 64, device=device)
        packed, state = functional.quantize_4bit(weights, quant_type="nf4")
        error = float((functional.dequantize_4bit(packed, state) - weights).abs().mean())
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as missing:  # a package, a library, a kernel for this device
        return (
            "bitsandbytes",
            "note",
            f"{type(missing).__name__}: {missing}"[:160],
            "method: qlora does not work on this node",
        )
    is_accurate = error < 0.2
    return (
        "bitsandbytes",
        "ok" if is_accurate else "missing",
        f"NF4 on {device}, mean error {error:.3f}",
        "",
    )


def _check_compilers() -> tuple[str, str, str, str]:
    """Check that the compilers for DeepSpeed's extensions are installed."""
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if not missing:
        version = subprocess.run(
            ["g++", "-dumpfullversion"], capture_output=True, text=True, check=False
        ).stdout.strip()
        return ("compiler", "ok", f"g++ {version} and ninja", "")
    return (
        "compiler",
        "note",
        f"no {' and no '.join(missing)}",
        "DeepSpeed's ZeRO strategies need both: load them in the setup lines of the site file",
    )


def _check_scratch() -> tuple[str, str, str, str]:
    """Check the write speed and the free space of the temporary folder."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"))  # nosec B108  # only its speed is measured
    # Random bytes, because some file systems compress.
    block, path = os.urandom(2**20), folder / "lorafleet-speed"
    started_at = time.monotonic()
    try:
        with path.open("wb") as file:
            for _ in range(_SCRATCH_MB):
                file.write(block)
            file.flush()
            # Otherwise the speed would be that of the page cache.
            os.fsync(file.fileno())
        speed = _SCRATCH_MB / (time.monotonic() - started_at)
    except OSError as error:
        return (
            "scratch",
            "missing",
            f"{folder}: {error.strerror}",
            "set scratch_dir in the site file to a writable folder",
        )
    finally:
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    return (
        "scratch",
        "ok" if free > 5 else "note",
        f"{folder} writes {speed:,.0f} MB/s, {free:,.0f} GB free",
        "",
    )


def _check_cache() -> tuple[str, str, str, str]:
    """Check that the cache folder can be read."""
    folder = get_cache_dir()
    if not os.access(folder, os.R_OK | os.X_OK):
        advice = "cache_dir in the site file must be a folder that all nodes share"
        return ("cache", "missing", f"{folder} is not readable", advice)
    count = len(list((folder / "assets").glob("*"))) if (folder / "assets").is_dir() else 0
    return ("cache", "ok", f"{folder}, {format_count(count, 'asset')}", "")


def _check_runs_folder(folder: Path) -> tuple[str, str, str, str]:
    """Check that the runs folder can be written."""
    path = folder / f"written-by-{socket.gethostname()}"
    try:
        path.write_text("x")
        path.unlink()
    except OSError as error:
        return (
            "runs",
            "missing",
            f"{folder}: {error.strerror}",
            "set runs_dir in the site file to a writable folder",
        )
    return ("runs", "ok", f"{folder.parent} is writable", "")


class _Member:
    """One process of a group over two nodes."""

    def address(self) -> str:
        """Return an address at which the group can meet."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def sum_up(self, address: str, rank: int, world_size: int) -> tuple[float, float, str]:
        """Return (a value of the sum, GB/s, backend) of an all-reduce over the group.

        Rank r contributes r + 1. Blocks until all members have called it, at most two minutes.
        """
        from datetime import timedelta

        import torch
        from torch import distributed

        cuda = torch.cuda.is_available()
        backend = "nccl" if cuda else "gloo"
        distributed.init_process_group(
            backend,
            f"tcp://{address}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
        tensor = torch.full((_TENSOR_ELEMENTS,), rank + 1.0, device="cuda" if cuda else "cpu")
        distributed.all_reduce(tensor.clone())  # the first all-reduce opens the connections
        started_at = time.monotonic()
        distributed.all_reduce(tensor)
        # Reading a value waits for the GPU, so the time includes the whole operation.
        value = float(tensor[-1])
        seconds = time.monotonic() - started_at
        distributed.destroy_process_group()
        return value, 4 * _TENSOR_ELEMENTS / seconds / 1e9, backend


def _check_collective(rows: list[dict[str, Any]]) -> Finding:
    """Check that processes on two nodes can all-reduce a tensor."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if len(rows) < 2:
        return Finding(
            "collective",
            "note",
            "not tested: only one node",
            "with `nodes: 2` in the site file, two nodes are tested",
        )
    names = " and ".join(row["NodeManagerHostname"] for row in rows)
    members = []
    for row in rows:
        strategy = NodeAffinitySchedulingStrategy(row["NodeID"], soft=False)
        gpus = 1 if row["Resources"].get("GPU") else 0
        members.append(
            ray.remote(_Member)
            .options(num_cpus=1, num_gpus=gpus, scheduling_strategy=strategy)
            .remote()
        )
    try:
        address = ray.get(members[0].address.remote(), timeout=_SECONDS)
        sums = [
            member.sum_up.remote(address, rank, len(members)) for rank, member in enumerate(members)
        ]
        answers = ray.get(sums, timeout=_SECONDS)
    except ray.exceptions.RayError as error:  # a blocked network raises in a member or times out
        last_line = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
        return Finding(
            "collective",
            "missing",
            f"between {names}: {last_line}",
            "set network_interface in the site file to the network between the nodes",
        )
    value, speed, backend = answers[0]
    # The ranks contribute 1 and 2.
    is_correct = value == 3.0
    return Finding(
        "collective",
        "ok" if is_correct else "missing",
        f"{backend} between {names}, {speed:.2f} GB/s",
        "",
    )
