"""Check that fetched files are unchanged, without reading them each time.

The user's state folder records size, time of change, inode and SHA-256 of each file.
Files whose first three are unchanged are not read; others are hashed again. Files of
the hub's cache are known from the start, because its blobs are named by their hash.
Assets are pinned. A cache that others can write to is refused as a whole.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.errors import AssetError, JobFileError, RunError
from lorafleet.jobs.runs.trust import find_other_writer
from lorafleet.jobs.user import get_state_folder

_SHA256, _GIT_HASH = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_BLOCK_BYTES = 2**20


def check_cache(folder: Path) -> None:
    """Raise AssetError for a cache that another user can change.

    Its content decides what is trained. Call it before any file of the cache is used. The
    result is remembered for the life of the process.
    """
    sentence = _find_cache_writer(folder)
    if sentence:
        raise AssetError(
            f"{sentence}, so the cache {folder} is not used: use another one (LORAFLEET_CACHE, "
            "HF_HUB_CACHE), or list it in trusted_folders of ~/.config/lorafleet/config.yaml "
            "(docs/security.md)"
        )


# Every use of a model or data set asks again, and each answer inspects all folders above the cache.
@lru_cache(maxsize=16)
def _find_cache_writer(folder: Path) -> str | None:
    try:
        return find_other_writer(folder) if folder.is_dir() else None
    except OSError as error:
        return f"{folder} cannot be accessed ({error.strerror})"
    except JobFileError as error:
        return str(error)


def record_fetched_files(folder: Path) -> None:
    """Record the files of a folder that was fetched just now.

    Every file is read once. If the state folder cannot be written, no record is made, and
    the files are read at each use.
    """
    _write_record(
        folder,
        {
            name: _build_row(path, files.compute_sha256(path))
            for name, path in _list_files(folder).items()
        },
    )


def compute_content_hash(folder: Path) -> str:
    """Return the SHA-256 over the names and bytes of a folder's files, in hex.

    Names are relative to the folder, in sorted order; lock files do not count. The pins of
    assets (`Asset.content`) are this value.
    """
    return _hash_rows(
        {
            name: _build_row(path, files.compute_sha256(path))
            for name, path in _list_files(folder).items()
        }
    )


def _hash_rows(rows: dict[str, dict[str, Any]]) -> str:
    lines = (f"{name}\0{rows[name]['sha256']}\n" for name in sorted(rows))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_unchanged(folder: Path, *, read_all: bool = False, content: str | None = None) -> None:
    """Raise AssetError if the files of a fetched folder are not those that were fetched.

    Files whose size, time and inode are unchanged are not read. Files without a record are
    recorded now; files of the hub's cache must match the hash in their name first. A change
    that keeps size and time is only found with `read_all`.

    Args:
        folder: The folder of an asset, a snapshot of the hub's cache or a converted model.
        read_all: Read every file, including those that look unchanged.
        content: Pinned hash of the folder (see `compute_content_hash`).

    Raises:
        AssetError: A file differs, is missing, or the whole does not match `content`.
    """
    recorded, current = _read_record(folder), {}
    for name, path in _list_files(folder).items():
        # The record is updated where only the look has changed, so such a file is read once and not
        # at each use.
        previous = recorded.get(name)
        if previous and not read_all and _build_row(path, previous["sha256"]) == previous:
            current[name] = previous
            continue
        digest = files.compute_sha256(path)
        if digest != (previous["sha256"] if previous else digest) or not _has_named_hash(
            path, digest
        ):
            raise AssetError(
                f"{path} differs from the fetched file (its SHA-256 is {digest[:16]}...): {_REMEDY}"
            )
        current[name] = _build_row(path, digest)
    missing = sorted(set(recorded) - set(current))
    if missing:
        raise AssetError(f"{folder} no longer has {missing[0]}: {_REMEDY}")
    if content is not None and _hash_rows(current) != content:
        raise AssetError(f"{folder} contains other files than those that were fetched: {_REMEDY}")
    if current != recorded:
        _write_record(folder, current)


_REMEDY = "delete the folder, and run `lorafleet fetch` again"


def _list_files(folder: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def _build_row(path: Path, digest: str) -> dict[str, Any]:
    status = path.stat()
    return {
        "size": status.st_size,
        "changed": status.st_mtime_ns,
        "inode": status.st_ino,
        "sha256": digest,
    }


def _has_named_hash(path: Path, digest: str) -> bool:
    """Return whether a blob of the hub's cache has the hash in its name.

    The name is a SHA-256 for files in LFS, or git's SHA-1 for small files. True for files
    that are not blobs of the cache, and for other names.
    """
    blob = path.resolve()
    if blob.parent.name != "blobs":
        return True
    if _SHA256.fullmatch(blob.name):
        return blob.name == digest
    return not _GIT_HASH.fullmatch(blob.name) or blob.name == _compute_git_hash(blob)


def _compute_git_hash(path: Path) -> str:
    # Git hashes a header with the type and the size before the content.
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _get_record_path(folder: Path) -> Path:
    return (
        get_state_folder()
        / "fetched"
        / f"{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:32]}.json"
    )


def _read_record(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        record = files.read_json(_get_record_path(folder))
        # A folder that was deleted and fetched again has another inode: its old record says nothing
        # about the new files.
        is_recreated = record.get("inode") != folder.stat().st_ino
    except (RunError, OSError):  # a damaged record counts as missing
        return {}
    return {} if is_recreated else record.get("files") or {}


def _write_record(folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    try:
        files.write_json(
            _get_record_path(folder),
            {"folder": str(folder.absolute()), "inode": folder.stat().st_ino, "files": rows},
        )
    except OSError:  # the state folder is not writable: every file is checked again next time
        return
