"""Reading the user's rows: every bad one is named by file and line, and what is odd about all is said beforehand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from lorafleet.jobs import files
from lorafleet.jobs.data.assets import PREFIX, asset_folder
from lorafleet.jobs.data.columns import first_record, is_large, read_columns
from lorafleet.jobs.data.data_files import DATA_SUFFIXES, read_records
from lorafleet.jobs.data.hub import HubName, dataset_folder, model_config
from lorafleet.jobs.data.row_formats import BadRow, Row, convert, row_format
from lorafleet.jobs.data.row_lists import AnyRows, LargeRows, RowPacker, have_comparable_questions, label_counts
from lorafleet.jobs.data.splits import hold_back, sample_rows
from lorafleet.jobs.errors import AssetError, DataError
from lorafleet.jobs.schema.job import DataFormat, DataSpec, JobSpec
from lorafleet.jobs.schema.model_kinds import stated_labels
from lorafleet.jobs.text import counted, cut, one_line

_MOST_SHOWN = 10
_MAX_KEYS_NAMED = 12
_FEWEST_TO_HALVE = 4
"""Validation rows of which some can be held back for a test."""


@dataclass(frozen=True)
class Rows:
    """The three splits of a job's data."""

    train: AnyRows
    validation: AnyRows
    test: AnyRows
    labels: tuple[str, ...] = ()
    """Class names in the order of their ids (classification)."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Digest of each file that was read, by split."""
    warnings: tuple[str, ...] = ()
    chosen_on_test: bool = False
    """Whether there is no test split, so that the choice is judged on the rows that it was made with."""
    format: DataFormat = "auto"
    """What a training row looks like."""


def load_rows(job: JobSpec, bad: list[str] | None = None) -> Rows:
    """Return all rows of a job, checked and split.

    Raises DataError with the bad rows (ten are shown). With a list in `bad` they are put there instead, and left out.
    """
    sources = split_files(job.data)
    sha256 = {split: files.sha256_file(path) for split, path in sources.items()}
    unused: Counter[str] = Counter()
    formats: dict[str, DataFormat] = {}
    notes: list[str] = []
    read = {split: _read_split(path, job, unused, bad, formats, notes) for split, path in sources.items()}
    ours = (job.data.dataset_name or "").startswith(PREFIX)  # what an asset's columns hold is known
    warnings = list(dict.fromkeys(notes)) + ([] if ours else _unused_note(unused))
    labels = _labels(read, sources, job.data.labels) if job.task == "classification" else ()
    rows = _three_splits(job.data, read, warnings)
    warnings += _duplicates(rows) + _head_note(job, len(labels))
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


def _head_note(job: JobSpec, classes: int) -> list[str]:
    """Say that a base's own classification head does not have the classes of the rows."""
    spec = job.model
    own = stated_labels(model_config(spec.model_name_or_path, spec.revision) or {})
    if job.generates or own in (None, classes):
        return []
    name = spec.model_name_or_path
    return [f"{name} has a classification head for {own} classes, and the rows have {classes}: a new head is drawn"]


def _unused_note(unused: Counter[str]) -> list[str]:
    """Name every key of the rows that is not used, once, with its count."""
    if not unused:
        return []
    named = [f"{what} ({counted(count, 'time')})" for what, count in sorted(unused.items())]
    more = f", and {len(named) - _MAX_KEYS_NAMED} more" if len(named) > _MAX_KEYS_NAMED else ""
    return [f"not used: {', '.join(named[:_MAX_KEYS_NAMED])}{more}"]


def split_files(data: DataSpec) -> dict[str, Path]:
    """The file of each split that the job names. Raises AssetError or DataError where one is missing."""
    if data.train_file:
        return _named_files(data)
    return _splits_of_dataset(data) | _named_files(data)


def _named_files(data: DataSpec) -> dict[str, Path]:
    named = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    found = {split: Path(path) for split, path in named.items() if path}
    for split, path in found.items():
        if not path.is_file():
            raise DataError(f"data.{split}_file is {path}, but {files.no_file(path)}")
    return found


