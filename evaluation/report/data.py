"""Report on a job's rows before training: bad rows, duplicates, leaks, classes, lengths.

The report also says which tokens are learnt. This is `lorafleet data`: unlike training,
which stops at the first bad file, it lists all bad rows and looks at the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lorafleet.evaluation.tokenizer import load_chat_format
from lorafleet.evaluation.tokens import (
    SPLITS,
    collect_system_messages,
    list_template_notes,
    make_row_encoder,
)
from lorafleet.jobs.data.chat_format import ChatFormat
from lorafleet.jobs.data.chat_template import TemplateRefusal
from lorafleet.jobs.data.encoding import Example, RowEncoder
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.data.rows import Rows, load_rows
from lorafleet.jobs.data.split_files import get_split_file
from lorafleet.jobs.errors import AssetError
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.job import JobSpec

_NO_LIMIT = 10**9
_FIRST_EDGE = 16
_MAX_PARTS = 4
"""Most tokens that hold one character: a byte-level tokenizer cuts an emoji into four."""


class Lengths(Spec):
    """Lengths of the examples of one split in tokens, before anything is cut."""

    shortest: int
    """Tokens of the shortest example."""
    median: int
    """Median number of tokens."""
    percentile_95: int
    """95 % of the examples have at most this many tokens."""
    longest: int
    """Tokens of the longest example."""


class Bucket(Spec):
    """One bar of a histogram."""

    up_to: int
    """Upper limit of the bucket in tokens. The lower limit is that of the bucket before."""
    examples: int
    """Number of examples."""


class SplitReport(Spec):
    """Statistics of one split."""

    split: str
    """train, validation or test."""
    file: str
    """File of the rows. A split without a file is held back from the split before it."""
    rows: int
    """Number of rows."""
    examples: int | None = None
    """Number of sequences that the rows become; null if the tokenizer is not on this machine."""
    tokens: int | None = None
    """Tokens of all examples after cutting."""
    learnt_tokens: int | None = None
    """Tokens that the loss is computed on."""
    lengths: Lengths | None = None
    """Lengths of the examples before anything is cut."""
    histogram: list[Bucket] = []
    """Histogram of the lengths before anything is cut."""
    longer: int = 0
    """Number of examples that are longer than model.max_length."""
    shortened: int = 0
    """Number of rows that lose their oldest turns to fit model.max_length."""
    cut: int = 0
    """Number of rows that are cut because their last exchange alone is too long."""
    repeated: int = 0
    """Number of rows whose prompt (or text) occurs earlier in the split."""
    also_in_train: int = 0
    """Number of held-out rows whose prompt (or text) is among the training rows."""
    classes: dict[str, int] = {}
    """Class -> number of rows (classification)."""
    empty_answers: int = 0
    """Number of conversations with an empty answer, apart from the text around the answer."""
    special_tokens: dict[str, int] = {}
    """Special token -> number of rows whose text contains it. It becomes the token, not text."""


class ShownToken(Spec):
    """One token of a shown row."""

    ids: list[int]
    """Token id; several ids if they hold one character together."""
    text: str
    """Its text."""
    learnt: bool
    """True if the loss is of this token."""


class ShownRow(Spec):
    """One row as tokens."""

    split: str
    """train, validation or test."""
    line: int
    """Line of the row in the file."""
    label: str = ""
    """Class of the row (classification)."""
    examples: list[list[ShownToken]]
    """Tokens of the sequences that the row becomes."""


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
    """Remarks on the data and the chat template, one sentence each."""
    bad_rows: list[str] = []
    """Rows that cannot be used, each with file and line."""
    shown: list[ShownRow] = Field(default_factory=list)
    """The requested rows as tokens."""


def build_data_report(job: JobSpec, show: int = 0, split: str = "train") -> DataReport:
    """Build the report on a job's rows.

    Without the tokenizer the report has no tokens, and a note says so.

    Args:
        job: The job.
        show: Number of rows to include as tokens.
        split: Split that these rows are taken from.

    Raises:
        DataError: No row of a split can be used.
        AssetError: The data is not on this machine.
    """
    bad_rows: list[str] = []
    rows = load_rows(job, bad_rows)
    notes = list(rows.warnings)
    chat: ChatFormat | None = None
    try:
        chat = load_chat_format(job)
        # The chat format is shared within the process and may have the counts of another job.
        chat.counts.clear()
    except AssetError as missing:
        notes.append(f"{missing}; tokenization was not checked")
    train = Counter(row.question for row in rows.train)
    splits = []
    for name in SPLITS:
        if name == "test" and rows.chosen_on_test:
            continue  # these are the validation rows again
        report = _build_split_report(name, job, rows, train)
        splits.append(
            _add_token_counts(report, getattr(rows, name), job, chat, bad_rows) if chat else report
        )
    if chat and any(row.messages for row in rows.train):
        try:
            notes += list_template_notes(chat, collect_system_messages(rows))
        except TemplateRefusal as error:
            notes.append(f"the chat template cannot be used: {error}")
    shown = _encode_shown_rows(getattr(rows, split)[:show], split, job, chat) if chat else []
    return DataReport(
        format=rows.format,
        max_length=job.model.max_length,
        splits=splits,
        notes=notes,
        bad_rows=bad_rows,
        shown=shown,
    )


def _build_split_report(name: str, job: JobSpec, rows: Rows, train: Counter[Row]) -> SplitReport:
    """Count everything that needs no tokenizer.

    Args:
        name: Name of the split.
        job: The job.
        rows: All rows.
        train: Prompts (or texts) of the training rows, which must not occur among held-out
            rows.
    """
    split_rows: list[Row] = getattr(rows, name)
    questions = Counter(row.question for row in split_rows)
    classes = Counter(row.label for row in split_rows)
    return SplitReport(
        split=name,
        file=str(get_split_file(name, job)),
        rows=len(split_rows),
        repeated=len(split_rows) - len(questions),
        also_in_train=0 if name == "train" else sum(row.question in train for row in split_rows),
        classes={label: classes[label] for label in rows.labels},
    )


def _add_token_counts(
    report: SplitReport, rows: list[Row], job: JobSpec, chat: ChatFormat, bad_rows: list[str]
) -> SplitReport:
    """Add the statistics of the tokens.

    Args:
        report: The report of a split so far.
        rows: Rows of the split.
        job: The job.
        chat: The chat format. Its counters count each row once.
        bad_rows: Rows that the chat template refuses are added to it.
    """
    # The histogram shows lengths before anything is cut, from which users choose
    # `model.max_length`.
    encoder, uncut = make_row_encoder(job, chat), make_row_encoder(job, chat)
    uncut.max_length = _NO_LIMIT
    lengths: list[int] = []
    tokens = learnt = empty = 0
    for row in rows:
        if job.task == "classification":
            ids = chat.tokenizer(row.text)["input_ids"]
            lengths.append(len(ids))
            tokens += min(len(ids), job.model.max_length)
            continue
        try:
            encoded = uncut.encode(row)
            sizes = [len(example.ids) for example in encoded.examples]
            counts = chat.counts.copy()
            fitted = encoded if max(sizes) <= job.model.max_length else encoder.encode(row)
            chat.counts = counts  # the first encoding counted the row already
        except TemplateRefusal as error:
            bad_rows.append(f"{report.file}:{row.line}: {error}")
            continue
        lengths += sizes
        tokens += sum(len(example.ids) for example in fitted.examples)
        learnt += sum(sum(example.learnt) for example in fitted.examples)
        empty += not encoded.reference.strip() and bool(row.messages)
    longer = sum(length > job.model.max_length for length in lengths)
    cut = longer if job.task == "classification" else encoder.counts["cut"]
    return report.model_copy(
        update={
            "examples": len(lengths),
            "tokens": tokens,
            "learnt_tokens": learnt if job.is_generative else None,
            "lengths": _compute_lengths(lengths),
            "histogram": _build_histogram(lengths),
            "longer": longer,
            "shortened": encoder.counts["shortened"],
            "cut": cut,
            "empty_answers": empty,
            "special_tokens": _count_special_tokens(rows, chat),
        }
    )


def _compute_lengths(lengths: list[int]) -> Lengths | None:
    if not lengths:
        return None
    ordered = sorted(lengths)
    position = min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))
    return Lengths(
        shortest=ordered[0],
        median=ordered[len(ordered) // 2],
        percentile_95=ordered[position],
        longest=ordered[-1],
    )


def _build_histogram(lengths: list[int]) -> list[Bucket]:
    """Count lengths in buckets that double: 16, 32, 64, ..."""
    if not lengths:
        return []
    edges = [_FIRST_EDGE]
    while edges[-1] < max(lengths):
        edges.append(2 * edges[-1])
    counts = Counter(next(edge for edge in edges if length <= edge) for length in lengths)
    buckets = [Bucket(up_to=edge, examples=counts[edge]) for edge in edges]
    first = next(index for index, bucket in enumerate(buckets) if bucket.examples)
    return buckets[first:]


def _count_special_tokens(rows: list[Row], chat: ChatFormat) -> dict[str, int]:
    """Count the rows whose texts contain a special token's text.

    The tokenizer would read that text as the token, which can end a turn or begin another
    one.

    Returns:
        Special token -> number of rows, the most frequent first.
    """
    pattern = chat.template.special_pattern
    if pattern is None:
        return {}
    counts: Counter[str] = Counter()
    for row in rows:
        texts = [row.text, *(message.content for message in row.messages)]
        counts.update({token for text in texts for token in pattern.findall(text)})
    return dict(counts.most_common())


def _encode_shown_rows(
    rows: Sequence[Row], split: str, job: JobSpec, chat: ChatFormat
) -> list[ShownRow]:
    """Return rows as tokens. Rows that the chat template refuses are left out."""
    encoder = make_row_encoder(job, chat)
    shown = []
    for row in rows:
        try:
            examples = list(_encode_examples(row, job, chat, encoder))
        except TemplateRefusal:
            continue  # already listed as a bad row
        tokens = [list(_iterate_tokens(example, chat.tokenizer)) for example in examples]
        shown.append(ShownRow(split=split, line=row.line, label=row.label, examples=tokens))
    return shown


def _encode_examples(
    row: Row, job: JobSpec, chat: ChatFormat, encoder: RowEncoder
) -> list[Example]:
    if job.task != "classification":
        return encoder.encode(row).examples
    ids = chat.tokenizer(row.text, truncation=True, max_length=job.model.max_length)["input_ids"]
    return [Example(list(ids), [False] * len(ids), 0)]


def _iterate_tokens(example: Example, tokenizer: Any) -> Iterator[ShownToken]:
    """Yield the tokens of an example, joined where they hold one character together.

    A byte-level tokenizer cuts a character into several tokens, none of which is text by
    itself. Tokens that are learnt are never joined with tokens that are not.
    """
    ids: list[int] = []
    for index, token in enumerate(example.ids):
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        unfinished = (
            text.endswith("\ufffd") and len(ids) < _MAX_PARTS and index + 1 < len(example.ids)
        )
        if unfinished and example.learnt[index + 1] == example.learnt[index]:
            continue
        yield ShownToken(ids=ids, text=text, learnt=example.learnt[index])
        ids = []


def shorten_path(path: str) -> str:
    """Return a path relative to the working directory, if it is inside."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
