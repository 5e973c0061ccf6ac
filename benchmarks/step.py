"""Compare our training step with HF Trainer + PEFT and TRL, and measure what its parts save.

    python -m benchmarks.step [--steps 12] [--pairs 5] [--only trainer|trl|loss|full|padding]

The measure is real tokens per CPU-second: one thread, process CPU time, the two sides in turn (A
B B A ...), medians.
Fixed length: every row has 32 tokens, and both sides make the same batches.
Mixed: real rows in random order for both; ours may group a stretch of steps by length.
TRL: SmolLM2 on prompts and answers, against SFTTrainer, which groups by length as ours does.
Peak: operations of a step, 4 for each weight of a matrix and each token, per CPU-second, over those
of the fastest product of two 768 x 768 matrices here.
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
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.peer import describe_machine, make_trainer
from lorafleet.cluster.fetch import fetch_job
from lorafleet.evaluation.tokens import Split, TokenData
from lorafleet.jobs.data.rows import load_rows
from lorafleet.jobs.loading.job_file import load_job
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.schedule import Schedule
from lorafleet.training.cpu import set_up_cpu
from lorafleet.training.data import BatchPlan, prepare_tokens
from lorafleet.training.loss import ChunkedNll
from lorafleet.training.meter import get_peak_memory_gib, reset_peak_memory
from lorafleet.training.model import Base, load_base, resolve_safetensors_folder
from lorafleet.training.session import TrainingSession

ROOT = Path(__file__).parent.parent
_TRL_STEPS = 8


def main() -> None:
    """Run the selected benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", choices=["trainer", "trl", "loss", "full", "padding"])
    arguments = parser.parse_args()
    print(describe_machine())  # before the products are replaced: those of the other side
    set_up_cpu(1)
    print(describe_machine())
    if arguments.only in (None, "loss"):
        compare_losses(arguments.pairs)
    if arguments.only in (None, "full"):
        compare_lora_to_full(arguments.pairs)
    if arguments.only in (None, "padding"):
        compare_padding(arguments.pairs)
    if arguments.only in (None, "trainer"):
        compare_to_trainer(arguments)
    if arguments.only in (None, "trl"):
        compare_to_trl(arguments.pairs)


def compare_to_trainer(arguments: argparse.Namespace) -> None:
    """Compare with HF Trainer + PEFT at fixed and mixed lengths."""
    job, data = _load_quickstart()
    base = load_base(job, len(data.labels), torch.device("cpu"))
    steps, batch = arguments.steps, job.train.per_device_train_batch_size
    # our batch plan groups 32 steps at a time: with 32 steps both sides see the same rows
    fixed = _cut_to_length(data, 32)
    compare("fixed length (32 tokens)", job, fixed, base, steps, arguments.pairs, grouped=False)
    compare("mixed lengths (real rows)", job, data, base, 32, arguments.pairs, grouped=True)
    print(f"batch {batch}, LoRA r {job.lora.lora_r} on {job.lora.lora_target_modules}, MiniLM")
    rates = [measure_lorafleet(job, data, base, 32, grouped=True) for _ in range(arguments.pairs)]
    print_share_of_peak("MiniLM as in the quickstart", base, statistics.median(rates))


def compare_to_trl(pairs: int) -> None:
    """Compare with TRL's SFTTrainer on SmolLM2, both grouping by length."""
    job = load_job(
        ROOT / "examples" / "instruct-smollm2.yaml",
        ("train.learning_rate=1e-3", "lora.lora_r=8", "train.max_steps=1000"),
    ).job.model_copy(update={"search": None})
    fetch_job(job, print)
    data = prepare_tokens(job)
    base = load_base(job, 0, torch.device("cpu"))
    rates: dict[str, list[float]] = {"ours": [], "TRL SFTTrainer, group_by_length": []}
    for pair in range(pairs):
        for side in list(rates)[:: 1 if pair % 2 == 0 else -1]:
            ours = side == "ours"
            rates[side].append(
                measure_lorafleet(job, data, base, _TRL_STEPS, grouped=True)
                if ours
                else measure_in_process("measure_trl()")
            )
    medians = {side: statistics.median(values) for side, values in rates.items()}
    print(f"\nSmolLM2, prompts and answers: real tokens per CPU-second, median of {pairs}")
    for side, values in rates.items():
        print(
            f"  {side:<36} {medians[side]:8.0f}  ({min(values):.0f} to {max(values):.0f})  ours / "
            f"it = {medians['ours'] / medians[side]:.2f}"
        )
    print_share_of_peak("SmolLM2", base, medians["ours"])


