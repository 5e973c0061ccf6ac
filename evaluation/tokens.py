"""Rows as tokens: made once, kept by content, and read by every process of a run. Numbers only, no model.

R rows, E examples: a row of several learnt turns may become several examples, where its chat template renders an
earlier turn differently from the last one.
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
from lorafleet.evaluation.tokenizer import chat_format, padding_id
from lorafleet.jobs import files
from lorafleet.jobs.data.answer_frame import THINKING, AnswerFrame
from lorafleet.jobs.data.assets import cache_dir
from lorafleet.jobs.data.chat_format import ChatFormat
from lorafleet.jobs.data.chat_template import TemplateRefusal
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.encoding import RowEncoder
from lorafleet.jobs.data.hub import model_revision
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.data.rows import Rows, file_of_split, load_rows, split_files
from lorafleet.jobs.data.splits import SPLIT_VERSION
from lorafleet.jobs.data.verified_files import check_cache
from lorafleet.jobs.errors import DataError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.text import counted
from lorafleet.jobs.trials.trial_id import prompt_format

SPLITS = ("train", "validation", "test")
_LAYOUT = 5
"""Raised when the files of a folder of tokens change."""
_NAMES_OF_FILES = (
    *("train_file", "validation_file", "test_file"),
    *("dataset_name", "dataset_revision", "dataset_config_name"),
)
"""What a job calls its files, whose bytes are what counts."""
_JUDGED = ("validation", "test")
_PARTS = ("ids", "starts", "targets", "learnt", "groups")
_MAX_SHOWN = 10


@dataclass(frozen=True)
class Split:
    """The tokens of one split, end to end; read from disk as needed, and shared between processes."""

    ids: np.ndarray
    """Token ids of all examples (int32)."""
    starts: np.ndarray
    """Position in `ids` at which each example begins, and after the last its end (int64, E + 1)."""
    targets: np.ndarray
    """Classification: the class of each row. Generation: the place in each example at which its last answer begins."""
    learnt: np.ndarray
    """Generation: for each of `ids` whether it is learnt (bool). Classification: empty."""
    groups: np.ndarray
    """The row of each example (int64, E), in ascending order."""

    @classmethod
    def of_classes(cls, ids: np.ndarray, starts: np.ndarray, classes: np.ndarray) -> Split:
        """Return rows with a class each."""
        return cls(ids, starts, classes.astype(np.int64), np.zeros(0, dtype=bool), np.arange(len(classes)))

    @classmethod
    def of_texts(cls, ids: np.ndarray, starts: np.ndarray) -> Split:
        """Return texts that are learnt whole, but for the first token of each."""
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

    def part(self, examples: np.ndarray) -> Split:
        """Return some of the examples, in memory."""
        spans = [slice(int(self.starts[one]), int(self.starts[one + 1])) for one in examples]
        starts = np.concatenate([[0], np.cumsum(self.lengths[examples])]).astype(np.int64)
        learnt = np.concatenate([self.learnt[span] for span in spans]) if len(self.learnt) else self.learnt
        _, groups = np.unique(np.asarray(self.groups)[examples], return_inverse=True)
        ids = np.concatenate([np.asarray(self.ids[span]) for span in spans])
        return Split(ids, starts, np.asarray(self.targets)[examples], learnt, groups.astype(np.int64))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example (E)."""
        return np.diff(self.starts)

    @cached_property
    def target_counts(self) -> np.ndarray:
        """Learnt tokens of each example (E); of a classifier 1 each."""
        if not len(self.learnt):
            return np.ones(len(self), dtype=np.int64)
        sums = np.concatenate([[0], np.cumsum(self.learnt, dtype=np.int64)])
        counts: np.ndarray = sums[self.starts[1:]] - sums[self.starts[:-1]]
        return counts

    def by_row(self, values_E: np.ndarray) -> np.ndarray:
        """Add up one number of each example to one of each row (R)."""
        sums = np.zeros(self.rows, dtype=values_E.dtype)
        np.add.at(sums, self.groups, values_E)
        return sums


