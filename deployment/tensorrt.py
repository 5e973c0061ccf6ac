"""An ONNX model on TensorRT, through ONNX Runtime's provider: which engines it builds, and whether it can."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafleet.deployment.availability import Unavailable
from lorafleet.deployment.extras import onnxruntime_here
from lorafleet.jobs.runs.export_result import Artefact

PROVIDER = "TensorrtExecutionProvider"
_ENGINES = "engines"
_MOST_TEXTS, _MOST_ANSWERS, _USUAL_ROWS = 64, 8, 1
_USUAL_TOKENS = 64
_INSTALL = "pip uninstall onnxruntime, then pip install 'lorafleet[tensorrt]'"


def missing() -> str | None:
    """Why TensorRT cannot be used here, in one sentence; None where it can."""
    import torch

    if not torch.cuda.is_available():
        return f"tensorrt needs an NVIDIA GPU, and there is none here; on a machine that has one: {_INSTALL}"
    if importlib.util.find_spec("onnxruntime") is None:
        return f"tensorrt needs onnxruntime-gpu: {_INSTALL}"
    if PROVIDER not in onnxruntime_here().get_available_providers():
        return f"tensorrt needs an onnxruntime that was built with it, and this one was not: {_INSTALL}"
    try:
        importlib.import_module("tensorrt")  # loads the libraries that the provider looks for
    except ImportError as error:
        return f"tensorrt needs NVIDIA's libraries, which cannot be loaded here ({error}): {_INSTALL}"
    return None


def check_engines(folder: Path) -> None:
    """Raises Unavailable unless TensorRT has built an engine: it can take no node and stay the session's first."""
    if not any((folder / _ENGINES).glob("*.engine")):
        raise Unavailable("TensorRT took no part of this model: all of it would run elsewhere, under its name")


def memory_gib() -> float | None:
    """GiB of the GPU that this process holds, as its driver says; None where it does not."""
    import pynvml

    try:
        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        running = [one for device in devices for one in pynvml.nvmlDeviceGetComputeRunningProcesses(device)]
    except pynvml.NVMLError:
        return None
    own = [one.usedGpuMemory for one in running if one.pid == os.getpid() and one.usedGpuMemory]
    return sum(own) / 2**30 if own else None


def to_tensorrt(source: Path, out: Path, artefact: Artefact) -> None:
    """The graph, and the engines for the GPU of this machine: TensorRT builds them when the model is first asked."""
    from lorafleet.deployment.runtime import open_tensorrt

    shutil.copytree(source, out, ignore=shutil.ignore_patterns("run.py", "README.md", "parity.json"))
    open_tensorrt(out, artefact, 0)


def providers(folder: Path, artefact: Artefact) -> list[Any]:
    """What ONNX Runtime is asked for: TensorRT with its profiles and kept engines, then CUDA for what TensorRT cannot.

    `check_provider` makes sure that TensorRT is what it took.
    """
    shapes = profiles(artefact)
    options = {
        "trt_fp16_enable": True,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder / _ENGINES),
        **{f"trt_profile_{which}_shapes": _text(shapes[which]) for which in shapes},
    }
    return [(PROVIDER, options), "CUDAExecutionProvider"]


def profiles(artefact: Artefact) -> dict[str, dict[str, tuple[int, ...]]]:
    """min, opt and max -> input -> its shape: from one new token to the longest text, with all that came before."""
    longest = artefact.positions or artefact.max_length
    usual = min(_USUAL_TOKENS, longest)
    if artefact.task == "classification":
        return {
            "min": _classifier(1, 1),
            "opt": _classifier(_USUAL_ROWS, usual),
            "max": _classifier(_MOST_TEXTS, artefact.max_length),
        }
    return {
        "min": _decoder(artefact, 1, 1, 0),
        "opt": _decoder(artefact, _USUAL_ROWS, 1, usual),
        "max": _decoder(artefact, _MOST_ANSWERS, longest, longest),
    }


def _classifier(rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("input_ids", "attention_mask"), (rows, tokens))


def _decoder(artefact: Artefact, rows: int, tokens: int, before: int) -> dict[str, tuple[int, ...]]:
    kept = (rows, artefact.heads, before, artefact.head_size)
    names = [f"past_key_values.{layer}.{part}" for layer in range(artefact.layers) for part in ("key", "value")]
    new = {"input_ids": (rows, tokens), "attention_mask": (rows, before + tokens), "position_ids": (rows, tokens)}
    return new | dict.fromkeys(names, kept)


def _text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
