"""Which rows are held back: a seeded draw that keeps equal prompts together and classes in proportion.

Without repeated prompts the draw is scikit-learn's (StratifiedShuffleSplit with classes, else
ShuffleSplit), which the client does not need to have; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.data.row_lists import AnyRows, LargeRows, label_counts, select_rows
from lorafleet.jobs.errors import DataError
from lorafleet.jobs.text import counted

SPLIT_VERSION = 3
"""Raised when other rows are held back."""
_MAX_SHOWN = 60


@dataclass(frozen=True)
class _Groups:
    """Rows with one prompt, which stay on one side. G groups, in the order of their first row, of N rows."""

    of_row: np.ndarray
    """(N) the group of each row."""
    firsts: np.ndarray
    """(G) the place of each group's first row."""
    sizes: np.ndarray
    """(G) rows of each group."""
    labels: np.ndarray
    """(G) class of each group, numbered in the order of the names."""

    def __len__(self) -> int:
        return len(self.firsts)


def hold_back(
    rows: AnyRows, share: float, seed: int, field: str, *, keep_classes: bool = True
) -> tuple[AnyRows, AnyRows]:
    """Return (held back, left), both in the rows' order.

    `field` names the share in errors; with `keep_classes` every class must stay among what is left (training rows need
    them all), without it where that is possible. Raises DataError where prompts repeat so often, or classes are so
    small, that no set of whole groups comes near the share.
    """
    target = max(1, min(len(rows) - 1, round(len(rows) * share)))
    groups = _groups(rows)
    if not keep_classes and len(groups) - len(np.unique(groups.labels)) < target:
        groups = replace(groups, labels=np.zeros_like(groups.labels))  # most classes have one row: no proportion is
    held = _drawn(groups, target, np.random.RandomState(seed)) if len(groups) > 1 else np.array([], dtype=np.int64)
    is_held = np.zeros(len(groups), dtype=bool)
    is_held[held] = True
    places = is_held[groups.of_row]
    number = int(places.sum())
    if not number or not target <= 2 * number <= 4 * target:
        raise DataError(_refusal(rows, groups, share, target, field))
    return select_rows(rows, np.flatnonzero(places)), select_rows(rows, np.flatnonzero(~places))


def sample_rows(rows: AnyRows, most: int | None, seed: int) -> AnyRows:
    """Draw at most `most` rows, stratified by class. Every class keeps at least one row if `most` allows it."""
    if most is None or most >= len(rows):
        return rows
    counts = label_counts(rows)
    names = {name: place for place, name in enumerate(sorted(counts))}
    if len(names) == 1:
        return select_rows(rows, sorted(Random(seed).sample(range(len(rows)), most)))
    labels = _codes(rows, names)
    drawn = np.random.RandomState(seed)
    sizes = np.array([counts[name] for name in names])
    wanted = proportional(sizes, most, drawn)
    for place in np.flatnonzero(wanted == 0) if most >= len(names) else ():
        wanted[int(np.argmax(wanted))] -= 1
        wanted[place] = 1
    places = [drawn.permutation(np.flatnonzero(labels == place))[: int(number)] for place, number in enumerate(wanted)]
    return select_rows(rows, np.sort(np.concatenate(places)))


def _codes(rows: AnyRows, names: Mapping[str, int]) -> np.ndarray:
    """Return the place (N) of each row's class among `names`."""
    return rows.label_codes(names) if isinstance(rows, LargeRows) else np.array([names[row.label] for row in rows])


def _groups(rows: AnyRows) -> _Groups:
    names = {name: place for place, name in enumerate(sorted(label_counts(rows)))}
    if isinstance(rows, LargeRows):
        of_row, firsts = _numbered(rows.questions())
        labels = rows.label_codes(names)[firsts]
    else:
        by_prompt: dict[Row, int] = {}
        of_row = np.array([by_prompt.setdefault(row.question, len(by_prompt)) for row in rows], dtype=np.int64)
        firsts = np.unique(of_row, return_index=True)[1]
        labels = np.array([names[rows[place].label] for place in firsts], dtype=np.int64)
    return _Groups(of_row, firsts, np.bincount(of_row, minlength=len(firsts)), labels)


