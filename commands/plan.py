"""`lorafleet plan`: print everything that a sweep would do, before it does it."""

from __future__ import annotations

import textwrap
from enum import StrEnum
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
    make_console,
    print_message,
    print_notes,
    print_text,
)
from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.text import format_count

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lorafleet.jobs.runs.plan import Plan, PlannedTrial


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
) -> None:
    """Print every trial with its values, placement, memory and steps, and what ASHA saves."""
    from lorafleet.cluster.planning.preflight import load_checked
    from lorafleet.jobs.errors import JobFileError, Problem
    from lorafleet.jobs.runs.plan import MANIFEST

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
    backend = get_backend(on, nodes)
    job_plan = backend.plan(loaded, command)
    # After the plan: a job that the cluster refuses can still be looked at.
    refused, unchecked = backend.check(job_plan)
    if output is PlanFormat.YAML:
        _print_manifest(job_plan, unchecked, refused)
        raise typer.Exit(ExitCode.GATE_REFUSED if refused else ExitCode.OK)
    if output is PlanFormat.JSON:
        from lorafleet.jobs.text import make_json_printable

        typer.echo(
            make_json_printable(
                job_plan.model_copy(
                    update={"notes": [*job_plan.notes, *unchecked, *refused]}
                ).model_dump_json(indent=2)
            )
        )
        raise typer.Exit(ExitCode.GATE_REFUSED if refused else ExitCode.OK)
    print_notes(loaded.notes)
    # The plan's notes begin with those of the job, which are printed already.
    for note in job_plan.notes[len(loaded.notes) :]:
        print_message(f"note: {note}")
    screen = make_console()
    screen.print(render_plan(job_plan, screen.width))
    name = f"{job_plan.job.name}-..."
    folder = backend.describe_run_location(name, runs)
    make_console().print(f"run folder      {folder}", markup=False)
    if job_plan.files:
        machines = format_count(
            job_plan.nodes, "worker pod" if MANIFEST in job_plan.files else "node"
        )
        make_console().print(f"job             {machines} of site {job_plan.site}", markup=False)
    if job_plan.command_line:
        make_console().print(
            f"submitted by    {job_plan.command_line}", markup=False, soft_wrap=True
        )
    for name, text in job_plan.files.items():
        print_text(f"\n----- {name}\n{text.rstrip()}")
    for message in unchecked:
        print_message(f"note: {message}")
    for message in refused:
        print_message(f"refused: {message}")
    if refused:
        raise typer.Exit(ExitCode.GATE_REFUSED)


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
    return [
        f"arms            {', '.join(compare.arms)}"
        + (f" (no training: {', '.join(untrained)})" if untrained else ""),
        f"budget          one training of each arm: {budget_text}",
        "seeds           each arm's best configuration is trained with "
        f"{format_count(compare.seeds, 'seed')} in total",
        f"choice          {compare.rule}, by {job_plan.job.metric.name} on the held-out rows and "
        f"{compare.cost}",
    ]


def _format_gib(trial: PlannedTrial, job_plan: Plan) -> str:
    """Return the expected GiB of one process of a trial, marked if it exceeds a GPU's memory.

    `-` if the model's shape is unknown.
    """
    if trial.memory is None:
        return "-"
    available_gib = job_plan.gpu_memory_gib
    return f"{trial.memory.expected:.1f}" + (
        " does not fit" if available_gib and trial.memory.expected > available_gib else ""
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
    placement = job_plan.placement
    total = len(job_plan.trials) + job_plan.later_trials
    rows = (
        f"{job_plan.train_rows:,}"
        if job_plan.train_rows is not None
        else "unknown (the data is not on this machine yet)"
    )
    cores, gpus = (
        format_count(placement.cpus_per_worker, "CPU core"),
        format_count(placement.gpus_per_worker, "GPU"),
    )
    each = f"{format_count(placement.workers, 'process')} with {cores} and {gpus}"
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
        f"placement       {format_count(placement.slots, 'trial')} in parallel, each {each}; "
        f"{format_count(placement.waves, 'wave')} if no trial is stopped early; limited by "
        f"{placement.limited_by}",
        f"strategy        {job_plan.strategy}",
        *([f"number format   {job_plan.number_formats}"] if job_plan.number_formats else []),
    ]
    search = job_plan.job.search
    if job_plan.command == "sweep" and search and search.scheduler.type == "asha":
        saved = 1 - job_plan.expected_samples / max(1, job_plan.worst_samples)
        lines.append(
            f"ASHA            rungs at {job_plan.rung_levels} {search.scheduler.time_attr} (steps "
            f"{job_plan.rung_steps}), the best 1/{search.scheduler.reduction_factor} are promoted"
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
    return lines
