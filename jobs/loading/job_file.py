"""From a YAML file and `key=value` overrides to a JobSpec, with the origin of every value.

`load_job` reports every problem of a file at once, each with its line and the closest right key.
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
from lorafleet.jobs import files
from lorafleet.jobs.data.adapters import DROPOUT, fixed_fields, read_config
from lorafleet.jobs.errors import JobFileError, Problem
from lorafleet.jobs.loading import yaml12
from lorafleet.jobs.loading.aliases import DISTRIBUTION_ALIASES, EXPONENT_DISTRIBUTIONS, FIELD_ALIASES, VALUE_ALIASES
from lorafleet.jobs.schema import expressions as expression
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.metrics import bare_name
from lorafleet.jobs.schema.validation_messages import sentences
from lorafleet.jobs.trials import arms
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.hyperband import WORDS, as_asha
from pydantic import ValidationError

OriginKind = Literal["file", "override", "alias", "default", "linked", "derived"]

_PATH_FIELDS = (
    "data.train_file",
    "data.validation_file",
    "data.test_file",
    "train.init_adapter",
    "resources.deepspeed_config",
)
_MAX_EXPONENT = 700
"""Above it e to the power is no number that a float holds."""
_NAME_FIELDS = ("model.model_name_or_path", "data.dataset_name", "evaluate.bertscore_model")
"""Names of the hub, of a package, or paths."""


@dataclass(frozen=True)
class Origin:
    """Where a resolved value came from."""

    kind: OriginKind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


@dataclass(frozen=True)
class LoadedJob:
    """A job and how it came to be."""

    job: JobSpec
    path: Path
    text: str
    """The file as given."""
    overrides: tuple[str, ...] = ()
    origins: dict[str, Origin] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What was understood though it is spelt otherwise here."""
    lines: dict[str, int] = field(default_factory=dict)
    """The line of each key of the file, by its dotted path here."""

    def located(self, problem: Problem) -> Problem:
        """A problem with its line, or with the override that made it."""
        return _located(problem, self.origins, self.lines)

    def resolved(self) -> dict[str, Any]:
        """Every field's value and where it came from, by dotted path."""
        raw = self.job.model_dump(mode="json")
        flat: dict[str, Any] = {}
        for path in fields.leaves():
            block = path.partition(".")[0]
            if block in ("search", "compare") and getattr(self.job, block) is None:
                continue
            origin = self.origins.get(path, Origin("default"))
            flat[path] = {"value": fields.get(raw, path), "origin": str(origin)}
        return flat


class _Reading:
    """One file on its way to a JobSpec: the tree, the lines, the origins and what is wrong so far."""

    def __init__(self, document: yaml12.Document) -> None:
        self.lines = document.lines
        self.problems = list(document.problems)
        self.origins: dict[str, Origin] = {}
        self.notes: list[str] = []
        self.tree: dict[str, Any] = {}

    def line(self, path: str) -> int | None:
        """The line of a key, or of the nearest block around it."""
        return line_of(self.lines, path)

    def placed(self, problem: Problem) -> Problem:
        """A problem with its line, or with the override that made it."""
        return _located(problem, self.origins, self.lines)

    def problem(self, path: str, sentence: str) -> None:
        self.problems.append(Problem(path, sentence, self.line(path)))


def _located(problem: Problem, origins: dict[str, Origin], lines: dict[str, int]) -> Problem:
    origin = origins.get(problem.path)
    if origin and origin.kind == "override":
        return Problem(problem.path, f"override {origin.detail!r}: {problem.sentence}")
    return Problem(problem.path, problem.sentence, line_of(lines, problem.path))


def line_of(lines: dict[str, int], path: str) -> int | None:
    """The line of a key, or of the nearest block around it."""
    while path:
        if path in lines:
            return lines[path]
        path = path.rpartition(".")[0]
    return None


def load_job(path: str | Path, overrides: tuple[str, ...] = ()) -> LoadedJob:
    """Read, complete and check a job file. Raises JobFileError with every problem found."""
    path = Path(path)
    text = read_text(path)
    return load_text(text, path, overrides)


