"""Why a target cannot be made on this machine, or of this model, in one sentence."""

from __future__ import annotations

from lorafleet.deployment.extras import require
from lorafleet.jobs.errors import MissingExtra, UserError
from lorafleet.jobs.schema.export import Target

_EXTRA_OF: dict[Target, str] = {
    "onnx": "onnx",
    "onnx-fp16": "onnx",
    "onnx-int8": "onnx",
    "onnx-int4": "int4",
    "executorch": "executorch",
}


class Unavailable(UserError):
    """What this machine or this model cannot have: nothing failed."""


def why_not(target: Target) -> str | None:
    """Why not on this machine; None where it can be made."""
    if target == "tensorrt":
        from lorafleet.deployment.tensorrt import missing

        return missing()
    try:
        if target in _EXTRA_OF:
            require(_EXTRA_OF[target], target)
    except MissingExtra as error:
        return str(error)
    return None
