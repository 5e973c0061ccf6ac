"""Read large simple files as columns, which take about the memory of the file.

A row object is built when it is accessed. Columns are used only where the result is the
same as that of reading record by record: every needed cell is plain text, and there is
nothing to report about a single row. For anything else `read_columns` returns None, and
the file is read record by record. `tests/unit/jobs/data/test_columns.py` compares both readers on
odd files.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.data_files import (
    get_data_suffix,
    iterate_parquet_batches,
    read_records,
    show_progress,
)
from lorafleet.jobs.data.row_formats import (
    BadRow,
    Row,
    convert_record,
    list_plain_columns,
    parse_label,
)
from lorafleet.jobs.data.row_lists import LargeRows
from lorafleet.jobs.errors import DataError
from lorafleet.jobs.schema.job import DataFormat, DataSpec

if TYPE_CHECKING:
    import pyarrow

_BLOCK_ROWS = 8192
_BLOCK_BYTES = 1 * 2**20
_MIN_BYTES = 4_000_000
"""Smaller files are read record by record, which is as fast."""
_MAX_SHORT_LENGTH = 8
"""Texts up to this length are checked by Python itself, whose definition of white space
applies.
"""


class ColumnRows(LargeRows):
    """Rows whose cells are stored in Arrow's columns.

    The hash of a question is that of its first column: a file is only read in columns if
    all its rows have the same system message and no tools.
    """

    def __init__(
        self,
        make: Callable[[tuple[str, ...], str, int], Row],
        columns: Sequence[pyarrow.Array],
        labels: tuple[str, ...],
        codes: np.ndarray | None,
        lines: np.ndarray | None = None,
    ) -> None:
        """Store the columns.

        Args:
            make: Builds a row from its cells, its label and its line.
            columns: The needed columns, each of length N.
            labels: Names of the classes.
            codes: Class index (N) of each row; None without classes.
            lines: Line (N) of each row; None if it is the row's number.
        """
        super().__init__(np.arange(len(columns[0]), dtype=np.int32), labels, codes)
        self._create_row, self._columns, self._lines = make, columns, lines
        self._hashes: np.ndarray | None = None

    def _iterate_rows(self, indices: np.ndarray) -> Iterator[Row]:
        cells = zip(*(column.take(indices).to_pylist() for column in self._columns), strict=True)
        names = (
            [""] * len(indices)
            if self._codes is None
            else [self._labels[code] for code in self._codes[indices]]
        )
        lines = indices + 1 if self._lines is None else self._lines[indices]
        for texts, label, line in zip(cells, names, lines.tolist(), strict=True):
            yield self._create_row(texts, label, line)

    def _get_hashes(self) -> np.ndarray:
        if self._hashes is None:
            column = self._columns[0]
            hashes = np.empty(len(column), dtype=np.int64)
            for begin in range(0, len(column), _BLOCK_ROWS):
                texts = column.slice(begin, _BLOCK_ROWS).to_pylist()
                hashes[begin : begin + len(texts)] = [hash(text) for text in texts]
            self._hashes = hashes
        return self._hashes


def is_large(path: Path) -> bool:
    """Return whether a file is so large that its rows are kept in a compact form.

    The size on disk counts, also of compressed files. False if the file does not exist.
    """
    return path.is_file() and path.stat().st_size >= _MIN_BYTES


def read_first_record(path: Path) -> dict[str, Any] | None:
    """Return the first row of a large file that may be read in columns.

    The format is detected from it. Nothing is raised for a damaged file: the record reader
    reports what is wrong with it.

    Returns:
        The record; None for files that are small, compressed, .json or damaged.
    """
    suffix = get_data_suffix(path)
    if suffix not in (".jsonl", ".ndjson", ".parquet", ".csv", ".tsv") or not is_large(path):
        return None
    if suffix in (".csv", ".tsv"):
        try:
            record = next(iter(read_records(path)), (0, ""))[1]
        except DataError:
            return None
        return record if isinstance(record, dict) else None
    from pyarrow import ArrowException, parquet

    try:
        if suffix == ".parquet":
            batches = parquet.ParquetFile(path).iter_batches(batch_size=1)
            return next((dict(batch.to_pylist()[0]) for batch in batches if len(batch)), None)
        with path.open("rb") as file:
            record = json.loads(file.readline(_BLOCK_BYTES).decode("utf-8"))
    except (
        ArrowException,
        OSError,
        ValueError,
        RecursionError,
    ):  # the record reader reports what is wrong with the file
        return None
    return record if isinstance(record, dict) else None


def read_columns(
    path: Path, kind: DataFormat, data: DataSpec, unused: Counter[str], notes: list[str]
) -> ColumnRows | None:
    """Read a file in columns.

    Args:
        path: The data file.
        kind: Format of the rows.
        data: The job's `data` block.
        unused: Receives the columns that are not used, with the number of rows that have a
            value in them.
        notes: Receives remarks about the whole file.

    Returns:
        The rows, or None if a row has a problem to report or the format needs the
            record-by-record reader.
    """
    needed = list_plain_columns(kind, data)
    if needed is None:
        return None
    from pyarrow import ArrowException

    # Labels are stored as class indices and not as texts.
    names = [name for name in needed if kind != "text_label" or name != data.label_column]
    try:
        content = _read_content(
            path, names, data.label_column if kind == "text_label" else None, data, kind
        )
    except (
        _NotColumnar,
        BadRow,
        DataError,
        ArrowException,
        OSError,
        ValueError,
    ):  # the record reader reports what is wrong with the row
        return None
    for name, count in content.others.items():
        if count:
            unused[f"column {name!r}" if name else "the column without a name"] += count
    notes += content.notes
    columns = [column.to_array() for column in content.texts.values()]
    return ColumnRows(
        _make_row_builder(kind, data),
        columns,
        tuple(content.labels),
        content.get_class_codes(),
        content.get_row_lines(),
    )


class _NotColumnar(Exception):
    """Raised for a row that only the record-by-record reader handles.

    It is no error of the data: `read_columns` catches it and returns None.
    """


class _TextColumn:
    """All texts of a column, one after another, in memory that is used as it fills.

    The layout is that of Arrow's large strings: the bytes of all texts, and the end of
    each.

    Args:
        max_bytes: Maximum size of the texts. More raises `_NotColumnar`.
    """

    def __init__(self, max_bytes: int) -> None:
        # Only address space is reserved. Growing an array, or joining Arrow's batches at the end,
        # would hold the texts twice.
        self.data, self.used = np.empty(max_bytes, dtype=np.uint8), 0
        self.ends: list[np.ndarray] = []

    def add(self, column: pyarrow.Array) -> None:
        """Append the texts of a batch."""
        # Arrow's strings have offsets of 32 bits, and its large strings of 64. A slice shares the
        # buffers of its batch and begins at `column.offset`.
        is_large = "large" in str(column.type)
        offsets = np.frombuffer(column.buffers()[1], dtype=np.int64 if is_large else np.int32)
        offsets = offsets[column.offset : column.offset + len(column) + 1].astype(np.int64)
        size = int(offsets[-1] - offsets[0])
        if self.used + size > len(self.data):
            raise _NotColumnar
        if size:
            values = np.frombuffer(column.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]]
            self.data[self.used : self.used + size] = values
        self.ends.append(offsets[1:] - offsets[0] + self.used)
        self.used += size

    def to_array(self) -> pyarrow.Array:
        """Return the whole column (N)."""
        import pyarrow

        offsets = np.concatenate([np.zeros(1, dtype=np.int64), *self.ends])
        buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(self.data[: self.used])]
        return pyarrow.LargeStringArray.from_buffers(len(offsets) - 1, buffers[1], buffers[2])


@dataclass
class _FileContent:
    """The content of a file, by columns."""

    texts: dict[str, _TextColumn]
    labels: dict[str, int] = field(default_factory=dict)
    """Class -> its number."""
    numbers: list[np.ndarray] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    """Column that is not needed -> number of rows that have a value in it."""
    lines: list[np.ndarray] = field(default_factory=list)
    """Line on which each row ends, for files whose rows may span several lines."""
    notes: list[str] = field(default_factory=list)

    def get_row_lines(self) -> np.ndarray | None:
        """Return the line (N) of each row; None if it is the row's number."""
        return np.concatenate(self.lines) if self.lines else None

    def get_class_codes(self) -> np.ndarray | None:
        """Return the class index (N) of each row; None without classes."""
        return np.concatenate(self.numbers) if self.numbers else None


