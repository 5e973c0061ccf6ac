"""Build DeepSpeed's configuration from the job and a user's own JSON file.

All functions are pure. Contradictions between the two are errors.
"""

from __future__ import annotations

import sys
from typing import Any

from lorafleet.jobs.errors import Problem
from lorafleet.jobs.schema.job import JobSpec

_JOB_FILE_KEYS = {
    "optimizer": "train.optim and train.learning_rate",
    "scheduler": "train.lr_scheduler_type",
    "train_batch_size": "train.global_batch_size",
}


def build_engine_config(job: JobSpec, user_config: dict[str, Any], *, bf16: bool) -> dict[str, Any]:
    """Return the configuration of the DeepSpeed engine.

    Args:
        job: The job, whose values override the user's.
        user_config: The user's DeepSpeed configuration.
        bf16: Whether to train in bfloat16.
    """
    job_values, user_config = _get_job_values(job), _remove_auto(user_config)
    zero = {
        **user_config.get("zero_optimization", {}),
        "stage": job_values.pop("zero_optimization.stage"),
    }
    return {
        "steps_per_print": sys.maxsize,
        # The optimiser is torch's AdamW, which ZeRO refuses as untested unless this is set.
        "zero_allow_untested_optimizer": True,
        # Without this, DeepSpeed raises an error for a user's file that offloads the optimiser,
        # because it wants its own CPU Adam then.
        "zero_force_ds_cpu_optimizer": False,
        **user_config,
        **job_values,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
    }


def _remove_auto(block: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without its `auto` values.

    Only Hugging Face's Trainer fills them in; DeepSpeed has defaults for missing keys.
    """
    values = {
        key: _remove_auto(value) if isinstance(value, dict) else value
        for key, value in block.items()
    }
    return {key: value for key, value in values.items() if value != "auto"}


def _get_job_values(job: JobSpec) -> dict[str, Any]:
    """Return the DeepSpeed keys that the job file decides, with their values."""
    return {
        "train_micro_batch_size_per_gpu": job.train.per_device_train_batch_size,
        "gradient_accumulation_steps": job.train.compute_accumulation_steps(
            job.resources.world_size
        ),
        "gradient_clipping": job.train.max_grad_norm,
        # The strategies zero1, zero2 and zero3 are named after DeepSpeed's stages.
        "zero_optimization.stage": int(job.resources.strategy[-1]),
    }


def find_contradictions(job: JobSpec, user_config: dict[str, Any]) -> list[Problem]:
    """Return the problems of a user's DeepSpeed file that contradicts the job file.

    A value of `auto` in the file means that the job decides.

    Args:
        job: The job, whose strategy is zero1, zero2 or zero3.
        user_config: The parsed DeepSpeed file.

    Returns:
        One problem for each key, or only those of malformed blocks if there are any.
    """
    blocks = ("zero_optimization", "bf16", "fp16")
    problems = [
        _make_problem(f"has {name} = {user_config[name]!r}, but that must be an object")
        for name in blocks
        if not isinstance(user_config.get(name, {}), dict)
    ]
    # The checks below read values inside these blocks.
    if problems:
        return problems
    for key, expected in _get_job_values(job).items():
        block, _, leaf = key.rpartition(".")
        value = user_config.get(block, {}).get(leaf) if block else user_config.get(leaf)
        if value not in (None, "auto", expected):
            problems.append(
                _make_problem(
                    f"has {key} = {value!r}, but the job file sets it to {expected!r}; remove it "
                    "from the DeepSpeed file"
                )
            )
    for key, job_fields in _JOB_FILE_KEYS.items():
        if user_config.get(key) not in (None, "auto"):
            problems.append(
                _make_problem(
                    f"has {key}, but it is set by {job_fields} in the job file; remove it from the "
                    "DeepSpeed file"
                )
            )
    if user_config.get("bf16", {}).get("enabled", "auto") != "auto":
        problems.append(
            _make_problem(
                "has bf16.enabled, but it is set by model.dtype in the job file; remove it from "
                "the DeepSpeed file"
            )
        )
    if user_config.get("fp16", {}).get("enabled") is True:
        problems.append(
            _make_problem(
                "has fp16 enabled, which lorafleet does not support with DeepSpeed; use "
                "train.mixed_precision: bf16"
            )
        )
    return problems


def _make_problem(sentence: str) -> Problem:
    """Return a problem of `resources.deepspeed_config`."""
    return Problem("resources.deepspeed_config", f"resources.deepspeed_config {sentence}")
