"""`lorafleet plan`: everything that a sweep would do, before it does it."""

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
    backend_for,
    console,
    note_aliases,
    say,
    tell,
)
from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.text import counted

if TYPE_CHECKING:
    from lorafleet.jobs.runs.plan import Plan, PlannedTrial
    from rich.console import RenderableType


class PlanFormat(StrEnum):
    """How a plan is printed."""

    TEXT = "text"
    JSON = "json"
    YAML = "yaml"


Printed = Annotated[PlanFormat, typer.Option("--format", help="What to print; yaml: a manifest for kubectl.")]


def plan(
    job: Job,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    on: On = None,
    nodes: Nodes = None,
    output: Printed = PlanFormat.TEXT,
    train: Annotated[bool, typer.Option("--train", help="The plan of `lorafleet train`.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="The plan of `lorafleet compare`.")] = False,
) -> None:
    """Print every trial with its values, where they run, the memory, the steps, and what ASHA saves."""
    from lorafleet.cluster.planning.preflight import load_checked
    from lorafleet.cluster.remote.backend import Away
    from lorafleet.jobs.errors import JobFileError, Problem
    from lorafleet.jobs.runs.plan import MANIFEST

    loaded = load_checked(job, tuple(overrides or ()), whole=False)
    if compare and loaded.job.compare is None:
        raise JobFileError(str(job), [Problem("compare", "there is no compare block; `lorafleet plan` plans the rest")])
    compares = compare or (loaded.job.compare is not None and loaded.job.search is None and not train)
    command = "compare" if compares else "train" if train or loaded.job.search is None else "sweep"
    backend = backend_for(on, nodes)
    made = backend.plan(loaded, command)
    refused, unasked = backend.check(made)
    if output is PlanFormat.YAML:
        _print_manifest(made, unasked, refused)
        raise typer.Exit(ExitCode.GATE_REFUSED if refused else ExitCode.OK)
    if output is PlanFormat.JSON:
        from lorafleet.jobs.text import printable_json

        typer.echo(
            printable_json(
                made.model_copy(update={"notes": [*made.notes, *unasked, *refused]}).model_dump_json(indent=2)
            )
        )
        raise typer.Exit(ExitCode.GATE_REFUSED if refused else ExitCode.OK)
    note_aliases(loaded.notes)
    for note in made.notes[len(loaded.notes) :]:
        say(f"note: {note}")
    screen = console()
    screen.print(plan_view(made, screen.width))
    name = f"{made.job.name}-..."
    folder = str(backend.runs_dir(runs) / name)
    if isinstance(backend, Away):
        folder = f"{backend.folder_of(name)} on the storage, and its record here in {folder}"
    console().print(f"run folder      {folder}", markup=False)
    if made.files:
        machines = counted(made.nodes, "worker pod" if MANIFEST in made.files else "node")
        console().print(f"job             {machines} of site {made.site}", markup=False)
    if made.command_line:
        console().print(f"submitted by    {made.command_line}", markup=False, soft_wrap=True)
    for name, text in made.files.items():
        tell(f"\n----- {name}\n{text.rstrip()}")
    for sentence in unasked:
        say(f"note: {sentence}")
    for sentence in refused:
        say(f"refused: {sentence}")
    if refused:
        raise typer.Exit(ExitCode.GATE_REFUSED)


def _print_manifest(made: Plan, unasked: list[str], refused: list[str]) -> None:
    """The objects of a job on Kubernetes, for `kubectl apply` and for GitOps."""
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.runs.plan import MANIFEST

    if MANIFEST not in made.files:
        raise UserError("--format yaml prints a manifest for Kubernetes: it goes with --on SITE of kind kubernetes")
    for sentence in [*unasked, *(f"refused: {sentence}" for sentence in refused)]:
        say(sentence)
    if not refused:
        tell(made.files[MANIFEST], nl=False)


_SHOWN = ("train.learning_rate", "lora.lora_r", "lora.lora_alpha", "prompt_tuning.num_virtual_tokens")
"""What a plan's table shows of every trial, where its method has it."""


def plan_view(made: Plan, width: int) -> RenderableType:
    """The plan as a table and a few lines; what does not fit a screen of so many columns goes on below its name."""
    from lorafleet.jobs.schema import field_paths as fields
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    paths = list(dict.fromkeys(path for trial in made.trials for path in trial.assignment))
    arms = ["arm"] if any(trial.arm for trial in made.trials) else []
    resolved = [trial.resolved for trial in made.trials]
    fixed = [p for p in _SHOWN if p not in paths and any(fields.get(values, p) is not None for values in resolved)]
    for name in ("#", *arms, "trial", *paths, *(path.rpartition(".")[2] for path in fixed), "steps", "GiB"):
        table.add_column(name, justify="left" if name in ("trial", "arm") else "right")
    for number, trial in enumerate(made.trials, start=1):
        values = [_cell(trial.assignment.get(path)) for path in paths]
        others = [_cell(fields.get(trial.resolved, path)) for path in fixed]
        named = [str(number), *([trial.arm] if arms else []), trial.trial_id or "-"]
        table.add_row(*named, *values, *others, str(trial.steps), _gib(trial, made))
    below = textwrap.TextWrapper(width, subsequent_indent=" " * 16, break_on_hyphens=False)
    lines = [below.fill(line) for line in (*_arm_lines(made), *plan_lines(made))]
    return Group(table, Text(""), *map(Text, lines))


def _arm_lines(made: Plan) -> list[str]:
    """What is compared, and how it is kept fair."""
    compare = made.job.compare
    if made.command != "compare" or compare is None:
        return []
    untrained = [name for name, arm in compare.arms.items() if not arm.trains]
    budget = compare.budget.model_dump(exclude_none=True)
    said = ", ".join(f"{value:,g} {name}" for name, value in budget.items()) or "what `train` says"
    return [
        f"arms            {', '.join(compare.arms)}" + (f" (no training: {', '.join(untrained)})" if untrained else ""),
        f"budget          one training of each arm: {said}",
        f"seeds           each arm's best configuration is trained with {counted(compare.seeds, 'seed')} in all",
        f"choice          {compare.rule}, by {made.job.metric.name} on the held-out rows and {compare.cost}",
    ]


def _gib(trial: PlannedTrial, made: Plan) -> str:
    """What one process of a trial is expected to need, marked where a GPU has less."""
    if trial.memory is None:
        return "-"
    room = made.gpu_memory_gib
    return f"{trial.memory.expected:.1f}" + (" does not fit" if room and trial.memory.expected > room else "")


def _step(made: Plan) -> str:
    """`32 rows = 8 a pass x 2 processes x 2 passes`; where trials differ, what each has."""
    workers = made.placement.workers

    def worked_out(values: dict[str, Any]) -> str:
        rows = values["per_device_train_batch_size"]
        batch = values["global_batch_size"] or rows * workers * values["gradient_accumulation_steps"]
        passes = batch // (rows * workers)
        return f"{batch} rows = {rows} a pass x {counted(workers, 'process')} x {counted(passes, 'pass')}"

    return " | ".join(dict.fromkeys(worked_out(trial.resolved["train"]) for trial in made.trials))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plan_lines(made: Plan) -> list[str]:
    """What the table does not say."""
    place = made.placement
    total = len(made.trials) + made.later_trials
    rows = f"{made.train_rows:,}" if made.train_rows is not None else "unknown (data not here yet)"
    cores, gpus = counted(place.cpus_per_worker, "CPU core"), counted(place.gpus_per_worker, "GPU")
    each = f"{counted(place.workers, 'process')} with {cores} and {gpus}"
    lines = []
    tpe = made.job.search is not None and made.job.search.method == "tpe"
    if made.later_trials and made.command == "sweep" and not tpe:
        whole = ["on the training rows as they are"] if made.job.evaluate.folds else []
        seeds = ["with further seeds"] if made.job.search and made.job.search.seeds > 1 else []
        lines.append(f"{counted(made.later_trials, 'trial')} more: the best one, {' and '.join([*whole, *seeds])}.")
    elif made.later_trials and tpe:
        first = counted(len(made.trials), "random start-up trial")
        more = f"{made.later_trials} more {'is' if made.later_trials == 1 else 'are'}"
        lines.append(f"TPE's {first}; {more} chosen while the sweep runs, from the results so far.")
    lines += [f"{'data' if number == 0 else '':<16}{line}" for number, line in enumerate(made.data)]
    lines += [
        f"one epoch       {rows} {'packed rows' if made.job.train.packing else 'examples'}"
        if made.job.generates and made.data
        else f"training rows   {rows}",
        f"one step        {_step(made)}",
        f"placement       {counted(place.slots, 'trial')} at once, each {each}; "
        f"{counted(place.waves, 'wave')} if none were cut; limited by {place.limited_by}",
        f"strategy        {made.strategy}",
        *([f"number format   {made.number_formats}"] if made.number_formats else []),
    ]
    search = made.job.search
    if made.command == "sweep" and search and search.scheduler.type == "asha":
        saved = 1 - made.expected_samples / max(1, made.worst_samples)
        lines.append(
            f"ASHA            rungs at {made.rung_levels} {search.scheduler.time_attr} (steps {made.rung_steps}), "
            f"the best 1/{search.scheduler.reduction_factor} go on"
        )
        lines.append(
            f"cost            {made.expected_samples:,} rows expected, {made.worst_samples:,} if nothing were cut: "
            f"ASHA saves {saved:.0%}"
        )
    else:
        lines.append(f"cost            {made.worst_samples:,} rows over {counted(total, 'trial')}")
    if made.memory:
        parts = ", ".join(f"{name} {gib:.2f}" for name, gib in made.memory.components.items() if round(gib, 2))
        lines.append(
            f"memory          {made.memory.low:.1f} / {made.memory.expected:.1f} / {made.memory.high:.1f} GiB of "
            f"{made.memory.of} (low / expected / high): {parts}"
        )
    else:
        lines.append("memory          not known: the model's config is not on this machine, or is of a kind not known")
    if made.checkpoint_gb is not None:
        lines.append(
            f"checkpoints     {1000 * made.checkpoint_gb:,.0f} MB for the trials that run at once, at least every "
            f"{made.job.train.checkpoint_minutes:g} minutes; the one before is kept beside it"
        )
    return lines
