"""Run an ONNX model on TensorRT: requirements, engines and shape profiles.

TensorRT is used through ONNX Runtime, which falls back to another provider without an
error, in two ways: its TensorRT libraries may not load, and TensorRT may decline every
node. `find_missing_requirement`, `check_provider` (runtime.py) and `check_engines` make
each of them an error. Not tested on a GPU yet (docs/gpu-status.md).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafleet.deployment.extras import Unavailable, import_onnxruntime
from lorafleet.jobs.runs.export_result import Artefact

PROVIDER = "TensorrtExecutionProvider"
_ENGINES = "engines"
_MAX_TEXTS, _MAX_ANSWERS, _TYPICAL_ROWS = 64, 8, 1
_TYPICAL_TOKENS = 64
_INSTALL_HINT = "pip uninstall onnxruntime, then pip install 'lorafleet[tensorrt]'"


def find_missing_requirement() -> str | None:
    """Return why TensorRT cannot be used on this machine, or None if it can."""
    import torch

    if not torch.cuda.is_available():
        return (
            "tensorrt needs an NVIDIA GPU, but this machine has none. On a machine with a GPU: "
            f"{_INSTALL_HINT}"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        return f"tensorrt needs onnxruntime-gpu: {_INSTALL_HINT}"
    if PROVIDER not in import_onnxruntime().get_available_providers():
        return (
            "tensorrt needs an onnxruntime built with TensorRT, but the installed one is not: "
            f"{_INSTALL_HINT}"
        )
    try:
        importlib.import_module("tensorrt")  # loads the shared libraries that the provider needs
    except ImportError as error:
        return (
            f"tensorrt needs NVIDIA's libraries, which cannot be loaded on this machine ({error}): "
            f"{_INSTALL_HINT}"
        )
    return None


def check_engines(folder: Path) -> None:
    """Raise Unavailable unless TensorRT has built at least one engine.

    TensorRT can decline every node of a graph and still be listed as the session's first
    provider.
    """
    if not any((folder / _ENGINES).glob("*.engine")):
        raise Unavailable(
            "TensorRT could not compile any part of this model; it would run entirely on another "
            "execution provider"
        )


def build_providers(folder: Path, artefact: Artefact) -> list[Any]:
    """Return the execution providers for ONNX Runtime: TensorRT first, then CUDA.

    TensorRT gets its shape profiles and the engine cache in `folder`. CUDA runs the nodes
    that TensorRT does not support. `check_provider` verifies that ONNX Runtime really
    selected TensorRT.
    """
    shapes = build_profiles(artefact)
    options = {
        "trt_fp16_enable": True,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder / _ENGINES),
        **{f"trt_profile_{bound}_shapes": _format_shapes(shapes[bound]) for bound in shapes},
    }
    return [(PROVIDER, options), "CUDAExecutionProvider"]


def build_profiles(artefact: Artefact) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shape profiles for TensorRT: {min, opt, max} -> input name -> shape.

    TensorRT builds engines for a range of sizes and optimises for `opt`. The range goes
    from one new token to the longest text with a full cache, because one graph serves
    prompts and single tokens; `opt` is a single token after a short text, which is most of
    the work.
    """
    longest = artefact.positions or artefact.max_length
    typical_tokens = min(_TYPICAL_TOKENS, longest)
    if artefact.task == "classification":
        return {
            "min": _build_classifier_shapes(1, 1),
            "opt": _build_classifier_shapes(_TYPICAL_ROWS, typical_tokens),
            "max": _build_classifier_shapes(_MAX_TEXTS, artefact.max_length),
        }
    return {
        "min": _build_decoder_shapes(artefact, 1, 1, 0),
        "opt": _build_decoder_shapes(artefact, _TYPICAL_ROWS, 1, typical_tokens),
        "max": _build_decoder_shapes(artefact, _MAX_ANSWERS, longest, longest),
    }


def _build_classifier_shapes(rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """Return the input shapes of a classifier."""
    return dict.fromkeys(("input_ids", "attention_mask"), (rows, tokens))


def _build_decoder_shapes(
    artefact: Artefact, rows: int, tokens: int, past_tokens: int
) -> dict[str, tuple[int, ...]]:
    """Return the input shapes of a decoder with `past_tokens` tokens in its cache."""
    cache_shape = (rows, artefact.heads, past_tokens, artefact.head_size)
    names = [
        f"past_key_values.{layer}.{part}"
        for layer in range(artefact.layers)
        for part in ("key", "value")
    ]
    new = {
        "input_ids": (rows, tokens),
        "attention_mask": (rows, past_tokens + tokens),
        "position_ids": (rows, tokens),
    }
    return new | dict.fromkeys(names, cache_shape)


def _format_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Format shapes as TensorRT's profile options expect them: `name:AxB,name:AxB`."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
