"""Load a user's rows, and report every bad row with its file and line.

This is the entry point to the data of a job: it finds the files, reads them with the
fastest reader that fits, splits the rows, and reports unusual data before a run starts.
Tokens are made later, in `evaluation/tokens.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lorafleet.jobs import files
from lorafleet.jobs.data.assets import PREFIX
from lorafleet.jobs.data.columns import is_large, read_columns, read_first_record
from lorafleet.jobs.data.data_files import read_records
from lorafleet.jobs.data.hub import read_model_config
from lorafleet.jobs.data.row_formats import BadRow, Row, convert_record, detect_row_format
from lorafleet.jobs.data.row_lists import (
    AnyRows,
    LargeRows,
    RowPacker,
    can_compare_questions,
    count_labels,
)
from lorafleet.jobs.data.split_files import get_split_files
from lorafleet.jobs.data.splits import sample_rows, split_held_out
from lorafleet.jobs.errors import DataError
from lorafleet.jobs.schema.job import DataFormat, DataSpec, JobSpec
from lorafleet.jobs.schema.model_kinds import get_num_labels
from lorafleet.jobs.text import escape_line_breaks, format_count, shorten_text

_MAX_ROWS_SHOWN = 10
_MAX_KEYS_NAMED = 12
_MIN_ROWS_TO_HOLD_BACK = 4
"""Minimum number of validation rows from which some can be held back as test rows."""


@dataclass(frozen=True)
class Rows:
    """The three splits of a job's data.

    No question is both in training and in a split that was held back from it. If there are
    no test rows, `test` is the validation split, and `chosen_on_test` says so.
    """

    train: AnyRows
    validation: AnyRows
    test: AnyRows
    labels: tuple[str, ...] = ()
    """Class names in the order of their ids (classification)."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Split -> digest of the file that it was read from."""
    warnings: tuple[str, ...] = ()
    chosen_on_test: bool = False
    """True if there is no test split: the choice is then evaluated on the rows that it was made
    with.
    """
    format: DataFormat = "auto"
    """Format of the training rows."""


def load_rows(job: JobSpec, bad_rows: list[str] | None = None) -> Rows:
    """Load all rows of a job, checked and split.

    The same job and files give the same rows in the same order, on any machine. The rows of
    the last call are kept, so several steps of one command read the files once. Call
    `forget_rows` when the command needs them no more.

    Args:
        job: The job. Its data must be on this machine.
        bad_rows: If given, problems of bad rows are appended here, and the rows are left
            out.

    Raises:
        DataError: There are bad rows and no `bad_rows` (ten are shown), or a split is
            impossible.
        AssetError: The data set is not on this machine, or its files were changed.
    """
    sources = get_split_files(job.data)
    key = (
        job.data.model_dump_json(),
        job.task,
        *((split, path, files.get_file_identity(path)) for split, path in sources.items()),
    )
    rows = _last_rows.get(key)
    if rows is None or bad_rows is not None:
        _last_rows.clear()  # first: two data sets may not fit into memory
        rows = _read_rows(job, sources, bad_rows)
        if bad_rows is None:
            _last_rows[key] = rows
    mismatch = _describe_head_mismatch(job, len(rows.labels))
    return replace(rows, warnings=(*rows.warnings, *mismatch)) if mismatch else rows


_last_rows: dict[tuple[Any, ...], Rows] = {}
"""Rows of the last call of `load_rows`, by all that they depend on."""


def forget_rows() -> None:
    """Free the memory of the rows that `load_rows` keeps."""
    _last_rows.clear()


def _read_rows(job: JobSpec, sources: dict[str, Path], bad_rows: list[str] | None) -> Rows:
    """Read the rows of a job. Arguments and errors are those of `load_rows`."""
    sha256 = {split: files.compute_file_digest(path) for split, path in sources.items()}
    unused: Counter[str] = Counter()
    formats: dict[str, DataFormat] = {}
    notes: list[str] = []
    loaded_splits = {
        split: _read_split(path, job, unused, bad_rows, formats, notes)
        for split, path in sources.items()
    }
    is_asset = (job.data.dataset_name or "").startswith(PREFIX)  # the columns of an asset are known
    warnings = list(dict.fromkeys(notes)) + ([] if is_asset else _describe_unused_keys(unused))
    labels = (
        _resolve_labels(loaded_splits, sources, job.data.labels)
        if job.task == "classification"
        else ()
    )
    rows = _make_splits(job.data, loaded_splits, warnings)
    warnings += _describe_duplicates(rows)
    test = rows["test"]
    return Rows(
        rows["train"],
        rows["validation"],
        test or rows["validation"],
        labels,
        sha256,
        tuple(warnings),
        not test,
        next(iter(formats.values())),
    )


