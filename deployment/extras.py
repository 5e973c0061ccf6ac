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
    """Check that the packages of an extra are installed.

    The packages are looked up and not imported: importing some of them takes seconds.

    Args:
        extra: Key of `EXTRAS`.
        purpose: What needs the packages, as the beginning of the message.

    Raises:
        MissingExtra: A package is missing. The message has the install command.
    """
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