def load_derived(job: JobSpec, name: str, blocks: dict[str, Any], overrides: tuple[str, ...] = ()) -> LoadedJob:
    """A job under another name, with other blocks in the place of its own, and nothing to search or to compare but what
    they say."""
    raw = {key: value for key, value in set_of(job).items() if key not in ("search", "compare", "linked")}
    text = yaml.safe_dump(raw | {"name": name} | blocks, sort_keys=False, allow_unicode=True)
    return load_text(text, Path.cwd() / f"{name}.yaml", overrides)


def set_of(job: JobSpec) -> dict[str, Any]:
    """What a job sets, as a file would have it: all that is not the default."""
    found: dict[str, Any] = job.model_dump(mode="json", exclude_defaults=True)
    return found


def load_text(text: str, path: Path, overrides: tuple[str, ...] = ()) -> LoadedJob:
    """`load_job` of a text that would stand in the file `path` (relative paths start at its folder)."""
    document = yaml12.read(text)
    reading = _Reading(document)
    if not reading.problems and not isinstance(document.value, dict):
        reading.problem("", "the file is empty" if document.value is None else "a job file is a block of keys")
    if reading.problems:
        raise JobFileError(str(path), reading.problems)
    reading.tree = document.value
    _mark_origins(reading, reading.tree, "")
    _translate(reading)  # first, so that an override meets our spelling
    for override in overrides:
        _override(reading, override)
    _translate(reading)
    _choose_format(reading)
    _link(reading)
    _absolute_paths(reading, path.parent)
    _take_adapter(reading)
    job, wrong = _validated(reading)
    problems = _once([*reading.problems, *wrong])
    loaded = (
        LoadedJob(job, path, text, overrides, reading.origins, tuple(reading.notes), reading.lines) if job else None
    )
    if problems or loaded is None:
        raise JobFileError(str(path), sorted(problems, key=lambda problem: problem.line or 0), loaded)
    return loaded


def _once(problems: list[Problem]) -> list[Problem]:
    """Return the first problem of each field."""
    return list({problem.path or problem.sentence: problem for problem in reversed(problems)}.values())[::-1]


def read_text(path: Path) -> str:
    """The text of a job file; one sentence when it cannot be read."""
    try:
        return files.read_plain_text(path, encoding="utf-8-sig")
    except FileNotFoundError:
        sentence = "no such file"
    except IsADirectoryError:
        sentence = "is a folder, not a job file"
    except PermissionError:
        sentence = "may not be read by you"
    except OSError as error:
        sentence = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        sentence = f"is not UTF-8 text (byte {error.start})"
    raise JobFileError(str(path), [Problem("", sentence)])


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a job file, for editors; it also allows the short forms that the loader understands."""
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
    own = schema["$defs"]["CustomMetric"]
    schema["$defs"]["CustomMetric"] = {"anyOf": [own, {"type": "string"}]}
    metric = schema["$defs"]["MetricSpec"]
    metric["required"] = ["name"]
    schema["$defs"]["MetricSpec"] = {"anyOf": [metric, {"type": "string"}]}
    return schema


def _mark_origins(reading: _Reading, tree: dict[str, Any], prefix: str) -> None:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            _mark_origins(reading, value, f"{path}.")
        reading.origins[path] = Origin("file", f"line {reading.lines.get(path, '?')}")


def _override(reading: _Reading, text: str) -> None:
    """Apply `train.seed=7`, `lora.lora_r=8` or `data.train_file=x.jsonl`; values are read as YAML."""
    path, equals, value = text.partition("=")
    path = path.strip().lstrip("-").removeprefix("set ")
    if not equals or not path:
        reading.problems.append(Problem("", f"override {text!r} must be of the form key=value"))
        return
    document = yaml12.read(value)
    if document.problems:
        reading.problems.append(Problem(path, f"override {text!r}: {document.problems[0].sentence}"))
        return
    theirs, path = path, _ours(path)
    if path != theirs:
        reading.notes.append(f"override {text!r}: {theirs} is read as {path}")
    if path.startswith(_PARAMETERS):
        parameters = fields.get(reading.tree, "search.parameters")
        if not isinstance(parameters, dict):
            parameters = {}
            fields.put(reading.tree, "search.parameters", parameters)
        parameters[path.removeprefix(_PARAMETERS)] = document.value
    else:
        fields.put(reading.tree, path, document.value)
    reading.origins[path] = Origin("override", text)


_PARAMETERS = "search.parameters."


def _ours(path: str) -> str:
    """The field that an override of another tool's spelling means: `lora_rank`, `lora.rank`, `search.parameters.lr`."""
    if path.startswith(_PARAMETERS):
        return _PARAMETERS + our_field(path.removeprefix(_PARAMETERS))
    ours = FIELD_ALIASES.get(path.rpartition(".")[2])
    if ours and path.startswith("compare.") and ours.startswith("search."):
        ours = f"compare.{ours.removeprefix('search.')}"
    if ours is None or path in fields.leaves() or (path.startswith("search.") and not ours.startswith("search.")):
        return path
    return ours


