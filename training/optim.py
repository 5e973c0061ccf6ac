"""Build the optimiser and compute the learning rate of each step.

The learning rate is set from outside in each step. It is a pure function of the step
number, so a resumed trial needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lorafleet.jobs.schema.job import JobSpec, TrainSpec


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimiser treats alike."""

    names: tuple[str, ...]
    weight_decay: float
    rate_ratio: float
    """Factor on the learning rate."""


def group_parameters(dimensions: Mapping[str, int], job: JobSpec) -> list[ParameterGroup]:
    """Return the optimiser's groups: weight decay on matrices only, and the rates of LoRA+.

    Args:
        dimensions: Name -> number of dimensions of a trained parameter.
    """
    ratio = job.lora.loraplus_lr_ratio if job.uses_lora and job.lora.loraplus_lr_ratio else 1.0
    groups: dict[tuple[float, float], list[str]] = {}
    for name, ndim in dimensions.items():
        key = (
            job.train.weight_decay if ndim > 1 else 0.0,
            ratio if ".lora_B." in name else 1.0,
        )
        groups.setdefault(key, []).append(name)
    return [
        ParameterGroup(tuple(names), decay, factor) for (decay, factor), names in groups.items()
    ]


def build_optimizer(
    trained: Mapping[str, nn.Parameter], job: JobSpec, learning_rate: float
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter, 2019) with weight decay on matrices only.

    By default it is fused: one pass over all parameters. With LoRA+ (Hayou et al., 2024),
    the B matrices have `loraplus_lr_ratio` times the learning rate.

    Args:
        trained: Parameters by name. The name tells a B matrix from others.
        learning_rate: Peak learning rate. `set_rate` changes it in each step.
    """
    groups = group_parameters({name: parameter.ndim for name, parameter in trained.items()}, job)
    param_groups = [
        {
            "params": [trained[name] for name in group.names],
            "weight_decay": group.weight_decay,
            "lr": learning_rate * group.rate_ratio,
            "lr_ratio": group.rate_ratio,
        }
        for group in groups
    ]
    if job.train.optim == "adamw_torch":
        return torch.optim.AdamW(param_groups, lr=learning_rate, fused=True)
    import bitsandbytes

    kinds = {
        "adamw_8bit": "AdamW8bit",
        "paged_adamw_8bit": "PagedAdamW8bit",
        "paged_adamw_32bit": "PagedAdamW32bit",
    }
    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, kinds[job.train.optim])(
        param_groups, lr=learning_rate
    )
    return optimizer


def compute_rate_factor(step: int, total: int, train: TrainSpec) -> float:
    """Return the factor on the peak learning rate in optimiser step `step` (from 0) of `total`."""
    if train.lr_scheduler_type == "constant":
        return 1.0
    warmup = (
        math.ceil(train.warmup_ratio * total) if train.warmup_steps is None else train.warmup_steps
    )
    if step < warmup:
        # Not step / warmup: the first step would have the rate 0 and be wasted.
        rising = (step + 1) / (warmup + 1)
        return (
            min(rising, _compute_decay_factor(step, total, train))
            if train.lr_scheduler_type == _WSD
            else rising
        )
    if train.lr_scheduler_type == "constant_with_warmup":
        return 1.0
    if train.lr_scheduler_type == _WSD:
        return _compute_decay_factor(step, total, train)
    remaining = max(0.0, (total - step) / max(1, total - warmup))
    return (
        remaining
        if train.lr_scheduler_type == "linear"
        else 0.5 * (1 - math.cos(math.pi * remaining))
    )


_WSD = "warmup_stable_decay"


def _compute_decay_factor(step: int, total: int, train: TrainSpec) -> float:
    """Return the factor of the `warmup_stable_decay` schedule: 1, then a linear decay to 0."""
    return min(1.0, max(0, total - step) / max(1, math.ceil(train.decay_ratio * total)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group, scaled by the group's own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
