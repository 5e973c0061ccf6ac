"""Assembles the Plan: trials, placement, memory and cost, from a job and a site. Needs neither torch nor a network."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafleet.cluster.planning.memory import checkpoint_bytes, estimate, trained_parameters
from lorafleet.cluster.planning.model_shape import Shape, shape
from lorafleet.evaluation.report.baselines import majority_class
from lorafleet.evaluation.report.verdict import check_rows
from lorafleet.jobs.data.hub import model_config, parameter_count
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.data.row_lists import AnyRows, label_counts
from lorafleet.jobs.data.rows import Rows, load_rows
from lorafleet.jobs.errors import AssetError, JobFileError, Problem
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.loading.unused_fields import unused_notes
from lorafleet.jobs.runs.plan import MemoryEstimate, Plan, PlannedTrial
from lorafleet.jobs.schema.compatibility import CUT_WEIGHTS, Strategy, refusals
from lorafleet.jobs.schema.environment import changes_code
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.precision import attention_refusal, planned_formats
from lorafleet.jobs.sites.base import LocalSite, Site
from lorafleet.jobs.sites.placement import Placement, place
from lorafleet.jobs.text import counted
from lorafleet.jobs.trials import arms
from lorafleet.jobs.trials import asha as rungs
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.defaults import learning_rate
from lorafleet.jobs.trials.sampling import Assignment
from lorafleet.jobs.trials.schedule import Schedule, schedule
from lorafleet.jobs.trials.trial_id import METHOD_BLOCKS, Facts, facts_of, trial_id

if TYPE_CHECKING:
    from lorafleet.evaluation.tokens import TokenData

_ASSUMED_ROWS = 1000
_MAX_CLASSES = 10
"""Classes whose rows a plan counts."""
_CHARACTERS_A_TOKEN = 3.0
_HOST_GIB_OF_A_GPU_TRIAL = 3.0
_BYTES_OF_A_READ_WEIGHT = 2


@dataclass(frozen=True)
class _Known:
    """What is on this machine about a job's data and models."""

    rows: Rows | None
    facts: Facts | None
    model: tuple[Shape, int] | None
    """The model that all trials share, and its weights: counted in the files where they are, else from the shape."""
    longest: int
    """Tokens of the longest row; where the rows are not here, the most that there can be."""
    train_examples: int | None
    """Sequences that one epoch trains on: the training rows, or more where a row becomes several examples."""
    data: tuple[str, ...]
    """What the rows are as tokens, a line each; empty where the tokenizer is not here."""
    notes: tuple[str, ...]

    @property
    def labels(self) -> int:
        """Classes; where the rows are not here, the fewest that there can be."""
        return len(self.rows.labels) if self.rows else 2


def make_plan(loaded: LoadedJob, site: Site, command: str, allowed: Collection[str] = ()) -> Plan:
    """Everything that `sweep`, `train`, `compare`, `export` or `benchmark` would do.

    `allowed` are the variables which the site lets a job set though they change what code runs. Raises a UserError
    where it could not begin.
    """
    refuse_environment(loaded, allowed)
    if command in ("export", "benchmark"):
        return _plan_of_delivery(loaded, site, command)
    other = "search" if command == "compare" else "compare"  # what a command does not look at decides nothing
    loaded = dataclasses.replace(loaded, job=loaded.job.model_copy(update={other: None}))
    return _plan_of_arms(loaded, site) if command == "compare" else _plan(loaded, site, command)


def _plan_of_delivery(loaded: LoadedJob, site: Site, command: str) -> Plan:
    """A job without trials, in the place of one."""
    job = loaded.job.model_copy(update={"search": None, "compare": None})
    nothing = {"trials": [], "worst_samples": 0, "expected_samples": 0, "rung_levels": [], "rung_steps": []}
    return _plan(dataclasses.replace(loaded, job=job), site, "train").model_copy(update={"command": command} | nothing)


