"""Rows of simple files in columns: millions take the memory of the file, and a row is made when it is looked at.

Only what can be read this way without a difference is: every needed cell is a plain text, and nothing is to be said of
a single row. Whatever is odd makes `read_columns` return None, and the file is read record by record.
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
from lorafleet.jobs.data.data_files import data_suffix, parquet_batches, read_records, shown_progress
from lorafleet.jobs.data.row_formats import BadRow, Row, class_of, convert, plain_columns
from lorafleet.jobs.data.row_lists import LargeRows
from lorafleet.jobs.errors import DataError
from lorafleet.jobs.schema.job import DataFormat, DataSpec

if TYPE_CHECKING:
    import pyarrow

_BLOCK_ROWS = 8192
_BLOCK_BYTES = 1 * 2**20
_FEWEST_BYTES = 4_000_000
"""Smaller files are read record by record, which is as fast."""
_SHORT = 8
"""Characters of a text that is looked at by Python itself, whose idea of white space counts."""


class ColumnRows(LargeRows):
    """Rows whose cells lie in Arrow's columns."""

    def __init__(
        self,
        make: Callable[[tuple[str, ...], str, int], Row],
        columns: Sequence[pyarrow.Array],
        labels: tuple[str, ...],
        codes: np.ndarray | None,
        lines: np.ndarray | None = None,
    ) -> None:
        """`make` builds a row of its cells, its label and its line (its number, where `lines` is None)."""
        super().__init__(np.arange(len(columns[0]), dtype=np.int32), labels, codes)
        self._make, self._columns, self._lines = make, columns, lines
        self._hashes: np.ndarray | None = None

    def _rows_at(self, places: np.ndarray) -> Iterator[Row]:
        cells = zip(*(column.take(places).to_pylist() for column in self._columns), strict=True)
        names = [""] * len(places) if self._codes is None else [self._labels[code] for code in self._codes[places]]
        lines = places + 1 if self._lines is None else self._lines[places]
        for texts, name, line in zip(cells, names, lines.tolist(), strict=True):
            yield self._make(texts, name, line)

    def _all_hashes(self) -> np.ndarray:
        if self._hashes is None:
            column = self._columns[0]
            hashes = np.empty(len(column), dtype=np.int64)
            for begin in range(0, len(column), _BLOCK_ROWS):
                texts = column.slice(begin, _BLOCK_ROWS).to_pylist()
                hashes[begin : begin + len(texts)] = [hash(text) for text in texts]
            self._hashes = hashes
        return self._hashes


def is_large(path: Path) -> bool:
    """Return True if a file is so large that its rows are kept in a compact form."""
    return path.is_file() and path.stat().st_size >= _FEWEST_BYTES


def first_record(path: Path) -> dict[str, Any] | None:
    """Return the first row of a large file that may be read in columns; None for any other file."""
    suffix = data_suffix(path)
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
    except (ArrowException, OSError, ValueError, RecursionError):  # read record by record, the file gets its message
        return None
    return record if isinstance(record, dict) else None


def read_columns(
    path: Path, kind: DataFormat, data: DataSpec, unused: Counter[str], notes: list[str]
) -> ColumnRows | None:
    """Read a file in columns; None where a single row has something to say.

    Columns that are not known are put in `unused`, remarks about the whole file in `notes`.
    """
    needed = plain_columns(kind, data)
    if needed is None:
        return None
    from pyarrow import ArrowException

    names = [name for name in needed if kind != "text_label" or name != data.label_column]
    try:
        found = _read(path, names, data.label_column if kind == "text_label" else None, data, kind)
    except (
        _Odd,
        BadRow,
        DataError,
        ArrowException,
        OSError,
        ValueError,
    ):  # read record by record, the row gets its message
        return None
    for name, count in found.others.items():
        if count:
            unused[f"column {name!r}" if name else "the column without a name"] += count
    notes += found.notes
    columns = [column.array() for column in found.texts.values()]
    return ColumnRows(_maker(kind, data), columns, tuple(found.labels), found.codes(), found.lines_of_rows())


class _Odd(Exception):
    """A row has something that only the slow way has words for."""


