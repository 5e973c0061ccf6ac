"""Load a JobSpec from a YAML file and `key=value` overrides, with every value's origin.

The text passes through these steps: parse, translate other tools' names, apply
overrides, derive the format and the links, make paths absolute, apply the adapter,
validate. All of them work on plain nested dicts and collect problems, so that
`load_job` reports all problems of a file at once, each with its line and the closest
valid key. Models and data are not opened, except the small files that become part of
the job (chat template, adapter config).
"""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from lorafleet.jobs import files, yaml12
from lorafleet.jobs.data.adapters import DROPOUT, get_fixed_fields, read_config
from lorafleet.jobs.errors import JobFileError, Problem
from lorafleet.jobs.schema import expressions as expression
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.aliases import (
    DISTRIBUTION_ALIASES,
    EXPONENT_DISTRIBUTIONS,
    FIELD_ALIASES,
    VALUE_ALIASES,
)
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.metrics import strip_metric_prefix
from lorafleet.jobs.schema.validation_messages import list_problems
from lorafleet.jobs.trials import arms
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.hyperband import HYPERBAND_KEYS, convert_to_asha

OriginKind = Literal["file", "override", "alias", "default", "linked", "derived"]

_PATH_FIELDS = (
    "data.train_file",
    "data.validation_file",
    "data.test_file",
    "train.init_adapter",
    "resources.deepspeed_config",
)
_MAX_EXPONENT = 700
"""Largest exponent for which e to that power is a finite float."""
_NAME_FIELDS = ("model.model_name_or_path", "data.dataset_name", "evaluate.bertscore_model")
"""Fields that hold a name on the Hub, the name of a package, or a path."""


@dataclass(frozen=True)
class Origin:
    """Source of a resolved value.

    `file` and `override` are the user's own values, `alias` a value under another tool's
    name, `linked` an expression, `derived` a value that follows from others. `render` shows
    it.
    """

    kind: OriginKind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


