"""Define the `search` block of a job file.

It says what is searched, which metrics decide, and which trials stop early. The checks
here see this block alone. Checks across blocks are in jobs/schema/job.py; those that
need the job of a trial are in jobs/trials/sampling.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lorafleet.jobs.schema import expressions as expression
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.metrics import METRICS, strip_metric_prefix
from lorafleet.jobs.schema.types import Goal, Scalar

Distribution = Literal[
    "uniform",
    "log_uniform_values",
    "int_uniform",
    "q_uniform",
    "q_log_uniform_values",
    "categorical",
]


Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""How much of a metric may be lost, in the metric's own unit."""
SEED = "train.seed"


class Parameter(Spec):
    """Possible values of one field in a search: `values`, a `distribution` with a range, or an
    `expression`.
    """

    values: Annotated[tuple[Scalar, ...], Field(strict=False)] | None = None
    """The choices. A grid tries each in turn; random and tpe draw them with equal probability."""
    distribution: Distribution | None = None
    """Distribution of a number between `min` and `max`; `categorical` draws from `values`."""
    min: int | float | None = None
    """Smallest value."""
    max: int | float | None = None
    """Largest value."""
    q: int | float | None = Field(None, gt=0)
    """Step to which the q_ distributions round."""
    expression: str | None = None
    """Arithmetic on other fields, such as `2*lora_r`. A plain string under `parameters` is read as
    an expression.
    """

    @model_validator(mode="after")
    def _check_definition(self) -> Parameter:
        if self.expression is not None:
            expression.parse(self.expression)
            if (self.values, self.distribution, self.min, self.max, self.q) != (None,) * 5:
                raise ValueError("an expression excludes values, distribution, min and max")
            return self
        if self.values is not None:
            return self._check_values(self.values)
        if self.distribution is None or self.distribution == "categorical":
            raise ValueError(
                "must have values: [...], or a distribution with min and max, or an expression"
            )
        if self.min is None or self.max is None:
            raise ValueError(f"{self.distribution} needs min and max")
        if self.min >= self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}, but min must be below max")
        if "log" in self.distribution and self.min <= 0:
            raise ValueError(f"min is {self.min}, but must be above 0 for {self.distribution}")
        if self.distribution == "int_uniform" and not (
            isinstance(self.min, int) and isinstance(self.max, int)
        ):
            raise ValueError(f"int_uniform needs whole numbers, not {self.min} and {self.max}")
        if self.distribution.startswith("q_") != (self.q is not None):
            raise ValueError(
                "q is required by q_uniform and q_log_uniform_values, and not allowed otherwise"
            )
        if self.q is not None and self.q > self.max - self.min:
            raise ValueError(
                f"q is {self.q}, but must be at most max - min = {self.max - self.min:g}"
            )
        return self

    def _check_values(self, values: tuple[Scalar, ...]) -> Parameter:
        if not values:
            raise ValueError("values is empty, but must have at least one entry")
        # By repr: 1, 1.0 and true are equal in Python, but they are different values of a field.
        if len(set(map(repr, values))) != len(values):
            raise ValueError(f"values has the same value twice: {list(values)}")
        if self.distribution not in (None, "categorical") or (self.min, self.max, self.q) != (
            None,
            None,
            None,
        ):
            raise ValueError("values excludes min, max and q (its distribution is categorical)")
        return self


