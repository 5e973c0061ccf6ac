"""Values that depend on the model, worked out when the model is known."""

from __future__ import annotations

from dataclasses import dataclass

from lorafleet.jobs.data.hub import parameter_count
from lorafleet.jobs.schema.job import JobSpec

LOGITS_AT_ONCE = 2**24
"""Logits that the chunked loss holds at a time (64 MiB in float32)."""


@dataclass(frozen=True)
class LearningRate:
    """A learning rate and the rule that gave it."""

    value: float
    rule: str


def learning_rate(job: JobSpec) -> LearningRate:
    """The job's own learning rate, or the default of its method for the size of its model."""
    if job.train.learning_rate is not None:
        return LearningRate(job.train.learning_rate, "as given")
    parameters = parameter_count(job.model.model_name_or_path, job.model.revision)
    return default_learning_rate(parameters, job.method)


def default_learning_rate(parameters: int | None, method: str = "lora") -> LearningRate:
    """LoRA's peak rate falls as the model grows: small models stay at chance with the 2e-4 of the large.

    Full fine-tuning wants about a tenth of LoRA's (Schulman and Thinking Machines, LoRA Without Regret, 2025), small
    encoders 2e-5 to 5e-5 (Devlin et al., 2019); prompt tuning far more, since a few embeddings do all the work.
    """
    if method == "prompt_tuning":
        return LearningRate(3e-2, method)
    rate, size = 2e-4, "size of the model not known here"
    if parameters is not None:
        size = f"{parameters / 1e6:,.0f} M parameters"
        rate = 1e-3 if parameters < 200e6 else 5e-4 if parameters < 1e9 else 2e-4
    return LearningRate(min(rate / 10, 5e-5) if method == "full" else rate, f"{method}, {size}")