@dataclass(frozen=True)
class LoadedJob:
    """A job with the file, overrides and origins that it was loaded from.

    Created by `load_text` only. Paths in `job` are absolute, and other tools' names are
    translated. A run stores `text` unchanged as job.yaml, and the values with their origins
    as resolved.json.
    """

    job: JobSpec
    path: Path
    text: str
    """Text of the job file, unchanged."""
    overrides: tuple[str, ...] = ()
    origins: dict[str, Origin] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Spellings of other tools and short forms that were accepted, and how they were read."""
    lines: dict[str, int] = field(default_factory=dict)
    """Line of each key in the file, by the dotted path of its field."""

    def locate(self, problem: Problem) -> Problem:
        """Return a problem with its line, or with the override that caused it.

        For checks that run after loading, such as whether a model is on this machine.
        """
        return _locate_problem(problem, self.origins, self.lines)

    def get_resolved_values(self) -> dict[str, Any]:
        """Return the value and the origin of every field, by dotted path.

        Fields of `search` and `compare` are left out if the job has no such block.

        Returns:
            Dotted path -> `value` (as JSON) and `origin` (text).
        """
        raw = self.job.model_dump(mode="json")
        flat: dict[str, Any] = {}
        for path in fields.get_leaf_fields():
            block = path.partition(".")[0]
            if block in ("search", "compare") and getattr(self.job, block) is None:
                continue
            origin = self.origins.get(path, Origin("default"))
            flat[path] = {"value": fields.get_value(raw, path), "origin": str(origin)}
        return flat


class _Reading:
    """State of one file while it is loaded: tree, lines, origins, notes and problems so far.

    `tree` is changed in place by each step. `lines` has the keys as the file spells them,
    and after a translation also under our names, so that later problems find their line.
    """

    def __init__(self, document: yaml12.Document) -> None:
        self.lines = document.lines
        self.problems = list(document.problems)
        self.origins: dict[str, Origin] = {}
        self.notes: list[str] = []
        self.tree: dict[str, Any] = {}

    def get_line(self, path: str) -> int | None:
        """Return the line of a key, or of the nearest block around it."""
        return find_line(self.lines, path)

    def locate(self, problem: Problem) -> Problem:
        """Return a problem with its line, or with the override that caused it."""
        return _locate_problem(problem, self.origins, self.lines)

    def add_problem(self, path: str, sentence: str) -> None:
        self.problems.append(Problem(path, sentence, self.get_line(path)))


def _locate_problem(problem: Problem, origins: dict[str, Origin], lines: dict[str, int]) -> Problem:
    origin = origins.get(problem.path)
    if origin and origin.kind == "override":
        return Problem(problem.path, f"override {origin.detail!r}: {problem.sentence}")
    return Problem(problem.path, problem.sentence, find_line(lines, problem.path))


def find_line(lines: dict[str, int], path: str) -> int | None:
    """Return the line of a key, or of the nearest block around it; None if neither has one.

    A missing field has no line of its own; the line of its block is where to add it.
    """
    while path:
        if path in lines:
            return lines[path]
        path = path.rpartition(".")[0]
    return None


def load_job(path: str | Path, overrides: tuple[str, ...] = ()) -> LoadedJob:
    """Load, complete and check a job file.

    Args:
        path: The job file.
        overrides: Settings of the form `key=value`, applied after the file. Values are
            YAML.

    Returns:
        The job with its origins. It is valid by itself; whether its models and data exist
            is checked in `cluster/planning/preflight.py`.

    Raises:
        JobFileError: The file cannot be read, or has problems; the error lists all of them,
            and carries the job of the valid fields if there is one (`rest`).
    """
    path = Path(path)
    text = read_text(path)
    return load_text(text, path, overrides)


def load_derived(
    job: JobSpec, name: str, blocks: dict[str, Any], overrides: tuple[str, ...] = ()
) -> LoadedJob:
    """Load a variant of a job under another name.

    The variant has no file: its text is made from the values of the job that differ from
    their defaults. It is used for `evaluate`, and for jobs of their own that `export` and
    `benchmark` start on a cluster.

    Args:
        job: The job; its paths are absolute already.
        name: Name of the variant.
        blocks: Blocks of the job file that replace those of the job. The job's `search`,
            `compare` and `linked` are dropped unless they are in here.
        overrides: Settings of the form `key=value`.

    Raises:
        JobFileError: If the variant is not a valid job.
    """
    raw = {
        key: value
        for key, value in get_set_fields(job).items()
        if key not in ("search", "compare", "linked")
    }
    # A text and not a tree: the variant passes through the same loader as a file, and a run stores
    # the text as its job.yaml.
    text = yaml.safe_dump(raw | {"name": name} | blocks, sort_keys=False, allow_unicode=True)
    return load_text(text, Path.cwd() / f"{name}.yaml", overrides)


def get_set_fields(job: JobSpec) -> dict[str, Any]:
    """Return all values of a job that differ from their defaults, in the layout of a job file."""
    values: dict[str, Any] = job.model_dump(mode="json", exclude_defaults=True)
    return values


def load_text(text: str, path: Path, overrides: tuple[str, ...] = ()) -> LoadedJob:
    """Load a job from the text of a job file; see `load_job`.

    Args:
        text: The text.
        path: The file that the text would be stored in. Relative paths start at its folder,
            and problems name it.
        overrides: Settings of the form `key=value`.

    Raises:
        JobFileError: With all problems of the text.
    """
    document = yaml12.parse_document(text)
    reading = _Reading(document)
    if not reading.problems and not isinstance(document.value, dict):
        reading.add_problem(
            "",
            "the file is empty"
            if document.value is None
            else "a job file must be a block of keys (`key: value`)",
        )
    if reading.problems:
        raise JobFileError(str(path), reading.problems)
    reading.tree = document.value
    _record_origins(reading, reading.tree, "")
    _translate(reading)  # before the overrides, so that they apply to our field names
    for override in overrides:
        _apply_override(reading, override)
    # Again, because overrides may use other tools' names and short forms too.
    _translate(reading)
    _choose_format(reading)
    _create_links(reading)
    _make_paths_absolute(reading, path.parent)
    _apply_adapter(reading)
    job, validation_problems = _validate(reading)
    problems = _keep_first_problems([*reading.problems, *validation_problems])
    loaded = (
        LoadedJob(job, path, text, overrides, reading.origins, tuple(reading.notes), reading.lines)
        if job
        else None
    )
    if problems or loaded is None:
        raise JobFileError(
            str(path), sorted(problems, key=lambda problem: problem.line or 0), loaded
        )
    return loaded


def _keep_first_problems(problems: list[Problem]) -> list[Problem]:
    """Return the first problem of each field.

    A wrong value often fails several checks; the first message is the one that names the
    cause.
    """
    return list(
        # Reversed, because the last entry of a key wins in a dict.
        {problem.path or problem.sentence: problem for problem in reversed(problems)}.values()
    )[::-1]


def read_text(path: Path) -> str:
    """Return the text of a job file.

    The file may begin with a byte order mark, as editors on Windows write it.

    Raises:
        JobFileError: With the reason if it cannot be read.
    """
    try:
        return files.read_regular_text(path, encoding="utf-8-sig")
    except FileNotFoundError:
        sentence = "no such file"
    except IsADirectoryError:
        sentence = "is a folder, not a job file"
    except PermissionError:
        sentence = "cannot be read: you do not have permission"
    except OSError as error:
        sentence = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        sentence = f"is not UTF-8 text (byte {error.start})"
    raise JobFileError(str(path), [Problem("", sentence)])


def build_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a job file, for editors.

    The schema of the pydantic models describes a job after loading. The short forms that
    the loader expands before validation are added by hand here; a test loads every example
    against it.
    """
    schema = JobSpec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "lorafleet job"
    parameter = schema["$defs"]["Parameter"]
    schema["$defs"]["Parameter"] = {"anyOf": [parameter, {"type": "string"}, {"type": "array"}]}
    alpha = schema["$defs"]["LoraSpec"]["properties"]["lora_alpha"]
    schema["$defs"]["LoraSpec"]["properties"]["lora_alpha"] = {
        "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}],
        **{key: alpha[key] for key in ("description", "default", "title")},
    }
    labels = schema["$defs"]["DataSpec"]["properties"]["labels"]["anyOf"][0]
    labels["items"] = {"type": ["string", "integer"]}
    custom_metric = schema["$defs"]["CustomMetric"]
    schema["$defs"]["CustomMetric"] = {"anyOf": [custom_metric, {"type": "string"}]}
    metric = schema["$defs"]["MetricSpec"]
    metric["required"] = ["name"]
    schema["$defs"]["MetricSpec"] = {"anyOf": [metric, {"type": "string"}]}
    return schema


def _record_origins(reading: _Reading, tree: dict[str, Any], prefix: str) -> None:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            _record_origins(reading, value, f"{path}.")
        reading.origins[path] = Origin("file", f"line {reading.lines.get(path, '?')}")