def _plan_of_arms(loaded: LoadedJob, site: Site) -> Plan:
    """The searches of all arms, one after another, then the trainings of each arm's best with further seeds."""
    job = loaded.job
    assert job.compare is not None
    samples, note = _samples(job)
    plans = {}
    for name in arms.trained(job):
        one = dataclasses.replace(loaded, job=arms.search_job(job, name, samples), notes=())
        plans[name] = _plan(one, site, "sweep")
    whole = _plan(dataclasses.replace(loaded, job=job.model_copy(update={"compare": None})), site, "train")
    if not plans:
        return whole.model_copy(update={"job": job, "command": "compare", "trials": [], "worst_samples": 0})
    largest = max(plans.values(), key=lambda plan: plan.memory.expected if plan.memory else 0.0)
    notes = [*loaded.notes, *(note for plan in plans.values() for note in plan.notes), *note]
    return largest.model_copy(
        update={
            "job": job,
            "command": "compare",
            "trials": [trial.model_copy(update={"arm": name}) for name, plan in plans.items() for trial in plan.trials],
            "later_trials": sum(plan.later_trials for plan in plans.values()),
            "placement": max((plan.placement for plan in plans.values()), key=lambda place: place.slots),
            "placements": {name: plan.placement for name, plan in plans.items()},
            "worst_samples": sum(plan.worst_samples for plan in plans.values()),
            "expected_samples": sum(plan.expected_samples for plan in plans.values()),
            "rung_levels": [],
            "rung_steps": [],
            "notes": list(dict.fromkeys(notes)),
        }
    )


def _samples(job: JobSpec) -> tuple[int | None, list[str]]:
    """(rows that one training sees, what is to be said of that); None: what `train` says."""
    assert job.compare is not None
    budget = job.compare.budget
    if budget.device_seconds is not None:
        return None, [
            f"compare.budget.device_seconds is {budget.device_seconds:g}: each arm's speed is measured first, and the "
            "rows and steps shown here are those of `train`"
        ]
    if budget.tokens is None:
        return budget.samples, []
    try:
        rows = load_rows(job).train
    except AssetError:
        return None, []
    each = sum(_characters(row) for row in rows) / len(rows) / _CHARACTERS_A_TOKEN
    samples = max(1, round(budget.tokens / each))
    return samples, [f"compare.budget.tokens is {budget.tokens:,}: about {samples:,} rows, counted when it begins"]


def _plan(loaded: LoadedJob, site: Site, command: str) -> Plan:
    searching = command == "sweep" and loaded.job.search is not None
    job = loaded.job if searching else loaded.job.model_copy(update={"search": None})
    refuse_attention(job, site, str(loaded.path))
    known = _known(job)
    notes = [*loaded.notes, *unused_notes(loaded, command), *known.notes]
    rate = learning_rate(job)
    if job.train.learning_rate is None and "train.learning_rate" not in (job.search.parameters if job.search else {}):
        notes.append(f"train.learning_rate is {rate.value:g} by default ({rate.rule})")
    configurations = _configurations(job, known)
    if job.search and job.search.method == "random" and len(configurations) < job.search.num_samples:
        there_are = counted(len(configurations), "different configuration")
        notes.append(f"search.num_samples is {job.search.num_samples}, but its parameters make only {there_are}")
    train_rows = known.train_examples
    trials = [search.trial(job, assignment) for assignment in configurations]
    schedules = [schedule(trial, train_rows or _ASSUMED_ROWS, searching=searching) for trial in trials]
    notes += _long_warmup(trials, schedules)
    if job.train.packing and known.train_examples is not None and known.train_examples < schedules[0].batch_rows:
        notes.append(
            f"train.packing makes {counted(known.train_examples, 'row')} of an epoch, and a step has "
            f"{schedules[0].batch_rows}: each step sees the data several times (train.per_device_train_batch_size)"
        )
    total = _total(job, len(configurations))
    again = len(search.after_search(job, {})) if job.search else 0
    cuda = uses_gpu(job, site)
    each = [_memory(trial, known, cuda=cuda) for trial in trials]
    strategy, why = choose_strategy(trials, site, _largest(each), cuda=cuda)
    if strategy != job.resources.strategy:
        trials = [_with_strategy(trial, strategy) for trial in trials]
        each = [_memory(trial, known, cuda=cuda) for trial in trials]
    memory = _largest(each)
    placement = place(job, site, total, _host_gib(job, memory, known, cuda=cuda), strategy)
    worst, expected = _cost(job, schedules, total)
    worst, expected = (rows + again * max(plan.total_samples for plan in schedules) for rows in (worst, expected))
    notes += _too_large(each, site, cuda=cuda)
    return Plan(
        job=job,
        command="sweep" if searching else "train",
        trials=[_planned(*one, known) for one in zip(trials, configurations, schedules, each, strict=True)],
        later_trials=total - len(configurations) + again,
        placement=placement,
        batch_rows=schedules[0].batch_rows,
        accumulation_steps=job.train.accumulation_steps(job.resources.world_size),
        train_rows=train_rows,
        data=list(known.data),
        rung_levels=list(schedules[0].rung_levels),
        rung_steps=list(schedules[0].rung_steps),
        worst_samples=worst,
        expected_samples=expected,
        memory=memory,
        gpu_memory_gib=site.gpu_memory_gib if cuda else 0.0,
        checkpoint_gb=_checkpoint_gb(trials, known, placement.slots, cuda=cuda),
        strategy=_strategy(placement, why),
        number_formats=planned_formats(trials[0] if trials else job, cuda=cuda),
        notes=notes,
    )


