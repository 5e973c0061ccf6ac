"""Read the names and shapes of a model's weights from the headers of its safetensors files.

This needs no torch: each file begins with eight bytes for the header's length and a JSON
header.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

_MAX_HEADER_BYTES = 100_000_000
"""Longest header that safetensors itself reads."""

Shapes = dict[str, tuple[int, ...]]


def read_weight_shapes(path: Path) -> Shapes:
    """Return the shape of each tensor of a safetensors file, or of all such files of a folder.

    Files that cannot be read are skipped; whatever loads them later reports what is wrong.

    Args:
        path: A file or a folder. Subfolders are not read.

    Returns:
        Name of the tensor -> its shape. For linear layers the first size is that of the
            output (with Conv1D of GPT-2, the input).
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    shapes: Shapes = {}
    for file in files:
        shapes |= _read_header(file)
    return shapes


def read_weight_dtypes(folder: Path) -> list[str]:
    """Return the distinct number formats of a folder's safetensors files, sorted.

    The names are those of safetensors (`F32`, `BF16`).
    """
    dtypes: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        dtypes |= set(_read_header(file, "dtype").values())
    return sorted(dtypes)


def _read_header(file: Path, key: Literal["shape", "dtype"] = "shape") -> dict[str, Any]:
    """Return the shape (a tuple) or the dtype of each tensor; empty if it cannot be read.

    The file begins with the length of the header as eight bytes, little-endian, and the
    header as JSON: name -> `dtype`, `shape`, `data_offsets`.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # The length comes from the file: a damaged one must not make this read gigabytes.
            header = json.loads(stream.read(length)) if 0 < length <= _MAX_HEADER_BYTES else {}
        values = {name: entry[key] for name, entry in header.items() if name != "__metadata__"}
        if key == "shape":
            return {name: tuple(shape) for name, shape in values.items()}
        return {name: str(dtype) for name, dtype in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def list_layer_names(shapes: Shapes) -> set[str]:
    """Return the dotted paths of the layers that have a weight matrix.

    Tensors of one dimension (biases, normalisations) are not layers that an adapter can
    target.
    """
    return {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1}


def is_named(path: str, names: tuple[str, ...]) -> bool:
    """Return whether PEFT's `target_modules` name a layer, by its path or the path's end.

    PEFT matches a name against whole components: `proj` does not match `q_proj`.

    Args:
        path: Dotted path of the layer.
        names: Entries of `target_modules`.
    """
    return any(path == name or path.endswith(f".{name}") for name in names)
