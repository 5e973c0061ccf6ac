"""Compact lists of rows for large files. A row object is created when it is accessed.

Row objects take several times the size of a file of short rows. Large files are
therefore kept as serialized bytes (`PackedRows`, here) or as Arrow columns
(`ColumnRows` in `columns.py`). Small ones are plain lists. The rest of the code sees
`AnyRows`, a sequence of rows.
"""

from __future__ import annotations

import copy
import marshal
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Self, overload

import numpy as np

from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.row_formats import Row

_BLOCK_ROWS = 8192
AnyRows = Sequence[Row]
_ROW_FIELDS = tuple(one.name for one in fields(Row) if one.name != "messages")
_get_row_values = attrgetter(*_ROW_FIELDS)
_get_message_values = attrgetter(*(one.name for one in fields(Message)))


class LargeRows(Sequence[Row], ABC):
    """A list of rows whose subsets share its data.

    Splits and samples are lists of indices into the same data. Iterate instead of indexing
    where possible: rows are created block by block. Row objects are new at each access.

    Args:
        indices: Indices (N) of the rows in the data.
        labels: Names of the classes.
        codes: Class index of every row of the data; None without classes.
    """

    def __init__(
        self, indices: np.ndarray, labels: tuple[str, ...], codes: np.ndarray | None
    ) -> None:
        self._places, self._labels, self._codes = indices, labels, codes

    @abstractmethod
    def _iterate_rows(self, indices: np.ndarray) -> Iterator[Row]:
        """Yield the rows of the data with the given indices."""

    @abstractmethod
    def _get_hashes(self) -> np.ndarray:
        """Return the hash (int64) of the question of every row of the data."""

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return list(self.take(np.arange(len(self))[place]))
        return next(self._iterate_rows(self._places[[place]]))

    def __iter__(self) -> Iterator[Row]:
        for begin in range(0, len(self), _BLOCK_ROWS):
            yield from self._iterate_rows(self._places[begin : begin + _BLOCK_ROWS])

    def take(self, indices: np.ndarray) -> Self:
        """Return the rows with the given indices, in that order.

        Args:
            indices: Indices into this list, not into the data.

        Returns:
            A list that shares the data of this one.
        """
        self._get_hashes()  # computed once, before the data is shared
        subset = copy.copy(self)
        subset._places = self._places[indices]
        return subset

    def get_question_hashes(self) -> np.ndarray:
        """Return the hash (N, int64) of each row's question (see `can_compare_questions`).

        Python's text hashes differ from process to process: compare them within one process
        only, and never store them.
        """
        hashes: np.ndarray = self._get_hashes()[self._places]
        return hashes

    def count_labels(self) -> Counter[str]:
        """Return the number of rows of each class."""
        if self._codes is None:
            return Counter({"": len(self)})
        counts = np.bincount(self._codes[self._places], minlength=len(self._labels))
        return Counter(
            {name: int(count) for name, count in zip(self._labels, counts, strict=True) if count}
        )

    def encode_labels(self, names: Mapping[str, int]) -> np.ndarray:
        """Return the index (N) of each row's class in `names`; -1 for a class that is not in it.

        Args:
            names: Class -> its index. For rows without classes it must contain the empty text.
        """
        if self._codes is None:
            return np.full(len(self), names[""], dtype=np.int32)
        indices = np.array([names.get(name, -1) for name in self._labels], dtype=np.int32)
        codes: np.ndarray = indices[self._codes[self._places]]
        return codes


class PackedRows(LargeRows):
    """Rows of any format, serialized. They take a few bytes more than their texts."""

    def __init__(self, packer: RowPacker) -> None:
        labels = tuple(packer.labels)
        codes = None if labels == ("",) else np.frombuffer(packer.codes, dtype=np.int32)
        super().__init__(np.arange(len(packer.codes), dtype=np.int32), labels, codes)
        self._data = packer.data
        self._ends = np.frombuffer(packer.ends, dtype=np.int64)
        self._hashes = np.frombuffer(packer.hashes, dtype=np.int64)

    def _iterate_rows(self, indices: np.ndarray) -> Iterator[Row]:
        # Slices of a view are not copies.
        view = memoryview(self._data)
        for begin, end in zip(
            self._ends[indices].tolist(), self._ends[indices + 1].tolist(), strict=True
        ):
            # Written by this process.
            values, messages = marshal.loads(view[begin:end])  # nosec B302
            fields_of_row = dict(zip(_ROW_FIELDS, values, strict=True))
            yield Row(**fields_of_row, messages=tuple(Message(*message) for message in messages))

    def _get_hashes(self) -> np.ndarray:
        return self._hashes


class RowPacker:
    """Builder of `PackedRows`, row by row.

    Appending never holds more than one `Row`, so a file is read in about its own size.
    """

    def __init__(self) -> None:
        self.data, self.ends = bytearray(), array("q", [0])
        self.codes, self.hashes = array("i"), array("q")
        self.labels: dict[str, int] = {}
        """Class -> its number."""

    def append(self, row: Row) -> None:
        """Append a row."""
        # The bytes never leave this process, so marshal's format may differ between Python
        # versions. Fields are stored by position, without their names.
        self.data += marshal.dumps(
            (_get_row_values(row), tuple(map(_get_message_values, row.messages)))
        )
        self.ends.append(len(self.data))
        self.codes.append(self.labels.setdefault(row.label, len(self.labels)))
        self.hashes.append(hash(row.question))

    def build_rows(self) -> AnyRows:
        """Return the packed rows; an empty list if there are none."""
        return PackedRows(self) if self.codes else []


def select_rows(rows: AnyRows, indices: Sequence[int] | np.ndarray) -> AnyRows:
    """Return the rows with the given indices, in that order."""
    if isinstance(rows, LargeRows):
        return rows.take(np.asarray(indices))
    return [rows[index] for index in indices]


def count_labels(rows: AnyRows) -> Counter[str]:
    """Return class -> number of rows."""
    return (
        rows.count_labels() if isinstance(rows, LargeRows) else Counter(row.label for row in rows)
    )


def can_compare_questions(rows: AnyRows, other_rows: AnyRows) -> bool:
    """Return whether the question hashes of two lists can be compared.

    Equal hashes mean equal questions only if both are compact lists of the same kind:
    `ColumnRows` hashes the text of the prompt, and `PackedRows` the whole question.
    """
    return isinstance(rows, LargeRows) and type(rows) is type(other_rows)
