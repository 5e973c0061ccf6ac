"""A run's files between a cluster's storage and the machine of the one who submits, as streams through a pod.

One side packs, the other unpacks; both are lorafleet. What arrives is checked before it takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import os
import secrets
import shutil
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from lorafleet.jobs import files
from lorafleet.jobs.errors import CommandFailed, disk_full
from lorafleet.jobs.runs.bundle import TEXTS
from lorafleet.jobs.runs.plan import MANIFEST
from lorafleet.jobs.runs.run import Run

Which = Literal["none", "best", "all", "exports"]
"""Of which trials the weights come along; or what was exported from them."""
_NOT_BROUGHT = {"tune", "attempts", ".reserve", "stop", "site.json", "submission.json", MANIFEST, *TEXTS}
"""At the top of a run's folder: Ray Tune's own, and what belongs to one side alone. Neither sent nor taken."""
_TOPS = frozenset(
    {"status.json", "facts.json", "events.jsonl", "environment.json", "findings.json", "exported.json"}
    | {"inference.jsonl", "pace.json", "trials", "arms", "parts", "judged", "report", "wandb", "logs", "export"}
    | {"ratings", "slurm", "submission.json", MANIFEST, *TEXTS}
)
"""All that may lie at the top of a run's folder (docs/run-directory.md) and may travel."""
_LONGEST_NAME, _DEEPEST = 1000, 12
_HEAVY = {"checkpoints", "adapter", "model"}
"""Of a trial's folder."""
_SAID = (".json", ".jsonl", ".md", ".html", ".csv")
"""Of a folder of exported models: what says what they are."""
_SAME_SECONDS = 0.002
_BLOCK = 2**20


# --- a run's record, from the storage


def record(run: Run, which: Which = "none", *, whole: bool = False, texts: bool = False) -> list[Path]:
    """The files of a run that say what became of it, with the weights of `which` trials.

    `whole`: W&B's records too; `texts`: those that it began with, for a side that has none of it.
    """
    best = _best(run) if which == "best" else None
    found = []
    for path in sorted(run.path.rglob("*")):
        parts = path.relative_to(run.path).parts
        if parts[0] == "arms" and len(parts) > 3:
            parts = parts[2:]  # an arm is a run of its own
        top, inner = parts[0], parts[2] if parts[0] == "trials" and len(parts) > 3 else None
        if any(part.startswith(".") for part in parts) or not path.is_file() or path.is_symlink():
            continue
        if top in _NOT_BROUGHT and not (texts and top in TEXTS):
            continue
        if top == "wandb" and not whole:
            continue
        said = path.suffix in _SAID and path.name != "tokenizer.json"
        if top == "export" and which != "exports" and not said:
            continue
        if inner in _HEAVY and (inner == "checkpoints" or not (which == "all" or parts[1] == best)):
            continue
        found.append(path)
    return found


def _best(run: Run) -> str | None:
    told = files.read_json(run.path / "report" / "report.json").get("recommendation") or {}
    return told.get("trial_id")


def pack(
    run: Run,
    have: dict[str, tuple[int, float]],
    which: Which,
    out: IO[bytes],
    *,
    whole: bool = False,
    texts: bool = False,
) -> None:
    """Write what of a run's record is not there yet as a compressed tar; `have` is size and time of change by name."""
    packed = gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1)
    with packed, tarfile.open(fileobj=packed, mode="w|") as archive:
        for path in record(run, which, whole=whole, texts=texts):
            name = str(path.relative_to(run.path))
            try:
                now = path.stat()
                size, changed = have.get(name, (-1, 0.0))
                if size == now.st_size and abs(changed - now.st_mtime) < _SAME_SECONDS:
                    continue
                data = path.read_bytes() if now.st_size < _BLOCK else None
                _add(archive, path, name, now.st_mtime, data)
            except FileNotFoundError:  # replaced or taken away while it was read
                continue


def _add(archive: tarfile.TarFile, path: Path, name: str, changed: float, data: bytes | None) -> None:
    """A small file is read first: it may grow meanwhile, and a member must have the size that it was given.

    `changed` was asked before: a file that is replaced meanwhile must look older than it is, and come again.
    """
    info = archive.gettarinfo(str(path), arcname=name)
    info.mtime = changed
    if data is not None:
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
        return
    with path.open("rb") as file:
        archive.addfile(info, file)


