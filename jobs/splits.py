"""Which rows are held back: a seeded draw that keeps equal prompts together and classes in proportion.

Without repeated prompts the draw is scikit-learn's (StratifiedShuffleSplit with classes, else
ShuffleSplit), which the client does not need to have; a test compares the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jobs.errors import DataError
from jobs.row_formats import Row
from jobs.words import counted

SPLIT_VERSION = 2
"""Raised when other rows are held back."""
_MAX_SHOWN = 60


class Group(NamedTuple):
    """Rows with one prompt, by their places, which stay on one side."""

    places: list[int]
    label: str


def hold_back(
    rows: Sequence[Row], share: float, seed: int, field: str, *, keep_classes: bool = True
) -> tuple[list[Row], list[Row]]:
    """Return (held back, left), both in the rows' order.

    `field` names the share in errors; with `keep_classes` every class stays among what is left (training rows need
    them all). Raises DataError where prompts repeat so often, or classes are so small, that no set of whole groups
    comes near the share.
    """
    target = max(1, min(len(rows) - 1, round(len(rows) * share)))
    groups = _groups(rows)
    if not keep_classes:  # then classes are a matter of proportion alone, and only where each has rows for both sides
        counts = Counter(group.label for group in groups)
        whole = min(counts.values()) > 1 and target >= len(counts)
        groups = groups if whole else [group._replace(label="") for group in groups]
    held = _drawn(groups, target, np.random.RandomState(seed)) if len(groups) > 1 else []
    places = {place for group in held for place in group.places}
    if not places or not target <= 2 * len(places) <= 4 * target:
        raise DataError(_refusal(rows, groups, share, target, field))
    held_back = [row for place, row in enumerate(rows) if place in places]
    return held_back, [row for place, row in enumerate(rows) if place not in places]


def _groups(rows: Sequence[Row]) -> list[Group]:
    """Return the rows with each prompt, in the order of their first."""
    by_prompt: dict[Row, Group] = {}
    for place, row in enumerate(rows):
        by_prompt.setdefault(row.question, Group([], row.label)).places.append(place)
    return list(by_prompt.values())


def _drawn(groups: list[Group], target: int, random: np.random.RandomState) -> list[Group]:
    """Return groups with about `target` rows together, each class in proportion."""
    labels = sorted({group.label for group in groups})
    if len(labels) == 1:
        order = [groups[index] for index in random.permutation(len(groups))]
        held = _filling(order, target)
    else:
        order, held = _drawn_by_class(groups, labels, target, random)
    rows = _rows_in(held)
    if rows < target:
        # What a class could not fill with whole groups, others do.
        chosen = {id(group) for group in held}
        rest = [group for group in order if id(group) not in chosen]
        held += _filling(rest, target - rows, keep_one_of=_left_in_class(rest))
    if 2 * _rows_in(held) < target:
        members = Counter(group.label for group in groups)
        spare = [group for group in groups if members[group.label] > 1]
        held = sorted(spare, key=lambda group: len(group.places))[:1]
    return held


def _drawn_by_class(
    groups: list[Group], labels: list[str], target: int, random: np.random.RandomState
) -> tuple[list[Group], list[Group]]:
    """Return (all groups in the order of the draw, those that are held back)."""
    by_label: dict[str, list[Group]] = {label: [] for label in labels}
    for group in groups:
        by_label[group.label].append(group)
    members = list(by_label.values())
    counts = np.array([_rows_in(of_class) for of_class in members])
    left = proportional(counts, int(counts.sum()) - target, random)
    wanted = proportional(counts - left, target, random)
    order: list[Group] = []
    held: list[Group] = []
    for of_class, rows, all_rows in zip(members, wanted, counts, strict=True):
        shuffled = [of_class[index] for index in random.permutation(len(of_class))][::-1]
        order += shuffled
        held += _filling(shuffled, min(int(rows), int(all_rows) - 1))  # training rows have every class
    return order, held


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


def _filling(groups: list[Group], most: int, keep_one_of: Callable[[Group], bool] | None = None) -> list[Group]:
    """Return the groups, in their order, that fit into `most` rows together."""
    taken: list[Group] = []
    for group in groups:
        if len(group.places) <= most and (keep_one_of is None or keep_one_of(group)):
            taken.append(group)
            most -= len(group.places)
    return taken


def _left_in_class(groups: list[Group]) -> Callable[[Group], bool]:
    """Return a check that a class still has another group; each group that passes counts as taken."""
    left: dict[str, int] = {}
    for group in groups:
        left[group.label] = left.get(group.label, 0) + 1

    def spare(group: Group) -> bool:
        if left[group.label] <= 1:
            return False
        left[group.label] -= 1
        return True

    return spare


def _rows_in(groups: Sequence[Group]) -> int:
    return sum(len(group.places) for group in groups)


def _refusal(rows: Sequence[Row], groups: list[Group], share: float, target: int, field: str) -> str:
    file = field.replace("_fraction", "_file")
    largest = max(groups, key=lambda group: len(group.places))
    if len(largest.places) == 1:
        classes = len({group.label for group in groups})
        what = f"each of the {classes} classes must keep one" if classes > 1 else "none can be spared"
        return (
            f"{field} is {share:g}, {target:,} of {counted(len(rows), 'row')}, but that is too few to hold so many "
            f"back ({what}): give {file}"
        )
    prompt = " ".join(rows[largest.places[0]].prompt.split())
    shown = prompt if len(prompt) <= _MAX_SHOWN else f"{prompt[: _MAX_SHOWN - 3]}..."
    least = min(len(group.places) for group in groups) / len(rows)
    larger = f", or a {field} of {least:.2g} or more" if share < least < 1 else ""
    return (
        f"{field} is {share:g}, {target:,} of {counted(len(rows), 'row')}, but rows with the same prompt "
        f"stay on one side and {shown!r} stands in {len(largest.places):,} of them: give {file}{larger}, or make "
        "the prompts differ (where the text that an answer depends on is in another column, it belongs "
        "into the prompt)"
    )
