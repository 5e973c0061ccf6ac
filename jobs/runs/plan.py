"""Define the plan of a run as data: a dry run prints it, and `submit` submits it.

Backends create plans (cluster/planning/plan.py) and plan.json stores them. A driver
takes the job and the placement from there, so a run does what was shown, whatever has
happened to the job file since.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.export_result import ExportRequest
from lorafleet.jobs.runs.records import check_version
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.validation_messages import describe_unreadable_file
from lorafleet.jobs.sites.placement import Placement

MANIFEST = "manifest.yaml"
"""Name, among a plan's files, of the objects of a job on Kubernetes."""


class MemoryEstimate(Spec):
    """Estimated memory of one training process, in GiB."""

    components: dict[str, float]
    """GiB by component: base weights, adapter, gradients, optimizer, activations, logits,
    allocator, runtime.
    """
    low: float
    """Lower bound: 10 % below the expected memory if the allocator keeps no freed memory."""
    expected: float
    """Sum of the components, less those that never exist at the same time."""
    high: float
    """Upper bound, with a margin for fragmentation and with attention scores."""
    of: str
    """What the estimate is for: the memory of a GPU or of a process."""
    measured: float | None = None
    """Largest memory of an earlier trial of the same shape on the same site; None if there was
    none.
    """

    @property
    def required(self) -> float:
        """Return the GiB to plan with: what was measured and a tenth more, else the expected."""
        return self.expected if self.measured is None else 1.1 * self.measured


class TrainingLoad(Spec):
    """Training work of a plan, or of one arm of a comparison."""

    arm: str | None = None
    """The arm; None outside of comparisons."""
    slots: int
    """Trials in parallel, over all array tasks that run at once."""
    workers: int
    """Processes of one trial."""
    waves: int
    """Rounds of trials if none stops early."""
    longest_rows: int
    """Training rows of the longest trial."""
    expected_rows: int
    """Expected training rows of all trials."""
    worst_rows: int
    """Training rows of all trials if none stops early."""

    def compute_seconds(self, seconds_per_row: float) -> tuple[float, float]:
        """Return the expected and the longest duration of the training, in seconds.

        The expected one assumes that no slot waits, unless a single trial lasts longer.

        Args:
            seconds_per_row: Seconds of one process per training row.
        """
        one_trial = self.longest_rows * seconds_per_row / self.workers
        shared = self.expected_rows * seconds_per_row / (self.slots * self.workers)
        longest = self.waves * one_trial
        return min(longest, max(one_trial, shared)), longest


class TrainingRate(Spec):
    """Measured speed of training, for estimates of time."""

    seconds_per_row: float
    """Seconds of one process (on a GPU: of one GPU) per training row."""
    source: str
    """Run and site of the measurement, for display."""


class PlannedTrial(Spec):
    """One trial before it runs."""

    trial_id: str | None
    """Id of the trial; None if data or model are not on this machine yet and cannot be hashed."""
    assignment: dict[str, Any]
    """Values that the search assigns."""
    resolved: dict[str, Any]
    """All fields that affect training, with the values of this trial."""
    steps: int
    """Optimizer steps of the full training."""
    arm: str | None = None
    """Arm of the comparison that the trial belongs to."""
    memory: MemoryEstimate | None = None
    """Memory of one of its processes; None if the shape of the model is unknown on this machine."""
    alone: str | None = None
    """Reason why it is not trained together with others, in a run that packs trials."""


class PackingPlan(Spec):
    """Plan of how many trials of a sweep a process trains at once, on one base."""

    trials: int = Field(1, ge=1)
    """Maximum number of trials of a process at once; 1: they are not packed."""
    processes: int = Field(1, ge=1)
    """Processes that train packs beside each other: one on this machine's CPU, or one for each
    GPU, or one for each machine of a cluster of CPUs.
    """
    reason: str
    """Why so many, or why they are not packed."""
    is_measured: bool = False
    """True if the run measures first whether packing is faster (`resources.pack: auto`)."""
    max_rank: int = 1
    """Largest rank of a trial."""
    tokens: int | None = None
    """Tokens of a micro-batch of one trial, without padding; None if the data is not here."""
    memory_gib: float | None = None
    """Expected memory of a process with its trials, in GiB; None if the model is unknown."""
    earlier: str | None = None
    """Measurement of an earlier run of this shape, as a sentence; None if there is none."""
    cpus_per_process: int = Field(1, ge=1)
    """CPU cores of each process."""
    unpacked: Placement | None = None
    """Placement of the trials if they are not packed in the end."""