def file_of_split(split: str, job: JobSpec) -> Path:
    """Return the file that a split's rows were read from; what has none was held back from the split before it."""
    sources = split_files(job.data)
    return sources.get(split) or (sources.get("validation") if split == "test" else None) or sources["train"]


def _splits_of_dataset(data: DataSpec) -> dict[str, Path]:
    name = str(data.dataset_name)
    if Path(name).is_absolute():
        return _splits_of_folder(Path(name))
    hub = dataset_folder(name, data.dataset_revision, data.dataset_config_name)
    folder = asset_folder(name) if name.startswith(PREFIX) else hub
    if not folder.is_dir():
        raise AssetError(
            f"data.dataset_name is {HubName(name, data.dataset_revision)}, which is not on this machine: run "
            "`lorafleet fetch JOB.yaml` where the hub can be reached, or give files in data.train_file"
        )
    found = {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    found = {split: path for split, path in found.items() if path.is_file()}
    if "train" not in found:
        raise DataError(f"data.dataset_name is {name}, but it has no split called train")
    return found


def _splits_of_folder(folder: Path) -> dict[str, Path]:
    """The files `train`, `validation` and `test` of a folder of the user's own, in any format that is read."""
    if not folder.is_dir():
        raise DataError(f"data.dataset_name is {folder}, but there is no such folder")
    found: dict[str, Path] = {}
    for split in ("train", "validation", "test"):
        for path in (folder / f"{split}{suffix}" for suffix in DATA_SUFFIXES):
            if path.is_file() and split in found:
                raise DataError(f"data.dataset_name is {folder}, which has both {found[split].name} and {path.name}")
            if path.is_file():
                found[split] = path
    if "train" not in found:
        raise DataError(
            f"data.dataset_name is {folder}, but that folder has no train file (train.jsonl, train.csv, ...): name the "
            "file in data.train_file"
        )
    return found


def _read_split(
    path: Path,
    job: JobSpec,
    unused: Counter[str],
    collected: list[str] | None,
    formats: dict[str, DataFormat],
    notes: list[str],
) -> AnyRows:
    """Read all rows of a file. Keys that are not known are counted in `unused`; the format is put in `formats`."""
    first = first_record(path)
    if first is not None:
        kind = row_format(first, job)
        columns = read_columns(path, kind, job.data, unused, notes)
        if columns:
            formats.setdefault(str(path), kind)
            return columns
    packer, listed = RowPacker(), list[Row]()
    add = packer.append if is_large(path) else listed.append
    bad = _BadRows(collected)
    chosen: DataFormat | None = None
    for number, record in read_records(path, notes):
        if not isinstance(record, dict):
            bad.add(f"{path}:{number}: {record}")
            continue
        chosen = formats.setdefault(str(path), chosen or row_format(record, job))
        try:
            row = convert(record, chosen, job.data, unused)
        except BadRow as error:
            bad.add(f"{path}:{number}: {error}")
            continue
        add(replace(row, line=number))
    rows = packer.rows() or listed
    if collected is None and bad.count:
        raise DataError(str(bad))
    if not rows:
        first_bad = f"{path} holds no row that can be used: {bad.first}"
        raise DataError(first_bad if bad.count else f"{path} holds no rows")
    return rows


class _BadRows:
    """Problems of the rows of a file. Keeps all of them in `collected`, or else the first few and their number."""

    def __init__(self, collected: list[str] | None) -> None:
        self.count, self.first, self._shown, self._collected = 0, "", list[str](), collected

    def add(self, sentence: str) -> None:
        """Record the problem of a row."""
        sentence = cut(one_line(sentence))
        self.count += 1
        self.first = self.first or sentence
        if self._collected is not None:
            self._collected.append(sentence)
        elif self.count <= _MOST_SHOWN:
            self._shown.append(sentence)

    def __str__(self) -> str:
        more = [f"and {self.count - _MOST_SHOWN} more"] if self.count > _MOST_SHOWN else []
        return "\n".join(self._shown + more)


def _three_splits(data: DataSpec, read: dict[str, AnyRows], warnings: list[str]) -> dict[str, AnyRows]:
    """Train, validation and test rows; what is not given is held back from the split before it."""
    train = read["train"]
    validation, test = read.get("validation"), read.get("test")
    if validation is None:
        if len(train) < 2:
            raise DataError("there is one training row: none can be held back; give data.validation_file")
        validation, train = hold_back(train, data.validation_fraction, data.split_seed, "data.validation_fraction")
        warnings.append(f"no validation set: {_are(len(validation), 'of the training rows')} held back for it")
    if test is None and len(validation) >= _FEWEST_TO_HALVE:
        try:
            seed = data.split_seed + 1
            test, validation = hold_back(validation, data.test_fraction, seed, "data.test_fraction", keep_classes=False)
            warnings.append(f"no test set: {_are(len(test), 'of the validation rows')} held back for it")
        except DataError as impossible:  # rows of one text stay together, and may be all that there are
            warnings.append(str(impossible))
    if not test:
        warnings.append("no test set and too few validation rows to hold any back: results are optimistic")
    return {
        "train": sample_rows(train, data.max_train_samples, data.split_seed),
        "validation": sample_rows(validation, data.max_validation_samples, data.split_seed),
        "test": sample_rows(test or [], data.max_test_samples, data.split_seed),
    }


def _labels(rows: dict[str, AnyRows], sources: dict[str, Path], given: Sequence[str] | None) -> tuple[str, ...]:
    """Class names as given, or else whole numbers in their order and words in the alphabet's.

    Raises DataError on one class alone, and on one that is not among those given.
    """
    if given is not None:
        for split, found in rows.items():
            for row in found if set(label_counts(found)) - set(given) else ():
                if row.label not in given:
                    raise DataError(f"{sources[split]}:{row.line}: the label {row.label!r} is not one of data.labels")
        return tuple(given)
    counts = label_counts(rows["train"])
    if len(counts) < 2:
        only = next(iter(counts))
        raise DataError(
            f"{sources['train']}: every training row has the label {only!r}; a classifier needs at least two"
        )
    if len(counts) > 1000:
        raise DataError(f"{sources['train']}: there are {len(counts)} labels; is data.label_column the right column?")
    for split in ("validation", "test"):
        unknown = sorted(set(label_counts(rows.get(split, []))) - set(counts))
        if unknown:
            raise DataError(f"the {split} rows have labels that no training row has: {', '.join(unknown[:5])}")
    numeric = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in counts)
    return tuple(sorted(counts, key=int) if numeric else sorted(counts))


