"""One model's inference, measured in this process, which has done nothing else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lorafleet.evaluation.inference.speed import (
    Answer,
    Classify,
    circumstances,
    measured,
    peak_gib,
    settle_memory,
    transformers_answer,
)
from lorafleet.evaluation.tokens import TokenData, open_tokens, row_encoder
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.schedule import schedule
from lorafleet.training.evaluation import autocast_dtype, room_for_prompts
from lorafleet.training.methods import load_weights
from lorafleet.training.model import fresh_heads, load_base, resolve_device
from lorafleet.training.session import TrainingSession

_PACE_STEPS, _WARM_STEPS = 12, 2


def measure(
    job: JobSpec,
    tokens: Path,
    weights: Path | None,
    split_name: str,
    gpus: int,
    rows: int,
    new_tokens: int,
    points: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """Latency, rate and peak memory of a model on the first held-out rows; `begun_gib` is the process's before it had a
    model, and is part of the peak (on CPU; on a GPU the peak is the device's). `points` are batches to measure as well,
    each (rows, tokens of a row)."""
    torch.set_num_threads(max(1, job.resources.cpus_per_worker))
    device = resolve_device(gpus)
    data = open_tokens(tokens)
    import transformers  # noqa: F401 - what every process of this kind has, before what one model needs

    if job.method == "qlora":
        import bitsandbytes  # noqa: F401

    begun = peak_gib()
    began = time.perf_counter()
    base = load_base(job, len(data.labels), device)
    if weights is None and not base.own_head:
        fresh_heads(base, job.train.seed)
    model: Any = load_weights(job, base, weights) if weights else base.model
    model.eval()
    load_seconds, load_peak = time.perf_counter() - began, peak_gib()
    settle_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    number = min(rows, data.splits[split_name].rows)
    dtype = autocast_dtype(job, device)
    if job.generates:
        given = _prompts(model, job, data, split_name, number, new_tokens)
        work: Answer | Classify = transformers_answer(model, data.pad_id, new_tokens)
    else:
        given = data.tokens(split_name, number)
        work = _classify(model, data.pad_id, device)

    def peak() -> float:
        return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else peak_gib()

    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        batch_rows = job.train.per_device_eval_batch_size
        found = measured(work, given, batch_rows, points, peak, generates=job.generates)
    return {
        **found,
        "begun_gib": begun if device.type == "cpu" else None,
        "load_peak_gib": load_peak,
        "load_seconds": load_seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **circumstances(),
    }


def pace(job: JobSpec, tokens: Path, gpus: int) -> dict[str, Any]:
    """`seconds_per_row` of training, as the median over steps after two that do not count."""
    torch.set_num_threads(max(1, job.resources.cpus_per_worker))
    device = resolve_device(gpus)
    data = open_tokens(tokens)
    base = load_base(job, len(data.labels), device)
    plan = schedule(job, data.training_rows(job), searching=False)
    session = TrainingSession.build(job, base, data, plan)
    seconds: list[float] = []
    while not session.done and len(seconds) < _PACE_STEPS:
        began = session.meter.train_seconds
        session.advance(session.step + 1)
        seconds.append(session.meter.train_seconds - began)
    counted = seconds[_WARM_STEPS:] or seconds
    return {"seconds_per_row": statistics.median(counted) / plan.batch_rows, "steps": len(counted), **circumstances()}


def _prompts(
    model: Any, job: JobSpec, data: TokenData, split_name: str, number: int, new_tokens: int
) -> list[list[int]]:
    encoder, room = row_encoder(job), room_for_prompts(model, job, new_tokens)
    return [encoder.prompt(row, room) for row in data.rows(split_name)[:number]]


def _classify(model: Any, pad_id: int, device: torch.device) -> Classify:
    def classify(rows: Sequence[Sequence[int]]) -> None:
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask).logits.argmax(dim=1).cpu()

    return classify
