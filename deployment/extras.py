"""Check for optional packages, and name the command that installs them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from lorafleet.jobs.errors import MissingExtra, UserError

EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "int4": ("onnx", "onnxruntime", "onnxruntime_genai"),
    "executorch": ("executorch",),
}
"""Extra -> modules that it installs."""


def require(extra: str, purpose: str) -> None:
    """Raise MissingExtra with the install command if a package for `purpose` is missing."""
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"{purpose} needs {', '.join(missing)}: pip install 'lorafleet[{extra}]'"
        )


def import_onnxruntime() -> Any:
    """Return the module onnxruntime. Raises MissingExtra if it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtra("running an ONNX model needs onnxruntime: pip install 'lorafleet[onnx]'")
    return importlib.import_module("onnxruntime")


class Unavailable(UserError):
    """Signals that this machine or this model does not support a target. It is not a failure."""