def _apply_override(reading: _Reading, text: str) -> None:
    """Apply `train.seed=7`, `lora.lora_r=8` or `data.train_file=x.jsonl`.

    Values are parsed as YAML. The path may be another tool's name, whichever of the two the
    file uses: both are brought to our name first, so that the override wins.
    """
    path, equals, value = text.partition("=")
    # People type overrides as options (`--train.seed=7`), or with `set` before them.
    path = path.strip().lstrip("-").removeprefix("set ")
    if not equals or not path:
        reading.problems.append(Problem("", f"override {text!r} must be of the form key=value"))
        return
    document = yaml12.parse_document(value)
    if document.problems:
        reading.problems.append(
            Problem(path, f"override {text!r}: {document.problems[0].sentence}")
        )
        return
    original_path, path = path, _resolve_override_path(path)
    if path != original_path:
        reading.notes.append(f"override {text!r}: {original_path} is read as {path}")
    # The rest of the path is one key: names of searched fields contain dots.
    if path.startswith(_PARAMETERS_PREFIX):
        parameters = fields.get_value(reading.tree, "search.parameters")
        if not isinstance(parameters, dict):
            parameters = {}
            fields.set_value(reading.tree, "search.parameters", parameters)
        parameters[path.removeprefix(_PARAMETERS_PREFIX)] = document.value
    else:
        fields.set_value(reading.tree, path, document.value)
    reading.origins[path] = Origin("override", text)


_PARAMETERS_PREFIX = "search.parameters."


def _resolve_override_path(path: str) -> str:
    """Return the field that an override means.

    Accepts the names of other tools, such as `lora_rank`, `lora.rank` and
    `search.parameters.lr`.
    """
    if path.startswith(_PARAMETERS_PREFIX):
        return _PARAMETERS_PREFIX + resolve_field_name(path.removeprefix(_PARAMETERS_PREFIX))
    target = FIELD_ALIASES.get(path.rpartition(".")[2])
    if target and path.startswith("compare.") and target.startswith("search."):
        target = f"compare.{target.removeprefix('search.')}"
    if (
        target is None
        or path in fields.get_leaf_fields()
        or (path.startswith("search.") and not target.startswith("search."))
    ):
        return path
    return target


def resolve_field_name(name: str) -> str:
    """Return the dotted field that a name in a search, an arm or a link means.

    The name is a field, an alias of another tool, or the last part of a path that only one
    block has.

    Returns:
        The path; the name itself if it means no field. The caller reports that.
    """
    if name in fields.get_leaf_fields():
        return name
    path = FIELD_ALIASES.get(name) or FIELD_ALIASES.get(name.rpartition(".")[2], name)
    if path.startswith("search."):
        return name
    if "." in path or path in fields.get_leaf_fields():
        return path
    matches = [
        candidate for candidate in fields.get_leaf_fields() if candidate.endswith(f".{path}")
    ]
    return matches[0] if len(matches) == 1 else path


def _translate(reading: _Reading) -> None:
    """Translate the keys, values and short forms of other tools, in place.

    Runs before and after the overrides, so each step must leave its own result unchanged.
    Every translation is noted, and never guessed: a key that also has its real name in the
    file is a problem.
    """
    tree = reading.tree
    for block, key in [("", key) for key in list(tree)] + [
        (block, key)
        for block, inner in list(tree.items())
        if isinstance(inner, dict)
        for key in list(inner)
    ]:
        _translate_key(reading, block, key)
    for name in ("search", "compare"):
        _translate_scheduler(reading, f"{name}.scheduler")
    for (path, alias), value in VALUE_ALIASES.items():
        if fields.get_value(tree, path) == alias:
            fields.set_value(tree, path, value)
            _add_note(reading, path, f"{path}: {alias} is read as {value}")
    for name in ("search", "compare"):
        if isinstance(tree.get(name), dict):
            _translate_metric(reading, tree[name], f"{name}.metric")
    block = tree.get("search")
    if isinstance(block, dict):
        _translate_parameters(reading, block, _PARAMETERS_PREFIX)
    for name, arm in _list_arms(tree):
        _translate_parameters(reading, arm, f"compare.arms.{name}.parameters.")
        _translate_names(reading, arm.get("set"), f"compare.arms.{name}.set.")
    links = tree["linked"] if isinstance(tree.get("linked"), dict) else {}
    _translate_names(reading, links, "linked.")
    for path, text in links.items():
        links[path] = _translate_expression(text, path) if isinstance(text, str) else text


def _translate_key(reading: _Reading, block: str, key: str) -> None:
    """Move the value of another tool's key to our field, in place."""
    holder = reading.tree.get(block) if block else reading.tree
    if not isinstance(holder, dict) or key not in holder:
        return  # already moved, because its block is an alias
    path = f"{block}.{key}" if block else key
    target = FIELD_ALIASES.get(key)
    if target is None or path in fields.get_leaf_fields() or block == "linked":
        return
    if block == "search" and not target.startswith("search."):
        return
    value = holder.pop(key)
    # Later problems are about our name, and must point at the key as the file spells it.
    line = reading.lines.get(path)
    if line:
        reading.lines[target] = line
    if fields.get_value(reading.tree, target) is not None:
        reading.add_problem(path, f"{path} means {target}, which is also set: keep one of the two")
        return
    fields.set_value(reading.tree, target, value)
    _add_note(reading, target, f"{path} is read as {target}")


