"""Names and types that the parts of a job file share."""

from __future__ import annotations

import typing
from typing import Literal

Goal = Literal["maximize", "minimize"]
"""Direction of a metric."""
Method = Literal["lora", "qlora", "prompt_tuning", "full"]
Strategy = Literal["auto", "ddp", "fsdp", "zero1", "zero2", "zero3"]
METHODS: tuple[Method, ...] = typing.get_args(Method)
STRATEGIES: tuple[Strategy, ...] = typing.get_args(Strategy)[1:]
"""The strategies that a job can name; `auto` chooses one of them."""
Scalar = bool | int | float | str
"""A value that a search can set."""
Assignment = dict[str, Scalar]
"""Dotted field -> the value that one trial uses for it."""
FOLD = "data.fold"
"""Field of an assignment: the fold of a cross-validation that a trial holds back."""
