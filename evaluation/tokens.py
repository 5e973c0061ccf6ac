"""Tokenize a job's rows once, cache them by content, and share them between processes.

Numbers only, no model. R rows, E examples: a row with several learnt turns may become
several examples, if its chat template renders an earlier turn differently from the last
one.

`prepare` is the entry point. It stores a folder of NumPy files, which every process of
every trial maps into memory, so that many trials on a machine hold the tokens once. The
folder is named by a digest of everything that the tokens depend on; a folder is never
changed after it was written.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lorafleet.evaluation.tokenizer import get_padding_id, load_chat_format
from lorafleet.jobs import files
from lorafleet.jobs.data.answer_frame import THINKING, AnswerFrame
from lorafleet.jobs.data.assets import get_cache_dir
from lorafleet.jobs.data.chat_format import ChatFormat
from lorafleet.jobs.data.chat_template import TemplateRefusal
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.encoding import RowEncoder
from lorafleet.jobs.data.hub import resolve_model_revision
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.data.rows import Rows, load_rows
from lorafleet.jobs.data.split_files import SPLIT_VERSION, get_split_file, get_split_files
from lorafleet.jobs.data.verified_files import check_cache
from lorafleet.jobs.errors import DataError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.text import format_count
from lorafleet.jobs.trials.trial_id import get_prompt_format

SPLITS = ("train", "validation", "test")
# Part of the cache key: folders of an older layout are then never read, only left unused.
_LAYOUT_VERSION = 5
"""Version of the files in a folder of tokens. Raise it when they change."""
_FILE_FIELDS = (
    *("train_file", "validation_file", "test_file"),
    *("dataset_name", "dataset_revision", "dataset_config_name"),
)
"""Fields that name a job's files. The cache key has the content of the files instead."""
_EVALUATED_SPLITS = ("validation", "test")
_ARRAY_NAMES = ("ids", "starts", "targets", "learnt", "groups")
_MAX_SHOWN = 10