def _long_warmup(trials: list[JobSpec], schedules: list[Schedule]) -> list[str]:
    """Say when a trial ends before its learning rate has risen to its peak."""
    for trial, plan in zip(trials, schedules, strict=True):
        steps = trial.train.warmup_steps
        if steps is not None and steps >= plan.total_steps and trial.train.lr_scheduler_type != "constant":
            return [
                f"train.warmup_steps is {steps:,}, and a trial has {counted(plan.total_steps, 'step')}: the learning "
                "rate does not reach its peak"
            ]
    return []


def refuse_environment(loaded: LoadedJob, allowed: Collection[str]) -> None:
    """Raise JobFileError for variables of a job that change which code runs, unless the site allows them by name.

    A job file is data, which people take from each other: what it runs must be seen in it.
    """
    problems = [
        Problem(
            f"environment.{name}",
            f"environment.{name} changes which code runs, and a job file must not: export it in your shell, or let "
            "the site file say so (environment, or allow_environment)",
        )
        for name in loaded.job.environment
        if changes_code(name) and name not in allowed
    ]
    if problems:
        raise JobFileError(str(loaded.path), [loaded.located(problem) for problem in problems])


def refuse_attention(job: JobSpec, site: Site, path: str) -> None:
    """Raise JobFileError for an attention that cannot be used on a site.

    Which packages are installed is known of this machine alone.
    """
    here = isinstance(site, LocalSite)
    has_flash = not here or importlib.util.find_spec("flash_attn") is not None
    field = "model.attn_implementation"
    searched = job.search.parameters.get(field) if job.search else None
    values = list((searched.values if searched else None) or [job.model.attn_implementation])
    values += [arm.set[field] for arm in job.compare.arms.values() if field in arm.set] if job.compare else []
    for value in dict.fromkeys(values):
        model = job.model.model_copy(update={"attn_implementation": value})
        one = job.model_copy(update={"model": model})
        sentence = attention_refusal(one, cuda=uses_gpu(job, site), has_flash=has_flash)
        if sentence:
            raise JobFileError(path, [Problem(field, sentence)])


def _known(job: JobSpec) -> _Known:
    notes: list[str] = []
    rows = facts = None
    try:
        rows = load_rows(job)
        notes += [*rows.warnings, *_check_decision(job, rows)]
    except AssetError as missing:
        notes.append(f"{missing}; rows are taken as {_ASSUMED_ROWS:,}")
    try:
        facts = facts_of(job) if rows else None
    except AssetError as missing:
        notes.append(f"{missing}; trial ids are not known yet")
    tokens = _tokens(job, notes) if rows and facts and job.generates else None
    if rows and tokens:
        longest, examples = tokens.longest, tokens.training_rows(job)
        longest = job.model.max_length if job.train.packing else longest
        notes = [*tokens.warnings, *(note for note in notes if note not in tokens.warnings)]
        return _Known(rows, facts, _model(job), longest, examples, tuple(token_lines(tokens)), tuple(notes))
    longest = _longest_tokens(rows) if rows else job.model.max_length
    lines = tuple(_class_lines(job, rows)) if rows and rows.labels else ()
    return _Known(rows, facts, _model(job), longest, len(rows.train) if rows else None, lines, tuple(notes))


def _check_decision(job: JobSpec, rows: Rows) -> list[str]:
    """Return cautions about the rows that will decide."""
    split = _deciding_split(job, rows)
    counts = _count_classes(rows) if rows.labels else {}
    return check_rows(counts, split, len(_splits(rows)[split]))


def _deciding_split(job: JobSpec, rows: Rows) -> str:
    """Return the split that decides: validation for a search, the held-out rows for a comparison."""
    return "validation" if job.compare is None or rows.chosen_on_test else "test"


def _splits(rows: Rows) -> dict[str, AnyRows]:
    return {"train": rows.train, "validation": rows.validation, "test": rows.test}


def _count_classes(rows: Rows) -> dict[str, dict[str, int]]:
    """Return split -> class -> number of rows."""
    counts = {}
    for name, split in _splits(rows).items():
        counts[name] = dict.fromkeys(rows.labels, 0) | label_counts(split)
    return counts


