"""Compare the memory that `lorafleet plan` expects with CPU measurements and published GPU figures.

    python -m benchmarks.memory_model [--only cpu|published]

CPU: each case is a process of its own that trains a model with random weights for two steps. Its
peak (VmHWM) minus the memory held before the model was loaded is compared with the estimate
without its `runtime` part. Each case is measured twice: with glibc set to return freed memory
(MALLOC_MMAP_THRESHOLD_), against the estimate without its `allocator` part, and with glibc's
defaults.
Published: other people's figures, each with its source; their adapters and optimisers differ in
detail from ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peer import describe_machine
from lorafleet.cluster.planning.memory import count_trained_parameters, estimate
from lorafleet.cluster.planning.model_shape import Shape, parse_shape
from lorafleet.jobs.runs.plan import MemoryEstimate
from lorafleet.jobs.schema.job import JobSpec

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    """One training whose peak memory can be measured on this machine."""

    name: str
    model: dict[str, Any]
    """Arguments of transformers' AutoConfig, `model_type` included."""
    rows: int
    """Rows per micro-batch."""
    tokens: int
    """Tokens per row."""
    job: dict[str, Any] = field(default_factory=dict)
    """Further blocks of the job file."""

    @property
    def task(self) -> str:
        return "classification" if self.model["model_type"] == "bert" else "generation"

    def make_spec(self, folder: Path = Path("model")) -> JobSpec:
        """Return the case as a job specification with its model in `folder`."""
        blocks: dict[str, Any] = {"method": "lora"} | self.job
        train = {"per_device_train_batch_size": self.rows, "learning_rate": 1e-3} | blocks.pop(
            "train", {}
        )
        return JobSpec.model_validate(
            {
                "name": "memory",
                "task": self.task,
                "data": {"train_file": "rows.jsonl"},
                "train": train,
                "model": {"model_name_or_path": str(folder), "max_length": self.tokens},
            }
            | blocks
        )


BERT = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 1536, "vocab_size": 30522, "pad_token_id": 0}  # fmt: skip
LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1408,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 512,
    "n_layer": 8,
    "n_head": 8,
    "n_positions": 1024,
    "vocab_size": 50257,
    "pad_token_id": 0,
}
LINEAR = {"lora_target_modules": "all-linear", "lora_r": 16}
CASES = (
    Case(
        "BERT, LoRA r 8 on query and value",
        BERT,
        16,
        256,
        {"lora": {"lora_target_modules": ["query", "value"]}},
    ),
    Case("Llama, LoRA all-linear", LLAMA, 8, 256, {"lora": LINEAR}),
    Case("Llama, full", LLAMA, 4, 256, {"method": "full"}),
    Case("Llama, QLoRA nf4", LLAMA, 4, 256, {"method": "qlora", "lora": LINEAR}),
    Case("GPT-2, LoRA all-linear", GPT2, 4, 256, {"lora": LINEAR}),
    Case("BERT, full", BERT, 8, 256, {"method": "full"}),
    Case(
        "Llama, LoRA, checkpointing",
        LLAMA,
        8,
        512,
        {"lora": LINEAR, "train": {"gradient_checkpointing": True}},
    ),
    Case(
        "Llama, LoRA all-linear, no dropout",
        LLAMA,
        4,
        512,
        {"lora": LINEAR | {"lora_dropout": 0.0}},
    ),
    Case(
        "Llama, LoRA, plain loss", LLAMA, 8, 256, {"lora": LINEAR, "train": {"chunked_loss": False}}
    ),
    Case("Llama, prompt tuning", LLAMA, 8, 256, {"method": "prompt_tuning"}),
    Case("GPT-2, full", GPT2, 4, 256, {"method": "full"}),
)


def estimate_case(case: Case) -> MemoryEstimate:
    """Return the memory estimate that `lorafleet plan` would print."""
    model_shape = parse_shape(case.model)
    assert model_shape is not None
    return estimate(case.make_spec(), model_shape, model_shape.parameters, case.tokens, cuda=False)


def compute_estimated_gib(memory: MemoryEstimate, *, memory_returned: bool) -> float:
    """Return the estimate in GiB without what is held before the model is loaded.

    With `memory_returned`, the allocator's part is left out too: glibc is then set to return
    freed memory.
    """
    return (
        memory.expected
        - memory.components["runtime"]
        - (memory.components["allocator"] if memory_returned else 0)
    )


