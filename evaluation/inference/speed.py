"""Measure the speed and memory of a loaded model.

`lorafleet measure` runs it in a fresh process, for models of a run
(`training/measure.py`) and for exported targets (`deployment/measure.py`), so that both
are measured in the same way. B rows, T tokens.

All times are medians after an uncounted warm-up: on a shared machine, a single slow
repetition would move a mean.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from lorafleet.evaluation.inference.generate import pad_prompts, use_generation_config

Classify = Callable[[Sequence[Sequence[int]]], None]
"""Function that classifies rows of token ids and returns when their classes are known."""
Answer = Callable[[Sequence[Sequence[int]]], list[float]]
"""Function that answers prompts of token ids in one batch.

Returns the time at which it began and the time of each token.
"""
_MEASURED_BATCHES = 3


def settle_memory() -> None:
    """Release the memory that loading left, and restart the measurement of the peak (Linux).

    Call it between loading and measuring. Loading may need more memory than inference, and
    is reported separately.
    """
    gc.collect()
    if sys.platform == "linux":
        # glibc keeps freed memory, which would count as memory of the model.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current memory


def read_peak_gib() -> float:
    """Return the peak resident memory of this process so far, in GiB.

    On Linux this is VmHWM since the start of the process or the last `settle_memory`. On
    other systems it is the current memory.
    """
    if sys.platform != "linux":
        import psutil

        return float(psutil.Process().memory_info().rss) / 2**30
    # Not `ru_maxrss`: it survives fork and exec. A new Python process of 14 MB started by a parent
    # of 600 MB reports 614 MB.
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 2**20


def describe_machine() -> dict[str, Any]:
    """Return the properties of this machine that its measurements depend on.

    Keys: `cpu` (model name, or "?"), `cpu_flags` (instruction sets that matter, separated
    by spaces) and `load_average` of the last minute.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu_info = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = set((cpu_info.get("flags") or cpu_info.get("Features") or "").split())
    return {
        "cpu": cpu_info.get("model name", "?"),
        "cpu_flags": " ".join(flag for flag in _CPU_FLAGS if flag in flags),
        "load_average": os.getloadavg()[0],
    }


_CPU_FLAGS = (
    "avx avx2 f16c fma avx512f avx512_vnni avx_vnni amx_int8 amx_bf16 asimddp i8mm sve bf16".split()
)
"""Instruction sets that decide the speed of float16 and INT8."""


def measure_classifier(
    classify: Classify, rows: Sequence[Sequence[int]], batch_rows: int
) -> dict[str, Any]:
    """Measure `latency_ms` of single rows (median) and `samples_per_second` of full batches.

    One row and one batch are run first and not counted.

    Args:
        classify: The model.
        rows: Token ids of each row. They are repeated if a batch needs more.
        batch_rows: Rows of a full batch.
    """
    classify(rows[:1])
    row_seconds = [_measure_seconds(classify, [row]) for row in rows]
    batch = [rows[number % len(rows)] for number in range(batch_rows)]
    classify(batch)
    batch_seconds = [_measure_seconds(classify, batch) for _ in range(_MEASURED_BATCHES)]
    return {
        "latency_ms": 1000 * statistics.median(row_seconds),
        "samples_per_second": batch_rows / statistics.median(batch_seconds),
    }