def _class_lines(job: JobSpec, rows: Rows) -> list[str]:
    """Describe how many rows each class has in each split, and the majority-class baseline."""
    lines, counts = [], _count_classes(rows)
    for name, of_split in counts.items():
        shown = [f"{label} {of_split[label]:,}" for label in rows.labels[:_MAX_CLASSES]]
        more = ", ..." if len(rows.labels) > _MAX_CLASSES else ""
        lines.append(f"{name}: {counted(sum(of_split.values()), 'row')} ({', '.join(shown)}{more})")
    split, metric = _deciding_split(job, rows), job.metric.name
    label, metrics = majority_class(counts["train"], counts[split])
    if metric in metrics:
        lines.append(f"baseline: always predicting {label!r} has {metric} {metrics[metric]:.3f} ({split})")
    return lines


def _tokens(job: JobSpec, notes: list[str]) -> TokenData | None:
    """Return the rows as tokens, made here or taken from the cache; None (and a note) without the tokenizer.

    Only the chat template says how many examples a conversation becomes, and what it cannot render.
    """
    from lorafleet.evaluation.tokens import prepare

    try:
        return prepare(job)
    except AssetError as missing:
        notes.append(f"{missing}; how rows become tokens was not looked at")
        return None


def token_lines(tokens: TokenData) -> list[str]:
    """Say what the rows of each split are as tokens."""
    lines = []
    for name, split in tokens.splits.items():
        if not len(split):
            continue
        examples = f" in {len(split):,} examples" if len(split) != split.rows else ""
        lengths = sorted(int(length) for length in split.lengths)
        learnt = int(split.target_counts.sum())
        lines.append(
            f"{name}: {counted(split.rows, 'row')}{examples}, {int(split.starts[-1]):,} tokens ({learnt:,} learnt), "
            f"{lengths[len(lengths) // 2]} a row (median), {lengths[-1]} at most"
        )
    return lines


def _model(job: JobSpec) -> tuple[Shape, int] | None:
    name, revision = job.model.model_name_or_path, job.model.revision
    config = model_config(name, revision)
    found = shape(config) if config else None
    return (found, parameter_count(name, revision) or found.parameters) if found else None


def _configurations(job: JobSpec, known: _Known) -> list[Assignment]:
    """The different configurations that are known beforehand."""

    def name(assignment: Assignment) -> str:
        wrong = search.impossible(job, assignment) if job.search else None
        if wrong:
            raise JobFileError("search.parameters", [Problem("search.parameters", wrong)])
        resolved = search.trial(job, assignment)
        return trial_id(resolved, known.facts) if known.facts else _what_trains(resolved)

    return search.known_assignments(job, name)


def _what_trains(job: JobSpec) -> str:
    """What tells configurations apart while files are missing for an id: all but the blocks of other methods."""
    unused = set().union(*METHOD_BLOCKS.values()) - set(METHOD_BLOCKS[job.method])
    return job.model_dump_json(exclude={"search", *unused})


def _total(job: JobSpec, known: int) -> int:
    tpe = job.search is not None and job.search.method == "tpe"
    return max(known, job.search.num_samples) if tpe and job.search else known


def _cost(job: JobSpec, schedules: list[Schedule], total: int) -> tuple[int, int]:
    """(training rows if nothing is cut, training rows expected under ASHA)."""
    mean = sum(s.total_samples for s in schedules) / len(schedules)
    worst = round(mean * total)
    if job.search is None or job.search.scheduler.type == "none":
        return worst, worst
    first = schedules[0]
    levels = [step * first.batch_rows for step in first.rung_steps]
    return worst, min(worst, round(rungs.expected_time(total, levels, job.search.scheduler.reduction_factor)))


def _planned(
    resolved: JobSpec, assignment: Assignment, plan: Schedule, memory: MemoryEstimate | None, known: _Known
) -> PlannedTrial:
    shown = resolved.model_dump(mode="json", include={"method", "model", "train", *METHOD_BLOCKS[resolved.method]})
    shown["train"]["learning_rate"] = learning_rate(resolved).value
    return PlannedTrial(
        trial_id=trial_id(resolved, known.facts) if known.facts else None,
        assignment=assignment,
        resolved=shown,
        steps=plan.total_steps,
        memory=memory,
    )


def uses_gpu(job: JobSpec, site: Site) -> bool:
    """Whether a job's trials run on GPUs of a site."""
    return site.gpus > 0 and job.resources.device != "cpu" and job.resources.gpus_per_node != 0


