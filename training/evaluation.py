"""Evaluate a model on the rows of a split, over all processes of a trial.

Results are kept for each row and not only as means, because comparisons are paired: the
same rows are resampled for every model. The functions take a loaded model; the session
and `tuning.held_out` call them. Suffixes: R rows of the split, B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from lorafleet.evaluation.inference.generate import generate_answers
from lorafleet.evaluation.metrics import bertscore, custom
from lorafleet.evaluation.metrics.predictions import Classified, RowResults
from lorafleet.evaluation.metrics.text import compute_text_metrics
from lorafleet.evaluation.tokens import TokenData, make_row_encoder
from lorafleet.jobs.data.hub import get_model_folder
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.model_kinds import get_max_positions
from lorafleet.training.data import iterate_evaluation_batches, make_batch
from lorafleet.training.loss import LossModule
from lorafleet.training.model import resolve_weight_dtype, supports_bfloat16
from lorafleet.training.strategies import Ranks

OnPass = Callable[[str], None]
"""Callback for progress within a phase.

It receives `training` after each training micro-batch, and `evaluation` before each
evaluation micro-batch.
"""

_MIN_PROMPT_TOKENS = 8
"""Minimum number of prompt tokens that a model must have positions for."""


def ignore_phase(phase: str) -> None:
    """Do nothing: the default `on_pass` callback."""


def evaluate_rows(
    model: nn.Module,
    job: JobSpec,
    data: TokenData,
    split_name: str,
    device: torch.device,
    ranks: Ranks | None = None,
    *,
    metrics: Sequence[str] = (),
    rows_to_answer: int | None = None,
    equal_passes: bool = False,
    on_pass: OnPass = ignore_phase,
) -> RowResults:
    """Return a model's loss, prediction or answer for each row of a split.

    With several processes, each takes every n-th micro-batch and all of them receive the
    full result.

    Args:
        model: The model, or its LossModule.
        metrics: Names of the metrics that need more than a forward pass.
        rows_to_answer: Number of rows, from the first, to generate answers for. None: all
            rows if a metric needs answers, otherwise none.
        equal_passes: A process with one micro-batch less makes an extra forward pass that
            is not counted, because the other processes wait for it.
        on_pass: Called equally often by all processes. An exception that it raises ends the
            evaluation.
    """
    ranks = ranks or Ranks()
    module = model
    if not isinstance(model, LossModule):
        dtype = resolve_autocast_dtype(job, device)
        module = LossModule(model, job.task, chunked=job.train.chunked_loss, autocast=dtype)
    was_training = model.training
    model.eval()
    try:
        results = _run_forward_passes(
            module, job, data, split_name, device, ranks, equal_passes=equal_passes, on_pass=on_pass
        )
        return complete_results(
            module.model,
            results,
            job,
            data,
            split_name,
            device,
            ranks,
            metrics=metrics,
            rows_to_answer=rows_to_answer,
            on_pass=on_pass,
        )
    finally:
        model.train(was_training)


def complete_results(
    model: Any,
    results: RowResults,
    job: JobSpec,
    data: TokenData,
    split_name: str,
    device: torch.device,
    ranks: Ranks,
    *,
    metrics: Sequence[str] = (),
    rows_to_answer: int | None = None,
    on_pass: OnPass = ignore_phase,
) -> RowResults:
    """Return the results of forward passes with answers, and with the user's own metrics.

    Args:
        model: The loaded model, in eval mode. See `evaluate_rows` for the others.
    """
    if not job.is_generative:
        return _add_custom_metrics(results, job, data, split_name, metrics)
    rows = len(results) if metrics and rows_to_answer is None else rows_to_answer or 0
    if min(rows, len(results)) == 0:
        return results
    answers = _generate_answers(
        model, job, data, split_name, min(rows, len(results)), ranks, device, on_pass
    )
    return _add_answer_metrics(results, answers, job, data, split_name, metrics, device)


class RowCollector:
    """Losses of the rows of a split and, for a classifier, its predictions.

    For generation, the rows of the result are rows of the data: the losses and targets of
    all examples of one conversation are added.
    """

    def __init__(self, data: TokenData, split_name: str, *, classifies: bool) -> None:
        self.split = data.splits[split_name]
        self.labels = max(2, len(data.labels))
        self.classifies = classifies
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, rows: np.ndarray, labels_B: torch.Tensor, detail: torch.Tensor) -> None:
        """Add the results of a batch.

        Args:
            rows: Indices of its rows in the split.
            labels_B: Their classes; unused for generation.
            detail: What `LossModule` returns for each row.
        """
        if not self.classifies:
            targets = self.split.target_counts[rows]
            self._parts.append((rows, detail.cpu().numpy(), targets, np.zeros(len(rows))))
            return
        # LossModule returns the sum; the loss of each row comes from its logits.
        losses = nn.functional.cross_entropy(detail, labels_B, reduction="none").cpu().numpy()
        confidence_B, predicted_B = (t.cpu().numpy() for t in detail.softmax(dim=1).max(dim=1))
        self._parts.append((rows, losses, predicted_B, confidence_B))

    def build(self, ranks: Ranks) -> RowResults:
        """Return the results of all rows, which all processes receive."""
        loss_R, detail_R, confidence_R = _gather_in_row_order(self._parts, ranks)
        loss_R = loss_R.astype(np.float64)
        split = self.split
        if not self.classifies:  # the examples of one row are evaluated together
            return RowResults(split.sum_by_row(loss_R), split.sum_by_row(detail_R))
        classified = Classified(np.asarray(split.targets), detail_R, confidence_R, self.labels)
        return RowResults(loss_R, np.ones(len(loss_R), dtype=int), classified)


def _run_forward_passes(
    module: nn.Module,
    job: JobSpec,
    data: TokenData,
    split_name: str,
    device: torch.device,
    ranks: Ranks,
    *,
    equal_passes: bool,
    on_pass: OnPass,
) -> RowResults:
    """Return the losses of all rows and, for a classifier, its predictions.

    Args:
        equal_passes: See `evaluate_rows`.
    """
    split = data.splits[split_name]
    classifies = not job.is_generative
    collector = RowCollector(data, split_name, classifies=classifies)
    all_batches = list(
        iterate_evaluation_batches(
            split, np.arange(len(split)), job.train.per_device_eval_batch_size
        )
    )
    rank_batches = all_batches[ranks.rank :: ranks.world_size]
    has_one_less = len(rank_batches) < math.ceil(len(all_batches) / ranks.world_size)
    # FSDP2 allocates its buffers in the very first pass. Buffers from inference mode cannot be
    # trained with.
    with torch.no_grad() if equal_passes else torch.inference_mode():
        for rows in rank_batches:
            on_pass("evaluation")
            batch = make_batch(split, rows, data.pad_id, device, classifies=classifies)
            _, detail = module(batch)
            collector.add(rows, batch.labels, detail)
        # Every process calls on_pass equally often: TrialRun broadcasts in it whether to stop.
        if has_one_less:
            on_pass("evaluation")
            if equal_passes:
                module(
                    make_batch(split, all_batches[0], data.pad_id, device, classifies=classifies)
                )
    return collector.build(ranks)


def _gather_in_row_order(parts: list[tuple[np.ndarray, ...]], ranks: Ranks) -> list[np.ndarray]:
    """Return the results of all processes in row order.

    The fixed order lets a resample pick the same rows for every model.
    """
    gathered: list[Any] = [parts]
    if ranks.world_size > 1:
        gathered = [None] * ranks.world_size
        distributed.all_gather_object(gathered, parts)
    columns = [
        np.concatenate(column)
        for column in zip(*(part for rank_parts in gathered for part in rank_parts), strict=True)
    ]
    # Column 0 is the row index.
    order = np.argsort(columns[0])
    return [column[order] for column in columns[1:]]


def _add_custom_metrics(
    results: RowResults, job: JobSpec, data: TokenData, split_name: str, metrics: Sequence[str]
) -> RowResults:
    """Return a classifier's results with the user's custom metrics, which receive class names."""
    selected = {
        name: metric for name, metric in job.evaluate.custom_metrics.items() if name in metrics
    }
    classified = results.classified
    if not selected or classified is None:
        return results
    predictions = [data.labels[label] for label in classified.predicted_R]
    references = [data.labels[label] for label in classified.label_R]
    texts = [row.text for row in data.read_rows(split_name)]
    by_row, overall = custom.compute_custom_metrics(selected, predictions, references, texts)
    return RowResults(results.loss_R, results.targets_R, classified, (), by_row, overall)


def _generate_answers(
    model: Any,
    job: JobSpec,
    data: TokenData,
    split_name: str,
    rows: int,
    ranks: Ranks,
    device: torch.device,
    on_pass: OnPass,
) -> list[str]:
    """Return the model's generated answers for the first rows.

    Each process generates its own share, and all of them receive all answers. Every process
    calls `on_pass` equally often, because `TrialRun` broadcasts in it.

    Args:
        rows: Number of rows, from the first.
    """
    encoder = make_row_encoder(job)
    room = compute_max_prompt_tokens(model, job, job.evaluate.max_new_tokens)
    prompts = [encoder.encode_prompt(row, room) for row in data.read_rows(split_name)[:rows]]
    rank_rows = list(range(rows))[ranks.rank :: ranks.world_size]
    dtype = resolve_autocast_dtype(job, device)
    batch_rows = job.train.per_device_eval_batch_size
    # LossModule opens autocast itself; `generate` calls the inner model, so it is opened here.
    with torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
        written = generate_answers(
            model,
            encoder.format.tokenizer,
            [prompts[row] for row in rank_rows],
            job.evaluate,
            batch_rows,
            lambda: on_pass("evaluation"),
            ends=data.ends,
            frame=data.frame,
        )
    max_batches = math.ceil(rows / ranks.world_size / batch_rows)
    for _ in range(max_batches - math.ceil(len(rank_rows) / batch_rows)):
        on_pass("evaluation")
    if ranks.world_size == 1:
        return written
    gathered: list[Any] = [None] * ranks.world_size
    distributed.all_gather_object(gathered, dict(zip(rank_rows, written, strict=True)))
    answer_by_row = {row: text for part in gathered for row, text in part.items()}
    return [answer_by_row[row] for row in range(rows)]


def compute_max_prompt_tokens(model: Any, job: JobSpec, new_tokens: int) -> int:
    """Return the maximum prompt length in tokens that leaves room for `new_tokens`.

    A learnt prompt takes positions too. Models without a position limit get
    `model.max_length`.

    Args:
        model: A loaded transformers or PEFT model; only its config is read.
        new_tokens: Tokens of the answer.

    Raises:
        UserError: Fewer than 8 prompt tokens would remain.
    """
    config = model.config.to_dict()
    positions = get_max_positions(config) or int(
        getattr(model.config, "max_position_embeddings", None) or 0
    )
    virtual_tokens = job.prompt_tuning.num_virtual_tokens if job.method == "prompt_tuning" else 0
    if not positions:
        return job.model.max_length
    if positions - virtual_tokens - new_tokens < _MIN_PROMPT_TOKENS:
        name = job.model.model_name_or_path
        raise UserError(
            f"evaluate.max_new_tokens is {new_tokens}, but {name} has only {positions} positions "
            "for prompt and answer together: set a smaller evaluate.max_new_tokens"
        )
    return min(job.model.max_length, positions - virtual_tokens - new_tokens)


def _add_answer_metrics(
    results: RowResults,
    answers: list[str],
    job: JobSpec,
    data: TokenData,
    split_name: str,
    metrics: Sequence[str],
    device: torch.device,
) -> RowResults:
    """Return the results with the answers and, if all rows were answered, their metrics.

    Rows without an answer have None. Metrics of a part of the rows would not be comparable
    with those of other models, so none are computed.
    """
    answer_column = (*answers, *[None] * (len(results) - len(answers)))
    if len(answers) < len(results):
        return RowResults(results.loss_R, results.targets_R, None, answer_column)
    rows = data.read_rows(split_name)
    references = [row.reference for row in rows]
    embedder = None
    if "bertscore_f1" in metrics:
        spec = job.evaluate
        encoder = bertscore.load(
            Path(get_model_folder(spec.bertscore_model, None)), spec.bertscore_layer, device.type
        )
        embedder = encoder.compute_f1
    ratios = compute_text_metrics(metrics, answers, references, embedder)
    selected = {
        name: metric for name, metric in job.evaluate.custom_metrics.items() if name in metrics
    }
    by_row, overall = custom.compute_custom_metrics(
        selected, answers, references, [row.prompt for row in rows]
    )
    return RowResults(
        results.loss_R, results.targets_R, None, answer_column, ratios | by_row, overall
    )


def resolve_autocast_dtype(job: JobSpec, device: torch.device) -> torch.dtype | None:
    """Return the number format of mixed precision, or None if it is off.

    With `auto` it is bfloat16 on GPUs that support it. It is also bfloat16 wherever the
    weights are: the trained parameters beside them are in float32, and mixed formats cannot
    be multiplied.
    """
    precision = job.train.mixed_precision
    if precision == "auto":
        return (
            torch.bfloat16
            if supports_bfloat16(device) or resolve_weight_dtype(job, device) is torch.bfloat16
            else None
        )
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
