"""Divide tokenised rows into batches, as a pure function of the seed.

No state is kept between steps: the rows of a step follow from its number, so a resumed
trial continues in the data without replaying it, and all trials of a search see the
same rows in the same order. Suffixes of names give dimensions: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lorafleet.evaluation import tokens
from lorafleet.evaluation.tokens import PackedRows, Split, TokenData
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.model import resolve_safetensors_folder

IGNORED = -100
"""Label of a token that does not contribute to the loss."""
_MEGA_BATCHES = 32


def prepare_tokens(job: JobSpec) -> TokenData:
    """Return the job's rows as tokens.

    A GGUF model is converted first, once.

    Raises:
        DataError: A row or a data file is unusable.
        AssetError: The model or data is missing or damaged.
    """
    # The tokenizer is read from the converted folder, which must exist first.
    resolve_safetensors_folder(job.model.model_name_or_path, job.model.revision)
    return tokens.prepare(job)


@dataclass
class Batch:
    """Rows on a device, either padded to the longest or concatenated to one row."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor | None
    """1 for a real token, 0 for padding. None if no attention mask is used."""
    labels: torch.Tensor
    """Classes (B), or token labels with IGNORED for tokens without loss (B x T)."""
    targets: int
    """Number of rows (classification) or tokens (generation) that contribute to the loss."""
    positions_BT: torch.Tensor | None = None
    """Position of each token in its own example, if a row contains several examples.

    transformers separates the examples by it.
    """

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model's forward pass."""
        if self.positions_BT is not None:
            return {"input_ids": self.ids_BT, "position_ids": self.positions_BT}
        assert self.mask_BT is not None
        return {"input_ids": self.ids_BT, "attention_mask": self.mask_BT}


