"""Transfers files between a cluster's storage and the submitting machine, as streams.

The streams go through a pod. Both sides run lorafleet: one packs, the other unpacks.
Downloaded files are checked before they replace local ones.
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
from typing import IO, Any

from lorafleet.cluster.backend import WeightSelection
from lorafleet.jobs import files
from lorafleet.jobs.errors import CommandFailed, make_disk_full_error
from lorafleet.jobs.runs.bundle import TEXTS
from lorafleet.jobs.runs.plan import MANIFEST
from lorafleet.jobs.runs.run import Run

_NOT_TRANSFERRED = {
    "tune",
    "attempts",
    ".reserve",
    "stop",
    "site.json",
    "submission.json",
    "waiting-results.jsonl",
    MANIFEST,
    *TEXTS,
}
"""Names at the top of a run's folder that are neither sent nor accepted: Ray Tune's own files,
and files that belong to one side alone.
"""
_ALLOWED_TOP_NAMES = frozenset(
    {
        "status.json",
        "facts.json",
        "events.jsonl",
        "environment.json",
        "findings.json",
        "exported.json",
    }
    | {
        "inference.jsonl",
        "pace.json",
        "progress.json",
        "trials",
        "arms",
        "parts",
        "judged",
        "report",
        "wandb",
        "logs",
        "export",
    }
    | {"ratings", "slurm", "submission.json", MANIFEST, *TEXTS}
)
"""All names at the top of a run's folder (docs/run-directory.md) that may be transferred."""
_MAX_NAME_LENGTH, _MAX_DEPTH = 1000, 12
_WEIGHT_FOLDERS = {"checkpoints", "adapter", "model"}
"""Subfolders of a trial's folder that hold weights."""
_DESCRIPTION_SUFFIXES = (".json", ".jsonl", ".md", ".html", ".csv")
"""Suffixes of the files that describe the models in a folder of exported models."""
_MTIME_TOLERANCE_SECONDS = 0.002
_BLOCK_BYTES = 2**20


# --- download: a run's record from the storage


def list_record_files(
    run: Run, weights: WeightSelection = "none", *, include_wandb: bool = False, texts: bool = False
) -> list[Path]:
    """Return the files that record a run's results, with the selected weights.

    Args:
        include_wandb: Include W&B's records.
        texts: Include the files that the run started from, for a side that has none of them.
    """
    best = _get_best_trial_id(run) if weights == "best" else None
    record_files = []
    for path in sorted(run.path.rglob("*")):
        parts = path.relative_to(run.path).parts
        if parts[0] == "arms" and len(parts) > 3:
            parts = parts[2:]  # an arm is a run itself
        top, inner = parts[0], parts[2] if parts[0] == "trials" and len(parts) > 3 else None
        if any(part.startswith(".") for part in parts) or not path.is_file() or path.is_symlink():
            continue
        if top in _NOT_TRANSFERRED and not (texts and top in TEXTS):
            continue
        if top == "wandb" and not include_wandb:
            continue
        is_description = path.suffix in _DESCRIPTION_SUFFIXES and path.name != "tokenizer.json"
        if top == "export" and weights != "exports" and not is_description:
            continue
        # Checkpoints never travel: a run continues only where its storage is.
        if inner in _WEIGHT_FOLDERS and (
            inner == "checkpoints" or not (weights == "all" or parts[1] == best)
        ):
            continue
        record_files.append(path)
    return record_files


def _get_best_trial_id(run: Run) -> str | None:
    recommendation = (
        files.read_json(run.path / "report" / "report.json").get("recommendation") or {}
    )
    return recommendation.get("trial_id")


def pack(
    run: Run,
    have: dict[str, tuple[int, float]],
    weights: WeightSelection,
    out: IO[bytes],
    *,
    include_wandb: bool = False,
    texts: bool = False,
) -> None:
    """Write the new and changed files of a run's record as a compressed tar.

    Args:
        have: Size and modification time, by name, of the files that the receiver has.
        include_wandb: Include W&B's records.
        texts: Include the files that the run started from.
    """
    # The fastest level: weights hardly compress, and texts compress well at any level.
    packed = gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1)
    with packed, tarfile.open(fileobj=packed, mode="w|") as archive:
        for path in list_record_files(run, weights, include_wandb=include_wandb, texts=texts):
            name = str(path.relative_to(run.path))
            try:
                stat = path.stat()
                size, mtime = have.get(name, (-1, 0.0))
                if size == stat.st_size and abs(mtime - stat.st_mtime) < _MTIME_TOLERANCE_SECONDS:
                    continue
                data = path.read_bytes() if stat.st_size < _BLOCK_BYTES else None
                _add_file(archive, path, name, stat.st_mtime, data)
            except FileNotFoundError:  # replaced or deleted while it was read
                continue