def _duplicates(rows: dict[str, AnyRows]) -> list[str]:
    """Warnings about rows that stand twice, in one split or (worse) on both sides."""
    warnings = []
    train, others = rows["train"], {split: rows[split] for split in ("validation", "test")}
    if isinstance(train, LargeRows):
        different = np.unique(train.questions())
        twice = len(train) - len(different)
        listed = {
            row.question for found in others.values() if not have_comparable_questions(train, found) for row in found
        }
        among = {row.question for row in train if row.question in listed} if listed else set()
    else:
        among = {row.question for row in train}
        twice = len(train) - len(among)
    if twice:
        stands = "training row stands" if twice == 1 else "training rows stand"
        warnings.append(f"{twice} {stands} more than once")
    for split, found in others.items():
        if isinstance(found, LargeRows) and have_comparable_questions(train, found):
            leaked = _number_among(found.questions(), different)
        else:
            leaked = sum(row.question in among for row in found)
        if leaked:
            of_all = f"of {counted(len(found), f'{split} row')}"
            warnings.append(f"{_are(leaked, of_all)} also among the training rows: results are optimistic")
    return warnings


def _number_among(values: np.ndarray, ordered: np.ndarray) -> int:
    """Return how many values are among others, which are different and in their order."""
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return int((ordered[places] == values).sum())


def _are(number: int, among: str) -> str:
    return f"{number:,} {among} {'is' if number == 1 else 'are'}"


def majority_share(rows: AnyRows) -> float:
    """Share of the most frequent label: what a classifier gets that always says the same."""
    counts = label_counts(rows)
    return max(counts.values()) / sum(counts.values())
