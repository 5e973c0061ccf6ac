"""Compare size, speed and parity of every CPU target of GPT-2 small (124 M random weights).

    python -m benchmarks.export [--rounds 3] [--threads 1] [--new-tokens 64] [--gpt2 768,12,12]
    [--keep DIR]

Trains two steps of LoRA, then runs `lorafleet export --to all` and `lorafleet benchmark` as a
user would: each variant in its own processes, in turn, greedy, a fixed number of tokens.
"PyTorch" is the generation loop of transformers with a cache on the merged model. With random
weights, speed, size and logits are meaningful; the perplexity is not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peer import describe_machine
from lorafleet.cluster.fetch import fetch_asset
from lorafleet.jobs.data.assets import get_asset

TOKENIZER = "asset:smollm2-135m-instruct"
GATES = (
    "{onnx-int8: {min_agreement: 0.01, max_metric_drop: 9}, onnx-int4: {min_agreement: 0.01, "
    "max_metric_drop: 9}}"
)
"""Gates that refuse nothing: the benchmark measures the rounding errors of random weights."""


def main() -> None:
    """Run the benchmark in a temporary folder, or in the one of --keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--gpt2", default="768,12,12", help="width, layers, heads")
    parser.add_argument("--keep", type=Path, help="leave the run and its targets here")
    arguments = parser.parse_args()
    print(describe_machine())
    folder = Path(arguments.keep or tempfile.mkdtemp()).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        measure(folder, arguments)
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Train, export and benchmark the model, and print a table."""
    for name in (TOKENIZER, "asset:aclsum"):
        fetch_asset(get_asset(name), print)
    create_base(folder / "base", *map(int, arguments.gpt2.split(",")))
    (folder / "job.yaml").write_text(JOB.format(base=folder / "base", gates=GATES))
    run_lorafleet(folder, "train", "job.yaml", "--wait")
    threads = ("--threads", str(arguments.threads))
    exported = json.loads(
        run_lorafleet(folder, "export", "export-bench", "--to", "all", "--format", "json", *threads)
    )
    for name, target in exported["targets"].items():
        comparison = (target["parity"] or {}).get("judged")
        logits_text = (
            f"logits within {comparison['max_logit_difference']:.2g}, " if comparison else ""
        )
        agreement_text = (
            f"same likeliest token {comparison['agreement']:.3f}"
            if comparison
            else target["unavailable"]
        )
        print(f"{name}: {logits_text}{agreement_text}")
    options = (
        "--rounds",
        str(arguments.rounds),
        "--rows",
        "4",
        "--new-tokens",
        str(arguments.new_tokens),
        *threads,
    )
    report = json.loads(
        run_lorafleet(folder, "benchmark", "export-bench", *options, "--format", "json")
    )
    arms = {arm["arm"]: arm for arm in report["arms"] if arm["inference"]}
    print("\nvariant      MB      load s  first token ms  tokens/s (rounds)       GiB")
    for name, arm in arms.items():
        speed = arm["inference"]
        low, high = speed["spread"].get("tokens_per_second", (speed["tokens_per_second"],) * 2)
        print(
            f"{name:<12} {arm['weights_mb'] or 0:<7.1f} {speed['load_seconds']:<7.2f} "
            f"{speed['ttft_ms']:<15.1f} {speed['tokens_per_second']:<6.1f} ({low:.1f} to "
            f"{high:.1f})   {speed['peak_memory_gib']:.2f}"
        )

    def get_rate(name: str) -> float:
        return float(arms[name]["inference"]["tokens_per_second"])

    print(f"\nONNX float32 beside PyTorch: {get_rate('onnx') / get_rate('merged'):.2f}x tokens/s")
    print(
        f"ONNX INT8 beside ONNX float32: {get_rate('onnx-int8') / get_rate('onnx'):.2f}x "
        "tokens/s, ",
        end="",
    )
    print(f"{arms['onnx-int8']['weights_mb'] / arms['onnx']['weights_mb']:.2f} of its files")


def create_base(folder: Path, width: int, layers: int, heads: int) -> None:
    """Save GPT-2 with random weights, and a tokenizer that fits its vocabulary."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from lorafleet.training.model import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(TOKENIZER, None, trust_remote_code=False)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads, **ends))
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} M parameters")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_lorafleet(folder: Path, *arguments: str) -> str:
    """Run the command line as a user would, and return its data; its messages are shown."""
    command: list[Any] = [Path(sys.executable).with_name("lorafleet"), *arguments]
    process = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} ended with code {process.returncode}")
    return process.stdout


JOB = """
name: export-bench
task: generation
model: {{model_name_or_path: "{base}", max_length: 96}}
data:
  dataset_name: "asset:aclsum"
  max_train_samples: 8
  max_validation_samples: 4
  max_test_samples: 16
lora: {{lora_target_modules: [c_attn]}}
train: {{max_steps: 2, per_device_train_batch_size: 4}}
tracking: {{mode: disabled}}
evaluate: {{sample_rows: 0}}
export: {{rows: 16, parity: {gates}}}
"""


if __name__ == "__main__":
    main()
