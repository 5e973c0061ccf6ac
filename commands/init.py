"""`lorafleet init`: a commented job file for the user's own data."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from lorafleet.commands.common import DEFAULT_RUNS, AnyRuns, options_blamed, say, tell

if TYPE_CHECKING:
    from lorafleet.jobs.data.rows import Rows
    from lorafleet.jobs.schema.job import JobSpec


class TaskName(StrEnum):
    """Tasks that a job file can be written for."""

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
"""Field of a job -> the option that it is from."""
_BATCH = {"classification": 16, "generation": 4, "summarization": 4}
_LENGTH = {"classification": 256, "generation": 512, "summarization": 1024}
_PROMPTS = ("prompt", "question", "input", "source")
_ANSWERS = ("completion", "answer", "response", "output", "target")
_DOCUMENTS = ("document", "article", "dialogue", "text", "content", "report")
_SUMMARIES = ("summary", "highlights", "abstract", "headline")


class SiteKind(StrEnum):
    """Clusters that a site file can be written for."""

    SLURM = "slurm"
    KUBERNETES = "kubernetes"


def init(
    train_file: Annotated[
        Path | None, typer.Option(help="Your training rows: .jsonl, .json, .csv, .tsv, .parquet (or .gz, .zst).")
    ] = None,
    task: Annotated[TaskName, typer.Option(help="What is learnt.")] = TaskName.CLASSIFICATION,
    validation_file: Annotated[Path | None, typer.Option(help="Rows that the search looks at.")] = None,
    test_file: Annotated[Path | None, typer.Option(help="Rows that are looked at once, after the choice.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder or asset:NAME.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column with the text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the class.")] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="Column with the prompt (generation), or the long text (summarization).")
    ] = None,
    completion_column: Annotated[
        str | None, typer.Option(help="Column with the answer (generation), or the short text (summarization).")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the job.")] = "my-job",
    site: Annotated[
        SiteKind | None,
        typer.Option(help="Write a site file instead: of the Slurm that this is a login node of, or of a namespace."),
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Of the site file: context of the kubeconfig; the current one if left out.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Of the site file; the cluster's default if left out.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write.", show_default="job.yaml")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite it.")] = False,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Look at your data, and write a commented job file that trains on it; or a site file, with --site."""
    from lorafleet.cluster.planning.preflight import check_names
    from lorafleet.jobs import files
    from lorafleet.jobs.data.rows import load_rows
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.job_file import load_text

    if site is not None:
        return _init_site(site, partition, context, output, force)
    if train_file is None:
        raise UserError("--train-file is missing: your training rows (or --site, for a cluster's site file)")
    output = output or Path("job.yaml")
    if output.is_dir():
        raise UserError(f"--output is {output}, which is a folder; name a file in it")
    if output.exists() and not force:
        raise UserError(f"{output} exists already; --force overwrites it, --output names another")
    given = {
        "text_column": text_column,
        "label_column": label_column,
        "prompt_column": prompt_column,
        "completion_column": completion_column,
    }
    columns = _columns(train_file, task, given)
    data = {"train_file": train_file, "validation_file": validation_file, "test_file": test_file}
    base = _relative_model(model, output) if model else _MODELS[task]
    draft = partial(_draft, name, task, base, data, columns, output)
    with options_blamed(_OPTIONS):
        length = _max_length(task, load_text(draft(_LENGTH[task], ""), output).job)
        loaded = load_text(draft(length, ""), output)
        check_names(loaded)
    rows = load_rows(loaded.job)
    for warning in rows.warnings:
        say(f"note: {warning}")
    counts = f"{len(rows.train):,} training, {len(rows.validation):,} validation, {len(rows.test):,} test rows"
    if rows.labels:
        counts += f"; {len(rows.labels)} labels"
    text = draft(length, counts, _max_t(_examples(loaded.job, rows), loaded.job))
    load_text(text, output)
    files.write_text(output, text)
    tell(f"{output}  ({counts})")
    tell(f"next: lorafleet plan {output}; lorafleet train {output} (one configuration); lorafleet sweep {output}")
    return None


