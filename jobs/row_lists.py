"""Rows of large files: as many of them as there are take the memory of the file, and each is made when it is read."""

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

from jobs.conversation import Message
from jobs.row_formats import Row

_BLOCK_ROWS = 8192
AnyRows = Sequence[Row]
_OF_ROW = tuple(one.name for one in fields(Row) if one.name != "messages")
_values_of_row = attrgetter(*_OF_ROW)
_values_of_message = attrgetter(*(one.name for one in fields(Message)))


class LargeRows(Sequence[Row], ABC):
    """Rows that share their data with every part of them."""

    def __init__(self, places: np.ndarray, labels: tuple[str, ...], codes: np.ndarray | None) -> None:
        """`places` (N) are the rows among all of the data; `codes` are the places of their classes in `labels`."""
        self._places, self._labels, self._codes = places, labels, codes

    @abstractmethod
    def _rows_at(self, places: np.ndarray) -> Iterator[Row]:
        """Yield the rows at some places of the data."""

    @abstractmethod
    def _all_hashes(self) -> np.ndarray:
        """Return a number (int64) for what each row of the data asks: Python's keyed 64-bit hash."""

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

    def take(self, places: np.ndarray) -> Self:
        """Return the rows at some places, in that order."""
        self._all_hashes()  # once, for every part
        part = copy.copy(self)
        part._places = self._places[places]
        return part

    def questions(self) -> np.ndarray:
        """Return a number (N, int64) for what each row asks; numbers of two kinds of LargeRows do not compare."""
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


class PackedRows(LargeRows):
    """Rows of any format, each as a few bytes more than its texts have."""

    def __init__(self, packer: RowPacker) -> None:
        labels = tuple(packer.labels)
        codes = None if labels == ("",) else np.frombuffer(packer.codes, dtype=np.int32)
        super().__init__(np.arange(len(packer.codes), dtype=np.int32), labels, codes)
        self._data = packer.data
        self._ends = np.frombuffer(packer.ends, dtype=np.int64)
        self._hashes = np.frombuffer(packer.hashes, dtype=np.int64)

    def _rows_at(self, places: np.ndarray) -> Iterator[Row]:
        view = memoryview(self._data)
        for begin, end in zip(self._ends[places].tolist(), self._ends[places + 1].tolist(), strict=True):
            own, messages = marshal.loads(view[begin:end])  # nosec B302  # bytes of this process's own
            yield Row(**dict(zip(_OF_ROW, own, strict=True)), messages=tuple(Message(*one) for one in messages))

    def _all_hashes(self) -> np.ndarray:
        return self._hashes


class RowPacker:
    """Takes rows one by one, and packs them."""

    def __init__(self) -> None:
        self.data, self.ends = bytearray(), array("q", [0])
        self.codes, self.hashes = array("i"), array("q")
        self.labels: dict[str, int] = {}
        """Class -> its number."""

    def append(self, row: Row) -> None:
        """Add a row to the end."""
        self.data += marshal.dumps((_values_of_row(row), tuple(map(_values_of_message, row.messages))))
        self.ends.append(len(self.data))
        self.codes.append(self.labels.setdefault(row.label, len(self.labels)))
        self.hashes.append(hash(row.question))

    def rows(self) -> AnyRows:
        """Return all of them."""
        return PackedRows(self) if self.codes else []


def taken(rows: AnyRows, places: Sequence[int] | np.ndarray) -> AnyRows:
    """Return the rows at some places, in that order."""
    if isinstance(rows, LargeRows):
        return rows.take(np.asarray(places))
    return [rows[place] for place in places]


def label_counts(rows: AnyRows) -> Counter[str]:
    """Return how many rows each class has."""
    return rows.label_counts() if isinstance(rows, LargeRows) else Counter(row.label for row in rows)


def comparable(one: AnyRows, other: AnyRows) -> bool:
    """Whether the numbers of their questions compare."""
    return isinstance(one, LargeRows) and type(one) is type(other)