def _add_file(
    archive: tarfile.TarFile, path: Path, name: str, mtime: float, data: bytes | None
) -> None:
    """Add a file to the archive.

    A small file is read first: it may grow meanwhile, and a member must have the size in its
    header. `mtime` was read before the data: a file that is replaced meanwhile must look
    older than it is, so that it is transferred again.
    """
    info = archive.gettarinfo(str(path), arcname=name)
    info.mtime = mtime
    if data is not None:
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
        return
    with path.open("rb") as file:
        archive.addfile(info, file)


def collect_file_stats(folder: Path) -> dict[str, tuple[int, float]]:
    """Return the size and modification time of all files below a folder, by name.

    Hidden files are skipped: they are still being written.
    """
    stats = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.name.startswith("."):
                stat = path.stat()
                stats[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime)
    return stats


def check_name(name: str) -> None:
    """Raise CommandFailed for a name that cannot be a file of a run's record.

    Names are not normalised: `trials/../plan.json` is refused, and not taken for `plan.json`.
    """
    parts = name.split("/")
    is_plain = all(
        part and not part.startswith(".") and part.isprintable() and "\\" not in part
        for part in parts
    )
    if not is_plain or len(name) > _MAX_NAME_LENGTH or len(parts) > _MAX_DEPTH:
        raise CommandFailed(
            f"the downloaded archive contains {name[:200]!r}, which is not a file of a run's "
            "record, so nothing was unpacked"
        )


class Unpacker:
    """Receives a compressed tar in blocks, then moves its files into a folder, each in one step.

    Call `add_block` for each block, then `finish`, and `discard` in any case. The archive
    comes from a cluster and is not trusted: names are checked before anything is written,
    and files that belong to this side are never replaced.

    Args:
        folder: The run's local folder.
        texts: Accept the files that the run started from, for a new record.
    """

    def __init__(self, folder: Path, *, texts: bool = False) -> None:
        self.folder = folder
        self.refused = _NOT_TRANSFERRED - (set(TEXTS) if texts else set())
        self.scratch = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.tar")
        self.file = self.scratch.open("wb")

    def add_block(self, block: bytes) -> None:
        """Add the next block of the stream. Raises DiskFull."""
        try:
            self.file.write(block)
        except OSError as error:
            raise make_disk_full_error(error, self.folder) or error from error

    def finish(self) -> int:
        """Move the files into the folder; return how many.

        Raises:
            CommandFailed: The stream was cut off or damaged; nothing has changed.
            DiskFull: The disk is full.
        """
        try:
            self.file.close()
            self._check_archive()
            return self._extract_files()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            disk_error = make_disk_full_error(error, self.folder)
            raise disk_error or CommandFailed(
                f"the download of {self.folder.name} is incomplete or damaged ({error}); no file "
                "was changed. Run `lorafleet pull` again"
            ) from error
        finally:
            self.discard()

    def _check_archive(self) -> None:
        """Read the whole archive, because its length and checksum are at the end; check every name.

        Raises:
            CommandFailed: The archive holds a hostile name.
        """
        # A cut-off archive would otherwise be noticed only after some files were replaced.
        with gzip.open(self.scratch) as file:
            while file.read(_BLOCK_BYTES):
                pass
        with tarfile.open(self.scratch, mode="r|gz") as archive:
            for member in archive:
                check_name(member.name)

    def discard(self) -> None:
        """Delete the received data.

        May be called more than once.
        """
        self.file.close()
        self.scratch.unlink(missing_ok=True)

    def _is_accepted(self, parts: list[str]) -> bool:
        """Return whether a file is one that the other side writes.

        An arm or an array task is a run of its own.
        """
        if parts[0] in ("arms", "parts") and len(parts) > 2:
            return parts[2] in _ALLOWED_TOP_NAMES and parts[2] not in _NOT_TRANSFERRED - set(TEXTS)
        return parts[0] in _ALLOWED_TOP_NAMES and parts[0] not in self.refused

    def _extract_files(self) -> int:
        count = 0
        with tarfile.open(self.scratch, mode="r|gz") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                # Python's own filter too: it refuses names that lead out of the folder and clears
                # set-uid bits.
                safe = tarfile.data_filter(member, str(self.folder))
                check_name(safe.name)
                if not self._is_accepted(
                    safe.name.split("/")
                ):  # sent by another version, or by a dishonest sender
                    continue
                target = self.folder / safe.name
                target.parent.mkdir(parents=True, exist_ok=True)
                scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
                source = archive.extractfile(member)
                assert source is not None
                try:
                    with scratch.open("wb") as out:
                        shutil.copyfileobj(source, out)
                    # The sender's time, which the next request compares.
                    archive.utime(safe, str(scratch))
                    scratch.replace(target)
                finally:
                    scratch.unlink(missing_ok=True)
                count += 1
        return count


