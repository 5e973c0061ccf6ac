"""The number formats that a job computes in, as a plan, a report and a model card say them. Pure."""

from __future__ import annotations

from lorafleet.jobs.schema.job import JobSpec

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}
GPU_ATTENTION = ("flash_attention_2", "flex_attention")
"""Attention that a model cannot be trained with on CPU."""


def formats_text(job: JobSpec, weights: str, arithmetic: str | None) -> str:
    """Return one line on the number formats of weights and of arithmetic; `arithmetic` is that of autocast, if any."""
    packed = f"{job.qlora.quant_type}, the rest {weights}" if job.method == "qlora" else weights
    return f"weights {packed}; arithmetic {arithmetic or weights}{' (autocast)' if arithmetic else ''}"


def weights_format(text: str) -> str | None:
    """Return the format of the weights that are not quantised from the line of `formats_text`; None if unreadable."""
    weights = text.partition(";")[0].removeprefix("weights ")
    name = weights.rpartition("the rest ")[2]
    return name if name in ("float32", "bfloat16", "float16") else None


def planned_formats(job: JobSpec, *, cuda: bool) -> str:
    """Return that line for a job that has not run yet.

    On a GPU `auto` means bfloat16, and float32 where the GPU has none.
    """
    frozen_on_gpu = cuda and job.method != "full"
    weights = job.model.dtype if job.model.dtype != "auto" else "bfloat16" if frozen_on_gpu else "float32"
    mixed = job.train.mixed_precision
    wanted = "bf16" if mixed == "auto" and (cuda or weights == "bfloat16") else mixed
    arithmetic = _AUTOCAST.get(wanted)
    unsure = cuda and "auto" in (job.model.dtype, mixed)
    return formats_text(job, weights, arithmetic) + (", where the GPU has bfloat16" if unsure else "")


def attention_refusal(job: JobSpec, *, cuda: bool, has_flash: bool) -> str | None:
    """Say why the job's attention cannot be used where its trials run; None where it can.

    `has_flash` is whether the package flash-attn is installed there, or not known.
    """
    name = job.model.attn_implementation
    if name in GPU_ATTENTION and not cuda:
        return f"model.attn_implementation is {name}, which trains on a GPU alone, and this job runs on CPU; use sdpa"
    if name == "flash_attention_2" and not has_flash:
        return (
            "model.attn_implementation is flash_attention_2, but the package flash-attn is not installed "
            "(pip install flash-attn); use sdpa, or install it"
        )
    return None