def our_field(name: str) -> str:
    """Return the dotted field that a search, an arm or a link means by a name: ours, another tool's, or a leaf that
    only one block has."""
    if name in fields.leaves():
        return name
    path = FIELD_ALIASES.get(name) or FIELD_ALIASES.get(name.rpartition(".")[2], name)
    if path.startswith("search."):
        return name
    if "." in path or path in fields.leaves():
        return path
    same = [known for known in fields.leaves() if known.endswith(f".{path}")]
    return same[0] if len(same) == 1 else path


def _translate(reading: _Reading) -> None:
    """Other tools' keys, values and short forms, in place."""
    tree = reading.tree
    for block, key in [("", key) for key in list(tree)] + [
        (block, key) for block, inner in list(tree.items()) if isinstance(inner, dict) for key in list(inner)
    ]:
        _translate_key(reading, block, key)
    for name in ("search", "compare"):
        _translate_scheduler(reading, f"{name}.scheduler")
    for (path, word), ours in VALUE_ALIASES.items():
        if fields.get(tree, path) == word:
            fields.put(tree, path, ours)
            _report(reading, path, f"{path}: {word} is read as {ours}")
    for name in ("search", "compare"):
        if isinstance(tree.get(name), dict):
            _translate_metric(reading, tree[name], f"{name}.metric")
    block = tree.get("search")
    if isinstance(block, dict):
        _translate_parameters(reading, block, _PARAMETERS)
    for name, arm in _arms_of(tree):
        _translate_parameters(reading, arm, f"compare.arms.{name}.parameters.")
        _translate_names(reading, arm.get("set"), f"compare.arms.{name}.set.")
    links = tree["linked"] if isinstance(tree.get("linked"), dict) else {}
    _translate_names(reading, links, "linked.")
    for path, text in links.items():
        links[path] = _our_expression(text, path) if isinstance(text, str) else text


def _translate_key(reading: _Reading, block: str, key: str) -> None:
    holder = reading.tree.get(block) if block else reading.tree
    if not isinstance(holder, dict) or key not in holder:
        return  # an alias of its block has moved it
    path = f"{block}.{key}" if block else key
    ours = FIELD_ALIASES.get(key)
    if ours is None or path in fields.leaves() or block == "linked":
        return
    if block == "search" and not ours.startswith("search."):
        return
    value = holder.pop(key)
    line = reading.lines.get(path)
    if line:
        reading.lines[ours] = line
    if fields.get(reading.tree, ours) is not None:
        reading.problem(path, f"{path} means {ours}, which is set as well")
        return
    fields.put(reading.tree, ours, value)
    _report(reading, ours, f"{path} is read as {ours}")


def _translate_scheduler(reading: _Reading, where: str) -> None:
    """Other tools' words inside a scheduler's own block, such as `early_terminate: {eta: 2}`."""
    block = fields.get(reading.tree, where)
    if isinstance(block, dict):
        _translate_hyperband(reading, block, where)
    for key in list(block) if isinstance(block, dict) else ():
        scheduler, _, leaf = FIELD_ALIASES.get(key, "").rpartition(".")
        if scheduler != "search.scheduler":
            continue
        if leaf in block:
            reading.problem(f"{where}.{key}", f"{where}.{key} means {where}.{leaf}, which is set as well")
            block.pop(key)
            continue
        block[leaf] = block.pop(key)
        line = reading.line(f"{where}.{key}") or reading.line("search.early_terminate")
        if line:
            reading.lines[f"{where}.{leaf}"] = line
        _report(reading, f"{where}.{leaf}", f"{where}.{key} is read as {where}.{leaf}")