def _describe_head_mismatch(job: JobSpec, classes: int) -> list[str]:
    """Return a note if the base model's head has another number of classes than the rows."""
    spec = job.model
    head_classes = get_num_labels(read_model_config(spec.model_name_or_path, spec.revision) or {})
    if job.is_generative or head_classes in (None, classes):
        return []
    name = spec.model_name_or_path
    return [
        f"{name} has a classification head for {head_classes} classes, but the rows have "
        f"{classes}: a new head is initialised"
    ]


def _describe_unused_keys(unused: Counter[str]) -> list[str]:
    """Return a note that lists each unused key of the rows once, with its count."""
    if not unused:
        return []
    entries = [f"{key} ({format_count(count, 'time')})" for key, count in sorted(unused.items())]
    more = f", and {len(entries) - _MAX_KEYS_NAMED} more" if len(entries) > _MAX_KEYS_NAMED else ""
    return [f"not used: {', '.join(entries[:_MAX_KEYS_NAMED])}{more}"]


def _read_split(
    path: Path,
    job: JobSpec,
    unused: Counter[str],
    collected: list[str] | None,
    formats: dict[str, DataFormat],
    notes: list[str],
) -> AnyRows:
    """Read all rows of a file, in columns if it is large and simple.

    Args:
        path: The file.
        job: The job.
        unused: Receives the unknown keys with their counts.
        collected: Receives the problems of bad rows; None to raise them.
        formats: Receives the format of the file, by its path.
        notes: Receives remarks about the file.

    Raises:
        DataError: If there is a bad row and `collected` is None, or no row is left.
    """
    first = read_first_record(path)
    if first is not None:
        kind = detect_row_format(first, job)
        columns = read_columns(path, kind, job.data, unused, notes)
        if columns:
            formats.setdefault(str(path), kind)
            return columns
    packer, listed = RowPacker(), list[Row]()
    add = packer.append if is_large(path) else listed.append
    bad_rows = _BadRows(collected)
    split_format: DataFormat | None = None
    for number, record in read_records(path, notes):
        if not isinstance(record, dict):
            bad_rows.add(f"{path}:{number}: {record}")
            continue
        # The first usable record decides for the whole file.
        split_format = formats.setdefault(str(path), split_format or detect_row_format(record, job))
        try:
            row = convert_record(record, split_format, job.data, unused)
        except BadRow as error:
            bad_rows.add(f"{path}:{number}: {error}")
            continue
        add(replace(row, line=number))
    rows = packer.build_rows() or listed
    if collected is None and bad_rows.count:
        raise DataError(str(bad_rows))
    if not rows:
        first_bad = f"{path} has no usable row: {bad_rows.first}"
        raise DataError(first_bad if bad_rows.count else f"{path} has no rows")
    return rows


class _BadRows:
    """Problems of the rows of a file.

    All of them are stored in `collected` if it is given, else the first few and their number.
    """

    def __init__(self, collected: list[str] | None) -> None:
        self.count, self.first, self._shown, self._collected = 0, "", list[str](), collected

    def add(self, sentence: str) -> None:
        """Record the problem of a row."""
        sentence = shorten_text(escape_line_breaks(sentence))
        self.count += 1
        self.first = self.first or sentence
        if self._collected is not None:
            self._collected.append(sentence)
        elif self.count <= _MAX_ROWS_SHOWN:
            self._shown.append(sentence)

    def __str__(self) -> str:
        more = [f"and {self.count - _MAX_ROWS_SHOWN} more"] if self.count > _MAX_ROWS_SHOWN else []
        return "\n".join(self._shown + more)


def _make_splits(
    data: DataSpec, loaded_splits: dict[str, AnyRows], warnings: list[str]
) -> dict[str, AnyRows]:
    """Return train, validation and test rows.

    A missing split is held back from the split before it. Rows are limited
    (`max_train_samples` and the like) after the split, so a limit does not change which
    rows are held back.

    Args:
        data: The job's data settings.
        loaded_splits: The rows of the splits that have files.
        warnings: Receives notes on what was held back.

    Returns:
        The three splits. `test` is empty if no row could be held back for it.

    Raises:
        DataError: If no validation rows can be held back.
    """
    train = loaded_splits["train"]
    validation, test = loaded_splits.get("validation"), loaded_splits.get("test")
    if validation is None:
        if len(train) < 2:
            raise DataError(
                "there is only one training row, so no validation row can be held back; name a "
                "data.validation_file"
            )
        validation, train = split_held_out(
            train, data.validation_fraction, data.split_seed, "data.validation_fraction"
        )
        warnings.append(
            f"no validation set: {_format_count(len(validation), 'of the training rows')} held "
            "back for it"
        )
    if test is None and len(validation) >= _MIN_ROWS_TO_HOLD_BACK:
        try:
            # Another seed than that of the validation split, so that the two draws do not follow
            # the same permutation.
            seed = data.split_seed + 1
            test, validation = split_held_out(
                validation, data.test_fraction, seed, "data.test_fraction", keep_classes=False
            )
            warnings.append(
                f"no test set: {_format_count(len(test), 'of the validation rows')} held back for "
                "it"
            )
        except (
            DataError
        ) as impossible:  # rows with the same text stay together, and may be the only rows
            warnings.append(str(impossible))
    if not test:
        warnings.append(
            "no test set and too few validation rows to hold any back: results are optimistic"
        )
    return {
        "train": sample_rows(train, data.max_train_samples, data.split_seed),
        "validation": sample_rows(validation, data.max_validation_samples, data.split_seed),
        "test": sample_rows(test or [], data.max_test_samples, data.split_seed),
    }


