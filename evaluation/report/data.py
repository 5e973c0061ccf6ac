"""Report on a job's rows before anything runs: bad rows, repetitions, leaks, classes, lengths, and what is learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lorafleet.evaluation.tokenizer import chat_format
from lorafleet.evaluation.tokens import SPLITS, row_encoder, system_messages, template_notes
from lorafleet.jobs.data.chat_format import ChatFormat
from lorafleet.jobs.data.chat_template import TemplateRefusal
from lorafleet.jobs.data.encoding import Example, RowEncoder
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.data.rows import Rows, file_of_split, load_rows
from lorafleet.jobs.errors import AssetError
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.job import JobSpec
from pydantic import Field

_UNCUT = 10**9
_FIRST_EDGE = 16
_MAX_PARTS = 4
"""Tokens that may hold one character together: a byte-level tokenizer cuts an emoji into four."""


class Lengths(Spec):
    """Tokens of the examples of one split, before anything is cut."""

    shortest: int
    """Tokens of the shortest example."""
    median: int
    """Tokens of the middle one."""
    percentile_95: int
    """95 % of the examples have at most so many tokens."""
    longest: int
    """Tokens of the longest example."""


class Bucket(Spec):
    """One bar of a histogram."""

    up_to: int
    """Examples of at most so many tokens, and more than the bucket before."""
    examples: int
    """Number of examples."""


class SplitReport(Spec):
    """Numbers of one split."""

    split: str
    """train, validation or test."""
    file: str
    """The file that the rows come from; a split without one of its own is held back from the split before it."""
    rows: int
    """Rows."""
    examples: int | None = None
    """Sequences that they become; null where the tokenizer is not on this machine."""
    tokens: int | None = None
    """Tokens of all examples, as they are cut."""
    learnt_tokens: int | None = None
    """Tokens that the loss is of."""
    lengths: Lengths | None = None
    """Tokens of the examples before anything is cut."""
    histogram: list[Bucket] = []
    """The same as a histogram."""
    longer: int = 0
    """Examples that are longer than model.max_length."""
    shortened: int = 0
    """Rows that lose their oldest turns for that."""
    cut: int = 0
    """Rows that are cut, since their last exchange alone is too long."""
    repeated: int = 0
    """Rows whose prompt (or text) stands in the split already."""
    also_in_train: int = 0
    """Held-out rows whose prompt (or text) is among the training rows."""
    classes: dict[str, int] = {}
    """Rows of each class (classification)."""
    empty_answers: int = 0
    """Rows whose answer is empty, apart from what stands around it."""
    special_tokens: dict[str, int] = {}
    """Special token -> rows whose texts contain it: it becomes that token, and no text."""


class ShownToken(Spec):
    """One token of a row that is shown."""

    ids: list[int]
    """Its id; several where they hold one character together."""
    text: str
    """Its text."""
    learnt: bool
    """True if the loss is of this token."""


class ShownRow(Spec):
    """One row as tokens."""

    split: str
    """train, validation or test."""
    line: int
    """Its line in the file."""
    label: str = ""
    """Class of the row (classification)."""
    examples: list[list[ShownToken]]
    """The sequences that it becomes."""


class DataReport(Spec):
    """The report that `lorafleet data` prints."""

    schema_version: Literal[1] = 1
    format: str
    """Format of a row: text_label, prompt_completion, instruction, messages or text."""
    max_length: int
    """model.max_length, in tokens."""
    splits: list[SplitReport]
    """Train, validation and test rows."""
    notes: list[str] = []
    """Remarks on the data and the chat template, a sentence each."""
    bad_rows: list[str] = []
    """Rows that cannot be used, each with file and line."""
    shown: list[ShownRow] = Field(default_factory=list)
    """The rows that were asked for, as tokens."""


def data_report(job: JobSpec, show: int = 0, split: str = "train") -> DataReport:
    """Look at a job's rows. `show` rows of a split are kept as tokens.

    Raises DataError where no row of a split can be used, AssetError where the data is not on this machine. Without the
    tokenizer the report has no tokens, and a note says so.
    """
    bad: list[str] = []
    rows = load_rows(job, bad)
    notes = list(rows.warnings)
    chat: ChatFormat | None = None
    try:
        chat = chat_format(job)
        chat.counts.clear()
    except AssetError as missing:
        notes.append(f"{missing}; how rows become tokens was not looked at")
    train = Counter(row.question for row in rows.train)
    splits = []
    for name in SPLITS:
        if name == "test" and rows.chosen_on_test:
            continue  # the validation rows once more
        report = _split_report(name, job, rows, train)
        splits.append(_with_tokens(report, getattr(rows, name), job, chat, bad) if chat else report)
    if chat and any(row.messages for row in rows.train):
        try:
            notes += template_notes(chat, system_messages(rows))
        except TemplateRefusal as error:
            notes.append(f"the chat template cannot be used: {error}")
    shown = _shown(getattr(rows, split)[:show], split, job, chat) if chat else []
    return DataReport(
        format=rows.format, max_length=job.model.max_length, splits=splits, notes=notes, bad_rows=bad, shown=shown
    )


def _split_report(name: str, job: JobSpec, rows: Rows, train: Counter[Row]) -> SplitReport:
    """Count what needs no tokenizer."""
    split_rows: list[Row] = getattr(rows, name)
    questions = Counter(row.question for row in split_rows)
    classes = Counter(row.label for row in split_rows)
    return SplitReport(
        split=name,
        file=str(file_of_split(name, job)),
        rows=len(split_rows),
        repeated=len(split_rows) - len(questions),
        also_in_train=0 if name == "train" else sum(row.question in train for row in split_rows),
        classes={label: classes[label] for label in rows.labels},
    )


def _with_tokens(report: SplitReport, rows: list[Row], job: JobSpec, chat: ChatFormat, bad: list[str]) -> SplitReport:
    """Add what the tokenizer says. Rows that the chat template refuses are added to the bad ones."""
    encoder, uncut = row_encoder(job, chat), row_encoder(job, chat)
    uncut.max_length = _UNCUT
    lengths: list[int] = []
    tokens = learnt = empty = 0
    for row in rows:
        if job.task == "classification":
            ids = chat.tokenizer(row.text)["input_ids"]
            lengths.append(len(ids))
            tokens += min(len(ids), job.model.max_length)
            continue
        try:
            whole = uncut.encode(row)
            sizes = [len(example.ids) for example in whole.examples]
            counts = chat.counts.copy()
            kept = whole if max(sizes) <= job.model.max_length else encoder.encode(row)
            chat.counts = counts  # the row was counted already
        except TemplateRefusal as error:
            bad.append(f"{report.file}:{row.line}: {error}")
            continue
        lengths += sizes
        tokens += sum(len(example.ids) for example in kept.examples)
        learnt += sum(sum(example.learnt) for example in kept.examples)
        empty += not whole.reference.strip() and bool(row.messages)
    longer = sum(length > job.model.max_length for length in lengths)
    cut = longer if job.task == "classification" else encoder.counts["cut"]
    return report.model_copy(
        update={
            "examples": len(lengths),
            "tokens": tokens,
            "learnt_tokens": learnt if job.generates else None,
            "lengths": _lengths(lengths),
            "histogram": _histogram(lengths),
            "longer": longer,
            "shortened": encoder.counts["shortened"],
            "cut": cut,
            "empty_answers": empty,
            "special_tokens": _special_tokens(rows, chat),
        }
    )


def _lengths(lengths: list[int]) -> Lengths | None:
    if not lengths:
        return None
    ordered = sorted(lengths)
    position = min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))
    return Lengths(
        shortest=ordered[0], median=ordered[len(ordered) // 2], percentile_95=ordered[position], longest=ordered[-1]
    )


def _histogram(lengths: list[int]) -> list[Bucket]:
    """Count lengths in buckets that double: 16, 32, 64, ..."""
    if not lengths:
        return []
    edges = [_FIRST_EDGE]
    while edges[-1] < max(lengths):
        edges.append(2 * edges[-1])
    counts = Counter(next(edge for edge in edges if length <= edge) for length in lengths)
    buckets = [Bucket(up_to=edge, examples=counts[edge]) for edge in edges]
    first = next(place for place, bucket in enumerate(buckets) if bucket.examples)
    return buckets[first:]


def _special_tokens(rows: list[Row], chat: ChatFormat) -> dict[str, int]:
    """Count the rows whose texts contain a special token's text."""
    pattern = chat.template.special_pattern
    if pattern is None:
        return {}
    counts: Counter[str] = Counter()
    for row in rows:
        texts = [row.text, *(message.content for message in row.messages)]
        counts.update({token for text in texts for token in pattern.findall(text)})
    return dict(counts.most_common())


