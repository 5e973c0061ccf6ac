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
from typing import Any

from evaluation.generate import own_settings, padded

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
    cpu = "?"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = named[0] if named else cpu
    return {"cpu": cpu, "load_average": os.getloadavg()[0]}


def classifier_speed(classify: Callable[[Sequence[int]], None], rows: Sequence[int], batch_rows: int) -> dict[str, Any]:
    """`latency_ms` of one row (median, one by one) and `samples_per_second` of full batches, after one that is not
    counted. `classify` takes numbers of rows and returns when it is done."""
    classify(rows[:1])
    alone = [_seconds(classify, [row]) for row in rows]
    batch = [rows[number % len(rows)] for number in range(batch_rows)]
    classify(batch)
    together = [_seconds(classify, batch) for _ in range(_BATCHES)]
    return {
        "latency_ms": 1000 * statistics.median(alone),
        "samples_per_second": batch_rows / statistics.median(together),
    }


def writer_speed(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
    """`ttft_ms` to the first token, `tokens_per_second` after it, and `latency_ms` of a whole answer.

    Medians over prompts, one at a time, greedy, with a fixed number of tokens, after one prompt that is not counted.
    """
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    pad = tokenizer.pad_token_id or 0
    config = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=pad
    )
    first, rates, whole = [], [], []
    with torch.inference_mode():
        for number, prompt in enumerate([prompts[0], *prompts]):
            clock = _Clock()
            began = time.perf_counter()
            with own_settings(inner, config):
                inner.generate(
                    **padded(model, [prompt], pad),
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([clock]),
                )
            if number:
                first.append(clock.times[0] - began)
                rates.append((len(clock.times) - 1) / (clock.times[-1] - clock.times[0]))
                whole.append(clock.times[-1] - began)
    return {
        "ttft_ms": 1000 * statistics.median(first),
        "tokens_per_second": statistics.median(rates),
        "latency_ms": 1000 * statistics.median(whole),
    }


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


def _seconds(work: Callable[[Sequence[int]], None], rows: Sequence[int]) -> float:
    began = time.perf_counter()
    work(rows)
    return time.perf_counter() - began
