"""How fast a loaded model answers and how much memory that takes. Driven in a fresh process by `lorafleet measure`.

B rows, T tokens.
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

from lorafleet.evaluation.inference.generate import own_settings, padded

Classify = Callable[[Sequence[Sequence[int]]], None]
"""Takes rows of tokens and returns when it knows their classes."""
Answer = Callable[[Sequence[Sequence[int]]], list[float]]
"""Takes prompts of tokens, answers them side by side, and returns when it began and when each token was there."""
_BATCHES = 3


def settle_memory() -> None:
    """Give back what loading left, and count the peak from here on (Linux)."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins at what there is now


def peak_gib() -> float:
    """The largest resident memory of this process so far, in GiB: VmHWM, which a parent's does not spoil."""
    if sys.platform != "linux":
        import psutil

        return float(psutil.Process().memory_info().rss) / 2**30
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def circumstances() -> dict[str, Any]:
    """What else the numbers of this machine depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((told.get("flags") or told.get("Features") or "").split())
    return {
        "cpu": told.get("model name", "?"),
        "cpu_flags": " ".join(flag for flag in _FLAGS if flag in flags),
        "load_average": os.getloadavg()[0],
    }


_FLAGS = "avx avx2 f16c fma avx512f avx512_vnni avx_vnni amx_int8 amx_bf16 asimddp i8mm sve bf16".split()
"""Instruction sets that decide how fast float16 and INT8 are."""


def classifier_speed(classify: Classify, rows: Sequence[Sequence[int]], batch_rows: int) -> dict[str, Any]:
    """`latency_ms` of one row (median, one by one) and `samples_per_second` of full batches, after one that is not
    counted."""
    classify(rows[:1])
    alone = [_seconds(classify, [row]) for row in rows]
    batch = [rows[number % len(rows)] for number in range(batch_rows)]
    classify(batch)
    together = [_seconds(classify, batch) for _ in range(_BATCHES)]
    return {
        "latency_ms": 1000 * statistics.median(alone),
        "samples_per_second": batch_rows / statistics.median(together),
    }


def writer_speed(answer: Answer, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """`ttft_ms` to the first token, `tokens_per_second` after it, and `latency_ms` of a whole answer.

    Medians over prompts, one at a time, after one prompt that is not counted.
    """
    answer(prompts[:1])
    return _writing([answer([prompt]) for prompt in prompts], 1)


def speeds_at(
    work: Classify | Answer, rows: Sequence[Sequence[int]], points: Sequence[Sequence[int]], *, generates: bool
) -> dict[str, list[dict[str, Any]]]:
    """`at`: the same numbers of full batches, for each (rows, tokens), of three after one that is not counted.

    The rows are made of real ones, repeated or cut to their length. `latency_ms` is of the batch.
    """
    found = []
    for batch_rows, length in points:
        batch = [_sized(rows[number % len(rows)], length) for number in range(batch_rows)]
        work(batch)
        if generates:
            times = [cast("Answer", work)(batch) for _ in range(_BATCHES)]
            numbers = _writing(times, batch_rows)
        else:
            seconds = statistics.median(_seconds(work, batch) for _ in range(_BATCHES))
            numbers = {"latency_ms": 1000 * seconds, "samples_per_second": batch_rows / seconds}
        found.append({"batch_size": batch_rows, "length": length, **numbers})
    return {"at": found} if found else {}


def measured(
    work: Classify | Answer,
    rows: Sequence[Sequence[int]],
    batch_rows: int,
    points: Sequence[Sequence[int]],
    peak: Callable[[], float | None],
    *,
    generates: bool,
) -> dict[str, Any]:
    """A loaded model's speed on rows and on batches (`points`), and `peak_memory_gib` of the rows alone: larger
    batches, which not everybody asks for, come after it."""
    if generates:
        found = writer_speed(cast("Answer", work), rows)
    else:
        found = classifier_speed(cast("Classify", work), rows, batch_rows)
    return found | {"peak_memory_gib": peak()} | speeds_at(work, rows, points, generates=generates)


def _sized(row: Sequence[int], length: int) -> list[int]:
    return [row[place % len(row)] for place in range(length)]


def _writing(answers: Sequence[Sequence[float]], rows: int) -> dict[str, Any]:
    """Of the times of answers: when each began, and when each of its tokens was there."""
    return {
        "ttft_ms": 1000 * statistics.median(times[1] - times[0] for times in answers),
        "tokens_per_second": statistics.median(rows * (len(times) - 2) / (times[-1] - times[1]) for times in answers),
        "latency_ms": 1000 * statistics.median(times[-1] - times[0] for times in answers),
    }


def transformers_answer(model: Any, pad_id: int, new_tokens: int) -> Answer:
    """Answers by transformers' own loop: greedy, with a fixed number of tokens."""
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=pad_id
    )

    def answer(prompts: Sequence[Sequence[int]]) -> list[float]:
        clock = _Clock()
        began = time.perf_counter()
        with torch.inference_mode(), own_settings(inner, config):
            inner.generate(
                **padded(model, prompts, pad_id),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        return [began, *clock.times]

    return answer


class _Clock:
    """Asked after each token whether to stop: it never says so, and notes the time."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        import torch

        if input_ids.device.type == "cuda":
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _seconds(work: Callable[[Sequence[Sequence[int]]], Any], rows: Sequence[Sequence[int]]) -> float:
    began = time.perf_counter()
    work(rows)
    return time.perf_counter() - began
