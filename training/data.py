"""Rows as tokens: made once, kept by content, and cut into batches by a pure function of the seed."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jobs import files
from jobs.assets import cache_dir
from jobs.errors import DataError
from jobs.hub import model_revision
from jobs.identity import PROMPT_FORMAT
from jobs.rows import Row, Rows, load_rows, split_files
from jobs.spec import JobSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not learnt."""
SPLITS = ("train", "validation", "test")
_LAYOUT = 3
"""Raised when the files of a folder of tokens change."""
_NAMES_OF_FILES = (
    *("train_file", "validation_file", "test_file"),
    *("dataset_name", "dataset_revision", "dataset_config_name"),
)
"""What a job calls its files, whose bytes are what counts."""
_JUDGED = ("validation", "test")
_TAIL_TOKENS = 16
_MEGA_BATCHES = 32


@dataclass(frozen=True)
class Split:
    """The tokens of one split, end to end; read from disk as needed, and shared between processes."""

    ids: np.ndarray
    """Token ids of all rows (int32)."""
    starts: np.ndarray
    """Where each row begins, and after the last its end (int64, rows + 1)."""
    targets: np.ndarray
    """Classification: the class of each row. Generation: the position in `ids` where each row's targets begin."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def part(self, rows: np.ndarray) -> Split:
        """Some of the rows, in memory."""
        ids = [np.asarray(self.ids[int(self.starts[row]) : int(self.starts[row + 1])]) for row in rows]
        starts = np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64)
        return Split(np.concatenate(ids), starts, np.asarray(self.targets)[rows])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.starts)


def joined(one: Split, other: Split) -> Split:
    """The rows of two splits as one."""
    starts = np.concatenate([one.starts, other.starts[1:] + one.starts[-1]])
    return Split(np.concatenate([one.ids, other.ids]), starts, np.concatenate([one.targets, other.targets]))


def folds_of(split: Split, folds: int, seed: int, *, classifies: bool) -> np.ndarray:
    """The fold of each row: drawn by the seed alone, equal rows together, classes spread evenly."""
    groups: dict[bytes, list[int]] = {}
    for row in range(len(split)):
        first, last = int(split.starts[row]), int(split.starts[row + 1])
        asked = int(split.targets[row])
        plain = classifies or asked <= 1  # a text alone has a start token, or nothing, before what is learnt
        key = split.ids[first : last if plain else first + asked]
        groups.setdefault(np.asarray(key).tobytes(), []).append(row)
    order = list(groups.values())
    np.random.default_rng([seed, folds]).shuffle(order)
    if classifies:
        order.sort(key=lambda rows: int(split.targets[rows[0]]))  # stable: dealt out class by class
    fold_R = np.zeros(len(split), dtype=int)
    for number, rows in enumerate(order):
        fold_R[rows] = number % folds
    return fold_R


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

    def rows(self, split_name: str) -> list[Row]:
        """The rows of a split that is judged on, as they were before they became tokens."""
        return _rows_of(self.folder / f"{split_name}-rows.jsonl")

    def tokens(self, split_name: str, most: int) -> list[list[int]]:
        """The first rows of a split, as the tokens that they are stored as."""
        split = self.splits[split_name]
        ends = [(int(split.starts[row]), int(split.starts[row + 1])) for row in range(min(most, len(split)))]
        return [split.ids[first:last].tolist() for first, last in ends]

    def of_job(self, job: JobSpec) -> TokenData:
        """The splits that a job trains with: where it holds a fold back, that is its validation split.

        Rows that are equal are in one fold, and each class is spread evenly over all.
        """
        fold, folds = job.data.fold, job.evaluate.folds
        if fold is None or folds is None:
            return self
        pool = joined(self.splits["train"], self.splits["validation"])
        fold_R = folds_of(pool, folds, job.data.split_seed, classifies=not job.generates)
        parts = {"train": np.flatnonzero(fold_R != fold), "validation": np.flatnonzero(fold_R == fold)}
        if not len(parts["train"]) or not len(parts["validation"]):
            raise DataError(f"evaluate.folds is {folds}, but there are too few different rows for that")
        return replace(self, splits=self.splits | {name: pool.part(rows) for name, rows in parts.items()})


@dataclass
class Batch:
    """Rows padded to the longest of them, or end to end as one row, on a device."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor | None
    """1 where a token is real; None when all are."""
    labels: torch.Tensor
    """Classes (B) or token labels with IGNORED for what is not learnt (B x T)."""
    targets: int
    """How many rows or tokens are learnt here."""
    real_tokens: int
    """Tokens that are not padding."""
    positions_BT: torch.Tensor | None = None
    """Place of each token in its own row, when rows lie end to end: transformers sees the rows by it."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model takes."""
        if self.positions_BT is not None:
            return {"input_ids": self.ids_BT, "position_ids": self.positions_BT}
        assert self.mask_BT is not None
        return {"input_ids": self.ids_BT, "attention_mask": self.mask_BT}


