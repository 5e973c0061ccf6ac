"""`lorafleet plan`: print everything that a sweep would do, before it does it."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    Job,
    Nodes,
    On,
    Overrides,
    Runs,
    get_backend,
    load_cluster,
    make_console,
    print_message,
    print_text,
)
from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.sites.placement import format_gpus
from lorafleet.jobs.text import format_count
from lorafleet.jobs.trials.packing import MIN_GAIN

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lorafleet.cluster.backend import Backend, Cluster
    from lorafleet.jobs.loading.job_file import LoadedJob
    from lorafleet.jobs.runs.plan import Plan, PlannedTrial, TrainingRate
    from lorafleet.jobs.sites.placement import Placement


class PlanFormat(StrEnum):
    """Output format of a plan."""

    TEXT = "text"
    JSON = "json"
    YAML = "yaml"


PlanOutput = Annotated[
    PlanFormat, typer.Option("--format", help="Output format. yaml: a manifest for kubectl.")
]


def plan(
    job: Job,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    on: On = None,
    nodes: Nodes = None,
    output: PlanOutput = PlanFormat.TEXT,
    train: Annotated[bool, typer.Option("--train", help="Plan `lorafleet train`.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Plan `lorafleet compare`.")] = False,
    script: Annotated[
        bool, typer.Option("--script", help="Print the files that go to the cluster, whole.")
    ] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Measure a few steps of one trial, on a node of the site."),
    ] = False,
) -> None:
    """Print every trial with its values, placement, memory and steps, and what ASHA saves.

    Of the files that go to a cluster, only what this job and the site decide is shown.
    """
    from lorafleet.cluster.planning.preflight import load_checked
    from lorafleet.jobs.errors import JobFileError, Problem

    loaded = load_checked(job, tuple(overrides or ()), require_weights=False)
    if compare and loaded.job.compare is None:
        raise JobFileError(
            str(job),
            [
                Problem(
                    "compare",
                    (
                        "there is no compare block: add one, or run `lorafleet plan` without "
                        "--compare"
                    ),
                )
            ],
        )
    # Without options the command follows from the job's blocks, and a search comes before a
    # comparison.
    is_comparison = compare or (
        loaded.job.compare is not None and loaded.job.search is None and not train
    )
    command = (
        "compare" if is_comparison else "train" if train or loaded.job.search is None else "sweep"
    )
    cluster = load_cluster(on, nodes) if on is not None else None
    backend: Backend = cluster or get_backend(None, nodes)
    job_plan = backend.plan(loaded, command)
    if probe:
        job_plan = job_plan.model_copy(
            update={"rate": _measure_rate(cluster, job_plan, loaded, runs)}
        )
    show_plan(backend, job_plan, runs, output, whole_script=script)


def show_plan(
    backend: Backend,
    job_plan: Plan,
    runs: Path,
    output: PlanFormat,
    *,
    whole_script: bool = False,
    ignored: Sequence[str] = (),
) -> None:
    """Print a plan and what its backend has against it.

    Args:
        runs: Folder of the runs that the user named.
        whole_script: Print the files that go to a cluster, whole.
        ignored: Problems that the submission itself would mend.

    Raises:
        typer.Exit: The backend would refuse the job.
    """
    # After the plan: a job that the cluster refuses can still be looked at.
    problems, unchecked = backend.check(job_plan)
    refused = [problem for problem in problems if problem not in ignored]
    if output is PlanFormat.YAML:
        _print_manifest(job_plan, unchecked, refused)
    elif output is PlanFormat.JSON:
        _print_json(job_plan, [*unchecked, *refused])
    else:
        for note in job_plan.notes:
            print_message(f"note: {note}")
        name = f"{job_plan.job.name}-..."
        _print_text(job_plan, backend.describe_run_location(name, runs), whole_script=whole_script)
        for message in unchecked:
            print_message(f"note: {message}")
        for message in refused:
            print_message(f"refused: {message}")
    if refused:
        raise typer.Exit(ExitCode.GATE_REFUSED)


def _measure_rate(
    cluster: Cluster | None, job_plan: Plan, loaded: LoadedJob, runs: Path
) -> TrainingRate:
    """Measure the speed of the first trial where the run would execute.

    Raises UserError if that is a place without a probe, or if the measurement fails.
    """
    import os
    import tempfile

    from lorafleet.cluster.probe import measure_rate, measure_rate_on
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.extras import require_training

    if cluster is not None:
        folder = cluster.resolve_runs_dir(runs)
        return measure_rate_on(cluster, job_plan, loaded, folder, print_message)
    if os.environ.get("RAY_ADDRESS"):
        raise UserError(
            "--probe does not measure on the Ray of RAY_ADDRESS, only on this machine or a Slurm "
            "site: leave it out"
        )
    require_training("measuring the speed of a trial")
    with tempfile.TemporaryDirectory(prefix="lorafleet-") as scratch:
        return measure_rate(job_plan, Path(scratch))


def _print_json(job_plan: Plan, more_notes: list[str]) -> None:
    from lorafleet.jobs.text import make_json_printable

    complete = job_plan.model_copy(update={"notes": [*job_plan.notes, *more_notes]})
    typer.echo(make_json_printable(complete.model_dump_json(indent=2)))


def _print_text(job_plan: Plan, folder: str, *, whole_script: bool) -> None:
    from lorafleet.jobs.runs.plan import MANIFEST

    screen = make_console()
    if job_plan.delivery is not None:
        screen.print(describe_delivery(job_plan), markup=False, soft_wrap=True)
    else:
        screen.print(render_plan(job_plan, screen.width))
    screen.print(f"run folder      {folder}", markup=False)
    if job_plan.files:
        noun = "worker pod" if MANIFEST in job_plan.files else "node"
        machines = format_count(job_plan.nodes, noun)
        if job_plan.tasks:
            machines = f"{format_count(job_plan.tasks, 'array task')} and a job that merges them"
        screen.print(f"job             {machines}, on site {job_plan.site}", markup=False)
    if job_plan.command_line:
        screen.print(f"submitted by    {job_plan.command_line}", markup=False, soft_wrap=True)
    if whole_script:
        for name, text in job_plan.files.items():
            print_text(f"\n----- {name}\n{text.rstrip()}")
    elif job_plan.files:
        print_text("\n".join(fold_files(job_plan.files)))


def describe_delivery(job_plan: Plan) -> str:
    """Return the line on what an export or a benchmark would do."""
    delivery = job_plan.delivery
    assert delivery is not None
    model = f"trial {delivery.trial_id}" if delivery.trial_id else "the recommended model"
    if job_plan.command == "export":
        where = delivery.output or "its export folder"
        done = f"{', '.join(delivery.targets)} to {where}"
    else:
        done = (
            f"{format_count(delivery.rounds, 'round')}, {format_count(delivery.rows, 'row')}, "
            f"{delivery.new_tokens} new tokens"
        )
    cores, gpus = job_plan.placement.cpus_per_worker, job_plan.placement.gpus_per_worker
    return (
        f"{job_plan.command:<16}{model} of {delivery.run}: {done}\n"
        f"placement       1 process with {format_count(cores, 'CPU core')} and "
        f"{format_count(gpus, 'GPU')}"
    )


def fold_files(texts: dict[str, str]) -> list[str]:
    """Return the lines that stand for the files of a job: their sizes, and what was decided.

    Of a batch script that is its #SBATCH lines, of a manifest its objects.
    """
    sizes = ", ".join(
        f"{name} ({format_count(len(text.splitlines()), 'line')})" for name, text in texts.items()
    )
    lines = [f"script          {sizes}; --script prints all of it"]
    for text in texts.values():
        decided = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
        if not decided and text.lstrip().startswith("apiVersion:"):
            decided = _list_objects(text)
        lines += [f"{'':<16}{line}" for line in decided]
    return lines


def _list_objects(manifest: str) -> list[str]:
    """Return `KIND NAME` for each object of a manifest."""
    import yaml

    return [
        f"{document['kind']} {document['metadata']['name']}"
        for document in yaml.safe_load_all(manifest)
        if document
    ]


def _print_manifest(job_plan: Plan, unchecked: list[str], refused: list[str]) -> None:
    """Print the Kubernetes objects of a job, for `kubectl apply` and for GitOps.

    Refusals are printed instead if there are any. Raises UserError for a site that is not
    Kubernetes.
    """
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.runs.plan import MANIFEST

    if MANIFEST not in job_plan.files:
        raise UserError(
            "--format yaml prints a manifest for Kubernetes: use it with --on SITE, where SITE is "
            "of kind kubernetes"
        )
    notes = (f"note: {note}" for note in job_plan.notes)
    for message in [*notes, *unchecked, *(f"refused: {message}" for message in refused)]:
        print_message(message)
    if not refused:
        print_text(job_plan.files[MANIFEST], nl=False)


_TABLE_FIELDS = (
    "train.learning_rate",
    "lora.lora_r",
    "lora.lora_alpha",
    "prompt_tuning.num_virtual_tokens",
)
"""Fields that the plan's table shows for every trial whose method has them."""