class _Texts:
    """All texts of a column one after another, in memory that is taken as it fills."""

    def __init__(self, most: int) -> None:
        self.data, self.used = np.empty(most, dtype=np.uint8), 0
        self.ends: list[np.ndarray] = []

    def add(self, column: pyarrow.Array) -> None:
        """Take over the texts of a batch."""
        wide = "large" in str(column.type)
        offsets = np.frombuffer(column.buffers()[1], dtype=np.int64 if wide else np.int32)
        offsets = offsets[column.offset : column.offset + len(column) + 1].astype(np.int64)
        size = int(offsets[-1] - offsets[0])
        if self.used + size > len(self.data):
            raise _Odd
        if size:
            own = np.frombuffer(column.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]]
            self.data[self.used : self.used + size] = own
        self.ends.append(offsets[1:] - offsets[0] + self.used)
        self.used += size

    def array(self) -> pyarrow.Array:
        """Return the whole column (N)."""
        import pyarrow

        offsets = np.concatenate([np.zeros(1, dtype=np.int64), *self.ends])
        buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(self.data[: self.used])]
        return pyarrow.LargeStringArray.from_buffers(len(offsets) - 1, buffers[1], buffers[2])


@dataclass
class _Read:
    """What a file holds."""

    texts: dict[str, _Texts]
    labels: dict[str, int] = field(default_factory=dict)
    """Class -> its number."""
    numbers: list[np.ndarray] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    """Column that is not needed -> rows that have a value in it."""
    lines: list[np.ndarray] = field(default_factory=list)
    """Line on which each row ends, where rows may have several."""
    notes: list[str] = field(default_factory=list)

    def lines_of_rows(self) -> np.ndarray | None:
        """Return the line (N) of each row; None where it is the row's number."""
        return np.concatenate(self.lines) if self.lines else None

    def codes(self) -> np.ndarray | None:
        """Return the class (N) of each row; None where there are no classes."""
        return np.concatenate(self.numbers) if self.numbers else None


def _read(path: Path, names: Sequence[str], label: str | None, data: DataSpec, kind: DataFormat) -> _Read:
    """Read a file batch by batch. Raises _Odd, and pyarrow's errors."""
    conversational = kind == "prompt_completion"
    found, first = _Read({name: _Texts(8 * path.stat().st_size) for name in names}), True
    by_records = data_suffix(path) in (".csv", ".tsv")
    with contextlib.nullcontext(lambda _: None) if by_records else shown_progress(path) as read:
        for batch, size in _batches(path, names, found):
            own = {*names, *([label] if label else [])}
            if not own <= set(batch.schema.names):
                raise _Odd
            for name in names:
                _check_texts(batch.column(name), may_be_json=conversational)
                found.texts[name].add(batch.column(name))
            if label is not None:
                found.numbers.append(_codes(batch.column(label), data, found.labels))
            for name in batch.schema.names:
                if name not in own:
                    column = batch.column(name)
                    found.others[name] = found.others.get(name, 0) + len(column) - column.null_count
            if conversational and (
                any(found.others.get(name) for name in _MEANINGFUL)
                or (first and conversational and _odd(batch, names, data))
            ):
                raise _Odd
            first = False
            read(size)
    if first:
        raise _Odd
    return found


def _batches(path: Path, names: Sequence[str], found: _Read) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Yield (rows, about how many bytes they are). Raises pyarrow's errors, and _Odd where rows are no lines."""
    suffix = data_suffix(path)
    if suffix == ".parquet":
        yield from parquet_batches(path)
    elif suffix in (".csv", ".tsv"):
        for batch in _table_batches(path, found):
            yield batch, 0  # the bar is drawn by what reads the records
    else:
        yield from _json_batches(path, names)


def _table_batches(path: Path, found: _Read) -> Iterator[pyarrow.RecordBatch]:
    """Yield the rows of a CSV or TSV file, read as they are everywhere. Raises _Odd for a bad one."""
    import pyarrow

    records = read_records(path, found.notes)
    while block := list(islice(records, _BLOCK_ROWS)):
        rows = [record for _, record in block if isinstance(record, dict)]
        if len(rows) < len(block):
            raise _Odd
        found.lines.append(np.array([line for line, _ in block], dtype=np.int32))
        columns = {name: pyarrow.array([row[name] for row in rows], pyarrow.string()) for name in rows[0]}
        yield pyarrow.RecordBatch.from_pydict(columns)