@dataclass(frozen=True)
class Split:
    """The tokens of one split, end to end.

    Example e has the tokens `ids[starts[e] : starts[e + 1]]`. The arrays of a split that
    `open_tokens` returns are read from disk as needed and shared between processes; they
    must not be written. `subset` and `concat` return splits in memory.
    """

    ids: np.ndarray
    """Token ids of all examples (int32)."""
    starts: np.ndarray
    """Position in `ids` at which each example begins, and the end of the last (int64, E + 1)."""
    targets: np.ndarray
    """Classification: class of each row.

    Generation: position in each example at which its last answer begins.
    """
    learnt: np.ndarray
    """Generation: True for each of `ids` that is learnt (bool). Classification: empty."""
    groups: np.ndarray
    """Row of each example (int64, E), in ascending order."""

    @classmethod
    def from_classes(cls, ids: np.ndarray, starts: np.ndarray, classes: np.ndarray) -> Split:
        """Return a split of rows with one class each.

        Each row is one example.

        Args:
            ids: Token ids of all rows, end to end.
            starts: Position at which each row begins, and the end of the last (R + 1).
            classes: Class of each row (R).
        """
        return cls(
            ids, starts, classes.astype(np.int64), np.zeros(0, dtype=bool), np.arange(len(classes))
        )

    @classmethod
    def from_texts(cls, ids: np.ndarray, starts: np.ndarray) -> Split:
        """Return a split of texts that are learnt in full, except the first token of each.

        The first token of a text has nothing before it from which it could be predicted.

        Args:
            ids: Token ids of all texts, end to end.
            starts: Position at which each text begins, and the end of the last (R + 1).
        """
        learnt = np.ones(len(ids), dtype=bool)
        learnt[np.asarray(starts[:-1], dtype=np.int64)] = False
        rows = len(starts) - 1
        return cls(ids, starts, np.ones(rows, dtype=np.int64), learnt, np.arange(rows))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.groups[-1]) + 1 if len(self.groups) else 0

    def subset(self, examples: np.ndarray) -> Split:
        """Return some of the examples, in the given order, as a split in memory.

        Args:
            examples: Indices of examples. Examples of one row must stay together and rows in
                ascending order, so that `groups` stays ascending.

        Returns:
            A split whose rows are numbered from 0 again.
        """
        spans = [
            slice(int(self.starts[example]), int(self.starts[example + 1])) for example in examples
        ]
        starts = np.concatenate([[0], np.cumsum(self.lengths[examples])]).astype(np.int64)
        learnt = (
            np.concatenate([self.learnt[span] for span in spans])
            if len(self.learnt)
            else self.learnt
        )
        _, groups = np.unique(np.asarray(self.groups)[examples], return_inverse=True)
        ids = np.concatenate([np.asarray(self.ids[span]) for span in spans])
        return Split(
            ids, starts, np.asarray(self.targets)[examples], learnt, groups.astype(np.int64)
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example (E)."""
        return np.diff(self.starts)

    @cached_property
    def target_counts(self) -> np.ndarray:
        """Learnt tokens of each example (E); 1 each for a classifier."""
        if not len(self.learnt):
            return np.ones(len(self), dtype=np.int64)
        sums = np.concatenate([[0], np.cumsum(self.learnt, dtype=np.int64)])
        counts: np.ndarray = sums[self.starts[1:]] - sums[self.starts[:-1]]
        return counts

    def sum_by_row(self, values_E: np.ndarray) -> np.ndarray:
        """Return the sum of a value of each example (E) for each row (R).

        Per-row results are about rows of the data file, and a row may be several examples.
        """
        sums = np.zeros(self.rows, dtype=values_E.dtype)
        # `sums[groups] += values` would count a row with several examples only once.
        np.add.at(sums, self.groups, values_E)
        return sums


@dataclass(frozen=True)
class PackedRows:
    """Packed rows of several examples each.

    The tokens stay in the split's files. Made by `pack_split` for `train.packing`. A
    training step takes packed rows, while losses and gradients stay those of single
    examples: each example sees only itself.
    """

    split: Split
    members: list[np.ndarray]
    """Examples of each packed row, in order."""

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.array(
            [self.split.lengths[examples].sum() for examples in self.members], dtype=np.int64
        )

    @cached_property
    def target_counts(self) -> np.ndarray:
        """Learnt tokens of each row."""
        return np.array(
            [self.split.target_counts[examples].sum() for examples in self.members], dtype=np.int64
        )

    def get_examples(self, rows: np.ndarray) -> np.ndarray:
        """Return the examples of some rows, one row after another."""
        return np.concatenate([self.members[row] for row in rows])


def pack_examples(lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Pack examples into rows of at most `max_tokens` tokens.

    The longest examples come first, each goes into the fullest row that has room. An
    example that is longer than `max_tokens` gets a row of its own.

    Source: best-fit decreasing, as TRL's `packing_strategy: bfd`.

    Args:
        lengths: Tokens of each example (E).
        max_tokens: Room of a row, in tokens.

    Returns:
        Indices of the examples of each row. Equal lengths keep their order, so the result
            is the same in every process.
    """
    # Rows are found by their remaining room. The sorted list of rooms makes each search a
    # bisection; trying every row would be quadratic in the number of examples.
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # keys of by_room, ascending
    for example in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example])
        index = bisect.bisect_left(rooms, length)
        if index == len(rooms):
            number, room = len(rows), max_tokens
            rows.append([])
        else:
            room = rooms[index]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[index]
        rows[number].append(int(example))
        room = max(0, room - length)
        if room:
            if room not in by_room:
                bisect.insort(rooms, room)
            by_room.setdefault(room, []).append(number)
    return rows


def pack_split(split: Split, max_tokens: int) -> PackedRows:
    """Return a split's examples packed into rows of at most `max_tokens` tokens."""
    return PackedRows(
        split, [np.array(row, dtype=np.int64) for row in pack_examples(split.lengths, max_tokens)]
    )


def concat(first: Split, second: Split) -> Split:
    """Return the rows of two splits as one split in memory, those of `first` first."""
    starts = np.concatenate([first.starts, second.starts[1:] + first.starts[-1]])
    groups = np.concatenate([first.groups, second.groups + first.rows])
    targets = np.concatenate([first.targets, second.targets])
    learnt = np.concatenate([first.learnt, second.learnt])
    return Split(np.concatenate([first.ids, second.ids]), starts, targets, learnt, groups)