def _translate_hyperband(reading: _Reading, block: dict[str, Any], where: str) -> None:
    """Translate W&B's `min_iter`, `max_iter` and `s` (`eta` alone is a word for what Ray calls otherwise)."""
    words = [key for key in WORDS if key in block]
    if not set(words) - {"eta"}:
        return
    try:
        asha = as_asha({"eta": block.get("reduction_factor")} | block)
    except (TypeError, ValueError, OverflowError) as error:
        reading.problem(where, f"{where} has W&B's words of Hyperband, but they are not understood: {error}")
        asha = {}
    for key in words:
        block.pop(key)
    for key, value in asha.items():
        if key in block and block[key] != value and key != "time_attr":
            reading.problem(f"{where}.{key}", f"{where}.{key} is set, and {' and '.join(words)} say it as well")
        block.setdefault(key, value)
    values = ", ".join(f"{key}: {value}" for key, value in asha.items())
    _report(reading, where, f"{' and '.join(words)} of {where} are read as {values}; an iteration is an epoch here")


def _translate_parameters(reading: _Reading, block: dict[str, Any], prefix: str) -> None:
    """What a search tries: other tools' names for fields, and the short forms."""
    parameters = block.get("parameters")
    if not isinstance(parameters, dict):
        return
    for name in list(parameters):
        path = our_field(name)
        if path != name and path in parameters:
            reading.problem(f"{prefix}{name}", f"{prefix}{name} means {path}, which is set as well")
            parameters.pop(name)
            continue
        if path != name:
            parameters[path] = parameters.pop(name)
            reading.lines[f"{prefix}{path}"] = reading.lines.get(f"{prefix}{name}", 0)
            _report(reading, f"{prefix}{path}", f"{prefix}{name} is read as {path}")
        parameters[path] = _long_form(reading, path, parameters[path], prefix)


def _translate_names(reading: _Reading, settings: Any, prefix: str) -> None:
    """Translate other tools' names and words where fields are named by their whole path."""
    for name in list(settings) if isinstance(settings, dict) else ():
        path = our_field(str(name))
        if path != name and path in settings:
            reading.problem(f"{prefix}{name}", f"{prefix}{name} means {path}, which is set as well")
            settings.pop(name)
            continue
        if path != name:
            settings[path] = settings.pop(name)
            _report(reading, f"{prefix}{path}", f"{prefix}{name} is read as {path}")
        word = settings[path]
        if isinstance(word, str) and path in fields.leaves() and fields.is_number(path):
            settings[path] = word = _our_expression(word, path)
        ours = VALUE_ALIASES.get((path, word)) if isinstance(word, str) else None
        if ours is not None:
            settings[path] = ours
            _report(reading, f"{prefix}{path}", f"{path}: {word} is read as {ours}")


def _our_words(reading: _Reading, path: str, values: list[Any], prefix: str) -> list[Any]:
    """Return the values that a search tries, with other tools' words as ours."""
    ours = [VALUE_ALIASES.get((path, value), value) if isinstance(value, str) else value for value in values]
    for theirs, own in zip(values, ours, strict=True):
        if own != theirs:
            _report(reading, f"{prefix}{path}", f"{path}: {theirs} is read as {own}")
    return ours


def _our_expression(text: str, beside: str) -> str:
    """Return arithmetic with other tools' names of fields as ours: `2*rank`."""
    try:
        names = expression.names(expression.parse(text))
    except ValueError:
        return text
    for name in names:
        ours = FIELD_ALIASES.get(name.rpartition(".")[2])
        if ours and fields.full_path(name, beside) not in fields.leaves():
            text = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", ours, text)
    return text


def _translate_metric(reading: _Reading, block: dict[str, Any], where: str) -> None:
    """`metric: eval_f1` is `{name: f1}`."""
    metric, path = block.get("metric"), f"{where}.name"
    if isinstance(metric, str):
        metric = block["metric"] = {"name": metric}
        reading.origins[path] = reading.origins.get(where, Origin("file"))
        if where in reading.lines:
            reading.lines[path] = reading.lines[where]
    if isinstance(metric, list) and metric:
        first, *others = [{"name": one} if isinstance(one, str) else one for one in metric]
        if isinstance(first, dict):
            metric = block["metric"] = {**first, "also": others}
        for name in (path, f"{where}.also"):
            reading.origins[name] = reading.origins.get(where, Origin("file"))
            if where in reading.lines:
                reading.lines[name] = reading.lines[where]
    if isinstance(metric, dict) and isinstance(metric.get("name"), str):
        name = metric["name"]
        metric["name"] = bare_name(name)
        if metric["name"] != name:
            _report(reading, path, f"{where} {name} is read as {metric['name']}")


