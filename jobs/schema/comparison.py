"""The `compare` block: ways of adapting a base side by side, at what equal budget, and how one is chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from lorafleet.jobs.errors import Problem, SpecProblems
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.compatibility import Method
from lorafleet.jobs.schema.search import MetricSpec, Parameter, SchedulerSpec, Tolerance
from pydantic import Field, field_validator, model_validator

ArmName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
Rule = Literal["cheapest_within_tolerance", "best", "smallest_within", "pareto"]
Cost = Literal["train_seconds", "gpu_hours", "peak_memory_gib", "inference_memory_gib", "latency_ms", "weights_mb"]
_EQUAL_FOR_ALL = {"train.num_train_epochs", "train.max_steps", "train.seed"}
_OWN_BLOCKS = ("model", "lora", "qlora", "prompt_tuning", "train")
"""Blocks that arms may differ in: rows, hardware and metrics are the same for all."""


class ArmSpec(Spec):
    """One way to adapt the base, or not to."""

    method: Method | Literal["base"] | None = None
    """What is trained: lora, qlora, prompt_tuning or full; or `base`: nothing. Left out with `adapter_of`."""
    weights: str | None = Field(None, min_length=1, max_length=4096)
    """A folder of what was trained before, with `method` as what: an adapter, or (full) a model. Nothing is trained."""
    adapter_of: ArmName | None = None
    """Another arm, whose adapter this one has without any training of its own (on the base as `quantization` says)."""
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Number format of the base's matrices under an arm that trains nothing (bitsandbytes)."""
    set: dict[str, Any] = {}
    """Dotted field -> the value that it has in this arm, such as `lora.lora_r: 8`."""
    parameters: dict[str, Parameter] = {}
    """Dotted field -> what the arm's own search tries. Left out: the arm is trained as it is."""

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.method not in (None, "base") and self.weights is None

    @model_validator(mode="after")
    def _one_kind(self) -> ArmSpec:
        if self.weights and self.method in (None, "base"):
            raise ValueError("weights goes with the method that they were trained by: lora, qlora, prompt_tuning, full")
        if (self.method is None) == (self.adapter_of is None):
            raise ValueError("must have either method or adapter_of, and exactly one of the two")
        if (self.trains or self.weights) and self.quantization != "none":
            raise ValueError("quantization is for base and adapter_of; method: qlora says that a base is quantised")
        if not self.trains and self.parameters:
            raise ValueError("parameters is what a search tries, and this arm trains nothing")
        for path in self.set if self.adapter_of else ():
            if not path.startswith("qlora."):
                raise ValueError(f"{path!r} is what {self.adapter_of} was trained with; only qlora's fields may differ")
        for path in _EQUAL_FOR_ALL & {*self.set, *self.parameters}:
            raise ValueError(f"{path!r} is the same for all arms: budget and seeds are compare's to say")
        for path in (*self.set, *self.parameters):
            if path.partition(".")[0] not in _OWN_BLOCKS:
                raise ValueError(f"{path!r} is the same for all arms; they may differ in {', '.join(_OWN_BLOCKS)}")
        return self


class EqualBudget(Spec):
    """What one training of each arm may use. At most one of the three."""

    samples: int | None = Field(None, ge=1)
    """Training rows."""
    tokens: int | None = Field(None, ge=1)
    """Real (not padding) tokens of training rows."""
    device_seconds: float | None = Field(None, gt=0)
    """Seconds of training times the arm's GPUs (or CPU processes): a slow method sees fewer rows. Its speed is measured
    first."""

    @model_validator(mode="after")
    def _one(self) -> EqualBudget:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"has {' and '.join(given)}, but must have one of them")
        return self


class InferenceSpec(Spec):
    """How the finished arms are measured: each in a process of its own, one after another, and that several times."""

    rounds: int = Field(2, ge=0, le=100)
    """How often every arm is measured, in turn; 0: not at all."""
    rows: int = Field(8, ge=1, le=10_000)
    """Held-out rows that are answered or classified one by one, after one that does not count."""
    new_tokens: int = Field(32, ge=2, le=100_000)
    """Tokens that every answer has in this measurement, however soon it would end."""


class CompareSpec(Spec):
    """Several ways to adapt one base, in one table."""

    arms: dict[ArmName, ArmSpec] = Field(min_length=2)
    """Name -> arm."""
    metric: MetricSpec | None = None
    """What arms are chosen by. Left out: accuracy (classification) or loss (generation, summarization)."""
    budget: EqualBudget = EqualBudget()
    """The same for one training of every arm. Left out: what `train` says."""
    method: Literal["random", "grid"] = "random"
    """How an arm's search chooses configurations: drawn at random, or all combinations."""
    num_samples: int = Field(4, ge=1, le=10_000)
    """Configurations that the search of each arm tries (random)."""
    scheduler: SchedulerSpec = SchedulerSpec(type="none")
    """Whether an arm's search stops its worse trials early; `budget` says where they end."""
    seeds: int = Field(3, ge=1, le=100)
    """Trainings of each arm's best configuration, each with a seed of its own: the search's, and the ones after it."""
    rule: Rule = "cheapest_within_tolerance"
    """How an arm is chosen: the `best`; the cheapest of those of which the held-out rows show that they lose at most
    `tolerance` against it; the one with the least `cost` `within` so much of it; or `pareto`: the best, with all that
    nothing beats in both quality and cost."""
    tolerance: Tolerance | dict[str, Tolerance] | None = None
    """For `cheapest_within_tolerance`: how much of the metric an arm may lose against the best. Of several metrics: a
    block with a number for each. Left out: 0.01 of a metric between 0 and 1, and 1 % of the best's value of any
    other."""
    within: float = Field(0.01, ge=0)
    """For `smallest_within`: how much of the metric may be given up."""
    cost: Cost = "train_seconds"
    """What the cheap one is cheap in: seconds or GPU-hours of one training, GiB in training or in inference,
    milliseconds (a row's, or to the first token), or MB on disk of what was trained."""
    inference: InferenceSpec = InferenceSpec()
    """How the finished arms are measured."""

    @field_validator("rule", mode="before")
    @classmethod
    def _earlier_name(cls, value: Any) -> Any:
        return "cheapest_within_tolerance" if value == "cheapest_within_noise" else value

    @model_validator(mode="after")
    def _arms_agree(self) -> CompareSpec:
        problems = []
        for name, arm in self.arms.items():
            source = self.arms.get(arm.adapter_of) if arm.adapter_of else None
            if arm.adapter_of and (source is None or source.method not in ("lora", "qlora")):
                known = [other for other, spec in self.arms.items() if spec.method in ("lora", "qlora")]
                sentence = f"adapter_of is {arm.adapter_of!r}, but must be an arm with an adapter: {', '.join(known)}"
                problems.append(Problem(f"compare.arms.{name}.adapter_of", f"compare.arms.{name}.{sentence}"))
        if self.budget != EqualBudget() and self.scheduler.time_attr != "samples":
            sentence = f"compare.scheduler.time_attr is {self.scheduler.time_attr}, but must be samples with a budget"
            problems.append(Problem("compare.scheduler.time_attr", sentence))
        if self.scheduler.max_t is not None:
            sentence = "compare.scheduler.max_t is what compare.budget says; drop it"
            problems.append(Problem("compare.scheduler.max_t", sentence))
        if problems:
            raise SpecProblems(problems)
        return self