def measure_in_process(call: str) -> float:
    """Return the result of a call of a function of this module, in a new process.

    Its products are torch's own there, as in the program of a user of the other library.
    """
    code = f"from benchmarks import step; print('rate', step.{call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.rpartition("rate ")[2])


def measure_trl() -> float:
    """Return the real tokens per CPU-second of TRL's SFTTrainer, after one warm-up step."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    job = load_job(ROOT / "examples" / "instruct-smollm2.yaml", ("lora.lora_r=8",)).job
    rows = [{"prompt": row.prompt, "completion": row.reference} for row in load_rows(job).train]
    tokens: list[int] = []
    marks: list[float] = []

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *args):  # type: ignore[no-untyped-def]
            marks.append(time.process_time())
            tokens.append(int(inputs["attention_mask"].sum()))
            return super().training_step(model, inputs, *args)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Counting(
            model=str(resolve_safetensors_folder(job.model.model_name_or_path, None)),
            args=SFTConfig(
                output_dir=scratch,
                max_steps=_TRL_STEPS + 2,
                per_device_train_batch_size=job.train.per_device_train_batch_size,
                learning_rate=1e-3,
                max_length=job.model.max_length,
                completion_only_loss=True,
                train_sampling_strategy="group_by_length",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(
                r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.train()
    return sum(tokens[1:-1]) / (marks[-1] - marks[1])


def print_share_of_peak(name: str, base: Base, tokens_per_second: float) -> None:
    """Print the operations per CPU-second of a step, over those of the fastest product here."""
    weights = sum(
        module.weight.numel()
        for path, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in path
    )
    matrix = torch.randn(768, 768)
    matrix @ matrix
    started = time.process_time()
    for _ in range(40):
        matrix @ matrix
    peak = 40 * 2 * 768**3 / (time.process_time() - started)
    share = 4 * weights * tokens_per_second / peak
    print(
        f"  {name}: {4 * weights * tokens_per_second / 1e9:.0f} GF per CPU-second of a peak of "
        f"{peak / 1e9:.0f} ({weights / 1e6:.1f} M weights of matrices): {share:.2f}"
    )


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


def measure_trainer_side(steps: int, *, fixed: bool = False, by_length: bool = False) -> float:
    """Return HF Trainer's rate with the quickstart's model, on one thread.

    Args:
        fixed: Use rows of 32 tokens, not the real ones.
        by_length: Let it group rows by length.
    """
    torch.set_num_threads(1)
    job, data = _load_quickstart()
    arguments = {"train_sampling_strategy": "group_by_length"} if by_length else {}
    return measure_trainer(job, _cut_to_length(data, 32) if fixed else data, steps, **arguments)


def _load_quickstart() -> tuple[JobSpec, TokenData]:
    """Return the job of the quickstart with a fixed learning rate, and its rows."""
    overrides = ("train.learning_rate=1e-3", "train.max_steps=1000")
    job = load_job(ROOT / "examples" / "quickstart.yaml", overrides).job
    fetch_job(job, print)
    return job, prepare_tokens(job)


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
                rate = measure_in_process(f"measure_trainer_side({steps}, by_length=True)")
            else:
                rate = measure_in_process(f"measure_trainer_side({steps}, fixed={not grouped})")
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