def measure_gib(case: Case, *, memory_returned: bool) -> float:
    """Return the peak of a training in its own process, in GiB above the memory held before.

    With `memory_returned`, glibc is set to return freed memory.
    """
    command = [sys.executable, "-m", "benchmarks.memory_model", "--case", case.name]
    env = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(2**20)} if memory_returned else {})
    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=env
    )
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    return float(json.loads(process.stdout.splitlines()[-1])["gib"])


def train_and_measure(case: Case) -> float:
    """Train a case in this process and return its peak in GiB; run by `measure_gib`."""
    import numpy as np
    import peft  # noqa: F401 - imported first: its modules count as memory held before the model
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from lorafleet.evaluation.tokens import Split, TokenData
    from lorafleet.jobs.trials.schedule import Schedule
    from lorafleet.training.meter import (
        free_unused_memory,
        get_memory_in_use_gib,
        get_peak_memory_gib,
        reset_peak_memory,
    )
    from lorafleet.training.model import load_base
    from lorafleet.training.session import TrainingSession

    torch.set_num_threads(1)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        config = AutoConfig.for_model(**case.model)
        model_class = (
            AutoModelForCausalLM
            if case.task == "generation"
            else AutoModelForSequenceClassification
        )
        model_class.from_config(config).save_pretrained(scratch)
        rows = 8 * case.rows
        ids = np.random.default_rng(0).integers(5, 1000, rows * case.tokens).astype(np.int32)
        starts, classifies = np.arange(rows + 1) * case.tokens, case.task == "classification"
        split = (
            Split.from_classes(ids, starts, np.zeros(rows))
            if classifies
            else Split.from_texts(ids, starts)
        )
        labels = ("a", "b") if case.task == "classification" else ()
        data = TokenData({"train": split}, labels, (), False, 0, Path(scratch), {})
        job = case.make_spec(Path(scratch))
        free_unused_memory(device)
        memory_before = get_memory_in_use_gib(device)
        base = load_base(job, len(labels), device)
        session = TrainingSession.build(job, base, data, Schedule(3, case.rows, 1, (), (3,), (1,)))
        reset_peak_memory(device)
        session.advance(2)
        return get_peak_memory_gib(device) - memory_before


def _make_qwen_shape(hidden: int, layers: int, heads: int, inner: int) -> Shape:
    """Return the shape of a Qwen (1) model.

    Its feed-forward part has half of `intermediate_size`, and its head is not tied to the
    embedding.
    """
    model_shape = parse_shape(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": inner,
            "vocab_size": 151936,
            "tie_word_embeddings": False,
        }
    )
    assert model_shape is not None
    return model_shape


QWEN = {
    "1.8B": _make_qwen_shape(2048, 24, 16, 5504),
    "7B": _make_qwen_shape(4096, 32, 32, 11008),
    "14B": _make_qwen_shape(5120, 40, 40, 13696),
}
_README = (
    "github.com/QwenLM/Qwen README, Profiling of Memory and Speed (one A100-80G, batch 1, "
    "checkpointing)"
)
_PUBLISHED = {
    ("1.8B", "lora"): {256: 6.7, 1024: 8.4, 2048: 11.0, 8192: 21.8},
    ("7B", "lora"): {256: 20.1, 1024: 21.5, 2048: 23.8, 8192: 36.6},
    ("14B", "lora"): {256: 34.6, 1024: 35.3, 2048: 37.4, 8192: 55.2},
    ("1.8B", "qlora"): {256: 5.8, 2048: 7.8},
    ("7B", "qlora"): {256: 11.5, 2048: 13.9, 8192: 23.5},
    ("14B", "qlora"): {256: 18.7, 2048: 19.9, 8192: 27.9},
}
_LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
_FSDP_QLORA = (
    "github.com/AnswerDotAI/fsdp_qlora benchmarks_03_2024.md, 2 x RTX 3090, whole copies, 2,048 "
    "tokens"
)

