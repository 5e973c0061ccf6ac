"""Data files, record by record: JSON Lines, JSON, CSV, TSV and Parquet, plain or compressed."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from lorafleet.jobs.errors import DataError
from lorafleet.jobs.files import no_file
from lorafleet.jobs.text import counted

if TYPE_CHECKING:
    import pyarrow

_PLAIN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_COMPRESSED = (".gz", ".zst")
DATA_SUFFIXES = (
    *_PLAIN,
    *(f"{suffix}{packed}" for suffix in _PLAIN if suffix != ".parquet" for packed in _COMPRESSED),
)
"""Endings of the files that are read. Parquet has a compression of its own."""
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_MAX_FIELD = 100_000_000
_LEAST_UNPACKED, _UNPACKED_RATIO = 100_000_000, 200
"""Bytes that a compressed file may always hold, and how often its own size beyond them."""
_PARQUET_STEP, _JOINED_ROWS, _JOINED_BYTES = 256, 8192, 16_000_000
"""Rows that are unpacked at a time: few, because each may be large; and what is then looked at together."""
_ROW_BYTES = 16
"""What a row takes at least, whatever is in it."""
_BEGINNING = 1000
"""Bytes of a file in which text of another encoding shows."""

Record = dict[str, Any] | str
"""The values of a row by column; or what is wrong with it, as a sentence."""


def data_suffix(path: Path) -> str | None:
    """Return the ending that decides how a file is read (`.jsonl`, `.csv.gz`), or None."""
    name = path.name.lower()
    return next((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), None)


def read_records(path: Path, notes: list[str] | None = None) -> Iterator[tuple[int, Record]]:
    """Yield (line, record) for each row of a file; add remarks about the whole file to `notes`.

    Raises DataError where the file cannot be read as its name says.
    """
    suffix = data_suffix(path)
    notes = [] if notes is None else notes
    if suffix is None:
        ending = path.suffix or "nothing"
        raise DataError(f"{path} ends in {ending}, but must end in one of {', '.join(DATA_SUFFIXES)}")
    if suffix == ".parquet":
        yield from _read_parquet(path)
    elif suffix.startswith((".jsonl", ".ndjson")):
        yield from _read_jsonl(path)
    elif suffix.startswith(".json"):
        yield from _read_json(path)
    elif suffix.startswith(".csv"):
        yield from _read_csv(path, notes)
    else:
        yield from _read_tsv(path, notes)


@contextlib.contextmanager
def _open_utf8(path: Path) -> Iterator[BinaryIO | None]:
    """Open a data file for streaming. Compressed files are decompressed in memory, once.

    Yields None for a file that does not look like UTF-8: `_text` reads it, or explains what to do. Raises DataError.
    """
    if path.suffix.lower() in _COMPRESSED:
        file: BinaryIO = io.BytesIO(_bytes(path))
    else:
        try:
            if not path.is_file():  # never wait for a pipe
                raise DataError(f"{path} cannot be read: {no_file(path)}")
            file = path.open("rb")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    with file:
        beginning = file.read(_BEGINNING)
        file.seek(0)
        yield None if beginning.startswith(_UTF16_MARKS) or b"\0" in beginning else file


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file without their line feeds. A carriage return is part of its line."""
    with shown_progress(path) as advance, _open_utf8(path) as file:
        if file is None:
            yield from _text(path).split("\n")
            return
        encoding, has_ended = "utf-8-sig", True
        for line in file:
            advance(len(line))
            try:
                text = line.decode(encoding)
            except UnicodeDecodeError:
                _text(path)  # raises a DataError that names the line
                raise
            encoding, has_ended = "utf-8", text.endswith("\n")
            yield text.removesuffix("\n")
        if has_ended:
            yield ""


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Open the text of a file, with its line ends as they are."""
    with shown_progress(path) as advance, _open_utf8(path) as file:
        if file is None:
            yield io.StringIO(_text(path), newline="")
        else:
            yield io.TextIOWrapper(_ProgressReader(file, advance), encoding="utf-8-sig", newline="")


class _ProgressReader(io.BufferedReader):
    """A file that reports how many bytes were read."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], object]) -> None:
        super().__init__(file)  # type: ignore[arg-type]
        self._advance = advance

    def read1(self, size: int = -1, /) -> bytes:
        data = super().read1(size)
        self._advance(len(data))
        return data


