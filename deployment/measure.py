"""Measure the speed and memory of one exported model in a fresh process.

`lorafleet measure` calls it with a request from `benchmark` or `export`. Importing a
runtime comes first and is not counted as the model's memory or loading time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafleet.deployment.decoding import iterate_tokens
from lorafleet.deployment.runtime import (
    LoadedModel,
    TorchDecoder,
    open_artefact,
    pad_right,
    read_artefact,
)
from lorafleet.deployment.tensorrt_export import measure_gpu_memory_gib
from lorafleet.evaluation.inference.speed import (
    Answer,
    Classify,
    describe_machine,
    make_transformers_answer,
    measure_speed,
    read_peak_gib,
    settle_memory,
)


def measure_artefact(
    folder: Path,
    rows: Sequence[Sequence[int]],
    new_tokens: int,
    batch_rows: int,
    threads: int,
    points: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """Measure latency, throughput and peak memory of an exported model on rows of tokens.

    Args:
        folder: The exported model.
        rows: Token ids: prompts, or texts to classify.
        new_tokens: Tokens of each answer.
        batch_rows: Rows of a full batch, for a classifier's throughput.
        threads: CPU threads.
        points: Additional batches to measure: (rows, tokens per row).

    Returns:
        The measurements. `begun_gib` is the memory of the process with its runtime but
            before loading the model; it is part of the peak.
    """
    _import_runtime(folder)
    initial_gib, start_time = read_peak_gib(), time.perf_counter()
    loaded = open_artefact(folder, threads)
    load_seconds, load_peak = time.perf_counter() - start_time, read_peak_gib()
    settle_memory()
    work = _make_generator(loaded, new_tokens) if loaded.generates else _make_classifier(loaded)
    on_tensorrt = loaded.artefact.target == "tensorrt"
    peak = measure_gpu_memory_gib if on_tensorrt else read_peak_gib
    return {
        **measure_speed(work, rows, batch_rows, points, peak, generates=loaded.generates),
        "begun_gib": None if on_tensorrt else initial_gib,
        "load_peak_gib": load_peak,
        "load_seconds": load_seconds,
        "device": "TensorRT" if on_tensorrt else "cpu",
        "threads": threads,
        **describe_machine(),
    }


def _import_runtime(folder: Path) -> None:
    """Import the runtime of a target, so that its memory is not attributed to the model."""
    target = read_artefact(folder).target
    if target in ("merged", "executorch"):
        import torch  # noqa: F401
    if target == "merged":
        import transformers  # noqa: F401
    elif target == "executorch":
        import executorch.runtime  # noqa: F401
    else:
        import onnxruntime  # noqa: F401


def _make_classifier(loaded: LoadedModel) -> Classify:
    """Return a function that classifies rows of tokens."""

    def classify(rows: Sequence[Sequence[int]]) -> None:
        loaded.model.logits(*pad_right(rows, loaded.artefact.pad_id)).argmax(axis=1)

    return classify


def _make_generator(loaded: LoadedModel, new_tokens: int) -> Answer:
    """Return a function that greedily generates a fixed number of tokens.

    PyTorch models use the generation loop of transformers.
    """
    pad_id = loaded.artefact.pad_id
    if isinstance(loaded.model, TorchDecoder):
        return make_transformers_answer(loaded.model.model, pad_id, new_tokens)

    def answer(prompts: Sequence[Sequence[int]]) -> list[float]:
        """Return the start time and the time of each token."""
        start_time = time.perf_counter()
        return [
            start_time,
            *(
                time.perf_counter()
                for _ in iterate_tokens(loaded.model, prompts, new_tokens, [], pad_id)
            ),
        ]

    return answer
