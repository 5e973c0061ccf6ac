"""Read data files record by record: JSON Lines, JSON, CSV, TSV and Parquet.

All but Parquet may be compressed. A problem of one row is yielded as a message, so that
callers can collect all of them with their lines; a problem of the whole file is a
DataError. Nothing is guessed: `datasets` would, for example, read an empty CSV column
as numbers, and name no line for broken JSON. What the records mean is decided in
`row_formats.py`.
"""

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
from lorafleet.jobs.files import describe_non_file
from lorafleet.jobs.text import format_count

if TYPE_CHECKING:
    import pyarrow

_PLAIN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_COMPRESSED = (".gz", ".zst")
DATA_SUFFIXES = (
    *_PLAIN,
    *(f"{suffix}{packed}" for suffix in _PLAIN if suffix != ".parquet" for packed in _COMPRESSED),
)
"""Suffixes of the files that can be read. Parquet has its own compression."""
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# Python's csv module refuses cells of more than 131,072 characters by default; documents can be
# longer.
_MAX_FIELD = 100_000_000
# Data files come from anybody, and a bomb of a few MB must not fill the memory. Real text is far
# from this ratio.
_MIN_UNPACKED_LIMIT, _UNPACKED_RATIO = 100_000_000, 200
"""A compressed file may unpack to this many bytes, plus this many times its own size."""
_PARQUET_STEP, _JOINED_ROWS, _JOINED_BYTES = 256, 8192, 16_000_000
"""Rows that are unpacked at a time (few, because each row may be large), and the limits in
rows and bytes of the batches that they are joined to.
"""
_MIN_ROW_BYTES = 16
"""Minimum memory of a row, in bytes, whatever its content."""
_ENCODING_PROBE_BYTES = 1000
"""Number of bytes at the beginning of a file that are checked for another encoding."""

Record = dict[str, Any] | str
"""The values of a row by column, or a message that says what is wrong with the row."""


def get_data_suffix(path: Path) -> str | None:
    """Return the suffix that decides how a file is read (`.jsonl`, `.csv.gz`), or None.

    Only the name counts, in any case; the file need not exist.
    """
    name = path.name.lower()
    return next((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), None)


