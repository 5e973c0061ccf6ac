"""Checkpoints: a folder that is there whole or not at all, read without running anything that is in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_STATE = "training_state.pt"
_TENSORS = "trained.safetensors"


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Fill the folder that is yielded; at the end it takes the place of `target`.

    A process killed in between leaves the old folder, or (between the two renames) the old one as `NAME.old`, which
    `settled` puts back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    settled(target)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    old = target.with_name(f"{target.name}.old")
    try:
        scratch.chmod(0o755)
        yield scratch
        if target.exists():
            target.rename(old)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def settled(target: Path) -> Path:
    """The folder, after a replacement that was killed halfway has been undone."""
    old = target.with_name(f"{target.name}.old")
    if old.is_dir():
        if target.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for left in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
    return target


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write trained values by name, in safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, str(folder / _TENSORS))


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read what `save_tensors` wrote, onto the CPU."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = load_file(str(folder / _TENSORS))
    return found


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values."""
    torch.save(state, folder / _STATE)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote: tensors and plain values alone (`weights_only`), no code."""
    state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    return state


def rng_state() -> dict[str, torch.Tensor]:
    """torch's random state, on CPU and on this process's GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Go on with a saved random state."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
