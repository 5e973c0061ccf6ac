"""Draw the rows that are held back.

The draw is seeded, keeps equal prompts together and classes in proportion. Without
repeated prompts it equals scikit-learn's draw (StratifiedShuffleSplit with classes,
else ShuffleSplit). The client does not need scikit-learn; a test compares the two.

A change of the draw needs a new SPLIT_VERSION (`split_files.py`), which is part of the key
of cached tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.data.row_lists import AnyRows, LargeRows, count_labels, select_rows
from lorafleet.jobs.errors import DataError
from lorafleet.jobs.text import format_count

_MAX_PROMPT_CHARS = 60


@dataclass(frozen=True)
class _Groups:
    """Groups of rows with the same prompt, which stay on one side of the split.

    G groups of N rows, in the order of their first row. Without repeated prompts, each
    group is one row and has its index.
    """

    of_row: np.ndarray
    """(N) group of each row."""
    firsts: np.ndarray
    """(G) index of each group's first row."""
    sizes: np.ndarray
    """(G) number of rows of each group."""
    labels: np.ndarray
    """(G) class of each group, numbered in the order of the names."""

    def __len__(self) -> int:
        return len(self.firsts)


def split_held_out(
    rows: AnyRows, share: float, seed: int, field: str, *, keep_classes: bool = True
) -> tuple[AnyRows, AnyRows]:
    """Return (held-out rows, remaining rows), both in the original order.

    Args:
        rows: The rows to split.
        share: Share of the rows to hold back, between 0 and 1. At least one row is held
            back, and at least one stays.
        seed: Seed of the draw.
        field: Name of the share in error messages.
        keep_classes: Every class must remain among the training rows. Without it, this
            holds only where it is possible.

    Raises:
        DataError: Prompts repeat so often, or classes are so small, that no set of whole
            groups comes near the share.
    """
    target = max(1, min(len(rows) - 1, round(len(rows) * share)))
    groups = _group_rows(rows)
    if not keep_classes and len(groups) - len(np.unique(groups.labels)) < target:
        groups = replace(
            groups, labels=np.zeros_like(groups.labels)
        )  # most classes have only one row: they cannot be kept in proportion
    held_groups = (
        _draw_groups(groups, target, np.random.RandomState(seed))
        if len(groups) > 1
        else np.array([], dtype=np.int64)
    )
    is_held = np.zeros(len(groups), dtype=bool)
    is_held[held_groups] = True
    row_mask = is_held[groups.of_row]
    number = int(row_mask.sum())
    # Whole groups rarely give the exact number. Half to twice of it is accepted; anything else
    # would not be what the user asked for.
    if not number or not target <= 2 * number <= 4 * target:
        raise DataError(_format_refusal(rows, groups, share, target, field))
    return select_rows(rows, np.flatnonzero(row_mask)), select_rows(rows, np.flatnonzero(~row_mask))


def sample_rows(rows: AnyRows, max_rows: int | None, seed: int) -> AnyRows:
    """Draw at most `max_rows` rows, stratified by class.

    Every class keeps at least one row if `max_rows` allows it. Equal prompts are not kept
    together here: the split has been made already.

    Args:
        rows: The rows of one split.
        max_rows: Maximum number of rows; None for all.
        seed: Seed of the draw.

    Returns:
        The rows in their original order.
    """
    if max_rows is None or max_rows >= len(rows):
        return rows
    counts = count_labels(rows)
    names = {name: code for code, name in enumerate(sorted(counts))}
    if len(names) == 1:
        return select_rows(rows, sorted(Random(seed).sample(range(len(rows)), max_rows)))
    labels = _get_label_codes(rows, names)
    generator = np.random.RandomState(seed)
    sizes = np.array([counts[name] for name in names])
    quotas = allocate_draws(sizes, max_rows, generator)
    # Take the row from the class with the most: a class without rows could not be learnt or
    # evaluated.
    for code in np.flatnonzero(quotas == 0) if max_rows >= len(names) else ():
        quotas[int(np.argmax(quotas))] -= 1
        quotas[code] = 1
    positions = [
        generator.permutation(np.flatnonzero(labels == code))[: int(number)]
        for code, number in enumerate(quotas)
    ]
    return select_rows(rows, np.sort(np.concatenate(positions)))


