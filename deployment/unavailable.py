"""Why a target cannot be made on this machine, in one sentence."""

from __future__ import annotations

from deployment.extras import require
from jobs.errors import MissingExtra
from jobs.export import Target


def why_not(target: Target) -> str | None:
    """Why not; None where it can be made."""
    try:
        if target.startswith("onnx"):
            require("onnx", target)
    except MissingExtra as missing:
        return str(missing)
    return None