def _read_content(
    path: Path, names: Sequence[str], label: str | None, data: DataSpec, kind: DataFormat
) -> _FileContent:
    """Read a file batch by batch.

    Args:
        path: The data file.
        names: Columns of texts to keep.
        label: Column of the class; None without classes.
        data: The job's `data` block.
        kind: Format of the rows.

    Raises:
        _NotColumnar: If the file needs the record-by-record reader.
        ArrowException: If pyarrow cannot read it.
    """
    is_conversational = kind == "prompt_completion"
    content, is_first = (
        # Parquet and JSON escapes may unpack to more than the size of the file. Beyond eight times,
        # the record reader takes over.
        _FileContent({name: _TextColumn(8 * path.stat().st_size) for name in names}),
        True,
    )
    reads_records = get_data_suffix(path) in (".csv", ".tsv")
    with (
        contextlib.nullcontext(lambda _: None) if reads_records else show_progress(path) as advance
    ):
        for batch, size in _iterate_batches(path, names, content):
            used_names = {*names, *([label] if label else [])}
            if not used_names <= set(batch.schema.names):
                raise _NotColumnar
            for name in names:
                _check_texts(batch.column(name), may_be_json=is_conversational)
                content.texts[name].add(batch.column(name))
            if label is not None:
                content.numbers.append(_encode_classes(batch.column(label), data, content.labels))
            for name in batch.schema.names:
                if name not in used_names:
                    column = batch.column(name)
                    content.others[name] = (
                        content.others.get(name, 0) + len(column) - column.null_count
                    )
            if is_conversational and (
                # A column without any value changes nothing. The first row is also read completely,
                # so that a key which only the record reader knows is noticed.
                any(content.others.get(name) for name in _MEANINGFUL_COLUMNS)
                or (is_first and is_conversational and _has_meaningful_extras(batch, names, data))
            ):
                raise _NotColumnar
            is_first = False
            advance(size)
    if is_first:
        raise _NotColumnar
    return content