def _translate_scheduler(reading: _Reading, path: str) -> None:
    """Translate other tools' keys inside a scheduler block, such as `early_terminate: {eta: 2}`."""
    block = fields.get_value(reading.tree, path)
    if isinstance(block, dict):
        _translate_hyperband(reading, block, path)
    for key in list(block) if isinstance(block, dict) else ():
        scheduler, _, leaf = FIELD_ALIASES.get(key, "").rpartition(".")
        if scheduler != "search.scheduler":
            continue
        if leaf in block:
            reading.add_problem(
                f"{path}.{key}",
                f"{path}.{key} means {path}.{leaf}, which is also set: keep one of the two",
            )
            block.pop(key)
            continue
        block[leaf] = block.pop(key)
        line = reading.get_line(f"{path}.{key}") or reading.get_line("search.early_terminate")
        if line:
            reading.lines[f"{path}.{leaf}"] = line
        _add_note(reading, f"{path}.{leaf}", f"{path}.{key} is read as {path}.{leaf}")


def _translate_hyperband(reading: _Reading, block: dict[str, Any], path: str) -> None:
    """Translate W&B's `min_iter`, `max_iter` and `s`.

    `eta` alone is left to the aliases: Ray has the same setting under another name.
    """
    hyperband_keys = [key for key in HYPERBAND_KEYS if key in block]
    if not set(hyperband_keys) - {"eta"}:
        return
    try:
        # Ray's name for eta may stand beside W&B's other keys.
        asha = convert_to_asha({"eta": block.get("reduction_factor")} | block)
    except (TypeError, ValueError, OverflowError) as error:
        reading.add_problem(
            path,
            (
                f"{path} has W&B's keys for Hyperband, but their values cannot be interpreted: "
                f"{error}"
            ),
        )
        asha = {}
    for key in hyperband_keys:
        block.pop(key)
    for key, value in asha.items():
        if key in block and block[key] != value and key != "time_attr":
            reading.add_problem(
                f"{path}.{key}",
                f"{path}.{key} is set, but {' and '.join(hyperband_keys)} set it too: keep one of "
                "them",
            )
        block.setdefault(key, value)
    values = ", ".join(f"{key}: {value}" for key, value in asha.items())
    _add_note(
        reading,
        path,
        f"{' and '.join(hyperband_keys)} of {path} are read as {values}; an iteration counts as an "
        "epoch",
    )


def _translate_parameters(reading: _Reading, block: dict[str, Any], prefix: str) -> None:
    """Translate other tools' field names and the short forms in the parameters of a search."""
    parameters = block.get("parameters")
    if not isinstance(parameters, dict):
        return
    for name in list(parameters):
        path = _rename_key(reading, parameters, name, prefix)
        if path:
            parameters[path] = _expand_short_form(reading, path, parameters[path], prefix)


def _rename_key(reading: _Reading, settings: dict[str, Any], name: Any, prefix: str) -> str:
    """Rename a key of settings to the dotted path of the field that it means.

    Returns the path. It is empty if the key was removed, because the field is set under both
    names; the problem is then recorded.
    """
    path = resolve_field_name(str(name))
    if path == name:
        return path
    value = settings.pop(name)
    if path in settings:
        reading.add_problem(
            f"{prefix}{name}",
            f"{prefix}{name} means {path}, which is also set: keep one of the two",
        )
        return ""
    settings[path] = value
    reading.lines[f"{prefix}{path}"] = reading.lines.get(f"{prefix}{name}", 0)
    _add_note(reading, f"{prefix}{path}", f"{prefix}{name} is read as {path}")
    return path


def _translate_names(reading: _Reading, settings: Any, prefix: str) -> None:
    """Translate other tools' names and values in settings whose keys are full dotted paths."""
    for name in list(settings) if isinstance(settings, dict) else ():
        path = _rename_key(reading, settings, name, prefix)
        if not path:
            continue
        value = settings[path]
        if isinstance(value, str) and path in fields.get_leaf_fields() and fields.is_number(path):
            settings[path] = value = _translate_expression(value, path)
        translated = VALUE_ALIASES.get((path, value)) if isinstance(value, str) else None
        if translated is not None:
            settings[path] = translated
            _add_note(reading, f"{prefix}{path}", f"{path}: {value} is read as {translated}")


def _translate_values(reading: _Reading, path: str, values: list[Any], prefix: str) -> list[Any]:
    """Return the values that a search tries, with other tools' values translated."""
    translated = [
        VALUE_ALIASES.get((path, value), value) if isinstance(value, str) else value
        for value in values
    ]
    for old_value, new_value in zip(values, translated, strict=True):
        if new_value != old_value:
            _add_note(reading, f"{prefix}{path}", f"{path}: {old_value} is read as {new_value}")
    return translated


def _translate_expression(text: str, field_path: str) -> str:
    """Return an expression such as `2*rank` with other tools' field names translated.

    A text that is not an expression is returned unchanged.

    Args:
        text: The expression.
        field_path: The field that it sets; names without a block may belong to its block.
    """
    try:
        names = expression.find_names(expression.parse(text))
    except ValueError:
        return text
    for name in names:
        field_name = FIELD_ALIASES.get(name.rpartition(".")[2])
        if field_name and fields.resolve_path(name, field_path) not in fields.get_leaf_fields():
            # Whole names only: `r` must not be replaced inside `lr` or `lora.r`.
            text = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", field_name, text)
    return text


