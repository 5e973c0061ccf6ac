"""Define which method runs under which strategy, and why others do not.

The rules are data: validation, `lorafleet methods` and docs/methods.md read the same
tables. RULES refuse a combination from the job file alone. NOTES are limits that depend
on the model or the machine; cluster/planning/preflight.py and training check those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafleet.jobs.schema.types import METHODS, STRATEGIES, Strategy

if TYPE_CHECKING:
    from lorafleet.jobs.schema.job import JobSpec

WEIGHT_SHARDING_STRATEGIES: tuple[Strategy, ...] = ("fsdp", "zero3")
"""Strategies that shard the base's weights, the simpler one first."""
_SHARDING_STRATEGIES = ("fsdp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Rule:
    """One combination that is not supported.

    A rule refuses a job whose method and strategy are listed and for which `applies`
    returns true. `what` and `reason` are parts of messages: the table of methods prints
    them as `not with WHAT: REASON`, an error of a job file ends with `: REASON`.
    """

    field: str
    """The field that requests it."""
    strategies: tuple[str, ...]
    methods: tuple[str, ...]
    applies: Callable[[JobSpec], bool]
    what: str
    reason: str


RULES = (
    Rule(
        "qlora.quant_type",
        WEIGHT_SHARDING_STRATEGIES,
        ("qlora",),
        lambda job: job.qlora.quant_type == "int8",
        "quant_type int8",
        "bitsandbytes keeps INT8 weights outside of the parameter, so they are not sharded and "
        "every process would hold all of them; use nf4, or zero2",
    ),
    Rule(
        "train.optim",
        _SHARDING_STRATEGIES,
        METHODS,
        lambda job: job.train.optim != "adamw_torch",
        "train.optim other than adamw_torch",
        "bitsandbytes packs its optimiser state, so it cannot be sharded or gathered for a "
        "checkpoint; use ddp",
    ),
    Rule(
        "train.mixed_precision",
        _SHARDING_STRATEGIES,
        METHODS,
        lambda job: job.train.mixed_precision == "fp16",
        "train.mixed_precision fp16",
        "its loss scale is not synchronised between shards; use bf16",
    ),
    Rule(
        "train.torch_compile",
        ("zero3",),
        METHODS,
        lambda job: job.train.torch_compile,
        "train.torch_compile",
        "DeepSpeed gathers weights in hooks that compiled blocks skip; use fsdp, zero1 or zero2",
    ),
)
"""Combinations that are refused on every device."""

NOTES: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        ("lora",),
        STRATEGIES,
        "not with init_lora_weights olora on layers such as GPT-2's (Conv1D): they are stored "
        "transposed, which PEFT's OLoRA does not support",
    ),
    (
        ("qlora",),
        STRATEGIES,
        "not with init_lora_weights pissa or olora: they change the base weights, and quantised "
        "weights cannot be changed exactly",
    ),
    (
        ("qlora",),
        STRATEGIES,
        "on CPU not with 4 bits if the input size of a matrix is not a multiple of 64; use int8",
    ),
    (
        ("prompt_tuning",),
        STRATEGIES,
        "not for classifiers that predict from the last token (GPT-2, Llama): with a learnt "
        "prompt, transformers does not find that token",
    ),
    (
        METHODS,
        ("zero1", "zero2", "zero3"),
        "on CPU only with a C++ compiler (g++), which DeepSpeed needs",
    ),
)
"""(methods, strategies, limitation). These depend on the model or the machine, and are checked
with them.
"""


@dataclass(frozen=True)
class SupportCell:
    """Support of one method under one strategy."""

    method: str
    strategy: str
    devices: tuple[str, ...]
    """Devices on which it may run; docs/gpu-status.md lists where it has been run."""
    supported: bool
    limits: tuple[str, ...]
    """Limitations, each with its reason."""

    @property
    def reason(self) -> str:
        """Return the limitations as one text."""
        return "; ".join(self.limits)


def build_support_table() -> list[SupportCell]:
    """Return every method under every strategy.

    Returns:
        One cell for each pair, in the order of METHODS and, within a method, of STRATEGIES.
            Every cell is supported today; `limits` says what does not run in it.
    """
    return [
        SupportCell(method, strategy, ("cpu", "cuda"), True, _list_limits(method, strategy))
        for method in METHODS
        for strategy in STRATEGIES
    ]


def _list_limits(method: str, strategy: str) -> tuple[str, ...]:
    refused = [
        f"not with {rule.what}: {rule.reason}"
        for rule in RULES
        if strategy in rule.strategies and method in rule.methods
    ]
    return (
        *refused,
        *(
            limit
            for methods, strategies, limit in NOTES
            if method in methods and strategy in strategies
        ),
    )


def find_unsupported(job: JobSpec) -> list[tuple[str, str]]:
    """Return (field, message) pairs for everything a job requests that is not supported.

    Validation of a job file calls it, so it uses neither the model nor the hardware.
    Planning calls it too, with each strategy that `auto` could become. `auto` itself is in
    no rule: only a DeepSpeed file is refused with it.
    """
    strategy = job.resources.strategy
    problems = [
        (
            rule.field,
            f"{rule.field} is {_format_value(job, rule.field)}, which is not supported with "
            f"{strategy}: {rule.reason}",
        )
        for rule in RULES
        if strategy in rule.strategies and job.method in rule.methods and rule.applies(job)
    ]
    if strategy in _SHARDING_STRATEGIES and job.resources.world_size == 1:
        problems.append(
            (
                "resources.strategy",
                f"resources.strategy is {strategy}, but a trial of one process has nothing to "
                "shard: set resources.workers_per_node or num_nodes, or use strategy: auto",
            )
        )
    # A metric that decides is computed at every evaluation of a trial, on the sharded weights.
    # Other metrics wait for the held-out evaluation of the saved weights.
    if strategy in WEIGHT_SHARDING_STRATEGIES and job.metric.name in job.text_metrics:
        path = f"{job.metric_block}.name"
        problems.append(
            (
                path,
                f"{path} is {job.metric.name}, for which every evaluation generates answers, but "
                f"weights sharded by {strategy} cannot generate; search by loss, or use ddp, zero1 "
                "or zero2",
            )
        )
    if job.resources.deepspeed_config and not strategy.startswith("zero"):
        problems.append(
            (
                "resources.deepspeed_config",
                "resources.deepspeed_config requires strategy zero1, zero2 or zero3, not "
                f"{strategy}",
            )
        )
    return problems


def _format_value(job: JobSpec, path: str) -> str:
    block, _, leaf = path.partition(".")
    value = getattr(getattr(job, block), leaf)
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_prompt_length(tokens: int, max_length: int, model: str, positions: int) -> str | None:
    """Return why a trained prompt of `tokens` tokens does not fit before the longest row.

    Return None if it fits, or if `positions` is 0.
    """
    if not positions or max_length + tokens <= positions:
        return None
    return (
        f"prompt_tuning.num_virtual_tokens is {tokens} and model.max_length is {max_length}, but "
        f"{model} has only {positions} positions for both together: reduce one of them"
    )


def describe_hidden_label(model: str) -> str:
    """Return why a classifier that reads the label off the last token cannot use prompt tuning.

    transformers finds that token by its id. Behind trained embeddings it takes the last
    position, which is padding.
    """
    return (
        f"method is prompt_tuning, but {model} predicts the label from the last token, which "
        "transformers does not find after a learnt prompt; use an encoder, task: generation, or "
        "lora"
    )
