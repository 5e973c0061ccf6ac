"""Decide which trials can be trained together on one base, and how many. Pure.

The training itself is in `training/packed/`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.search import SearchSpec
from lorafleet.jobs.text import format_count

RANK = "lora.lora_r"
MAX_CPU_TOKENS = 160
"""Tokens of a micro-batch above which a CPU gains nothing from a second trial beside it: its matrix
products are as fast as they get (`python -m benchmarks.packed`). Such a job is not measured.
"""
MAX_AUTO_TRIALS = 16
"""Maximum number of trials at once with `resources.pack: auto`."""
MIN_SPEEDUP = 1.03
"""Smallest gain from twice as many trials in a forward pass for which they share one."""
MIN_GAIN = 1.05
"""Smallest gain in speed for which `resources.pack: auto` packs."""


def find_packing_refusal(job: JobSpec) -> str | None:
    """Return why a trial is trained alone, whatever its model, or None.

    Args:
        job: The job of the trial.
    """
    lora, train = job.lora, job.train
    if job.method not in ("lora", "qlora"):
        return f"method {job.method} is trained alone"
    if lora.use_dora or lora.has_modified_base:
        return "DoRA, PiSSA and OLoRA are trained alone"
    if job.resources.world_size > 1:
        return "it has several processes"
    if train.optim != "adamw_torch":
        return f"train.optim is {train.optim}"
    if train.mixed_precision == "fp16":
        return "train.mixed_precision is fp16, whose loss scale would be shared"
    if train.packing or job.uses_padding_free or train.torch_compile:
        return "train.packing, train.padding_free and train.torch_compile are for trials alone"
    if job.model.attn_implementation not in ("auto", "sdpa", "eager"):
        return f"model.attn_implementation is {job.model.attn_implementation}"
    return None


def find_lone_reason(job: JobSpec, max_rank: int) -> str | None:
    """Return why a trial is trained alone by a process that trains packs, or None.

    Args:
        job: The job of the trial.
        max_rank: Largest rank of a pack.
    """
    if job.lora.lora_r > max_rank:
        return f"its rank is above that of the pack, {max_rank}"
    return find_packing_refusal(job)


def build_pack_key(job: JobSpec) -> Hashable:
    """Return what the trials of a pack have in common: base, adapted layers, rows and arithmetic.

    Args:
        job: The job of a trial.
    """
    lora, train = job.lora, job.train
    return (
        job.model,
        job.method,
        job.qlora if job.method == "qlora" else None,
        job.data.fold,
        lora.lora_target_modules,
        train.init_adapter,
        train.mixed_precision,
        train.chunked_loss,
        train.gradient_checkpointing,
        train.per_device_eval_batch_size,
    )


def find_max_rank(job: JobSpec, assignments: Iterable[dict[str, object]] = ()) -> int:
    """Return the largest rank that a trial of a search can have.

    Args:
        job: The job of the search.
        assignments: Configurations that are known; a rank given by an expression is in them alone.
    """
    ranks = [assignment[RANK] for assignment in assignments if RANK in assignment]
    search: SearchSpec | None = job.search
    parameter = search.parameters.get(RANK) if search else None
    if parameter is not None:
        ranks += [*(parameter.values or ()), parameter.max]
    return max([job.lora.lora_r, *(rank for rank in ranks if isinstance(rank, int))])


@dataclass(frozen=True)
class PackChoice:
    """Number of trials that are trained at once."""

    trials: int
    """1: they are not packed."""
    trials_per_pass: int
    """Maximum number of trials that share a forward pass."""
    sentence: str
    """The choice and its reason."""


def choose_pack_size(
    speeds: Mapping[int, float], alone: float | None, max_trials: int
) -> PackChoice:
    """Return how many trials to train at once.

    Args:
        speeds: Number of trials in a forward pass -> tokens per second of all of them.
        alone: Tokens per second of all trials that would otherwise train at once, each alone; None
            if the job sets the number of trials, so that nothing is to be decided.
        max_trials: Largest number of trials.
    """
    per_pass, speed = 1, speeds[1]
    for count, next_speed in sorted(speeds.items()):
        if next_speed >= MIN_SPEEDUP * speed:
            per_pass, speed = count, next_speed
    together = f"{format_count(per_pass, 'trial')} in a forward pass train {speed:,.0f} tokens/s"
    if alone is None:
        return PackChoice(
            max_trials,
            per_pass,
            f"up to {format_count(max_trials, 'trial')} at once (resources.pack); {together}",
        )
    gain = speed / alone
    if gain < MIN_GAIN or per_pass == 1:
        return PackChoice(
            1, 1, f"one trial at a time: {together} and trials alone {alone:,.0f} (measured)"
        )
    return PackChoice(
        per_pass,
        per_pass,
        f"up to {format_count(per_pass, 'trial')} at once: {together} and trials alone "
        f"{alone:,.0f}, {gain:.2f} times as fast (measured)",
    )


def describe_full_cpu(tokens: int | None) -> str | None:
    """Return why packing would gain nothing on a CPU, or None if it may.

    Args:
        tokens: Tokens of a micro-batch of one trial; None if unknown.
    """
    if tokens is None or tokens <= MAX_CPU_TOKENS:
        return None
    return (
        f"a micro-batch has about {tokens} tokens, and above {MAX_CPU_TOKENS} a CPU gains nothing "
        "from a second trial beside it"
    )
