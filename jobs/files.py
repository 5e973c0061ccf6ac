"""Write files atomically, and read files that may be damaged.

Run folders live on shared disks, survive kills at any moment, and may come from
somebody else. All files of a run are therefore written by replacing them or by
appending whole lines, and are read with a size limit and without following what is not
a regular file. Data files of users are read in `jobs/data/data_files.py`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from lorafleet.jobs.errors import RunError

SCHEMA_VERSION = 1
"""Version that is written to every file of a run directory."""


def expand_home(path: str) -> Path:
    """Return a path with `~` or `~user` expanded; unchanged if there is no such user."""
    # Path.expanduser raises if there is no such user.
    return Path(os.path.expanduser(path))  # noqa: PTH111


def resolve_links(path: Path) -> Path:
    """Return a path without symbolic links.

    A path with a link cycle is returned as it is, and cannot be opened.
    """
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a zero byte in the name
        return path


def describe_non_file(path: Path) -> str:
    """Return a message that says what a path is if it is not a regular file."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "there is no such file"
    except (OSError, ValueError) as error:  # a name with a zero byte
        return f"it cannot be accessed: {getattr(error, 'strerror', None) or error}"
    return f"that is a {next((kind for test, kind in _KINDS if test(mode)), 'device')}, not a file"


_KINDS = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
_MAX_BYTES = 10_000_000
_MAX_RECORD_BYTES = 1_000_000_000
"""Maximum size in bytes of a file of a run; `_MAX_BYTES` is that of a file that a user names."""


def read_regular_file(path: Path, max_bytes: int = _MAX_BYTES) -> bytes:
    """Return the bytes of a regular file that somebody has named.

    Pipes, devices and endless files are not read: a job file that names `/dev/zero` or a
    pipe must not block the command or fill the memory.

    Args:
        path: The file.
        max_bytes: Maximum size, in bytes.

    Raises:
        OSError: If it is not a regular file or is too large; `strerror` is a message for
            the user.
    """
    try:
        status = path.stat()
    except ValueError as error:  # a zero byte in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "that is a folder, not a file", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, describe_non_file(path), str(path))
    if status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes / 1e6:,.0f} MB", str(path))
    # Without O_NONBLOCK, opening a pipe that has replaced the file since `stat` would wait for a
    # writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        size = status.st_size + 1  # allocating a much larger buffer would take as long as the read
        data = file.read(size)
        # The file has grown since `stat`, or it reports size 0 although it has content, as files in
        # /proc do.
        if len(data) == size or size == 1:
            data += file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes / 1e6:,.0f} MB", str(path))
    return data


def read_regular_text(path: Path, max_bytes: int = _MAX_BYTES, encoding: str = "utf-8") -> str:
    """Return the text of a regular file.

    Args:
        path: The file.
        max_bytes: Maximum size, in bytes.
        encoding: Encoding of the file; `utf-8-sig` also accepts a byte order mark.

    Raises:
        OSError: As in `read_regular_file`.
        UnicodeDecodeError: If the bytes are not text in this encoding.
    """
    return read_regular_file(path, max_bytes).decode(encoding)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically.

    A reader sees the old or the new text, even if the writer dies in between. Missing
    parent folders are created. Lone surrogates, which UTF-8 cannot encode, are written as
    escapes.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file atomically, as `write_text` does, with bytes.

    Args:
        path: The file. Missing parent folders are created.
        data: Its new content.
        durable: The data is on the disk when the function returns. False for what is only shown:
            a crash of the machine may then leave an empty file.

    Raises:
        OSError: If the folder cannot be written or the disk is full. The old file is then
            unchanged, and no temporary file is left.
    """
    # In the same folder, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with _create_file(temporary) as file:
            file.write(data)
            file.flush()
            if durable:
                # Otherwise the rename could reach the disk before the data, and a crash would
                # leave an empty file.
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _create_file(path: Path) -> BinaryIO:
    """Open a file that does not exist yet for writing; its folder is created if it is missing."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    # The folder nearly always exists: a shared file system is not asked first.
    try:
        handle = os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, flags, 0o666)
    return os.fdopen(handle, "wb")


def _read_umask() -> int:
    """Return the process's umask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _read_umask()
"""The process's umask. It is read once, before there are threads, because reading it changes
it for a moment.
"""


def share_with_group() -> None:
    """Let the group read everything that this process and its children write from now on.

    Called once by a driver of a run whose folder the group may read (`share: group`),
    before it starts other processes. It changes `UMASK` and the process's umask.
    """
    global UMASK
    UMASK &= ~0o050
    os.umask(UMASK)


def write_json(path: Path, value: dict[str, Any], *, durable: bool = True) -> None:
    """Write a JSON object with its schema version atomically.

    Args:
        path: The file; it is replaced.
        value: The object. Values that are NaN or infinite become null, because JSON has
            neither.
        durable: As in `write_bytes`.
    """
    text = json.dumps({"schema_version": SCHEMA_VERSION, **replace_non_finite(value)}, indent=2)
    write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"), durable=durable)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file does not exist.

    Raises:
        RunError: If the file is damaged, is not a regular file or does not hold a JSON
            object.
        OSError: If it exists but cannot be read, for example without permission.
    """
    try:
        value = json.loads(read_regular_file(path, _MAX_RECORD_BYTES).decode())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{path} is not valid JSON ({error}): the file was not written by lorafleet, or is "
            "damaged"
        ) from error
    except OSError as error:
        # These four mean that something else is in the file's place. Other errors, such as a
        # missing permission, are not damage.
        if error.errno not in (errno.EINVAL, errno.EFBIG, errno.EISDIR, errno.ELOOP):
            raise
        raise RunError(f"{path} is damaged: {error.strerror}") from error
    if not isinstance(value, dict):
        raise RunError(
            f"{path} does not contain a JSON object: the file was not written by lorafleet, or is "
            "damaged"
        )
    return value