def _long_form(reading: _Reading, path: str, value: Any, prefix: str) -> Any:
    """A list is its values, a text is an expression, and {min, max} alone is uniform."""
    if isinstance(value, list):
        return {"values": _our_words(reading, path, value, prefix)}
    if isinstance(value, str):
        return {"expression": _our_expression(value, path)}
    if isinstance(value, dict):
        if isinstance(value.get("values"), list):
            value["values"] = _our_words(reading, path, value["values"], prefix)
        word = value.get("distribution")
        if isinstance(word, str) and word in DISTRIBUTION_ALIASES:
            value["distribution"] = DISTRIBUTION_ALIASES[word]
            _report(reading, f"{prefix}{path}.distribution", f"{word} is read as {value['distribution']}")
        if isinstance(word, str) and word in EXPONENT_DISTRIBUTIONS:
            reading.problem(f"{prefix}{path}.distribution", _exponents(path, word, value))
            value["distribution"] = EXPONENT_DISTRIBUTIONS[word]  # said once: a second pass follows the overrides
        if "value" in value and "values" not in value:
            value["values"] = [value.pop("value")]
            _report(reading, f"{prefix}{path}.values", f"value of {path} is read as values, a list of one")
        if "distribution" not in value and {"min", "max"} <= set(value):
            whole = isinstance(value["min"], int) and isinstance(value["max"], int)
            value["distribution"] = "int_uniform" if whole else "uniform"
            note = f"min and max of {path} alone are read as {value['distribution']}"
            _report(reading, f"{prefix}{path}.distribution", note)
    return value


def _exponents(path: str, word: str, value: dict[str, Any]) -> str:
    """Say what a distribution of W&B with exponents as its ends is called with values as its ends."""
    ours = EXPONENT_DISTRIBUTIONS[word]
    ends = {name: value[name] for name in ("min", "max") if isinstance(value.get(name), int | float)}
    worked_out: dict[str, float] = {name: math.exp(end) for name, end in ends.items() if abs(end) < _MAX_EXPONENT}
    rounded: dict[str, float] = {
        name: math.ceil(end) if name == "min" else math.floor(end) for name, end in worked_out.items()
    }
    whole = fields.is_whole(path) and len(rounded) == 2 and rounded["min"] < rounded["max"]
    if whole:
        ours, worked_out = "q_log_uniform_values", rounded
    powers = ", ".join(f"{name}: {end:.3g}" for name, end in worked_out.items()) + (", q: 1" if whole else "")
    said = f"with {powers}, or {ours} " if len(worked_out) == 2 else ""
    return (
        f"distribution of {path} is {word}, whose ends W&B reads as exponents of e: write {ours} {said}with the ends "
        "as they are if they are values"
    )


def _report(reading: _Reading, path: str, note: str) -> None:
    above = reading.origins.get(path) or reading.origins.get(path.rpartition(".")[0])
    if above and above.kind == "override":
        reading.notes.append(f"override {above.detail!r}: {note}")
        return
    line = reading.line(path)
    reading.notes.append(f"line {line}: {note}" if line else note)
    reading.origins[path] = Origin("alias", note)


_COLUMNS: dict[str, dict[str, str | None]] = {
    "text_label": {"text_column": "text", "label_column": "label"},
    "prompt_completion": {"prompt_column": "prompt", "completion_column": "completion"},
    "instruction": {},
    "messages": {"messages_column": None},
    "text": {"text_column": "text"},
}
"""Format of rows -> the columns that it reads, with the names that they have where the job gives none."""


_USUAL_COLUMNS = {column: name for columns in _COLUMNS.values() for column, name in columns.items()}