def _json_batches(path: Path, names: Sequence[str]) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    import pyarrow
    from pyarrow import json as arrow_json

    lines, rows = _lines(path), 0
    # Texts that look like dates would be read as dates: what is needed is said to be text.
    schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
    with arrow_json.open_json(  # block by block: `read_json` holds all of them while it works
        path,
        read_options=arrow_json.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
        parse_options=arrow_json.ParseOptions(explicit_schema=schema),
        memory_pool=pyarrow.system_memory_pool(),  # which gives back what it is given back
    ) as reader:
        pool = pyarrow.system_memory_pool()
        for number, batch in enumerate(reader):
            rows += len(batch)
            yield batch, _BLOCK_BYTES
            if number % 32 == 31:
                pool.release_unused()
        pool.release_unused()
    if rows != lines:
        raise _Odd


def _lines(path: Path) -> int:
    """Count a file's lines. Raises _Odd for blank ones, which would shift the numbers of all after them."""
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            lines += block.count(b"\n")
            if b"\n\n" in last + block[:1] or b"\n\n" in block or b"\n\r" in block:
                raise _Odd
            last = block[-1:]
    return lines + (last != b"\n")


def _check_texts(column: pyarrow.Array, *, may_be_json: bool) -> None:
    """Raise _Odd unless all cells are texts that hold something and are whole characters."""
    import pyarrow
    from pyarrow import compute

    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)) or column.null_count:
        raise _Odd
    column.validate(full=True)  # UTF-8
    short = compute.less_equal(compute.binary_length(column), _SHORT)
    blank = compute.equal(compute.utf8_trim_whitespace(column), "")
    doubtful = compute.filter(column, compute.or_(short, blank)).to_pylist()
    if not all(text.strip() for text in doubtful):
        raise _Odd
    if may_be_json and compute.any(compute.match_substring_regex(column, r"^\s*\[")).as_py():
        raise _Odd


def _codes(column: pyarrow.Array, data: DataSpec, labels: dict[str, int]) -> np.ndarray:
    """Return the number of each row's class; new classes are put in `labels`. Raises _Odd and BadRow."""
    import pyarrow

    if column.null_count or not (pyarrow.types.is_string(column.type) or pyarrow.types.is_int64(column.type)):
        raise _Odd
    encoded = column.dictionary_encode()
    names = [class_of(value, data) for value in encoded.dictionary.to_pylist()]
    numbers = np.array([labels.setdefault(name, len(labels)) for name in names], dtype=np.int32)
    found: np.ndarray = numbers[encoded.indices.to_numpy(zero_copy_only=False)]
    return found


def _odd(batch: pyarrow.RecordBatch, names: Sequence[str], data: DataSpec) -> bool:
    """Whether a first row with all its columns is another one than that of the needed columns alone."""
    first = batch.slice(0, 1).to_pylist()[0]
    plain = _maker("prompt_completion", data)(tuple(first[name] for name in names), "", 0)
    return convert(first, "prompt_completion", data, Counter()) != plain


_MEANINGFUL = frozenset(
    "system system_prompt tools history images image videos video audios audio documents functions function_call "
    "weight loss_weight chat_template_kwargs enable_thinking rejected assistant_masks train training loss messages "
    "conversations conversation".split()
)
"""Columns that may change what a row means."""


def _maker(kind: DataFormat, data: DataSpec) -> Callable[[tuple[str, ...], str, int], Row]:
    if kind != "prompt_completion":
        return lambda texts, label, line: Row(text=texts[0], label=label, line=line)
    before = (Message("system", data.system_prompt),) if data.system_prompt else ()

    def conversation(texts: tuple[str, ...], _label: str, line: int) -> Row:
        return Row(messages=(*before, Message("user", texts[0]), Message("assistant", texts[1])), line=line)

    return conversation
