"""`lorafleet evaluate`: compare adapters, models and runs on the same rows in one table.

An evaluation is a comparison whose arms train nothing. It has a run folder and a driver
like any other, so intervals, reports and ratings come from the same code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from lorafleet.commands.common import (
    Trust,
    confirm_trust,
    get_backend,
    print_message,
    print_text,
    report_option_errors,
)
from lorafleet.commands.options import LaunchOptions
from lorafleet.commands.plan import PlanFormat, show_plan
from lorafleet.jobs.text import format_count

if TYPE_CHECKING:
    from lorafleet.cluster.backend import Backend, Cluster
    from lorafleet.jobs.loading.evaluate_job import ModelArm
    from lorafleet.jobs.loading.job_file import LoadedJob
    from lorafleet.jobs.runs.run import Run
    from lorafleet.jobs.schema.job import JobSpec

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL... [KEY=VALUE]...",
        help="Runs (RUN, RUN:TRIAL), folders of adapters or models, hub ids or asset:NAME, and "
        "fields to set.",
        show_default=False,
    ),
]
JobFile = Annotated[
    Path | None,
    typer.Option(
        "--job",
        metavar="JOB.yaml",
        help="Job file with the task, rows and metrics. Default: the job of the first run.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="FILE", help="Rows to evaluate on, instead of the job's test rows."
    ),
]
Measured = Annotated[
    bool,
    typer.Option(
        "--measure", help="Also measure speed and memory, each model in its own processes."
    ),
]


def evaluate(
    what: Models,
    options: LaunchOptions,
    job: JobFile = None,
    data: Data = None,
    measure: Measured = False,
    trust: Trust = False,
) -> None:
    """Evaluate adapters, models and runs on the same rows.

    One base model stays loaded while adapters are swapped.
    """
    from lorafleet.cluster.fetch import fetch_job
    from lorafleet.cluster.planning.preflight import check_names
    from lorafleet.commands.watch import follow
    from lorafleet.jobs.data.rows import forget_rows

    loaded = _derive_job(what, job, data, options.runs, rounds=2 if measure else 0, trust=trust)
    backend = get_backend(options.on, options.nodes, options.chain)
    with report_option_errors():
        check_names(loaded)
    if options.dry_run:
        _show_plan(backend, loaded, options)
        return
    report_progress = print_message if not options.quiet else lambda _: None
    if options.on is None:
        fetch_job(loaded.job, report_progress)
    else:  # upload now: there is no job file that a user could `fetch`
        cast("Cluster", backend).upload_inputs(loaded.job, report_progress)
    plan = backend.plan(loaded, "compare")
    run = backend.submit(plan, loaded, backend.resolve_runs_dir(options.runs))
    forget_rows()  # waiting for the run needs no rows
    if options.detach:
        print_text(run.id)
        return
    follow(run, backend, quiet=options.quiet, output=options.output, silent=options.wait)


def _show_plan(backend: Backend, loaded: LoadedJob, options: LaunchOptions) -> None:
    from lorafleet.cluster.remote.backend import RemoteBackend

    job_plan, uploads = backend.plan(loaded, "compare"), []
    if isinstance(backend, RemoteBackend):
        uploads = backend.list_invisible_paths(job_plan.job)
    if uploads:  # by the submission
        note = f"{format_count(len(uploads), 'input')} would be uploaded"
        job_plan = job_plan.model_copy(update={"notes": [*job_plan.notes, note]})
    show_plan(backend, job_plan, options.runs, PlanFormat(options.output.value), ignored=uploads)


def _derive_job(
    inputs: list[str], job: Path | None, data: Path | None, runs: Path, *, rounds: int, trust: bool
) -> LoadedJob:
    """Return a job that compares each model as an arm that trains nothing.

    The task, rows and metrics come from `job`, else from the first run among `inputs`. A single
    model is compared with its untrained base.

    Args:
        inputs: Models, and overrides such as KEY=VALUE.
        data: Rows that replace the job's test rows.
        rounds: Rounds of the speed and memory measurement; 0 to skip it.
    """
    from lorafleet.evaluation.report.search import load_local_job
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.evaluate_job import ModelArm, check_base, name_arms
    from lorafleet.jobs.loading.job_file import get_set_fields, load_derived, load_job

    overrides = [argument for argument in inputs if "=" in argument]
    models = [
        _resolve_model(argument, runs, trust=trust) for argument in inputs if "=" not in argument
    ]
    if not models:
        raise UserError(
            "evaluate has no model to evaluate: name runs, folders of adapters or models, or hub "
            "ids"
        )
    if job is not None:
        base = load_job(job, tuple(overrides)).job
    else:
        first = next((run for _, run in models if run is not None), None)
        if first is None:
            raise UserError(
                "--job JOB.yaml is missing: it sets the task, the rows and the metrics. Only a run "
                "can be evaluated without it"
            )
        base = load_local_job(first)
    labels = resolve_class_order([run for _, run in models if run is not None], base)
    check_prompts([run for _, run in models if run is not None], base)
    for model, _ in models:
        check_base(model, base)
    # Only fields that were set: a default that is written out would count as the user's wish.
    rows = get_set_fields(base)["data"]
    if data is not None:
        _check_data(data)
        rows["test_file"] = str(data.absolute())
        # A limit for the job's own test rows says nothing of the rows that the user names.
        rows.pop("max_test_samples", None)
    # New rows may have fewer classes or another order than those that the heads were trained on.
    if labels and base.data.labels is None:
        rows["labels"] = labels
    # A single score means little; the base shows what the training has changed.
    baseline = [ModelArm("base", {"method": "base"})] if len(models) == 1 else []
    arms = name_arms([model for model, _ in models] + baseline)
    metric = base.metric.model_dump()
    compare = {"arms": arms, "inference": {"rounds": rounds}, "rule": "best", "metric": metric}
    extra_overrides = () if job is not None else tuple(overrides)
    with report_option_errors():
        return load_derived(base, "evaluate", {"data": rows, "compare": compare}, extra_overrides)


def _check_data(path: Path) -> None:
    """Raise UserError if --data is not a file of rows.

    The loader would name the job's field `data.test_file`, which the user has not written.
    """
    from lorafleet.jobs import files
    from lorafleet.jobs.data.data_files import DATA_SUFFIXES, get_data_suffix
    from lorafleet.jobs.errors import UserError

    if not path.is_file():
        raise UserError(f"--data is {path}, but {files.describe_non_file(path)}")
    if get_data_suffix(path) is None:
        raise UserError(f"--data is {path}, but must end in one of {', '.join(DATA_SUFFIXES)}")


def resolve_class_order(runs: list[Run], job: JobSpec) -> list[str]:
    """Return the classes in the order of the runs' heads; empty for tasks that generate text.

    Raises:
        UserError: Two runs, or a run and the job, have different classes or another order.
    """
    from lorafleet.jobs.errors import UserError

    if job.task != "classification":
        return []
    labels_by_run = {run.id: run.read_metadata().labels for run in runs}
    expected, source = list(job.data.labels or []), "the job's data.labels"
    for name, labels in labels_by_run.items():
        if labels and expected and labels != expected:
            raise UserError(
                f"the classes of {name} are {', '.join(labels)} in this order, but {source} are "
                f"{', '.join(expected)}: models with different classes cannot be compared in one "
                "table. Evaluate them one by one"
            )
        if labels and not expected:
            expected, source = labels, f"those of {name}"
    return expected


_PROMPT_FIELDS = ("chat_template", "chat_template_kwargs", "system_prompt")


def check_prompts(runs: list[Run], job: JobSpec) -> None:
    """Raise UserError if a run was trained with prompts other than the job's.

    Chat template, its variables and the system message are compared. Classifiers have no
    prompts.
    """
    from lorafleet.evaluation.report.search import load_run_job
    from lorafleet.jobs.errors import UserError

    if not job.is_generative:
        return
    for run in runs:
        trained = load_run_job(run).data
        for name in _PROMPT_FIELDS:
            if getattr(trained, name) != getattr(job.data, name):
                raise UserError(
                    f"{run.id} was trained with a data.{name} that differs from the job's, so its "
                    "answers would differ from those in training. Evaluate it alone: `lorafleet "
                    f"evaluate {run.id}`"
                )


def _resolve_model(argument: str, runs: Path, *, trust: bool) -> tuple[ModelArm, Run | None]:
    """Return (the model that an argument names, the run it comes from or None).

    Args:
        argument: RUN, RUN:TRIAL, a folder, a hub id or asset:NAME.

    Raises:
        UserError: The argument names nothing that can be evaluated.
    """
    from lorafleet.cluster.run_index import find_run
    from lorafleet.evaluation.report.model_of_run import select_model
    from lorafleet.evaluation.report.search import load_run_job
    from lorafleet.jobs.loading.evaluate_job import (
        is_model_name,
        make_compared_arm,
        make_folder_arm,
        make_model_arm,
        make_run_arm,
    )

    # A folder with status.json is a run; any other folder is an adapter or a model.
    folder = Path(argument).expanduser()
    if folder.is_dir() and not (folder / "status.json").is_file():
        return make_folder_arm(folder), None
    if is_model_name(argument) and not folder.is_dir():
        return make_model_arm(argument), None
    name, _, trial_id = argument.partition(":")
    run = find_run(runs, name)
    confirm_trust(run, "evaluate", trust=trust)
    selected = select_model(run, trial_id)
    if selected.arm and selected.untrained:
        return make_compared_arm(
            selected.run, load_run_job(selected.run), selected.arm, selected.weights
        ), selected.run
    assert selected.trial_id is not None
    assert selected.weights is not None
    return _use_local_base(
        make_run_arm(selected.run, selected.trial_id, selected.weights), selected.run
    ), selected.run


def _use_local_base(model: ModelArm, run: Run) -> ModelArm:
    """Return a model whose base is named as on this machine.

    A run on a cluster may name the base by a path of the cluster's machines.
    """
    from lorafleet.evaluation.report.search import load_local_job, load_run_job

    run_base, local_base = (
        job.model.model_name_or_path for job in (load_run_job(run), load_local_job(run))
    )
    settings = model.arm.get("set", {})
    if run_base == local_base or settings.get(_BASE_FIELD) != run_base:
        return model
    return replace(model, arm={**model.arm, "set": {**settings, _BASE_FIELD: local_base}})


_BASE_FIELD = "model.model_name_or_path"