def _choose_format(reading: _Reading) -> None:
    """Set `data.format` from the columns that a job names; refuse columns that no format reads.

    A column under its usual name contradicts nothing: `lorafleet render` writes out all of them.
    """
    data, task = reading.tree.get("data"), reading.tree.get("task")
    if not isinstance(data, dict):
        return
    columns = [column for column in _USUAL_COLUMNS if data.get(column) is not None]
    renamed = [column for column in columns if data[column] != _USUAL_COLUMNS[column]]
    row_format = "text_label" if task == "classification" else data.get("format", "auto")
    if row_format in _COLUMNS:
        _refuse_unread(reading, row_format, {column: data[column] for column in renamed})
        return
    deciding = renamed or columns
    if row_format != "auto" or not deciding:
        return
    formats = [name for name in _COLUMNS if name != "text_label"]
    reading_all = [name for name in formats if set(deciding) <= set(_COLUMNS[name])]
    if reading_all:
        fields.put(reading.tree, "data.format", reading_all[0])
        reading.origins["data.format"] = Origin("derived", f"from data.{deciding[0]}")
    elif renamed:
        named = " and ".join(f"data.{column}" for column in renamed)
        verb, them = ("is", "it") if len(renamed) == 1 else ("are", "all of them")
        sentence = f"{named} {verb} set, but no row format of {task} reads {them}"
        reading.problem(f"data.{renamed[0]}", sentence)


def _refuse_unread(reading: _Reading, row_format: str, renamed: dict[str, Any]) -> None:
    """Add a problem for each column that a row format does not read."""
    columns = " and ".join(f"data.{column}" for column in _COLUMNS[row_format])
    advice = f"it reads {columns}" if columns else "its columns have fixed names"
    for column, name in renamed.items():
        if column not in _COLUMNS[row_format]:
            sentence = f"data.{column} is {name!r}, but the row format {row_format} does not read it; {advice}"
            reading.problem(f"data.{column}", sentence)


def _link(reading: _Reading) -> None:
    """Numbers given as arithmetic (`lora_alpha: "2*lora_r"`) become links, evaluated for each trial."""
    links = reading.tree.get("linked", {})
    if not isinstance(links, dict):
        return
    for path in fields.leaves():
        value = fields.get(reading.tree, path)
        if not isinstance(value, str) or path.startswith("linked") or not fields.is_number(path):
            continue
        value = _our_expression(value, path)
        try:
            used = expression.names(expression.parse(value))
        except ValueError:
            continue  # the type check says what it must be
        known = any(fields.full_path(name, path) in fields.leaves() for name in used)
        if known or (used and not value.isidentifier()):  # a lone word that is no field is a wrong value, not a link
            links[path] = value
            reading.origins[path] = Origin("linked", value)
            block, _, leaf = path.rpartition(".")
            fields.get(reading.tree, block).pop(leaf)
    if links:
        reading.tree["linked"] = links
        reading.origins.setdefault("linked", Origin("derived", "from the arithmetic in other fields"))


def _absolute_paths(reading: _Reading, folder: Path) -> None:
    """Relative paths of a job file start at the file's own folder."""
    for path in (*_PATH_FIELDS, *_NAME_FIELDS):
        value = fields.get(reading.tree, path)
        if isinstance(value, str) and value:
            fields.put(reading.tree, path, _absolute(path, value, folder))
    _read_chat_template(reading, folder)
    _absolute_metrics(reading, folder)
    for _, arm in _arms_of(reading.tree):
        if isinstance(arm.get("weights"), str) and arm["weights"]:
            arm["weights"] = str((folder / files.in_home(arm["weights"])).absolute())
        own = arm.get("set")
        if isinstance(own, dict):
            paths = {path: own[path] for path in (*_PATH_FIELDS, *_NAME_FIELDS) if own.get(path)}
            own |= {path: _absolute(path, value, folder) for path, value in paths.items() if isinstance(value, str)}


_INIT_ADAPTER = "train.init_adapter"