def _translate_metric(reading: _Reading, block: dict[str, Any], metric_path: str) -> None:
    """Expand a short form of a metric: `metric: eval_f1` becomes `{name: f1}`."""
    metric, path = block.get("metric"), f"{metric_path}.name"
    if isinstance(metric, str):
        metric = block["metric"] = {"name": metric}
        reading.origins[path] = reading.origins.get(metric_path, Origin("file"))
        if metric_path in reading.lines:
            reading.lines[path] = reading.lines[metric_path]
    if isinstance(metric, list) and metric:
        first, *others = [{"name": entry} if isinstance(entry, str) else entry for entry in metric]
        if isinstance(first, dict):
            metric = block["metric"] = {**first, "also": others}
        for name in (path, f"{metric_path}.also"):
            reading.origins[name] = reading.origins.get(metric_path, Origin("file"))
            if metric_path in reading.lines:
                reading.lines[name] = reading.lines[metric_path]
    if isinstance(metric, dict) and isinstance(metric.get("name"), str):
        name = metric["name"]
        metric["name"] = strip_metric_prefix(name)
        if metric["name"] != name:
            _add_note(reading, path, f"{metric_path} {name} is read as {metric['name']}")


def _expand_short_form(reading: _Reading, path: str, value: Any, prefix: str) -> Any:
    """Return the long form of a parameter.

    A list becomes its values, a text an expression, and {min, max} alone a uniform
    distribution. W&B's spellings are translated, and its distributions over exponents are
    refused: their min and max cannot be told from plain values.

    Args:
        reading: State of the file; receives notes and problems.
        path: Dotted field that is searched.
        value: The parameter as it is in the file.
        prefix: Path of the block of parameters, for messages.
    """
    if isinstance(value, list):
        return {"values": _translate_values(reading, path, value, prefix)}
    if isinstance(value, str):
        return {"expression": _translate_expression(value, path)}
    if isinstance(value, dict):
        if isinstance(value.get("values"), list):
            value["values"] = _translate_values(reading, path, value["values"], prefix)
        distribution = value.get("distribution")
        if isinstance(distribution, str) and distribution in DISTRIBUTION_ALIASES:
            value["distribution"] = DISTRIBUTION_ALIASES[distribution]
            _add_note(
                reading,
                f"{prefix}{path}.distribution",
                f"{distribution} is read as {value['distribution']}",
            )
        if isinstance(distribution, str) and distribution in EXPONENT_DISTRIBUTIONS:
            reading.add_problem(
                f"{prefix}{path}.distribution",
                _describe_exponent_distribution(path, distribution, value),
            )
            value["distribution"] = EXPONENT_DISTRIBUTIONS[
                distribution
            ]  # reported once: `_translate` runs again after the overrides
        if "value" in value and "values" not in value:
            value["values"] = [value.pop("value")]
            _add_note(
                reading,
                f"{prefix}{path}.values",
                f"`value` of {path} is read as `values` with one entry",
            )
        if "distribution" not in value and {"min", "max"} <= set(value):
            are_integers = isinstance(value["min"], int) and isinstance(value["max"], int)
            value["distribution"] = "int_uniform" if are_integers else "uniform"
            note = (
                f"min and max of {path} without a distribution are read as {value['distribution']}"
            )
            _add_note(reading, f"{prefix}{path}.distribution", note)
    return value


def _describe_exponent_distribution(path: str, distribution: str, value: dict[str, Any]) -> str:
    """Return the problem with a W&B distribution whose min and max are exponents of e.

    The text names our distribution and the equivalent min and max. For an integer field the
    ends are rounded into the range, with steps of 1.
    """
    replacement = EXPONENT_DISTRIBUTIONS[distribution]
    exponents = {
        name: value[name] for name in ("min", "max") if isinstance(value.get(name), int | float)
    }
    bounds: dict[str, float] = {
        name: math.exp(end) for name, end in exponents.items() if abs(end) < _MAX_EXPONENT
    }
    rounded_bounds: dict[str, float] = {
        name: math.ceil(end) if name == "min" else math.floor(end) for name, end in bounds.items()
    }
    is_integer = (
        fields.is_integer(path)
        and len(rounded_bounds) == 2
        and rounded_bounds["min"] < rounded_bounds["max"]
    )
    if is_integer:
        replacement, bounds = "q_log_uniform_values", rounded_bounds
    powers = ", ".join(f"{name}: {end:.3g}" for name, end in bounds.items()) + (
        ", q: 1" if is_integer else ""
    )
    alternative = f"with {powers}, or {replacement} " if len(bounds) == 2 else ""
    return (
        f"distribution of {path} is {distribution}, whose min and max W&B reads as exponents of e: "
        f"write {replacement} {alternative}with min and max unchanged if they are plain values"
    )


def _add_note(reading: _Reading, path: str, note: str) -> None:
    """Record how a spelling was read, with its line or override, and set the field's origin."""
    origin = reading.origins.get(path) or reading.origins.get(path.rpartition(".")[0])
    if origin and origin.kind == "override":
        reading.notes.append(f"override {origin.detail!r}: {note}")
        return
    line = reading.get_line(path)
    reading.notes.append(f"line {line}: {note}" if line else note)
    reading.origins[path] = Origin("alias", note)


_COLUMNS: dict[str, dict[str, str | None]] = {
    "text_label": {"text_column": "text", "label_column": "label"},
    "prompt_completion": {"prompt_column": "prompt", "completion_column": "completion"},
    "instruction": {},
    "messages": {"messages_column": None},
    "text": {"text_column": "text"},
}
"""Row format -> the columns it reads, with their default names (None: no default)."""


