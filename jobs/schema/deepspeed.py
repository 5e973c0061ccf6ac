"""DeepSpeed's configuration: what the job says, with a user's own JSON around it. Pure; contradictions are errors."""

from __future__ import annotations

import sys
from typing import Any

from lorafleet.jobs.errors import Problem
from lorafleet.jobs.schema.job import JobSpec

_NOT_YOURS = {
    "optimizer": "train.optim and train.learning_rate",
    "scheduler": "train.lr_scheduler_type",
    "train_batch_size": "train.global_batch_size",
}


def engine_config(job: JobSpec, own: dict[str, Any], *, bf16: bool) -> dict[str, Any]:
    """The configuration of the engine: a user's `own`, completed and overruled by what the job says."""
    said, own = _said(job), _decided(own)
    zero = {**own.get("zero_optimization", {}), "stage": said.pop("zero_optimization.stage")}
    return {
        "steps_per_print": sys.maxsize,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **own,
        **said,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
    }


def _decided(block: dict[str, Any]) -> dict[str, Any]:
    """Without every `auto`, which only Hugging Face's Trainer fills in; DeepSpeed has defaults for what is left out."""
    kept = {key: _decided(value) if isinstance(value, dict) else value for key, value in block.items()}
    return {key: value for key, value in kept.items() if value != "auto"}


def _said(job: JobSpec) -> dict[str, Any]:
    """DeepSpeed's keys that the job file decides, and their values."""
    return {
        "train_micro_batch_size_per_gpu": job.train.per_device_train_batch_size,
        "gradient_accumulation_steps": job.train.accumulation_steps(job.resources.world_size),
        "gradient_clipping": job.train.max_grad_norm,
        "zero_optimization.stage": int(job.resources.strategy[-1]),
    }


def contradictions(job: JobSpec, own: dict[str, Any]) -> list[Problem]:
    """What a user's DeepSpeed file says against the job file; `auto` there means that the job decides."""
    blocks = ("zero_optimization", "bf16", "fp16")
    problems = [
        _problem(f"has {name} = {own[name]!r}, but that must be an object")
        for name in blocks
        if not isinstance(own.get(name, {}), dict)
    ]
    if problems:
        return problems
    for key, wanted in _said(job).items():
        block, _, leaf = key.rpartition(".")
        found = own.get(block, {}).get(leaf) if block else own.get(leaf)
        if found not in (None, "auto", wanted):
            problems.append(_problem(f"has {key} = {found!r}, but the job file makes it {wanted!r}; drop it there"))
    for key, ours in _NOT_YOURS.items():
        if own.get(key) not in (None, "auto"):
            problems.append(_problem(f"has {key}, but that is what {ours} in the job file says; drop it there"))
    if own.get("bf16", {}).get("enabled", "auto") != "auto":
        problems.append(_problem("has bf16.enabled, but that is what model.dtype in the job file says; drop it there"))
    if own.get("fp16", {}).get("enabled") is True:
        problems.append(_problem("has fp16 enabled, which is not run here; use train.mixed_precision: bf16"))
    return problems


def _problem(sentence: str) -> Problem:
    return Problem("resources.deepspeed_config", f"resources.deepspeed_config {sentence}")