def append_jsonl(path: Path, *rows: dict[str, Any]) -> None:
    """Append rows to a JSON Lines file and flush them to disk.

    The rows are on the disk when the function returns. If a killed writer left an incomplete
    line, that line is ended first, so that only it is lost.

    Args:
        path: The file; it is created if it does not exist.
        rows: The rows. NaN and infinity become null.

    Raises:
        RunError: If the path is a link or not a regular file.
    """
    text = "".join(
        json.dumps({"schema_version": SCHEMA_VERSION, **replace_non_finite(row)}) + "\n"
        for row in rows
    )
    with open_to_append(path) as file:
        file.seek(0, os.SEEK_END)
        if file.tell() and _read_last_byte(file) != b"\n":
            text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _open_file(path: Path, flags: int) -> BinaryIO:
    """Open a file for writing, and create it if it does not exist.

    The content stays as it is: a file is emptied only after this check, so that nothing
    that somebody put in its place is destroyed.

    Args:
        path: The file.
        flags: O_RDWR, with O_APPEND to append.

    Raises:
        RunError: If it is a link or not a regular file.
    """
    try:
        # O_NOFOLLOW: in a run folder from elsewhere, a link could lead to any file of the user.
        # O_NONBLOCK keeps a pipe in the file's place from blocking the process.
        handle = os.open(
            path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
        )
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise RunError(f"{path} is a link or a pipe, not a file of lorafleet: remove it") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise RunError(f"{path} is not a regular file: remove it")
    return os.fdopen(handle, "rb+" if flags & os.O_APPEND == 0 else "ab+")


def overwrite(path: Path, data: bytes) -> None:
    """Write a file in place: neither atomic nor flushed to disk.

    For files of which no reader needs the complete content: heartbeats, end marks and
    reserved disk space. Use `write_bytes` for everything else.

    Raises:
        RunError: If the path is a link or not a regular file.
    """
    with _open_file(path, os.O_RDWR) as file:
        file.truncate()
        file.write(data)


def open_to_append(path: Path) -> BinaryIO:
    """Open a log for appending.

    Raises:
        RunError: If it is a link or not a regular file.
    """
    try:
        return _open_file(path, os.O_RDWR | os.O_APPEND)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _open_file(path, os.O_RDWR | os.O_APPEND)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically.

    Each row gets the schema version. Characters beyond ASCII are written unescaped. All
    rows are held in memory as text.
    """
    versioned = ({"schema_version": SCHEMA_VERSION, **replace_non_finite(row)} for row in rows)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in versioned))


def _read_last_byte(file: Any) -> bytes:
    """Return the last byte of an open file."""
    file.seek(-1, os.SEEK_END)
    last: bytes = file.read(1)
    return last


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return all complete rows of a JSON Lines file; none if it does not exist.

    Incomplete lines of a killed writer are skipped, and so are damaged lines and lines that
    hold no object: a damaged line costs its own row only.

    Raises:
        RunError: If the path is not a readable regular file.
    """
    try:
        text = read_regular_file(path, _MAX_RECORD_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EFBIG, errno.EISDIR, errno.ELOOP):
            raise
        raise RunError(f"{path} is damaged: {error.strerror}") from error
    rows = []
    for line in text.split(
        "\n"
    ):  # not splitlines(): a text in a row may hold one of Unicode's line separators
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def replace_non_finite(value: Any) -> Any:
    """Return a value with every NaN and infinity replaced by None: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: replace_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(inner) for inner in value]
    return value


def compute_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compute_file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read once as long as the file looks unchanged.

    A file looks unchanged if its size, its time and its inode are. Use `compute_sha256`
    where a change must be found that keeps them.
    """
    return _compute_digest_once(path, get_file_identity(path))


def get_file_identity(path: Path) -> tuple[int, ...]:
    """Return device, inode, size and modification time: what changes when a file is replaced."""
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _compute_digest_once(path: Path, identity: tuple[int, ...]) -> str:
    """Return the SHA-256 of a file. `identity` is part of the key of the cache."""
    return compute_sha256(path)


@contextlib.contextmanager
def hold_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file beside `path`, named `NAME.lock`.

    The kernel releases the lock when the process ends, however it ends. The lock file
    stays. On some network file systems `flock` works within one machine only. The right to
    write a run is therefore a lease (`jobs/runs/lease.py`) and not this lock.

    Yields True while the lock is held. Without `wait`, yields False if another process
    holds it.

    Args:
        path: What the lock protects. It need not exist.
        wait: Wait until another process releases the lock.

    Raises:
        RunError: If the path of the lock is not a regular file; it is then neither emptied
            nor followed.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock_file = path.with_name(f"{path.name}.lock")
    # Creates the file with the user's own mode, and refuses links and pipes before filelock opens
    # it: in a run folder from elsewhere, a link could lead to any file of the user.
    _open_file(lock_file, os.O_RDWR).close()
    lock = FileLock(lock_file, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
