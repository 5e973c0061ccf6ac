"""Define the `compare` block: several ways to adapt a base at equal budget, and the choice."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lorafleet.jobs.errors import Problem, SpecProblems
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.search import MetricSpec, Parameter, SchedulerSpec, Tolerance
from lorafleet.jobs.schema.types import Method

ArmName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
Rule = Literal["cheapest_within_tolerance", "best", "smallest_within", "pareto"]
Cost = Literal[
    "train_seconds",
    "gpu_hours",
    "peak_memory_gib",
    "inference_memory_gib",
    "latency_ms",
    "weights_mb",
]
_SHARED_FIELDS = {"train.num_train_epochs", "train.max_steps", "train.seed"}
_ARM_BLOCKS = ("model", "lora", "qlora", "prompt_tuning", "train")
"""Blocks in which arms may differ. Rows, hardware and metrics are the same for all arms."""


class ArmSpec(Spec):
    """One way to adapt the base, or the base itself."""

    method: Method | Literal["base"] | None = None
    """Training method: lora, qlora, prompt_tuning or full; or `base` to train nothing. Leave it
    out with `adapter_of`.
    """
    weights: str | None = Field(None, min_length=1, max_length=4096)
    """Folder of existing weights that were trained with `method`: an adapter, or a model for
    `full`. The arm then trains nothing.
    """
    adapter_of: ArmName | None = None
    """Another arm whose adapter this arm uses without training, on a base in the format of
    `quantization`.
    """
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Number format of the base's matrices (bitsandbytes), for an arm that trains nothing.
    Default: none.
    """
    set: dict[str, Any] = {}
    """Dotted field -> its value in this arm, such as `lora.lora_r: 8`."""
    parameters: dict[str, Parameter] = {}
    """Dotted field -> the values that the arm's own search tries. Default: the arm is trained as
    it is, without a search.
    """

    @property
    def needs_training(self) -> bool:
        """Return whether the arm trains anything.

        The base itself, existing weights and the adapter of another arm are only evaluated.
        """
        return self.method not in (None, "base") and self.weights is None

    @model_validator(mode="after")
    def _check_kind(self) -> ArmSpec:
        """Check that the arm's fields fit together and that it sets only fields of its own."""
        if self.weights and self.method in (None, "base"):
            raise ValueError(
                "weights requires the method that they were trained with: lora, qlora, "
                "prompt_tuning or full"
            )
        if (self.method is None) == (self.adapter_of is None):
            raise ValueError("must have exactly one of method and adapter_of")
        if (self.needs_training or self.weights) and self.quantization != "none":
            raise ValueError(
                "quantization is only for base and adapter_of; to train on a quantised base, use "
                "method: qlora"
            )
        if not self.needs_training and self.parameters:
            raise ValueError("parameters lists values to search, but this arm trains nothing")
        for path in self.set if self.adapter_of else ():
            if not path.startswith("qlora."):
                raise ValueError(
                    f"{path!r} is fixed by the training of {self.adapter_of}; only fields of qlora "
                    "may differ"
                )
        for path in _SHARED_FIELDS & {*self.set, *self.parameters}:
            raise ValueError(
                f"{path!r} is the same for all arms: set the budget and the seeds in compare"
            )
        for path in (*self.set, *self.parameters):
            if path.partition(".")[0] not in _ARM_BLOCKS:
                raise ValueError(
                    f"{path!r} is the same for all arms; arms may only differ in "
                    f"{', '.join(_ARM_BLOCKS)}"
                )
        return self


class EqualBudget(Spec):
    """Budget of one training of each arm. Set at most one of the three fields."""

    samples: int | None = Field(None, ge=1)
    """Number of training rows."""
    tokens: int | None = Field(None, ge=1)
    """Number of tokens of training rows, without padding."""
    device_seconds: float | None = Field(None, gt=0)
    """Seconds of training times the number of the arm's GPUs (or CPU processes). A slow method
    sees fewer rows; its speed is measured first.
    """

    @model_validator(mode="after")
    def _check_single_limit(self) -> EqualBudget:
        """Check that at most one limit is set."""
        names = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(names) > 1:
            raise ValueError(f"has {' and '.join(names)}, but must have only one of them")
        return self


