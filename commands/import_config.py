"""`lorafleet import`: create a job file from another tool's config."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafleet.commands.common import DEFAULT_RUNS, AnyRuns, print_message, print_text

if TYPE_CHECKING:
    from lorafleet.jobs.loading.import_peft_comparison import Experiment
    from lorafleet.jobs.loading.importers import Translation


class Tool(StrEnum):
    """Tools whose configs can be imported."""

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
"""Task, model and data for a sweep file, which names none."""


def import_config(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help=(
                "Config file of the other tool. With --from peft-comparison: folders of "
                "experiments; each becomes an arm."
            ),
            show_default=False,
        ),
    ],
    source: Annotated[
        Tool, typer.Option("--from", help="The tool that the config was written for.")
    ],
    name: Annotated[str, typer.Option(help="Name of the job.")] = "imported",
    job: Annotated[
        Path | None,
        typer.Option(
            "--job",
            metavar="JOB.yaml",
            help="With --from wandb: the job file that the sweep searches.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. Default: print the job file."),
    ] = None,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Translate another tool's config into a job file.

    Prints what is not carried over, what is assumed and what differs.
    """

    from lorafleet.jobs import files
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.import_peft_comparison import translate_experiments
    from lorafleet.jobs.loading.import_sweep import translate_sweep
    from lorafleet.jobs.loading.importers import translate_config

    _check_options(inputs, source, job, output)
    file = inputs[0]
    if source is Tool.WANDB:
        translation = translate_sweep(_read_blocks(file), name)
        _complete_translation(translation, job, file)
    elif source is Tool.PEFT_COMPARISON:
        translation = translate_experiments([_read_experiment(path) for path in inputs], name)
    else:
        translation = translate_config(source, _read_blocks(file), name)
    folder = (job or output or Path("job.yaml")).parent
    body = _render_valid_job(translation, folder / "job.yaml", file)
    remarks = [
        ("not translated", translation.lost),
        ("assumed", translation.assumed),
        ("differs", translation.otherwise),
    ]
    text = f"# Translated from {file.name} ({source.value}).\n"
    text += (
        "".join(
            f"# {category.capitalize()}: {line}\n" for category, lines in remarks for line in lines
        )
        + body
    )
    for category, lines in remarks:
        for line in lines:
            print_message(f"{category}: {line}")
    if translation.dropped:
        print_message(f"ignored, no meaning in lorafleet: {', '.join(translation.dropped)}")
    if output is None:
        print_text(text, nl=False)
    elif output.exists():
        raise UserError(f"{output} exists already: name another file with --output")
    else:
        files.write_text(output, text)
        print_text(str(output))


_EXPERIMENT_FILES = ("adapter_config.json", "training_params.json")
_DEFAULT_PARAMS_FILE = "default_training_params.json"
_PARENTS_WITH_DEFAULTS = 3
"""Folder levels above an experiment that may hold the defaults: METHOD, experiments, MetaMathQA."""


def _check_options(inputs: list[Path], source: Tool, job: Path | None, output: Path | None) -> None:
    """Raise UserError for options that do not go together."""
    from lorafleet.jobs.errors import UserError

    if len(inputs) > 1 and source is not Tool.PEFT_COMPARISON:
        raise UserError(
            f"only one config can be imported at a time, but {inputs[1]} was also named (only "
            "--from peft-comparison takes several)"
        )
    if job is not None and output is not None and job.absolute().parent != output.absolute().parent:
        raise UserError(
            f"--output is {output}, but must be in the folder of --job {job}: paths in the job "
            "file are relative to that folder"
        )
    if job is not None and source is not Tool.WANDB:
        raise UserError(
            f"--job is used only with --from wandb; a config of {source.value} names its own model "
            "and data"
        )


