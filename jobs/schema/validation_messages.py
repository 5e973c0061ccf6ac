"""pydantic's errors as sentences: "train.seed is -1, but must be at least 0"."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lorafleet.jobs.errors import Problem, SpecProblems
from lorafleet.jobs.loading.aliases import foreign_hint
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.text import cut
from pydantic import ValidationError


def of_another_version(path: Path, error: ValidationError) -> str:
    """What to say of a file of ours that this version does not read."""
    first = sentences(error, known=())[0]
    return f"{path} is of another version of lorafleet, or damaged: {first.sentence}"


_WANTED = {
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
    "int_parsing_size": "a whole number that is not that large",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
    "string_unicode": "a text without half characters",
    "too_long": "at most {max_length} long",
    "set_type": "a list",
    "iterable_type": "a list",
    "mapping_type": "a block of keys",
    "model_attributes_type": "a block of keys",
    "none_required": "empty",
    "invalid_key": "a block whose keys are texts",
    "json_invalid": "JSON",
    "json_type": "JSON",
    "bytes_type": "a text",
    "int_too_big": "a smaller number",
    "multiple_of": "a multiple of {multiple_of}",
    "string_pattern_mismatch": "of the form {pattern}",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
    "too_short": "at least {min_length} long",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
    "tuple_type": "a list",
    "list_type": "a list",
}


_PARAMETER_KEYS = ("values", "distribution", "min", "max", "q", "expression")


def sentences(error: ValidationError, known: Collection[str] | None = None) -> list[Problem]:
    """Every error of a failed validation, each with its dotted field and a sentence; one a field.

    `known` are the keys that there are, where they are not a job's.
    """
    problems: dict[str, Problem] = {}
    for raw in error.errors(include_url=False):
        cause = raw.get("ctx", {}).get("error")
        if isinstance(cause, SpecProblems):
            problems.update((problem.path, problem) for problem in cause.problems)
            continue
        path = _path(raw["loc"])
        if path.startswith("search.parameters.") and path.endswith(".values") and raw["type"] != "tuple_type":
            problems.setdefault(path, Problem(path, _too_deep(path, raw["input"])))
            continue
        sentence = _sentence(path, raw, known)
        if raw["type"] == "model_type" and path.startswith("search.parameters."):
            value = shown(raw["input"])
            example = "..." if raw["input"] is None else value
            sentence = f"{path} is {value}, but must list what it may be: {{values: [{example}]}}"
            problems[path] = Problem(path, sentence)
            continue
        if path in problems:  # the branches of a union: "a whole number", "'auto'"
            earlier = problems[path].sentence
            if "finite number" in sentence + earlier:
                continue_with = sentence if "finite number" in sentence else earlier
                problems[path] = Problem(path, continue_with)
                continue
            known_already = raw["type"] not in _WANTED or earlier.endswith(_wanted(raw))
            sentence = earlier if known_already else f"{earlier} or {_wanted(raw)}"
        problems[path] = Problem(path, sentence)
    return list(problems.values())


def _too_deep(path: str, value: Any) -> str:
    sentence = f"{path} must be a list of numbers, texts or true/false, one level deep"
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return sentence
    return f'{sentence}: a list is one value when it is written as "{",".join(value)}"'


_HALF = {"fp16": "float16", "float16": "float16", "half": "float16", "bf16": "bfloat16", "bfloat16": "bfloat16"}
"""What people call 16-bit weights -> torch's name."""


def sentence_of(raw: Any) -> str:
    """Return one of pydantic's errors in the words that all our messages have."""
    inside = tuple(part for part in raw["loc"] if part != "body")  # of a request
    return _sentence(_path(inside) or "the request", raw, ())


def _sentence(path: str, raw: Any, known: Collection[str] | None) -> str:
    path = cut(path, _LONGEST_KEY)
    match raw["type"]:
        case "extra_forbidden":
            return unknown_key(path) if known is None else _not_among(path, known)
        case "missing":
            return f"{path} is missing"
        case "value_error":
            message = str(raw["ctx"]["error"])
            return f"{path}: {message}" if path else message
        case "string_too_short" | "too_short" if raw["ctx"]["min_length"] == 1:
            return f"{path} is empty, but must hold something"
        case "literal_error" if path.endswith(".quantization") and str(raw["input"]) in _HALF:
            said = f"{path} is {shown(raw['input'])}, but must be {_wanted(raw)}"
            return f"{said}; weights in 16 bits are `set: {{model.dtype: {_HALF[str(raw['input'])]}}}`"
        case kind if kind in _WANTED:
            return f"{path} is {shown(raw['input'])}, but must be {_wanted(raw)}"
    return f"{path} is {shown(raw['input'])}, which cannot be used here"


_LONGEST_KEY = 120


def _wanted(raw: Any) -> str:
    if raw["type"] == "string_pattern_mismatch":
        pattern = raw["ctx"]["pattern"]
        return next((words for part, words in _PATTERNS.items() if part in pattern), f"of the form {pattern}")
    return _WANTED[raw["type"]].format(**raw.get("ctx", {}))


_PATTERNS = {
    "^[a-z0-9](": "1 to 40 lower-case letters, digits and dashes, without a dash at either end",
    "^https?:": "an address that begins with https:// or http://, without a password in it",
    "{0,127}$": "at most 128 letters, digits, dots, dashes and underscores",
    r"^[^\s": "one word, without spaces",
    r"^[/~$]": "an absolute path, or one that begins with ~ or a variable",
    r"\x0a-\x1f": "one line of text",
}
"""What a text must be, by a part of the pattern that it is checked with."""


def _not_among(path: str, known: Collection[str]) -> str:
    near = fields.closest(path, known)
    return f"{path} is not a known key" + (f"; did you mean {near!r}?" if near else "")


def unknown_key(path: str) -> str:
    """The sentence for a key that no block has, with the closest right one."""
    block, _, leaf = path.rpartition(".")
    if path in fields.leaves():  # a dotted key, as in other tools' files
        return f"{path} is written as a key, but must be in its block: {block}: {{{leaf}: ...}}"
    if block.startswith("search.parameters."):
        near = fields.closest(leaf, _PARAMETER_KEYS)
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(_PARAMETER_KEYS)}"
        return f"{path} is not a known key; {hint}"
    prefix = f"{block}." if block else ""
    here = {known.removeprefix(prefix).split(".")[0] for known in fields.leaves() if known.startswith(prefix)}
    foreign = foreign_hint(leaf)
    if foreign:
        return f"{path} is not a known key; {foreign}"
    near = fields.closest(leaf, here)
    if near:
        return f"{path} is not a known key; did you mean {near!r}?"
    meant = fields.suggest_path(path)
    return f"{path} is not a known key" + (f"; did you mean {meant!r}?" if meant else "")


def shown(value: Any) -> str:
    """A value as a user wrote it, cut to a line."""
    text = "empty" if value is None else repr(value)
    if isinstance(value, bool):
        text = str(value).lower()
    return text if len(text) <= 80 else text[:77] + "..."


def _path(location: tuple[int | str, ...]) -> str:
    """The dotted field of a location; union branches and list positions are pydantic's business, not the user's."""
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
