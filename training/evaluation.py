"""A model on the rows of a split: what it did with each, over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lorafleet.evaluation.inference.generate import write_answers
from lorafleet.evaluation.metrics import bertscore, custom
from lorafleet.evaluation.metrics.predictions import Classified, RowResults
from lorafleet.evaluation.metrics.text import text_metrics
from lorafleet.evaluation.tokens import TokenData, row_encoder
from lorafleet.jobs.data.hub import model_folder
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.model_kinds import learnt_positions
from lorafleet.training.data import evaluation_batches, make_batch
from lorafleet.training.loss import LossModule
from lorafleet.training.model import has_bfloat16, weight_dtype
from lorafleet.training.strategies import Ranks
from torch import distributed, nn

OnPass = Callable[[str], None]
"""Told `training` after each pass of one and `evaluation` before each of the other."""

_FEWEST_TOKENS = 8
"""Of a prompt, that a model must have room for."""


def nobody(phase: str) -> None:
    """No one listens."""


def evaluate_rows(
    model: nn.Module,
    job: JobSpec,
    data: TokenData,
    split_name: str,
    device: torch.device,
    ranks: Ranks | None = None,
    *,
    metrics: Sequence[str] = (),
    answered: int | None = None,
    equal_passes: bool = False,
    on_pass: OnPass = nobody,
) -> RowResults:
    """What a model (or one in its LossModule) does with each row of a split.

    `metrics` names those for which more than a pass is needed; the first `answered` rows are answered (None: all, if a
    metric wants it). With several processes each takes every n-th pass, and all get the result. With `equal_passes` a
    process that has one less makes another, since the others wait for it; it is not counted. `on_pass` is called
    equally often by all, and what it raises ends the evaluation.
    """
    ranks = ranks or Ranks()
    module = model
    if not isinstance(model, LossModule):
        dtype = autocast_dtype(job, device)
        module = LossModule(model, job.task, chunked=job.train.chunked_loss, autocast=dtype)
    was_training = model.training
    model.eval()
    try:
        found = _passes(module, job, data, split_name, device, ranks, equal_passes=equal_passes, on_pass=on_pass)
        if not job.generates:
            return _with_own_metrics(found, job, data, split_name, metrics)
        rows = len(found) if metrics and answered is None else answered or 0
        if min(rows, len(found)) == 0:
            return found
        answers = _answers(module.model, job, data, split_name, min(rows, len(found)), ranks, device, on_pass)
        return _judged(found, answers, job, data, split_name, metrics, device)
    finally:
        model.train(was_training)


def _passes(
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
    """The losses of all rows and, of a classifier, what it said."""
    split = data.splits[split_name]
    classifies = not job.generates
    every_pass = list(evaluation_batches(split, np.arange(len(split)), job.train.per_device_eval_batch_size))
    own = every_pass[ranks.rank :: ranks.world_size]
    spare = len(own) < math.ceil(len(every_pass) / ranks.world_size)
    parts: list[tuple[np.ndarray, ...]] = []
    # FSDP2 makes its buffers in the first pass of all: made in inference mode they could not be trained with.
    with torch.no_grad() if equal_passes else torch.inference_mode():
        for rows in own:
            on_pass("evaluation")
            batch = make_batch(split, rows, data.pad_id, device, classifies=classifies)
            _, detail = module(batch)
            if classifies:
                losses = nn.functional.cross_entropy(detail, batch.labels, reduction="none").cpu().numpy()
                confidence_B, predicted_B = (t.cpu().numpy() for t in detail.softmax(dim=1).max(dim=1))
                parts.append((rows, losses, predicted_B, confidence_B))
            else:
                parts.append((rows, detail.cpu().numpy(), split.target_counts[rows], np.zeros(len(rows))))
        if spare:
            on_pass("evaluation")
            if equal_passes:
                module(make_batch(split, every_pass[0], data.pad_id, device, classifies=classifies))
    loss_R, detail_R, confidence_R = _in_row_order(parts, ranks)
    loss_R = loss_R.astype(np.float64)
    if not classifies:  # a row of several examples is judged as one
        return RowResults(split.by_row(loss_R), split.by_row(detail_R))
    truth_R = np.asarray(split.targets)
    said = Classified(truth_R, detail_R, confidence_R, max(2, len(data.labels)))
    return RowResults(loss_R, np.ones(len(loss_R), dtype=int), said)


def _in_row_order(parts: list[tuple[np.ndarray, ...]], ranks: Ranks) -> list[np.ndarray]:
    """What all processes found, by row: resamples then pick the same rows for every model."""
    gathered: list[Any] = [parts]
    if ranks.world_size > 1:
        gathered = [None] * ranks.world_size
        distributed.all_gather_object(gathered, parts)
    columns = [np.concatenate(column) for column in zip(*(part for own in gathered for part in own), strict=True)]
    order = np.argsort(columns[0])
    return [column[order] for column in columns[1:]]


def _with_own_metrics(
    found: RowResults, job: JobSpec, data: TokenData, split_name: str, metrics: Sequence[str]
) -> RowResults:
    """A classifier's results with the user's own metrics, which are given the names of classes."""
    wanted = {name: metric for name, metric in job.evaluate.custom_metrics.items() if name in metrics}
    said = found.classified
    if not wanted or said is None:
        return found
    predictions = [data.labels[label] for label in said.predicted_R]
    references = [data.labels[label] for label in said.label_R]
    texts = [row.text for row in data.rows(split_name)]
    by_row, whole = custom.custom_metrics(wanted, predictions, references, texts)
    return RowResults(found.loss_R, found.targets_R, said, (), by_row, whole)


def _answers(
    model: Any,
    job: JobSpec,
    data: TokenData,
    split_name: str,
    rows: int,
    ranks: Ranks,
    device: torch.device,
    on_pass: OnPass,
) -> list[str]:
    """What the model writes for the first rows; each process writes for its own, and all get all."""
    encoder = row_encoder(job)
    room = room_for_prompts(model, job, job.evaluate.max_new_tokens)
    prompts = [encoder.prompt(row, room) for row in data.rows(split_name)[:rows]]
    own = list(range(rows))[ranks.rank :: ranks.world_size]
    dtype = autocast_dtype(job, device)
    batch_rows = job.train.per_device_eval_batch_size
    with torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
        written = write_answers(
            model,
            encoder.format.tokenizer,
            [prompts[row] for row in own],
            job.evaluate,
            batch_rows,
            lambda: on_pass("evaluation"),
            ends=data.ends,
            frame=data.frame,
        )
    most = math.ceil(rows / ranks.world_size / batch_rows)
    for _ in range(most - math.ceil(len(own) / batch_rows)):
        on_pass("evaluation")
    if ranks.world_size == 1:
        return written
    gathered: list[Any] = [None] * ranks.world_size
    distributed.all_gather_object(gathered, dict(zip(own, written, strict=True)))
    together = {row: text for part in gathered for row, text in part.items()}
    return [together[row] for row in range(rows)]


def room_for_prompts(model: Any, job: JobSpec, new: int) -> int:
    """Tokens that a prompt may have before `new` tokens of an answer. Raises UserError when they leave it none."""
    config = model.config.to_dict()
    positions = learnt_positions(config) or int(getattr(model.config, "max_position_embeddings", None) or 0)
    learnt = job.prompt_tuning.num_virtual_tokens if job.method == "prompt_tuning" else 0
    if not positions:
        return job.model.max_length
    if positions - learnt - new < _FEWEST_TOKENS:
        name = job.model.model_name_or_path
        raise UserError(f"evaluate.max_new_tokens is {new}, but {name} has {positions} positions for prompt and answer")
    return min(job.model.max_length, positions - learnt - new)


def _judged(
    found: RowResults,
    answers: list[str],
    job: JobSpec,
    data: TokenData,
    split_name: str,
    metrics: Sequence[str],
    device: torch.device,
) -> RowResults:
    """The results with the answers and, where all rows were answered, their metrics."""
    shown = (*answers, *[None] * (len(found) - len(answers)))
    if len(answers) < len(found):
        return RowResults(found.loss_R, found.targets_R, None, shown)
    rows = data.rows(split_name)
    references = [row.reference for row in rows]
    embedder = None
    if "bertscore_f1" in metrics:
        spec = job.evaluate
        encoder = bertscore.load(Path(model_folder(spec.bertscore_model, None)), spec.bertscore_layer, device.type)
        embedder = encoder.f1
    ratios = text_metrics(metrics, answers, references, embedder)
    own = {name: metric for name, metric in job.evaluate.custom_metrics.items() if name in metrics}
    by_row, whole = custom.custom_metrics(own, answers, references, [row.prompt for row in rows])
    return RowResults(found.loss_R, found.targets_R, None, shown, ratios | by_row, whole)


def autocast_dtype(job: JobSpec, device: torch.device) -> torch.dtype | None:
    """Number format of mixed precision; None without it."""
    wanted = job.train.mixed_precision
    if wanted == "auto":
        return torch.bfloat16 if has_bfloat16(device) or weight_dtype(job, device) is torch.bfloat16 else None
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
