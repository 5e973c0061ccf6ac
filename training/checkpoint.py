"""Checkpoints: a folder that is there whole or not at all, read without running anything that is in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError

_STATE = "training_state.pt"
_TENSORS = "trained.safetensors"
_SEAL = "checksums.json"


@contextmanager
def replaced_folder(target: Path, *, keep: bool = False) -> Iterator[Path]:
    """Fill the folder that is yielded; at the end it takes the place of `target`.

    A process killed in between leaves the old folder, or (between the two renames) the old one as `NAME.old`, which
    `settled` puts back. With `keep` the old one stays as `NAME.old`, for the day on which the new one cannot be read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    settled(target)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    old = before(target)
    try:
        yield scratch
        for path in (scratch, *scratch.rglob("*")):  # some writers make files that their owner alone can read
            path.chmod((0o777 if path.is_dir() else 0o666) & ~files.UMASK)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if not keep:
        shutil.rmtree(old, ignore_errors=True)


def before(target: Path) -> Path:
    """Where the folder that `target` replaced may still be."""
    return target.with_name(f"{target.name}.old")


def settled(target: Path) -> Path:
    """The folder, after a replacement that was killed halfway has been undone."""
    if before(target).is_dir() and not target.is_dir():
        before(target).rename(target)
    for left in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
    return target


def seal(folder: Path) -> None:
    """Write down the SHA-256 of every file in a folder, and bring all of it to the disk."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        digests[str(path.relative_to(folder))] = files.sha256_file(path)
    files.write_json(folder / _SEAL, {"sha256": digests})


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None."""
    try:
        digests = files.read_json(folder / _SEAL).get("sha256")
    except RunError:
        digests = None
    if not digests:
        return f"{folder} has no {_SEAL}"
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or files.sha256_file(path) != digest:
            return f"{path} is {'missing' if not path.is_file() else 'not as it was written'}"
    return None


def newest_good(target: Path) -> tuple[Path | None, str | None]:
    """(the newest checkpoint that can be trusted, or None; what was wrong with one that cannot, or None)."""
    found = None
    while settled(target).is_dir():
        wrong = damage(target)
        if wrong is None:
            return target, found
        found = found or wrong
        # Out of the way at once: the next save would put it in the place of the good one before it.
        shutil.rmtree(target)
    return None, found


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
