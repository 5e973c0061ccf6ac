"""Every CPU target of one model beside each other: size, speed and parity, of GPT-2 small with random weights (124 M).

    python -m benchmarks.export [--rounds 3] [--threads 1] [--new-tokens 64] [--gpt2 768,12,12] [--keep DIR]

Two steps of LoRA are trained, then `lorafleet export --to all` and `lorafleet benchmark` are run as a user would: each
variant in processes of its own, in turn, greedy, a fixed number of tokens. "PyTorch" is transformers' own loop with a
cache on the merged model. With random weights speed, size and logits say something; the perplexity does not.
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

from lorafleet.cluster.fetch import fetch_asset
from lorafleet.jobs.data.assets import asset

from benchmarks.peer import machine_line

TOKENIZER = "asset:smollm2-135m-instruct"
GATES = "{onnx-int8: {min_agreement: 0.01, max_metric_drop: 9}, onnx-int4: {min_agreement: 0.01, max_metric_drop: 9}}"
"""What rounding does to random weights is measured here, and refuses nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--gpt2", default="768,12,12", help="width, layers, heads")
    parser.add_argument("--keep", type=Path, help="leave the run and its targets here")
    arguments = parser.parse_args()
    print(machine_line())
    place = Path(arguments.keep or tempfile.mkdtemp()).absolute()
    place.mkdir(parents=True, exist_ok=True)
    try:
        measure(place, arguments)
    finally:
        if arguments.keep is None:
            shutil.rmtree(place, ignore_errors=True)


def measure(place: Path, arguments: argparse.Namespace) -> None:
    for name in (TOKENIZER, "asset:aclsum"):
        fetch_asset(asset(name), print)
    base(place / "base", *map(int, arguments.gpt2.split(",")))
    (place / "job.yaml").write_text(JOB.format(base=place / "base", gates=GATES))
    lorafleet(place, "train", "job.yaml", "--wait")
    threads = ("--threads", str(arguments.threads))
    exported = json.loads(lorafleet(place, "export", "export-bench", "--to", "all", "--format", "json", *threads))
    for name, found in exported["targets"].items():
        judged = (found["parity"] or {}).get("judged")
        near = f"logits within {judged['max_logit_difference']:.2g}, " if judged else ""
        alike = f"same likeliest token {judged['agreement']:.3f}" if judged else found["unavailable"]
        print(f"{name}: {near}{alike}")
    amount = ("--rounds", str(arguments.rounds), "--rows", "4", "--new-tokens", str(arguments.new_tokens), *threads)
    report = json.loads(lorafleet(place, "benchmark", "export-bench", *amount, "--format", "json"))
    arms = {arm["arm"]: arm for arm in report["arms"] if arm["inference"]}
    print("\nvariant      MB      load s  first token ms  tokens/s (rounds)       GiB")
    for name, arm in arms.items():
        speed = arm["inference"]
        low, high = speed["spread"].get("tokens_per_second", (speed["tokens_per_second"],) * 2)
        print(
            f"{name:<12} {arm['weights_mb'] or 0:<7.1f} {speed['load_seconds']:<7.2f} {speed['ttft_ms']:<15.1f} "
            f"{speed['tokens_per_second']:<6.1f} ({low:.1f} to {high:.1f})   {speed['peak_memory_gib']:.2f}"
        )

    def rate(name: str) -> float:
        return float(arms[name]["inference"]["tokens_per_second"])

    print(f"\nONNX float32 beside PyTorch: {rate('onnx') / rate('merged'):.2f}x tokens/s")
    print(f"ONNX INT8 beside ONNX float32: {rate('onnx-int8') / rate('onnx'):.2f}x tokens/s, ", end="")
    print(f"{arms['onnx-int8']['weights_mb'] / arms['onnx']['weights_mb']:.2f} of its files")


def base(folder: Path, width: int, layers: int, heads: int) -> None:
    """GPT-2 with random weights, and a tokenizer that it has places for."""
    import torch
    from lorafleet.training.model import load_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer = load_tokenizer(TOKENIZER, None, trust_remote_code=False)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads, **ends))
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} M parameters")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lorafleet(place: Path, *words: str) -> str:
    """Run the command line as a user would; what it says beside its data is shown."""
    command: list[Any] = [Path(sys.executable).with_name("lorafleet"), *words]
    done = subprocess.run(command, cwd=place, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with code {done.returncode}")
    return done.stdout


JOB = """
name: export-bench
task: generation
model: {{model_name_or_path: "{base}", max_length: 96}}
data: {{dataset_name: "asset:aclsum", max_train_samples: 8, max_validation_samples: 4, max_test_samples: 16}}
lora: {{lora_target_modules: [c_attn]}}
train: {{max_steps: 2, per_device_train_batch_size: 4}}
tracking: {{mode: disabled}}
evaluate: {{sample_rows: 0}}
export: {{rows: 16, parity: {gates}}}
"""


if __name__ == "__main__":
    main()