_DEFAULT_COLUMNS = {
    column: name for columns in _COLUMNS.values() for column, name in columns.items()
}


def _choose_format(reading: _Reading) -> None:
    """Set `data.format` from the columns that a job names; refuse columns no format reads.

    The user's own words count more than the keys of the first row, from which the format is
    detected otherwise. A column with its default name contradicts no format: `lorafleet
    render` writes all of them.
    """
    data, task = reading.tree.get("data"), reading.tree.get("task")
    if not isinstance(data, dict):
        return
    columns = [column for column in _DEFAULT_COLUMNS if data.get(column) is not None]
    renamed = [column for column in columns if data[column] != _DEFAULT_COLUMNS[column]]
    row_format = "text_label" if task == "classification" else data.get("format", "auto")
    if row_format in _COLUMNS:
        _refuse_unread_columns(reading, row_format, {column: data[column] for column in renamed})
        return
    deciding_columns = renamed or columns
    if row_format != "auto" or not deciding_columns:
        return
    formats = [name for name in _COLUMNS if name != "text_label"]
    matching_formats = [name for name in formats if set(deciding_columns) <= set(_COLUMNS[name])]
    if matching_formats:
        fields.set_value(reading.tree, "data.format", matching_formats[0])
        reading.origins["data.format"] = Origin("derived", f"from data.{deciding_columns[0]}")
    elif renamed:
        column_list = " and ".join(f"data.{column}" for column in renamed)
        verb, pronoun = ("is", "it") if len(renamed) == 1 else ("are", "all of them")
        sentence = f"{column_list} {verb} set, but no row format of {task} reads {pronoun}"
        reading.add_problem(f"data.{renamed[0]}", sentence)


def _refuse_unread_columns(reading: _Reading, row_format: str, renamed: dict[str, Any]) -> None:
    """Add a problem for each renamed column that the row format does not read."""
    columns = " and ".join(f"data.{column}" for column in _COLUMNS[row_format])
    advice = f"it reads {columns}" if columns else "its columns have fixed names"
    for column, name in renamed.items():
        if column not in _COLUMNS[row_format]:
            sentence = (
                f"data.{column} is {name!r}, but the row format {row_format} does not read it; "
                f"{advice}"
            )
            reading.add_problem(f"data.{column}", sentence)


def _create_links(reading: _Reading) -> None:
    """Turn numbers given as arithmetic into links, which are evaluated for each trial.

    Example: `lora_alpha: "2*lora_r"`. The field is removed from its block and entered into
    `linked`, because its value differs between the trials of a search.
    """
    links = reading.tree.get("linked", {})
    if not isinstance(links, dict):
        return
    for path in fields.get_leaf_fields():
        value = fields.get_value(reading.tree, path)
        if not isinstance(value, str) or path.startswith("linked") or not fields.is_number(path):
            continue
        value = _translate_expression(value, path)
        try:
            names = expression.find_names(expression.parse(value))
        except ValueError:
            continue  # the type check reports it
        uses_fields = any(
            fields.resolve_path(name, path) in fields.get_leaf_fields() for name in names
        )
        if uses_fields or (
            names and not value.isidentifier()
        ):  # a single word that is not a field is a wrong value
            links[path] = value
            reading.origins[path] = Origin("linked", value)
            block, _, leaf = path.rpartition(".")
            fields.get_value(reading.tree, block).pop(leaf)
    if links:
        reading.tree["linked"] = links
        reading.origins.setdefault(
            "linked", Origin("derived", "from the expressions in other fields")
        )


def _make_paths_absolute(reading: _Reading, folder: Path) -> None:
    """Make the relative paths of a job file absolute. They start at the folder of the file.

    The job is then the same from any working directory, and a run that stores it can be
    resumed from anywhere. Names of the hub and assets stay as they are.
    """
    for path in (*_PATH_FIELDS, *_NAME_FIELDS):
        value = fields.get_value(reading.tree, path)
        if isinstance(value, str) and value:
            fields.set_value(reading.tree, path, _make_path_absolute(path, value, folder))
    _read_chat_template(reading, folder)
    _make_metric_paths_absolute(reading, folder)
    for _, arm in _list_arms(reading.tree):
        if isinstance(arm.get("weights"), str) and arm["weights"]:
            arm["weights"] = str((folder / files.expand_home(arm["weights"])).absolute())
        settings = arm.get("set")
        if isinstance(settings, dict):
            paths = {
                path: settings[path]
                for path in (*_PATH_FIELDS, *_NAME_FIELDS)
                if settings.get(path)
            }
            settings |= {
                path: _make_path_absolute(path, value, folder)
                for path, value in paths.items()
                if isinstance(value, str)
            }


_INIT_ADAPTER = "train.init_adapter"