def assign_folds(split: Split, folds: int, seed: int, *, classifies: bool) -> np.ndarray:
    """Return the fold of each example (E).

    Folds depend on the rows and the seed only, so every process computes the same ones.
    Equal rows, and the examples of one row, are in the same fold. Classes are spread
    evenly.

    Args:
        split: All rows that take part: training and validation rows together.
        folds: Number of folds.
        seed: `data.split_seed`.
        classifies: True for a classifier, whose rows are equal if their texts are.
            Otherwise rows are equal if their prompts are.
    """
    # A prompt that occurs on both sides of a fold would be learnt and then tested: rows with the
    # same prompt go into one fold together.
    members: dict[bytes, list[int]] = {}
    for row, examples in enumerate(_group_by_row(split)):
        members.setdefault(_get_prompt_key(split, examples[0], classifies=classifies), []).append(
            row
        )
    order = list(members.values())
    np.random.default_rng([seed, folds]).shuffle(order)
    # `groups` is ascending, so this is the first example of each row.
    first = np.searchsorted(split.groups, np.arange(split.rows))
    if classifies:
        order.sort(
            key=lambda rows: int(split.targets[first[rows[0]]])
        )  # stable: dealt out class by class
    fold_R = np.zeros(split.rows, dtype=int)
    for number, rows in enumerate(order):
        fold_R[rows] = number % folds
    fold_E: np.ndarray = fold_R[split.groups]
    return fold_E


def _group_by_row(split: Split) -> list[list[int]]:
    """Return the examples of each row."""
    examples: list[list[int]] = [[] for _ in range(split.rows)]
    for example, row in enumerate(split.groups):
        examples[int(row)].append(example)
    return examples


def _get_prompt_key(split: Split, example: int, *, classifies: bool) -> bytes:
    """Return what rows of the same fold have in common: a text, or a prompt.

    Args:
        split: The rows.
        example: First example of the row.
        classifies: True for a classifier.

    Returns:
        The bytes of the token ids.
    """
    begin, end = int(split.starts[example]), int(split.starts[example + 1])
    prompt_length = int(split.targets[example])
    is_text = (
        classifies or prompt_length <= 1
    )  # before the learnt part, a plain text has a start token or nothing
    return np.asarray(split.ids[begin : end if is_text else begin + prompt_length]).tobytes()


@dataclass(frozen=True)
class TokenData:
    """The three tokenized splits of a job, with remarks on them.

    `prepare` and `open_tokens` return it. It is never changed; `for_fold` returns another
    one. If `chosen_on_test` is True there were too few rows for a test split, and `test`
    has the validation rows again.
    """

    splits: dict[str, Split]
    labels: tuple[str, ...]
    warnings: tuple[str, ...]
    chosen_on_test: bool
    pad_id: int
    folder: Path
    rows_sha256: dict[str, str]
    """Digest of the rows of each split. Models are compared only on equal rows."""
    ends: tuple[int, ...] = ()
    """Token ids that end an answer."""
    frame: AnswerFrame | None = None
    """What the model writes before an answer; None if the rows are not conversations."""
    system: Message | None = None
    """System message that all rows have; None if they have none or different ones."""
    systems: int = 0
    """Number of different system messages; rows without one count as one more."""
    template_sha256: str = ""
    """Digest of the chat template; empty without a template."""
    counts: dict[str, Any] = field(default_factory=dict)
    """Split -> how many rows were cut, shortened and split."""

    @property
    def longest(self) -> int:
        """Tokens of the longest training example."""
        return int(self.splits["train"].lengths.max())

    def count_training_rows(self, job: JobSpec) -> int:
        """Return the number of rows in an epoch of a job: examples, or packed rows of them.

        Args:
            job: The job of a trial. Its fold, `train.packing` and `model.max_length` count.
        """
        split = self.for_fold(job).splits["train"]
        return (
            len(pack_examples(split.lengths, job.model.max_length))
            if job.train.packing
            else len(split)
        )

    def read_rows(self, split_name: str) -> list[Row]:
        """Return the rows of an evaluated split, as they were before tokenization.

        Args:
            split_name: `validation` or `test`. Training rows are not stored as text.

        Returns:
            A shared list, which must not be changed. Rows of text jobs have the answer that
                metrics compare with.
        """
        return _read_cached_rows(self.folder / f"{split_name}-rows.jsonl")

    def get_tokens(self, split_name: str, count: int) -> list[list[int]]:
        """Return the stored token ids of the first `count` examples of a split."""
        split = self.splits[split_name]
        ends = [
            (int(split.starts[row]), int(split.starts[row + 1]))
            for row in range(min(count, len(split)))
        ]
        return [split.ids[first:last].tolist() for first, last in ends]

    def for_fold(self, job: JobSpec) -> TokenData:
        """Return the splits that a job trains with; a held-out fold is the validation split.

        Equal rows are in one fold, and each class is spread evenly over all folds. Without
        cross-validation this returns the data itself. The test split is the same in every fold.

        Raises:
            DataError: There are too few different rows for the folds.
        """
        fold, folds = job.data.fold, job.evaluate.folds
        if fold is None or folds is None:
            return self
        # Cross-validation replaces the validation split, so its rows are trained on as well.
        pool = concat(self.splits["train"], self.splits["validation"])
        fold_E = assign_folds(pool, folds, job.data.split_seed, classifies=not job.is_generative)
        subsets = {
            "train": np.flatnonzero(fold_E != fold),
            "validation": np.flatnonzero(fold_E == fold),
        }
        if not len(subsets["train"]) or not len(subsets["validation"]):
            raise DataError(
                f"evaluate.folds is {folds}, but there are too few different rows for so many "
                "folds: use fewer folds"
            )
        return replace(
            self, splits=self.splits | {name: pool.subset(rows) for name, rows in subsets.items()}
        )