# --- upload: models and data to the storage


@dataclass(frozen=True)
class UploadItem:
    """A file or folder to upload to a storage."""

    source: Path
    target: str
    """Its path in the storage's cache."""
    digest: str
    """SHA-256 of its bytes and their file names."""

    @property
    def bytes(self) -> int:
        """Return its size in bytes."""
        return sum(path.stat().st_size for path in list_files(self.source))


def list_files(source: Path) -> list[Path]:
    """Return the file itself, or all files of a folder except locks, sorted by name.

    The order is part of the folder's digest.
    """
    if source.is_file():
        return [source]
    return sorted(
        path for path in source.rglob("*") if path.is_file() and not path.name.endswith(".lock")
    )


def compute_digest(source: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's files with their names, in hex.

    Raises:
        FileNotFoundError: There is no such file or folder.
    """
    if source.is_file():
        return files.compute_file_digest(source)
    if not source.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(source))
    lines = (
        f"{path.relative_to(source)} {files.compute_file_digest(path)}\n"
        for path in list_files(source)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def iterate_frames(source: Path) -> Iterator[bytes]:
    """Yield a file or folder as a tar, in length-prefixed blocks.

    A pod cannot see where its input ends, so an empty block marks the end. The tar is built
    block by block, because a model can be larger than the sending machine's memory.
    """
    for path in list_files(source):
        info = tarfile.TarInfo(path.name if source.is_file() else str(path.relative_to(source)))
        with path.open("rb") as file:
            info.size = os.fstat(file.fileno()).st_size
            yield _encode_frame(info.tobuf(tarfile.PAX_FORMAT))
            while block := file.read(_BLOCK_BYTES):
                yield _encode_frame(block)
        padding = -info.size % tarfile.BLOCKSIZE
        if padding:
            yield _encode_frame(bytes(padding))
    yield _encode_frame(bytes(2 * tarfile.BLOCKSIZE))
    yield _encode_frame(b"")


def _encode_frame(block: bytes) -> bytes:
    """Return a block with its length in front; an empty block marks the end."""
    return struct.pack(">I", len(block)) + block


class _FrameReader(io.RawIOBase):
    """A stream of the bytes inside the frames."""

    def __init__(self, source: IO[bytes]) -> None:
        self.source, self.left, self.ended = source, 0, False

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes; return 0 at the end.

        Raises:
            CommandFailed: The sender stopped in the middle.
        """
        if self.ended:
            return 0
        if not self.left:
            (self.left,) = struct.unpack(">I", self._read_exactly(4))
            if not self.left:
                self.ended = True
                return 0
        block = self._read_exactly(min(self.left, len(buffer)))
        self.left -= len(block)
        buffer[: len(block)] = block
        return len(block)

    def _read_exactly(self, count: int) -> bytes:
        data = self.source.read(count)
        if len(data) < count:
            raise CommandFailed("the upload was cut off before its end; run the command again")
        return data


def has_digest(target: Path, expected: str) -> bool:
    """Return whether a file or folder exists and has this digest.

    A folder's digest is computed once and then stored beside it.
    """
    if not target.exists():
        return False
    if target.is_file():
        return compute_digest(target) == expected
    # Beside the folder and not in it, where it would change the digest.
    digest_file = _get_digest_file(target)
    if not digest_file.is_file():
        files.write_text(digest_file, compute_digest(target))
    return digest_file.read_text() == expected


def _get_digest_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.sha256")


def receive(target: Path, expected: str, source: IO[bytes], *, file: bool) -> None:
    """Store what `iterate_frames` sends at `target`, complete and unchanged, or not at all.

    Raises:
        CommandFailed: The received data has another digest.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    scratch.mkdir()
    try:
        with tarfile.open(
            fileobj=io.BufferedReader(_FrameReader(source), _BLOCK_BYTES), mode="r|"
        ) as archive:
            # Both sides are lorafleet, but the stream passes through a cluster.
            archive.extractall(scratch, filter="data")
        received = scratch / target.name if file else scratch
        if compute_digest(received) != expected:
            raise CommandFailed(
                f"{target} arrived damaged: its checksum differs from that of the sender. Run the "
                "command again"
            )
        if file:
            received.replace(target)
            return
        if (
            target.exists()
        ):  # other bytes under the same name: a branch of the hub that has moved on
            target.rename(scratch.with_name(f"{scratch.name}.old"))
        received.rename(target)
        files.write_text(_get_digest_file(target), expected)
    finally:
        shutil.rmtree(scratch.with_name(f"{scratch.name}.old"), ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