def _apply_adapter(reading: _Reading) -> None:
    """Set the fields that `train.init_adapter` fixes, and refuse other values for them.

    Rank, alpha and layers are in the weights: a job that sets others would report values
    that it does not train. Other values may be in the job itself, in its arms or in a
    search. If the adapter is not on this machine, nothing is known and nothing is checked.
    """
    tree = reading.tree
    links = tree["linked"] if isinstance(tree.get("linked"), dict) else {}
    origin = Origin("derived", f"from {_INIT_ADAPTER}")
    fixed = _read_fixed_fields(fields.get_value(tree, _INIT_ADAPTER))
    for note in _list_adapter_notes(fields.get_value(tree, _INIT_ADAPTER)):
        reading.notes.append(f"{_INIT_ADAPTER}: {note}")
    for name, value in fixed.items():
        job_value = links.get(name, fields.get_value(tree, name))
        # `lora_alpha: 2*lora_r` agrees with an adapter of rank 8 and alpha 16.
        if name in links and _evaluate_with_adapter(links[name], name, fixed) == value:
            continue
        _refuse_changed_field(reading, name, job_value, value, name)
        for path, parameters in _list_search_blocks(tree):
            if name in parameters:
                sentence = (
                    f"{name} is {_format_value(value)} in the adapter of {_INIT_ADAPTER}, so it "
                    "cannot be searched"
                )
                reading.add_problem(f"{path}.{name}", sentence)
        if job_value is None and isinstance(tree.get(name.partition(".")[0], {}), dict):
            fields.set_value(tree, name, value)
            reading.origins[name] = origin
    for arm_name, arm in _list_arms(tree):
        _apply_arm_adapter(reading, arm_name, arm, fixed)
    for path, parameters in _list_search_blocks(tree):
        if _INIT_ADAPTER in parameters:
            sentence = (
                f"{_INIT_ADAPTER} cannot be searched: make an arm in compare for each adapter"
            )
            reading.add_problem(f"{path}.{_INIT_ADAPTER}", sentence)


def _apply_arm_adapter(
    reading: _Reading, arm_name: str, arm: dict[str, Any], fixed: dict[str, Any]
) -> None:
    """Set the fields that an arm's adapter fixes; `fixed` are those of the job's adapter."""
    arm_settings = arm["set"] if isinstance(arm.get("set"), dict) else {}
    arm_adapter = arm_settings.get(_INIT_ADAPTER)
    for name, value in (_read_fixed_fields(arm_adapter) if arm_adapter else fixed).items():
        _refuse_changed_field(
            reading, name, arm_settings.get(name), value, f"compare.arms.{arm_name}"
        )
        if arm_adapter:
            arm_settings.setdefault(name, value)
        if name in (arm.get("parameters") or {}):
            sentence = (
                f"{name} is {_format_value(value)} in the adapter of the arm's {_INIT_ADAPTER}, so "
                "it cannot be searched"
            )
            reading.add_problem(f"compare.arms.{arm_name}.parameters.{name}", sentence)


def _read_fixed_fields(adapter: Any) -> dict[str, Any]:
    """Return the fields that an adapter's folder fixes, and its dropout.

    The result is empty if the adapter is not on this machine.
    """
    config = read_config(Path(adapter)) if isinstance(adapter, str) and adapter else None
    if config is None:
        return {}
    dropout = {DROPOUT: config["lora_dropout"]} if config.get("lora_dropout") is not None else {}
    return get_fixed_fields(config) | dropout


def _list_adapter_notes(adapter: Any) -> list[str]:
    """Return notes on settings of an adapter that no field of the job shows."""
    config = read_config(Path(adapter)) if isinstance(adapter, str) and adapter else None
    patterns = ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules")
    return [
        f"the adapter has a {name}, which is kept" for name in patterns if (config or {}).get(name)
    ]


def _evaluate_with_adapter(text: Any, field_name: str, fixed: dict[str, Any]) -> float | int | None:
    """Return the value of an expression on an adapter's own values, such as `2*lora_r`.

    None if it needs other values.
    """
    try:
        tree = expression.parse(str(text))
        values = {
            name: fixed[fields.resolve_path(name, field_name)]
            for name in expression.find_names(tree)
        }
        return expression.evaluate(tree, values)
    except (KeyError, TypeError, ValueError):
        return None


def _refuse_changed_field(
    reading: _Reading, name: str, job_value: Any, value: Any, path: str
) -> None:
    """Add a problem if a job sets a value that differs from its adapter's. Dropout may differ."""
    if job_value is None or name == DROPOUT or job_value == value:
        return
    if name == "lora.lora_target_modules" and _split_names(job_value) == _split_names(value):
        return
    sentence = (
        f"{name} is {_format_value(job_value)}, but the adapter of {_INIT_ADAPTER} has "
        f"{_format_value(value)}, which cannot be changed: leave the field out"
    )
    reading.add_problem(path, sentence)


