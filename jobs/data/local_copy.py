"""Copy a model's files to a node's own disk: once, under a lock, and verified by hash.

On a cluster, many processes of a job read the same weights from a network disk. A Slurm
job sets LORAFLEET_STAGE and calls `create_node_copy` once on each node before training
starts; the processes then find the copy with `resolve_node_copy`. The manifest is
written last, so a folder with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lorafleet.jobs import files

_MANIFEST = "staged.json"
_MIN_FREE_BYTES = 2**30
"""Bytes that must stay free on the disk after the copy."""
_BLOCK_BYTES = 2**22


def resolve_node_copy(folder: Path) -> Path:
    """Return the copy of a model's folder on this node's disk, or the folder itself.

    The environment variable LORAFLEET_STAGE names the folder of the copies. The copy is not
    verified here: `create_node_copy` has done that when the job started on this node.
    """
    stage = os.environ.get("LORAFLEET_STAGE")
    if not stage:
        return folder
    copy = Path(stage) / _build_copy_name(folder)
    return copy if (copy / _MANIFEST).is_file() else folder


def create_node_copy(folder: Path, target: Path, report: Callable[[str], None]) -> Path:
    """Copy a model's folder into `target`, or verify the copy that is already present.

    Safe to call from several processes of a node: they wait for one another. A copy that
    was killed half-way leaves a temporary folder, which the next call removes.

    Args:
        folder: The model's folder. Subfolders are not copied.
        target: Folder of the copies on this node; it is created with mode 0700.
        report: Called with a message if the copy is damaged or cannot be made.

    Returns:
        The folder of the copy, or `folder` itself if there is not enough room or the copy
            failed verification.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy = target / _build_copy_name(folder)
    with files.hold_lock(copy):
        for leftover in target.glob(
            f".{copy.name}-*"
        ):  # left by a process that was killed while copying
            shutil.rmtree(leftover, ignore_errors=True)
        if (copy / _MANIFEST).is_file():
            if _is_intact(copy):
                return copy
            report(f"{copy} is damaged and is copied again")
            shutil.rmtree(copy)
        size = sum(path.stat().st_size for path in _list_model_files(folder))
        if shutil.disk_usage(target).free < size + _MIN_FREE_BYTES:
            report(f"{target} has no room for {size / 1e9:.1f} GB: reading the model from {folder}")
            return folder
        temp_folder = Path(tempfile.mkdtemp(dir=target, prefix=f".{copy.name}-"))
        try:
            # Each file is hashed as it is read from the source, and once more from the copy: a disk
            # that did not store it correctly is noticed before the job trains on it.
            digests = {
                path.name: _copy_file(path, temp_folder / path.name)
                for path in _list_model_files(folder)
            }
            mismatched = [
                name
                for name, digest in digests.items()
                if files.compute_sha256(temp_folder / name) != digest
            ]
            if mismatched:
                report(
                    f"{target} did not store {mismatched[0]} correctly: reading the model from "
                    f"{folder}"
                )
                return folder
            (temp_folder / _MANIFEST).write_text(json.dumps({"sha256": digests}))
            temp_folder.rename(copy)
        finally:
            shutil.rmtree(temp_folder, ignore_errors=True)
    return copy


def _list_model_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _build_copy_name(folder: Path) -> str:
    """Return a folder name that changes whenever the source changes.

    Sizes and times of change are enough, and do not need the weights to be read over the
    network.
    """
    metadata = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in _list_model_files(folder)
    ]
    digest = hashlib.sha256(repr((str(folder), metadata)).encode()).hexdigest()
    return f"{folder.name[:40]}-{digest[:16]}"


def _copy_file(source: Path, target: Path) -> str:
    """Copy a file and return the SHA-256 of the bytes that were read."""
    digest = hashlib.sha256()
    with source.open("rb") as source_file, target.open("wb") as target_file:
        while block := source_file.read(_BLOCK_BYTES):
            digest.update(block)
            target_file.write(block)
    return digest.hexdigest()


def _is_intact(copy: Path) -> bool:
    """Return whether the files of a copy still have the hashes that were recorded."""
    try:
        digests: dict[str, str] = json.loads((copy / _MANIFEST).read_text())["sha256"]
        return all(files.compute_sha256(copy / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError):
        return False