def _text(path: Path) -> str:
    data = _bytes(path)
    if data.startswith(_UTF16_MARKS):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError:
            raise DataError(f"{path} starts with a UTF-16 mark, but is not valid UTF-16: save it as UTF-8") from None
    if b"\0" in data[:_BEGINNING]:
        raise DataError(f"{path} holds zero bytes: if it is UTF-16 text, convert it first (iconv -f utf-16 -t utf-8)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 text; convert it first (iconv -f windows-1252 -t utf-8, if it is Western text)"
        ) from None


def _bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe is not waited for
            raise DataError(f"{path} cannot be read: {no_file(path)}")
        data = path.read_bytes()
        most = _LEAST_UNPACKED + _UNPACKED_RATIO * len(data)
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
                return _at_most(path, packed.read(most + 1), most)
        if path.suffix.lower() == ".zst":
            return _at_most(path, _without_zstd(data, most + 1), most)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return data


def _at_most(path: Path, data: bytes, most: int) -> bytes:
    _check_unpacked(path, len(data), most)
    return data


def _check_unpacked(path: Path, size: int, most: int) -> None:
    """Raise DataError for a file that grows beyond all texts when it is unpacked: it is made to fill the memory."""
    if size > most:
        raise DataError(f"{path} unpacks to more than {_UNPACKED_RATIO} times its size: unpack it yourself, and look")


def _without_zstd(data: bytes, most: int) -> bytes:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
        return bytes(stream.read(most))


_LARGE = 100_000_000


@contextlib.contextmanager
def shown_progress(path: Path) -> Iterator[Callable[[int], object]]:
    """Draw a bar for a large file, where a person looks; yields what is to be told how many bytes were read."""
    size = path.stat().st_size
    if size < _LARGE or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"reading {path.name}", total=size)
        yield lambda count: bar.advance(task, count)


