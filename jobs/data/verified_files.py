"""Whether fetched files are still what was fetched: by how they look, and by their bytes where that differs.

What was seen is kept in the user's state folder: for each file its size, time of change, inode and SHA-256. Of the
hub's cache the bytes are known from the start, for its blobs are named by their hash; of assets they are pinned.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.errors import AssetError, JobFileError, RunError
from lorafleet.jobs.runs.trust import others_can_write
from lorafleet.jobs.user import state_folder

_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_BLOCK = 2**20


def check_cache(folder: Path) -> None:
    """Raise AssetError for a cache that another user can change: what is in it decides what is trained."""
    sentence = _open_cache(folder)
    if sentence:
        raise AssetError(
            f"{sentence}, so that the cache {folder} is not used: name another (LORAFLEET_CACHE, HF_HUB_CACHE), or "
            "list it in trusted_folders of ~/.config/lorafleet/config.yaml (docs/security.md)"
        )


@lru_cache(maxsize=16)
def _open_cache(folder: Path) -> str | None:
    try:
        return others_can_write(folder) if folder.is_dir() else None
    except OSError as error:
        return f"{folder} cannot be looked at ({error.strerror})"
    except JobFileError as error:
        return str(error)


def seal(folder: Path) -> None:
    """Note what is in a folder that was fetched just now."""
    _write(folder, {name: _row(path, files.sha256_file(path)) for name, path in _files(folder).items()})


def content_of(folder: Path) -> str:
    """Return the SHA-256 over the names and bytes of a folder's files, in hex."""
    return _content({name: _row(path, files.sha256_file(path)) for name, path in _files(folder).items()})


def _content(rows: dict[str, dict[str, Any]]) -> str:
    lines = (f"{name}\0{rows[name]['sha256']}\n" for name in sorted(rows))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_unchanged(folder: Path, *, whole: bool = False, content: str | None = None) -> None:
    """Raise AssetError where a fetched folder's files are not those that were fetched.

    Files that look as they did are not read, but with `whole`. What was never noted is noted now: of the hub after a
    look at its bytes, and what has a pinned `content` (see `content_of`) where it has that.
    """
    seen, now = _read(folder), {}
    for name, path in _files(folder).items():
        before = seen.get(name)
        if before and not whole and _row(path, before["sha256"]) == before:
            now[name] = before
            continue
        digest = files.sha256_file(path)
        if digest != (before["sha256"] if before else digest) or not _as_named(path, digest):
            raise AssetError(f"{path} is not what was fetched (its SHA-256 is {digest[:16]}...): {_REMEDY}")
        now[name] = _row(path, digest)
    gone = sorted(set(seen) - set(now))
    if gone:
        raise AssetError(f"{folder} has lost {gone[0]}: {_REMEDY}")
    if content is not None and _content(now) != content:
        raise AssetError(f"{folder} holds other files than were fetched: {_REMEDY}")
    if now != seen:
        _write(folder, now)


_REMEDY = "delete the folder, and run `lorafleet fetch` again"


def _files(folder: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def _row(path: Path, digest: str) -> dict[str, Any]:
    now = path.stat()
    return {"size": now.st_size, "changed": now.st_mtime_ns, "inode": now.st_ino, "sha256": digest}


def _as_named(path: Path, digest: str) -> bool:
    """Whether a blob of the hub's cache has the hash that it is named by: SHA-256, or git's SHA-1 of small files."""
    blob = path.resolve()
    if blob.parent.name != "blobs":
        return True
    if _SHA256.fullmatch(blob.name):
        return blob.name == digest
    return not _GIT.fullmatch(blob.name) or blob.name == _git_hash(blob)


def _git_hash(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _note(folder: Path) -> Path:
    return state_folder() / "fetched" / f"{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:32]}.json"


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        note = files.read_json(_note(folder))
        made_anew = note.get("inode") != folder.stat().st_ino
    except (RunError, OSError):  # a damaged note is none
        return {}
    return {} if made_anew else note.get("files") or {}


def _write(folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    try:
        files.write_json(
            _note(folder), {"folder": str(folder.absolute()), "inode": folder.stat().st_ino, "files": rows}
        )
    except OSError:  # a home that cannot be written: all is looked at again the next time
        return
