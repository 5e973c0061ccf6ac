"""Find out why an export target cannot be built on this machine or from this model."""

from __future__ import annotations

from lorafleet.deployment.extras import require
from lorafleet.jobs.errors import MissingExtra
from lorafleet.jobs.schema.export import Target

_EXTRA_BY_TARGET: dict[Target, str] = {
    "onnx": "onnx",
    "onnx-fp16": "onnx",
    "onnx-int8": "onnx",
    "onnx-int4": "int4",
    "executorch": "executorch",
}


def find_unavailable_reason(target: Target) -> str | None:
    """Return why a target cannot be built on this machine, or None if it can.

    It looks for packages and hardware only, before any work starts. A model that a target
    does not support is found while building (`Unavailable`).
    """
    if target == "tensorrt":
        from lorafleet.deployment.tensorrt import find_missing_requirement

        return find_missing_requirement()
    try:
        if target in _EXTRA_BY_TARGET:
            require(_EXTRA_BY_TARGET[target], target)
    except MissingExtra as error:
        return str(error)
    return None