def known(folder: Path) -> dict[str, tuple[int, float]]:
    """Size and time of change of all files below a folder, by name; those in the making are passed over."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.name.startswith("."):
                now = path.stat()
                found[str(path.relative_to(folder))] = (now.st_size, now.st_mtime)
    return found


def check_name(name: str) -> None:
    """Raise CommandFailed for a name that is not that of a file of a run's record, as it stands.

    Nothing is tidied up: `trials/../plan.json` is refused, and not taken for `plan.json`.
    """
    parts = name.split("/")
    plain = all(part and not part.startswith(".") and part.isprintable() and "\\" not in part for part in parts)
    if not plain or len(name) > _LONGEST_NAME or len(parts) > _DEEPEST:
        raise CommandFailed(f"what came holds {name[:200]!r}, which is no file of a run's record: nothing was taken")


class Unpacker:
    """Takes a compressed tar in blocks, then puts its files into a folder, each in one step."""

    def __init__(self, folder: Path, *, texts: bool = False) -> None:
        self.folder = folder
        self.refused = _NOT_BROUGHT - (set(TEXTS) if texts else set())
        self.scratch = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.tar")
        self.file = self.scratch.open("wb")

    def take(self, block: bytes) -> None:
        """The next bytes. Raises DiskFull."""
        try:
            self.file.write(block)
        except OSError as error:
            raise disk_full(error, self.folder) or error from error

    def finish(self) -> int:
        """Put the files in their places; returns how many.

        Raises CommandFailed where the stream was cut off or damaged: nothing has changed then. And DiskFull.
        """
        try:
            self.file.close()
            self._check()
            return self._spread()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            full = disk_full(error, self.folder)
            raise full or CommandFailed(f"what came for {self.folder.name} is not whole: {error}") from error
        finally:
            self.drop()

    def _check(self) -> None:
        """Read all of it: its length and its checksum stand at the end. Raises CommandFailed for a hostile name."""
        with gzip.open(self.scratch) as file:
            while file.read(_BLOCK):
                pass
        with tarfile.open(self.scratch, mode="r|gz") as archive:
            for member in archive:
                check_name(member.name)

    def drop(self) -> None:
        """Forget what came."""
        self.file.close()
        self.scratch.unlink(missing_ok=True)

    def _is_taken(self, parts: list[str]) -> bool:
        """Whether a file is one that the other side writes; an arm or a part is a run of its own."""
        if parts[0] in ("arms", "parts") and len(parts) > 2:
            return parts[2] in _TOPS and parts[2] not in _NOT_BROUGHT - set(TEXTS)
        return parts[0] in _TOPS and parts[0] not in self.refused

    def _spread(self) -> int:
        count = 0
        with tarfile.open(self.scratch, mode="r|gz") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                safe = tarfile.data_filter(member, str(self.folder))
                check_name(safe.name)
                if not self._is_taken(safe.name.split("/")):  # of another version, or of a sender that is not honest
                    continue
                target = self.folder / safe.name
                target.parent.mkdir(parents=True, exist_ok=True)
                scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
                source = archive.extractfile(member)
                assert source is not None
                try:
                    with scratch.open("wb") as out:
                        shutil.copyfileobj(source, out)
                    archive.utime(safe, str(scratch))
                    scratch.replace(target)
                finally:
                    scratch.unlink(missing_ok=True)
                count += 1
        return count


# --- models and data, to the storage


@dataclass(frozen=True)
class Cargo:
    """A file or folder that goes to a storage."""

    source: Path
    target: str
    """Where in the storage's cache it goes."""
    digest: str
    """Of its bytes and their names."""

    @property
    def bytes(self) -> int:
        """How large it is."""
        return sum(path.stat().st_size for path in files_of(self.source))


def files_of(source: Path) -> list[Path]:
    """The file itself, or all files of a folder but locks, by name."""
    if source.is_file():
        return [source]
    return sorted(path for path in source.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


def digest(source: Path) -> str:
    """The SHA-256 of a file, or of a folder's files with their names, in hex. Raises FileNotFoundError."""
    if source.is_file():
        return files.sha256_file(source)
    if not source.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such file or folder", str(source))
    lines = (f"{path.relative_to(source)} {files.sha256_file(path)}\n" for path in files_of(source))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def framed(source: Path) -> Iterator[bytes]:
    """A file or folder as a tar, in blocks that say how long they are: a pod is not told where its input ends.

    The tar is written here block by block: a model is larger than the memory of the machine that sends it.
    """
    for path in files_of(source):
        info = tarfile.TarInfo(path.name if source.is_file() else str(path.relative_to(source)))
        with path.open("rb") as file:
            info.size = os.fstat(file.fileno()).st_size
            yield _frame(info.tobuf(tarfile.PAX_FORMAT))
            while block := file.read(_BLOCK):
                yield _frame(block)
        padding = -info.size % tarfile.BLOCKSIZE
        if padding:
            yield _frame(bytes(padding))
    yield _frame(bytes(2 * tarfile.BLOCKSIZE))
    yield _frame(b"")


def _frame(block: bytes) -> bytes:
    """An empty block is the end."""
    return struct.pack(">I", len(block)) + block


class _Unframed(io.RawIOBase):
    """The stream inside the frames."""

    def __init__(self, source: IO[bytes]) -> None:
        self.source, self.left, self.ended = source, 0, False

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes; none at the end. Raises CommandFailed where the sender stopped in the middle."""
        if self.ended:
            return 0
        if not self.left:
            (self.left,) = struct.unpack(">I", self._exactly(4))
            if not self.left:
                self.ended = True
                return 0
        block = self._exactly(min(self.left, len(buffer)))
        self.left -= len(block)
        buffer[: len(block)] = block
        return len(block)

    def _exactly(self, count: int) -> bytes:
        data = self.source.read(count)
        if len(data) < count:
            raise CommandFailed("the sender stopped in the middle")
        return data


def is_there(target: Path, expected: str) -> bool:
    """Whether a file or a folder has these bytes. Of a folder that is written beside it, once it is known."""
    if not target.exists():
        return False
    if target.is_file():
        return digest(target) == expected
    seal = _seal(target)
    if not seal.is_file():
        files.write_text(seal, digest(target))
    return seal.read_text() == expected


def _seal(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.sha256")


def receive(target: Path, expected: str, source: IO[bytes], *, file: bool) -> None:
    """Put what `framed` sends where it belongs: whole and as it was, or not at all.

    Raises CommandFailed where its digest is another one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    scratch.mkdir()
    try:
        with tarfile.open(fileobj=io.BufferedReader(_Unframed(source), _BLOCK), mode="r|") as archive:
            archive.extractall(scratch, filter="data")
        made = scratch / target.name if file else scratch
        if digest(made) != expected:
            raise CommandFailed(f"{target} did not arrive as it was sent")
        if file:
            made.replace(target)
            return
        if target.exists():  # other bytes under the same name: a branch of the hub that has moved on
            target.rename(scratch.with_name(f"{scratch.name}.old"))
        made.rename(target)
        files.write_text(_seal(target), expected)
    finally:
        shutil.rmtree(scratch.with_name(f"{scratch.name}.old"), ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