def _init_site(kind: SiteKind, partition: str | None, context: str | None, output: Path | None, force: bool) -> None:
    """Ask the cluster, and write the user's site file of its name."""
    import tempfile

    from lorafleet.jobs import files
    from lorafleet.jobs.errors import UserError
    from lorafleet.jobs.loading.site_file import folders, load_site

    if kind is SiteKind.SLURM:
        from lorafleet.slurm.discover import ask_cluster

        name, text = ask_cluster(partition)
    else:
        from lorafleet.k8s.discover import ask_cluster as ask_namespace

        name, text = ask_namespace(context)
    path = output or folders()[0] / f"{name}.yaml"
    if path.exists() and not force:
        raise UserError(f"{path} exists already; --force overwrites it, --output names another")
    with tempfile.TemporaryDirectory(prefix="lorafleet-") as scratch:  # what does not load is not left in the way
        draft = Path(scratch) / path.name
        files.write_text(draft, text)
        load_site(str(draft))
    files.write_text(path, text)
    tell(text.rstrip())
    tell(f"\n{path}")
    where = path.stem if output is None else str(path)
    tell(f"next: read it; lorafleet doctor --on {where}; lorafleet plan examples/quickstart.yaml --on {where}")


def _columns(train_file: Path, task: TaskName, given: dict[str, str | None]) -> dict[str, str]:
    """The columns' names: as given, else the usual words for them that the first row has."""
    from lorafleet.jobs import files
    from lorafleet.jobs.data.data_files import read_records
    from lorafleet.jobs.errors import DataError

    if not train_file.is_file():
        raise DataError(f"--train-file is {train_file}, but {files.no_file(train_file)}")
    first = next((record for _, record in read_records(train_file) if isinstance(record, dict)), None)
    if first is None:
        raise DataError(f"{train_file} holds no row that can be read")
    _refuse_columns(task, given)
    if task is not TaskName.CLASSIFICATION:
        return _generation_columns(train_file, task, first, given)
    text, label = given["text_column"], given["label_column"]
    if not (text or label) and _is_conversation(first):
        raise DataError(f"{train_file} holds conversations or instructions: give --task generation")
    found = {
        "text_column": text or _first_of(first, ("text", "sentence", "review", "content", "tweet", "body", "comment")),
        "label_column": label or _first_of(first, ("label", "labels", "class", "category", "sentiment", "target")),
    }
    for key, column in found.items():
        if column is None:
            known = ", ".join(map(str, first))
            raise DataError(f"{train_file} has the columns {known}: say which one with --{key.replace('_', '-')}")
    return {key: str(column) for key, column in found.items()}


def _refuse_columns(task: TaskName, given: dict[str, str | None]) -> None:
    """Raise UserError for columns that a task does not read, or that do not go together."""
    from lorafleet.jobs.errors import UserError

    named = {name for name, column in given.items() if column}
    unread = {"prompt_column", "completion_column"} if task is TaskName.CLASSIFICATION else {"label_column"}
    if task is not TaskName.CLASSIFICATION and "text_column" in named and named != {"text_column"}:
        unread = {"text_column"}  # a text alone, or a prompt and its answer
    wrong = sorted(named & unread)
    if wrong:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in wrong)
        beside = sorted(f"--{name.replace('_', '-')}" for name in named - unread)
        with_them = f" with {', '.join(beside)}" if beside else ""
        raise UserError(f"{options} {'is' if len(wrong) == 1 else 'are'} not read for --task {task.value}{with_them}")


def _generation_columns(
    train_file: Path, task: TaskName, first: dict[str, object], given: dict[str, str | None]
) -> dict[str, str]:
    from lorafleet.jobs.errors import DataError

    shortens = task is TaskName.SUMMARIZATION
    if given["text_column"] and not shortens:
        return {"text_column": given["text_column"]}
    named = given["prompt_column"] or given["completion_column"]
    if _is_conversation(first) and not named:
        return {}
    prompts, answers = (_DOCUMENTS + _PROMPTS, _SUMMARIES + _ANSWERS) if shortens else (_PROMPTS, _ANSWERS)
    prompt = given["prompt_column"] or given["text_column"] or _first_of(first, prompts)
    completion = given["completion_column"] or _first_of(first, answers)
    if prompt and completion:
        return {"prompt_column": prompt, "completion_column": completion}
    if "text" in first and not shortens:
        return {}
    plain = "" if shortens else ", or --text-column for plain text"
    raise DataError(
        f"{train_file} has the columns {', '.join(map(str, first))}: say which with --prompt-column and "
        f"--completion-column{plain}"
    )