@dataclass(frozen=True)
class PackedRows:
    """Rows of several examples each, one after another; the tokens stay in the split's files."""

    split: Split
    members: list[np.ndarray]
    """The examples of each row, in their order."""

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each row."""
        return np.array([self.split.lengths[examples].sum() for examples in self.members], dtype=np.int64)

    @cached_property
    def target_counts(self) -> np.ndarray:
        """Return the learnt tokens of each row."""
        return np.array([self.split.target_counts[examples].sum() for examples in self.members], dtype=np.int64)

    def examples(self, rows: np.ndarray) -> np.ndarray:
        """Return the examples of some rows, one row after another."""
        return np.concatenate([self.members[row] for row in rows])


def packs(lengths: np.ndarray, most: int) -> list[list[int]]:
    """Return examples in rows of at most `most` tokens: the longest first, each into the fullest row that has room.

    Source: best-fit decreasing, as TRL's `packing_strategy: bfd`.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # those of by_room, ascending
    for example in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            number, room = len(rows), most
            rows.append([])
        else:
            room = rooms[place]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[number].append(int(example))
        room = max(0, room - length)
        if room:
            if room not in by_room:
                bisect.insort(rooms, room)
            by_room.setdefault(room, []).append(number)
    return rows


def packed(split: Split, most: int) -> PackedRows:
    """Return a split's examples in rows of at most `most` tokens."""
    return PackedRows(split, [np.array(row, dtype=np.int64) for row in packs(split.lengths, most)])


def joined(one: Split, other: Split) -> Split:
    """Return the rows of two splits as one."""
    starts = np.concatenate([one.starts, other.starts[1:] + one.starts[-1]])
    groups = np.concatenate([one.groups, other.groups + one.rows])
    targets = np.concatenate([one.targets, other.targets])
    learnt = np.concatenate([one.learnt, other.learnt])
    return Split(np.concatenate([one.ids, other.ids]), starts, targets, learnt, groups)


def folds_of(split: Split, folds: int, seed: int, *, classifies: bool) -> np.ndarray:
    """Return the fold of each example (E): drawn by the seed alone, equal rows and the examples of one row together,
    classes spread evenly."""
    members: dict[bytes, list[int]] = {}
    for row, examples in enumerate(_examples_of_rows(split)):
        members.setdefault(_prompt_key(split, examples[0], classifies=classifies), []).append(row)
    order = list(members.values())
    np.random.default_rng([seed, folds]).shuffle(order)
    first = np.searchsorted(split.groups, np.arange(split.rows))
    if classifies:
        order.sort(key=lambda rows: int(split.targets[first[rows[0]]]))  # stable: dealt out class by class
    fold_R = np.zeros(split.rows, dtype=int)
    for number, rows in enumerate(order):
        fold_R[rows] = number % folds
    fold_E: np.ndarray = fold_R[split.groups]
    return fold_E


def _examples_of_rows(split: Split) -> list[list[int]]:
    examples: list[list[int]] = [[] for _ in range(split.rows)]
    for example, row in enumerate(split.groups):
        examples[int(row)].append(example)
    return examples


def _prompt_key(split: Split, example: int, *, classifies: bool) -> bytes:
    """Return what two rows that belong together have in common: a text, or a prompt."""
    begin, end = int(split.starts[example]), int(split.starts[example + 1])
    asked = int(split.targets[example])
    plain = classifies or asked <= 1  # a text alone has a start token, or nothing, before what is learnt
    return np.asarray(split.ids[begin : end if plain else begin + asked]).tobytes()


@dataclass(frozen=True)
class TokenData:
    """The three splits of a job, and what was odd about them."""

    splits: dict[str, Split]
    labels: tuple[str, ...]
    warnings: tuple[str, ...]
    chosen_on_test: bool
    pad_id: int
    folder: Path
    rows_sha256: dict[str, str]
    """Digest of what the rows of each split say: two models are compared on rows that are the same."""
    ends: tuple[int, ...] = ()
    """Tokens at which an answer is over."""
    frame: AnswerFrame | None = None
    """What the model writes before an answer; None: the rows are no conversations."""
    system: Message | None = None
    """The system message that all rows have; None: they have none, or not all the same."""
    systems: int = 0
    """How many different system messages the rows have, none among them."""
    template_sha256: str = ""
    """Digest of the chat template; empty: there is none."""
    counts: dict[str, Any] = field(default_factory=dict)
    """By split: what was cut, shortened and split."""

    @property
    def longest(self) -> int:
        """Tokens of the longest training example."""
        return int(self.splits["train"].lengths.max())

    def training_rows(self, job: JobSpec) -> int:
        """Return how many rows an epoch of a job has: examples, or packed rows of them."""
        split = self.of_job(job).splits["train"]
        return len(packs(split.lengths, job.model.max_length)) if job.train.packing else len(split)

    def rows(self, split_name: str) -> list[Row]:
        """Return the rows of a split that is judged on, as they were before they became tokens."""
        return _rows_of(self.folder / f"{split_name}-rows.jsonl")

    def tokens(self, split_name: str, count: int) -> list[list[int]]:
        """Return the first examples of a split as the tokens that they are stored as."""
        split = self.splits[split_name]
        ends = [(int(split.starts[row]), int(split.starts[row + 1])) for row in range(min(count, len(split)))]
        return [split.ids[first:last].tolist() for first, last in ends]

    def of_job(self, job: JobSpec) -> TokenData:
        """Return the splits that a job trains with: where it holds a fold back, that is its validation split.

        Rows that are equal are in one fold, and each class is spread evenly over all.
        """
        fold, folds = job.data.fold, job.evaluate.folds
        if fold is None or folds is None:
            return self
        pool = joined(self.splits["train"], self.splits["validation"])
        fold_E = folds_of(pool, folds, job.data.split_seed, classifies=not job.generates)
        parts = {"train": np.flatnonzero(fold_E != fold), "validation": np.flatnonzero(fold_E == fold)}
        if not len(parts["train"]) or not len(parts["validation"]):
            raise DataError(f"evaluate.folds is {folds}, but there are too few different rows for that")
        return replace(self, splits=self.splits | {name: pool.part(rows) for name, rows in parts.items()})