class Plan(Spec):
    """Everything that a sweep would do.

    A plan depends on the machine that makes it: ids, statistics of rows and memory are
    missing if model or data are not there.
    """

    job: JobSpec
    """The job."""
    command: str
    """`sweep`, `train`, `compare`, `export`, or `benchmark`."""
    trials: list[PlannedTrial]
    """Trials known in advance: all of a grid or random search, or the start-up trials of tpe."""
    later_trials: int = Field(0, ge=0)
    """Number of trials chosen while the sweep runs: those of tpe, and repeats of the best one
    with more seeds.
    """
    placement: Placement
    """Assignment of the trials to hardware."""
    batch_rows: int
    """Rows per optimizer step."""
    accumulation_steps: int
    """Forward passes per optimizer step, on each process."""
    train_rows: int | None
    """Sequences per epoch (a conversation may become several); None if the data is not on this
    machine.
    """
    data: list[str] = []
    """Statistics of the tokenized rows, one line per split; empty if the tokenizer is not on
    this machine.
    """
    rung_levels: list[int]
    """Rungs, in units of `time_attr`."""
    rung_steps: list[int]
    """Rungs, in optimizer steps."""
    worst_samples: int
    """Training rows of the sweep if no trial is stopped."""
    expected_samples: int
    """Expected training rows of the sweep under ASHA."""
    memory: MemoryEstimate | None
    """Estimate of the largest trial; None if the shape of no model is known on this machine."""
    rate: TrainingRate | None = None
    """Measured speed of the trials; None if trials of this shape have never run on the site."""
    loads: list[TrainingLoad] = []
    """Training work: one entry, or one for each arm of a comparison."""
    waste: list[str] = []
    """Messages about requested resources that the trials leave unused, each with a remedy."""
    gpu_memory_gib: float = 0.0
    """Memory of a GPU of the site, or of a trial's share of it, in GiB; 0 on CPU or if unknown."""
    checkpoint_gb: float | None = None
    """GB on disk of one checkpoint of all concurrent trials. The previous checkpoint is kept as
    well.
    """
    strategy: str
    """Strategy that `auto` was resolved to."""
    number_formats: str = ""
    """Number formats of weights and arithmetic; those of the first trial if trials differ."""
    site: str = "here"
    """Where the run would execute: this machine, a Ray cluster, or the name of a site."""
    nodes: int = 1
    """Number of nodes of the job on a cluster with a queue."""
    command_line: str = ""
    """Command that submits the run to the queue. RUN stands for the folder of the run."""
    tasks: int = 0
    """Number of array tasks, if the site runs each group of trials as a task of a job array."""
    task_placement: Placement | None = None
    """Placement of the trials of one array task, on its node; None without an array."""
    max_running_tasks: int = 0
    """Number of array tasks that run at once, as far as the site limits it; 0 without an array."""
    packing: PackingPlan | None = None
    """Packing of the trials; None for anything but a sweep."""
    share: list[int] = []
    """Trial range of an array task: number of its first trial, and one past its last."""
    placements: dict[str, Placement] = {}
    """Comparison: arm -> placement of its trials, from its own memory and number of trials."""
    judges: bool = True
    """True if the run ends with the held-out evaluation of its finalists. Runs of an arm leave
    it to the comparison.
    """
    delivery: ExportRequest | None = None
    """Requested result of an export or a benchmark."""
    files: dict[str, str] = {}
    """Files submitted to a queue: name -> text."""
    notes: list[str] = []
    """Notes for the reader: aliases, unknown sizes, missing data."""


def read_plan(path: Path) -> Plan:
    """Read the plan.json of a run.

    Raises:
        RunError: The file is damaged, or was written by another version of lorafleet.
    """
    record = files.read_json(path)
    check_version(path, record)
    # `files.write_json` adds this key to every file; the models do not have it.
    record.pop("schema_version", None)
    try:
        return Plan.from_record(record)
    except ValidationError as error:
        raise RunError(describe_unreadable_file(path, error)) from None