def _is_conversation(first: dict[str, object]) -> bool:
    """Whether a row has a conversation, or an instruction, under its usual name."""
    from lorafleet.jobs.data.row_formats import CONVERSATION_COLUMNS

    return bool({*CONVERSATION_COLUMNS, "instruction"} & set(first))


def _first_of(record: dict[str, object], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in record), None)


def _examples(job: JobSpec, rows: Rows) -> int:
    """Sequences of one epoch: a conversation may become several, where the tokenizer is here to tell."""
    from lorafleet.evaluation.tokens import prepare
    from lorafleet.jobs.errors import AssetError

    try:
        return len(prepare(job).splits["train"]) if job.generates else len(rows.train)
    except AssetError:
        return len(rows.train)


def _max_t(train_rows: int, job: JobSpec) -> int:
    """A search's budget a trial: two passes over the rows, at most 10,000 rows, in whole steps."""
    batch = job.train.effective_batch_size(1)
    return max(batch * 9, min(2 * train_rows, 10_000) // batch * batch)


def _max_length(task: TaskName, job: JobSpec) -> int:
    """Return the longest row for a task, or the model's learnt positions where they are fewer."""
    from lorafleet.jobs.data.hub import model_config
    from lorafleet.jobs.schema.model_kinds import learnt_positions

    config = model_config(job.model.model_name_or_path, job.model.revision)
    positions = learnt_positions(config) if config else 0
    return min(_LENGTH[task], positions or _LENGTH[task])


def _draft(
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
    lines = [f"  {key}: {_quoted(_relative(path, folder))}" for key, path in data.items() if path]
    lines += [f"  {key}: {_quoted(column)}" for key, column in columns.items()]
    metric = "accuracy" if task is TaskName.CLASSIFICATION else "loss"
    return f"""\
# Written by `lorafleet init`. Every field and its default: `lorafleet render {output.name}`.
name: {_quoted(name)}
task: {task.value}                     # {" | ".join(TaskName)}

model:
  model_name_or_path: {_quoted(model)}   # a hub id, a folder, or asset:NAME (`lorafleet fetch --list`)
  max_length: {max_length}                     # tokens; longer rows are cut, and counted in a warning

data:                                 # {counts}
{chr(10).join(lines)}

method: lora
lora:
  lora_r: 16                          # rank: how much the adapter can change
  lora_alpha: "2*lora_r"              # its scale, here tied to the rank
  lora_target_modules: all-linear     # every linear layer but the head

train:
  # learning_rate: 1e-3               # left out: a default for the method and the model's size (see render)
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


def _relative(path: Path, folder: Path) -> str:
    """A path as the job file can say it: relative to the file's folder where it lies below it."""
    absolute = path.absolute()
    return str(absolute.relative_to(folder)) if absolute.is_relative_to(folder) else str(absolute)


def _relative_model(model: str, output: Path) -> str:
    """A model's folder as the job file can say it; hub ids and assets as they are."""
    from lorafleet.jobs import files

    is_folder = model.startswith((".", "/", "~")) or Path(model).is_dir()
    if not is_folder:
        return model
    path = _relative(files.in_home(model), output.absolute().parent)
    return path if Path(path).is_absolute() else f"./{path}"  # without it a folder that is gone were a hub id


def _quoted(text: str) -> str:
    """A text as a YAML scalar, quoted where it must be."""
    import json
    import re

    from lorafleet.jobs.loading.yaml12 import scalar

    plain = re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./:-]*", text) and not text.endswith(":")
    return text if plain and scalar(text) == text else json.dumps(text, ensure_ascii=False)