def read_records(path: Path, notes: list[str] | None = None) -> Iterator[tuple[int, Record]]:
    """Yield (line, record) for each row of a file.

    Files are streamed, except .json, compressed and UTF-16 files, which are held in memory.
    The number is the line on which the row ends; in .json and .parquet files it is the
    number of the row, from 1.

    Args:
        path: The data file.
        notes: Receives remarks about the whole file. They are complete when the iteration
            has ended.

    Raises:
        DataError: If the content does not match the file's suffix, or the file cannot be
            read. It may be raised after some rows were yielded.
    """
    suffix = get_data_suffix(path)
    notes = [] if notes is None else notes
    if suffix is None:
        ending = path.suffix or "nothing"
        raise DataError(
            f"{path} ends in {ending}, but must end in one of {', '.join(DATA_SUFFIXES)}"
        )
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

    Only the first bytes are checked, for UTF-16 and zero bytes: other encodings show when a
    line is decoded.

    Yields the file; None if it does not look like UTF-8. `_read_text` then reads it or
    explains what to do.

    Raises:
        DataError: If the file cannot be read.
    """
    if path.suffix.lower() in _COMPRESSED:
        file: BinaryIO = io.BytesIO(_read_bytes(path))
    else:
        try:
            if not path.is_file():  # a pipe would block
                raise DataError(f"{path} cannot be read: {describe_non_file(path)}")
            file = path.open("rb")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    with file:
        beginning = file.read(_ENCODING_PROBE_BYTES)
        file.seek(0)
        yield None if beginning.startswith(_UTF16_MARKS) or b"\0" in beginning else file


def _read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file without line feeds. A carriage return is part of its line."""
    with show_progress(path) as advance, _open_utf8(path) as file:
        if file is None:
            yield from _read_text(path).split("\n")
            return
        # Only the first line can begin with a byte order mark.
        encoding, has_ended = "utf-8-sig", True
        for line in file:
            advance(len(line))
            try:
                text = line.decode(encoding)
            except UnicodeDecodeError:
                _read_text(path)  # raises a DataError that names the line
                raise
            encoding, has_ended = "utf-8", text.endswith("\n")
            yield text.removesuffix("\n")
        # Both branches must yield the same lines: `split` gives an empty text after the last line
        # feed.
        if has_ended:
            yield ""


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Open the text of a file, with its line ends unchanged."""
    with show_progress(path) as advance, _open_utf8(path) as file:
        if file is None:
            yield io.StringIO(_read_text(path), newline="")
        else:
            yield io.TextIOWrapper(_ProgressReader(file, advance), encoding="utf-8-sig", newline="")


class _ProgressReader(io.BufferedReader):
    """A binary file that reports how many bytes were read.

    `TextIOWrapper` reads with `read1` only, so no other method reports.
    """

    def __init__(self, file: BinaryIO, advance: Callable[[int], object]) -> None:
        super().__init__(file)  # type: ignore[arg-type]
        self._advance = advance

    def read1(self, size: int = -1, /) -> bytes:
        data = super().read1(size)
        self._advance(len(data))
        return data


def _read_text(path: Path) -> str:
    """Return the text of a file, in UTF-8 or in UTF-16 with a mark.

    Raises:
        DataError: If the file is in another encoding. The message names the line and the
            command that converts the file; the encoding is not guessed, because a wrong
            guess would train on wrong characters.
    """
    data = _read_bytes(path)
    if data.startswith(_UTF16_MARKS):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError:
            raise DataError(
                f"{path} starts with a UTF-16 mark, but is not valid UTF-16: save it as UTF-8"
            ) from None
    if b"\0" in data[:_ENCODING_PROBE_BYTES]:
        raise DataError(
            f"{path} contains zero bytes: if it is UTF-16 text, convert it first (iconv -f utf-16 "
            "-t utf-8)"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 text; convert the file first (iconv -f windows-1252 -t "
            "utf-8, if it is Western text)"
        ) from None


def _read_bytes(path: Path) -> bytes:
    """Return the bytes of a file, decompressed. Raises DataError."""
    try:
        if not path.is_file():  # reading a pipe would block
            raise DataError(f"{path} cannot be read: {describe_non_file(path)}")
        data = path.read_bytes()
        max_bytes = _MIN_UNPACKED_LIMIT + _UNPACKED_RATIO * len(data)
        if path.suffix.lower() == ".gz":
            # Read one byte more than allowed, so that the limit is noticed without unpacking
            # everything.
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
                return _limit_unpacked(path, packed.read(max_bytes + 1), max_bytes)
        if path.suffix.lower() == ".zst":
            return _limit_unpacked(path, _decompress_zstd(data, max_bytes + 1), max_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    return data


def _limit_unpacked(path: Path, data: bytes, max_bytes: int) -> bytes:
    """Return decompressed data. Raises DataError if it is longer than the limit."""
    _check_unpacked(path, len(data), max_bytes)
    return data


def _check_unpacked(path: Path, size: int, max_bytes: int) -> None:
    """Raise DataError for a file that is implausibly large when it is unpacked.

    Such a file is made to fill the memory.
    """
    if size > max_bytes:
        raise DataError(
            f"{path} unpacks to more than {_UNPACKED_RATIO} times its size, so it may be a zip "
            "bomb: check it, and unpack it yourself"
        )


def _decompress_zstd(data: bytes, max_bytes: int) -> bytes:
    """Return the first bytes of Zstandard-compressed data, decompressed."""
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
        return bytes(stream.read(max_bytes))


_PROGRESS_BAR_BYTES = 100_000_000


@contextlib.contextmanager
def show_progress(path: Path) -> Iterator[Callable[[int], object]]:
    """Show a progress bar on a terminal while a large file is read.

    Nothing is shown for files below 100 MB, or if stderr is not a terminal. rich is
    imported only when a bar is shown.

    Yields a function to call with the number of bytes that were read.
    """
    size = path.stat().st_size
    if size < _PROGRESS_BAR_BYTES or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"reading {path.name}", total=size)
        yield lambda count: bar.advance(task, count)


class RepeatedKey(Exception):
    """Raised for a JSON object that has a key twice.

    The first value would be lost without notice: Python's json keeps the last one. The
    argument is the key.
    """


def _build_unique_record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises RepeatedKey if a key occurs twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_build_unique_record)
"""Shared decoder: `json.loads` would create one for every row."""


def _read_jsonl(path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(_read_lines(path), start=1):
        if line.strip():
            yield number, _parse_json_record(line)


def _parse_json_record(line: str) -> Record:
    """Return the row on a line of JSON, or a message that says what is wrong with it."""
    try:
        record = _DECODER.decode(line)
    except RepeatedKey as error:
        return f"the key {error.args[0]!r} occurs twice in one object: keep one"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({getattr(error, 'msg', 'too deep')})"
    return record if isinstance(record, dict) else "a row must be a JSON object {...}"


def _read_json(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        records = json.loads(_read_text(path), object_pairs_hook=_build_unique_record)
    except RepeatedKey as error:
        raise DataError(
            f"{path}: the key {error.args[0]!r} occurs twice in one object: keep one"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); a file with one object per line must "
            "be named .jsonl"
        ) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number with thousands of digits, or brackets nested too deep
        raise DataError(f"{path}: the JSON cannot be read ({type(error).__name__})") from None
    if not isinstance(records, list):
        raise DataError(
            f"{path} must contain a JSON list of rows; a file with one object per line must be "
            "named .jsonl"
        )
    for number, record in enumerate(records, start=1):
        yield number, record if isinstance(record, dict) else "a row must be a JSON object {...}"


def _read_csv(path: Path, notes: list[str]) -> Iterator[tuple[int, Record]]:
    """Read CSV as in RFC 4180: a quoted cell may contain the delimiter and line breaks.

    The delimiter is a comma, unless the header line shows another one, which is noted.

    Raises:
        DataError: If a column occurs twice, or the file is not UTF-8.
    """
    csv.field_size_limit(_MAX_FIELD)
    try:
        with _open_text(path) as text:
            delimiter = _detect_delimiter(text.readline())
            text.seek(0)
            if delimiter != ",":
                notes.append(
                    f"{path.name}: columns are separated by {_OTHER_DELIMITERS[delimiter]}"
                )
            yield from _iterate_csv_records(
                path, csv.DictReader(text, delimiter=delimiter, strict=True), notes
            )
    except UnicodeDecodeError:
        _read_text(path)  # raises a DataError that names the line
        raise


def _iterate_csv_records(
    path: Path, reader: csv.DictReader[str], notes: list[str]
) -> Iterator[tuple[int, Record]]:
    start_line, rows, first_long = 1, 0, None
    try:
        header = reader.fieldnames or ()
        _check_header(path, list(header))
        start_line = reader.line_num
        for record in reader:
            rows += 1
            # Stray quotes join lines to one row too, and the reader cannot tell them from quoting.
            # The note lets the user see it.
            if first_long is None and reader.line_num - start_line > 1 and _has_line_breaks(record):
                first_long = reader.line_num
            # DictReader puts surplus cells under the key None, and fills missing ones with None.
            if record.get(None) is not None:
                yield reader.line_num, f"has more columns than the header ({len(header)})"
            else:
                yield reader.line_num, dict(record)
            start_line = reader.line_num
    except csv.Error as error:
        # The reader cannot continue after such an error, so this row is the last one.
        yield start_line + 1, f"not CSV: {error} (perhaps a quote is not closed)"
        return
    if first_long is not None:
        lines = format_count(reader.line_num - 1, "line")
        notes.append(
            f"{path.name}: {format_count(rows, 'row')} on {lines}: cells in quotes may hold "
            f"several lines (the first such row ends on line {first_long})"
        )


def _has_line_breaks(record: dict[str | Any, Any]) -> bool:
    """Return whether a value of a row contains a line break."""
    return any("\n" in str(value) or "\r" in str(value) for value in record.values())


def _detect_delimiter(text: str) -> str:
    """Return the delimiter of a CSV file.

    It is a comma, unless the header has no comma but another common delimiter.
    """
    header = next(iter(text.splitlines()), "")
    if "," in header:
        return ","
    return next((character for character in _OTHER_DELIMITERS if character in header), ",")


def _read_tsv(path: Path, notes: list[str]) -> Iterator[tuple[int, Record]]:
    """Read a line as a row and a tab as the end of a cell.

    TSV (IANA's text/tab-separated-values) has no quoting. With CSV's rules, a text that
    begins with a quote would swallow the rows after it. Quoted cells are noted, because
    some tools write them.
    """
    lines = (line.removesuffix("\r") for line in _read_lines(path))
    header_line = next(lines, "")
    header = header_line.split("\t") if header_line else []
    _check_header(path, header)
    quoted_rows = 0
    for number, line in enumerate(lines, start=2):
        if not line:
            continue
        cells = line.split("\t")
        quoted_rows += any(_is_quoted(cell) for cell in cells)
        if len(cells) > len(header):
            yield number, f"has more columns than the header ({len(header)})"
        else:
            missing = [None] * (len(header) - len(cells))
            yield number, dict(zip(header, [*cells, *missing], strict=True))
    if quoted_rows:
        notes.append(
            f"{path.name}: {format_count(quoted_rows, 'row')} with a cell in quotes, which count "
            "as part of the text in .tsv; name the file .csv if the quotes are only quoting"
        )


def _is_quoted(cell: str) -> bool:
    """Return whether a cell is quoted as in CSV."""
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and cell.count('"') % 2 == 0


def _check_header(path: Path, header: list[str]) -> None:
    """Raise DataError if a column occurs twice in the header."""
    duplicates = sorted({name for name in header if header.count(name) > 1})
    if duplicates:
        raise DataError(f"{path}:1: the column {duplicates[0]!r} occurs twice in the header")


def _read_parquet(path: Path) -> Iterator[tuple[int, Record]]:
    from pyarrow import ArrowException

    number = 0
    with show_progress(path) as advance:
        try:
            for batch, size in iterate_parquet_batches(path):
                advance(size)
                for record in batch.to_pylist():
                    number += 1
                    yield number, {key: _drop_nulls(value) for key, value in record.items()}
        except (ArrowException, OSError) as error:
            raise DataError(
                f"{path} is not a Parquet file ({str(error).splitlines()[0]})"
            ) from None


def iterate_parquet_batches(path: Path) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Yield batches of a Parquet file with their share of the file's bytes.

    Args:
        path: The file.

    Raises:
        DataError: If the file is far larger decompressed: dictionary encoding can store a
            million equal texts in a few bytes.
        ArrowException: If pyarrow cannot read the file.
    """
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    file_bytes = path.stat().st_size
    unpacked_bytes, max_bytes = 0, _MIN_UNPACKED_LIMIT + _UNPACKED_RATIO * file_bytes
    # Millions of equal short rows take almost no bytes. Their number alone shows it before anything
    # is read.
    _check_unpacked(path, file.metadata.num_rows * _MIN_ROW_BYTES, max_bytes)
    bytes_per_row = file_bytes / max(1, file.metadata.num_rows)
    for batch in _join_batches(
        map(_decode_dictionaries, file.iter_batches(batch_size=_PARQUET_STEP))
    ):
        unpacked_bytes += batch.nbytes
        _check_unpacked(path, unpacked_bytes, max_bytes)
        yield batch, int(len(batch) * bytes_per_row)


def _decode_dictionaries(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Decode dictionary-encoded columns, so that their real size counts."""
    import pyarrow

    columns = [
        column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _join_batches(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
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


def _drop_nulls(value: Any) -> Any:
    """Remove the keys that Parquet fills with null.

    In Parquet, every struct of a column has the keys of all others.
    """
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_drop_nulls(item) for item in value]
    return value