@lru_cache(maxsize=8)
def _rows_of(path: Path) -> list[Row]:
    """What `_tokenize` kept; a folder of tokens never changes."""
    return [
        Row(record["text"], record["label"], tuple((role, text) for role, text in record["messages"]))
        for record in files.read_jsonl(path)
    ]


def prepare(job: JobSpec) -> TokenData:
    """The job's rows as tokens, from the cache where the same content was made before.

    Raises DataError or AssetError with what is wrong, before anything is trained.
    """
    folder = cache_dir() / "tokens" / _content_key(job)
    with files.locked(folder):
        if not (folder / "meta.json").is_file():
            rows = load_rows(job)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                made = Path(scratch) / "made"
                _tokenize(job, rows, made)
                made.rename(folder)
    return open_tokens(folder)


def open_tokens(folder: Path) -> TokenData:
    """Tokens that `prepare` left in a folder."""
    meta = files.read_json(folder / "meta.json")
    splits = {
        name: Split(*(np.load(folder / f"{name}-{part}.npy", mmap_mode="r") for part in ("ids", "starts", "targets")))
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
    )


def _content_key(job: JobSpec) -> str:
    """A digest of all that the tokens depend on."""
    data = job.data.model_dump(mode="json")
    for name in _NAMES_OF_FILES:
        data.pop(name)
    content = {
        "files": {split: files.sha256_file(path) for split, path in split_files(job.data).items()},
        "data": data,
        "task": "generation" if job.generates else job.task,
        "layout": _LAYOUT,
        "tokenizer": model_revision(job.model.model_name_or_path, job.model.revision),
        "max_length": job.model.max_length,
        "prompt_format": PROMPT_FORMAT,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _tokenize(job: JobSpec, rows: Rows, folder: Path) -> None:
    from training.model import load_tokenizer

    tokenizer = load_tokenizer(
        job.model.model_name_or_path, job.model.revision, trust_remote_code=job.model.trust_remote_code
    )
    warnings = list(rows.warnings)
    digests: dict[str, str] = {}
    folder.mkdir()
    for name in SPLITS:
        split_rows: list[Row] = getattr(rows, name)
        if job.task == "classification":
            made, cut = _classification(split_rows, rows.labels, tokenizer, job.model.max_length)
        else:
            made, cut = _generation(split_rows, tokenizer, job.model.max_length, _file_of(name, job))
        if cut:
            warnings.append(
                f"{cut} of {len(split_rows)} {name} rows are longer than model.max_length = {job.model.max_length} "
                "tokens and were cut"
            )
        for part in ("ids", "starts", "targets"):
            np.save(folder / f"{name}-{part}.npy", getattr(made, part))
        kept = [{"text": row.text, "label": row.label, "messages": row.messages} for row in split_rows]
        digests[name] = _digest(kept)
        if name in _JUDGED:
            files.write_jsonl(folder / f"{name}-rows.jsonl", kept)
    meta = {
        "labels": list(rows.labels),
        "warnings": warnings,
        "chosen_on_test": rows.chosen_on_test,
        "pad_id": int(tokenizer.pad_token_id or 0),
        "rows_sha256": digests,
    }
    files.write_json(folder / "meta.json", meta)


def _digest(rows: list[dict[str, Any]]) -> str:
    """SHA-256 of what rows say, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _classification(
    rows: list[Row], labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Split, int]:
    """(tokens, rows that were cut)."""
    ids = {label: index for index, label in enumerate(labels)}
    if not rows:
        return _pack([], []), 0
    encoded = tokenizer([row.text for row in rows], add_special_tokens=True)["input_ids"]
    longer = sum(len(tokens) > max_length for tokens in encoded)
    if longer:
        encoded = tokenizer([row.text for row in rows], truncation=True, max_length=max_length)["input_ids"]
    return _pack(encoded, [ids[row.label] for row in rows]), longer


def _file_of(split: str, job: JobSpec) -> Path:
    """The file that a split's rows were read from; what has none was held back from the split before it."""
    found = split_files(job.data)
    return found.get(split) or (found.get("validation") if split == "test" else None) or found["train"]


def _generation(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, file: Path) -> tuple[Split, int]:
    from jinja2 import TemplateError

    pairs = []
    for row in rows:
        try:
            pairs.append(_prompt_and_answer(row, tokenizer))
        except (TemplateError, ValueError) as error:
            raise DataError(f"{file}:{row.line}: the model's chat template refuses this row: {error}") from error
    fitted = [fit(prompt, answer, max_length) for prompt, answer in pairs]
    cut = sum(len(p) + len(a) > max_length for p, a in pairs)
    return _pack([prompt + answer for prompt, answer in fitted], [len(prompt) for prompt, _ in fitted]), cut


def _prompt_and_answer(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of what is given and of what is learnt, the end token with the latter.

    A conversation goes through the tokenizer's chat template where it has one, else its parts are joined by an empty
    line. A plain text is learnt whole, after a start token (or its own first token) that cannot be predicted.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if not row.messages:
        tokens = list(tokenizer(row.text, add_special_tokens=False)["input_ids"]) + end
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else tokens[:1]
        return start, tokens if tokenizer.bos_token_id is not None else tokens[1:]
    answer = _ids(tokenizer, row.reference) + end
    if tokenizer.chat_template:
        messages = [{"role": role, "content": content} for role, content in row.messages]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = _chat_prompt(row, tokenizer)
        if whole.startswith(prompt):
            answer = _ids(tokenizer, whole[len(prompt) :].rstrip("\n"))
    return prompt_tokens(row, tokenizer), answer


def prompt_tokens(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what the last answer follows: training has it before the answer, and generation begins with it.

    Of a text alone: its beginning, as it stands.
    """
    if row.messages and tokenizer.chat_template:
        return _ids(tokenizer, _chat_prompt(row, tokenizer))
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return start + _ids(tokenizer, f"{row.prompt}\n\n" if row.messages else row.prompt)


def _chat_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": role, "content": content} for role, content in row.messages[:-1]]
    prompt: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return prompt


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def fit(prompt: list[int], answer: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Cut a row to `max_length` tokens: the prompt's middle goes first (its question and its end, where a chat turn
    closes, stay), then the answer's end once it is over half."""
    over = len(prompt) + len(answer) - max_length
    if over <= 0:
        return prompt, answer
    room = max(max_length - len(answer), max_length // 2 - 1, 1)
    if len(prompt) > room:
        tail = min(_TAIL_TOKENS, room // 2)
        prompt = prompt[: room - tail] + (prompt[-tail:] if tail else [])
    return prompt, answer[: max_length - len(prompt)]


def _pack(rows: list[list[int]], targets: list[int]) -> Split:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    if len(lengths) and not lengths.min():
        raise DataError("a row has no tokens: it holds only characters that the tokenizer drops")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]) if rows else np.zeros(0, np.int32)
    return Split(flat, starts, np.array(targets, dtype=np.int64))


class BatchPlan:
    """Which rows go into which optimiser step: a pure function of the lengths, the batch and the seed.

    Rows come in an endless stream of shuffled epochs, so every step has `batch_rows` rows and the position in the data
    is the step's number. Grouping sorts a stretch of 32 steps by length, cuts it into batches and shuffles these: rows
    of a batch are then alike in length, and the order is still random.
    """

    def __init__(self, lengths: np.ndarray, batch_rows: int, seed: int, *, grouped: bool) -> None:
        self.lengths = lengths
        self.batch_rows = batch_rows
        self.seed = seed
        self.grouped = grouped
        self._stretch: tuple[int, list[np.ndarray]] | None = None
        self._epoch: tuple[int, np.ndarray] | None = None

    def rows(self, step: int) -> np.ndarray:
        """Indices of the rows of optimiser step `step` (from 0), longest first."""
        number, position = divmod(step, _MEGA_BATCHES)
        if self._stretch is None or self._stretch[0] != number:
            self._stretch = (number, self._batches(number))
        return self._stretch[1][position]

    def _batches(self, number: int) -> list[np.ndarray]:
        size = self.batch_rows * _MEGA_BATCHES
        rows = self._stream(number * size, size)
        random = np.random.default_rng([self.seed, 1, number])
        if self.grouped:
            noise = random.random(len(rows))
            rows = rows[np.lexsort((noise, -self.lengths[rows]))]
        batches = np.split(rows, _MEGA_BATCHES)
        if self.grouped:
            batches = [batches[index] for index in random.permutation(_MEGA_BATCHES)]
        return [batch[np.argsort(-self.lengths[batch], kind="stable")] for batch in batches]

    def _stream(self, start: int, count: int) -> np.ndarray:
        total = len(self.lengths)
        parts = []
        while count:
            epoch, offset = divmod(start, total)
            part = self._permutation(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.lengths)))
        return self._epoch[1]


def passes(rows: np.ndarray, per_pass: int, rank: int, world_size: int) -> list[np.ndarray]:
    """The forward passes of one process in one step: the step's rows in stretches of `per_pass`, dealt out in turn.

    The stretches do not depend on the number of processes, so 2 processes and 1 with twice the accumulation work out
    the same sums over the same padded batches.
    """
    stretches = [rows[start : start + per_pass] for start in range(0, len(rows), per_pass)]
    return stretches[rank::world_size]


def make_batch(split: Split, rows: np.ndarray, pad_id: int, device: torch.device, *, classifies: bool) -> Batch:
    """Pad some rows to the longest of them."""
    lengths = split.lengths[rows]
    width = int(lengths.max())
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for place, row in enumerate(rows):
        start, end = int(split.starts[row]), int(split.starts[row + 1])
        ids[place, : end - start] = split.ids[start:end]
        mask[place, : end - start] = 1
        if not classifies:
            first = int(split.targets[row])
            labels[place, first : end - start] = split.ids[start + first : end]
    wanted = split.targets[rows] if classifies else labels
    tensors = (torch.from_numpy(array) for array in (ids, mask, np.ascontiguousarray(wanted)))
    ids_BT, mask_BT, label_tensor = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return Batch(ids_BT, mask_BT, label_tensor, target_count(split, rows, classifies=classifies), int(lengths.sum()))


def end_to_end(split: Split, rows: np.ndarray, device: torch.device) -> Batch:
    """Some rows as one, without padding. A row's first token is never a target, so none is predicted across rows."""
    ids, labels, positions = [], [], []
    for row in rows:
        tokens = np.asarray(split.ids[int(split.starts[row]) : int(split.starts[row + 1])], dtype=np.int64)
        place = np.arange(len(tokens))
        ids.append(tokens)
        positions.append(place)
        labels.append(np.where(place >= max(1, int(split.targets[row])), tokens, IGNORED))
    ids_1T, labels_1T, positions_1T = (
        torch.from_numpy(np.concatenate(parts)).unsqueeze(0).to(device, non_blocking=True)
        for parts in (ids, labels, positions)
    )
    targets = target_count(split, rows, classifies=False)
    return Batch(ids_1T, None, labels_1T, targets, ids_1T.numel(), positions_1T)


def target_count(split: Split, rows: np.ndarray, *, classifies: bool) -> int:
    """Rows (classification) or tokens (generation) that are learnt in these rows."""
    if classifies:
        return len(rows)
    return int((split.lengths[rows] - np.maximum(split.targets[rows], 1)).sum())


def evaluation_batches(split: Split, rows: np.ndarray, per_pass: int) -> Iterator[np.ndarray]:
    """Rows for an evaluation, longest first, in passes."""
    ordered = rows[np.argsort(-split.lengths[rows], kind="stable")]
    for start in range(0, len(ordered), per_pass):
        yield ordered[start : start + per_pass]


def token_facts(data: TokenData) -> dict[str, Any]:
    """What a plan or report says of the tokens."""
    return {name: {"rows": len(split), "tokens": int(split.starts[-1])} for name, split in data.splits.items()}
