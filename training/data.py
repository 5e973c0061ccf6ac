"""Tokens cut into batches by a pure function of the seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from lorafleet.evaluation import tokens
from lorafleet.evaluation.tokens import PackedRows, Split, TokenData
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.model import safetensors_folder

IGNORED = -100
"""The label of a token that is not learnt."""
_MEGA_BATCHES = 32


def prepare(job: JobSpec) -> TokenData:
    """Return the job's rows as tokens; a GGUF model is converted first, once.

    Raises DataError or AssetError with what is wrong, before anything is trained.
    """
    safetensors_folder(job.model.model_name_or_path, job.model.revision)
    return tokens.prepare(job)


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
            labels[place, : end - start] = np.where(split.learnt[start:end], split.ids[start:end], IGNORED)
    targets = split.targets[rows] if classifies else labels
    tensors = (torch.from_numpy(array) for array in (ids, mask, np.ascontiguousarray(targets)))
    ids_BT, mask_BT, label_tensor = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return Batch(ids_BT, mask_BT, label_tensor, target_count(split, rows, classifies=classifies), int(lengths.sum()))


def make_packed_batch(packed: PackedRows, rows: np.ndarray, pad_id: int, device: torch.device) -> Batch:
    """Pad some rows of several examples to the longest of them; padding is an example of its own at each row's end."""
    lengths = packed.lengths[rows]
    width = int(lengths.max())
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    for place, row in enumerate(rows):
        row_ids, row_labels, row_positions = _laid(packed.split, packed.members[row])
        length = len(row_ids)
        ids[place, :length], labels[place, :length], positions[place, :length] = row_ids, row_labels, row_positions
        positions[place, length:] = np.arange(width - length)
    ids_BT, labels_BT, positions_BT = (
        torch.from_numpy(array).to(device, non_blocking=True) for array in (ids, labels, positions)
    )
    targets = target_count(packed, rows, classifies=False)
    return Batch(ids_BT, None, labels_BT, targets, int(lengths.sum()), positions_BT)


def _laid(split: Split, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (ids, labels, positions) of examples one after another. A first token is never a target, so that none is
    predicted across examples."""
    ids, labels, positions = [], [], []
    for example in examples:
        span = slice(int(split.starts[example]), int(split.starts[example + 1]))
        example_ids = np.asarray(split.ids[span], dtype=np.int64)
        ids.append(example_ids)
        positions.append(np.arange(len(example_ids)))
        labels.append(np.where(split.learnt[span], example_ids, IGNORED))
    return np.concatenate(ids), np.concatenate(labels), np.concatenate(positions)


def end_to_end(split: Split | PackedRows, rows: np.ndarray, device: torch.device) -> Batch:
    """Lay some rows end to end as one, without padding."""
    examples, whole = (split.examples(rows), split.split) if isinstance(split, PackedRows) else (rows, split)
    ids_1T, labels_1T, positions_1T = (
        torch.from_numpy(part).unsqueeze(0).to(device, non_blocking=True) for part in _laid(whole, examples)
    )
    targets = target_count(whole, examples, classifies=False)
    return Batch(ids_1T, None, labels_1T, targets, ids_1T.numel(), positions_1T)


def target_count(split: Split | PackedRows, rows: np.ndarray, *, classifies: bool) -> int:
    """Rows (classification) or tokens (generation) that are learnt in these rows."""
    if classifies:
        return len(rows)
    return int(split.target_counts[rows].sum())


def evaluation_batches(split: Split, rows: np.ndarray, per_pass: int) -> Iterator[np.ndarray]:
    """Rows for an evaluation, longest first, in passes."""
    ordered = rows[np.argsort(-split.lengths[rows], kind="stable")]
    for start in range(0, len(ordered), per_pass):
        yield ordered[start : start + per_pass]
