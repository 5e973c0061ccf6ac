"""The job file's fields as dotted paths: which there are, what they hold, and what a misspelt one was meant to be."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from lorafleet.jobs.schema.job import JobSpec
from pydantic import BaseModel
from pydantic.fields import FieldInfo

NOT_SEARCHED = tuple("name task search compare tracking resources evaluate linked data environment".split())
"""Blocks that a search may not vary: it compares trainings on the same rows and the same hardware."""
_READ = ("model", "lora", "qlora", "prompt_tuning", "train")
"""Blocks whose fields an expression in another block may name without the block: `nan` is not retries.nan."""


@cache
def leaves() -> dict[str, FieldInfo]:
    """Every field that holds a value, by its dotted path: `train.learning_rate`, ..."""
    return dict(_walk(JobSpec, ""))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        block = _block(field.annotation)
        if block is None:
            yield f"{prefix}{name}", field
        else:
            yield from _walk(block, f"{prefix}{name}.")


def _block(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        blocks = [block for arg in typing.get_args(annotation) if (block := _block(arg))]
        return blocks[0] if blocks else None
    return None


def is_number(path: str) -> bool:
    """Whether a field holds a number (and so may be an arithmetic expression)."""
    annotation = leaves()[path].annotation
    kinds = set(typing.get_args(annotation)) or {annotation}
    return bool(kinds & {int, float}) and str not in kinds


def is_whole(path: str) -> bool:
    """Whether a field holds a whole number."""
    annotation = leaves()[path].annotation if path in leaves() else None
    kinds = set(typing.get_args(annotation)) or {annotation}
    return int in kinds and float not in kinds


def closest(word: str, known: typing.Iterable[str]) -> str | None:
    """The known word that a misspelt one most likely means, or None."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def suggest_path(path: str) -> str | None:
    """The field that a wrong dotted path most likely means: the right leaf elsewhere first, then the nearest name."""
    leaf = path.rpartition(".")[2]
    elsewhere = [known for known in leaves() if known.rpartition(".")[2] == leaf]
    if elsewhere:
        return elsewhere[0]
    near = closest(leaf, (known.rpartition(".")[2] for known in leaves()))
    if near:
        return next(known for known in leaves() if known.rpartition(".")[2] == near)
    return closest(path, leaves())


def full_path(name: str, beside: str) -> str:
    """The dotted path of a name in an expression: as written, or else in the block of the field `beside` it."""
    if name in leaves() or "." in name:
        return name
    same_block = f"{beside.rpartition('.')[0]}.{name}"
    if same_block in leaves():
        return same_block
    elsewhere = [known for known in leaves() if known.rpartition(".")[2] == name and known.split(".")[0] in _READ]
    return elsewhere[0] if elsewhere else name


def get(tree: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path of nested dicts; None where a block is missing."""
    value: Any = tree
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path of nested dicts, making the blocks on the way."""
    *blocks, leaf = path.split(".")
    for part in blocks:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[leaf] = value


def drop(tree: dict[str, Any], path: str) -> bool:
    """Take out the value at a dotted path; a key with dots in it (of a search) is one. Returns whether it was there."""
    for key in [key for key in tree if path == key or path.startswith(f"{key}.")]:
        inner = tree[key]
        if path == key or not isinstance(inner, dict):
            del tree[key]
            return True
        if drop(inner, path.removeprefix(f"{key}.")):
            return True
    return False
