"""Compute default values that depend on the model."""

from __future__ import annotations

from dataclasses import dataclass

from lorafleet.jobs.data.hub import count_parameters
from lorafleet.jobs.schema.job import JobSpec

LOGITS_AT_ONCE = 2**24
"""Number of logits that the chunked loss holds at a time (64 MiB in float32)."""


@dataclass(frozen=True)
class LearningRate:
    """A learning rate and the rule that it comes from."""

    value: float
    rule: str


def resolve_learning_rate(job: JobSpec) -> LearningRate:
    """Return the job's learning rate, or the default for its method and the size of its model.

    The size is pinned for an asset and read from the files of any other model. While these
    are not on this machine, the rate for an unknown size is returned.
    """
    if job.train.learning_rate is not None:
        return LearningRate(job.train.learning_rate, "as set")
    parameters = count_parameters(job.model.model_name_or_path, job.model.revision)
    return get_default_learning_rate(parameters, job.method)


def get_default_learning_rate(parameters: int | None, method: str = "lora") -> LearningRate:
    """Return the default peak learning rate of a method for the size of a model.

    LoRA's rate falls as the model grows: small models stay at chance with the 2e-4 of large
    ones. Full fine-tuning needs about a tenth of LoRA's rate (Schulman and Thinking Machines,
    LoRA Without Regret, 2025), small encoders 2e-5 to 5e-5 (Devlin et al., 2019). Prompt tuning
    needs far more, because a few embeddings do all the work.

    Args:
        parameters: Number of weights of the model; None if it is not known.
        method: Training method.
    """
    if method == "prompt_tuning":
        return LearningRate(3e-2, method)
    rate, size = 2e-4, "size of the model unknown"
    if parameters is not None:
        size = f"{parameters / 1e6:,.0f} M parameters"
        rate = 1e-3 if parameters < 200e6 else 5e-4 if parameters < 1e9 else 2e-4
    return LearningRate(min(rate / 10, 5e-5) if method == "full" else rate, f"{method}, {size}")