def _render_valid_job(translation: Translation, path: Path, file: Path) -> str:
    """Return the text of the translated job, without the values that a job refuses.

    Args:
        path: Where the job file would be; its relative paths start there.
        file: The imported config, for the error message.

    Raises:
        UserError: No job can be made of the config.
    """
    import yaml

    from lorafleet.jobs.errors import JobFileError, UserError
    from lorafleet.jobs.loading.importers import drop_refused_fields
    from lorafleet.jobs.loading.job_file import load_text

    # A value that is valid in the other tool may be invalid here. Refused fields are dropped one
    # round after another, and listed, until the rest is a valid job.
    while True:
        body = yaml.safe_dump(translation.tree, sort_keys=False, allow_unicode=True)
        try:
            load_text(body, path)
            return body
        except JobFileError as error:
            if not drop_refused_fields(
                translation, [(problem.path, problem.sentence) for problem in error.problems]
            ):
                problems = "; ".join(
                    [*(problem.sentence for problem in error.problems), *translation.lost]
                )
                raise UserError(f"{file} translates to a job that cannot run: {problems}") from None


def _read_experiment(path: Path) -> Experiment:
    """Read an experiment of the PEFT comparison from its folder or one of its files.

    Raises:
        UserError: The folder has neither file.
        JobFileError: A file cannot be read.
    """
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.import_peft_comparison import DEFAULT_TRAINING_PARAMS, Experiment

    folder = (path.parent if path.name in _EXPERIMENT_FILES else path).absolute()
    adapter, training = (folder / name for name in _EXPERIMENT_FILES)
    if not adapter.is_file() and not training.is_file():
        raise UserError(
            f"{path} has neither {_EXPERIMENT_FILES[0]} nor {_EXPERIMENT_FILES[1]}, so it is not "
            "an experiment"
        )
    defaults = DEFAULT_TRAINING_PARAMS
    for parent in [*folder.parents][:_PARENTS_WITH_DEFAULTS]:
        if (parent / _DEFAULT_PARAMS_FILE).is_file():
            defaults = {**defaults, **_read_blocks(parent / _DEFAULT_PARAMS_FILE)}
            break
    return Experiment(
        name=folder.name,
        adapter_config=_read_blocks(adapter) if adapter.is_file() else None,
        training_params=_read_blocks(training) if training.is_file() else {},
        defaults=defaults,
    )


def _read_blocks(file: Path) -> dict[str, Any]:
    """Return the top-level blocks of a YAML file. Raises JobFileError.

    Read with YAML 1.2 like job files, so `1e-4` is a number and `no` is a text. JSON is
    read too.
    """
    from lorafleet.jobs import yaml12
    from lorafleet.jobs.errors import JobFileError, Problem
    from lorafleet.jobs.loading.job_file import read_text

    document = yaml12.parse_document(read_text(file))
    if document.problems:
        raise JobFileError(str(file), document.problems)
    if not isinstance(document.value, dict):
        raise JobFileError(
            str(file), [Problem("", "a config must be a block of keys (`key: value`)")]
        )
    return document.value


def _complete_translation(translation: Translation, job: Path | None, file: Path) -> None:
    """Add what a sweep file lacks: the job that it searches, or a stand-in task, model and data.

    Raises:
        UserError: No parameter of the sweep is a field of a job, so there is nothing to search.
    """
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.job_file import load_job
    from lorafleet.jobs.schema import field_paths as fields

    if not fields.get_value(translation.tree, "search.parameters"):
        lost = f" ({'; '.join(translation.lost)})" if translation.lost else ""
        raise UserError(
            f"{file}: none of its parameters is a field of the job file, so there is nothing to "
            f"search{lost}"
        )
    if job is not None:
        load_job(job)  # report the job's own errors first, with its line numbers
        job_tree = _read_blocks(job)
        if job_tree.get("search"):
            translation.otherwise.append(
                f"the search block of {job} is replaced by that of the sweep"
            )
        translation.tree = _merge_trees(
            job_tree | {"search": {}},
            {key: value for key, value in translation.tree.items() if key != "name"},
        )
        return
    translation.assumed.append(
        "model and data: a sweep file names none, so those of the quickstart are used (name your "
        "job with --job)"
    )
    translation.tree = _merge_trees(_STAND_INS, translation.tree)
    translation.tree = {"name": translation.tree.pop("name"), **translation.tree}


def _merge_trees(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two trees; values of `above` win.

    Blocks are merged key by key; lists and other values are replaced as a whole.
    """
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = (
            _merge_trees(inner, value)
            if isinstance(inner, dict) and isinstance(value, dict)
            else value
        )
    return merged