def _iterate_batches(
    path: Path, names: Sequence[str], content: _FileContent
) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Yield batches of rows with their approximate size in bytes.

    Raises pyarrow's errors, and _NotColumnar if rows are not lines.
    """
    suffix = get_data_suffix(path)
    if suffix == ".parquet":
        yield from iterate_parquet_batches(path)
    elif suffix in (".csv", ".tsv"):
        for batch in _iterate_table_batches(path, content):
            yield batch, 0  # `read_records` already reports the progress
    else:
        yield from _iterate_json_batches(path, names)


def _iterate_table_batches(path: Path, content: _FileContent) -> Iterator[pyarrow.RecordBatch]:
    """Yield the rows of a CSV or TSV file, read with the record reader.

    The parser is the same as for small files, so that quoting, delimiters and line numbers
    agree; only the storage differs. Raises _NotColumnar for a bad row.
    """
    import pyarrow

    records = read_records(path, content.notes)
    while block := list(islice(records, _BLOCK_ROWS)):
        rows = [record for _, record in block if isinstance(record, dict)]
        if len(rows) < len(block):
            raise _NotColumnar
        # A quoted cell may span several lines, so the line of a row is not its number.
        content.lines.append(np.array([line for line, _ in block], dtype=np.int32))
        columns = {
            name: pyarrow.array([row[name] for row in rows], pyarrow.string()) for name in rows[0]
        }
        yield pyarrow.RecordBatch.from_pydict(columns)


def _iterate_json_batches(
    path: Path, names: Sequence[str]
) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Yield batches of a JSON Lines file with their approximate size in bytes.

    Raises _NotColumnar if the number of rows differs from the number of lines.
    """
    import pyarrow
    from pyarrow import json as arrow_json

    line_count, row_count = _count_lines(path), 0
    # Without an explicit schema, Arrow would read texts that look like dates as dates.
    schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
    with (
        # Streamed block by block: `read_json` would hold all blocks in memory.
        arrow_json.open_json(
            path,
            read_options=arrow_json.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
            parse_options=arrow_json.ParseOptions(explicit_schema=schema),
            memory_pool=pyarrow.system_memory_pool(),  # returns freed memory to the system
        ) as reader
    ):
        pool = pyarrow.system_memory_pool()
        for number, batch in enumerate(reader):
            row_count += len(batch)
            yield batch, _BLOCK_BYTES
            # Freed blocks would otherwise stay with the allocator, and the memory of a long file
            # would grow although each batch is dropped.
            if number % 32 == 31:
                pool.release_unused()
        pool.release_unused()
    if row_count != line_count:
        raise _NotColumnar


