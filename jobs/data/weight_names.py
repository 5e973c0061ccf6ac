"""The names and shapes of a model's weights, read from the heads of its safetensors files.

No torch: eight bytes and a JSON text at the beginning of each file say what is in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

_MOST_BYTES = 100_000_000
"""Longest head that safetensors itself reads."""

Shapes = dict[str, tuple[int, ...]]


def weight_shapes(path: Path) -> Shapes:
    """Return the shape of each tensor of a safetensors file, or of all such files of a folder.

    Files that cannot be read say nothing: what loads them names what is wrong with them.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found: Shapes = {}
    for file in files:
        found |= _head(file)
    return found


def weight_dtypes(folder: Path) -> list[str]:
    """Return the different number formats of a folder's safetensors files, in their words (`F32`, `BF16`), sorted."""
    dtypes: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        dtypes |= set(_head(file, "dtype").values())
    return sorted(dtypes)


def _head(file: Path, key: Literal["shape", "dtype"] = "shape") -> dict[str, Any]:
    """Return the shape (as a tuple) or the dtype of each tensor; empty if the file cannot be read."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            head = json.loads(stream.read(length)) if 0 < length <= _MOST_BYTES else {}
        values = {name: about[key] for name, about in head.items() if name != "__metadata__"}
        if key == "shape":
            return {name: tuple(shape) for name, shape in values.items()}
        return {name: str(dtype) for name, dtype in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def layer_names(shapes: Shapes) -> set[str]:
    """Return the dotted paths of the layers that have a matrix."""
    return {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1}


def is_named(path: str, names: tuple[str, ...]) -> bool:
    """Whether one of PEFT's `target_modules` means a layer: by its path, or by the path's end."""
    return any(path == name or path.endswith(f".{name}") for name in names)
