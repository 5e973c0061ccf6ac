"""The `search` block: what is tried, what is looked at, and what is stopped early."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from lorafleet.jobs.schema import expressions as expression
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.metrics import METRICS, bare_name
from lorafleet.jobs.trials.asha import Goal
from pydantic import Field, model_validator

Scalar = bool | int | float | str
Distribution = Literal[
    "uniform", "log_uniform_values", "int_uniform", "q_uniform", "q_log_uniform_values", "categorical"
]


Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""How much of a metric may be lost, in its own unit."""
SEED = "train.seed"
FOLD = "data.fold"


class Parameter(Spec):
    """What one field may be in a search: `values`, or a `distribution` with its ends, or an `expression`."""

    values: Annotated[tuple[Scalar, ...], Field(strict=False)] | None = None
    """The choices, tried in turn (grid) or drawn alike often (random, tpe)."""
    distribution: Distribution | None = None
    """How a number is drawn between `min` and `max`; `categorical` draws from `values`."""
    min: int | float | None = None
    """Smallest value."""
    max: int | float | None = None
    """Largest value."""
    q: int | float | None = Field(None, gt=0)
    """Step to which the q_ distributions round."""
    expression: str | None = None
    """Arithmetic on other fields, such as `2*lora_r`; a bare string under `parameters` is this."""

    @model_validator(mode="after")
    def _one_meaning(self) -> Parameter:
        if self.expression is not None:
            expression.parse(self.expression)
            if (self.values, self.distribution, self.min, self.max, self.q) != (None,) * 5:
                raise ValueError("an expression goes alone, without values, distribution, min or max")
            return self
        if self.values is not None:
            return self._choices(self.values)
        if self.distribution is None or self.distribution == "categorical":
            raise ValueError("must have values: [...], or a distribution with min and max, or an expression")
        if self.min is None or self.max is None:
            raise ValueError(f"{self.distribution} needs min and max")
        if self.min >= self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}, but min must be below max")
        if "log" in self.distribution and self.min <= 0:
            raise ValueError(f"min is {self.min}, but must be above 0 for {self.distribution}")
        if self.distribution == "int_uniform" and not (isinstance(self.min, int) and isinstance(self.max, int)):
            raise ValueError(f"int_uniform needs whole numbers, not {self.min} and {self.max}")
        if self.distribution.startswith("q_") != (self.q is not None):
            raise ValueError("q goes with q_uniform and q_log_uniform_values, and they need it")
        if self.q is not None and self.q > self.max - self.min:
            raise ValueError(f"q is {self.q}, but must be at most max - min = {self.max - self.min:g}")
        return self

    def _choices(self, values: tuple[Scalar, ...]) -> Parameter:
        if not values:
            raise ValueError("values is empty, but must hold at least one value")
        if len(set(map(repr, values))) != len(values):
            raise ValueError(f"values holds the same value twice: {list(values)}")
        if self.distribution not in (None, "categorical") or (self.min, self.max, self.q) != (None, None, None):
            raise ValueError("values goes without min, max and q (its distribution is categorical)")
        return self