class InferenceSpec(Spec):
    """Settings of the inference benchmark of the finished arms.

    Each arm runs in its own process; the arms take turns for several rounds.
    """

    rounds: int = Field(2, ge=0, le=100)
    """Number of times that each arm is measured; 0 skips the benchmark. Default: 2."""
    rows: int = Field(8, ge=1, le=10_000)
    """Number of held-out rows that are answered or classified one by one, after one warm-up row
    that does not count. Default: 8.
    """
    new_tokens: int = Field(32, ge=2, le=100_000)
    """Number of tokens of every answer in this benchmark, even if the model would stop earlier.
    Default: 32.
    """


class CompareSpec(Spec):
    """A comparison of several ways to adapt one base, in one table."""

    arms: dict[ArmName, ArmSpec] = Field(min_length=2)
    """Name of the arm -> its settings. At least two."""
    metric: MetricSpec | None = None
    """Metric by which an arm is chosen. Default: accuracy for classification, loss for generation
    and summarization.
    """
    budget: EqualBudget = EqualBudget()
    """Budget of one training, the same for every arm. Default: what `train` says."""
    method: Literal["random", "grid"] = "random"
    """How an arm's search chooses configurations: `random` draws them, `grid` tries all
    combinations. Default: random.
    """
    num_samples: int = Field(4, ge=1, le=10_000)
    """Number of configurations that the search of each arm tries, with `random`. Default: 4."""
    scheduler: SchedulerSpec = SchedulerSpec(type="none")
    """Scheduler that stops the worse trials of an arm's search early; `budget` says where trials
    end. Default: no early stopping.
    """
    seeds: int = Field(3, ge=1, le=100)
    """Number of trainings of each arm's best configuration, each with its own seed: the search's
    seed and the ones after it. Default: 3.
    """
    rule: Rule = "cheapest_within_tolerance"
    """Rule that chooses an arm. `best`: the best metric. `cheapest_within_tolerance`: the cheapest
    arm for which the held-out rows show that it loses at most `tolerance` against the best.
    `smallest_within`: the arm with the least `cost` whose metric is at most `within` below the
    best. `pareto`: the best, and all arms that no other arm beats in both quality and cost.
    Default: cheapest_within_tolerance.
    """
    tolerance: Tolerance | dict[str, Tolerance] | None = None
    """For `cheapest_within_tolerance`: how much of the metric an arm may lose against the best.
    With several metrics: a block with a number for each. Default: 0.01 for a metric between 0
    and 1, else 1 % of the best arm's value.
    """
    within: float = Field(0.01, ge=0)
    """For `smallest_within`: how much of the metric may be given up. Default: 0.01."""
    cost: Cost = "train_seconds"
    """Cost by which arms are compared: seconds or GPU-hours of one training, GiB of memory in
    training or in inference, latency in milliseconds (per row, or to the first token), or MB on
    disk of the trained weights. Default: train_seconds.
    """
    inference: InferenceSpec = InferenceSpec()
    """Settings of the inference benchmark of the finished arms."""

    @field_validator("rule", mode="before")
    @classmethod
    def _convert_old_rule(cls, value: Any) -> Any:
        """Accept the earlier name of the rule `cheapest_within_tolerance`."""
        return "cheapest_within_tolerance" if value == "cheapest_within_noise" else value

    @model_validator(mode="after")
    def _check_arms(self) -> CompareSpec:
        """Check the arms' references to each other, and the scheduler against the budget."""
        problems = []
        for name, arm in self.arms.items():
            source = self.arms.get(arm.adapter_of) if arm.adapter_of else None
            if arm.adapter_of and (source is None or source.method not in ("lora", "qlora")):
                adapter_arms = [
                    candidate
                    for candidate, spec in self.arms.items()
                    if spec.method in ("lora", "qlora")
                ]
                sentence = (
                    f"adapter_of is {arm.adapter_of!r}, but must be an arm with an adapter: "
                    f"{', '.join(adapter_arms)}"
                )
                problems.append(
                    Problem(f"compare.arms.{name}.adapter_of", f"compare.arms.{name}.{sentence}")
                )
        if self.budget != EqualBudget() and self.scheduler.time_attr != "samples":
            sentence = (
                f"compare.scheduler.time_attr is {self.scheduler.time_attr}, but must be samples "
                "if compare.budget is set"
            )
            problems.append(Problem("compare.scheduler.time_attr", sentence))
        if self.scheduler.max_t is not None:
            sentence = "compare.scheduler.max_t is set by compare.budget; leave it out"
            problems.append(Problem("compare.scheduler.max_t", sentence))
        if problems:
            raise SpecProblems(problems)
        return self
