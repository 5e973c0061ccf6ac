"""Real tokens per CPU-second of our training step beside HF Trainer + PEFT, on the same rows; and what its parts save.

    python -m benchmarks.step [--steps 12] [--pairs 5] [--only trainer|loss|full|padding]

One thread, process CPU time, the two sides in turn (A B B A ...), medians. Fixed length: every row has 32 tokens, both
sides make the same batches. Mixed: real rows in random order for both; ours may group the stretch by length.
Padding: our own step on real rows of mixed length, grouped beside random order, and what the padding share promises.
Loss: chunked beside plain cross-entropy behind a frozen head, 2,048 tokens and a vocabulary of 49,152.
Full: a LoRA step beside a step of full fine-tuning on the same rows, of 128 and 512 tokens, with and without the
model's own dropout.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lorafleet.cluster.fetch import fetch_job
from lorafleet.evaluation.tokens import Split, TokenData
from lorafleet.jobs.loading.job_file import load_job
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.schedule import Schedule
from lorafleet.training.data import BatchPlan, prepare
from lorafleet.training.loss import ChunkedNll
from lorafleet.training.meter import peak_memory_gib, reset_peak_memory
from lorafleet.training.model import Base, load_base
from lorafleet.training.session import TrainingSession

from benchmarks.peer import machine_line, trainer_for

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", choices=["trainer", "loss", "full", "padding"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine_line())
    if arguments.only in (None, "loss"):
        losses(arguments.pairs)
    if arguments.only in (None, "full"):
        lora_and_full(arguments.pairs)
    if arguments.only in (None, "padding"):
        padding(arguments.pairs)
    if arguments.only in (None, "trainer"):
        beside_trainer(arguments)


def beside_trainer(arguments: argparse.Namespace) -> None:
    """Fixed and mixed lengths, beside HF Trainer + PEFT."""
    job = load_job(ROOT / "examples" / "quickstart.yaml", ("train.learning_rate=1e-3", "train.max_steps=1000")).job
    fetch_job(job, print)
    data = prepare(job)
    base = load_base(job, len(data.labels), torch.device("cpu"))
    steps, batch = arguments.steps, job.train.per_device_train_batch_size
    # 32 steps are a stretch of our plan: both sides see the same stretch's rows
    fixed = _fixed(data, 32)
    compare("fixed length (32 tokens)", job, fixed, base, steps, arguments.pairs, grouped=False)
    compare("mixed lengths (real rows)", job, data, base, 32, arguments.pairs, grouped=True)
    print(f"batch {batch}, LoRA r {job.lora.lora_r} on {job.lora.lora_target_modules}, MiniLM")


def _fixed(data: TokenData, length: int) -> TokenData:
    """The first rows of at least `length` tokens, cut to it."""
    split = data.splits["train"]
    rows = np.flatnonzero(split.lengths >= length)[:1024]
    ids = np.concatenate([split.ids[split.starts[row] : split.starts[row] + length] for row in rows])
    cut = Split.of_classes(ids, np.arange(len(rows) + 1) * length, np.asarray(split.targets[rows]))
    return replace(data, splits=data.splits | {"train": cut})


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


def padding(pairs: int) -> None:
    """Grouping by length beside random order, on the same rows of the same session."""
    job = load_job(ROOT / "examples" / "quickstart.yaml", ("train.learning_rate=1e-3", "train.max_steps=1000")).job
    fetch_job(job, print)
    data = prepare(job)
    base = load_base(job, len(data.labels), torch.device("cpu"))
    rates: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(pairs):
        for grouped in (True, False) if pair % 2 == 0 else (False, True):
            rates[grouped].append(ours(job, data, base, 32, grouped=grouped))
    shares = {grouped: _padding_share(job, data, 33, grouped=grouped) for grouped in rates}
    ratio = statistics.median(rates[True]) / statistics.median(rates[False])
    print(
        f"\nrows of mixed length, our own step, median of {pairs}: grouped {statistics.median(rates[True]):.0f} real "
        f"tokens per CPU-second ({shares[True]:.0%} padding), random order {statistics.median(rates[False]):.0f} "
        f"({shares[False]:.0%}): {ratio:.2f}; 0.9 / (1 - padding share) = {0.9 / (1 - shares[False]):.2f}"
    )


def _padding_share(job: JobSpec, data: TokenData, steps: int, *, grouped: bool) -> float:
    lengths = data.splits["train"].lengths
    batch = job.train.effective_batch_size(1)
    plan = BatchPlan(lengths, batch, job.train.seed, grouped=grouped)
    taken = [lengths[plan.rows(step)] for step in range(steps)]
    return 1 - sum(int(own.sum()) for own in taken) / sum(int(own.max()) * len(own) for own in taken)


def losses(pairs: int) -> None:
    """CPU seconds and peak memory of a loss and its gradient, chunked and plain."""
    torch.manual_seed(0)
    hidden, head = torch.randn(2048, 576, requires_grad=True), torch.randn(49152, 576) / 24
    targets = torch.randint(0, 49152, (2048,))

    def plain() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="sum")

    def chunked() -> torch.Tensor:
        return ChunkedNll.apply(hidden, head, targets).sum()

    device = torch.device("cpu")
    seconds: dict[str, list[float]] = {"chunked": [], "plain": []}
    peaks: dict[str, list[float]] = {"chunked": [], "plain": []}
    gradients = {}
    for pair in range(pairs):
        for name, side in list({"chunked": chunked, "plain": plain}.items())[:: 1 if pair % 2 == 0 else -1]:
            reset_peak_memory(device)
            before, began = peak_memory_gib(device), time.process_time()
            (gradients[name],) = torch.autograd.grad(side(), hidden)
            seconds[name].append(time.process_time() - began)
            peaks[name].append(peak_memory_gib(device) - before)
    apart = (gradients["chunked"] - gradients["plain"]).abs().max() / gradients["plain"].abs().max()
    print(f"\nloss of 2,048 tokens x 49,152 words, median of {pairs} (gradients apart by {apart:.1e} of the largest)")
    for name in seconds:
        spent, peak = statistics.median(seconds[name]), statistics.median(peaks[name])
        print(f"  {name:<10} {spent:6.2f} CPU-s  {1024 * peak:6.0f} MiB above the inputs")
    faster = statistics.median(seconds["plain"]) / statistics.median(seconds["chunked"])
    smaller = statistics.median(peaks["plain"]) / statistics.median(peaks["chunked"])
    print(f"  plain / chunked: {faster:.2f}x the time, {smaller:.1f}x the memory")


def lora_and_full(pairs: int) -> None:
    """CPU seconds of a step of LoRA beside one of full fine-tuning."""
    job = load_job(ROOT / "examples" / "quickstart.yaml", ("train.learning_rate=1e-3", "model.max_length=512")).job
    fetch_job(job, print)
    data = prepare(job)
    for length, dropout in ((128, True), (128, False), (512, True), (512, False)):
        rows = 2048 // length
        train = job.train.model_copy(update={"per_device_train_batch_size": rows})
        fixed = _repeated(data, length)
        spent: dict[str, list[float]] = {"lora": [], "full": []}
        for pair in range(pairs):
            for method in ("lora", "full")[:: 1 if pair % 2 == 0 else -1]:
                update = {"train": train, "method": method, "lora": job.lora.model_copy(update={"lora_alpha": 16})}
                own = job.model_copy(update=update)
                base = load_base(own, len(data.labels), torch.device("cpu"))
                if not dropout:
                    _without_dropout(base)
                session = TrainingSession.build(own, base, fixed, Schedule(5, rows, 1, (), (5,), (1,)))
                session.advance(1)
                began = time.process_time()
                session.advance(4)
                spent[method].append((time.process_time() - began) / 3)
                session.close()
        middle = {method: statistics.median(seconds) for method, seconds in spent.items()}
        kind = "MiniLM" if dropout else "MiniLM without its own dropout, as decoders are"
        print(
            f"\nstep of {rows} rows of {length} tokens, {kind}, median of {pairs}: LoRA {middle['lora']:.2f} CPU-s, "
            f"full {middle['full']:.2f}: LoRA / full = {middle['lora'] / middle['full']:.2f}"
        )


def _without_dropout(base: Base) -> None:
    """Drawing BERT's masks costs both sides alike, and the more of the step the fewer tokens there are."""
    for module in base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def _repeated(data: TokenData, length: int) -> TokenData:
    """Rows of exactly `length` tokens, from the text end to end."""
    split = data.splits["train"]
    rows = min(256, len(split.ids) // length)
    cut = Split.of_texts(np.asarray(split.ids[: rows * length]), np.arange(rows + 1) * length)
    return replace(data, splits=data.splits | {"train": cut})


if __name__ == "__main__":
    main()