def _get_label_codes(rows: AnyRows, names: Mapping[str, int]) -> np.ndarray:
    """Return the index (N) of each row's class in `names`."""
    return (
        rows.encode_labels(names)
        if isinstance(rows, LargeRows)
        else np.array([names[row.label] for row in rows])
    )


def _group_rows(rows: AnyRows) -> _Groups:
    names = {name: index for index, name in enumerate(sorted(count_labels(rows)))}
    if isinstance(rows, LargeRows):
        of_row, firsts = _number_groups(rows.get_question_hashes())
        labels = rows.encode_labels(names)[firsts]
    else:
        by_prompt: dict[Row, int] = {}
        of_row = np.array(
            [by_prompt.setdefault(row.question, len(by_prompt)) for row in rows], dtype=np.int64
        )
        firsts = np.unique(of_row, return_index=True)[1]
        labels = np.array([names[rows[index].label] for index in firsts], dtype=np.int64)
    return _Groups(of_row, firsts, np.bincount(of_row, minlength=len(firsts)), labels)


def _number_groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Assign a number to each distinct value, by first appearance.

    Returns:
        The group (N) of each value, and the index (G) of each group's first value.
    """
    ordered = np.sort(values)
    if not (
        ordered[1:] == ordered[:-1]
    ).any():  # the usual case: no repeats, and this needs less memory
        indices = np.arange(len(values), dtype=np.int32)
        return indices, indices
    del ordered
    _, firsts, of_value = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[of_value], firsts[order]


def _draw_groups(groups: _Groups, target: int, random: np.random.RandomState) -> np.ndarray:
    """Draw groups with about `target` rows together, each class in proportion.

    Groups are whole, so a class may miss its number: other classes then fill it up. If the
    result is still less than half of the target, the smallest group that its class can
    spare is drawn.

    Args:
        groups: The groups to draw from; at least two.
        target: Number of rows to draw.
        random: Generator. The legacy RandomState, as in scikit-learn, so that draws are
            equal.

    Returns:
        Indices of the groups, in no particular order.
    """
    classes = np.unique(groups.labels)
    if len(classes) == 1:
        order = random.permutation(len(groups))
        held_groups = _select_fitting(groups, order, target)
    else:
        order, held_groups = _draw_by_class(groups, classes, target, random)
    held_rows = int(groups.sizes[held_groups].sum())
    if held_rows < target:
        # Other classes fill up what a class could not fill with whole groups.
        remaining = order[~np.isin(order, held_groups)]
        additional = _select_fitting(
            groups, remaining, target - held_rows, keep_one_of=_build_spare_check(groups, remaining)
        )
        held_groups = np.concatenate([held_groups, additional])
    # All other groups are larger than what is left. Take the smallest one whose class has another;
    # the caller refuses the result if it is far too large.
    if 2 * int(groups.sizes[held_groups].sum()) < target:
        members = np.bincount(groups.labels)
        candidates = np.flatnonzero(members[groups.labels] > 1)
        held_groups = candidates[np.argsort(groups.sizes[candidates], kind="stable")][:1]
    return held_groups


def _draw_by_class(
    groups: _Groups, classes: np.ndarray, target: int, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Draw groups class by class.

    Returns:
        All groups in the order of the draw, and the groups that are held back.
    """
    members = [np.flatnonzero(groups.labels == label) for label in classes]
    counts = np.array([int(groups.sizes[class_groups].sum()) for class_groups in members])
    training_counts = allocate_draws(counts, int(counts.sum()) - target, random)
    held_counts = allocate_draws(counts - training_counts, target, random)
    order, held_groups = [], []
    for class_groups, rows, all_rows in zip(members, held_counts, counts, strict=True):
        # scikit-learn trains on the first rows of the permutation and tests on the following ones,
        # so the held-out rows are taken from its end.
        shuffled = class_groups[random.permutation(len(class_groups))][::-1]
        order.append(shuffled)
        held_groups.append(
            _select_fitting(groups, shuffled, min(int(rows), int(all_rows) - 1))
        )  # every class must stay among the training rows
    return np.concatenate(order), np.concatenate(held_groups)