@lru_cache(maxsize=8)
def _rows_of(path: Path) -> list[Row]:
    """Read what `_tokenize` kept; a folder of tokens never changes."""
    return [Row.from_record(record) for record in files.read_jsonl(path)]


def prepare(job: JobSpec) -> TokenData:
    """Return the job's rows as tokens, from the cache where the same content was made before.

    Raises DataError or AssetError with what is wrong, before anything is trained.
    """
    check_cache(cache_dir())
    folder = cache_dir() / "tokens" / _content_key(job)
    with files.locked(folder):
        if not (folder / "meta.json").is_file():
            rows = load_rows(job)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                target = Path(scratch) / "made"
                _tokenize(job, rows, target)
                target.rename(folder)
    return open_tokens(folder)


def open_tokens(folder: Path) -> TokenData:
    """Read the tokens that `prepare` left in a folder."""
    meta = files.read_json(folder / "meta.json")
    splits = {
        name: Split(*(np.load(folder / f"{name}-{part}.npy", mmap_mode="r") for part in _PARTS)) for name in SPLITS
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


def _content_key(job: JobSpec) -> str:
    """Return a digest of all that the tokens depend on."""
    data = job.data.model_dump(mode="json")
    for name in _NAMES_OF_FILES:
        data.pop(name)
    content = {
        "files": {split: files.sha256_file(path) for split, path in split_files(job.data).items()},
        "data": data,
        "task": "generation" if job.generates else job.task,
        "layout": _LAYOUT,
        "split_version": SPLIT_VERSION,
        "tokenizer": model_revision(job.model.model_name_or_path, job.model.revision),
        "max_length": job.model.max_length,
        "prompt_format": prompt_format(job),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def row_encoder(job: JobSpec, chat: ChatFormat | None = None) -> RowEncoder:
    """Return the encoder of a job's conversations and texts."""
    return RowEncoder(
        chat or chat_format(job),
        job.model.max_length,
        train_on_turns=job.data.train_on_turns,
        assistant_only_loss=job.data.assistant_only_loss,
    )


def _tokenize(job: JobSpec, rows: Rows, folder: Path) -> None:
    chat = chat_format(job)
    chat.counts.clear()
    warnings = list(rows.warnings)
    digests: dict[str, str] = {}
    counts: dict[str, Any] = {}
    ends_seen: dict[int, None] = {}
    folder.mkdir()
    split = _pack([], [], [])
    answers: list[str] | None = None
    for name in SPLITS:
        split_rows: list[Row] = getattr(rows, name)
        if name == "test" and rows.chosen_on_test:
            counts[name] = {}  # the validation rows once more: they are not counted again
        elif job.task == "classification":
            split, counts[name] = _classification(split_rows, rows.labels, chat.tokenizer, job.model.max_length)
        else:
            encoder = row_encoder(job, chat)
            split, answers = _generation(split_rows, encoder, file_of_split(name, job))
            counts[name] = dict(encoder.counts)
            ends_seen |= encoder.ends
        warnings += _length_notes(name, len(split_rows), counts[name], job.model.max_length)
        for part in _PARTS:  # of the validation split again, where there is no other
            np.save(folder / f"{name}-{part}.npy", getattr(split, part))
        records = [row.as_record() for row in split_rows]
        digests[name] = _digest(records)
        if name in _JUDGED:
            files.write_jsonl(folder / f"{name}-rows.jsonl", _with_answers(records, answers))
    systems = system_messages(rows) if job.generates else set()
    conversations = any(row.messages for row in rows.train)
    source = chat.template.source if conversations else ""
    meta = {
        "labels": list(rows.labels),
        "warnings": warnings + (template_notes(chat, systems) if conversations else []),
        "chosen_on_test": rows.chosen_on_test,
        "pad_id": padding_id(chat.tokenizer),
        "rows_sha256": digests,
        "ends": list(dict.fromkeys([*chat.ends, *ends_seen])) if conversations else chat.model_ends,
        "frame": chat.frame.as_dict() if conversations else None,
        "system": _common_system(systems),
        "systems": len(systems),
        "template_sha256": hashlib.sha256(source.encode()).hexdigest() if source else "",
        "counts": counts,
    }
    files.write_json(folder / "meta.json", meta)


def _with_answers(records: list[dict[str, Any]], answers: Sequence[str] | None) -> list[dict[str, Any]]:
    if answers is None:
        return records
    return [record | {"answer": answer} for record, answer in zip(records, answers, strict=True)]


def _common_system(systems: set[System | None]) -> dict[str, str] | None:
    """Return the system message that all rows have; None where they have none, or not all the same."""
    (system,) = systems if len(systems) == 1 else (None,)
    return None if system is None else {"role": system[0], "content": system[1]}


System = tuple[str, str]
"""(role, content) of the message with which a conversation begins: the role is system or developer."""


def system_messages(rows: Rows) -> set[System | None]:
    """Return the different system messages of all conversations; None stands for those without one."""
    systems: set[System | None] = set()
    for split in (rows.train, rows.validation, rows.test):
        for row in split:
            if row.messages:
                first = row.messages[0]
                systems.add((first.role, first.content) if first.role in ("system", "developer") else None)
    return systems


def _length_notes(name: str, rows: int, counts: dict[str, Any], max_length: int) -> list[str]:
    """Say what model.max_length took away, and which rows became several examples."""
    notes = []
    if counts.get("shortened"):
        notes.append(
            f"{counts['shortened']} of {rows} {name} rows are longer than model.max_length = {max_length} tokens and "
            "lost their oldest turns"
        )
    if counts.get("cut"):
        notes.append(
            f"{counts['cut']} of {rows} {name} rows are longer than model.max_length = {max_length} tokens and were cut"
        )
    if counts.get("nothing"):
        notes.append(f"in {counts['nothing']} of the {name} rows that were cut nothing is left to learn")
    if counts.get("split"):
        notes.append(
            f"{counts['split']} of {rows} {name} rows became {counts['examples']} examples, one for each turn that is "
            "learnt: the chat template renders an earlier turn differently from the last one"
        )
    return notes


def template_notes(chat: ChatFormat, systems: set[System | None]) -> list[str]:
    """Say what the chat template does with these rows that its user should know."""
    notes = [text.format(rows=counted(chat.counts[name], "row")) for name, text in _REMARKS if chat.counts[name]]
    for name in chat.template.unused_variables:
        notes.append(f"data.chat_template_kwargs has {name}, which the chat template does not use: it changes nothing")
    if not chat.template.source:
        return notes
    ending, tokenizer = chat.ending, chat.tokenizer
    if ending.token is None:
        notes.append(
            "neither the chat template nor the tokenizer has an end token: answers end at evaluate.max_new_tokens alone"
        )
    elif ending.appended:
        name = tokenizer.convert_ids_to_tokens(ending.token)
        notes.append(f"the chat template ends no turn with a token: {name} is learnt after every answer")
    elif ending.token != tokenizer.eos_token_id:
        name = tokenizer.convert_ids_to_tokens(ending.token)
        notes.append(f"turns end with {name}, as the chat template has them (the tokenizer's eos_token is "
                     f"{tokenizer.eos_token})")  # fmt: skip
    if chat.generation_prompt == "missing" and chat.frame.marker != THINKING[1]:
        notes.append("the chat template has no generation prompt: the model writes the header of its turn itself")
    if chat.generation_prompt == "always":
        notes.append("the chat template adds the header of the next answer to every text: it is not learnt")
    if chat.template.tells_the_date:
        fix = "; data.chat_template_kwargs: {date_string: 26 Jul 2024} fixes it" if chat.template.takes_a_date else ""
        notes.append(f"the chat template writes the day of rendering into every prompt{fix}")
    if len(systems) > 1:
        notes.append(
            "the rows do not all have the same system message: an exported model puts none before a prompt of its own"
        )
    return notes


_REMARKS = (
    (
        "thinking_closed",
        "in {rows} the chat template opens a thinking block for generation and leaves it out of what it renders: the "
        "model learns to close it before its answer (a variable such as enable_thinking: false in "
        "data.chat_template_kwargs may avoid that)",
    ),
    (
        "prompt_differs",
        "in {rows} the chat template renders the prompt differently when the answer follows: what is learnt follows "
        "the prompt as it is rendered for generation",
    ),
    (
        "boundary_merged",
        "in {rows} a token would stand over the end of the prompt: the answer is cut into tokens alone",
    ),
    (
        "end_inside",
        "in {rows} an answer contains an end token: the model learns to write it, and generation ends there",
    ),
    ("special_inside", "in {rows} a message contains the text of a special token, which becomes that token"),
    (
        "answer_lossy",
        "in {rows} the tokenizer cannot write the answer exactly (it normalises it, or does not know a word): metrics "
        "compare with what it can write",
    ),
    (
        "no_answer",
        "in {rows} the last answer is a call of tools, which this template does not tell from an unfinished frame: "
        "metrics of answers score it 0",
    ),
    ("system_dropped", "in {rows} the chat template drops the system message"),
    ("user_dropped", "in {rows} the chat template drops or changes what the user says"),
    ("answer_changed", "in {rows} the chat template changes the answer: what it renders is learnt"),
    (
        "markers_unusable",
        "in {rows} the template's {{% generation %}} markers name nothing of the answer: all of it is learnt",
    ),
    (
        "markers_begin_late",
        "in {rows} the template's {{% generation %}} markers leave out the beginning of what the model has to write",
    ),
)
"""What a chat format counts, and how it is said."""


def _digest(records: list[dict[str, Any]]) -> str:
    """Return the SHA-256 of what rows say, in their order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _classification(
    rows: list[Row], labels: tuple[str, ...], tokenizer: Any, max_length: int
) -> tuple[Split, dict[str, int]]:
    """Return (tokens, how many rows were cut)."""
    ids = {label: index for index, label in enumerate(labels)}
    if not rows:
        return _pack([], [], []), {}
    encoded = tokenizer([row.text for row in rows], add_special_tokens=True)["input_ids"]
    longer = sum(len(tokens) > max_length for tokens in encoded)
    if longer:
        encoded = tokenizer([row.text for row in rows], truncation=True, max_length=max_length)["input_ids"]
    return _pack(encoded, [ids[row.label] for row in rows], list(range(len(rows)))), {"cut": longer}


def _generation(rows: list[Row], encoder: RowEncoder, file: Path) -> tuple[Split, list[str]]:
    """Return (tokens, the answer of each row). Raises DataError with every row that the chat template refuses."""
    ids: list[np.ndarray] = []
    learnt: list[np.ndarray] = []
    starts, groups, answers, bad = [], [], [], []
    for number, row in enumerate(rows):
        try:
            encoded = encoder.encode(row)
        except TemplateRefusal as error:
            bad.append(f"{file}:{row.line}: {error}")
            continue
        for example in encoded.examples:  # as arrays at once: lists of 100,000 rows take gigabytes
            ids.append(np.array(example.ids, dtype=np.int32))
            learnt.append(np.array(example.learnt, dtype=bool))
            starts.append(example.answer_start)
            groups.append(number)
        answers.append(encoded.reference)
    if bad:
        more = f"\nand {len(bad) - _MAX_SHOWN} more" if len(bad) > _MAX_SHOWN else ""
        raise DataError("\n".join(bad[:_MAX_SHOWN]) + more)
    return _pack(ids, starts, groups, learnt), answers


def _pack(
    rows: Sequence[Sequence[int] | np.ndarray],
    targets: list[int],
    groups: list[int],
    learnt: Sequence[np.ndarray] = (),
) -> Split:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    if len(lengths) and not lengths.min():
        raise DataError("a row has no tokens: it holds only characters that the tokenizer drops")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]) if rows else np.zeros(0, np.int32)
    return Split(
        flat,
        starts,
        np.array(targets, dtype=np.int64),
        np.concatenate(learnt) if learnt else np.zeros(0, dtype=bool),
        np.array(groups, dtype=np.int64),
    )


def token_counts(data: TokenData) -> dict[str, Any]:
    """Return what a plan or report says of the tokens."""
    return {
        name: {"rows": split.rows, "examples": len(split), "tokens": int(split.starts[-1])}
        for name, split in data.splits.items()
    }
