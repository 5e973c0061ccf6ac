"""Rows of simple files in columns: millions take the memory of the file, and a row is made when it is looked at.

Only what can be read this way without a difference is: every needed cell is a plain text, and nothing is to be said of
a single row. Whatever is odd makes `read_columns` return None, and the file is read record by record.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from jobs.conversation import Message
from jobs.data_files import data_suffix, shown_progress
from jobs.row_formats import BadRow, Row, class_of, convert, plain_columns
from jobs.spec import DataFormat, DataSpec

if TYPE_CHECKING:
    import pyarrow

_BLOCK_ROWS = 8192
_BLOCK_BYTES = 1 * 2**20
_FEWEST_BYTES = 4_000_000
"""Smaller files are read record by record, which is as fast."""
_SHORT = 8
"""Characters of a text that is looked at by Python itself, whose idea of white space counts."""


class ColumnRows(Sequence[Row]):
    """Rows whose cells lie in Arrow's columns. A part of them shares the columns."""

    def __init__(
        self,
        make: Callable[[tuple[str, ...], str, int], Row],
        columns: Sequence[pyarrow.ChunkedArray],
        labels: tuple[str, ...],
        codes: np.ndarray | None,
        places: np.ndarray | None = None,
        hashes: np.ndarray | None = None,
    ) -> None:
        """`make` builds a row of its cells, its label and its line; `codes` (N) are places in `labels`."""
        self._make, self._columns, self._labels, self._codes = make, columns, labels, codes
        self._places = np.arange(len(columns[0]), dtype=np.int32) if places is None else places
        self._hashes = hashes

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return list(self.take(np.arange(len(self))[place]))
        return next(self._rows_at(self._places[[place]]))

    def __iter__(self) -> Iterator[Row]:
        for begin in range(0, len(self), _BLOCK_ROWS):
            yield from self._rows_at(self._places[begin : begin + _BLOCK_ROWS])

    def _rows_at(self, places: np.ndarray) -> Iterator[Row]:
        cells = zip(*(column.take(places).to_pylist() for column in self._columns), strict=True)
        names = [""] * len(places) if self._codes is None else [self._labels[code] for code in self._codes[places]]
        for texts, name, place in zip(cells, names, places, strict=True):
            yield self._make(texts, name, int(place) + 1)

    def take(self, places: np.ndarray) -> ColumnRows:
        """Return the rows at some places, in that order."""
        return ColumnRows(
            self._make, self._columns, self._labels, self._codes, self._places[places], self._all_hashes()
        )

    def _all_hashes(self) -> np.ndarray:
        if self._hashes is None:
            column = self._columns[0]
            hashes = np.empty(len(column), dtype=np.int64)
            for begin in range(0, len(column), _BLOCK_ROWS):
                texts = column.slice(begin, _BLOCK_ROWS).to_pylist()
                hashes[begin : begin + len(texts)] = [hash(text) for text in texts]
            self._hashes = hashes
        return self._hashes

    def questions(self) -> np.ndarray:
        """Return a number (N, int64) for what each row asks: Python's keyed 64-bit hash of the text or the prompt."""
        found: np.ndarray = self._all_hashes()[self._places]
        return found

    def label_counts(self) -> Counter[str]:
        """Return how many rows each class has."""
        if self._codes is None:
            return Counter({"": len(self)})
        counts = np.bincount(self._codes[self._places], minlength=len(self._labels))
        return Counter({name: int(count) for name, count in zip(self._labels, counts, strict=True) if count})

    def label_codes(self, names: Mapping[str, int]) -> np.ndarray:
        """Return the place (N) of each row's class among `names`."""
        if self._codes is None:
            return np.full(len(self), names[""], dtype=np.int32)
        own = np.array([names.get(name, -1) for name in self._labels], dtype=np.int32)
        found: np.ndarray = own[self._codes[self._places]]
        return found


AnyRows = Sequence[Row]


def taken(rows: AnyRows, places: Sequence[int] | np.ndarray) -> AnyRows:
    """Return the rows at some places, in that order."""
    if isinstance(rows, ColumnRows):
        return rows.take(np.asarray(places))
    return [rows[place] for place in places]


def label_counts(rows: AnyRows) -> Counter[str]:
    """Return how many rows each class has."""
    return rows.label_counts() if isinstance(rows, ColumnRows) else Counter(row.label for row in rows)


def first_record(path: Path) -> dict[str, Any] | None:
    """Return the first row of a large file that may be read in columns; None for any other file."""
    suffix = data_suffix(path)
    try:
        if suffix not in (".jsonl", ".ndjson", ".parquet") or path.stat().st_size < _FEWEST_BYTES:
            return None
        if suffix == ".parquet":
            from pyarrow import parquet

            batch = next(parquet.ParquetFile(path).iter_batches(batch_size=1))
            return dict(batch.to_pylist()[0])
        with path.open("rb") as file:
            found = json.loads(file.readline(_BLOCK_BYTES).decode("utf-8"))
    except Exception:  # pyarrow's errors are many; the slow way has words for all of them
        return None
    return found if isinstance(found, dict) else None