@lru_cache(maxsize=8)
def _read_cached_rows(path: Path) -> list[Row]:
    """Read the rows that `_tokenize` stored. They are cached: a folder of tokens never changes."""
    return [Row.from_record(record) for record in files.read_jsonl(path)]


def prepare(job: JobSpec) -> TokenData:
    """Return a job's rows as tokens, from the cache if the same content was tokenized before.

    Processes that need the same tokens wait for the first one. The time goes into rendering
    and tokenizing; opening stored tokens reads only their metadata.

    Raises:
        DataError: The rows cannot be used.
        AssetError: The data or the tokenizer is not on this machine.
    """
    check_cache(get_cache_dir())
    folder = get_cache_dir() / "tokens" / _compute_content_key(job)
    with files.hold_lock(folder):
        if not (folder / "meta.json").is_file():
            rows = load_rows(job)
            folder.parent.mkdir(parents=True, exist_ok=True)
            # The folder appears complete, by a rename: a killed process leaves only a scratch
            # folder behind, and readers need no lock. `dir` keeps the scratch folder on the same
            # file system.
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                target = Path(scratch) / "made"
                _tokenize(job, rows, target)
                target.rename(folder)
    return open_tokens(folder)


def open_tokens(folder: Path) -> TokenData:
    """Open the tokens that `prepare` stored in a folder.

    The arrays are mapped into memory, not read. Measuring processes get only the path of
    the folder and call this.
    """
    meta = files.read_json(folder / "meta.json")
    splits = {
        name: Split(
            *(np.load(folder / f"{name}-{part}.npy", mmap_mode="r") for part in _ARRAY_NAMES)
        )
        for name in SPLITS
    }
    return TokenData(
        splits,
        tuple(meta["labels"]),
        tuple(meta["warnings"]),
        meta["chosen_on_test"],
        meta["pad_id"],
        folder,
        meta["rows_sha256"],
        tuple(meta["ends"]),
        AnswerFrame.from_dict(meta["frame"]) if meta["frame"] else None,
        Message.from_record(meta["system"]) if meta["system"] else None,
        meta["systems"],
        meta["template_sha256"],
        meta["counts"],
    )


