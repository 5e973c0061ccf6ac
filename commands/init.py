"""`lorafleet init`: write a commented job file for the user's own data.

It guesses columns from usual names and lengths from the model, and loads the result
before it writes it. With --site it writes a site file from what the cluster reports.
"""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.commands.common import (
    DEFAULT_RUNS,
    AnyRuns,
    print_message,
    print_text,
    report_option_errors,
)

if TYPE_CHECKING:
    from lorafleet.jobs.data.rows import Rows
    from lorafleet.jobs.schema.job import JobSpec


class TaskName(StrEnum):
    """Tasks that `init` can write a job file for."""

    CLASSIFICATION = "classification"
    GENERATION = "generation"
    SUMMARIZATION = "summarization"


_MODELS = {
    "classification": "asset:minilm-l6",
    "generation": "asset:smollm2-135m-instruct",
    "summarization": "asset:smollm2-135m-instruct",
}
_OPTIONS = {
    "data.train_file": "--train-file",
    "data.validation_file": "--validation-file",
    "data.test_file": "--test-file",
    "model.model_name_or_path": "--model",
    "name": "--name",
}
"""Job field -> the option it comes from."""
_BATCH = {"classification": 16, "generation": 4, "summarization": 4}
_LENGTH = {"classification": 256, "generation": 512, "summarization": 1024}
_PROMPTS = ("prompt", "question", "input", "source")
_ANSWERS = ("completion", "answer", "response", "output", "target")
_DOCUMENTS = ("document", "article", "dialogue", "text", "content", "report")
_SUMMARIES = ("summary", "highlights", "abstract", "headline")


class SiteKind(StrEnum):
    """Kinds of cluster that `init` can write a site file for."""

    SLURM = "slurm"
    KUBERNETES = "kubernetes"