class BatchPlan:
    """Assignment of rows to optimiser steps.

    It is a pure function of the lengths, the batch size and the seed. Rows come in an
    endless stream of shuffled epochs, so every step has `batch_rows` rows and the position
    in the data is the step number. Grouping sorts the rows of 32 steps by length, divides
    them into batches and shuffles the batches: the rows of a batch then have similar
    lengths, and the order is still random.

    Args:
        lengths: Tokens of each row, in the order of the split.
        batch_rows: Rows of one optimiser step, over all processes and micro-batches.
        seed: `train.seed`.
        grouped: `train.group_by_length`.
    """

    def __init__(self, lengths: np.ndarray, batch_rows: int, seed: int, *, grouped: bool) -> None:
        self.lengths = lengths
        self.batch_rows = batch_rows
        self.seed = seed
        self.grouped = grouped
        # Steps come in order, so the last mega-batch and the last epoch are all that is worth
        # caching.
        self._stretch: tuple[int, list[np.ndarray]] | None = None
        self._epoch: tuple[int, np.ndarray] | None = None

    def select_rows(self, step: int) -> np.ndarray:
        """Return the indices of the rows of optimiser step `step` (from 0), longest first.

        The order by length lets micro-batches of neighbouring rows have little padding.
        """
        number, position = divmod(step, _MEGA_BATCHES)
        if self._stretch is None or self._stretch[0] != number:
            self._stretch = (number, self._build_batches(number))
        return self._stretch[1][position]

    def _build_batches(self, number: int) -> list[np.ndarray]:
        """Return the batches of mega-batch `number`, which covers 32 steps."""
        size = self.batch_rows * _MEGA_BATCHES
        rows = self._read_stream(number * size, size)
        # The second number separates this stream from the permutations of epochs, which use 0.
        random = np.random.default_rng([self.seed, 1, number])
        if self.grouped:
            # Rows of equal length are ordered at random; otherwise they would always share a batch.
            noise = random.random(len(rows))
            rows = rows[np.lexsort((noise, -self.lengths[rows]))]
        batches = np.split(rows, _MEGA_BATCHES)
        if self.grouped:
            batches = [batches[index] for index in random.permutation(_MEGA_BATCHES)]
        return [batch[np.argsort(-self.lengths[batch], kind="stable")] for batch in batches]

    def _read_stream(self, start: int, count: int) -> np.ndarray:
        """Return `count` row indices of the endless stream of epochs, from position `start`."""
        total = len(self.lengths)
        parts = []
        while count:
            epoch, offset = divmod(start, total)
            part = self._get_permutation(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _get_permutation(self, epoch: int) -> np.ndarray:
        """Return the shuffled row order of an epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (
                epoch,
                np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.lengths)),
            )
        return self._epoch[1]


def split_micro_batches(
    rows: np.ndarray, micro_batch_size: int, rank: int, world_size: int
) -> list[np.ndarray]:
    """Return the micro-batches of one process in one step.

    The step's rows are divided into micro-batches of `micro_batch_size` rows, which are
    dealt to the processes in turn. The micro-batches do not depend on the number of
    processes, so 2 processes and 1 process with twice the accumulation compute the same
    sums over the same padded batches.

    Args:
        rows: Row indices of the step, longest first.
        micro_batch_size: `train.per_device_train_batch_size`.

    Returns:
        Arrays of row indices. The last micro-batch of a step may have fewer rows.
    """
    micro_batches = [
        rows[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)
    ]
    return micro_batches[rank::world_size]


def make_batch(
    split: Split, rows: np.ndarray, pad_id: int, device: torch.device, *, classifies: bool
) -> Batch:
    """Return some rows padded to the longest of them.

    Args:
        rows: Indices into the split.
        pad_id: Token id of the padding; the attention mask hides it.
        classifies: Use the rows' classes as labels, not their learnt tokens.
    """
    lengths = split.lengths[rows]
    width = int(lengths.max())
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        start, end = int(split.starts[row]), int(split.starts[row + 1])
        ids[index, : end - start] = split.ids[start:end]
        mask[index, : end - start] = 1
        if not classifies:
            labels[index, : end - start] = np.where(
                split.learnt[start:end], split.ids[start:end], IGNORED
            )
    targets = split.targets[rows] if classifies else labels
    tensors = (torch.from_numpy(array) for array in (ids, mask, np.ascontiguousarray(targets)))
    ids_BT, mask_BT, label_tensor = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return Batch(
        ids_BT,
        mask_BT,
        label_tensor,
        count_targets(split, rows, classifies=classifies),
    )


def make_packed_batch(
    packed: PackedRows, rows: np.ndarray, pad_id: int, device: torch.device
) -> Batch:
    """Return packed rows, padded to the longest of them.

    Each packed row contains several examples. The padding at its end counts as an example
    of its own.
    """
    lengths = packed.lengths[rows]
    width = int(lengths.max())
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        row_ids, row_labels, row_positions = _concatenate_examples(
            packed.split, packed.members[row]
        )
        length = len(row_ids)
        ids[index, :length], labels[index, :length], positions[index, :length] = (
            row_ids,
            row_labels,
            row_positions,
        )
        # transformers separates examples where positions do not continue. Padding that continued
        # the last example would belong to it.
        positions[index, length:] = np.arange(width - length)
    ids_BT, labels_BT, positions_BT = (
        torch.from_numpy(array).to(device, non_blocking=True) for array in (ids, labels, positions)
    )
    targets = count_targets(packed, rows, classifies=False)
    return Batch(ids_BT, None, labels_BT, targets, positions_BT)


def _concatenate_examples(
    split: Split, examples: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (ids, labels, positions) of concatenated examples.

    The first token of an example is never a target, so no token is predicted across
    examples.
    """
    ids, labels, positions = [], [], []
    for example in examples:
        span = slice(int(split.starts[example]), int(split.starts[example + 1]))
        example_ids = np.asarray(split.ids[span], dtype=np.int64)
        ids.append(example_ids)
        positions.append(np.arange(len(example_ids)))
        labels.append(np.where(split.learnt[span], example_ids, IGNORED))
    return np.concatenate(ids), np.concatenate(labels), np.concatenate(positions)


def make_padding_free_batch(
    split: Split | PackedRows, rows: np.ndarray, device: torch.device
) -> Batch:
    """Return some rows concatenated to a single row, without padding.

    Used by `train.padding_free`, and by packing with FlashAttention, which separates
    examples by their positions only within a single row.

    Args:
        rows: Indices into the split. Of packed rows, all examples in them are taken.
    """
    examples, unpacked_split = (
        (split.get_examples(rows), split.split) if isinstance(split, PackedRows) else (rows, split)
    )
    ids_1T, labels_1T, positions_1T = (
        torch.from_numpy(array).unsqueeze(0).to(device, non_blocking=True)
        for array in _concatenate_examples(unpacked_split, examples)
    )
    targets = count_targets(unpacked_split, examples, classifies=False)
    return Batch(ids_1T, None, labels_1T, targets, positions_1T)


def count_targets(split: Split | PackedRows, rows: np.ndarray, *, classifies: bool) -> int:
    """Return how many of the rows (classification) or their tokens (generation) have a loss.

    The loss of a step is divided by this number, over all processes.
    """
    if classifies:
        return len(rows)
    return int(split.target_counts[rows].sum())


def iterate_evaluation_batches(
    split: Split, rows: np.ndarray, micro_batch_size: int
) -> Iterator[np.ndarray]:
    """Yield the rows of an evaluation in micro-batches, longest first.

    The order does not affect results: they are sorted back into row order.
    """
    ordered = rows[np.argsort(-split.lengths[rows], kind="stable")]
    for start in range(0, len(ordered), micro_batch_size):
        yield ordered[start : start + micro_batch_size]