def _take_adapter(reading: _Reading) -> None:
    """Set what an adapter that is continued fixes; refuse what the job sets or searches otherwise."""
    tree = reading.tree
    links = tree["linked"] if isinstance(tree.get("linked"), dict) else {}
    origin = Origin("derived", f"from {_INIT_ADAPTER}")
    fixed = _fixed_by(fields.get(tree, _INIT_ADAPTER))
    for note in _notes_on(fields.get(tree, _INIT_ADAPTER)):
        reading.notes.append(f"{_INIT_ADAPTER}: {note}")
    for name, value in fixed.items():
        own = links.get(name, fields.get(tree, name))
        if name in links and _worked_out(links[name], name, fixed) == value:
            continue
        _refuse_other(reading, name, own, value, name)
        for where, parameters in _searches(tree):
            if name in parameters:
                sentence = f"{name} is fixed by {_INIT_ADAPTER} at {_as_text(value)}, and cannot be searched"
                reading.problem(f"{where}.{name}", sentence)
        if own is None and isinstance(tree.get(name.partition(".")[0], {}), dict):
            fields.put(tree, name, value)
            reading.origins[name] = origin
    for arm_name, arm in _arms_of(tree):
        own_settings = arm["set"] if isinstance(arm.get("set"), dict) else {}
        own_adapter = own_settings.get(_INIT_ADAPTER)
        for name, value in (_fixed_by(own_adapter) if own_adapter else fixed).items():
            _refuse_other(reading, name, own_settings.get(name), value, f"compare.arms.{arm_name}")
            if own_adapter:
                own_settings.setdefault(name, value)
            if name in (arm.get("parameters") or {}):
                sentence = f"{name} is fixed by the arm's {_INIT_ADAPTER} at {_as_text(value)}, and cannot be searched"
                reading.problem(f"compare.arms.{arm_name}.parameters.{name}", sentence)
    for where, parameters in _searches(tree):
        if _INIT_ADAPTER in parameters:
            sentence = f"{_INIT_ADAPTER} cannot be searched: give each adapter an arm of its own in compare"
            reading.problem(f"{where}.{_INIT_ADAPTER}", sentence)


def _fixed_by(adapter: Any) -> dict[str, Any]:
    """Return what an adapter's folder fixes, and its dropout; nothing where it is not on this machine."""
    config = read_config(Path(adapter)) if isinstance(adapter, str) and adapter else None
    if config is None:
        return {}
    dropout = {DROPOUT: config["lora_dropout"]} if config.get("lora_dropout") is not None else {}
    return fixed_fields(config) | dropout


def _notes_on(adapter: Any) -> list[str]:
    """Say what an adapter has that no field here shows."""
    config = read_config(Path(adapter)) if isinstance(adapter, str) and adapter else None
    patterns = ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules")
    return [f"the adapter has a {name}, which stays as it is" for name in patterns if (config or {}).get(name)]


def _worked_out(text: Any, field_name: str, fixed: dict[str, Any]) -> float | int | None:
    """Return what arithmetic on an adapter's own values comes to, such as `2*lora_r`; None: it needs others."""
    try:
        tree = expression.parse(str(text))
        values = {name: fixed[fields.full_path(name, field_name)] for name in expression.names(tree)}
        return expression.evaluate(tree, values)
    except (KeyError, TypeError, ValueError):
        return None


def _refuse_other(reading: _Reading, name: str, own: Any, value: Any, where: str) -> None:
    """Add a problem where a job sets another value than its adapter has; its dropout may be another."""
    if own is None or name == DROPOUT or own == value:
        return
    if name == "lora.lora_target_modules" and _names_of(own) == _names_of(value):
        return
    sentence = (
        f"{name} is {_as_text(own)}, but {_INIT_ADAPTER} is an adapter with {_as_text(value)}, which cannot be "
        "changed: leave the field out"
    )
    reading.problem(where, sentence)