def _shown(rows: Sequence[Row], split: str, job: JobSpec, chat: ChatFormat) -> list[ShownRow]:
    encoder = row_encoder(job, chat)
    shown = []
    for row in rows:
        try:
            examples = list(_examples(row, job, chat, encoder))
        except TemplateRefusal:
            continue  # among the bad rows
        tokens = [list(_pieces(example, chat.tokenizer)) for example in examples]
        shown.append(ShownRow(split=split, line=row.line, label=row.label, examples=tokens))
    return shown


def _examples(row: Row, job: JobSpec, chat: ChatFormat, encoder: RowEncoder) -> list[Example]:
    if job.task != "classification":
        return encoder.encode(row).examples
    ids = chat.tokenizer(row.text, truncation=True, max_length=job.model.max_length)["input_ids"]
    return [Example(list(ids), [False] * len(ids), 0)]


def _pieces(example: Example, tokenizer: Any) -> Iterator[ShownToken]:
    """Cut an example into pieces that are whole characters."""
    ids: list[int] = []
    for place, token in enumerate(example.ids):
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        unfinished = text.endswith("\ufffd") and len(ids) < _MAX_PARTS and place + 1 < len(example.ids)
        if unfinished and example.learnt[place + 1] == example.learnt[place]:
            continue
        yield ShownToken(ids=ids, text=text, learnt=example.learnt[place])
        ids = []


def relative_file(path: str) -> str:
    """Return a path as short as it can be said here."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
