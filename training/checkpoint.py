"""Save and load checkpoints: folders replaced atomically and read without executing code.

A checkpoint has the trained values as safetensors, the remaining state for `torch.load`
with `weights_only`, and the SHA-256 of every file. The checksums are written last, so a
folder without them was never complete. The previous checkpoint stays beside the newest
as `NAME.old`.
"""

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
_CHECKSUMS = "checksums.json"


@contextmanager
def replace_folder(target: Path, *, keep: bool = False) -> Iterator[Path]:
    """Yield a new folder to fill; on exit it replaces `target`.

    A process that is killed in between leaves the old folder or, between the two renames,
    the old one as `NAME.old`, which `restore_replaced` moves back.

    Args:
        keep: Keep the old folder as `NAME.old`, in case the new one turns out to be
            unreadable.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    restore_replaced(target)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    old = get_previous_folder(target)
    try:
        yield scratch
        # mkdtemp and safetensors create files that only their owner can read. A shared run folder
        # needs the modes of the user's other files.
        for path in (
            scratch,
            *scratch.rglob("*"),
        ):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~files.UMASK)
        # A folder cannot be renamed onto one that is not empty, so two renames are needed.
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        scratch.rename(target)
    # BaseException: an interrupt or an exit of the process must not leave a half-written folder
    # either.
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if not keep:
        shutil.rmtree(old, ignore_errors=True)


def get_previous_folder(target: Path) -> Path:
    """Return the path at which the folder that `target` replaced may still exist."""
    return target.with_name(f"{target.name}.old")


def restore_replaced(target: Path) -> Path:
    """Undo a replacement that was killed halfway, and return the folder.

    Moves `NAME.old` back if `target` is missing, and deletes unfinished folders beside it.
    The caller must be the only writer of `target`.
    """
    if get_previous_folder(target).is_dir() and not target.is_dir():
        get_previous_folder(target).rename(target)
    for leftover in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return target


def write_checksums(folder: Path) -> None:
    """Flush every file in a folder to disk and record its SHA-256.

    Call it after all processes have written their files and before the folder gets its
    final name.
    """
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            # Without it, a power failure may leave a renamed folder with empty files.
            os.fsync(file.fileno())
        digests[str(path.relative_to(folder))] = files.compute_sha256(path)
    files.write_json(folder / _CHECKSUMS, {"sha256": digests})


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a folder that has recorded checksums, or None."""
    try:
        digests = files.read_json(folder / _CHECKSUMS).get("sha256")
    except RunError:
        digests = None
    if not digests:
        return f"{folder} has no {_CHECKSUMS}"
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or files.compute_sha256(path) != digest:
            return f"{path} is {'missing' if not path.is_file() else 'not as it was written'}"
    return None


def find_newest_intact(target: Path) -> tuple[Path | None, str | None]:
    """Return the newest intact checkpoint, and a description of the first damaged one.

    Either is None if there is none. Damaged checkpoints are deleted.
    """
    first_damage = None
    while restore_replaced(target).is_dir():
        problem = find_damage(target)
        if problem is None:
            return target, first_damage
        first_damage = first_damage or problem
        # Delete it at once: otherwise the next save would keep it as `NAME.old` and delete the
        # intact one.
        shutil.rmtree(target)
    return None, first_damage


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write trained values by name, in safetensors."""
    from safetensors.torch import save_file

    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        str(folder / _TENSORS),
    )


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Load onto the CPU what `save_tensors` wrote."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(str(folder / _TENSORS))
    return tensors


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors and plain values.

    Other objects can be written, but `load_state` refuses to read them.
    """
    torch.save(state, folder / _STATE)


def load_state(folder: Path) -> dict[str, Any]:
    """Load what `save_state` wrote.

    Only tensors and plain values are read (`weights_only`); no code is executed.
    """
    state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    return state


def get_rng_state() -> dict[str, torch.Tensor]:
    """Return torch's random state, on CPU and on this process's GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore a random state that `get_rng_state` returned.

    The state of a GPU is ignored on a machine without one.
    """
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
