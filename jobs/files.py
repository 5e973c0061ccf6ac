"""Writing that cannot leave half a file, and reading that survives one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lorafleet.jobs.errors import RunError

SCHEMA_VERSION = 1
"""Of every file in a run directory."""


def in_home(path: str) -> Path:
    """A path with its `~` or `~user` spelt out; one of a user who is not known stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises where there is no such user


def real(path: Path) -> Path:
    """Return a path without links; one whose links go round stays as it is, and cannot be opened."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a zero byte in the name
        return path


def no_file(path: Path) -> str:
    """Say what is in the place of a file that must be one."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "there is no such file"
    except (OSError, ValueError) as error:  # a name with a zero byte
        return f"it cannot be looked at: {getattr(error, 'strerror', None) or error}"
    return f"that is a {next((word for test, word in _KINDS if test(mode)), 'device')}, not a file"


_KINDS = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
_MOST = 10_000_000
_MOST_RECORD = 1_000_000_000
"""Bytes of a file that is named, and of one of a run."""


def read_plain(path: Path, most: int = _MOST) -> bytes:
    """Return the bytes of a file that somebody has named. Pipes, devices and endless files are not begun to be read.

    Raises OSError with a sentence as its `strerror`.
    """
    try:
        now = path.stat()
    except ValueError as error:  # a zero byte in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if stat.S_ISDIR(now.st_mode):
        raise IsADirectoryError(errno.EISDIR, "that is a folder, not a file", str(path))
    if not stat.S_ISREG(now.st_mode):
        raise OSError(errno.EINVAL, no_file(path), str(path))
    if now.st_size > most:
        raise OSError(errno.EFBIG, f"it is larger than {most / 1e6:,.0f} MB", str(path))
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        size = now.st_size + 1  # to ask for more than there is takes as long as to fetch it
        data = file.read(size)
        if len(data) == size or size == 1:
            data += file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most / 1e6:,.0f} MB", str(path))
    return data


def read_plain_text(path: Path, most: int = _MOST, encoding: str = "utf-8") -> str:
    """`read_plain` as text. Raises OSError and UnicodeDecodeError."""
    return read_plain(path, most).decode(encoding)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, whatever dies in between."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """`write_text` of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
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


def share_with_group() -> None:
    """Let the group read what this process and its children write from now on."""
    global UMASK
    UMASK &= ~0o050
    os.umask(UMASK)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """`write_text` of a JSON object, with its schema version; numbers that are none become null."""
    write_text(path, json.dumps({"schema_version": SCHEMA_VERSION, **finite(value)}, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    try:
        value = json.loads(read_plain(path, _MOST_RECORD).decode())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not whole JSON ({error}): it was not written by lorafleet, or damaged") from error
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EFBIG, errno.EISDIR, errno.ELOOP):
            raise
        raise RunError(f"{path} is damaged: {error.strerror}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no JSON object: it was not written by lorafleet, or damaged")
    return value


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add one line and flush it. A torn line that a killed writer left is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema_version": SCHEMA_VERSION, **finite(row)}) + "\n"
    with _opened(path, os.O_RDWR | os.O_APPEND) as file:
        file.seek(0, os.SEEK_END)
        if file.tell() and _last_byte(file) != b"\n":
            text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _opened(path: Path, flags: int) -> BinaryIO:
    """Open a file for writing, made where it is not there yet. Raises RunError for links and what is no file."""
    try:
        handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise RunError(f"{path} is a link or a pipe, and no file of lorafleet's: take it away") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise RunError(f"{path} is no plain file of lorafleet's: take it away")
    return os.fdopen(handle, "rb+" if flags & os.O_APPEND == 0 else "ab+")


def overwrite(path: Path, data: bytes) -> None:
    """Write a file in place. Raises RunError for links and what is no file, as `append_jsonl` does."""
    with _opened(path, os.O_RDWR) as file:
        file.truncate()
        file.write(data)


def opened_to_append(path: Path) -> BinaryIO:
    """Open a log. Raises RunError for links and what is no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return _opened(path, os.O_RDWR | os.O_APPEND)


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
        text = read_plain(path, _MOST_RECORD).decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EFBIG, errno.EISDIR, errno.ELOOP):
            raise
        raise RunError(f"{path} is damaged: {error.strerror}") from error
    rows = []
    for line in text.split("\n"):  # and at no other end of a line: a text in a row may hold one of Unicode's
        with contextlib.suppress(ValueError, RecursionError):
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
    """Hold an exclusive lock on a file beside `path`; others wait, or without `wait` get False and no lock.

    Raises RunError where something else than a file of ours is in the lock's place: it is never emptied or followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(path.with_name(f"{path.name}.lock"), os.O_RDWR) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