def _compute_content_key(job: JobSpec) -> str:
    """Return a digest of everything that the tokens depend on.

    Names of files are left out and their content is digested instead, so a copied or
    renamed file finds its tokens, and a changed one does not.
    """
    data = job.data.model_dump(mode="json")
    for name in _FILE_FIELDS:
        data.pop(name)
    content = {
        "files": {
            split: files.compute_file_digest(path)
            for split, path in get_split_files(job.data).items()
        },
        "data": data,
        # Summarization and generation make the same tokens of the same rows.
        "task": "generation" if job.is_generative else job.task,
        "layout": _LAYOUT_VERSION,
        "split_version": SPLIT_VERSION,
        "tokenizer": resolve_model_revision(job.model.model_name_or_path, job.model.revision),
        "max_length": job.model.max_length,
        "prompt_format": get_prompt_format(job),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def make_row_encoder(job: JobSpec, chat: ChatFormat | None = None) -> RowEncoder:
    """Return the encoder of a job's conversations and texts.

    Args:
        job: The job.
        chat: Its chat format, to share counters with the caller. None loads it.
    """
    return RowEncoder(
        chat or load_chat_format(job),
        job.model.max_length,
        train_on_turns=job.data.train_on_turns,
        assistant_only_loss=job.data.assistant_only_loss,
    )


def _tokenize(job: JobSpec, rows: Rows, folder: Path) -> None:
    """Tokenize all splits and store them in a new folder.

    Writes the arrays of each split, the rows of the evaluated splits (`SPLIT-rows.jsonl`)
    and, last, `meta.json`, whose presence marks a complete folder.

    Raises:
        DataError: The chat template refuses rows, or a row has no tokens.
    """
    chat = load_chat_format(job)
    # The chat format is shared within the process and may still have the counts of another job.
    chat.counts.clear()
    warnings = list(rows.warnings)
    digests: dict[str, str] = {}
    counts: dict[str, Any] = {}
    ends_seen: dict[int, None] = {}
    folder.mkdir()
    split = _build_split([], [], [])
    answers: list[str] | None = None
    for name in SPLITS:
        split_rows: list[Row] = getattr(rows, name)
        if name == "test" and rows.chosen_on_test:
            counts[name] = {}  # these are the validation rows, which were counted already
        elif job.task == "classification":
            split, counts[name] = _tokenize_classification(
                split_rows, rows.labels, chat.tokenizer, job.model.max_length
            )
        else:
            encoder = make_row_encoder(job, chat)
            split, answers = _tokenize_generation(split_rows, encoder, get_split_file(name, job))
            counts[name] = dict(encoder.counts)
            ends_seen |= encoder.ends
        warnings += _list_length_notes(name, len(split_rows), counts[name], job.model.max_length)
        for part in _ARRAY_NAMES:  # without a test split, this is the validation split again
            np.save(folder / f"{name}-{part}.npy", getattr(split, part))
        records = [row.to_record() for row in split_rows]
        digests[name] = _compute_digest(records)
        if name in _EVALUATED_SPLITS:
            files.write_jsonl(folder / f"{name}-rows.jsonl", _add_answers(records, answers))
    systems = collect_system_messages(rows) if job.is_generative else set()
    has_conversations = any(row.messages for row in rows.train)
    source = chat.template.source if has_conversations else ""
    meta = {
        "labels": list(rows.labels),
        "warnings": warnings + (list_template_notes(chat, systems) if has_conversations else []),
        "chosen_on_test": rows.chosen_on_test,
        "pad_id": get_padding_id(chat.tokenizer),
        "rows_sha256": digests,
        "ends": list(dict.fromkeys([*chat.ends, *ends_seen]))
        if has_conversations
        else chat.model_ends,
        "frame": chat.frame.to_dict() if has_conversations else None,
        "system": _get_common_system(systems),
        "systems": len(systems),
        "template_sha256": hashlib.sha256(source.encode()).hexdigest() if source else "",
        "counts": counts,
    }
    files.write_json(folder / "meta.json", meta)


def _add_answers(
    records: list[dict[str, Any]], answers: Sequence[str] | None
) -> list[dict[str, Any]]:
    if answers is None:
        return records
    return [record | {"answer": answer} for record, answer in zip(records, answers, strict=True)]


def _get_common_system(systems: set[System | None]) -> dict[str, str] | None:
    """Return the system message that all rows have; None if they have none or different ones.

    An exported model puts it before every prompt, which is right only if every training row
    had it.
    """
    (system,) = systems if len(systems) == 1 else (None,)
    return None if system is None else {"role": system[0], "content": system[1]}


System = tuple[str, str]
"""(role, content) of the first message of a conversation; the role is system or developer."""


def collect_system_messages(rows: Rows) -> set[System | None]:
    """Return the different system messages of all conversations, over all splits.

    None stands for conversations without one. Only the first message of a conversation
    counts.
    """
    systems: set[System | None] = set()
    for split in (rows.train, rows.validation, rows.test):
        for row in split:
            if row.messages:
                first = row.messages[0]
                systems.add(
                    (first.role, first.content) if first.role in ("system", "developer") else None
                )
    return systems


def _list_length_notes(name: str, rows: int, counts: dict[str, Any], max_length: int) -> list[str]:
    """Return notes on rows that model.max_length cut, and on rows that became several examples."""
    notes = []
    if counts.get("shortened"):
        notes.append(
            f"{counts['shortened']} of {rows} {name} rows are longer than model.max_length = "
            f"{max_length} tokens and lost their oldest turns"
        )
    if counts.get("cut"):
        notes.append(
            f"{counts['cut']} of {rows} {name} rows are longer than model.max_length = "
            f"{max_length} tokens and were truncated"
        )
    if counts.get("nothing"):
        notes.append(f"{counts['nothing']} of the truncated {name} rows have nothing left to learn")
    if counts.get("split"):
        notes.append(
            f"{counts['split']} of {rows} {name} rows became {counts['examples']} examples, one "
            "for each learnt turn: the chat template renders an earlier turn differently from the "
            "last one"
        )
    return notes


def list_template_notes(chat: ChatFormat, systems: set[System | None]) -> list[str]:
    """Return notes on what the chat template does with these rows.

    Args:
        chat: The chat format after all rows were encoded: its counters say how many rows
            are concerned.
        systems: What `collect_system_messages` returned.

    Returns:
        One sentence each, without a final period. They go into the plan, the data report
            and the report of the run.
    """
    notes = [
        text.format(rows=format_count(chat.counts[name], "row"))
        for name, text in _COUNTER_NOTES
        if chat.counts[name]
    ]
    for name in chat.template.unused_variables:
        notes.append(
            f"data.chat_template_kwargs has {name}, which the chat template does not use, so it "
            "has no effect"
        )
    if not chat.template.source:
        return notes
    ending, tokenizer = chat.ending, chat.tokenizer
    if ending.token is None:
        notes.append(
            "neither the chat template nor the tokenizer has an end token: answers only end at "
            "evaluate.max_new_tokens"
        )
    elif ending.appended:
        name = tokenizer.convert_ids_to_tokens(ending.token)
        notes.append(
            f"the chat template does not end turns with a token, so {name} is learnt after every "
            "answer"
        )
    elif ending.token != tokenizer.eos_token_id:
        name = tokenizer.convert_ids_to_tokens(ending.token)
        notes.append(
            f"turns end with {name}, as in the chat template (the tokenizer's eos_token is "
            f"{tokenizer.eos_token})"
        )  # fmt: skip
    if chat.generation_prompt == "missing" and chat.frame.marker != THINKING[1]:
        notes.append(
            "the chat template has no generation prompt, so the model generates the header of its "
            "turn itself"
        )
    if chat.generation_prompt == "always":
        notes.append(
            "the chat template adds the header of the next answer to every text; the header is not "
            "learnt"
        )
    if chat.template.has_current_date:
        fix = (
            "; set data.chat_template_kwargs: {date_string: 26 Jul 2024} to fix the date"
            if chat.template.uses_date_string
            else ""
        )
        notes.append(f"the chat template writes the current date into every prompt{fix}")
    if len(systems) > 1:
        notes.append(
            "the rows do not all have the same system message, so an exported model adds none to a "
            "prompt"
        )
    return notes


_COUNTER_NOTES = (
    (
        "thinking_closed",
        "in {rows} the chat template opens a thinking block for generation, but not in the "
        "rendered conversation: the model learns to close it before its answer (a variable such as "
        "enable_thinking: false in data.chat_template_kwargs may avoid this)",
    ),
    (
        "prompt_differs",
        "in {rows} the chat template renders the prompt differently if the answer follows: the "
        "answer is learnt after the prompt as rendered for generation",
    ),
    (
        "boundary_merged",
        "in {rows} a token would span the end of the prompt: the answer is tokenized separately",
    ),
    (
        "end_inside",
        "in {rows} an answer contains an end token: the model learns to generate it, and "
        "generation ends there",
    ),
    (
        "special_inside",
        "in {rows} a message contains the text of a special token, which is read as that token",
    ),
    (
        "answer_lossy",
        "in {rows} the tokenizer cannot represent the answer exactly (it normalises it, or does "
        "not know a word): metrics compare with what it can represent",
    ),
    (
        "no_answer",
        "in {rows} the last answer is a tool call, which cannot be told from an unfinished turn "
        "with this template: metrics of answers score it 0",
    ),
    ("system_dropped", "in {rows} the chat template drops the system message"),
    ("user_dropped", "in {rows} the chat template drops or changes the user's message"),
    (
        "answer_changed",
        "in {rows} the chat template changes the answer: the rendered form is learnt",
    ),
    (
        "markers_unusable",
        "in {rows} the template's {{% generation %}} markers cover nothing of the answer: all of "
        "it is learnt",
    ),
    (
        "markers_begin_late",
        "in {rows} the template's {{% generation %}} markers leave out the beginning of the text "
        "that the model must generate",
    ),
)
"""Counter of a chat format -> the note on it."""


def _compute_digest(records: list[dict[str, Any]]) -> str:
    """Return the SHA-256 of the content of rows, in their order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _tokenize_classification(
    rows: list[Row], labels: tuple[str, ...], tokenizer: Any, max_length: int
) -> tuple[Split, dict[str, int]]:
    """Tokenize labelled texts.

    Args:
        rows: The rows.
        labels: Class names, in the order of the model's outputs.
        tokenizer: The tokenizer.
        max_length: Maximum tokens of a text.

    Returns:
        (tokens, counts). The count `cut` is the number of texts that were longer.
    """
    label_ids = {label: index for index, label in enumerate(labels)}
    if not rows:
        return _build_split([], [], []), {}
    encoded = tokenizer([row.text for row in rows], add_special_tokens=True)["input_ids"]
    # The first pass does not truncate, to count the texts that are too long. Cutting its ids would
    # drop the closing token, which the tokenizer's own truncation keeps.
    longer = sum(len(tokens) > max_length for tokens in encoded)
    if longer:
        encoded = tokenizer([row.text for row in rows], truncation=True, max_length=max_length)[
            "input_ids"
        ]
    return _build_split(encoded, [label_ids[row.label] for row in rows], list(range(len(rows)))), {
        "cut": longer
    }


def _tokenize_generation(
    rows: list[Row], encoder: RowEncoder, file: Path
) -> tuple[Split, list[str]]:
    """Tokenize conversations and plain texts.

    Args:
        rows: The rows.
        encoder: Encodes a row. Its counters say afterwards how many rows were cut or split.
        file: File that messages name.

    Returns:
        (tokens, the answer of each row as metrics compare it).

    Raises:
        DataError: The chat template refuses rows. The message lists the first ten with
            their lines.
    """
    ids: list[np.ndarray] = []
    learnt: list[np.ndarray] = []
    answer_starts, groups, answers, problems = [], [], [], []
    for number, row in enumerate(rows):
        try:
            encoded = encoder.encode(row)
        except TemplateRefusal as error:
            problems.append(f"{file}:{row.line}: {error}")
            continue
        for example in encoded.examples:  # as arrays at once: lists of 100,000 rows take gigabytes
            ids.append(np.array(example.ids, dtype=np.int32))
            learnt.append(np.array(example.learnt, dtype=bool))
            answer_starts.append(example.answer_start)
            groups.append(number)
        answers.append(encoded.reference)
    if problems:
        more = f"\nand {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
        raise DataError("\n".join(problems[:_MAX_SHOWN]) + more)
    return _build_split(ids, answer_starts, groups, learnt), answers


def _build_split(
    rows: Sequence[Sequence[int] | np.ndarray],
    targets: list[int],
    groups: list[int],
    learnt: Sequence[np.ndarray] = (),
) -> Split:
    """Return token sequences as a split.

    Args:
        rows: Token ids of each example.
        targets: Class of each row, or where the last answer of each example begins.
        groups: Row of each example.
        learnt: Which tokens of each example are learnt; empty for a classifier.

    Raises:
        DataError: A row has no tokens.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    if len(lengths) and not lengths.min():
        raise DataError("a row has no tokens: it holds only characters that the tokenizer drops")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = (
        np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
        if rows
        else np.zeros(0, np.int32)
    )
    return Split(
        flat,
        starts,
        np.array(targets, dtype=np.int64),
        np.concatenate(learnt) if learnt else np.zeros(0, dtype=bool),
        np.array(groups, dtype=np.int64),
    )


def count_tokens(data: TokenData) -> dict[str, Any]:
    """Return the rows, examples and tokens of each split, for plans and reports."""
    return {
        name: {"rows": split.rows, "examples": len(split), "tokens": int(split.starts[-1])}
        for name, split in data.splits.items()
    }
