"""Measure the time from starting a program to its first gradient: `lorafleet train`, TRL's trainer.

    python -m benchmarks.first_gradient [--rounds 5]

Both fine-tune SmolLM2-135M-Instruct with LoRA r 8 on all linear layers, on the same 200 rows with
masked prompts, cut to 128 tokens, 4 rows a step, with all cores. The baseline is the script that a
user of TRL would write. Every round starts both in new processes, in turn; the table has medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.peer import describe_machine
from lorafleet.cluster.fetch import fetch_job
from lorafleet.jobs.data.hub import get_model_folder
from lorafleet.jobs.data.rows import load_rows
from lorafleet.jobs.loading.job_file import load_job
from lorafleet.training.model import resolve_safetensors_folder

ROOT = Path(__file__).parent.parent
ROWS = 200
JOB = """
name: first-gradient
task: generation
model: {model_name_or_path: MODEL, max_length: 128}
data: {train_file: rows.jsonl, validation_fraction: 0.02, test_fraction: 0.02}
method: lora
lora: {lora_r: 8, lora_alpha: 16, lora_dropout: 0.0, lora_target_modules: all-linear}
train: {max_steps: 1, per_device_train_batch_size: 4, learning_rate: 1e-3}
tracking: {mode: disabled}
"""
TRL = """
import sys, time
from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

class FirstGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        print("first gradient", time.time())

arguments = SFTConfig(
    output_dir="out", max_steps=1, per_device_train_batch_size=4, learning_rate=1e-3,
    max_length=128, completion_only_loss=True, report_to="none", save_strategy="no",
    disable_tqdm=True, gradient_checkpointing=False, bf16=False,
)
trainer = SFTTrainer(
    model=MODEL, args=arguments, callbacks=[FirstGradient()],
    train_dataset=load_dataset("json", data_files="rows.jsonl", split="train"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
"""


def measure_lorafleet(folder: Path) -> float:
    """Return the seconds from the start of `lorafleet train` to the first gradient."""
    lorafleet = str(Path(sys.executable).with_name("lorafleet"))
    started = time.time()
    command = [lorafleet, "train", "job.yaml", "--quiet", "--runs", f"runs-{started}"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    (metrics,) = folder.glob(f"runs-{started}/*/trials/*/metrics.jsonl")
    return float(json.loads(metrics.read_text().splitlines()[-1])["first_gradient_at"]) - started


def measure_trl(folder: Path) -> float:
    """Return the seconds from the start of the script to the first gradient."""
    started = time.time()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"cache-{started}"}
    done = subprocess.run(
        [sys.executable, "trl_script.py"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("first gradient"))
    return float(line.split()[-1]) - started


def main() -> None:
    """Run the benchmark and print medians, ranges and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    source = load_job(ROOT / "examples" / "instruct-smollm2.yaml", ()).job
    fetch_job(source, print)
    model = str(resolve_safetensors_folder(source.model.model_name_or_path, None))
    print(describe_machine(), "| model:", get_model_folder(source.model.model_name_or_path, None))
    seconds: dict[str, list[float]] = {"lorafleet train": [], "TRL SFTTrainer": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = list(load_rows(source).train)[:ROWS]
        lines = [json.dumps({"prompt": row.prompt, "completion": row.reference}) for row in rows]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "job.yaml").write_text(JOB.replace("MODEL", model))
        (folder / "trl_script.py").write_text(TRL.replace("MODEL", repr(model)))
        # One more round at the start fills caches of files on both sides, and is left out.
        for number in range(options.rounds + 1):
            sides = {"lorafleet train": measure_lorafleet, "TRL SFTTrainer": measure_trl}
            for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                seconds[name].append(sides[name](folder))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:16} {medians[name]:6.2f} s ({min(values[1:]):.2f} to {max(values[1:]):.2f})")
    print(f"ratio {medians['lorafleet train'] / medians['TRL SFTTrainer']:.2f}")


if __name__ == "__main__":
    main()