def init(
    train_file: Annotated[
        Path | None,
        typer.Option(
            help="Your training rows: .jsonl, .json, .csv, .tsv, .parquet (or .gz, .zst)."
        ),
    ] = None,
    task: Annotated[TaskName, typer.Option(help="Task to train for.")] = TaskName.CLASSIFICATION,
    validation_file: Annotated[
        Path | None, typer.Option(help="Rows for choosing among configurations.")
    ] = None,
    test_file: Annotated[
        Path | None, typer.Option(help="Held-out rows, used once for the final score.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model: hub id, folder or asset:NAME.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column with the text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the class.")] = None,
    prompt_column: Annotated[
        str | None,
        typer.Option(help="Column with the prompt (generation), or the long text (summarization)."),
    ] = None,
    completion_column: Annotated[
        str | None,
        typer.Option(
            help="Column with the answer (generation), or the short text (summarization)."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the job.")] = "my-job",
    site: Annotated[
        SiteKind | None,
        typer.Option(
            help="Write a site file instead: for the Slurm cluster of this login node, or for a "
            "Kubernetes namespace."
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="For the site file: context of the kubeconfig. Default: the current one."
        ),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            help="For the site file: Slurm partition. Default: the cluster's default partition."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write.", show_default="job.yaml"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Inspect your data and write a commented job file that trains on it.

    With --site, write a cluster's site file instead.
    """
    from lorafleet.cluster.planning.preflight import check_names
    from lorafleet.jobs import files
    from lorafleet.jobs.data.rows import load_rows
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.job_file import load_text

    if site is not None:
        return _write_site_file(site, partition, context, output, force)
    if train_file is None:
        raise UserError(
            "--train-file is missing: name your training rows (or use --site to write a cluster's "
            "site file)"
        )
    output = output or Path("job.yaml")
    if output.is_dir():
        raise UserError(f"--output is {output}, which is a folder; name a file in it")
    if output.exists() and not force:
        raise UserError(
            f"{output} exists already: overwrite it with --force, or name another file with "
            "--output"
        )
    requested_columns = {
        "text_column": text_column,
        "label_column": label_column,
        "prompt_column": prompt_column,
        "completion_column": completion_column,
    }
    columns = _resolve_columns(train_file, task, requested_columns)
    data = {"train_file": train_file, "validation_file": validation_file, "test_file": test_file}
    base = _make_model_relative(model, output) if model else _MODELS[task]
    render_text = partial(_render_job_file, name, task, base, data, columns, output)
    with report_option_errors(_OPTIONS):
        # Rendered twice: the model's positions are known only after the job has been read once.
        length = _compute_max_length(task, load_text(render_text(_LENGTH[task], ""), output).job)
        loaded = load_text(render_text(length, ""), output)
        check_names(loaded)
    rows = load_rows(loaded.job)
    for warning in rows.warnings:
        print_message(f"note: {warning}")
    counts = (
        f"{len(rows.train):,} training, {len(rows.validation):,} validation, {len(rows.test):,} "
        "test rows"
    )
    if rows.labels:
        counts += f"; {len(rows.labels)} labels"
    text = render_text(
        length, counts, _compute_max_t(_count_examples(loaded.job, rows), loaded.job)
    )
    # The final text is loaded once more: a file that `init` wrote must never be invalid.
    load_text(text, output)
    files.write_text(output, text)
    print_text(f"{output}  ({counts})")
    print_text(
        f"next: lorafleet plan {output}; lorafleet train {output} (one configuration); lorafleet "
        f"sweep {output}"
    )
    return None


def _write_site_file(
    kind: SiteKind, partition: str | None, context: str | None, output: Path | None, force: bool
) -> None:
    """Query the cluster and write a site file for it.

    Without `output` the file goes to the user's site folder, under the cluster's name.
    """
    import tempfile

    from lorafleet.jobs import files
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.site_file import list_site_folders, load_site

    if kind is SiteKind.SLURM:
        from lorafleet.slurm.discover import discover_cluster

        name, text = discover_cluster(partition)
    else:
        from lorafleet.k8s.discover import discover_cluster as ask_namespace

        name, text = ask_namespace(context)
    path = output or list_site_folders()[0] / f"{name}.yaml"
    if path.exists() and not force:
        raise UserError(
            f"{path} exists already: overwrite it with --force, or name another file with --output"
        )
    with tempfile.TemporaryDirectory(
        prefix="lorafleet-"
    ) as temp_dir:  # write the file only if it loads
        draft_file = Path(temp_dir) / path.name
        files.write_text(draft_file, text)
        load_site(str(draft_file))
    files.write_text(path, text)
    print_text(text.rstrip())
    print_text(f"\n{path}")
    site_name = path.stem if output is None else str(path)
    print_text(
        f"next: read the file; then run lorafleet doctor --on {site_name}; lorafleet plan "
        f"examples/quickstart.yaml --on {site_name}"
    )


def _resolve_columns(
    train_file: Path, task: TaskName, requested: dict[str, str | None]
) -> dict[str, str]:
    """Return a task's columns: the requested ones, else usual names found in the first row.

    Raises:
        DataError: The file is missing, has no readable row, or has none of the usual columns.
        UserError: A requested column is not used by the task.
    """
    from lorafleet.jobs import files
    from lorafleet.jobs.data.data_files import read_records
    from lorafleet.jobs.errors import DataError

    if not train_file.is_file():
        raise DataError(f"--train-file is {train_file}, but {files.describe_non_file(train_file)}")
    # One row is enough to see the columns, and the file may be large.
    first = next(
        (record for _, record in read_records(train_file) if isinstance(record, dict)), None
    )
    if first is None:
        raise DataError(
            f"{train_file} has no row that can be read (each row must be an object with named "
            "columns)"
        )
    _refuse_columns(task, requested)
    if task is not TaskName.CLASSIFICATION:
        return _resolve_generation_columns(train_file, task, first, requested)
    text, label = requested["text_column"], requested["label_column"]
    if not (text or label) and _is_conversation(first):
        raise DataError(
            f"{train_file} contains conversations or instructions: use --task generation"
        )
    columns = {
        "text_column": text
        or _find_first(
            first, ("text", "sentence", "review", "content", "tweet", "body", "comment")
        ),
        "label_column": label
        or _find_first(first, ("label", "labels", "class", "category", "sentiment", "target")),
    }
    for key, column in columns.items():
        if column is None:
            names = ", ".join(map(str, first))
            raise DataError(
                f"{train_file} has the columns {names}: name the right one with "
                f"--{key.replace('_', '-')}"
            )
    return {key: str(column) for key, column in columns.items()}


def _refuse_columns(task: TaskName, requested: dict[str, str | None]) -> None:
    """Raise UserError for columns that the task does not read or that do not go together.

    The job file would ignore them, and train on other columns than the user thinks.

    Args:
        requested: Name of the field -> column that the user named, or None.
    """
    from lorafleet.jobs.errors import UserError

    requested_names = {name for name, column in requested.items() if column}
    unused = (
        {"prompt_column", "completion_column"}
        if task is TaskName.CLASSIFICATION
        else {"label_column"}
    )
    if (
        task is not TaskName.CLASSIFICATION
        and "text_column" in requested_names
        and requested_names != {"text_column"}
    ):
        unused = {"text_column"}  # either plain text, or a prompt and its answer
    refused = sorted(requested_names & unused)
    if refused:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in refused)
        other_options = sorted(f"--{name.replace('_', '-')}" for name in requested_names - unused)
        with_them = f" with {', '.join(other_options)}" if other_options else ""
        raise UserError(
            f"--task {task.value}{with_them} does not use {options}: leave out {options}"
        )


def _resolve_generation_columns(
    train_file: Path, task: TaskName, first: dict[str, object], requested: dict[str, str | None]
) -> dict[str, str]:
    from lorafleet.jobs.errors import DataError

    shortens = task is TaskName.SUMMARIZATION
    if requested["text_column"] and not shortens:
        return {"text_column": requested["text_column"]}
    has_requested = requested["prompt_column"] or requested["completion_column"]
    if _is_conversation(first) and not has_requested:
        return {}
    prompts, answers = (
        (_DOCUMENTS + _PROMPTS, _SUMMARIES + _ANSWERS) if shortens else (_PROMPTS, _ANSWERS)
    )
    prompt = requested["prompt_column"] or requested["text_column"] or _find_first(first, prompts)
    completion = requested["completion_column"] or _find_first(first, answers)
    if prompt and completion:
        return {"prompt_column": prompt, "completion_column": completion}
    if "text" in first and not shortens:
        return {}
    plain_hint = "" if shortens else ", or --text-column for plain text"
    raise DataError(
        f"{train_file} has the columns {', '.join(map(str, first))}: name the right ones with "
        f"--prompt-column and --completion-column{plain_hint}"
    )


def _is_conversation(first: dict[str, object]) -> bool:
    """Return True if a row has a conversation or an instruction under a usual column name."""
    from lorafleet.jobs.data.row_formats import CONVERSATION_COLUMNS

    return bool({*CONVERSATION_COLUMNS, "instruction"} & set(first))


def _find_first(record: dict[str, object], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in record), None)


def _count_examples(job: JobSpec, rows: Rows) -> int:
    """Return the number of sequences in one epoch.

    A conversation may become several sequences; without the tokenizer on this machine the rows
    are counted instead.
    """
    from lorafleet.evaluation.tokens import prepare
    from lorafleet.jobs.errors import AssetError

    try:
        return len(prepare(job).splits["train"]) if job.is_generative else len(rows.train)
    except AssetError:
        return len(rows.train)


def _compute_max_t(train_rows: int, job: JobSpec) -> int:
    """Return a search's budget per trial: two epochs, at most 10,000 rows, in whole steps.

    At least nine steps, so that three rungs with a reduction factor of 3 have different
    steps.

    Args:
        train_rows: Examples of one epoch.
    """
    batch = job.train.compute_effective_batch_size(1)
    return max(batch * 9, min(2 * train_rows, 10_000) // batch * batch)


def _compute_max_length(task: TaskName, job: JobSpec) -> int:
    """Return the default row length of a task in tokens, at most the model's learnt positions."""
    from lorafleet.jobs.data.hub import read_model_config
    from lorafleet.jobs.schema.model_kinds import get_max_positions

    config = read_model_config(job.model.model_name_or_path, job.model.revision)
    positions = get_max_positions(config) if config else 0
    return min(_LENGTH[task], positions or _LENGTH[task])


def _render_job_file(
    name: str,
    task: TaskName,
    model: str,
    data: dict[str, Path | None],
    columns: dict[str, str],
    output: Path,
    max_length: int,
    counts: str,
    max_t: int = 2000,
) -> str:
    folder = output.absolute().parent
    lines = [
        f"  {key}: {_quote_yaml(_make_relative(path, folder))}"
        for key, path in data.items()
        if path
    ]
    lines += [f"  {key}: {_quote_yaml(column)}" for key, column in columns.items()]
    metric = "accuracy" if task is TaskName.CLASSIFICATION else "loss"
    return f"""\
# Written by `lorafleet init`. Every field and its default: `lorafleet render {output.name}`.
name: {_quote_yaml(name)}
task: {task.value}                     # {" | ".join(TaskName)}

model:
  model_name_or_path: {_quote_yaml(model)}   # a hub id, a folder or asset:NAME
  max_length: {max_length}                     # tokens; longer rows are cut (and counted)

data:                                 # {counts}
{chr(10).join(lines)}

method: lora
lora:
  lora_r: 16                          # rank: how much the adapter can change
  lora_alpha: "2*lora_r"              # its scale, here tied to the rank
  lora_target_modules: all-linear     # every linear layer but the head

train:
  # learning_rate: 1e-3               # default: depends on the method and the model's size
  num_train_epochs: 2                 # of `lorafleet train`; in a sweep, max_t below
  per_device_train_batch_size: {_BATCH[task]}
  seed: 42

search:                               # of `lorafleet sweep`
  method: random                      # random | grid | tpe
  num_samples: 10
  metric: {metric}
  scheduler: {{type: asha, time_attr: samples, max_t: {max_t}, reduction_factor: 3}}
  parameters:
    lora.lora_r: {{values: [4, 8, 16, 32]}}
    train.learning_rate: {{distribution: log_uniform_values, min: 1e-4, max: 1e-2}}

tracking:
  project: lorafleet                  # W&B; offline unless you are logged in
"""


def _make_relative(path: Path, folder: Path) -> str:
    """Return a path as the job file writes it.

    It is relative if it is below the file's folder, else absolute.
    """
    absolute = path.absolute()
    return str(absolute.relative_to(folder)) if absolute.is_relative_to(folder) else str(absolute)


def _make_model_relative(model: str, output: Path) -> str:
    """Return a model folder as the job file writes it. Hub ids and assets stay unchanged.

    Args:
        model: Value of `--model`.
        output: The job file; its folder is what paths are relative to.
    """
    from lorafleet.jobs import files

    is_folder = model.startswith((".", "/", "~")) or Path(model).is_dir()
    if not is_folder:
        return model
    path = _make_relative(files.expand_home(model), output.absolute().parent)
    return (
        path if Path(path).is_absolute() else f"./{path}"
    )  # without ./ a missing folder would be read as a hub id


def _quote_yaml(text: str) -> str:
    """Return a text as a YAML scalar, quoted only where necessary.

    A text such as `no` or `1e3` is quoted, because YAML would read it as something else.
    """
    import json
    import re

    from lorafleet.jobs.yaml12 import parse_scalar

    is_plain = re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./:-]*", text) and not text.endswith(":")
    # A JSON string is a valid double-quoted YAML scalar.
    return text if is_plain and parse_scalar(text) == text else json.dumps(text, ensure_ascii=False)
