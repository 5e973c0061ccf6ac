"""What an export makes, and how far each target may be from what it was made from. Pure."""

from __future__ import annotations

from typing import Literal, get_args

from lorafleet.jobs.schema.base import Spec
from pydantic import Field

Target = Literal["merged", "onnx", "onnx-fp16", "onnx-int8", "onnx-int4", "tensorrt", "executorch"]
TARGETS: tuple[Target, ...] = get_args(Target)
WHAT: dict[Target, str] = {
    "merged": "the adapter in the weights (safetensors)",
    "onnx": "ONNX, float32",
    "onnx-fp16": "ONNX, weights in float16",
    "onnx-int8": "ONNX, weights in INT8",
    "onnx-int4": "ONNX, weights in INT4 by blocks",
    "tensorrt": "ONNX on TensorRT, float16",
    "executorch": "ExecuTorch (XNNPACK), float32",
}
NEEDS: dict[Target, Target] = {
    "onnx": "merged",
    "onnx-fp16": "onnx",
    "onnx-int8": "onnx",
    "onnx-int4": "merged",
    "tensorrt": "onnx",
    "executorch": "merged",
}
"""What a target is made from."""


class Gate(Spec):
    """How far a target may be from its source; what is left out of a job file is as the target's default says."""

    max_logit_difference: float | None = Field(None, gt=0)
    """Largest absolute difference of a logit, over held-out rows."""
    min_agreement: float | None = Field(None, gt=0, le=1)
    """Smallest share of positions with the same likeliest token, or of rows with the same class."""
    max_metric_drop: float | None = Field(None, ge=0)
    """How much worse the metric may be: of accuracy in points, of perplexity as a share of it (0.01 is 1 %)."""


class ExportSpec(Spec):
    """What `lorafleet export` compares by."""

    rows: int = Field(64, ge=1, le=100_000)
    """Held-out rows on which a target is compared with its source."""
    parity: dict[Target, Gate] = {}
    """Target -> how far it may be from its source, in the place of its defaults (docs/export.md)."""


_EXACT = Gate(max_logit_difference=1e-3, min_agreement=0.99, max_metric_drop=0.01)
_HALF = Gate(max_logit_difference=None, min_agreement=0.99, max_metric_drop=0.01)
_CLASSES: dict[Target, Gate] = {
    "onnx-int8": Gate(max_logit_difference=None, min_agreement=0.95, max_metric_drop=0.02),
}
_WRITERS: dict[Target, Gate] = {
    "onnx-int8": Gate(max_logit_difference=None, min_agreement=0.85, max_metric_drop=0.05),
    "onnx-int4": Gate(max_logit_difference=None, min_agreement=0.75, max_metric_drop=0.15),
}
_ALWAYS: dict[Target, Gate] = {"onnx-fp16": _HALF, "tensorrt": _HALF}


def gate_of(spec: ExportSpec, target: Target, *, generates: bool, int8_base: bool = False) -> Gate:
    """The gate of a target: the job's, field by field, over the default.

    A source on an INT8 base rounds what goes into its matrices too; a target that does not is no copy of its logits.
    """
    default = (_WRITERS if generates else _CLASSES).get(target) or _ALWAYS.get(target, _EXACT)
    if int8_base:
        default = default.model_copy(update={"max_logit_difference": None})
    own = spec.parity.get(target)
    return default if own is None else default.model_copy(update=own.model_dump(exclude_none=True))
