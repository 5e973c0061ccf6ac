"""Compare trials that are trained together on one base with the same trials one at a time.

    python -m benchmarks.packed [--rounds 5] [--only speed|memory|refill|many]

Speed: real tokens per CPU-second of eight LoRA trials on a Llama of 4 layers of 512, one thread,
the two sides in turn (A B B A ...), medians; one at a time on a base that stays loaded. The largest
gap of their losses is measured in the same run.
Memory: PSS of eight processes with a trial each, and of one process with eight packed trials, on
SmolLM2-135M that was read into memory (not mapped), LoRA r 8 on all linear layers.
Refill: time from the end of a trial to the first micro-batch of the next one, in micro-batches.
Many: sixteen adapters of SmolLM2-135M at once.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.peer import describe_machine
from lorafleet.cluster.fetch import fetch_job
from lorafleet.evaluation.tokens import Split, TokenData
from lorafleet.jobs.loading.job_file import load_job
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.schedule import Schedule
from lorafleet.training.cpu import set_up_cpu
from lorafleet.training.data import prepare_tokens
from lorafleet.training.model import Base, load_base, resolve_safetensors_folder
from lorafleet.training.packed.group import PackedGroup
from lorafleet.training.packed.speeds import TrialSample, measure_together
from lorafleet.training.session import TrainingSession

ROOT = Path(__file__).parent.parent
SLOTS = 8
SHAPES = {16: (1, 16), 64: (1, 64), 256: (4, 64), 1024: (16, 64)}
"""Tokens of a trial's micro-batch -> its rows, and the tokens of each."""
CPU = torch.device("cpu")
SMOLLM2 = (
    "train.learning_rate=1e-3",
    "lora.lora_r=8",
    "train.per_device_train_batch_size=1",
    "train.max_steps=1000",
)


