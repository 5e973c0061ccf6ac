"""Packages that not everybody has: each with the line that installs it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from lorafleet.jobs.errors import MissingExtra

EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "int4": ("onnx", "onnxruntime", "onnxruntime_genai"),
    "executorch": ("executorch",),
}
"""Extra -> the modules that it brings."""


def require(extra: str, purpose: str) -> None:
    """Raises MissingExtra with the line that installs what `purpose` needs."""
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"{purpose} needs {', '.join(missing)}: pip install 'lorafleet[{extra}]'")


def onnxruntime_here() -> Any:
    """The package onnxruntime. Raises MissingExtra."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtra("running an ONNX model needs onnxruntime: pip install 'lorafleet[onnx]'")
    return importlib.import_module("onnxruntime")
