"""Define what an export can produce, and how far each target may differ from its source.

All functions are pure.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from lorafleet.jobs.schema.base import Spec

Target = Literal["merged", "onnx", "onnx-fp16", "onnx-int8", "onnx-int4", "tensorrt", "executorch"]
TARGETS: tuple[Target, ...] = get_args(Target)
TARGET_DESCRIPTIONS: dict[Target, str] = {
    "merged": "the adapter in the weights (safetensors)",
    "onnx": "ONNX, float32",
    "onnx-fp16": "ONNX, weights in float16",
    "onnx-int8": "ONNX, weights in INT8",
    "onnx-int4": "ONNX, weights in INT4 by blocks",
    "tensorrt": "ONNX on TensorRT, float16",
    "executorch": "ExecuTorch (XNNPACK), float32",
}
TARGET_SOURCES: dict[Target, Target] = {
    "onnx": "merged",
    "onnx-fp16": "onnx",
    "onnx-int8": "onnx",
    "onnx-int4": "merged",
    "tensorrt": "onnx",
    "executorch": "merged",
}
"""Target -> the target that it is made from."""


class Gate(Spec):
    """Limits on how far a target may differ from its source.

    Fields that a job file leaves out keep the default of the target.
    """

    max_logit_difference: float | None = Field(None, gt=0)
    """Largest allowed absolute difference of a logit over the held-out rows."""
    min_agreement: float | None = Field(None, gt=0, le=1)
    """Smallest allowed share of positions with the same likeliest token, or of rows with the same
    class.
    """
    max_metric_drop: float | None = Field(None, ge=0)
    """How much worse the metric may be: accuracy in points, perplexity as a share of its value
    (0.01 is 1 %).
    """


class ExportSpec(Spec):
    """Settings with which `lorafleet export` compares targets."""

    rows: int = Field(64, ge=1, le=100_000)
    """Number of held-out rows on which a target is compared with its source. Default: 64."""
    parity: dict[Target, Gate] = {}
    """Target -> limits that replace its defaults (docs/export.md)."""


_EXACT_GATE = Gate(max_logit_difference=1e-3, min_agreement=0.99, max_metric_drop=0.01)
_FLOAT16_GATE = Gate(max_logit_difference=None, min_agreement=0.99, max_metric_drop=0.01)
_CLASSIFIER_GATES: dict[Target, Gate] = {
    "onnx-int8": Gate(max_logit_difference=None, min_agreement=0.95, max_metric_drop=0.02),
}
_GENERATOR_GATES: dict[Target, Gate] = {
    "onnx-int8": Gate(max_logit_difference=None, min_agreement=0.85, max_metric_drop=0.05),
    "onnx-int4": Gate(max_logit_difference=None, min_agreement=0.75, max_metric_drop=0.15),
}
_COMMON_GATES: dict[Target, Gate] = {"onnx-fp16": _FLOAT16_GATE, "tensorrt": _FLOAT16_GATE}


def resolve_gate(
    spec: ExportSpec, target: Target, *, generates: bool, int8_base: bool = False
) -> Gate:
    """Return the gate of a target: the job's values, field by field, over the defaults.

    Args:
        spec: The job's `export` block.
        target: The target.
        generates: True if the model writes text.
        int8_base: True if the source runs on an INT8 base. Such a source also rounds the inputs
            of its matrices; a target that does not cannot reproduce its logits, so their
            difference has no limit.
    """
    default = (_GENERATOR_GATES if generates else _CLASSIFIER_GATES).get(
        target
    ) or _COMMON_GATES.get(target, _EXACT_GATE)
    if int8_base:
        default = default.model_copy(update={"max_logit_difference": None})
    # Fields that are None keep the default: a job can move a limit, but not remove it.
    override = spec.parity.get(target)
    return (
        default
        if override is None
        else default.model_copy(update=override.model_dump(exclude_none=True))
    )