def read_columns(path: Path, kind: DataFormat, data: DataSpec, unused: Counter[str]) -> ColumnRows | None:
    """Read a file in columns; None where a single row has something to say. Columns not known are put in `unused`."""
    needed = plain_columns(kind, data)
    if needed is None:
        return None
    texts = [name for name in needed if kind != "text_label" or name != data.label_column]
    try:
        table = _table(path, texts)
    except Exception:  # as above
        return None
    if any(name not in table.column_names for name in needed):
        return None
    if not all(_plain_texts(table.column(name), cells_may_be_json=kind != "prompt_completion") for name in texts):
        return None
    found = _classes(table.column(data.label_column), data) if kind == "text_label" else ((), None)
    if found is None:
        return None
    others = {name: table.column(name) for name in table.column_names if name not in needed}
    if kind == "prompt_completion" and not _are_harmless(others, table, needed, data):
        return None
    for name, column in others.items():
        if len(column) > column.null_count:
            unused[f"column {name!r}" if name else "the column without a name"] += len(column) - column.null_count
    return ColumnRows(_maker(kind, data), [table.column(name) for name in texts], *found)


def _table(path: Path, texts: Sequence[str]) -> pyarrow.Table:
    """Read a file. Raises pyarrow's errors, and ValueError where rows are not lines."""
    import pyarrow
    from pyarrow import json as arrow_json
    from pyarrow import parquet

    if data_suffix(path) == ".parquet":
        return parquet.read_table(path, memory_map=False)
    with path.open("rb") as file:  # blank lines would shift the numbers of all after them
        lines, last = 0, b"\n"
        while block := file.read(_BLOCK_BYTES):
            lines += block.count(b"\n")
            if b"\n\n" in last + block or b"\n\r" in block:
                raise ValueError("blank lines")
            last = block[-1:]
    # Texts that look like dates would be read as dates: what is needed is said to be text.
    schema = pyarrow.schema([(name, pyarrow.string()) for name in texts])
    with arrow_json.open_json(  # block by block: `read_json` holds all of them while it works
        path,
        read_options=arrow_json.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
        parse_options=arrow_json.ParseOptions(explicit_schema=schema),
        memory_pool=pyarrow.system_memory_pool(),
    ) as reader:
        with shown_progress(path) as read:
            batches = []
            for batch in reader:
                batches.append(batch)
                read(_BLOCK_BYTES)
        table = pyarrow.Table.from_batches(batches, reader.schema)
    if len(table) != lines + (last != b"\n"):
        raise ValueError("rows are not lines")
    return table


def _plain_texts(column: pyarrow.ChunkedArray, *, cells_may_be_json: bool) -> bool:
    """Whether all cells are texts that hold something and are whole characters."""
    import pyarrow
    from pyarrow import compute

    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)) or column.null_count:
        return False
    for chunk in column.chunks:  # one after another: what is worked out for all at once takes the memory again
        try:
            chunk.validate(full=True)  # UTF-8
        except pyarrow.ArrowInvalid:
            return False
        short = compute.less_equal(compute.binary_length(chunk), _SHORT)
        blank = compute.equal(compute.utf8_trim_whitespace(chunk), "")
        doubtful = compute.filter(chunk, compute.or_(short, blank)).to_pylist()
        if not all(text.strip() for text in doubtful):
            return False
        if not cells_may_be_json and compute.any(compute.match_substring_regex(chunk, r"^\s*\[")).as_py():
            return False
    return True


def _classes(column: pyarrow.ChunkedArray, data: DataSpec) -> tuple[tuple[str, ...], np.ndarray] | None:
    """Return (class names, the place of each row's among them); None where a label is none."""
    import pyarrow

    kinds = pyarrow.types
    if column.null_count or not (kinds.is_string(column.type) or kinds.is_int64(column.type)):
        return None
    encoded = column.dictionary_encode().combine_chunks()
    encoded = encoded.chunk(0) if hasattr(encoded, "chunk") else encoded
    names = []
    for value in encoded.dictionary.to_pylist():
        try:
            names.append(class_of(value, data))
        except BadRow:
            return None
    different = tuple(dict.fromkeys(names))
    place = np.array([different.index(name) for name in names], dtype=np.int32)
    return different, place[encoded.indices.to_numpy(zero_copy_only=False)]


def _are_harmless(others: Mapping[str, Any], table: pyarrow.Table, needed: Sequence[str], data: DataSpec) -> bool:
    """Whether the further columns say nothing of a conversation: a row with all of them has to be the plain one."""
    if any(len(column) > column.null_count for name, column in others.items() if name in _MEANINGFUL):
        return False
    first = {name: table.column(name)[0].as_py() for name in table.column_names}
    with contextlib.suppress(BadRow):
        plain = _maker("prompt_completion", data)(tuple(first[name] for name in needed), "", 0)
        return convert(first, "prompt_completion", data, Counter()) == plain
    return False


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
