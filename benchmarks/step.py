"""Compare our training step with HF Trainer + PEFT, and measure what its parts save.

    python -m benchmarks.step [--steps 12] [--pairs 5] [--only trainer|loss|full|padding]

The measure is real tokens per CPU-second: one thread, process CPU time, the two sides in turn (A
B B A ...), medians.
Fixed length: every row has 32 tokens, and both sides make the same batches.
Mixed: real rows in random order for both; ours may group a stretch of steps by length.
Padding: our own step on real rows of mixed length, grouped against random order, and the gain
that the padding share promises.
Loss: chunked against plain cross-entropy behind a frozen head, 2,048 tokens and a vocabulary of
49,152.
Full: a LoRA step against a step of full fine-tuning on the same rows of 128 and 512 tokens, with
and without the model's own dropout.
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

from benchmarks.peer import describe_machine, make_trainer
from lorafleet.cluster.fetch import fetch_job
from lorafleet.evaluation.tokens import Split, TokenData
from lorafleet.jobs.loading.job_file import load_job
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.schedule import Schedule
from lorafleet.training.data import BatchPlan, prepare_tokens
from lorafleet.training.loss import ChunkedNll
from lorafleet.training.meter import get_peak_memory_gib, reset_peak_memory
from lorafleet.training.model import Base, load_base
from lorafleet.training.session import TrainingSession

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Run the selected benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", choices=["trainer", "loss", "full", "padding"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine())
    if arguments.only in (None, "loss"):
        compare_losses(arguments.pairs)
    if arguments.only in (None, "full"):
        compare_lora_to_full(arguments.pairs)
    if arguments.only in (None, "padding"):
        compare_padding(arguments.pairs)
    if arguments.only in (None, "trainer"):
        compare_to_trainer(arguments)


def compare_to_trainer(arguments: argparse.Namespace) -> None:
    """Compare with HF Trainer + PEFT at fixed and mixed lengths."""
    job = load_job(
        ROOT / "examples" / "quickstart.yaml", ("train.learning_rate=1e-3", "train.max_steps=1000")
    ).job
    fetch_job(job, print)
    data = prepare_tokens(job)
    base = load_base(job, len(data.labels), torch.device("cpu"))
    steps, batch = arguments.steps, job.train.per_device_train_batch_size
    # our batch plan groups 32 steps at a time: with 32 steps both sides see the same rows
    fixed = _cut_to_length(data, 32)
    compare("fixed length (32 tokens)", job, fixed, base, steps, arguments.pairs, grouped=False)
    compare("mixed lengths (real rows)", job, data, base, 32, arguments.pairs, grouped=True)
    print(f"batch {batch}, LoRA r {job.lora.lora_r} on {job.lora.lora_target_modules}, MiniLM")


def _cut_to_length(data: TokenData, length: int) -> TokenData:
    """Return the first rows of at least `length` tokens, cut to that length."""
    split = data.splits["train"]
    rows = np.flatnonzero(split.lengths >= length)[:1024]
    ids = np.concatenate(
        [split.ids[split.starts[row] : split.starts[row] + length] for row in rows]
    )
    cut = Split.from_classes(
        ids, np.arange(len(rows) + 1) * length, np.asarray(split.targets[rows])
    )
    return replace(data, splits=data.splits | {"train": cut})


def measure_lorafleet(
    job: JobSpec, data: TokenData, base: Base, steps: int, *, grouped: bool
) -> float:
    """Return our real tokens per CPU-second, after one warm-up step."""
    job = job.model_copy(
        update={"train": job.train.model_copy(update={"group_by_length": grouped})}
    )
    batch = job.train.compute_effective_batch_size(1)
    session = TrainingSession.build(
        job, base, data, Schedule(steps + 1, batch, 1, (), (steps + 1,), (1,))
    )
    session.advance(1)
    tokens_before, started = session.meter.tokens, time.process_time()
    session.advance(steps + 1)
    seconds = time.process_time() - started
    session.close()
    return (session.meter.tokens - tokens_before) / seconds


def measure_trainer(job: JobSpec, data: TokenData, steps: int, **arguments: object) -> float:
    """Return HF Trainer's real tokens per CPU-second on the same rows.

    The rows keep the random order that they have without grouping.
    """
    from transformers import TrainerCallback

    plan = BatchPlan(
        data.splits["train"].lengths,
        job.train.compute_effective_batch_size(1),
        job.train.seed,
        grouped=False,
    )
    order = np.concatenate([plan.select_rows(step) for step in range(steps + 1)])
    marks: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            marks.append((time.process_time(), state.global_step))

    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(job, data, order, steps + 1, Path(scratch), **arguments)
        trainer.add_callback(Clock())
        trainer.train()
    batch = job.train.per_device_train_batch_size
    tokens = int(data.splits["train"].lengths[order[batch:]].sum())
    return tokens / (marks[-1][0] - marks[0][0])


def compare(
    title: str, job: JobSpec, data: TokenData, base: Base, steps: int, pairs: int, *, grouped: bool
) -> None:
    """Measure both sides in turn, and print the ratio of their medians."""
    rates_by_side: dict[str, list[float]] = {"ours": [], "HF Trainer + PEFT": []}
    if grouped:
        rates_by_side["HF Trainer + PEFT, group_by_length"] = []
    for pair in range(pairs):
        sides = list(rates_by_side) if pair % 2 == 0 else list(rates_by_side)[::-1]
        for side in sides:
            if side == "ours":
                rate = measure_lorafleet(job, data, base, steps, grouped=grouped)
            elif side.endswith("group_by_length"):
                rate = measure_trainer(job, data, steps, train_sampling_strategy="group_by_length")
            else:
                rate = measure_trainer(job, data, steps)
            rates_by_side[side].append(rate)
    lorafleet_median = statistics.median(rates_by_side["ours"])
    print(f"\n{title}: real tokens per CPU-second, median of {pairs}, {steps} steps")
    for side, rates in rates_by_side.items():
        side_median = statistics.median(rates)
        print(
            f"  {side:<36} {side_median:8.0f}  ({min(rates):.0f} to {max(rates):.0f})  ours / it = "
            f"{lorafleet_median / side_median:.2f}"
        )


def compare_padding(pairs: int) -> None:
    """Compare grouping by length with random order, on the same rows and the same model."""
    job = load_job(
        ROOT / "examples" / "quickstart.yaml", ("train.learning_rate=1e-3", "train.max_steps=1000")
    ).job
    fetch_job(job, print)
    data = prepare_tokens(job)
    base = load_base(job, len(data.labels), torch.device("cpu"))
    rates: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(pairs):
        for grouped in (True, False) if pair % 2 == 0 else (False, True):
            rates[grouped].append(measure_lorafleet(job, data, base, 32, grouped=grouped))
    shares = {grouped: _compute_padding_share(job, data, 33, grouped=grouped) for grouped in rates}
    ratio = statistics.median(rates[True]) / statistics.median(rates[False])
    print(
        f"\nrows of mixed length, our own step, median of {pairs}: grouped "
        f"{statistics.median(rates[True]):.0f} real tokens per CPU-second ({shares[True]:.0%} "
        f"padding), random order {statistics.median(rates[False]):.0f} ({shares[False]:.0%}): "
        f"{ratio:.2f}; 0.9 / (1 - padding share) = {0.9 / (1 - shares[False]):.2f}"
    )


def _compute_padding_share(job: JobSpec, data: TokenData, steps: int, *, grouped: bool) -> float:
    """Return the share of padding tokens in the batches of the first `steps` steps."""
    lengths = data.splits["train"].lengths
    batch = job.train.compute_effective_batch_size(1)
    plan = BatchPlan(lengths, batch, job.train.seed, grouped=grouped)
    batches = [lengths[plan.select_rows(step)] for step in range(steps)]
    return 1 - sum(int(batch_lengths.sum()) for batch_lengths in batches) / sum(
        int(batch_lengths.max()) * len(batch_lengths) for batch_lengths in batches
    )


def compare_losses(pairs: int) -> None:
    """Measure CPU seconds and peak memory of a loss and its gradient, chunked and plain."""
    torch.manual_seed(0)
    hidden, head = torch.randn(2048, 576, requires_grad=True), torch.randn(49152, 576) / 24
    targets = torch.randint(0, 49152, (2048,))

    def compute_plain() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="sum")

    def compute_chunked() -> torch.Tensor:
        return ChunkedNll.apply(hidden, head, targets).sum()

    device = torch.device("cpu")
    seconds: dict[str, list[float]] = {"chunked": [], "plain": []}
    peaks: dict[str, list[float]] = {"chunked": [], "plain": []}
    gradients = {}
    for pair in range(pairs):
        for name, side in list({"chunked": compute_chunked, "plain": compute_plain}.items())[
            :: 1 if pair % 2 == 0 else -1
        ]:
            reset_peak_memory(device)
            memory_before, started = get_peak_memory_gib(device), time.process_time()
            (gradients[name],) = torch.autograd.grad(side(), hidden)
            seconds[name].append(time.process_time() - started)
            peaks[name].append(get_peak_memory_gib(device) - memory_before)
    difference = (gradients["chunked"] - gradients["plain"]).abs().max() / gradients[
        "plain"
    ].abs().max()
    print(
        f"\nloss of 2,048 tokens x 49,152 words, median of {pairs} (gradients apart by "
        f"{difference:.1e} of the largest)"
    )
    for name in seconds:
        median_seconds, median_peak = (
            statistics.median(seconds[name]),
            statistics.median(peaks[name]),
        )
        print(
            f"  {name:<10} {median_seconds:6.2f} CPU-s  {1024 * median_peak:6.0f} MiB above the "
            "inputs"
        )
    time_ratio = statistics.median(seconds["plain"]) / statistics.median(seconds["chunked"])
    memory_ratio = statistics.median(peaks["plain"]) / statistics.median(peaks["chunked"])
    print(f"  plain / chunked: {time_ratio:.2f}x the time, {memory_ratio:.1f}x the memory")


def compare_lora_to_full(pairs: int) -> None:
    """Measure CPU seconds per step of LoRA and of full fine-tuning."""
    job = load_job(
        ROOT / "examples" / "quickstart.yaml", ("train.learning_rate=1e-3", "model.max_length=512")
    ).job
    fetch_job(job, print)
    data = prepare_tokens(job)
    for length, dropout in ((128, True), (128, False), (512, True), (512, False)):
        rows = 2048 // length
        train = job.train.model_copy(update={"per_device_train_batch_size": rows})
        fixed = _make_fixed_rows(data, length)
        spent: dict[str, list[float]] = {"lora": [], "full": []}
        for pair in range(pairs):
            for method in ("lora", "full")[:: 1 if pair % 2 == 0 else -1]:
                update = {
                    "train": train,
                    "method": method,
                    "lora": job.lora.model_copy(update={"lora_alpha": 16}),
                }
                method_job = job.model_copy(update=update)
                base = load_base(method_job, len(data.labels), torch.device("cpu"))
                if not dropout:
                    _disable_dropout(base)
                session = TrainingSession.build(
                    method_job, base, fixed, Schedule(5, rows, 1, (), (5,), (1,))
                )
                session.advance(1)
                started = time.process_time()
                session.advance(4)
                spent[method].append((time.process_time() - started) / 3)
                session.close()
        medians = {method: statistics.median(seconds) for method, seconds in spent.items()}
        model_text = "MiniLM" if dropout else "MiniLM without its own dropout, as decoders are"
        print(
            f"\nstep of {rows} rows of {length} tokens, {model_text}, median of {pairs}: LoRA "
            f"{medians['lora']:.2f} CPU-s, full {medians['full']:.2f}: LoRA / full = "
            f"{medians['lora'] / medians['full']:.2f}"
        )


def _disable_dropout(base: Base) -> None:
    """Set every dropout module's rate to 0.

    Drawing BERT's dropout masks costs both sides the same, and is a larger share of a step with
    fewer tokens.
    """
    for module in base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def _make_fixed_rows(data: TokenData, length: int) -> TokenData:
    """Return rows of exactly `length` tokens, cut from the texts laid end to end."""
    split = data.splits["train"]
    rows = min(256, len(split.ids) // length)
    cut = Split.from_texts(np.asarray(split.ids[: rows * length]), np.arange(rows + 1) * length)
    return replace(data, splits=data.splits | {"train": cut})


if __name__ == "__main__":
    main()