def _resolve_labels(
    rows: dict[str, AnyRows], sources: dict[str, Path], names: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the class names: `data.labels` if set, else the sorted training labels.

    Their order is the order of the class ids, which is stored in the model, so it must not
    depend on the order of the rows. Integers are sorted in numeric order, words in
    alphabetical order.

    Raises:
        DataError: If there is only one class or more than 1,000, or if a label is not in
            `data.labels` or in no training row.
    """
    if names is not None:
        for split, split_rows in rows.items():
            for row in split_rows if set(count_labels(split_rows)) - set(names) else ():
                if row.label not in names:
                    raise DataError(
                        f"{sources[split]}:{row.line}: the label {row.label!r} is not one of "
                        "data.labels"
                    )
        return tuple(names)
    counts = count_labels(rows["train"])
    if len(counts) < 2:
        single_label = next(iter(counts))
        raise DataError(
            f"{sources['train']}: every training row has the label {single_label!r}, but a "
            "classifier needs at least two labels"
        )
    # A column of texts or ids, named by mistake, would give a head of as many classes as rows.
    if len(counts) > 1000:
        raise DataError(
            f"{sources['train']}: there are {len(counts)} labels; is data.label_column the right "
            "column?"
        )
    for split in ("validation", "test"):
        unknown = sorted(set(count_labels(rows.get(split, []))) - set(counts))
        if unknown:
            raise DataError(
                f"the {split} rows have labels that no training row has: {', '.join(unknown[:5])}. "
                "Correct them, or add training rows with these labels"
            )
    # In alphabetical order, class 10 would come before class 2.
    numeric = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in counts)
    return tuple(sorted(counts, key=int) if numeric else sorted(counts))


def _describe_duplicates(rows: dict[str, AnyRows]) -> list[str]:
    """Return warnings about rows that occur twice, in one split or (worse) in two.

    Held-out rows whose question is also in training make results optimistic. Only the
    questions are compared; their answers may differ.
    """
    warnings = []
    train, others = rows["train"], {split: rows[split] for split in ("validation", "test")}
    if isinstance(train, LargeRows):
        # Hashes of eight bytes a row, instead of a set of all questions: a collision would only
        # change a warning.
        unique_hashes = np.unique(train.get_question_hashes())
        duplicate_count = len(train) - len(unique_hashes)
        other_questions = {
            row.question
            for split_rows in others.values()
            if not can_compare_questions(train, split_rows)
            for row in split_rows
        }
        train_questions = (
            {row.question for row in train if row.question in other_questions}
            if other_questions
            else set()
        )
    else:
        train_questions = {row.question for row in train}
        duplicate_count = len(train) - len(train_questions)
    if duplicate_count:
        phrase = "training row occurs" if duplicate_count == 1 else "training rows occur"
        warnings.append(f"{duplicate_count} {phrase} more than once")
    for split, split_rows in others.items():
        if isinstance(split_rows, LargeRows) and can_compare_questions(train, split_rows):
            leaked = _count_members(split_rows.get_question_hashes(), unique_hashes)
        else:
            leaked = sum(row.question in train_questions for row in split_rows)
        if leaked:
            total = f"of {format_count(len(split_rows), f'{split} row')}"
            warnings.append(
                f"{_format_count(leaked, total)} also among the training rows: results are "
                "optimistic"
            )
    return warnings


def _count_members(values: np.ndarray, sorted_values: np.ndarray) -> int:
    """Return how many of `values` are in `sorted_values`, which are unique and sorted."""
    indices = np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)
    return int((sorted_values[indices] == values).sum())


def _format_count(number: int, description: str) -> str:
    return f"{number:,} {description} {'is' if number == 1 else 'are'}"