class NamedMetric(Spec):
    """A metric and its direction."""

    name: str
    """accuracy, f1, precision, recall or loss (classification); loss, perplexity, or one of `evaluate.metrics` and
    `evaluate.custom_metrics`, for which every evaluation has to write answers (generation, summarization)."""
    goal: Goal
    """maximize or minimize; goes with the name when left out."""

    @model_validator(mode="before")
    @classmethod
    def _goal_follows_name(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            raw = {"name": raw}
        if isinstance(raw, dict) and isinstance(raw.get("name"), str):
            name = bare_name(raw["name"])
            known = METRICS.get(name)
            wanted = known.goal if known and known.goal != "closer to 1" else "maximize"
            return {"goal": wanted, **raw, "name": name}
        return raw

    @model_validator(mode="after")
    def _goal_is_the_metrics(self) -> Self:
        known = METRICS.get(self.name)
        if known and known.goal == "closer to 1":
            raise ValueError(f"name is {self.name!r}, which describes answers: neither more nor less of it is better")
        if known and self.goal != known.goal:
            raise ValueError(f"goal is {self.goal}, but must be {known.goal} for {self.name}")
        return self


class MetricSpec(NamedMetric):
    """What trials are compared by, on the validation rows. In a job file, a list of names sets `name` and `also`."""

    also: Annotated[tuple[NamedMetric, ...], Field(strict=False)] = ()
    """Further metrics that decide. The first metric determines the best candidate; a cheaper one must be within the
    tolerance in all of them."""


class SchedulerSpec(Spec):
    """Which trials are stopped early (Ray's names)."""

    type: Literal["asha", "none"] = "asha"
    """`asha` stops the worse trials at each rung; `none` trains every trial to the end."""
    time_attr: Literal["samples", "step", "epoch"] = "samples"
    """Unit of max_t and grace_period: training rows seen (the same work for every trial), optimiser steps, epochs."""
    max_t: int | None = Field(None, ge=1, le=1_000_000_000_000)
    """Where a trial ends, in `time_attr` units. Left out: what `train` says."""
    grace_period: int | None = Field(None, ge=1)
    """The first rung, in `time_attr` units. Left out: max_t / reduction_factor^2."""
    reduction_factor: int = Field(3, ge=2, le=100)
    """At each rung the best 1/reduction_factor go on; the next rung is this many times as far."""

    @model_validator(mode="after")
    def _grace_below_max(self) -> SchedulerSpec:
        if self.grace_period and self.max_t and self.grace_period > self.max_t:
            raise ValueError(f"grace_period is {self.grace_period}, but must not be above max_t = {self.max_t}")
        return self


class BudgetSpec(Spec):
    """What the whole search may cost; at its end the running trials stop and the report is written."""

    gpu_hours: float | None = Field(None, gt=0)
    """GPU-hours over all trials."""
    wall_hours: float | None = Field(None, gt=0)
    """Hours on the clock since the sweep began, over all its attempts."""


class SearchSpec(Spec):
    """Which configurations are tried, and how the best is found."""

    method: Literal["random", "grid", "tpe"] = "random"
    """How configurations are chosen: drawn at random, all combinations, or by Optuna's TPE from earlier results."""
    metric: MetricSpec | None = None
    """What to optimise. Left out: accuracy (classification) or loss (generation, summarization)."""
    num_samples: int = Field(10, ge=1, le=100_000)
    """Trials of a random or tpe search; a grid has as many as it has combinations."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials at once. Left out: as many as fit the machine."""
    tolerance: Tolerance | dict[str, Tolerance] | None = None
    """How much of the metric a configuration with fewer trained parameters may lose against the best: it ships if the
    validation rows show that it loses no more. Of several metrics: a block with a number for each. Left out: 0.01 of a
    metric between 0 and 1, and 1 % of the best's value of any other."""
    keep: int = Field(5, ge=1)
    """Adapters to keep on disk: those of this many best trials, of which one is recommended."""
    budget: BudgetSpec = BudgetSpec()
    """Where the search ends early."""
    scheduler: SchedulerSpec = SchedulerSpec()
    """Which trials are stopped early."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the drawn configurations."""
    seeds: int = Field(1, ge=1, le=1000)
    """Trainings of the best configuration, each with a seed of its own: `train.seed`, and after the search the ones
    that follow it. They are trained to the end, and show how much of a difference is chance."""
    parameters: dict[str, Parameter] = Field(min_length=1)
    """Dotted field (`train.learning_rate`) -> what it may be."""

    @model_validator(mode="after")
    def _seeds_once(self) -> SearchSpec:
        if self.seeds > 1 and SEED in self.parameters:
            raise ValueError(f"seeds is {self.seeds}, but {SEED} is searched as well; drop one of the two")
        return self
