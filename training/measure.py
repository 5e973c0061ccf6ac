"""Measure the inference of one model in this process, which has done nothing else.

Runs in `lorafleet measure`, which `measure_in_subprocess` starts anew for each model:
the peak memory of a process that has loaded another model before would include that
model.
"""

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
    describe_machine,
    make_transformers_answer,
    measure_speed,
    read_peak_gib,
    settle_memory,
)
from lorafleet.evaluation.tokens import TokenData, make_row_encoder, open_tokens
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.schedule import build_schedule
from lorafleet.training.cpu import set_up_cpu
from lorafleet.training.evaluation import compute_max_prompt_tokens, resolve_autocast_dtype
from lorafleet.training.methods import load_weights
from lorafleet.training.model import load_base, reset_heads, resolve_device
from lorafleet.training.session import TrainingSession

_PACE_STEPS, _WARM_STEPS = 12, 2


def measure_inference(
    job: JobSpec,
    tokens: Path,
    weights: Path | None,
    split_name: str,
    gpus: int,
    threads: int,
    rows: int,
    new_tokens: int,
    points: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """Return latency, throughput and peak memory of a model on the first held-out rows.

    `begun_gib` is the memory of the process before it loaded the model. On CPU it is part
    of the peak; on a GPU the peak is the device's, and `begun_gib` is None.

    Args:
        tokens: Folder of the token cache.
        weights: Folder of the trained weights. None: measure the base model.
        gpus: 0: measure on the CPU.
        threads: CPU threads.
        rows: Maximum number of rows to measure.
        new_tokens: Tokens that are generated for each row (generation only).
        points: More batches to measure, each (rows, tokens of a row).

    Returns:
        The values of `measure_speed`, memory in GiB, times in seconds, and a description of
        the machine.
    """
    torch.set_num_threads(max(1, threads))
    device = resolve_device(gpus)
    data = open_tokens(tokens)
    # Imported before the first memory reading, because every such process needs it.
    import transformers  # noqa: F401

    if job.method == "qlora":
        import bitsandbytes  # noqa: F401

    initial_gib = read_peak_gib()
    started_at = time.perf_counter()
    base = load_base(job, len(data.labels), device)
    if weights is None and not base.own_head:
        reset_heads(base, job.train.seed)
    model: Any = load_weights(job, base, weights) if weights else base.model
    model.eval()
    load_seconds, load_peak = time.perf_counter() - started_at, read_peak_gib()
    # What loading used and freed must not count as memory of the inference.
    settle_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    number = min(rows, data.splits[split_name].rows)
    dtype = resolve_autocast_dtype(job, device)
    if job.is_generative:
        inputs = _encode_prompts(model, job, data, split_name, number, new_tokens)
        run_model: Answer | Classify = make_transformers_answer(model, data.pad_id, new_tokens)
    else:
        inputs = data.get_tokens(split_name, number)
        run_model = _build_classifier(model, data.pad_id, device)

    def read_peak() -> float:
        return (
            torch.cuda.max_memory_allocated(device) / 2**30
            if device.type == "cuda"
            else read_peak_gib()
        )

    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        batch_rows = job.train.per_device_eval_batch_size
        measurements = measure_speed(
            run_model, inputs, batch_rows, points, read_peak, generates=job.is_generative
        )
    return {
        **measurements,
        "begun_gib": initial_gib if device.type == "cpu" else None,
        "load_peak_gib": load_peak,
        "load_seconds": load_seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **describe_machine(),
    }


def measure_pace(job: JobSpec, tokens: Path, gpus: int, threads: int) -> dict[str, Any]:
    """Return `seconds_per_row` of training: the median over the steps after two warm-up steps.

    At most 12 steps are trained, nothing is saved, and the median ignores single slow
    steps. Comparisons with a budget of `device_seconds` use it.

    Args:
        tokens: Folder of the token cache.
        gpus: 0: train on the CPU.
        threads: CPU threads.
    """
    set_up_cpu(threads)
    device = resolve_device(gpus)
    data = open_tokens(tokens)
    base = load_base(job, len(data.labels), device)
    plan = build_schedule(job, data.count_training_rows(job), searching=False)
    session = TrainingSession.build(job, base, data, plan)
    seconds: list[float] = []
    while not session.is_done and len(seconds) < _PACE_STEPS:
        seconds_before = session.meter.train_seconds
        session.advance(session.step + 1)
        seconds.append(session.meter.train_seconds - seconds_before)
    counted = seconds[_WARM_STEPS:] or seconds
    return {
        "seconds_per_row": statistics.median(counted) / plan.batch_rows,
        "steps": len(counted),
        **describe_machine(),
    }


def _encode_prompts(
    model: Any, job: JobSpec, data: TokenData, split_name: str, number: int, new_tokens: int
) -> list[list[int]]:
    """Return the token ids of the first prompts of a split."""
    encoder, max_tokens = make_row_encoder(job), compute_max_prompt_tokens(model, job, new_tokens)
    return [encoder.encode_prompt(row, max_tokens) for row in data.read_rows(split_name)[:number]]


def _build_classifier(model: Any, pad_id: int, device: torch.device) -> Classify:
    """Return a function that classifies rows of token ids, padded to the longest of a batch."""

    def classify(rows: Sequence[Sequence[int]]) -> None:
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=device)
        mask = torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device
        )
        with torch.inference_mode():
            # Copying the result to the CPU waits for the GPU, so the caller's clock includes the
            # computation.
            model(input_ids=ids, attention_mask=mask).logits.argmax(dim=1).cpu()

    return classify