def allocate_draws(counts: np.ndarray, draws: int, random: np.random.RandomState) -> np.ndarray:
    """Return how many of `draws` fall to each class: whole parts, then the largest remainders.

    Ties between equal remainders are broken at random. Source: `_approximate_mode` of
    scikit-learn, which StratifiedShuffleSplit uses; the calls to the generator are the
    same.

    Args:
        counts: Number of rows (C) of each class.
        draws: Number of rows to draw; at most the sum of `counts`.
        random: Generator.

    Returns:
        Number of draws (C) of each class; they add up to `draws`.
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
    quotas: np.ndarray = shares.astype(int)
    return quotas


def _select_fitting(
    groups: _Groups,
    order: np.ndarray,
    max_rows: int,
    keep_one_of: Callable[[int], bool] | None = None,
) -> np.ndarray:
    """Return the groups, in their order, that fit into `max_rows` rows together.

    A group that is too large is passed over, and smaller ones after it may still fit.

    Args:
        groups: All groups.
        order: Indices of the candidates, in the order of the draw.
        max_rows: Maximum number of rows.
        keep_one_of: Returns whether a group may be taken; called at most once for each
            group.
    """
    # The usual case of prompts that do not repeat, without a Python loop over all rows.
    if keep_one_of is None and (groups.sizes[order] == 1).all():
        return order[: max(0, max_rows)]
    selected = []
    for group in order.tolist():
        size = int(groups.sizes[group])
        if size <= max_rows and (keep_one_of is None or keep_one_of(group)):
            selected.append(group)
            max_rows -= size
            if not max_rows:
                break
    return np.array(selected, dtype=np.int64)


def _build_spare_check(groups: _Groups, candidates: np.ndarray) -> Callable[[int], bool]:
    """Return a check that a class still has another group.

    Each group that passes the check counts as taken, so the check must be called once for
    each candidate.
    """
    group_counts = np.bincount(groups.labels[candidates], minlength=int(groups.labels.max()) + 1)

    def can_spare(group: int) -> bool:
        label = groups.labels[group]
        if group_counts[label] <= 1:
            return False
        group_counts[label] -= 1
        return True

    return can_spare


def _format_refusal(rows: AnyRows, groups: _Groups, share: float, target: int, field: str) -> str:
    file = field.replace("_fraction", "_file")
    largest = int(np.argmax(groups.sizes))
    size = int(groups.sizes[largest])
    if size == 1:
        classes = len(np.unique(groups.labels))
        reason = (
            f"each of the {classes} classes must keep one row"
            if classes > 1
            else "no row can be spared"
        )
        return (
            f"{field} is {share:g} ({target:,} of {format_count(len(rows), 'row')}), but there are "
            f"too few rows to hold back so many ({reason}): name a {file}"
        )
    prompt = " ".join(rows[int(groups.firsts[largest])].prompt.split())
    shown = prompt if len(prompt) <= _MAX_PROMPT_CHARS else f"{prompt[: _MAX_PROMPT_CHARS - 3]}..."
    smallest_share = int(groups.sizes.min()) / len(rows)
    alternative = (
        f", or a {field} of {smallest_share:.2g} or more" if share < smallest_share < 1 else ""
    )
    return (
        f"{field} is {share:g} ({target:,} of {format_count(len(rows), 'row')}), but rows with the "
        f"same prompt stay in one split, and {size:,} of them have the prompt {shown!r}: name a "
        f"{file}{alternative}, or make the prompts differ (if the answer depends on text in "
        "another column, add that text to the prompt)"
    )
