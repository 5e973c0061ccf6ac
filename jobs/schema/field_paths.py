"""List the job file's fields as dotted paths, and read, write and correct such paths.

Searches, arms, links, overrides and error messages name a field by a path such as
`train.learning_rate`. The trees here are nested dicts, as YAML gives them or as
`model_dump` returns them.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorafleet.jobs.schema.job import JobSpec

NOT_SEARCHED = tuple(
    "name task search compare tracking resources evaluate linked data environment".split()
)
"""Blocks that a search must not vary: it compares trainings on the same rows and the same
hardware.
"""
_EXPRESSION_BLOCKS = ("model", "lora", "qlora", "prompt_tuning", "train")
"""Blocks whose fields an expression in another block may name without the block: `nan` does
not mean retries.nan.
"""


@cache
def get_leaf_fields() -> dict[str, FieldInfo]:
    """Return every field that holds a value, by its dotted path (`train.learning_rate`).

    A block whose keys are names of the user's own, such as `search.parameters`, counts as
    one field. The result is cached: do not change it.
    """
    return dict(_iterate_fields(JobSpec, ""))


def _iterate_fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted path and the definition of every field that holds a value."""
    for name, field in model.model_fields.items():
        block = _find_block(field.annotation)
        if block is None:
            yield f"{prefix}{name}", field
        else:
            yield from _iterate_fields(block, f"{prefix}{name}.")


def _find_block(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a field that is a block; None for a field that holds a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        # An optional block, such as `SearchSpec | None`.
        blocks = [block for arg in typing.get_args(annotation) if (block := _find_block(arg))]
        return blocks[0] if blocks else None
    return None


def is_number(path: str) -> bool:
    """Return whether a field holds a number, and so may be an arithmetic expression.

    A field that also takes text is no number: an expression could not be told from a text.

    Args:
        path: Path of an existing field.
    """
    annotation = get_leaf_fields()[path].annotation
    kinds = set(typing.get_args(annotation)) or {annotation}
    return bool(kinds & {int, float}) and str not in kinds


def is_integer(path: str) -> bool:
    """Return whether a field holds an integer.

    A path that is not a field gives False.
    """
    annotation = get_leaf_fields()[path].annotation if path in get_leaf_fields() else None
    kinds = set(typing.get_args(annotation)) or {annotation}
    return int in kinds and float not in kinds


def find_closest(text: str, candidates: typing.Iterable[str]) -> str | None:
    """Return the candidate that a misspelt word most likely means, or None."""
    matches = difflib.get_close_matches(text, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggest_path(path: str) -> str | None:
    """Return the field that a wrong dotted path most likely means, or None.

    A field of the same name in another block is preferred to a field of a similar name.
    """
    leaf = path.rpartition(".")[2]
    matches = [candidate for candidate in get_leaf_fields() if candidate.rpartition(".")[2] == leaf]
    if matches:
        return matches[0]
    similar = find_closest(leaf, (candidate.rpartition(".")[2] for candidate in get_leaf_fields()))
    if similar:
        return next(
            candidate for candidate in get_leaf_fields() if candidate.rpartition(".")[2] == similar
        )
    return find_closest(path, get_leaf_fields())


def resolve_path(name: str, beside: str) -> str:
    """Return the dotted path of a name in an expression.

    The name is used as written, or else looked up in the block of `beside`, the field that the
    expression belongs to.
    """
    if name in get_leaf_fields() or "." in name:
        return name
    same_block = f"{beside.rpartition('.')[0]}.{name}"
    if same_block in get_leaf_fields():
        return same_block
    matches = [
        candidate
        for candidate in get_leaf_fields()
        if candidate.rpartition(".")[2] == name and candidate.split(".")[0] in _EXPRESSION_BLOCKS
    ]
    return matches[0] if matches else name


def get_value(tree: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path of nested dicts; None if a block is missing."""
    value: Any = tree
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def set_value(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path of nested dicts, and create missing blocks.

    The tree is changed in place. A value where a block should be, such as null, is replaced
    by a block.
    """
    *blocks, leaf = path.split(".")
    for part in blocks:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[leaf] = value


def remove_value(tree: dict[str, Any], path: str) -> bool:
    """Remove the value at a dotted path, and return whether it was there.

    A key that contains dots (of a search) counts as one key.
    """
    for key in [key for key in tree if path == key or path.startswith(f"{key}.")]:
        inner = tree[key]
        if path == key or not isinstance(inner, dict):
            del tree[key]
            return True
        if remove_value(inner, path.removeprefix(f"{key}.")):
            return True
    return False
