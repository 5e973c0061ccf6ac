"""`lorafleet evaluate`: adapters, models and runs on the same rows, in one table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from lorafleet.commands.common import (
    DEFAULT_RUNS,
    Chain,
    Format,
    Nodes,
    On,
    Output,
    Quiet,
    Runs,
    Trust,
    backend_for,
    confirm_trust,
    options_blamed,
    say,
    tell,
)
from lorafleet.commands.sweep import Detach, Wait

if TYPE_CHECKING:
    from lorafleet.cluster.backend import Cluster
    from lorafleet.jobs.loading.evaluate_job import Given
    from lorafleet.jobs.loading.job_file import LoadedJob
    from lorafleet.jobs.runs.run import Run
    from lorafleet.jobs.schema.job import JobSpec

What = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL... [KEY=VALUE]...",
        help="Runs (RUN, RUN:TRIAL), folders of adapters or models, hub ids, asset:NAME; and fields to set.",
        show_default=False,
    ),
]
ByJob = Annotated[
    Path | None,
    typer.Option("--job", metavar="JOB.yaml", help="The task, rows and metrics; left out: those of the first run."),
]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="FILE", help="Rows to judge by, instead of the job's test rows.")
]
Measured = Annotated[
    bool, typer.Option("--measure", help="Measure speed and memory too, each model in processes of its own.")
]


def evaluate(
    what: What,
    job: ByJob = None,
    data: Data = None,
    measure: Measured = False,
    runs: Runs = DEFAULT_RUNS,
    on: On = None,
    nodes: Nodes = None,
    chain: Chain = None,
    quiet: Quiet = False,
    output: Output = Format.TEXT,
    detach: Detach = False,
    wait: Wait = False,
    trust: Trust = False,
) -> None:
    """Judge adapters, models and runs on the same rows: one base stays loaded, and adapters come and go."""
    from lorafleet.cluster.fetch import fetch_job
    from lorafleet.cluster.planning.preflight import check_names
    from lorafleet.commands.watch import follow

    loaded = _job(what, job, data, runs, rounds=2 if measure else 0, trust=trust)
    backend = backend_for(on, nodes, chain)
    with options_blamed():
        check_names(loaded)
    told = say if not quiet else lambda _: None
    if on is None:
        fetch_job(loaded.job, told)
    else:  # there is no job file with which a user could
        cast("Cluster", backend).provide(loaded.job, told)
    run = backend.submit(backend.plan(loaded, "compare"), loaded, backend.runs_dir(runs))
    if detach:
        tell(run.id)
        return
    follow(run, backend, quiet=quiet, output=output, silent=wait)


def _job(what: list[str], job: Path | None, data: Path | None, runs: Path, *, rounds: int, trust: bool) -> LoadedJob:
    """A job whose comparison has each model as an arm that trains nothing."""
    from lorafleet.evaluation.report.search import job_here
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.evaluate_job import Given, check_base, named
    from lorafleet.jobs.loading.job_file import load_derived, load_job, set_of

    overrides = [word for word in what if "=" in word]
    found = [_model(word, runs, trust=trust) for word in what if "=" not in word]
    if not found:
        raise UserError("evaluate has nothing to judge: name runs, folders of adapters or models, or hub ids")
    if job is not None:
        base = load_job(job, tuple(overrides)).job
    else:
        first = next((run for _, run in found if run is not None), None)
        if first is None:
            raise UserError("--job JOB.yaml is missing: it says what task, rows and metrics; only a run brings its own")
        base = job_here(first)
    labels = class_order([run for _, run in found if run is not None], base)
    check_prompts([run for _, run in found if run is not None], base)
    for model, _ in found:
        check_base(model, base)
    rows = set_of(base)["data"]
    if data is not None:
        _check_data(data)
        rows["test_file"] = str(data.absolute())
        rows.pop("max_test_samples", None)
    if labels and base.data.labels is None:
        rows["labels"] = labels
    alone = [Given("base", {"method": "base"})] if len(found) == 1 else []
    arms = named([model for model, _ in found] + alone)
    metric = base.metric.model_dump()
    compare = {"arms": arms, "inference": {"rounds": rounds}, "rule": "best", "metric": metric}
    own = () if job is not None else tuple(overrides)
    with options_blamed():
        return load_derived(base, "evaluate", {"data": rows, "compare": compare}, own)


def _check_data(path: Path) -> None:
    """Raise UserError where --data names no file of rows."""
    from lorafleet.jobs import files
    from lorafleet.jobs.data.data_files import DATA_SUFFIXES, data_suffix
    from lorafleet.jobs.errors import UserError

    if not path.is_file():
        raise UserError(f"--data is {path}, but {files.no_file(path)}")
    if data_suffix(path) is None:
        raise UserError(f"--data is {path}, but must end in one of {', '.join(DATA_SUFFIXES)}")


def class_order(runs: list[Run], job: JobSpec) -> list[str]:
    """The classes in the order in which the runs' heads have them. Raises UserError where they differ."""
    from lorafleet.jobs import files
    from lorafleet.jobs.errors import UserError

    if job.task != "classification":
        return []
    known = {run.id: files.read_json(run.path / "facts.json").get("labels") for run in runs}
    wanted, owner = list(job.data.labels or []), "the job's data.labels"
    for name, labels in known.items():
        if labels and wanted and labels != wanted:
            raise UserError(
                f"the classes of {name} are {', '.join(labels)} in this order, but {owner} are {', '.join(wanted)}: "
                "they cannot be judged in one table"
            )
        if labels and not wanted:
            wanted, owner = labels, f"those of {name}"
    return wanted


