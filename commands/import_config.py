"""`lorafleet import`: a job file from another tool's config."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from lorafleet.commands.common import DEFAULT_RUNS, AnyRuns, say, tell

if TYPE_CHECKING:
    from lorafleet.jobs.loading.import_peft_comparison import Experiment
    from lorafleet.jobs.loading.importers import Translation


class Tool(StrEnum):
    """Tools whose configs are read."""

    AXOLOTL = "axolotl"
    LLAMAFACTORY = "llamafactory"
    PEFT_COMPARISON = "peft-comparison"
    TRL = "trl"
    WANDB = "wandb"


_STAND_INS = {
    "task": "classification",
    "model": {"model_name_or_path": "asset:minilm-l6", "max_length": 128},
    "data": {"dataset_name": "asset:rotten-tomatoes"},
}
"""Model and data of a sweep file, which names none."""


def import_config(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help=(
                "Config of the other tool. With --from peft-comparison: folders of experiments, "
                "each of which becomes an arm."
            ),
            show_default=False,
        ),
    ],
    source: Annotated[Tool, typer.Option("--from", help="Which tool wrote it.")],
    name: Annotated[str, typer.Option(help="Name of the job.")] = "imported",
    job: Annotated[
        Path | None,
        typer.Option("--job", metavar="JOB.yaml", help="With --from wandb: the job that is to be searched."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; printed if left out.")] = None,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Translate a config into a job file, and say what is not carried over or is done otherwise."""
    import yaml
    from lorafleet.jobs import files
    from lorafleet.jobs.errors import JobFileError, UserError
    from lorafleet.jobs.loading.import_peft_comparison import translate_experiments
    from lorafleet.jobs.loading.import_sweep import translate_sweep
    from lorafleet.jobs.loading.importers import translate, without_refused
    from lorafleet.jobs.loading.job_file import load_text

    file = inputs[0]
    if len(inputs) > 1 and source is not Tool.PEFT_COMPARISON:
        raise UserError(f"one config at a time: {inputs[1]} is too many (only --from peft-comparison takes several)")
    if job is not None and output is not None and job.absolute().parent != output.absolute().parent:
        raise UserError(f"--output is {output}, but must be in the folder of --job {job}: its paths start there")
    if job is not None and source is not Tool.WANDB:
        raise UserError(f"--job goes with --from wandb; a config of {source.value} names its own model and data")
    if source is Tool.WANDB:
        made = translate_sweep(_read(file), name)
        _put_on(made, job, file)
    elif source is Tool.PEFT_COMPARISON:
        made = translate_experiments([_read_experiment(path) for path in inputs], name)
    else:
        made = translate(source, _read(file), name)
    folder = (job or output or Path("job.yaml")).parent
    while True:
        body = yaml.safe_dump(made.tree, sort_keys=False, allow_unicode=True)
        try:
            load_text(body, folder / "job.yaml")
            break
        except JobFileError as error:
            if not without_refused(made, [(problem.path, problem.sentence) for problem in error.problems]):
                wrong = "; ".join([*(problem.sentence for problem in error.problems), *made.lost])
                raise UserError(f"{file} makes a job that cannot run: {wrong}") from None
    said = [("not carried over", made.lost), ("assumed", made.assumed), ("differs", made.otherwise)]
    text = f"# Translated from {file.name} ({source.value}).\n"
    text += "".join(f"# {what.capitalize()}: {line}\n" for what, lines in said for line in lines) + body
    for what, lines in said:
        for line in lines:
            say(f"{what}: {line}")
    if made.dropped:
        say(f"without meaning here: {', '.join(made.dropped)}")
    if output is None:
        tell(text, nl=False)
    elif output.exists():
        raise UserError(f"{output} exists already; --output names another")
    else:
        files.write_text(output, text)
        tell(str(output))


_EXPERIMENT_FILES = ("adapter_config.json", "training_params.json")
_DEFAULT_PARAMS_FILE = "default_training_params.json"
_PARENTS_WITH_DEFAULTS = 3
"""Folders above an experiment that may hold the defaults: METHOD, experiments, MetaMathQA."""


def _read_experiment(path: Path) -> Experiment:
    """Read an experiment of the PEFT comparison from its folder, or from the folder of one of its files.

    Raises:
        UserError: Neither file is there.
        JobFileError: A file cannot be read.
    """
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.import_peft_comparison import DEFAULT_TRAINING_PARAMS, Experiment

    folder = (path.parent if path.name in _EXPERIMENT_FILES else path).absolute()
    adapter, training = (folder / name for name in _EXPERIMENT_FILES)
    if not adapter.is_file() and not training.is_file():
        raise UserError(f"{path} has neither {_EXPERIMENT_FILES[0]} nor {_EXPERIMENT_FILES[1]}: it is no experiment")
    defaults = DEFAULT_TRAINING_PARAMS
    for parent in [*folder.parents][:_PARENTS_WITH_DEFAULTS]:
        if (parent / _DEFAULT_PARAMS_FILE).is_file():
            defaults = {**defaults, **_read(parent / _DEFAULT_PARAMS_FILE)}
            break
    return Experiment(
        name=folder.name,
        adapter_config=_read(adapter) if adapter.is_file() else None,
        training_params=_read(training) if training.is_file() else {},
        defaults=defaults,
    )


def _read(file: Path) -> dict[str, Any]:
    """Return the blocks of a YAML file. Raises JobFileError."""
    from lorafleet.jobs.errors import JobFileError, Problem
    from lorafleet.jobs.loading import yaml12
    from lorafleet.jobs.loading.job_file import read_text

    document = yaml12.read(read_text(file))
    if document.problems:
        raise JobFileError(str(file), document.problems)
    if not isinstance(document.value, dict):
        raise JobFileError(str(file), [Problem("", "a config is a block of keys")])
    return document.value


def _put_on(made: Translation, job: Path | None, file: Path) -> None:
    """Add what a sweep file does not say: the job that it searches, or a stand-in.

    Raises UserError where nothing of the sweep is left to search.
    """
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.job_file import load_job
    from lorafleet.jobs.schema import field_paths as fields

    if not fields.get(made.tree, "search.parameters"):
        lost = f" ({'; '.join(made.lost)})" if made.lost else ""
        raise UserError(f"{file}: none of its parameters is a field of a job, so there is nothing to search{lost}")
    if job is not None:
        load_job(job)  # what is wrong in it is its own
        own = _read(job)
        if own.get("search"):
            made.otherwise.append(f"the search block of {job} is replaced by the sweep's")
        made.tree = _laid_over(own | {"search": {}}, {key: value for key, value in made.tree.items() if key != "name"})
        return
    made.assumed.append("model and data: a sweep file has none, and those of the quickstart stand in (see --job)")
    made.tree = _laid_over(_STAND_INS, made.tree)
    made.tree = {"name": made.tree.pop("name"), **made.tree}


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return two trees as one; `above` wins."""
    both = dict(below)
    for key, value in above.items():
        inner = both.get(key)
        both[key] = _laid_over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both