def _names_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return sorted(part.strip() for part in value.split(","))
    return sorted(map(str, value)) if isinstance(value, list | tuple) else [str(value)]


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def _searches(tree: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the places that try values of the whole job's fields, with what they try."""
    places = [("search.parameters", fields.get(tree, "search.parameters"))]
    places += [(f"compare.arms.{name}.parameters", arm.get("parameters")) for name, arm in _arms_of(tree)]
    return [(where, parameters) for where, parameters in places if isinstance(parameters, dict)]


def _arms_of(tree: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    arms_of = fields.get(tree, "compare.arms")
    items = arms_of.items() if isinstance(arms_of, dict) else ()
    return [(name, arm) for name, arm in items if isinstance(arm, dict)]


_CHAT_TEMPLATE = "data.chat_template"


def _read_chat_template(reading: _Reading, folder: Path) -> None:
    """Put a template's text in the place of the file that holds it: jobs then run where that file is not."""
    value = fields.get(reading.tree, _CHAT_TEMPLATE)
    if not isinstance(value, str) or not value or is_template_text(value):
        return
    path = folder / files.in_home(value)
    if not path.is_file():
        if looks_like_path(value) or path.suffix:
            reading.problem(_CHAT_TEMPLATE, f"{_CHAT_TEMPLATE} is {value}, but {files.no_file(path)}")
        return  # the name of one of the tokenizer's own templates
    try:
        text = files.read_plain_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reading.problem(_CHAT_TEMPLATE, f"{_CHAT_TEMPLATE} is {value}, which cannot be read as text: {error}")
        return
    if not is_template_text(text):
        reading.problem(_CHAT_TEMPLATE, f"{_CHAT_TEMPLATE} is {value}, but that file holds no Jinja template")
        return
    fields.put(reading.tree, _CHAT_TEMPLATE, text)
    origin = reading.origins.get(_CHAT_TEMPLATE, Origin("file"))
    reading.origins[_CHAT_TEMPLATE] = Origin(origin.kind, f"{origin.detail}, read from {value}".removeprefix(", "))


def is_template_text(value: str) -> bool:
    """Whether a value of `data.chat_template` is a template itself, and not a name."""
    return "{{" in value or "{%" in value


def _absolute(path: str, value: str, folder: Path) -> str:
    """A field's path from the file's folder on; a name that is no path stays as it is."""
    local = folder / files.in_home(value)
    is_path = path in _PATH_FIELDS or (not value.startswith("asset:") and (looks_like_path(value) or _is_folder(local)))
    return str(local.absolute()) if is_path else value


def _absolute_metrics(reading: _Reading, folder: Path) -> None:
    """`FILE.py:NAME` of the user's own metrics, from the job file's folder on."""
    own = fields.get(reading.tree, "evaluate.custom_metrics")
    for name, metric in list(own.items()) if isinstance(own, dict) else ():
        if isinstance(metric, str):  # the short form
            own[name] = metric = {"function": metric}
        function = metric.get("function") if isinstance(metric, dict) else None
        if isinstance(function, str) and function:
            path, colon, name = function.partition(":")
            metric["function"] = f"{(folder / files.in_home(path)).absolute()}{colon}{name}"


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name longer than a file system takes
        return False


def looks_like_path(name: str) -> bool:
    """Whether the name of a model or data set can only be a folder."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _validated(reading: _Reading) -> tuple[JobSpec | None, list[Problem]]:
    """Return (the job, every problem). With problems it is the job without the fields that are wrong, if that is one.

    Without them, what the other fields say against each other is seen as well.
    """
    problems: list[Problem] = []
    tree = copy.deepcopy(reading.tree)
    for problem in reading.problems:
        _leave_out(tree, problem.path)
    for _ in range(_MOST_PASSES):
        try:
            job = JobSpec.model_validate(tree)
            break
        except ValidationError as error:
            dropped = [problem.path for problem in (*reading.problems, *problems)]
            found = [problem for problem in sentences(error) if not _is_of(problem.path, dropped)]
            problems += found
            taken = [_leave_out(tree, problem.path) for problem in found]
            if not any(taken):
                return None, [reading.placed(problem) for problem in problems]
    else:
        return None, [reading.placed(problem) for problem in problems]
    dropped = [problem.path for problem in (*reading.problems, *problems)]
    further = search.search_problems(job) or arms.compare_problems(job)
    problems += [problem for problem in further if not _is_of(problem.path, dropped)]
    return search.trial(job, {}) if job.linked and not problems else job, [reading.placed(one) for one in problems]


_SOME_NAME = "job"
_MOST_PASSES = 8
"""Validations of one file, each without the fields that were wrong in the one before."""


def _leave_out(tree: dict[str, Any], path: str) -> bool:
    """Take a field out of a job; its name, which must be there, becomes another."""
    if path != "name":
        return fields.drop(tree, path)
    renamed = tree.get("name") != _SOME_NAME
    tree["name"] = _SOME_NAME
    return renamed


def _is_of(path: str, dropped: list[str]) -> bool:
    """Whether a problem is about a field that was left out for an earlier one, or about the block around it."""
    return any(path == one or one.startswith(f"{path}.") or path.startswith(f"{one}.") for one in dropped if one)


def dump_resolved(loaded: LoadedJob) -> str:
    """`resolved.json`: every value and its origin."""
    return json.dumps({"schema_version": 1, "fields": loaded.resolved()}, indent=2) + "\n"
