"""One exported model's speed and memory, in this process, which has done nothing else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deployment.decoding import tokens_of
from deployment.runtime import Loaded, TorchDecoder, open_artefact, read_artefact, right_padded
from evaluation.inference import circumstances, classifier_speed, peak_gib, settle_memory, writer_speed


def measure_artefact(
    folder: Path, rows: Sequence[Sequence[int]], new_tokens: int, batch_rows: int, threads: int
) -> dict[str, Any]:
    """Latency, rate and peak memory on rows of tokens: prompts, or texts to classify. `begun_gib` is the process's
    before it had a model, its runtime included, and is part of the peak."""
    _import_runtime(folder)
    begun, began = peak_gib(), time.perf_counter()
    loaded = open_artefact(folder, threads)
    load_seconds, load_peak = time.perf_counter() - began, peak_gib()
    settle_memory()
    if loaded.generates:
        found = _writer(loaded, rows, new_tokens)
    else:
        found = classifier_speed(_classify(loaded, rows), list(range(len(rows))), batch_rows)
    return {
        **found,
        "peak_memory_gib": peak_gib(),
        "begun_gib": begun,
        "load_peak_gib": load_peak,
        "load_seconds": load_seconds,
        "device": "cpu",
        "threads": threads,
        **circumstances(),
    }


def _import_runtime(folder: Path) -> None:
    """What every process of this kind has, before what one model needs."""
    if read_artefact(folder).target == "merged":
        import torch  # noqa: F401
        import transformers  # noqa: F401
    else:
        import onnxruntime  # noqa: F401


def _classify(loaded: Loaded, rows: Sequence[Sequence[int]]) -> Any:
    def classify(numbers: Sequence[int]) -> None:
        loaded.model.logits(*right_padded([rows[number] for number in numbers], loaded.artefact.pad_id)).argmax(axis=1)

    return classify


def _writer(loaded: Loaded, rows: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
    """One prompt at a time, greedy, a fixed number of tokens, medians; PyTorch's models by transformers' own loop."""
    if isinstance(loaded.model, TorchDecoder):
        return writer_speed(loaded.model.model, SimpleNamespace(pad_token_id=loaded.artefact.pad_id), rows, new_tokens)
    first, rates, whole = [], [], []
    for number, prompt in enumerate([rows[0], *rows]):
        began = time.perf_counter()
        times = [time.perf_counter() for _ in tokens_of(loaded.model, [prompt], new_tokens, [], loaded.artefact.pad_id)]
        if number:
            first.append(times[0] - began)
            rates.append((len(times) - 1) / (times[-1] - times[0]))
            whole.append(times[-1] - began)
    return {
        "ttft_ms": 1000 * statistics.median(first),
        "tokens_per_second": statistics.median(rates),
        "latency_ms": 1000 * statistics.median(whole),
    }
