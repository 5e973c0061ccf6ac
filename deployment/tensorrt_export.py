"""Export a model as TensorRT engines, through ONNX Runtime."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lorafleet.jobs.runs.export_result import Artefact


def measure_gpu_memory_gib() -> float | None:
    """Return the GPU memory of this process in GiB, or None if the driver does not report it.

    It asks the driver (NVML): torch knows nothing of memory that TensorRT allocates. Some
    drivers and containers do not report memory by process.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        devices = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        processes = [
            process
            for device in devices
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device)
        ]
    except pynvml.NVMLError:
        return None
    sizes = [
        process.usedGpuMemory
        for process in processes
        if process.pid == os.getpid() and process.usedGpuMemory
    ]
    return sum(sizes) / 2**30 if sizes else None


def to_tensorrt(source: Path, out: Path, artefact: Artefact) -> None:
    """Copy the ONNX graph to `out` and build the TensorRT engines for this machine's GPU.

    TensorRT builds the engines when the model is first run.
    """
    from lorafleet.deployment.runtime import open_tensorrt

    # run.py uses the CPU, and card and parity record are those of the ONNX target.
    shutil.copytree(
        source, out, ignore=shutil.ignore_patterns("run.py", "README.md", "parity.json")
    )
    open_tensorrt(out, artefact, 0)
