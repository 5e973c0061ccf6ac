"""Writing that cannot leave half a file, and reading that survives one."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jobs.errors import RunError

SCHEMA_VERSION = 1
"""Of every file in a run directory."""


def in_home(path: str) -> Path:
    """A path with its `~` or `~user` spelt out; one of a user who is not known stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises where there is no such user


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, whatever dies in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _umask()
"""Asked once, before there are threads: to ask is to change it for a moment."""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """`write_text` of a JSON object, with its schema version; numbers that are none become null."""
    write_text(path, json.dumps({"schema_version": SCHEMA_VERSION, **finite(value)}, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise RunError(f"{path} is not whole JSON ({error}): it was not written by lorafleet, or damaged") from error
    return value if isinstance(value, dict) else {}


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add one line and flush it. A torn line that a killed writer left is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema_version": SCHEMA_VERSION, **finite(row)}) + "\n"
    with path.open("ab+") as file:
        if file.tell() and _last_byte(file) != b"\n":
            text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """`write_text` of one object a line."""
    versioned = ({"schema_version": SCHEMA_VERSION, **finite(row)} for row in rows)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in versioned))


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    last: bytes = file.read(1)
    return last


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a torn line (its writer was killed) is passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    rows = []
    for line in text.split("\n"):  # and at no other end of a line: a text in a row may hold one of Unicode's
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def finite(value: Any) -> Any:
    """The value with every NaN and infinity as None: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file beside `path`; others wait, or without `wait` get False and no lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