def _memory(resolved: JobSpec, known: _Known, *, cuda: bool) -> MemoryEstimate | None:
    """Of one trial, where the model's shape is known. Its weights need not be here."""
    if known.model is None:
        return None
    return estimate(resolved, *known.model, known.longest, cuda=cuda, labels=known.labels)


def _largest(each: list[MemoryEstimate | None]) -> MemoryEstimate | None:
    return max((memory for memory in each if memory), key=lambda memory: memory.expected, default=None)


def _too_large(each: list[MemoryEstimate | None], site: Site, *, cuda: bool) -> list[str]:
    """A sentence where trials are not expected to fit a GPU."""
    room = site.gpu_memory_gib
    if cuda and not room:
        return ["how much memory the GPUs have is not known: whether trials fit them is not checked"]
    large = [memory.expected for memory in each if memory and cuda and room and memory.expected > room]
    if not large:
        return []
    return [
        f"{len(large)} of {len(each)} trials are expected to need up to {max(large):.1f} GiB, and a GPU has "
        f"{room:.1f}: fewer rows a pass (with more accumulation), "
        "train.gradient_checkpointing, method: qlora, or strategy: fsdp"
    ]


def _checkpoint_gb(trials: list[JobSpec], known: _Known, slots: int, *, cuda: bool) -> float | None:
    """GB on disk of the largest checkpoint, for as many trials as run at once."""
    if known.model is None:
        return None
    found, parameters = known.model

    def size(resolved: JobSpec) -> int:
        full = resolved.method == "full"
        trained = parameters if full else trained_parameters(resolved, found, known.labels)
        return checkpoint_bytes(resolved, trained, cuda=cuda)

    return slots * max(map(size, trials)) / 1e9


def _with_strategy(resolved: JobSpec, strategy: Strategy) -> JobSpec:
    return resolved.model_copy(update={"resources": resolved.resources.model_copy(update={"strategy": strategy})})


def _longest_tokens(rows: Rows) -> int:
    """A guess from the characters; the tokenizer is not asked here."""

    return 8 + round(max(_characters(row) for row in rows.train) / _CHARACTERS_A_TOKEN)


def _characters(row: Row) -> int:
    return len(row.text) + sum(len(message.content) for message in row.messages)


def _host_gib(job: JobSpec, memory: MemoryEstimate | None, known: _Known, *, cuda: bool) -> float:
    """Host memory of one trial, in GiB."""
    processes = job.resources.world_size
    if cuda:  # each process reads the weights into memory before they go to its GPU
        weights = known.model[1] * _BYTES_OF_A_READ_WEIGHT / 2**30 if known.model else 0.0
        return (_HOST_GIB_OF_A_GPU_TRIAL + weights) * processes
    return (memory.expected if memory else 1.0) * processes


def choose_strategy(
    trials: list[JobSpec], site: Site, memory: MemoryEstimate | None, *, cuda: bool
) -> tuple[Strategy, str]:
    """What `auto` means for these trials, of which `memory` is the largest's, and why.

    Whole copies exchange an adapter's gradients alone; cut-up weights are gathered in every layer of every pass
    (fsdp_qlora reports DDP 1.55 times as fast for a 7B LoRA on two 3090s). So they are cut only where they do not fit.
    """
    wanted = trials[0].resources
    if wanted.strategy != "auto":
        return wanted.strategy, "as given"
    if not cuda or memory is None or not site.gpu_memory_gib or wanted.world_size == 1:
        return "ddp", "auto: whole copies move the least between processes"
    room, need = site.gpu_memory_gib, f"about {memory.expected:.1f} GiB a process"
    if memory.expected <= room:
        return "ddp", f"auto: {need} fit a GPU of {room:.1f}"
    for strategy in CUT_WEIGHTS:
        if not any(refusals(_with_strategy(trial, strategy)) for trial in trials):
            return strategy, f"auto: {need} do not fit a GPU of {room:.1f}, so weights are cut up"
    return "ddp", f"auto: {need} do not fit a GPU of {room:.1f}, but this job's weights cannot be cut up"


def _strategy(placement: Placement, why: str) -> str:
    if not placement.distributed:
        return "one process a trial, in warm actors that keep the base loaded"
    over = f" over {placement.num_nodes} machines" if placement.num_nodes > 1 else ""
    group = f"{placement.workers} processes a trial{over}, in a Ray Train worker group each"
    return f"{placement.strategy}: {group} ({why})"
