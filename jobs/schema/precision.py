"""Describe the number formats of a job, as plans, reports and model cards show them. Pure."""

from __future__ import annotations

from lorafleet.jobs.schema.job import JobSpec

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}
GPU_ATTENTION = ("flash_attention_2", "flex_attention")
"""Attention implementations that cannot train on CPU."""


def describe_number_formats(job: JobSpec, weights: str, arithmetic: str | None) -> str:
    """Return one line on the number formats of weights and arithmetic.

    `arithmetic` is the format of autocast, or None without autocast.
    """
    weights_text = (
        f"{job.qlora.quant_type}, the rest {weights}" if job.method == "qlora" else weights
    )
    return (
        f"weights {weights_text}; arithmetic "
        f"{arithmetic or weights}{' (autocast)' if arithmetic else ''}"
    )


def parse_weights_format(text: str) -> str | None:
    """Return the format of the unquantized weights from a line on number formats.

    The line is that of `describe_number_formats`. None if the line cannot be parsed.
    """
    weights = text.partition(";")[0].removeprefix("weights ")
    name = weights.rpartition("the rest ")[2]
    return name if name in ("float32", "bfloat16", "float16") else None


def describe_planned_formats(job: JobSpec, *, cuda: bool) -> str:
    """Return the line of `describe_number_formats` for a job that has not run yet.

    On a GPU, `auto` means bfloat16, or float32 if the GPU does not support it.
    """
    # Full fine-tuning keeps float32: bfloat16 would round its small updates away.
    frozen_on_gpu = cuda and job.method != "full"
    weights = (
        job.model.dtype if job.model.dtype != "auto" else "bfloat16" if frozen_on_gpu else "float32"
    )
    mixed = job.train.mixed_precision
    precision = "bf16" if mixed == "auto" and (cuda or weights == "bfloat16") else mixed
    arithmetic = _AUTOCAST.get(precision)
    depends_on_gpu = cuda and "auto" in (job.model.dtype, mixed)
    line = describe_number_formats(job, weights, arithmetic)
    if not depends_on_gpu:
        return line
    line += ", if the GPU supports bfloat16"
    if (job.model.dtype, mixed) != ("auto", "auto"):
        return line
    return f"{line}; else float32 (train.mixed_precision: fp16 must be asked for)"


def get_attention_refusal(job: JobSpec, *, cuda: bool, has_flash: bool) -> str | None:
    """Return why the attention of a job cannot be used where its trials run; None if it can.

    `has_flash` is true if the package flash-attn is installed there, or if that is unknown.
    """
    name = job.model.attn_implementation
    if name in GPU_ATTENTION and not cuda:
        return (
            f"model.attn_implementation is {name}, which trains only on a GPU, but this job runs "
            "on CPU; use sdpa"
        )
    if name == "flash_attention_2" and not has_flash:
        return (
            "model.attn_implementation is flash_attention_2, but the package flash-attn is not "
            "installed (pip install flash-attn); use sdpa, or install it"
        )
    return None
