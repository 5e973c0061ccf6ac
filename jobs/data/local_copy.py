"""A model's files on a node's own disk: copied once, under a lock, and checked by hash once a job."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lorafleet.jobs import files

_SEAL = "staged.json"
_SPARE = 2**30
"""Bytes that must stay free on the disk beside the copy."""
_BLOCK = 2**22


def staged(folder: Path) -> Path:
    """The copy of a model's folder on this node's disk (LORAFLEET_STAGE), or the folder itself."""
    stage = os.environ.get("LORAFLEET_STAGE")
    if not stage:
        return folder
    copy = Path(stage) / _key(folder)
    return copy if (copy / _SEAL).is_file() else folder


def stage(folder: Path, target: Path, say: Callable[[str], None]) -> Path:
    """Copy a model's folder below `target`, or check the copy that is there; returns the copy's folder.

    Where there is no room the folder itself is returned, and `say` is told.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy = target / _key(folder)
    with files.locked(copy):
        for left in target.glob(f".{copy.name}-*"):  # of one that was killed while it copied
            shutil.rmtree(left, ignore_errors=True)
        if (copy / _SEAL).is_file():
            if _whole(copy):
                return copy
            say(f"{copy} is damaged, and is copied anew")
            shutil.rmtree(copy)
        size = sum(path.stat().st_size for path in _model_files(folder))
        if shutil.disk_usage(target).free < size + _SPARE:
            say(f"no room for {size / 1e9:.1f} GB in {target}: the model is read from {folder}")
            return folder
        scratch = Path(tempfile.mkdtemp(dir=target, prefix=f".{copy.name}-"))
        try:
            digests = {path.name: _copied(path, scratch / path.name) for path in _model_files(folder)}
            wrong = [name for name, digest in digests.items() if files.sha256_file(scratch / name) != digest]
            if wrong:
                say(f"{target} did not keep {wrong[0]} as it was written: the model is read from {folder}")
                return folder
            (scratch / _SEAL).write_text(json.dumps({"sha256": digests}))
            scratch.rename(copy)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return copy


def _model_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _key(folder: Path) -> str:
    """A name that changes when the source does."""
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _model_files(folder)]
    return f"{folder.name[:40]}-{hashlib.sha256(repr((str(folder), facts)).encode()).hexdigest()[:16]}"


def _copied(source: Path, target: Path) -> str:
    """Copy a file; returns the SHA-256 of what was read."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(_BLOCK):
            digest.update(block)
            write.write(block)
    return digest.hexdigest()


def _whole(copy: Path) -> bool:
    """Whether a copy's files are those that were written."""
    try:
        digests: dict[str, str] = json.loads((copy / _SEAL).read_text())["sha256"]
        return all(files.sha256_file(copy / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError):
        return False
