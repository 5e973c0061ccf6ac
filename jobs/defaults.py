"""Values that depend on the model, worked out when the model is known."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.hub import parameter_count
from jobs.spec import JobSpec


@dataclass(frozen=True)
class LearningRate:
    """A learning rate and the rule that gave it."""

    value: float
    rule: str


def learning_rate(job: JobSpec) -> LearningRate:
    """The job's own learning rate, or the default of its method for the size of its model."""
    if job.train.learning_rate is not None:
        return LearningRate(job.train.learning_rate, "as given")
    return default_learning_rate(parameter_count(job.model.model_name_or_path, job.model.revision))


def default_learning_rate(parameters: int | None) -> LearningRate:
    """LoRA's peak rate falls as the model grows: small models stay at chance with the 2e-4 of the large."""
    if parameters is None:
        return LearningRate(2e-4, "lora, size of the model not known here")
    millions = f"{parameters / 1e6:,.0f} M parameters"
    if parameters < 200e6:
        return LearningRate(1e-3, f"lora, {millions}")
    return LearningRate(5e-4 if parameters < 1e9 else 2e-4, f"lora, {millions}")
