"""One exported model's speed and memory, in this process, which has done nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafleet.deployment.decoding import tokens_of
from lorafleet.deployment.runtime import Loaded, TorchDecoder, open_artefact, read_artefact, right_padded
from lorafleet.deployment.tensorrt import memory_gib
from lorafleet.evaluation.inference.speed import (
    Answer,
    Classify,
    circumstances,
    measured,
    peak_gib,
    settle_memory,
    transformers_answer,
)


def measure_artefact(
    folder: Path,
    rows: Sequence[Sequence[int]],
    new_tokens: int,
    batch_rows: int,
    threads: int,
    points: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """Latency, rate and peak memory on rows of tokens: prompts, or texts to classify. `begun_gib` is the process's
    before it had a model, its runtime included, and is part of the peak. `points` are batches to measure as well, each
    (rows, tokens of a row)."""
    _import_runtime(folder)
    begun, began = peak_gib(), time.perf_counter()
    loaded = open_artefact(folder, threads)
    load_seconds, load_peak = time.perf_counter() - began, peak_gib()
    settle_memory()
    work = _answer(loaded, new_tokens) if loaded.generates else _classify(loaded)
    on_tensorrt = loaded.artefact.target == "tensorrt"
    peak = memory_gib if on_tensorrt else peak_gib
    return {
        **measured(work, rows, batch_rows, points, peak, generates=loaded.generates),
        "begun_gib": None if on_tensorrt else begun,
        "load_peak_gib": load_peak,
        "load_seconds": load_seconds,
        "device": "TensorRT" if on_tensorrt else "cpu",
        "threads": threads,
        **circumstances(),
    }


def _import_runtime(folder: Path) -> None:
    """What every process of this kind has, before what one model needs."""
    target = read_artefact(folder).target
    if target in ("merged", "executorch"):
        import torch  # noqa: F401
    if target == "merged":
        import transformers  # noqa: F401
    elif target == "executorch":
        import executorch.runtime  # noqa: F401
    else:
        import onnxruntime  # noqa: F401


def _classify(loaded: Loaded) -> Classify:
    def classify(rows: Sequence[Sequence[int]]) -> None:
        loaded.model.logits(*right_padded(rows, loaded.artefact.pad_id)).argmax(axis=1)

    return classify


def _answer(loaded: Loaded, new_tokens: int) -> Answer:
    """Greedy, a fixed number of tokens; PyTorch's models by transformers' own loop."""
    pad_id = loaded.artefact.pad_id
    if isinstance(loaded.model, TorchDecoder):
        return transformers_answer(loaded.model.model, pad_id, new_tokens)

    def answer(prompts: Sequence[Sequence[int]]) -> list[float]:
        began = time.perf_counter()
        return [began, *(time.perf_counter() for _ in tokens_of(loaded.model, prompts, new_tokens, [], pad_id))]

    return answer
