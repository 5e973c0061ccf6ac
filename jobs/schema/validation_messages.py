"""Convert pydantic errors to problems with a readable message.

Example: "train.seed is -1, but must be at least 0".
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorafleet.jobs.errors import Problem, SpecProblems
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.aliases import get_foreign_hint
from lorafleet.jobs.text import shorten_text


def describe_unreadable_file(path: Path, error: ValidationError) -> str:
    """Return the message for a file of ours that this version cannot read.

    lorafleet wrote the file from a model, so what does not validate was written by another
    version or damaged. Only the first problem is named: a user cannot correct such a file.
    """
    first = list_problems(error, valid_keys=())[0]
    return f"{path} was written by another version of lorafleet, or is damaged: {first.sentence}"


_REQUIREMENTS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
    "string_unicode": "valid text (it has half a character, a lone surrogate)",
    "too_long": "a list of at most {max_length} entries",
    "set_type": "a list",
    "iterable_type": "a list",
    "mapping_type": "a block of keys",
    "model_attributes_type": "a block of keys",
    "none_required": "empty",
    "invalid_key": "a block whose keys are text",
    "json_invalid": "JSON",
    "json_type": "JSON",
    "bytes_type": "a text",
    "int_too_big": "a smaller number",
    "multiple_of": "a multiple of {multiple_of}",
    "string_pattern_mismatch": "of the form {pattern}",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
    "too_short": "a list of at least {min_length} entries",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
    "tuple_type": "a list",
    "list_type": "a list",
}


_PARAMETER_KEYS = ("values", "distribution", "min", "max", "q", "expression")


def list_problems(
    error: ValidationError, valid_keys: Collection[str] | None = None
) -> list[Problem]:
    """Return the problems of a failed validation, one for each field.

    Each has the dotted path of the field and a message.

    Args:
        error: Error of pydantic.
        valid_keys: Valid keys, if the validated object is not a job.
    """
    problems: dict[str, Problem] = {}
    for raw in error.errors(include_url=False):
        cause = raw.get("ctx", {}).get("error")
        # A check across fields reports each problem under the field's own path.
        if isinstance(cause, SpecProblems):
            problems.update((problem.path, problem) for problem in cause.problems)
            continue
        path = _get_field_path(raw["loc"])
        # A list inside `values` fails in each branch of the union of value types. One message
        # replaces these errors.
        if (
            path.startswith("search.parameters.")
            and path.endswith(".values")
            and raw["type"] != "tuple_type"
        ):
            problems.setdefault(path, Problem(path, _describe_deep_list(path, raw["input"])))
            continue
        sentence = _describe_error(path, raw, valid_keys)
        if raw["type"] == "model_type" and path.startswith("search.parameters."):
            value = format_value(raw["input"])
            example = "..." if raw["input"] is None else value
            sentence = (
                f"{path} is {value}, but must list the values to try: {{values: [{example}]}}"
            )
            problems[path] = Problem(path, sentence)
            continue
        if (
            path in problems
        ):  # the branches of a union each report an error: "a whole number", "'auto'"
            earlier = problems[path].sentence
            # NaN fails in the integer branch of a union too; that it must be finite is the useful
            # half.
            if "finite number" in sentence + earlier:
                preferred = sentence if "finite number" in sentence else earlier
                problems[path] = Problem(path, preferred)
                continue
            is_covered = raw["type"] not in _REQUIREMENTS or earlier.endswith(
                _describe_requirement(raw)
            )
            sentence = earlier if is_covered else f"{earlier} or {_describe_requirement(raw)}"
        problems[path] = Problem(path, sentence)
    return list(problems.values())


def _describe_deep_list(path: str, value: Any) -> str:
    sentence = f"{path} must be a list of numbers, texts or true/false, without inner lists"
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return sentence
    return f'{sentence}. To use a list as one value, write it as "{",".join(value)}"'


_HALF_PRECISION_NAMES = {
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}
"""Common name of a 16-bit format -> the name in torch."""


def describe_request_error(raw: Any) -> str:
    """Return the message for a pydantic error in a request.

    Args:
        raw: One entry of `errors()` of the validation error.
    """
    location = tuple(
        part for part in raw["loc"] if part != "body"
    )  # pydantic's prefix for the body of a request
    return _describe_error(_get_field_path(location) or "the request", raw, ())


def _describe_error(path: str, raw: Any, valid_keys: Collection[str] | None) -> str:
    path = shorten_text(path, _MAX_KEY_LENGTH)
    match raw["type"]:
        case "extra_forbidden":
            return (
                describe_unknown_key(path)
                if valid_keys is None
                else _describe_invalid_key(path, valid_keys)
            )
        case "missing":
            return f"{path} is missing"
        case "value_error":
            message = str(raw["ctx"]["error"])
            return f"{path}: {message}" if path else message
        case "string_too_short" | "too_short" if raw["ctx"]["min_length"] == 1:
            return f"{path} is empty, but must have a value"
        case "literal_error" if (
            path.endswith(".quantization") and str(raw["input"]) in _HALF_PRECISION_NAMES
        ):
            sentence = (
                f"{path} is {format_value(raw['input'])}, but must be {_describe_requirement(raw)}"
            )
            return (
                f"{sentence}; for 16-bit weights use `set: {{model.dtype: "
                f"{_HALF_PRECISION_NAMES[str(raw['input'])]}}}`"
            )
        case kind if kind in _REQUIREMENTS:
            return (
                f"{path} is {format_value(raw['input'])}, but must be {_describe_requirement(raw)}"
            )
    return f"{path} is {format_value(raw['input'])}, which is not valid"


_MAX_KEY_LENGTH = 120


def _describe_requirement(raw: Any) -> str:
    if raw["type"] == "string_pattern_mismatch":
        pattern = raw["ctx"]["pattern"]
        return next(
            (description for part, description in _PATTERNS.items() if part in pattern),
            f"of the form {pattern}",
        )
    return _REQUIREMENTS[raw["type"]].format(**raw.get("ctx", {}))


_PATTERNS = {
    "^[a-z0-9](": "1 to 40 lower-case letters, digits and dashes, without a dash at either end",
    "^https?:": "an address that begins with https:// or http://, without a password in it",
    "{0,127}$": "at most 128 letters, digits, dots, dashes and underscores",
    r"^[^\s": "one word, without spaces",
    r"^[/~$]": "an absolute path, or one that begins with ~ or a variable",
    r"\x0a-\x1f": "one line of text",
}
"""Part of a regular expression -> description of the texts that it accepts."""


def _describe_invalid_key(path: str, valid_keys: Collection[str]) -> str:
    suggestion = fields.find_closest(path, valid_keys)
    return f"{path} is not a known key" + (f"; did you mean {suggestion!r}?" if suggestion else "")


def describe_unknown_key(path: str) -> str:
    """Return the message for a key that no block has, with the closest valid key.

    The most specific hint is used: the key has dots and belongs inside a block, it is a key
    of a search parameter, another tool's name, a misspelt key of the same block, or a field
    of another block.
    """
    block, _, leaf = path.rpartition(".")
    if path in fields.get_leaf_fields():  # a key with dots, as other tools write it
        return (
            f"{path} is written as one key, but must be inside its block: {block}: {{{leaf}: ...}}"
        )
    if block.startswith("search.parameters."):
        suggestion = fields.find_closest(leaf, _PARAMETER_KEYS)
        hint = (
            f"did you mean {suggestion!r}?"
            if suggestion
            else f"the keys are {', '.join(_PARAMETER_KEYS)}"
        )
        return f"{path} is not a known key; {hint}"
    prefix = f"{block}." if block else ""
    block_keys = {
        field_path.removeprefix(prefix).split(".")[0]
        for field_path in fields.get_leaf_fields()
        if field_path.startswith(prefix)
    }
    foreign = get_foreign_hint(leaf)
    if foreign:
        return f"{path} is not a known key; {foreign}"
    suggestion = fields.find_closest(leaf, block_keys)
    if suggestion:
        return f"{path} is not a known key; did you mean {suggestion!r}?"
    suggested_path = fields.suggest_path(path)
    return f"{path} is not a known key" + (
        f"; did you mean {suggested_path!r}?" if suggested_path else ""
    )


def format_value(value: Any) -> str:
    """Return a value as the user wrote it, shortened to one line.

    Booleans are written as in YAML, a missing value as `empty`, and a text with its quotes.
    The result has at most 80 characters.
    """
    text = "empty" if value is None else repr(value)
    if isinstance(value, bool):
        text = str(value).lower()
    return text if len(text) <= 80 else text[:77] + "..."


def _get_field_path(location: tuple[int | str, ...]) -> str:
    """Return the dotted field of a location.

    Branches of unions and positions in lists are left out: they are internal to pydantic.
    """
    parts: list[str] = []
    for part in location:
        if isinstance(part, int):
            continue
        if part in ("int", "float", "str", "bool") or part.startswith(
            ("literal[", "tuple[", "function-", "constrained")
        ):
            continue
        parts.append(part)
    return ".".join(parts)