def measure_generator(answer: Answer, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Measure the speed of single answers.

    Returns `ttft_ms` to the first token, `tokens_per_second` after it and `latency_ms` of a
    whole answer: medians over prompts, one at a time, after one prompt that is not counted.
    """
    answer(prompts[:1])
    return _summarize_times([answer([prompt]) for prompt in prompts], 1)


def measure_batches(
    work: Classify | Answer,
    rows: Sequence[Sequence[int]],
    points: Sequence[Sequence[int]],
    *,
    generates: bool,
) -> dict[str, list[dict[str, Any]]]:
    """Measure the speed of full batches of given sizes.

    The rows are real rows, repeated or cut to the length. Three batches are measured after
    one that is not counted.

    Args:
        work: The model.
        rows: Token ids of each row.
        points: (rows, tokens per row) of each batch.
        generates: True if `work` answers prompts, False if it classifies.

    Returns:
        `at`: one record per point, where `latency_ms` is that of a whole batch. Empty
            without points.
    """
    measurements = []
    for batch_rows, length in points:
        batch = [_resize_row(rows[number % len(rows)], length) for number in range(batch_rows)]
        work(batch)
        if generates:
            times = [cast("Answer", work)(batch) for _ in range(_MEASURED_BATCHES)]
            numbers = _summarize_times(times, batch_rows)
        else:
            seconds = statistics.median(
                _measure_seconds(work, batch) for _ in range(_MEASURED_BATCHES)
            )
            numbers = {"latency_ms": 1000 * seconds, "samples_per_second": batch_rows / seconds}
        measurements.append({"batch_size": batch_rows, "length": length, **numbers})
    return {"at": measurements} if measurements else {}


def measure_speed(
    work: Classify | Answer,
    rows: Sequence[Sequence[int]],
    batch_rows: int,
    points: Sequence[Sequence[int]],
    peak: Callable[[], float | None],
    *,
    generates: bool,
) -> dict[str, Any]:
    """Measure a loaded model's speed on single rows and on batches.

    Args:
        work: The model, as `Answer` or `Classify`.
        rows: Token ids: prompts, or texts to classify.
        batch_rows: Rows of a full batch, for a classifier's throughput.
        points: Further batches to measure: (rows, tokens per row).
        peak: Reads the peak memory in GiB.
        generates: True if `work` answers prompts, False if it classifies.

    Returns:
        The numbers of `measure_generator` or `measure_classifier`, `peak_memory_gib` and
            those of `measure_batches`. The peak covers the rows only: the larger batches
            are optional and come after it.
    """
    if generates:
        speeds = measure_generator(cast("Answer", work), rows)
    else:
        speeds = measure_classifier(cast("Classify", work), rows, batch_rows)
    return (
        speeds
        | {"peak_memory_gib": peak()}
        | measure_batches(work, rows, points, generates=generates)
    )


def _resize_row(row: Sequence[int], length: int) -> list[int]:
    """Return a row of `length` tokens, repeated or cut."""
    return [row[index % len(row)] for index in range(length)]


def _summarize_times(answers: Sequence[Sequence[float]], rows: int) -> dict[str, Any]:
    """Compute speeds from the times of answers: when each began, and when each token came."""
    return {
        "ttft_ms": 1000 * statistics.median(times[1] - times[0] for times in answers),
        # The times are the start and then one per token. The first token is the prompt's, so n
        # tokens have n - 1 decoding steps: `len(times) - 2`.
        "tokens_per_second": statistics.median(
            rows * (len(times) - 2) / (times[-1] - times[1]) for times in answers
        ),
        "latency_ms": 1000 * statistics.median(times[-1] - times[0] for times in answers),
    }


def make_transformers_answer(model: Any, pad_id: int, new_tokens: int) -> Answer:
    """Return a function that answers with transformers' own loop.

    It decodes greedily, with a fixed number of tokens: an answer that ends early would make
    a model look fast or slow for no reason of its own.

    Args:
        model: A causal model, with or without an adapter.
        pad_id: Token id for padding.
        new_tokens: Tokens of each answer.
    """
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_id,
    )

    def answer(prompts: Sequence[Sequence[int]]) -> list[float]:
        clock = _Clock()
        began = time.perf_counter()
        with torch.inference_mode(), use_generation_config(inner, config):
            inner.generate(
                **pad_prompts(model, prompts, pad_id),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        return [began, *clock.times]

    return answer


class _Clock:
    """Stopping criterion that never stops and records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        import torch

        # CUDA runs asynchronously: without waiting, the time would be that of the launch.
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _measure_seconds(
    work: Callable[[Sequence[Sequence[int]]], Any], rows: Sequence[Sequence[int]]
) -> float:
    began = time.perf_counter()
    work(rows)
    return time.perf_counter() - began