def main() -> None:
    """Run the selected benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=["speed", "memory", "refill", "many"])
    parser.add_argument("--one-trial", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--trials", type=int, default=SLOTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    set_up_cpu(1)
    if arguments.one_trial:
        hold_trials(arguments.trials)
        return
    print(describe_machine())
    parts: dict[str, Callable[[], None]] = {
        "speed": lambda: compare_speeds(arguments.rounds, arguments.steps),
        "memory": compare_memory,
        "refill": measure_refill,
        "many": measure_many,
    }
    for name, run in parts.items():
        if arguments.only in (None, name):
            run()


# ---- speed ----


def compare_speeds(rounds: int, steps: int) -> None:
    """Compare tokens per CPU-second at each micro-batch size."""
    with tempfile.TemporaryDirectory() as folder:
        job, data = _make_job(Path(folder))
        base = load_base(job, 0, CPU)
        print(
            f"\n{SLOTS} trials of {base.parameters / 1e6:.0f} M parameters, LoRA r 8 on all linear "
            f"layers: real tokens per CPU-second, median of {rounds}"
        )
        print("tokens  in a pass  one at a time      packed  ratio  largest gap of a loss")
        for tokens, (rows, length) in SHAPES.items():
            _compare_at(job, data, base, tokens, rows, length, rounds, steps)


def _compare_at(
    job: JobSpec,
    data: TokenData,
    base: Base,
    tokens: int,
    rows: int,
    length: int,
    rounds: int,
    steps: int,
) -> None:
    jobs = [
        job.model_copy(
            update={
                "train": job.train.model_copy(
                    update={
                        "per_device_train_batch_size": rows,
                        "learning_rate": 1e-4 * (slot + 1),
                        "seed": slot,
                    }
                )
            }
        )
        for slot in range(SLOTS)
    ]
    fixed = _cut_rows(data, length)
    schedule = Schedule(rounds * steps + 1, rows, 1, (), (rounds * steps + 1,), (1,))
    sample = TrialSample(base, fixed, jobs[0], schedule)
    speeds = measure_together(sample, SLOTS, 8, 1)
    per_pass = max(speeds, key=lambda count: (speeds[count] >= 1.03 * speeds[1], speeds[count]))
    per_pass = 1 if speeds[per_pass] < 1.03 * speeds[1] else per_pass
    alone, losses_alone = _train_alone(jobs, base, fixed, schedule, rounds, steps)
    packed, losses_packed = _train_packed(jobs, base, fixed, schedule, per_pass, rounds, steps)
    rates = (statistics.median(alone), statistics.median(packed))
    gap = float(np.max(np.abs(losses_packed - losses_alone) / np.abs(losses_alone)))
    print(
        f"{tokens:>6}  {per_pass:>9}  {rates[0]:>13.0f}  {rates[1]:>10.0f}  "
        f"{rates[1] / rates[0]:>5.2f}  {gap:.1e}"
    )


def _train_alone(
    jobs: list[JobSpec],
    base: Base,
    data: TokenData,
    schedule: Schedule,
    rounds: int,
    steps: int,
) -> tuple[list[float], np.ndarray]:
    """Return the tokens per CPU-second of each round, and the losses, slots x steps."""
    rates, losses = [], []
    for number, job in enumerate(jobs):
        session = TrainingSession.build(job, base, data, schedule)
        session.advance(1)
        of_trial = []
        for _ in range(rounds):
            before, started = session.meter.tokens, time.process_time()
            for _ in range(steps):
                session.reset_loss()
                of_trial.append(session.advance(session.step + 1)["train_loss"])
            if number == 0 or number == len(jobs) - 1:
                spent = time.process_time() - started
                rates.append((session.meter.tokens - before) / spent)
        losses.append(of_trial)
        session.close()
    return rates, np.array(losses)


def _train_packed(
    jobs: list[JobSpec],
    base: Base,
    data: TokenData,
    schedule: Schedule,
    per_pass: int,
    rounds: int,
    steps: int,
) -> tuple[list[float], np.ndarray]:
    """Return the same for trials that are trained together."""
    group = PackedGroup(base, data, SLOTS, 8, per_pass)
    for slot, job in enumerate(jobs):
        group.enter(slot, job, schedule)
    _run_steps(group, 1)
    rates = []
    losses: list[list[float]] = [[] for _ in jobs]
    for _ in range(rounds):
        before = sum(trial.meter.tokens for trial in group.slots.values())
        started = time.process_time()
        _run_steps(group, steps, losses)
        tokens = sum(trial.meter.tokens for trial in group.slots.values()) - before
        rates.append(tokens / (time.process_time() - started))
    group.close()
    return rates, np.array(losses)


def _run_steps(group: PackedGroup, steps: int, losses: list[list[float]] | None = None) -> None:
    for trial in group.slots.values():
        trial.reset_loss()
    ends = {slot: trial.step + steps for slot, trial in group.slots.items()}
    while any(group.slots[slot].step < end for slot, end in ends.items()):
        for slot in group.run_micro_batch():
            trial = group.slots[slot]
            if losses is not None:
                losses[slot].append(trial.loss_sum / trial.targets)
            trial.reset_loss()


def _make_job(folder: Path) -> tuple[JobSpec, TokenData]:
    """Return a job on a Llama of random weights, and real texts in SmolLM2's tokens."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    job = load_job(ROOT / "examples" / "instruct-smollm2.yaml", SMOLLM2).job
    job = job.model_copy(update={"search": None})
    fetch_job(job, print)
    data = prepare_tokens(job)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    source = resolve_safetensors_folder(job.model.model_name_or_path, job.model.revision)
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder)
    model = job.model.model_copy(update={"model_name_or_path": str(folder)})
    lora = job.lora.model_copy(update={"lora_alpha": 16})
    return job.model_copy(update={"model": model, "lora": lora}), data


