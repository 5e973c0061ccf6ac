"""Plan: all that would happen, as data. Printing it is the dry run; `submit` hands it over."""

from __future__ import annotations

from typing import Any

from lorafleet.jobs.runs.export_result import Delivery
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.placement import Placement
from pydantic import Field

MANIFEST = "manifest.yaml"
"""Of a plan's files: the objects of a job on Kubernetes."""


class MemoryEstimate(Spec):
    """Memory of one training process, in GiB, by component."""

    components: dict[str, float]
    """Base weights, adapter, gradients, optimiser, activations, logits, allocator, runtime."""
    low: float
    """A tenth below what is expected where an allocator keeps nothing that was freed."""
    expected: float
    """The sum of the components, less what is never there at the same time."""
    high: float
    """With a margin for fragmentation, and with attention's scores."""
    of: str
    """What is estimated: a GPU's memory or a process's."""


class PlannedTrial(Spec):
    """One trial before it runs."""

    trial_id: str | None
    """None when the data or model is not on this machine yet, so that it cannot be hashed."""
    assignment: dict[str, Any]
    """What the search gives it."""
    resolved: dict[str, Any]
    """Every field that trains, as this trial has it."""
    steps: int
    """Optimiser steps to the end."""
    arm: str | None = None
    """The arm of a comparison that tries it."""
    memory: MemoryEstimate | None = None
    """Of one of its processes; None when the model's shape is not known here."""


class Plan(Spec):
    """Everything a sweep would do."""

    job: JobSpec
    """The job."""
    command: str
    """`sweep`, `train`, `compare`, `export`, or `benchmark`."""
    trials: list[PlannedTrial]
    """The trials that are known beforehand (all of a grid or random search; the start-up trials of tpe)."""
    later_trials: int = Field(0, ge=0)
    """Trials that are chosen while the sweep runs: by tpe, and the best configuration with further seeds."""
    placement: Placement
    """Where they go."""
    batch_rows: int
    """Rows in one optimiser step."""
    accumulation_steps: int
    """Passes in one optimiser step, on each process."""
    train_rows: int | None
    """Sequences of one epoch (a conversation may become several), or None when the data is not on this machine."""
    data: list[str] = []
    """What the rows are as tokens, a line for each split; empty where the tokenizer is not on this machine."""
    rung_levels: list[int]
    """Rungs, in `time_attr` units."""
    rung_steps: list[int]
    """Rungs, in optimiser steps."""
    worst_samples: int
    """Training rows if no trial were stopped."""
    expected_samples: int
    """Training rows expected under ASHA."""
    memory: MemoryEstimate | None
    """The largest trial's; None when no model's shape is known here."""
    gpu_memory_gib: float = 0.0
    """What a GPU of the site has, in GiB; 0 on CPU and where it is not known."""
    checkpoint_gb: float | None = None
    """GB on disk of one checkpoint of all trials that run at once; the one before is kept beside it."""
    strategy: str
    """What `auto` came to."""
    number_formats: str = ""
    """Number formats of weights and arithmetic; where trials differ, those of the first."""
    site: str = "here"
    """Where it would run: this machine, a Ray, or a site by name."""
    nodes: int = 1
    """Nodes of the job on a cluster with a queue."""
    command_line: str = ""
    """What hands it over to the queue, as it would be typed; RUN stands for the folder of the run."""
    tasks: int = 0
    """Tasks of a job array, where the site has one task a group of trials."""
    share: list[int] = []
    """Of a task's own plan: the number of its first trial, and of the one after its last."""
    placements: dict[str, Placement] = {}
    """Of a comparison: where the trials of each arm go, as its own memory and number of trials allow."""
    judges: bool = True
    """Whether the run ends with its finalists on the held-out rows; the runs of an arm leave that to the comparison."""
    delivery: Delivery | None = None
    """Of an export or a benchmark: what is asked for."""
    files: dict[str, str] = {}
    """What is handed over to a queue, by name."""
    notes: list[str] = []
    """What a reader should know: aliases, unknown sizes, missing data."""
