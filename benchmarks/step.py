"""Real tokens per CPU-second of our training step beside HF Trainer + PEFT, on the same rows.

    python -m benchmarks.step [--steps 12] [--pairs 5]

One thread, process CPU time, the two sides in turn (A B B A ...), medians. Fixed length: every row has 32 tokens, both
sides make the same batches. Mixed: real rows in random order for both; ours may group the stretch by length.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.peer import machine_line, trainer_for
from cluster.fetch import fetch_job
from jobs.load import load_job
from jobs.schedule import Schedule
from jobs.spec import JobSpec
from training.data import BatchPlan, Split, TokenData, prepare
from training.model import Base, load_base
from training.session import TrainingSession

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    job = load_job(ROOT / "examples" / "quickstart.yaml", ("train.learning_rate=1e-3", "train.max_steps=1000")).job
    fetch_job(job, print)
    data = prepare(job)
    torch.set_num_threads(1)
    print(machine_line())
    base = load_base(job, len(data.labels), torch.device("cpu"))
    steps, batch = arguments.steps, job.train.per_device_train_batch_size
    # 32 steps are a stretch of our plan: both sides see the same stretch's rows
    fixed = _fixed(data, 32)
    compare("fixed length (32 tokens)", job, fixed, base, steps, arguments.pairs, grouped=False)
    for steps_ in (32,):
        compare("mixed lengths (real rows)", job, data, base, steps_, arguments.pairs, grouped=True)
    print(f"batch {batch}, LoRA r {job.lora.lora_r} on {job.lora.lora_target_modules}, MiniLM")


def _fixed(data: TokenData, length: int) -> TokenData:
    """The first rows of at least `length` tokens, cut to it."""
    split = data.splits["train"]
    rows = np.flatnonzero(split.lengths >= length)[:1024]
    ids = np.concatenate([split.ids[split.starts[row] : split.starts[row] + length] for row in rows])
    cut = Split(ids, np.arange(len(rows) + 1) * length, np.asarray(split.targets[rows]))
    return TokenData(data.splits | {"train": cut}, data.labels, (), False, data.pad_id, data.folder)


def ours(job: JobSpec, data: TokenData, base: Base, steps: int, *, grouped: bool) -> float:
    job = job.model_copy(update={"train": job.train.model_copy(update={"group_by_length": grouped})})
    batch = job.train.effective_batch_size(1)
    session = TrainingSession.build(job, base, data, Schedule(steps + 1, batch, 1, (), (steps + 1,), (1,)))
    session.advance(1)
    before, began = session.meter.tokens, time.process_time()
    session.advance(steps + 1)
    spent = time.process_time() - began
    session.close()
    return (session.meter.tokens - before) / spent


def theirs(job: JobSpec, data: TokenData, steps: int, **arguments: object) -> float:
    """The same rows in the random order that they have without grouping."""
    from transformers import TrainerCallback

    plan = BatchPlan(data.splits["train"].lengths, job.train.effective_batch_size(1), job.train.seed, grouped=False)
    order = np.concatenate([plan.rows(step) for step in range(steps + 1)])
    marks: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            marks.append((time.process_time(), state.global_step))

    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_for(job, data, order, steps + 1, Path(scratch), **arguments)
        trainer.add_callback(Clock())
        trainer.train()
    batch = job.train.per_device_train_batch_size
    tokens = int(data.splits["train"].lengths[order[batch:]].sum())
    return tokens / (marks[-1][0] - marks[0][0])


def compare(title: str, job: JobSpec, data: TokenData, base: Base, steps: int, pairs: int, *, grouped: bool) -> None:
    """Both sides in turn, and the ratio of their medians."""
    found: dict[str, list[float]] = {"ours": [], "HF Trainer + PEFT": []}
    if grouped:
        found["HF Trainer + PEFT, group_by_length"] = []
    for pair in range(pairs):
        sides = list(found) if pair % 2 == 0 else list(found)[::-1]
        for side in sides:
            if side == "ours":
                rate = ours(job, data, base, steps, grouped=grouped)
            elif side.endswith("group_by_length"):
                rate = theirs(job, data, steps, train_sampling_strategy="group_by_length")
            else:
                rate = theirs(job, data, steps)
            found[side].append(rate)
    mine = statistics.median(found["ours"])
    print(f"\n{title}: real tokens per CPU-second, median of {pairs}, {steps} steps")
    for side, rates in found.items():
        middle = statistics.median(rates)
        print(f"  {side:<36} {middle:8.0f}  ({min(rates):.0f} to {max(rates):.0f})  ours / it = {mine / middle:.2f}")


if __name__ == "__main__":
    main()