def _cut_rows(data: TokenData, length: int) -> TokenData:
    """Return rows of exactly `length` tokens, cut from the texts laid end to end."""
    ids = np.asarray(data.splits["train"].ids) % 8192
    rows = min(512, len(ids) // length)
    cut = Split.from_texts(ids[: rows * length], np.arange(rows + 1) * length)
    return replace(data, splits=data.splits | {"train": cut})


# ---- memory ----


def compare_memory() -> None:
    """Compare the PSS of eight processes with a trial each with that of eight packed trials."""
    alone = _measure_pss(SLOTS, 1)
    packed = _measure_pss(1, SLOTS)
    print(
        f"\nPSS, SmolLM2-135M, LoRA r 8: {SLOTS} processes {alone:.2f} GiB, one process with "
        f"{SLOTS} trials {packed:.2f} GiB, ratio {alone / packed:.1f}"
    )


def _measure_pss(processes: int, trials: int) -> float:
    """Return the PSS of processes while all of them hold trials that have been trained, in GiB."""
    command = [sys.executable, "-m", "benchmarks.packed", "--one-trial", "--trials", str(trials)]
    children = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(processes)
    ]
    for child in children:
        assert child.stdout is not None
        while "ready" not in child.stdout.readline():
            pass
    total = sum(_read_pss(child.pid) for child in children)
    for child in children:
        child.communicate("\n")
    return total


def _read_pss(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 2**20


def hold_trials(trials: int) -> None:
    """Train some steps of trials on SmolLM2, and keep them until a line comes in."""
    job, data, base = _load_smollm2()
    _copy_weights(base)
    schedule = Schedule(100, 1, 1, (), (100,), (1,))
    if trials == 1:
        session = TrainingSession.build(job, base, data, schedule)
        session.advance(3)
    else:
        group = _fill_group(job, data, base, schedule, trials)
        _run_steps(group, 3)
    print("ready", flush=True)
    sys.stdin.readline()


def _copy_weights(base: Base) -> None:
    """Read the weights into memory of this process: mapped files are shared with others."""
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.data = parameter.data.clone()


def _load_smollm2() -> tuple[JobSpec, TokenData, Base]:
    job = load_job(ROOT / "examples" / "instruct-smollm2.yaml", SMOLLM2).job
    job = job.model_copy(update={"search": None})
    data = prepare_tokens(job)
    return job, _cut_rows_of_smollm2(data), load_base(job, 0, CPU)


def _cut_rows_of_smollm2(data: TokenData) -> TokenData:
    ids = np.asarray(data.splits["train"].ids)
    rows = min(256, len(ids) // 64)
    cut = Split.from_texts(ids[: rows * 64], np.arange(rows + 1) * 64)
    return replace(data, splits=data.splits | {"train": cut})


def _fill_group(
    job: JobSpec, data: TokenData, base: Base, schedule: Schedule, trials: int
) -> PackedGroup:
    group = PackedGroup(base, data, trials, 8)
    for slot in range(trials):
        group.enter(slot, job, schedule)
    return group


# ---- slots ----


def measure_refill() -> None:
    """Measure the time between the last micro-batch of a trial and the first of its successor."""
    job, data, base = _load_smollm2()
    schedule = Schedule(100, 1, 1, (), (100,), (1,))
    group = _fill_group(job, data, base, schedule, 4)
    _run_steps(group, 3)
    started = time.perf_counter()
    _run_steps(group, 4)
    micro_batch = (time.perf_counter() - started) / 4
    seconds = []
    for slot in range(4):
        started = time.perf_counter()
        group.leave(slot)
        group.enter(slot, job, schedule)
        seconds.append(time.perf_counter() - started)
        trained = group.run_micro_batch()
        assert slot in trained
    group.close()
    refill = statistics.median(seconds)
    print(
        f"\nrefill of one of 4 slots: {refill:.2f} s, {refill / micro_batch:.2f} of a micro-batch "
        f"of {micro_batch:.2f} s; the next micro-batch trains the new trial"
    )


def measure_many() -> None:
    """Train sixteen adapters of SmolLM2 at once, and print the memory."""
    job, data, base = _load_smollm2()
    group = _fill_group(job, data, base, Schedule(100, 1, 1, (), (100,), (1,)), 16)
    started = time.perf_counter()
    _run_steps(group, 2)
    seconds = (time.perf_counter() - started) / 2
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20
    print(f"\n16 adapters of SmolLM2-135M at once: peak {peak:.1f} GiB, {seconds:.1f} s a step")
    group.close()


if __name__ == "__main__":
    main()
