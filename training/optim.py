"""AdamW and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from jobs.spec import TrainSpec


def build_optimizer(parameters: Iterable[nn.Parameter], train: TrainSpec, learning_rate: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with decay on matrices only, as one fused pass over all parameters."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=True)


def rate_factor(step: int, total: int, train: TrainSpec) -> float:
    """What the peak rate is multiplied by in optimiser step `step` (from 0) of `total`."""
    if train.lr_scheduler_type == "constant":
        return 1.0
    warmup = math.ceil(train.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if train.lr_scheduler_type == "constant_with_warmup":
        return 1.0
    left = max(0.0, (total - step) / max(1, total - warmup))
    return left if train.lr_scheduler_type == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