_LLAMA_3_2_3B = {
    "model_type": "llama",
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
_PEFT = (
    "github.com/huggingface/peft method_comparison/MetaMathQA (one L40S, bfloat16, rows of up to "
    "768 tokens, no checkpointing; the maximum that torch reserved, evaluation included)"
)


@dataclass(frozen=True)
class Published:
    """A published figure, with our estimate for the same training."""

    name: str
    gib: float
    ours: float
    source: str

    @property
    def error(self) -> float:
        """Return the relative error of our estimate."""
        return self.ours / self.gib - 1


def list_published() -> list[Published]:
    """Return all published figures with our estimates.

    Qwen's adapters have rank 64 on every matrix of a block. Its table says G, which is taken as
    GiB.
    """
    figures = []
    linear = {"lora_r": 64, "lora_target_modules": "all-linear"}
    for (size, method), by_length in _PUBLISHED.items():
        for tokens, gib in by_length.items():
            expected_gib = _estimate_on_gpu(
                QWEN[size], method, tokens, 1, linear | {"lora_dropout": 0.05}
            )
            figures.append(
                Published(f"Qwen-{size} {method}, {tokens} tokens", gib, expected_gib, _README)
            )
    llama = parse_shape(_LLAMA_2_7B)
    assert llama is not None
    llama_2_adapter = {
        "lora_r": 64,
        "lora_dropout": 0.1,
        "lora_target_modules": ["k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj"],
    }
    for method, rows, gib in (("lora", 4, 22.04), ("qlora", 8, 20.94)):
        expected_gib = _estimate_on_gpu(llama, method, 2048, rows, llama_2_adapter)
        figures.append(
            Published(f"Llama-2-7B {method}, {rows} rows", gib, expected_gib, _FSDP_QLORA)
        )
    llama = parse_shape(_LLAMA_3_2_3B)
    assert llama is not None
    adapter = {"lora_r": 32, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"]}
    for method, gib in (("lora", 20.8), ("full", 36.2)):
        estimated = _estimate_on_gpu(
            llama, method, 768, 4, adapter, gradient_checkpointing=False, dtype="bfloat16"
        )
        figures.append(Published(f"Llama-3.2-3B {method}, 4 rows", gib, estimated, _PEFT))
    return figures


def _estimate_on_gpu(
    model: Shape,
    method: str,
    tokens: int,
    rows: int,
    lora: dict[str, Any],
    *,
    gradient_checkpointing: bool = True,
    dtype: str = "auto",
) -> float:
    train = {"gradient_checkpointing": gradient_checkpointing, "chunked_loss": False}
    job = JobSpec.model_validate(
        {
            "name": "published",
            "task": "generation",
            "method": method,
            "data": {"train_file": "rows.jsonl"},
            "model": {"model_name_or_path": "model", "max_length": tokens, "dtype": dtype},
            "lora": lora,
            "train": train | {"per_device_train_batch_size": rows},
        }
    )
    assert count_trained_parameters(job, model, 0)
    return estimate(job, model, model.parameters, tokens, cuda=True).expected


def main() -> None:
    """Print the selected comparisons; with --case, measure one case in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["cpu", "published"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(
            json.dumps(
                {
                    "gib": train_and_measure(
                        next(case for case in CASES if case.name == arguments.case)
                    )
                }
            )
        )
        return
    print(describe_machine())
    if arguments.only != "published":
        print(
            "\nGiB over the process before the model, on CPU: measured, estimated, error; all "
            "again as glibc comes"
        )
        for case in CASES:
            memory = estimate_case(case)
            print(f"  {case.name:<40}", end="")
            for memory_returned in (True, False):
                estimated, measured = (
                    compute_estimated_gib(memory, memory_returned=memory_returned),
                    measure_gib(case, memory_returned=memory_returned),
                )
                print(f" {measured:6.2f} {estimated:6.2f} {estimated / measured - 1:+7.0%}", end="")
            parts = ", ".join(
                f"{name} {gib:.2f}" for name, gib in memory.components.items() if name != "runtime"
            )
            print(f"   {parts}", flush=True)
    if arguments.only != "cpu":
        print("\nGiB of a GPU: published, estimated, error")
        source = ""
        for figure in list_published():
            if figure.source != source:
                source = figure.source
                print(f"  {source}")
            print(
                f"    {figure.name:<38} {figure.gib:6.1f} {figure.ours:6.1f} {figure.error:+7.0%}"
            )


if __name__ == "__main__":
    main()