class RepeatedKey(Exception):
    """A JSON object that has a key twice: the first value would be lost without a word."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)
"""Made once: `json.loads` would make one for every row."""


def _read_jsonl(path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield number, _json_record(line)


def _json_record(line: str) -> Record:
    try:
        record = _DECODER.decode(line)
    except RepeatedKey as error:
        return f"the key {error.args[0]!r} stands twice in one object: keep one"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({getattr(error, 'msg', 'too deep')})"
    return record if isinstance(record, dict) else "a row must be a JSON object {...}"


def _read_json(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        records = json.loads(_text(path), object_pairs_hook=_unique_keys)
    except RepeatedKey as error:
        raise DataError(f"{path}: the key {error.args[0]!r} stands twice in one object: keep one") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}); one object a line is .jsonl") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
        raise DataError(f"{path}: not JSON that can be read ({type(error).__name__})") from None
    if not isinstance(records, list):
        raise DataError(f"{path} must hold a JSON list of rows; one object a line is .jsonl")
    for number, record in enumerate(records, start=1):
        yield number, record if isinstance(record, dict) else "a row must be a JSON object {...}"


def _read_csv(path: Path, notes: list[str]) -> Iterator[tuple[int, Record]]:
    """Read CSV as RFC 4180 has it: a cell in quotes may hold the delimiter, and lines."""
    csv.field_size_limit(_MAX_FIELD)
    try:
        with _open_text(path) as text:
            delimiter = _delimiter(text.readline())
            text.seek(0)
            if delimiter != ",":
                notes.append(f"{path.name}: columns are separated by {_OTHER_DELIMITERS[delimiter]}")
            yield from _csv_records(path, csv.DictReader(text, delimiter=delimiter, strict=True), notes)
    except UnicodeDecodeError:
        _text(path)  # which raises
        raise


def _csv_records(path: Path, reader: csv.DictReader[str], notes: list[str]) -> Iterator[tuple[int, Record]]:
    began, rows, first_long = 1, 0, None
    try:
        header = reader.fieldnames or ()
        _check_header(path, list(header))
        began = reader.line_num
        for record in reader:
            rows += 1
            if first_long is None and reader.line_num - began > 1 and _has_lines(record):
                first_long = reader.line_num
            if record.get(None) is not None:
                yield reader.line_num, f"has more columns than the header ({len(header)})"
            else:
                yield reader.line_num, dict(record)
            began = reader.line_num
    except csv.Error as error:
        yield began + 1, f"not CSV: {error} (a quote that is never closed?)"
        return
    if first_long is not None:
        lines = counted(reader.line_num - 1, "line")
        notes.append(
            f"{path.name}: {counted(rows, 'row')} on {lines}: cells in quotes may hold several lines (the first such "
            f"row ends on line {first_long})"
        )


def _has_lines(record: dict[str | Any, Any]) -> bool:
    return any("\n" in str(value) or "\r" in str(value) for value in record.values())


def _delimiter(text: str) -> str:
    """Return what separates the columns of a CSV file: another sign where the header has it, and no comma."""
    header = next(iter(text.splitlines()), "")
    if "," in header:
        return ","
    return next((sign for sign in _OTHER_DELIMITERS if sign in header), ",")


def _read_tsv(path: Path, notes: list[str]) -> Iterator[tuple[int, Record]]:
    """Read a line as a row and a tab as the end of a cell: TSV (IANA's text/tab-separated-values) has no quoting."""
    lines = (line.removesuffix("\r") for line in _lines(path))
    first = next(lines, "")
    header = first.split("\t") if first else []
    _check_header(path, header)
    quoted = 0
    for number, line in enumerate(lines, start=2):
        if not line:
            continue
        cells = line.split("\t")
        quoted += any(_looks_quoted(cell) for cell in cells)
        if len(cells) > len(header):
            yield number, f"has more columns than the header ({len(header)})"
        else:
            missing = [None] * (len(header) - len(cells))
            yield number, dict(zip(header, [*cells, *missing], strict=True))
    if quoted:
        notes.append(
            f"{path.name}: {counted(quoted, 'row')} with a cell in quotes, which are part of the text in .tsv; a file "
            "with tabs that quotes as CSV does is named .csv"
        )


def _looks_quoted(cell: str) -> bool:
    """Whether a cell is written as CSV writes one that it has to quote."""
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and cell.count('"') % 2 == 0


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: the column {twice[0]!r} stands twice in the header")


def _read_parquet(path: Path) -> Iterator[tuple[int, Record]]:
    from pyarrow import ArrowException

    number = 0
    with shown_progress(path) as read:
        try:
            for batch, size in parquet_batches(path):
                read(size)
                for record in batch.to_pylist():
                    number += 1
                    yield number, {key: _without_nulls(value) for key, value in record.items()}
        except (ArrowException, OSError) as error:
            raise DataError(f"{path} is not a Parquet file ({str(error).splitlines()[0]})") from None


def parquet_batches(path: Path) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Yield batches of a Parquet file with their share of the file's bytes.

    Raises pyarrow's errors, and DataError for a file that is far larger decompressed: dictionary encoding can store a
    million equal texts in a few bytes.
    """
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    whole = path.stat().st_size
    unpacked, most = 0, _LEAST_UNPACKED + _UNPACKED_RATIO * whole
    _check_unpacked(path, file.metadata.num_rows * _ROW_BYTES, most)
    each = whole / max(1, file.metadata.num_rows)
    for batch in _joined(map(_without_dictionaries, file.iter_batches(batch_size=_PARQUET_STEP))):
        unpacked += batch.nbytes
        _check_unpacked(path, unpacked, most)
        yield batch, int(len(batch) * each)


def _without_dictionaries(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Decode dictionary-encoded columns, so that their size counts."""
    import pyarrow

    columns = [
        column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column for column in batch.columns
    ]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _joined(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    """Concatenate small batches up to `_JOINED_ROWS` rows or `_JOINED_BYTES` bytes."""
    import pyarrow

    pending: list[pyarrow.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        pending.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
        if rows >= _JOINED_ROWS or size >= _JOINED_BYTES:
            yield pyarrow.concat_batches(pending)
            pending, rows, size = [], 0, 0
    if pending:
        yield pyarrow.concat_batches(pending)


def _without_nulls(value: Any) -> Any:
    """Drop the keys that Parquet fills up: there every struct of a column has the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value
