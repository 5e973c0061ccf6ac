"""Build the Plan (trials, placement, memory and cost) from a job and a site.

Needs neither torch nor a network. What is missing on this machine (data, model,
tokenizer) makes the plan less exact, with a note, and is no error: a plan must be
possible before anything is downloaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafleet.cluster.planning.earlier_runs import (
    EarlierTrial,
    build_rows_key,
    find_peak,
    find_rate,
)
from lorafleet.cluster.planning.memory import (
    compute_checkpoint_bytes,
    count_trained_parameters,
    estimate,
)
from lorafleet.cluster.planning.model_shape import Shape, parse_shape
from lorafleet.cluster.planning.packing import build_packed_placement, plan_packing
from lorafleet.cluster.planning.refusals import refuse_attention, refuse_environment, uses_gpu
from lorafleet.cluster.planning.waste import describe_waste
from lorafleet.evaluation.metrics.baselines import evaluate_majority_class
from lorafleet.evaluation.report.verdict import check_rows
from lorafleet.jobs.data.hub import count_parameters, read_model_config
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.data.row_lists import AnyRows, count_labels
from lorafleet.jobs.data.rows import Rows, load_rows
from lorafleet.jobs.errors import AssetError, JobFileError, Problem
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.loading.unused_fields import collect_unused_notes
from lorafleet.jobs.runs.plan import (
    MemoryEstimate,
    PackingPlan,
    Plan,
    PlannedTrial,
    TrainingLoad,
    TrainingRate,
)
from lorafleet.jobs.schema.compatibility import WEIGHT_SHARDING_STRATEGIES, find_unsupported
from lorafleet.jobs.schema.job import JobSpec, ResourcesSpec
from lorafleet.jobs.schema.precision import describe_planned_formats
from lorafleet.jobs.schema.types import Assignment, Strategy
from lorafleet.jobs.sites.base import LocalSite, Site
from lorafleet.jobs.sites.placement import Placement, compute_placement
from lorafleet.jobs.text import format_count
from lorafleet.jobs.trials import arms
from lorafleet.jobs.trials import asha as rungs
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.defaults import resolve_learning_rate
from lorafleet.jobs.trials.packing import find_packing_refusal
from lorafleet.jobs.trials.schedule import Schedule, build_schedule
from lorafleet.jobs.trials.trial_id import (
    METHOD_BLOCKS,
    Provenance,
    compute_provenance,
    compute_trial_id,
)

if TYPE_CHECKING:
    from lorafleet.evaluation.tokens import TokenData

_ASSUMED_ROWS = 1000
_MAX_CLASSES = 10
"""Maximum number of classes whose rows a plan lists."""
_MEAN_CHARACTERS_PER_TOKEN = 4.5
"""Characters of an English token on average."""
_CHARACTERS_PER_TOKEN = 3.0
_HOST_GIB_PER_GPU_PROCESS = 3.0
_BYTES_PER_LOADED_WEIGHT = 2


@dataclass(frozen=True)
class _JobInputs:
    """The data and models of a job that are on this machine."""

    rows: Rows | None
    facts: Provenance | None
    model: tuple[Shape, int] | None
    """The model that all trials share, and its number of weights: counted in the files if they are
    here, else derived from the shape.
    """
    longest: int
    """Tokens of the longest row; the maximum possible if the rows are not here."""
    mean_tokens: float | None
    """Tokens of a training row on average; None if the rows are not here."""
    train_examples: int | None
    """Sequences that one epoch trains on: the training rows, or more if a row becomes several
    examples.
    """
    data: tuple[str, ...]
    """One line about the rows of each split; empty if they cannot be described here."""
    notes: tuple[str, ...]

    @property
    def labels(self) -> int:
        """Return the number of classes; 2, the minimum, if the rows are not here."""
        return len(self.rows.labels) if self.rows else 2


def make_plan(
    loaded: LoadedJob,
    site: Site,
    command: str,
    allowed: Collection[str] = (),
    earlier: Sequence[EarlierTrial] = (),
    lone_reason: str | None = None,
) -> Plan:
    """Return the plan of what a command would do.

    Args:
        command: One of `sweep`, `train`, `compare`, `export` and `benchmark`.
        allowed: The variables that the site lets a job set although they change which code
            runs.
        earlier: What trials of this base model measured on this site.
        lone_reason: Why each trial has a process of its own here; None if trials may be packed.

    Raises:
        UserError: The job could not start.
    """
    refuse_environment(loaded, allowed)
    if command in ("export", "benchmark"):
        return _plan_delivery(loaded, site, command)
    unused_section = (
        "search" if command == "compare" else "compare"
    )  # a section that the command does not use must not affect the plan
    loaded = dataclasses.replace(loaded, job=loaded.job.model_copy(update={unused_section: None}))
    if command == "compare":
        return _plan_arms(loaded, site, earlier)
    return _build_plan(loaded, site, command, earlier, lone_reason=lone_reason)


def _plan_delivery(loaded: LoadedJob, site: Site, command: str) -> Plan:
    """Return the plan of a job without trials, derived from that of a single training.

    Export and benchmark need the same placement and memory, and train nothing.
    """
    job = loaded.job.model_copy(update={"search": None, "compare": None})
    no_trials = {
        "trials": [],
        "worst_samples": 0,
        "expected_samples": 0,
        "rung_levels": [],
        "rung_steps": [],
    }
    return _build_plan(dataclasses.replace(loaded, job=job), site, "train").model_copy(
        update={"command": command} | no_trials
    )


def _plan_arms(loaded: LoadedJob, site: Site, earlier: Sequence[EarlierTrial]) -> Plan:
    """Return the plan of a comparison.

    The arms' searches run one after another; then each arm's best configuration is trained
    with further seeds.
    """
    job = loaded.job
    if job.resources.gpus_per_trial < 1:
        sentence = (
            f"resources.gpus_per_trial is {job.resources.gpus_per_trial:g}, but must be 1 in a "
            "comparison: trials that share a GPU would change each other's times"
        )
        raise JobFileError(str(loaded.path), [Problem("resources.gpus_per_trial", sentence)])
    samples, note = _resolve_samples(job)
    plans = {}
    for name in arms.list_trained_arms(job):
        loaded_arm = dataclasses.replace(
            loaded, job=arms.build_search_job(job, name, samples), notes=()
        )
        # Times and memory of the arms are compared, so each trial is trained alone.
        plans[name] = _build_plan(loaded_arm, site, "sweep", earlier, packs=False)
    training_plan = _build_plan(
        dataclasses.replace(loaded, job=job.model_copy(update={"compare": None})), site, "train"
    )
    if not plans:
        return training_plan.model_copy(
            update={"job": job, "command": "compare", "trials": [], "worst_samples": 0}
        )
    # The arm that needs most memory decides whether the comparison fits.
    largest = max(plans.values(), key=lambda plan: plan.memory.required if plan.memory else 0.0)
    notes = [*loaded.notes, *(note for plan in plans.values() for note in plan.notes), *note]
    return largest.model_copy(
        update={
            "job": job,
            "command": "compare",
            "trials": [
                trial.model_copy(update={"arm": name})
                for name, plan in plans.items()
                for trial in plan.trials
            ],
            "later_trials": sum(plan.later_trials for plan in plans.values()),
            "placement": max(
                (plan.placement for plan in plans.values()), key=lambda placement: placement.slots
            ),
            "placements": {name: plan.placement for name, plan in plans.items()},
            "worst_samples": sum(plan.worst_samples for plan in plans.values()),
            "expected_samples": sum(plan.expected_samples for plan in plans.values()),
            "rung_levels": [],
            "rung_steps": [],
            "rate": _combine_rates(list(plans.values())),
            "loads": [
                load.model_copy(update={"arm": name})
                for name, plan in plans.items()
                for load in plan.loads
            ],
            "notes": list(dict.fromkeys(notes)),
        }
    )


def _combine_rates(plans: list[Plan]) -> TrainingRate | None:
    """Return the mean rate of the arms, weighted with their rows; None if one is not known."""
    rates = [plan.rate for plan in plans if plan.rate is not None]
    if len(rates) < len(plans):
        return None
    return average_rates(rates, [plan.worst_samples for plan in plans])


def average_rates(rates: Sequence[TrainingRate], rows: Sequence[int]) -> TrainingRate:
    """Return the mean of rates, each weighted with the rows that are trained at it."""
    weights = [max(1, count) for count in rows]
    seconds = sum(
        rate.seconds_per_row * weight for rate, weight in zip(rates, weights, strict=True)
    )
    return TrainingRate(
        seconds_per_row=seconds / sum(weights),
        source="; ".join(dict.fromkeys(rate.source for rate in rates)),
    )


def _resolve_samples(job: JobSpec) -> tuple[int | None, list[str]]:
    """Return (rows that one training sees, notes about that number).

    None instead of a number means that the job's `train` section decides.
    """
    budget = job.comparison.budget
    if budget.device_seconds is not None:
        return None, [
            f"compare.budget.device_seconds is {budget.device_seconds:g}: each arm's speed is "
            "measured before training, so the rows and steps shown here are those of `train`"
        ]
    if budget.tokens is None:
        return budget.samples, []
    try:
        rows = load_rows(job).train
    except AssetError:
        return None, []
    tokens_per_row = sum(_count_characters(row) for row in rows) / len(rows) / _CHARACTERS_PER_TOKEN
    samples = max(1, round(budget.tokens / tokens_per_row))
    return samples, [
        f"compare.budget.tokens is {budget.tokens:,}: about {samples:,} rows (the exact number is "
        "counted when the run starts)"
    ]


def _build_plan(
    loaded: LoadedJob,
    site: Site,
    command: str,
    earlier: Sequence[EarlierTrial] = (),
    *,
    packs: bool = True,
    lone_reason: str | None = None,
) -> Plan:
    is_search = command == "sweep" and loaded.job.search is not None
    job = loaded.job if is_search else loaded.job.model_copy(update={"search": None})
    refuse_attention(job, site, str(loaded.path))
    inputs = _load_inputs(job)
    notes = [*loaded.notes, *collect_unused_notes(loaded, command), *inputs.notes]
    rate = resolve_learning_rate(job)
    if job.train.learning_rate is None and "train.learning_rate" not in (
        job.search.parameters if job.search else {}
    ):
        notes.append(f"train.learning_rate is {rate.value:g} by default ({rate.rule})")
    configurations = _list_configurations(job, inputs)
    if (
        job.search
        and job.search.method == "random"
        and len(configurations) < job.search.num_samples
    ):
        available = format_count(len(configurations), "different configuration")
        notes.append(
            f"search.num_samples is {job.search.num_samples}, but its parameters allow only "
            f"{available}"
        )
    train_rows = inputs.train_examples
    trials = [search.build_trial_job(job, assignment) for assignment in configurations]
    schedules = [
        build_schedule(trial, train_rows or _ASSUMED_ROWS, searching=is_search) for trial in trials
    ]
    notes += _find_long_warmup(trials, schedules)
    if (
        job.train.packing
        and inputs.train_examples is not None
        and inputs.train_examples < schedules[0].batch_rows
    ):
        notes.append(
            f"train.packing packs an epoch into {format_count(inputs.train_examples, 'row')}, but "
            f"a step has {schedules[0].batch_rows}: each step sees the data several times. Reduce "
            "train.per_device_train_batch_size"
        )
    total = _count_trials(job, len(configurations))
    final_trainings = len(search.list_final_assignments(job, {})) if job.search else 0
    cuda = uses_gpu(job, site)
    # First without sharding (`auto`): the strategy follows from the estimate, and the estimate then
    # from the strategy.
    estimates = _estimate_all(trials, schedules, inputs, earlier, cuda=cuda)
    strategy, reason = choose_strategy(trials, site, _find_largest(estimates), cuda=cuda)
    if strategy != job.resources.strategy:
        trials = [_set_strategy(trial, strategy) for trial in trials]
        estimates = _estimate_all(trials, schedules, inputs, earlier, cuda=cuda)
    memory = _find_largest(estimates)
    # The largest trial decides, because trials of all sizes share the same slots.
    placement = compute_placement(
        job, site, total, _estimate_host_gib(job, memory, inputs, cuda=cuda), strategy
    )
    worst, expected = _estimate_cost(job, schedules, total)
    # Trainings of the best configuration are never stopped early, so they count in full in both.
    worst, expected = (
        rows + final_trainings * max(plan.total_samples for plan in schedules)
        for rows in (worst, expected)
    )
    notes += _find_too_large(estimates, site, job.resources, cuda=cuda)
    speed = find_rate(
        earlier,
        trials,
        _get_rows_key(job, inputs),
        cuda=cuda,
        cpus_per_worker=placement.cpus_per_worker,
        trials_per_gpu=placement.trials_per_gpu,
    )
    packing = None
    if is_search and packs and lone_reason is not None:
        packing = PackingPlan(reason=lone_reason)
    elif is_search and packs:
        packing = plan_packing(
            job,
            trials,
            total,
            site,
            placement,
            memory,
            _count_batch_tokens(job, inputs),
            earlier,
        )
    is_packed = packing is not None and packing.trials > 1
    final = build_packed_placement(packing, total) if packing and is_packed else placement
    return Plan(
        job=job,
        command="sweep" if is_search else "train",
        trials=[
            _build_planned_trial(*trial_parts, inputs, is_packed=is_packed)
            for trial_parts in zip(trials, configurations, schedules, estimates, strict=True)
        ],
        packing=packing,
        later_trials=total - len(configurations) + final_trainings,
        placement=final,
        batch_rows=schedules[0].batch_rows,
        accumulation_steps=job.train.compute_accumulation_steps(job.resources.world_size),
        train_rows=train_rows,
        data=list(inputs.data),
        rung_levels=list(schedules[0].rung_levels),
        rung_steps=list(schedules[0].rung_steps),
        worst_samples=worst,
        expected_samples=expected,
        memory=memory,
        rate=speed,
        loads=[
            TrainingLoad(
                slots=placement.slots,
                workers=placement.workers,
                waves=placement.waves,
                longest_rows=max(schedule.total_samples for schedule in schedules),
                expected_rows=expected,
                worst_rows=worst,
            )
        ],
        waste=describe_waste(
            job, site, placement, total, memory, is_packed=is_packed, can_share=packs
        ),
        gpu_memory_gib=site.gpu_memory_gib / job.resources.trials_per_gpu if cuda else 0.0,
        checkpoint_gb=_estimate_checkpoint_gb(trials, inputs, final.slots * final.pack, cuda=cuda),
        strategy=_describe_strategy(final, reason, is_local=isinstance(site, LocalSite)),
        number_formats=describe_planned_formats(trials[0] if trials else job, cuda=cuda),
        notes=notes,
    )


def _find_long_warmup(trials: list[JobSpec], schedules: list[Schedule]) -> list[str]:
    """Return a note if a trial ends before its learning rate has reached its peak.

    Returns:
        At most one note, in a list.
    """
    for trial, plan in zip(trials, schedules, strict=True):
        steps = trial.train.warmup_steps
        if (
            steps is not None
            and steps >= plan.total_steps
            and trial.train.lr_scheduler_type != "constant"
        ):
            return [
                f"train.warmup_steps is {steps:,}, but a trial has only "
                f"{format_count(plan.total_steps, 'step')}: the learning rate does not reach its "
                "peak"
            ]
    return []


def _load_inputs(job: JobSpec) -> _JobInputs:
    notes: list[str] = []
    rows = facts = None
    try:
        rows = load_rows(job)
        notes += [*rows.warnings, *_check_decision(job, rows)]
    except AssetError as error:
        notes.append(f"{error}; the plan assumes {_ASSUMED_ROWS:,} rows")
    try:
        # The digests need the data files and the model's revision; trial ids need the digests.
        facts = compute_provenance(job) if rows else None
    except AssetError as error:
        notes.append(f"{error}; trial ids are not known yet")
    tokens = _load_tokens(job, notes) if rows and facts and job.is_generative else None
    if rows and tokens:
        longest, examples = tokens.longest, tokens.count_training_rows(job)
        # Packed rows are filled up to the maximum.
        longest = job.model.max_length if job.train.packing else longest
        notes = [*tokens.warnings, *(note for note in notes if note not in tokens.warnings)]
        return _JobInputs(
            rows,
            facts,
            _load_model_shape(job),
            longest,
            float(tokens.splits["train"].lengths.mean()),
            examples,
            tuple(describe_tokens(tokens)),
            tuple(notes),
        )
    longest = _guess_longest_tokens(rows) if rows else job.model.max_length
    lines = tuple(_describe_classes(job, rows)) if rows and rows.labels else ()
    return _JobInputs(
        rows,
        facts,
        _load_model_shape(job),
        longest,
        _guess_mean_tokens(rows, job.model.max_length) if rows else None,
        len(rows.train) if rows else None,
        lines,
        tuple(notes),
    )


def _check_decision(job: JobSpec, rows: Rows) -> list[str]:
    """Return cautions about the rows that decide the search or comparison."""
    split = _get_deciding_split(job, rows)
    counts = _count_classes(rows) if rows.labels else {}
    return check_rows(counts, split, len(_get_splits(rows)[split]))


def _get_deciding_split(job: JobSpec, rows: Rows) -> str:
    """Return the split that decides: validation for a search, the held-out rows for a
    comparison.
    """
    return "validation" if job.compare is None or rows.chosen_on_test else "test"


def _get_splits(rows: Rows) -> dict[str, AnyRows]:
    return {"train": rows.train, "validation": rows.validation, "test": rows.test}


def _count_classes(rows: Rows) -> dict[str, dict[str, int]]:
    """Return split -> class -> number of rows."""
    counts = {}
    for name, split in _get_splits(rows).items():
        counts[name] = dict.fromkeys(rows.labels, 0) | count_labels(split)
    return counts


def _describe_classes(job: JobSpec, rows: Rows) -> list[str]:
    """Describe how many rows each class has in each split, and the majority-class baseline."""
    lines, counts = [], _count_classes(rows)
    for name, split_counts in counts.items():
        shown_labels = [f"{label} {split_counts[label]:,}" for label in rows.labels[:_MAX_CLASSES]]
        ellipsis = ", ..." if len(rows.labels) > _MAX_CLASSES else ""
        lines.append(
            f"{name}: {format_count(sum(split_counts.values()), 'row')} "
            f"({', '.join(shown_labels)}{ellipsis})"
        )
    split, metric = _get_deciding_split(job, rows), job.metric.name
    label, metrics = evaluate_majority_class(counts["train"], counts[split])
    if metric in metrics:
        lines.append(
            f"baseline: always predicting {label!r} gives {metric} {metrics[metric]:.3f} ({split})"
        )
    return lines


def _load_tokens(job: JobSpec, notes: list[str]) -> TokenData | None:
    """Return the rows as tokens, computed here or loaded from the cache.

    Returns None, and adds a note, if the tokenizer is not here. Only the chat template tells
    how many examples a conversation becomes, and which conversations it cannot render.
    """
    from lorafleet.evaluation.tokens import prepare

    try:
        return prepare(job)
    except AssetError as error:
        notes.append(f"{error}; tokenization was not checked")
        return None


def describe_tokens(tokens: TokenData) -> list[str]:
    """Return one line per split about its rows as tokens.

    Splits without rows are left out.
    """
    lines = []
    for name, split in tokens.splits.items():
        if not len(split):
            continue
        examples = f" in {len(split):,} examples" if len(split) != split.rows else ""
        lengths = sorted(int(length) for length in split.lengths)
        learnt_tokens = int(split.target_counts.sum())
        lines.append(
            f"{name}: {format_count(split.rows, 'row')}{examples}, {int(split.starts[-1]):,} "
            f"tokens ({learnt_tokens:,} learnt), per row: {lengths[len(lengths) // 2]} (median), "
            f"{lengths[-1]} (longest)"
        )
    return lines


def _load_model_shape(job: JobSpec) -> tuple[Shape, int] | None:
    name, revision = job.model.model_name_or_path, job.model.revision
    config = read_model_config(name, revision)
    model_shape = parse_shape(config) if config else None
    return (
        (model_shape, count_parameters(name, revision) or model_shape.parameters)
        if model_shape
        else None
    )


def _list_configurations(job: JobSpec, inputs: _JobInputs) -> list[Assignment]:
    """Return the distinct configurations that are known before the search starts.

    Of TPE these are the start-up trials.

    Raises:
        JobFileError: The search contains a combination that the schema refuses.
    """

    def get_key(assignment: Assignment) -> str:
        problem = search.describe_impossible(job, assignment) if job.search else None
        if problem:
            raise JobFileError("search.parameters", [Problem("search.parameters", problem)])
        resolved = search.build_trial_job(job, assignment)
        return (
            compute_trial_id(resolved, inputs.facts)
            if inputs.facts
            else _build_training_key(resolved)
        )

    return search.list_planned_assignments(job, get_key)


def _build_training_key(job: JobSpec) -> str:
    """Return a key that identifies a configuration when files for its id are missing.

    It covers everything but the blocks of other methods.
    """
    # Two trials that differ only in the fields of a method that they do not use are the same trial.
    unused_blocks = set().union(*METHOD_BLOCKS.values()) - set(METHOD_BLOCKS[job.method])
    return job.model_dump_json(exclude={"search", *unused_blocks})


def _count_trials(job: JobSpec, known_count: int) -> int:
    uses_tpe = job.search is not None and job.search.method == "tpe"
    return max(known_count, job.search.num_samples) if uses_tpe and job.search else known_count


def _estimate_cost(job: JobSpec, schedules: list[Schedule], total: int) -> tuple[int, int]:
    """Return (training rows if no trial is stopped early, training rows expected under ASHA).

    Args:
        schedules: One for each known configuration.
        total: Number of trials, including those that TPE proposes later.
    """
    mean = sum(plan.total_samples for plan in schedules) / len(schedules)
    worst = round(mean * total)
    if job.search is None or job.search.scheduler.type == "none":
        return worst, worst
    first = schedules[0]
    levels = [step * first.batch_rows for step in first.rung_steps]
    eta = job.search.scheduler.reduction_factor
    if job.search.scheduler.mode != "stop":
        return worst, min(worst, rungs.estimate_promoted_time(total, levels, eta))
    return worst, min(worst, round(rungs.estimate_time(total, levels, eta)))


def _build_planned_trial(
    resolved: JobSpec,
    assignment: Assignment,
    plan: Schedule,
    memory: MemoryEstimate | None,
    inputs: _JobInputs,
    *,
    is_packed: bool,
) -> PlannedTrial:
    fields = resolved.model_dump(
        mode="json", include={"method", "model", "train", *METHOD_BLOCKS[resolved.method]}
    )
    fields["train"]["learning_rate"] = resolve_learning_rate(resolved).value
    return PlannedTrial(
        trial_id=compute_trial_id(resolved, inputs.facts) if inputs.facts else None,
        assignment=assignment,
        resolved=fields,
        steps=plan.total_steps,
        memory=memory,
        alone=find_packing_refusal(resolved) if is_packed else None,
    )


def _get_rows_key(job: JobSpec, inputs: _JobInputs) -> str:
    digests = inputs.facts.data_sha256 if inputs.facts else None
    return build_rows_key(job.model_dump(mode="json"), digests)


def _estimate_all(
    trials: list[JobSpec],
    schedules: list[Schedule],
    inputs: _JobInputs,
    earlier: Sequence[EarlierTrial],
    *,
    cuda: bool,
) -> list[MemoryEstimate | None]:
    """Return the memory estimate of each trial; None if the model's shape is unknown.

    The weights need not be on this machine.
    """
    if inputs.model is None:
        return [None] * len(trials)
    rows_key = _get_rows_key(trials[0], inputs) if trials else ""
    estimates: list[MemoryEstimate | None] = []
    for trial, schedule in zip(trials, schedules, strict=True):
        estimated = estimate(trial, *inputs.model, inputs.longest, cuda=cuda, labels=inputs.labels)
        samples = min(inputs.train_examples or schedule.total_samples, schedule.total_samples)
        measured = find_peak(earlier, trial, rows_key, samples, cuda=cuda)
        estimates.append(estimated.model_copy(update={"measured": measured}))
    return estimates


def _find_largest(estimates: list[MemoryEstimate | None]) -> MemoryEstimate | None:
    return max(
        (memory for memory in estimates if memory), key=lambda memory: memory.required, default=None
    )


def _find_too_large(
    estimates: list[MemoryEstimate | None], site: Site, resources: ResourcesSpec, *, cuda: bool
) -> list[str]:
    """Return a message if trials are not expected to fit a GPU, or their share of one."""
    gpu_memory_gib = site.gpu_memory_gib / resources.trials_per_gpu
    if cuda and not gpu_memory_gib:
        return ["the memory of the GPUs is unknown, so the plan does not check whether trials fit"]
    too_large = [
        memory.required
        for memory in estimates
        if memory and cuda and gpu_memory_gib and memory.required > gpu_memory_gib
    ]
    if not too_large:
        return []
    available, remedy = f"a GPU has {gpu_memory_gib:.1f}", ""
    if resources.trials_per_gpu > 1:
        available = f"its share of a GPU is {gpu_memory_gib:.1f}"
        remedy = f"raise resources.gpus_per_trial from {resources.gpus_per_trial:g}, or "
    return [
        f"{len(too_large)} of {len(estimates)} trials are expected to need up to "
        f"{max(too_large):.1f} GiB, but {available}: {remedy}use a smaller "
        "train.per_device_train_batch_size (with more accumulation), train.gradient_checkpointing, "
        "method: qlora, or strategy: fsdp"
    ]


def _estimate_checkpoint_gb(
    trials: list[JobSpec], inputs: _JobInputs, slots: int, *, cuda: bool
) -> float | None:
    """Return the GB on disk of the largest checkpoint, for as many trials as run in parallel."""
    if inputs.model is None:
        return None
    model_shape, parameters = inputs.model

    def compute_size(resolved: JobSpec) -> int:
        is_full = resolved.method == "full"
        trained = (
            parameters
            if is_full
            else count_trained_parameters(resolved, model_shape, inputs.labels)
        )
        return compute_checkpoint_bytes(resolved, trained, cuda=cuda)

    return slots * max(map(compute_size, trials)) / 1e9


def _set_strategy(resolved: JobSpec, strategy: Strategy) -> JobSpec:
    return resolved.model_copy(
        update={"resources": resolved.resources.model_copy(update={"strategy": strategy})}
    )


def _guess_longest_tokens(rows: Rows) -> int:
    """Return the tokens of the longest row, guessed from its characters without the tokenizer.

    Three characters for each token is a low guess for English, so that the memory estimate
    is rather too high.
    """

    return 8 + round(max(_count_characters(row) for row in rows.train) / _CHARACTERS_PER_TOKEN)


def _guess_mean_tokens(rows: Rows, longest: int) -> float:
    """Return the tokens of a training row on average, guessed from its characters."""
    total = sum(
        min(longest, _count_characters(row) / _MEAN_CHARACTERS_PER_TOKEN) for row in rows.train
    )
    return total / max(1, len(rows.train))


def _count_batch_tokens(job: JobSpec, inputs: _JobInputs) -> int | None:
    """Return the tokens of a micro-batch, without padding; None if the rows are not here."""
    if inputs.mean_tokens is None:
        return None
    return round(job.train.per_device_train_batch_size * inputs.mean_tokens)


def _count_characters(row: Row) -> int:
    return len(row.text) + sum(len(message.content) for message in row.messages)


def _estimate_host_gib(
    job: JobSpec, memory: MemoryEstimate | None, inputs: _JobInputs, *, cuda: bool
) -> float:
    """Return the host memory of one trial, in GiB.

    It limits how many trials run in parallel on one machine.
    """
    processes = job.resources.world_size
    if cuda:  # each process loads the weights into host memory before it copies them to its GPU
        weights = inputs.model[1] * _BYTES_PER_LOADED_WEIGHT / 2**30 if inputs.model else 0.0
        return (_HOST_GIB_PER_GPU_PROCESS + weights) * processes
    return (memory.required if memory else 1.0) * processes


def choose_strategy(
    trials: list[JobSpec], site: Site, memory: MemoryEstimate | None, *, cuda: bool
) -> tuple[Strategy, str]:
    """Return the strategy that `auto` selects for these trials, and the reason.

    Full copies exchange only an adapter's gradients; sharded weights are gathered in every
    layer of every pass (fsdp_qlora reports DDP 1.55 times as fast for a 7B LoRA on two
    3090s). So weights are sharded only if they do not fit.

    Args:
        memory: The estimate of the largest trial.
    """
    resources = trials[0].resources
    if resources.strategy != "auto":
        return resources.strategy, "as set in the job file"
    # Nothing is known about the fit, or there is nothing to distribute.
    if not cuda or memory is None or not site.gpu_memory_gib or resources.world_size == 1:
        return "ddp", "auto: full copies exchange the least data between processes"
    gpu_memory_gib, required = site.gpu_memory_gib, f"about {memory.required:.1f} GiB per process"
    if memory.required <= gpu_memory_gib:
        return "ddp", f"auto: {required} fit a GPU of {gpu_memory_gib:.1f}"
    for strategy in WEIGHT_SHARDING_STRATEGIES:
        # One strategy for the whole search, so all of its methods must support it.
        if not any(find_unsupported(_set_strategy(trial, strategy)) for trial in trials):
            return (
                strategy,
                f"auto: {required} do not fit a GPU of {gpu_memory_gib:.1f}, so weights are "
                "sharded",
            )
    return (
        "ddp",
        f"auto: {required} do not fit a GPU of {gpu_memory_gib:.1f}, but this job's weights cannot "
        "be sharded",
    )


def _describe_strategy(placement: Placement, reason: str, *, is_local: bool) -> str:
    if placement.pack > 1 and is_local and placement.fits_one_process:
        return "one process, the run's own, trains several trials at once, without Ray"
    if placement.pack > 1:
        processes = format_count(placement.slots, "process")
        return f"{processes} of Ray, each trains several trials at once on a base of its own"
    if is_local and placement.fits_one_process:
        return "one process, the run's own, trains one trial after another, without Ray"
    if not placement.is_distributed:
        return "one process per trial, in warm actors that keep the base model loaded"
    machines = f" over {placement.num_nodes} machines" if placement.num_nodes > 1 else ""
    group = (
        f"{placement.workers} processes per trial{machines}, each trial in a Ray Train worker group"
    )
    return f"{placement.strategy}: {group} ({reason})"