class NamedMetric(Spec):
    """A metric and its direction."""

    name: str
    """Name of the metric. Classification: accuracy, f1, precision, recall or loss. Generation and
    summarization: loss, perplexity, or one of `evaluate.metrics` and `evaluate.custom_metrics`,
    for which every evaluation generates answers.
    """
    goal: Goal
    """maximize or minimize. Left out: the usual direction of the metric."""

    @model_validator(mode="before")
    @classmethod
    def _fill_goal(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            raw = {"name": raw}
        if isinstance(raw, dict) and isinstance(raw.get("name"), str):
            name = strip_metric_prefix(raw["name"])
            metric = METRICS.get(name)
            # Another name is that of a custom metric. JobSpec refuses a goal that differs from the
            # one that the metric declares.
            goal = metric.goal if metric and metric.goal != "closer to 1" else "maximize"
            return {"goal": goal, **raw, "name": name}
        return raw

    @model_validator(mode="after")
    def _check_goal(self) -> Self:
        metric = METRICS.get(self.name)
        if metric and metric.goal == "closer to 1":
            raise ValueError(
                f"name is {self.name!r}, which only describes answers and cannot be minimized or "
                "maximized"
            )
        if metric and self.goal != metric.goal:
            raise ValueError(f"goal is {self.goal}, but must be {metric.goal} for {self.name}")
        return self


class MetricSpec(NamedMetric):
    """Metric by which trials are compared, on the validation rows.

    In a job file, a list of names sets `name` and `also`.
    """

    also: Annotated[tuple[NamedMetric, ...], Field(strict=False)] = ()
    """Further metrics for the decision. The first metric determines the best candidate; a cheaper
    candidate must be within the tolerance in all metrics.
    """


class SchedulerSpec(Spec):
    """Early stopping of trials (Ray's field names)."""

    type: Literal["asha", "none"] = "asha"
    """`asha` stops the worse trials at each rung; `none` trains every trial to the end."""
    mode: Literal["stop", "promote", "synchronous"] = "stop"
    """Rule by which trials pass a rung. `stop`: a trial that arrives is compared with those that
    arrived before, and goes on at once or is stopped. `promote`: it pauses, and goes on only while
    it is among the best 1/reduction_factor of those that have arrived; no trial is trained further
    than its rank deserves. `synchronous`: all trials pause, and the best go on when the last one
    has arrived, so that the decisions do not depend on which of them was faster.
    """
    time_attr: Literal["samples", "step", "epoch"] = "samples"
    """Unit of max_t and grace_period: training rows (`samples`, the same amount of work for every
    trial), optimiser steps or epochs.
    """
    max_t: int | None = Field(None, ge=1, le=1_000_000_000_000)
    """Length of a trial, in `time_attr` units. Left out: the length set in `train`."""
    grace_period: int | None = Field(None, ge=1)
    """First rung, in `time_attr` units. Left out: max_t / reduction_factor^2."""
    reduction_factor: int = Field(3, ge=2, le=100)
    """At each rung the best 1/reduction_factor of the trials continue; the next rung is
    reduction_factor times as far.
    """

    @model_validator(mode="after")
    def _check_mode(self) -> SchedulerSpec:
        if self.mode != "stop" and self.type == "none":
            raise ValueError(f"mode is {self.mode}, but type none has no rungs; leave mode out")
        return self

    @model_validator(mode="after")
    def _check_grace_period(self) -> SchedulerSpec:
        if self.grace_period and self.max_t and self.grace_period > self.max_t:
            raise ValueError(
                f"grace_period is {self.grace_period}, but must not exceed max_t = {self.max_t}"
            )
        return self


class BudgetSpec(Spec):
    """Budget of the whole search. When it is spent, the running trials stop and the report is
    written.
    """

    gpu_hours: float | None = Field(None, gt=0)
    """GPU-hours over all trials. Left out: no limit."""
    wall_hours: float | None = Field(None, gt=0)
    """Wall-clock hours since the sweep began, over all its attempts. Left out: no limit."""


class SearchSpec(Spec):
    """Which configurations are tried, and how the best one is found."""

    method: Literal["random", "grid", "tpe"] = "random"
    """How configurations are chosen: `random` draws them, `grid` tries all combinations, `tpe`
    uses Optuna's TPE on earlier results.
    """
    metric: MetricSpec | None = None
    """Metric to optimise.

    Left out: accuracy (classification) or loss (generation, summarization).
    """
    num_samples: int = Field(10, ge=1, le=100_000)
    """Number of trials of a random or tpe search. A grid has as many trials as combinations."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Maximum number of trials at the same time. Left out: as many as fit."""
    tolerance: Tolerance | dict[str, Tolerance] | None = None
    """How much of the metric a configuration with fewer trained parameters may lose against the
    best one. It ships if the validation rows show that it loses no more than this. With several
    metrics, give a block with a number for each. Left out: 0.01 for a metric between 0 and 1,
    and 1 % of the best value for any other metric.
    """
    keep: int = Field(5, ge=1)
    """Number of best trials whose adapters stay on disk. One of them is recommended."""
    budget: BudgetSpec = BudgetSpec()
    """When the search ends early."""
    scheduler: SchedulerSpec = SchedulerSpec()
    """Which trials are stopped early."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the sampled configurations."""
    seeds: int = Field(1, ge=1, le=1000)
    """Number of trainings of the best configuration, each with its own seed: `train.seed`, and
    after the search the seeds that follow it. They are trained to the end and show how much of
    a difference is chance.
    """
    parameters: dict[str, Parameter] = Field(min_length=1)
    """Dotted field (`train.learning_rate`) -> its possible values."""

    @model_validator(mode="after")
    def _check_mode(self) -> SearchSpec:
        if self.scheduler.mode != "stop" and self.method == "tpe":
            raise ValueError(
                f"scheduler.mode is {self.scheduler.mode}, but method tpe needs the results of "
                "trials that have ended, and paused trials have not; use method random, or mode "
                "stop"
            )
        return self

    @model_validator(mode="after")
    def _check_seeds(self) -> SearchSpec:
        if self.seeds > 1 and SEED in self.parameters:
            raise ValueError(
                f"seeds is {self.seeds}, but {SEED} is searched as well; keep one of the two"
            )
        return self