def _split_names(value: Any) -> list[str]:
    if isinstance(value, str):
        return sorted(part.strip() for part in value.split(","))
    return sorted(map(str, value)) if isinstance(value, list | tuple) else [str(value)]


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def _list_search_blocks(tree: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the blocks that vary fields of the job: (dotted path, parameters)."""
    blocks = [("search.parameters", fields.get_value(tree, "search.parameters"))]
    blocks += [
        (f"compare.arms.{name}.parameters", arm.get("parameters")) for name, arm in _list_arms(tree)
    ]
    return [(path, parameters) for path, parameters in blocks if isinstance(parameters, dict)]


def _list_arms(tree: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    arm_map = fields.get_value(tree, "compare.arms")
    items = arm_map.items() if isinstance(arm_map, dict) else ()
    return [(name, arm) for name, arm in items if isinstance(arm, dict)]


_CHAT_TEMPLATE = "data.chat_template"


def _read_chat_template(reading: _Reading, folder: Path) -> None:
    """Replace the path of a chat template by the text of the file.

    The job then runs where the file is missing, and its trial id depends on the content. A
    value that is neither a path nor a template is the name of one of the tokenizer's
    templates.
    """
    value = fields.get_value(reading.tree, _CHAT_TEMPLATE)
    if not isinstance(value, str) or not value or is_template_text(value):
        return
    path = folder / files.expand_home(value)
    if not path.is_file():
        if is_path_like(value) or path.suffix:
            reading.add_problem(
                _CHAT_TEMPLATE, f"{_CHAT_TEMPLATE} is {value}, but {files.describe_non_file(path)}"
            )
        return  # the name of a template of the tokenizer
    try:
        text = files.read_regular_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reading.add_problem(
            _CHAT_TEMPLATE, f"{_CHAT_TEMPLATE} is {value}, which cannot be read as text: {error}"
        )
        return
    if not is_template_text(text):
        reading.add_problem(
            _CHAT_TEMPLATE, f"{_CHAT_TEMPLATE} is {value}, but that file is not a Jinja template"
        )
        return
    fields.set_value(reading.tree, _CHAT_TEMPLATE, text)
    origin = reading.origins.get(_CHAT_TEMPLATE, Origin("file"))
    reading.origins[_CHAT_TEMPLATE] = Origin(
        origin.kind, f"{origin.detail}, read from {value}".removeprefix(", ")
    )


def is_template_text(value: str) -> bool:
    """Return whether a value of `data.chat_template` is a template itself and not a name."""
    return "{{" in value or "{%" in value


def _make_path_absolute(path: str, value: str, folder: Path) -> str:
    """Return the absolute path of a field's value, relative to the file's folder.

    A name that is not a path is returned unchanged.
    """
    local = folder / files.expand_home(value)
    is_path = path in _PATH_FIELDS or (
        # `org/model` can be a hub id or a folder; an existing folder wins, as in transformers.
        not value.startswith("asset:") and (is_path_like(value) or _is_folder(local))
    )
    return str(local.absolute()) if is_path else value


def _make_metric_paths_absolute(reading: _Reading, folder: Path) -> None:
    """Make `FILE.py:NAME` of custom metrics absolute, from the folder of the job file."""
    metrics = fields.get_value(reading.tree, "evaluate.custom_metrics")
    for name, metric in list(metrics.items()) if isinstance(metrics, dict) else ():
        if isinstance(metric, str):  # the short form
            metrics[name] = metric = {"function": metric}
        function = metric.get("function") if isinstance(metric, dict) else None
        if isinstance(function, str) and function:
            path, colon, name = function.partition(":")
            metric["function"] = f"{(folder / files.expand_home(path)).absolute()}{colon}{name}"


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the name is too long for the file system
        return False


def is_path_like(name: str) -> bool:
    """Return whether the name of a model or data set can only be a folder.

    `org/name` is not path-like: it may be a hub id, and only the file system can tell.
    """
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _validate(reading: _Reading) -> tuple[JobSpec | None, list[Problem]]:
    """Return (job, all problems).

    With problems, the job lacks the wrong fields (None if that is not a valid job).
    Validating without them also finds the problems between the remaining fields: pydantic
    runs the checks of a block only if all its fields are valid.
    """
    problems: list[Problem] = []
    tree = copy.deepcopy(reading.tree)
    # Fields with a known problem are out of the way before the first validation.
    for problem in reading.problems:
        _remove_field(tree, problem.path)
    for _ in range(_MAX_PASSES):
        try:
            job = JobSpec.model_validate(tree)
            break
        except ValidationError as error:
            dropped = [problem.path for problem in (*reading.problems, *problems)]
            new_problems = [
                problem
                for problem in list_problems(error)
                if not _is_about_dropped(problem.path, dropped)
            ]
            problems += new_problems
            removals = [_remove_field(tree, problem.path) for problem in new_problems]
            # Nothing could be removed, so the next pass would fail in the same way.
            if not any(removals):
                return None, [reading.locate(problem) for problem in problems]
    else:
        return None, [reading.locate(problem) for problem in problems]
    dropped = [problem.path for problem in (*reading.problems, *problems)]
    # These checks build trial jobs, which needs a job that is valid by itself.
    cross_field_problems = search.find_search_problems(job) or arms.find_compare_problems(job)
    problems += [
        problem for problem in cross_field_problems if not _is_about_dropped(problem.path, dropped)
    ]
    return search.build_trial_job(job, {}) if job.linked and not problems else job, [
        reading.locate(item) for item in problems
    ]


_PLACEHOLDER_NAME = "job"
_MAX_PASSES = 8
"""Maximum number of validations of a file. Each runs without the fields that failed in the
one before.
"""


def _remove_field(tree: dict[str, Any], path: str) -> bool:
    """Remove a field from a job, and return whether the job changed.

    The name is required, and gets a placeholder instead.
    """
    if path != "name":
        return fields.remove_value(tree, path)
    renamed = tree.get("name") != _PLACEHOLDER_NAME
    tree["name"] = _PLACEHOLDER_NAME
    return renamed


def _is_about_dropped(path: str, dropped: list[str]) -> bool:
    """Return whether a problem is about a dropped field, or about the block around it.

    A field is dropped because of an earlier problem. That it is missing now is only a
    consequence, and reporting it would mislead.
    """
    return any(
        path == dropped_path
        or dropped_path.startswith(f"{path}.")
        or path.startswith(f"{dropped_path}.")
        for dropped_path in dropped
        if dropped_path
    )


def dump_resolved(loaded: LoadedJob) -> str:
    """Return the text of `resolved.json`: every value and its origin."""
    return (
        json.dumps({"schema_version": 1, "fields": loaded.get_resolved_values()}, indent=2) + "\n"
    )