def _count_lines(path: Path) -> int:
    """Return the number of lines of a file.

    Raises _NotColumnar for blank lines, which would shift the numbers of all lines after
    them: Arrow skips them, and a row's number must be its line.
    """
    line_count, last_byte = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            line_count += block.count(b"\n")
            # A blank line may lie across two blocks. In files with CRLF it shows as LF, CR.
            if b"\n\n" in last_byte + block[:1] or b"\n\n" in block or b"\n\r" in block:
                raise _NotColumnar
            last_byte = block[-1:]
    return line_count + (last_byte != b"\n")


def _check_texts(column: pyarrow.Array, *, may_be_json: bool) -> None:
    """Raise _NotColumnar unless all cells are non-blank texts in valid UTF-8."""
    import pyarrow
    from pyarrow import compute

    if (
        not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type))
        or column.null_count
    ):
        raise _NotColumnar
    column.validate(full=True)  # checks that the bytes are UTF-8
    # Arrow and Python may differ on which characters are white space. Python therefore checks every
    # text that is short enough to hold nothing else.
    is_short = compute.less_equal(compute.binary_length(column), _MAX_SHORT_LENGTH)
    is_blank = compute.equal(compute.utf8_trim_whitespace(column), "")
    doubtful = compute.filter(column, compute.or_(is_short, is_blank)).to_pylist()
    if not all(text.strip() for text in doubtful):
        raise _NotColumnar
    # A cell that begins with a bracket may be a list of messages, which the record reader parses.
    if may_be_json and compute.any(compute.match_substring_regex(column, r"^\s*\[")).as_py():
        raise _NotColumnar


def _encode_classes(column: pyarrow.Array, data: DataSpec, labels: dict[str, int]) -> np.ndarray:
    """Return the class index (N) of each row; new classes are added to `labels`.

    Each distinct value is parsed once. Texts and integers only: booleans and floats have
    rules of their own in `parse_label`.

    Raises:
        _NotColumnar: If a label is missing or of another type.
        BadRow: If a label is empty.
    """
    import pyarrow

    if column.null_count or not (
        pyarrow.types.is_string(column.type) or pyarrow.types.is_int64(column.type)
    ):
        raise _NotColumnar
    encoded = column.dictionary_encode()
    names = [parse_label(value, data) for value in encoded.dictionary.to_pylist()]
    numbers = np.array([labels.setdefault(name, len(labels)) for name in names], dtype=np.int32)
    codes: np.ndarray = numbers[encoded.indices.to_numpy(zero_copy_only=False)]
    return codes


def _has_meaningful_extras(
    batch: pyarrow.RecordBatch, names: Sequence[str], data: DataSpec
) -> bool:
    """Return whether the first row means something else if all its columns are read."""
    record = batch.slice(0, 1).to_pylist()[0]
    plain_row = _make_row_builder("prompt_completion", data)(
        tuple(record[name] for name in names), "", 0
    )
    return convert_record(record, "prompt_completion", data, Counter()) != plain_row


_MEANINGFUL_COLUMNS = frozenset(
    "system system_prompt tools history images image videos video audios audio documents functions "
    "function_call weight loss_weight chat_template_kwargs enable_thinking rejected "
    "assistant_masks train training loss messages conversations conversation".split()
)
"""Columns that may change what a row means."""


def _make_row_builder(
    kind: DataFormat, data: DataSpec
) -> Callable[[tuple[str, ...], str, int], Row]:
    """Return the function that builds a row from its cells, its label and its line.

    It must build the same row as `convert_record` does from the same cells.
    """
    if kind != "prompt_completion":
        return lambda texts, label, line: Row(text=texts[0], label=label, line=line)
    system_messages = (Message("system", data.system_prompt),) if data.system_prompt else ()

    def build_conversation(texts: tuple[str, ...], _label: str, line: int) -> Row:
        return Row(
            messages=(*system_messages, Message("user", texts[0]), Message("assistant", texts[1])),
            line=line,
        )

    return build_conversation