_PROMPT_FIELDS = ("chat_template", "chat_template_kwargs", "system_prompt")


def check_prompts(runs: list[Run], job: JobSpec) -> None:
    """Raise UserError for runs that were trained with other prompts than the job would ask them with."""
    from lorafleet.evaluation.report.search import run_job
    from lorafleet.jobs.errors import UserError

    if not job.generates:
        return
    for run in runs:
        trained = run_job(run).data
        for name in _PROMPT_FIELDS:
            if getattr(trained, name) != getattr(job.data, name):
                raise UserError(
                    f"{run.id} was trained with another data.{name} than the job asks with: its answers would not be "
                    f"those of its training. Evaluate it alone: `lorafleet evaluate {run.id}`"
                )


def _model(word: str, runs: Path, *, trust: bool) -> tuple[Given, Run | None]:
    """(the model that a word names, the run that it is from)."""
    from lorafleet.cluster.run_index import find_run
    from lorafleet.evaluation.report.model_of_run import shipped
    from lorafleet.evaluation.report.search import run_job
    from lorafleet.jobs.loading.evaluate_job import is_model_name, of_arm, of_folder, of_model, of_run

    folder = Path(word).expanduser()
    if folder.is_dir() and not (folder / "status.json").is_file():
        return of_folder(folder), None
    if is_model_name(word) and not folder.is_dir():
        return of_model(word), None
    name, _, trial_id = word.partition(":")
    run = find_run(runs, name)
    confirm_trust(run, "evaluate", trust=trust)
    found = shipped(run, trial_id)
    if found.arm and found.untrained:
        return of_arm(found.run, run_job(found.run), found.arm, found.weights), found.run
    assert found.trial_id is not None
    assert found.weights is not None
    return _on_its_base(of_run(found.run, found.trial_id, found.weights), found.run), found.run


def _on_its_base(model: Given, run: Run) -> Given:
    """A model whose base is named as the machine here has it, and not as the run's own machines had."""
    from lorafleet.evaluation.report.search import job_here, run_job

    there, here = (job.model.model_name_or_path for job in (run_job(run), job_here(run)))
    own = model.arm.get("set", {})
    if there == here or own.get(_BASE) != there:
        return model
    return replace(model, arm={**model.arm, "set": {**own, _BASE: here}})


_BASE = "model.model_name_or_path"