def _numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (the group (N) of equal values, numbered by first appearance; the place (G) of each group's first)."""
    ordered = np.sort(values)
    if not (ordered[1:] == ordered[:-1]).any():  # as nearly always, and with less memory
        every = np.arange(len(values), dtype=np.int32)
        return every, every
    del ordered
    _, firsts, of_value = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[of_value], firsts[order]


def _drawn(groups: _Groups, target: int, random: np.random.RandomState) -> np.ndarray:
    """Return groups with about `target` rows together, each class in proportion."""
    different = np.unique(groups.labels)
    if len(different) == 1:
        order = random.permutation(len(groups))
        held = _filling(groups, order, target)
    else:
        order, held = _drawn_by_class(groups, different, target, random)
    rows = int(groups.sizes[held].sum())
    if rows < target:
        # What a class could not fill with whole groups, others do.
        rest = order[~np.isin(order, held)]
        more = _filling(groups, rest, target - rows, keep_one_of=_left_in_class(groups, rest))
        held = np.concatenate([held, more])
    if 2 * int(groups.sizes[held].sum()) < target:
        members = np.bincount(groups.labels)
        spare = np.flatnonzero(members[groups.labels] > 1)
        held = spare[np.argsort(groups.sizes[spare], kind="stable")][:1]
    return held


def _drawn_by_class(
    groups: _Groups, different: np.ndarray, target: int, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Return (all groups in the order of the draw, those that are held back)."""
    members = [np.flatnonzero(groups.labels == label) for label in different]
    counts = np.array([int(groups.sizes[of_class].sum()) for of_class in members])
    left = proportional(counts, int(counts.sum()) - target, random)
    wanted = proportional(counts - left, target, random)
    order, held = [], []
    for of_class, rows, all_rows in zip(members, wanted, counts, strict=True):
        shuffled = of_class[random.permutation(len(of_class))][::-1]
        order.append(shuffled)
        held.append(_filling(groups, shuffled, min(int(rows), int(all_rows) - 1)))  # training rows have every class
    return np.concatenate(order), np.concatenate(held)


def proportional(counts: np.ndarray, draws: int, random: np.random.RandomState) -> np.ndarray:
    """Return how many of `draws` fall to each class: the whole parts, then the largest remainders.

    Equal remainders are drawn among. Source: scikit-learn's StratifiedShuffleSplit.
    """
    exact = counts / counts.sum() * draws
    shares = np.floor(exact)
    remainders = exact - shares
    missing = int(draws - shares.sum())
    for remainder in np.unique(remainders)[::-1]:
        if missing <= 0:
            break
        (tied,) = np.where(remainders == remainder)
        chosen = random.choice(tied, size=min(len(tied), missing), replace=False)
        shares[chosen] += 1
        missing -= len(chosen)
    whole: np.ndarray = shares.astype(int)
    return whole


def _filling(
    groups: _Groups, order: np.ndarray, most: int, keep_one_of: Callable[[int], bool] | None = None
) -> np.ndarray:
    """Return the groups, in their order, that fit into `most` rows together."""
    if keep_one_of is None and (groups.sizes[order] == 1).all():
        return order[: max(0, most)]
    found = []
    for group in order.tolist():
        size = int(groups.sizes[group])
        if size <= most and (keep_one_of is None or keep_one_of(group)):
            found.append(group)
            most -= size
            if not most:
                break
    return np.array(found, dtype=np.int64)


def _left_in_class(groups: _Groups, rest: np.ndarray) -> Callable[[int], bool]:
    """Return a check that a class still has another group; each group that passes counts as taken."""
    left = np.bincount(groups.labels[rest], minlength=int(groups.labels.max()) + 1)

    def spare(group: int) -> bool:
        label = groups.labels[group]
        if left[label] <= 1:
            return False
        left[label] -= 1
        return True

    return spare


def _refusal(rows: AnyRows, groups: _Groups, share: float, target: int, field: str) -> str:
    file = field.replace("_fraction", "_file")
    largest = int(np.argmax(groups.sizes))
    size = int(groups.sizes[largest])
    if size == 1:
        classes = len(np.unique(groups.labels))
        what = f"each of the {classes} classes must keep one" if classes > 1 else "none can be spared"
        return (
            f"{field} is {share:g}, {target:,} of {counted(len(rows), 'row')}, but that is too few to hold so many "
            f"back ({what}): give {file}"
        )
    prompt = " ".join(rows[int(groups.firsts[largest])].prompt.split())
    shown = prompt if len(prompt) <= _MAX_SHOWN else f"{prompt[: _MAX_SHOWN - 3]}..."
    least = int(groups.sizes.min()) / len(rows)
    larger = f", or a {field} of {least:.2g} or more" if share < least < 1 else ""
    return (
        f"{field} is {share:g}, {target:,} of {counted(len(rows), 'row')}, but rows with the same prompt "
        f"stay on one side and {shown!r} stands in {size:,} of them: give {file}{larger}, or make "
        "the prompts differ (where the text that an answer depends on is in another column, it belongs "
        "into the prompt)"
    )