def render_plan(job_plan: Plan, width: int) -> RenderableType:
    """Return the plan as a table and a few lines.

    Lines longer than `width` columns wrap below their text, right of the name.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from lorafleet.jobs.schema import field_paths as fields

    table = Table(box=None, pad_edge=False, header_style="bold")
    paths = list(dict.fromkeys(path for trial in job_plan.trials for path in trial.assignment))
    arms = ["arm"] if any(trial.arm for trial in job_plan.trials) else []
    resolved = [trial.resolved for trial in job_plan.trials]
    # A searched field has its own column already.
    fixed = [
        p
        for p in _TABLE_FIELDS
        if p not in paths and any(fields.get_value(values, p) is not None for values in resolved)
    ]
    for name in (
        "#",
        *arms,
        "trial",
        *paths,
        *(path.rpartition(".")[2] for path in fixed),
        "steps",
        "GiB",
    ):
        table.add_column(name, justify="left" if name in ("trial", "arm") else "right")
    for number, trial in enumerate(job_plan.trials, start=1):
        values = [_format_cell(trial.assignment.get(path)) for path in paths]
        fixed_values = [_format_cell(fields.get_value(trial.resolved, path)) for path in fixed]
        labels = [str(number), *([trial.arm] if arms else []), trial.trial_id or "-"]
        table.add_row(
            *labels, *values, *fixed_values, str(trial.steps), _format_gib(trial, job_plan)
        )
    wrapper = textwrap.TextWrapper(width, subsequent_indent=" " * 16, break_on_hyphens=False)
    lines = [wrapper.fill(line) for line in (*_describe_arms(job_plan), *describe_plan(job_plan))]
    return Group(table, Text(""), *map(Text, lines))


def _describe_arms(job_plan: Plan) -> list[str]:
    """Return the lines on a comparison's arms, budget, seeds and choice.

    Empty for other plans.
    """
    compare = job_plan.job.compare
    if job_plan.command != "compare" or compare is None:
        return []
    untrained = [name for name, arm in compare.arms.items() if not arm.needs_training]
    budget = compare.budget.model_dump(exclude_none=True)
    budget_text = ", ".join(f"{value:,g} {name}" for name, value in budget.items()) or (
        "the steps set under `train`"
    )
    choice = (
        f"choice          {compare.rule}, by {job_plan.job.metric.name} on the held-out rows and "
        f"{compare.cost}"
    )
    if len(untrained) == len(compare.arms):
        return [f"arms            {', '.join(compare.arms)}, none of which is trained", choice]
    return [
        f"arms            {', '.join(compare.arms)}"
        + (f" (no training: {', '.join(untrained)})" if untrained else ""),
        f"budget          one training of each arm: {budget_text}",
        "seeds           each arm's best configuration is trained with "
        f"{format_count(compare.seeds, 'seed')} in total",
        choice,
    ]


def _format_gib(trial: PlannedTrial, job_plan: Plan) -> str:
    """Return the expected GiB of one process of a trial, marked if it exceeds a GPU's memory.

    `-` if the model's shape is unknown.
    """
    if trial.memory is None:
        return "-"
    available_gib = job_plan.gpu_memory_gib
    return f"{trial.memory.expected:.1f}" + (
        " does not fit" if available_gib and trial.memory.required > available_gib else ""
    )


def _describe_steps(job_plan: Plan) -> str:
    """Return how a step's batch is made up: rows, processes and micro-batches.

    `32 rows = 8 a pass x 2 processes x 2 passes`; if trials differ, one such text each.
    """
    workers = job_plan.placement.workers

    def describe_batch(values: dict[str, Any]) -> str:
        rows = values["per_device_train_batch_size"]
        batch = (
            values["global_batch_size"] or rows * workers * values["gradient_accumulation_steps"]
        )
        micro_batches = batch // (rows * workers)
        return (
            f"{batch} rows = {rows} per micro-batch x {format_count(workers, 'process')} x "
            f"{format_count(micro_batches, 'micro-batch')}"
        )

    return " | ".join(
        dict.fromkeys(describe_batch(trial.resolved["train"]) for trial in job_plan.trials)
    )


def _format_cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def describe_plan(job_plan: Plan) -> list[str]:
    """Return the lines below the table: data, steps, placement, cost, memory and checkpoints.

    Each line begins with its name in 16 columns; `render_plan` wraps long ones below their
    text.
    """
    placement = job_plan.task_placement or job_plan.placement
    total = len(job_plan.trials) + job_plan.later_trials
    rows = (
        f"{job_plan.train_rows:,}"
        if job_plan.train_rows is not None
        else "unknown (the data is not on this machine yet)"
    )
    cores, gpus = (
        format_count(placement.cpus_per_worker, "CPU core"),
        format_gpus(placement.gpus_per_worker, placement.trials_per_gpu),
    )
    each = f"{cores} and {gpus}"
    if placement.pack == 1:
        each = f"{format_count(placement.workers, 'process')} with {each}"
    lines = []
    tpe = job_plan.job.search is not None and job_plan.job.search.method == "tpe"
    if job_plan.later_trials and job_plan.command == "sweep" and not tpe:
        refit = ["retrained without folds"] if job_plan.job.evaluate.folds else []
        further_seeds = (
            ["with further seeds"] if job_plan.job.search and job_plan.job.search.seeds > 1 else []
        )
        lines.append(
            f"{format_count(job_plan.later_trials, 'trial')} more: the best one, "
            f"{' and '.join([*refit, *further_seeds])}."
        )
    elif job_plan.later_trials and tpe:
        first = format_count(len(job_plan.trials), "random start-up trial")
        more = f"{job_plan.later_trials} more {'is' if job_plan.later_trials == 1 else 'are'}"
        lines.append(f"TPE's {first}; {more} chosen during the sweep, from the results so far.")
    lines += [
        f"{'data' if number == 0 else '':<16}{line}" for number, line in enumerate(job_plan.data)
    ]
    lines += [
        f"one epoch       {rows} {'packed rows' if job_plan.job.train.packing else 'examples'}"
        if job_plan.job.is_generative and job_plan.data
        else f"training rows   {rows}",
        f"one step        {_describe_steps(job_plan)}",
        f"placement       {_describe_slots(placement)}{_describe_tasks(job_plan)}, "
        f"{'with' if placement.pack > 1 else 'each'} {each}; "
        f"{format_count(placement.waves, 'wave')} if no trial is stopped early; limited by "
        f"{placement.limited_by}",
        *_describe_packing(job_plan),
        f"strategy        {job_plan.strategy}",
        *([f"number format   {job_plan.number_formats}"] if job_plan.number_formats else []),
    ]
    search = job_plan.job.search
    if job_plan.command == "sweep" and search and search.scheduler.type == "asha":
        saved = 1 - job_plan.expected_samples / max(1, job_plan.worst_samples)
        lines.append(
            f"ASHA            rungs at {job_plan.rung_levels} {search.scheduler.time_attr} (steps "
            f"{job_plan.rung_steps}), the best 1/{search.scheduler.reduction_factor} are promoted"
            f"{_MODES[search.scheduler.mode]}"
        )
        lines.append(
            f"cost            {job_plan.expected_samples:,} rows expected, "
            f"{job_plan.worst_samples:,} if no trial were stopped early: ASHA saves {saved:.0%}"
        )
    else:
        lines.append(
            f"cost            {job_plan.worst_samples:,} rows over {format_count(total, 'trial')}"
        )
    if job_plan.memory:
        parts = ", ".join(
            f"{name} {gib:.2f}" for name, gib in job_plan.memory.components.items() if round(gib, 2)
        )
        lines.append(
            f"memory          {job_plan.memory.low:.1f} / {job_plan.memory.expected:.1f} / "
            f"{job_plan.memory.high:.1f} GiB of {job_plan.memory.of} (low / expected / high): "
            f"{parts}"
            + (
                f"; earlier trials of this shape had at most {job_plan.memory.measured:.1f}, which "
                "decides"
                if job_plan.memory.measured is not None
                else ""
            )
        )
    else:
        lines.append(
            "memory          unknown: the model's config is not on this machine, or its "
            "architecture is not supported by the estimate"
        )
    if job_plan.checkpoint_gb is not None:
        lines.append(
            f"checkpoints     {1000 * job_plan.checkpoint_gb:,.0f} MB for the trials that run in "
            f"parallel, saved at least every {job_plan.job.train.checkpoint_minutes:g} minutes; "
            "the previous checkpoint is kept too"
        )
    lines += _describe_time(job_plan)
    lines += [
        f"{'unused' if number == 0 else '':<16}{line}" for number, line in enumerate(job_plan.waste)
    ]
    return lines


_MODES = {
    "stop": "",
    "promote": "; trials pause at a rung until they are among the best",
    "synchronous": "; trials pause at a rung until all have arrived",
}


def _describe_slots(placement: Placement) -> str:
    """Return how many trials run in parallel."""
    if placement.pack > 1:
        count = placement.slots
        where = "one process" if count == 1 else f"each of {format_count(count, 'process')}"
        return f"up to {format_count(placement.pack, 'trial')} at once in {where}"
    return f"{format_count(placement.slots, 'trial')} in parallel"


def _describe_packing(job_plan: Plan) -> list[str]:
    """Return lines on whether trials are packed, and why; none for anything but a sweep."""
    packing = job_plan.packing
    if packing is None:
        return []
    if packing.trials == 1:
        return [f"packing         none: {packing.reason}"]
    text = f"{format_count(packing.trials, 'trial')} share a base, {packing.reason}"
    if packing.processes > 1:
        text = f"in each of {packing.processes} processes, {text}"
    if packing.tokens is not None:
        text += f"; a micro-batch of one has about {format_count(packing.tokens, 'token')}"
    if packing.memory_gib is not None:
        text += f"; about {packing.memory_gib:.1f} GiB together"
    if packing.is_measured:
        text += (
            "; the run first measures how many trials a forward pass needs to be at full speed "
            f"(at most {packing.trials}), and trains one at a time if that is not "
            f"{MIN_GAIN - 1:.0%} faster"
        )
    lines = [f"packing         {text}"]
    if packing.earlier:
        lines.append(f"{'':<16}{packing.earlier}")
    alone = Counter(trial.alone for trial in job_plan.trials if trial.alone)
    lines += [
        f"{'':<16}{format_count(count, 'trial')} trained alone: {reason}"
        for reason, count in alone.items()
    ]
    return lines


def _describe_tasks(job_plan: Plan) -> str:
    """Return how many array tasks share the trials; empty without a job array."""
    if not job_plan.tasks:
        return ""
    at_once = (
        f" ({job_plan.max_running_tasks} at once)"
        if job_plan.max_running_tasks < job_plan.tasks
        else ""
    )
    return f" in each of {format_count(job_plan.tasks, 'array task')}{at_once}"


def _describe_time(job_plan: Plan) -> list[str]:
    """Return lines on the expected duration and, with GPUs, GPU-hours; none without a rate."""
    rate, loads = job_plan.rate, job_plan.loads
    if rate is None or not loads:
        return []
    # The arms of a comparison run one after another.
    durations = [load.compute_seconds(rate.seconds_per_row) for load in loads]
    expected, longest = (sum(seconds) for seconds in zip(*durations, strict=True))
    trials = max(load.slots for load in loads)
    come_on_top = (
        f"start-up {'and waiting in the queue come' if job_plan.files else 'comes'} on top"
    )
    unit = "GPU" if job_plan.placement.gpus_per_worker else "process"
    lines = [
        f"duration        {_format_span(expected, longest)} with "
        f"{format_count(trials, 'trial')} in parallel, at {1000 * rate.seconds_per_row:.3g} ms of "
        f"a {unit} per row (measured: {rate.source}); {come_on_top}"
    ]
    if job_plan.placement.gpus_per_worker:
        expected_hours, worst_hours = (
            sum(rows) * rate.seconds_per_row / 3600 / job_plan.placement.trials_per_gpu
            for rows in (
                [load.expected_rows for load in loads],
                [load.worst_rows for load in loads],
            )
        )
        lines.append(
            f"GPU-hours       {expected_hours:.3g} of training"
            + (f" expected, {worst_hours:.3g} at most" if worst_hours > expected_hours else "")
        )
    return lines


def _format_span(expected: float, longest: float) -> str:
    from lorafleet.evaluation.report.format import format_duration

    text = format_duration(expected)
    if round(longest) <= round(expected):
        return text
    return f"{text} expected, {format_duration(longest)} at most,"
