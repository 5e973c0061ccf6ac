"""TrainingSession: the only training loop. It does not know who hosts it.

session = TrainingSession.build(job, base, data, schedule)
while not session.done:
    session.advance(session.schedule.next_evaluation(session.step))
    result = session.evaluate("validation")
    session.save(folder)
session.close()
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.evaluation.metrics.scores import Scores, scores
from lorafleet.evaluation.tokens import PackedRows, packed
from lorafleet.jobs.errors import TrainingFailure, UserError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.model_kinds import packing_refusal
from lorafleet.jobs.schema.precision import formats_text
from lorafleet.jobs.trials.defaults import learning_rate
from lorafleet.jobs.trials.schedule import Schedule
from lorafleet.training import checkpoint
from lorafleet.training.data import (
    Batch,
    BatchPlan,
    Split,
    TokenData,
    end_to_end,
    make_batch,
    make_packed_batch,
    passes,
    target_count,
)
from lorafleet.training.evaluation import OnPass, autocast_dtype, evaluate_rows, nobody
from lorafleet.training.loss import LossModule
from lorafleet.training.meter import Meter, gpu_metrics
from lorafleet.training.methods import attach, compile_blocks, detach, first_values, save_weights, trained_parameters
from lorafleet.training.model import Base, name_classes
from lorafleet.training.optim import rate_factor
from lorafleet.training.strategies import Ranks, strategy
from torch import distributed

_UNTOUCHED = 1e-6
"""How far apart the loss of an example may be behind two others: nothing of them may reach it."""
_SAME_LOSS = 1e-3
_SAME_ROUNDED_LOSS = 3e-2
"""How far apart the loss of an example may be in a row and alone, in float32 and in 16 bits."""


_PROBED = 64
_FEWEST_PROBED = 2
"""Tokens of the examples with which a model is asked whether it keeps them apart."""


class TrainingSession:
    """One trial on its base. Every process of the trial calls every method, in the same order."""

    def __init__(self, job: JobSpec, base: Base, data: TokenData, schedule: Schedule, ranks: Ranks) -> None:
        self.job, self.base, self.data, self.schedule, self.ranks = job, base, data, schedule, ranks
        self.step = 0
        self.first_gradient_at: float | None = None
        self.classifies = job.task == "classification"
        self.meter = Meter(base.device)
        if data.labels:
            name_classes(base.model, data.labels)
        self.model = attach(job, base)
        if job.train.torch_compile:
            compile_blocks(self.model)
        # transformers loads in eval mode and PEFT wraps in train mode: without this the base's own dropout would be off
        # until the first evaluation, and on from then, in this trial and all after it.
        self.model.train()
        self.begun = first_values(job, dict(trained_parameters(self.model)))
        self.peak_rate = learning_rate(job).value
        self.autocast_dtype = autocast_dtype(job, base.device)
        fp16 = self.autocast_dtype is torch.float16
        module = LossModule(self.model, job.task, chunked=job.train.chunked_loss, autocast=self.autocast_dtype)
        self.strategy = strategy(job, module, base.device, ranks, self.peak_rate, fp16=fp16)
        split = data.splits["train"]
        self.rows: Split | PackedRows = packed(split, job.model.max_length) if job.train.packing else split
        self.plan = BatchPlan(self.rows.lengths, schedule.batch_rows, job.train.seed, grouped=job.train.group_by_length)
        if job.padding_free or job.train.packing:
            self._check_apart(data.splits["train"])
        self._sums = torch.zeros(2, device=base.device)  # loss and targets since begin_report
        self.on_pass: OnPass = nobody
        # The order in which dropout draws is the trial's and the process's own, whatever ran here before.
        torch.manual_seed(job.train.seed + 1 + ranks.rank)

    @classmethod
    def build(cls, job: JobSpec, base: Base, data: TokenData, schedule: Schedule) -> TrainingSession:
        """A session at step 0: a fresh adapter on the base, an optimiser, and the data's order.

        Raises UserError for layers that the model does not have.
        """
        ranks = Ranks.here()
        if ranks.world_size != job.resources.world_size:
            # A set-up that went wrong would train replicas that never hear of each other.
            raise RuntimeError(f"{ranks.world_size} processes came up, the job has {job.resources.world_size}")
        return cls(job, base, data, schedule, ranks)

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.schedule.total_steps

    @property
    def number_formats(self) -> str:
        """Return the number formats of weights and arithmetic, in words."""
        arithmetic = None if self.autocast_dtype is None else str(self.autocast_dtype).removeprefix("torch.")
        return formats_text(self.job, str(self.base.dtype).removeprefix("torch."), arithmetic)

    @property
    def trainable_parameters(self) -> int:
        """Numbers that are trained, the head's among them."""
        return self.strategy.trainable_parameters

    def advance(self, until: int, seconds: float = math.inf) -> dict[str, Any]:
        """Train up to step `until`, or for about `seconds` (only one process alone may stop by the clock).

        Returns the mean loss since `begin_report` and what it cost. Raises TrainingFailure when a loss or a gradient
        is no number.
        """
        began = time.perf_counter()
        while self.step < min(until, self.schedule.total_steps):
            self._optimiser_step()
            if time.perf_counter() - began > seconds and self.ranks.world_size == 1:
                break
        if self.base.device.type == "cuda":
            torch.cuda.synchronize(self.base.device)
        self.meter.train_seconds += time.perf_counter() - began
        return self._report()

    def begin_report(self) -> None:
        """Count the loss from here on."""
        self._sums.zero_()

    def _optimiser_step(self) -> None:
        rows = self.plan.rows(self.step)
        split = self.rows
        # Counted over all processes and passes: a mean of means would weigh a token by the length of its neighbours.
        targets = max(1, target_count(split, rows, classifies=self.classifies))
        own = passes(rows, self.job.train.per_device_train_batch_size, self.ranks.rank, self.ranks.world_size)
        for number, chunk in enumerate(own, start=1):
            batch = self._batch(split, chunk)
            with self.strategy.one_pass(last=number == len(own)):
                loss_sum, _ = self.strategy.module(batch)
                # Gradients are averaged over the processes; multiplied back, they are the sum that `targets` divides.
                self.strategy.backward(loss_sum * (self.ranks.world_size / targets))
            self._sums += torch.stack([loss_sum.detach(), loss_sum.new_tensor(batch.targets)])
            self.on_pass("training")
        if self.first_gradient_at is None:
            self.first_gradient_at = time.time()
        factor = rate_factor(self.step, self.schedule.total_steps, self.job.train)
        norm = self.strategy.step(self.peak_rate * factor)
        if self.base.device.type == "cpu" and not torch.isfinite(norm) and self.autocast_dtype is not torch.float16:
            raise TrainingFailure(
                "nan", f"the gradient was not a number in step {self.step + 1} (learning rate {self.peak_rate:.3g})"
            )
        self.step += 1
        self.meter.samples += len(rows)
        self.meter.tokens += int(split.lengths[rows].sum())

    def _batch(self, split: Split | PackedRows, rows: np.ndarray) -> Batch:
        flat = self.job.padding_free or self.job.model.attn_implementation == "flash_attention_2"
        if self.job.padding_free or (self.job.train.packing and flat):
            return end_to_end(split, rows, self.base.device)  # FlashAttention tells examples apart in one row alone
        if isinstance(split, PackedRows):
            return make_packed_batch(split, rows, self.data.pad_id, self.base.device)
        return make_batch(split, rows, self.data.pad_id, self.base.device, classifies=self.classifies)

    def _check_apart(self, split: Split) -> None:
        """Raise UserError where an example in a row with another one is not what it is alone.

        What stands before it must change nothing, and its loss must be that of the example by itself. Models with a
        state or a convolution over the row, or without a place for positions, do not keep examples apart.
        """
        examples = np.argsort(split.lengths, kind="stable")[-2:]
        first, second = (_tokens_of(split, example)[:_PROBED] for example in (examples[0], examples[-1]))
        candidates = (first[::-1], np.resize(second, len(first)), np.roll(first, 1))
        other = next((tokens for tokens in candidates if not np.array_equal(tokens, first)), None)
        if other is None or len(second) < _FEWEST_PROBED:
            return
        rows = np.arange(1)
        alone = make_batch(_probe([second]), rows, self.data.pad_id, self.base.device, classifies=False)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                pairs = [PackedRows(_probe([tokens, second]), [np.arange(2)]) for tokens in (first, other)]
                behind, behind_other = (float(self.strategy.loss(self._batch(pair, rows))[0]) for pair in pairs)
                by_itself = float(self.strategy.loss(alone)[0])
        except TypeError:  # the model takes no position_ids
            behind = behind_other = by_itself = math.nan
        finally:
            self.model.train(was_training)
        exact = self.autocast_dtype is None and self.base.dtype is torch.float32
        near = _SAME_LOSS if exact else _SAME_ROUNDED_LOSS
        # Behind two others the same sums are worked out in the same order: in 16 bits too the loss is the same.
        untouched = math.isclose(behind, behind_other, rel_tol=_UNTOUCHED)
        if not untouched or not math.isclose(behind, by_itself, rel_tol=near):
            field = "train.packing" if self.job.train.packing else "train.padding_free"
            raise UserError(packing_refusal(field, type(self.base.model).__name__))

    def _report(self) -> dict[str, Any]:
        sums = self._sums.clone()
        if self.ranks.world_size > 1:
            distributed.all_reduce(sums)
        loss_sum, targets = sums.tolist()
        if targets and not math.isfinite(loss_sum):
            raise TrainingFailure(
                "nan", f"the loss was not a number by step {self.step} (learning rate {self.peak_rate:.3g})"
            )
        done = self.step - 1 if self.step else 0
        rate = self.peak_rate * rate_factor(done, self.schedule.total_steps, self.job.train)
        return {
            "step": self.step,
            "samples": self.meter.samples,
            "epoch": round(self.meter.samples / len(self.rows), 4),
            "train_loss": loss_sum / targets if targets else None,
            "learning_rate": rate,
            "trainable_parameters": self.trainable_parameters,
            "number_formats": self.number_formats,
            **self.meter.rates(),
            **gpu_metrics(self.base.device),
        }

    def evaluate(self, split_name: str = "validation") -> Scores:
        """Metrics of the adapter as it is now, with intervals, on one split. All processes share the rows."""
        return self.evaluate_with_rows(split_name)[0]

    def evaluate_with_rows(self, split_name: str = "validation") -> tuple[Scores, RowResults]:
        """Return `evaluate`, and what the adapter did with each row."""
        began = time.perf_counter()
        # What more there is to measure waits for the end: here trials are told apart.
        names = [one.name for one in self.job.decision_metrics if one.name in self.job.extra_metrics]
        results = evaluate_rows(
            self.strategy.loss,
            self.job,
            self.data,
            split_name,
            self.base.device,
            self.ranks,
            metrics=names,
            equal_passes=self.strategy.equal_passes,
            on_pass=self.on_pass,
        )
        found = scores(results, self.job.metric_names)
        self.meter.eval_seconds += time.perf_counter() - began
        return found, results

    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        """Everything a restart needs: trained values, optimiser, random state, position, and the host's own `extra`."""
        states = self._gathered_rng()
        tensors = self.strategy.tensors()  # on the first process; nothing on the others
        with self._common_folder(folder) as scratch:
            optimizer = self.strategy.save_optimizer(scratch)
            if self.ranks.rank == 0:
                checkpoint.save_tensors(scratch, tensors)
                state = {
                    "step": self.step,
                    "rng": states,
                    "meter": self.meter.state(),
                    "world_size": self.ranks.world_size,
                    "strategy": self.job.resources.strategy,
                    "extra": extra or {},
                }
                checkpoint.save_state(scratch, state | optimizer)
            self._agree_on_end()
            if self.ranks.rank == 0:
                checkpoint.seal(scratch)

    @contextmanager
    def _common_folder(self, target: Path) -> Iterator[Path]:
        """A folder that every process writes into, and the first puts in the place of `target` when all have."""
        first = self.ranks.rank == 0
        with checkpoint.replaced_folder(target, keep=True) if first else nullcontext(target) as scratch:
            path = [str(scratch)]
            if self.ranks.world_size > 1:
                distributed.broadcast_object_list(path, src=0)
            yield Path(path[0])
        self._agree_on_end()

    def _agree_on_end(self) -> None:
        if self.ranks.world_size > 1:
            distributed.barrier()

    def _gathered_rng(self) -> list[dict[str, torch.Tensor]]:
        own = checkpoint.rng_state()
        if self.ranks.world_size == 1:
            return [own]
        states: list[Any] = [None] * self.ranks.world_size
        distributed.all_gather_object(states, own)
        return states

    def load(self, folder: Path) -> dict[str, Any]:
        """Go on from `save`: the next step is the one that would have followed. Returns the host's `extra`."""
        state = checkpoint.load_state(folder)
        self.strategy.put_tensors(checkpoint.load_tensors(folder))
        self.strategy.load_optimizer(folder, state)
        self.step = int(state["step"])
        self.meter.restore(state["meter"])
        # With another number of processes there is no state for each: dropout then draws anew, the data's order stays.
        if state["world_size"] == self.ranks.world_size:
            checkpoint.set_rng_state(state["rng"][self.ranks.rank])
        extra: dict[str, Any] = state["extra"]
        return extra

    def save_weights(self, folder: Path) -> None:
        """What was trained, for plain PEFT or transformers to load."""
        tensors = self.strategy.tensors()
        if self.ranks.rank == 0:
            with checkpoint.replaced_folder(folder) as scratch:
                save_weights(self.job, self.model, tensors, self.begun, scratch)

    def close(self) -> None:
        """Take the method off the base and let go of the optimiser."""
        self.strategy.close()
        detach(self.base, self.model)


def _tokens_of(split: Split, example: int) -> np.ndarray:
    return np.asarray(split.ids[int(split.starts[example]) : int(split.starts[example + 1])])


def _probe(examples: list[np.ndarray]) -> Split:
    """Return examples of which the last alone is learnt."""
    starts = np.concatenate([[0], np.cumsum([len(tokens) for tokens in examples])])
    learnt = np.zeros(int(starts[-1]), dtype=bool)
    learnt[int(starts[-2]) + 1 :] = True
    places = np.arange(len(examples))
    return Split(np.concatenate(examples), starts, np.ones(len(examples), dtype=np.int64), learnt, places)
