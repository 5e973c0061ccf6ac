"""Run the training loop of one trial. The session does not know who hosts it.

session = TrainingSession.build(job, base, data, schedule)
while not session.is_done:
    session.advance(session.schedule.find_next_evaluation(session.step))
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
from torch import distributed

from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.evaluation.metrics.scores import Scores, compute_scores
from lorafleet.evaluation.tokens import PackedRows, pack_split
from lorafleet.jobs.errors import TrainingFailure, UserError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.model_kinds import describe_packing_refusal
from lorafleet.jobs.schema.precision import describe_number_formats
from lorafleet.jobs.trials.defaults import resolve_learning_rate
from lorafleet.jobs.trials.schedule import Schedule
from lorafleet.training import checkpoint
from lorafleet.training.data import (
    Batch,
    BatchPlan,
    Split,
    TokenData,
    count_targets,
    make_batch,
    make_packed_batch,
    make_padding_free_batch,
    split_micro_batches,
)
from lorafleet.training.dropout import RowDropout, RowKeys, compute_row_keys, draws_attention
from lorafleet.training.evaluation import (
    OnPass,
    evaluate_rows,
    ignore_phase,
    resolve_autocast_dtype,
)
from lorafleet.training.loss import LossModule
from lorafleet.training.meter import Meter, read_gpu_metrics
from lorafleet.training.methods import (
    attach,
    compile_blocks,
    copy_initial_values,
    detach,
    get_trained_parameters,
    save_weights,
)
from lorafleet.training.model import Base, name_classes
from lorafleet.training.optim import compute_rate_factor
from lorafleet.training.strategies import Ranks, build_strategy

_ISOLATION_TOLERANCE = 1e-6
"""Relative tolerance between the losses of an example behind two different examples.

It is tight, because no information of the preceding example may reach the loss.
"""
_LOSS_TOLERANCE = 1e-3
_LOSS_TOLERANCE_16BIT = 3e-2
"""Relative tolerance between an example's loss in a packed row and alone, in 16 bits.

`_LOSS_TOLERANCE` is the tolerance in float32.
"""


_MAX_PROBE_TOKENS = 64
_MIN_PROBE_TOKENS = 2
"""Minimum number of tokens of an example that tests the separation of packed examples.

`_MAX_PROBE_TOKENS` is the maximum.
"""


class TrainingSession:
    """One trial on its base.

    Create it with `build`, and call `close` at the end: the base is then free for the next
    session. Every process of the trial calls every method, in the same order, because most
    of them contain collectives. The host decides when to evaluate, save and stop.

    Args:
        job: The resolved job of one trial.
        base: A base that no other session uses now.
        schedule: Steps and evaluation points of the trial.
        ranks: This process's place in the process group.
    """

    def __init__(
        self, job: JobSpec, base: Base, data: TokenData, schedule: Schedule, ranks: Ranks
    ) -> None:
        self.job, self.base, self.data, self.schedule, self.ranks = job, base, data, schedule, ranks
        self.step = 0
        self.first_gradient_at: float | None = None
        self.classifies = job.task == "classification"
        self.meter = Meter(base.device)
        if data.labels:
            name_classes(base.model, data.labels)
        self.model = attach(job, base)
        self.row_keys = RowKeys()
        self.dropout: RowDropout | None = None
        if job.train.torch_compile:
            compile_blocks(self.model)  # its dropout is part of the compiled code
        else:
            self.dropout = RowDropout(self.model, self.row_keys, draws_attention(base.device))
        # transformers loads in eval mode and PEFT wraps in train mode. Without this call, the
        # base's own dropout would be off until the first evaluation, and on from then on, in this
        # trial and all later ones.
        self.model.train()
        # Before the strategy shards the parameters: PiSSA's and OLoRA's initial values are needed
        # to save plain LoRA weights.
        self.begun = copy_initial_values(job, dict(get_trained_parameters(self.model)))
        self.peak_rate = resolve_learning_rate(job).value
        self.autocast_dtype = resolve_autocast_dtype(job, base.device)
        fp16 = self.autocast_dtype is torch.float16
        module = LossModule(
            self.model, job.task, chunked=job.train.chunked_loss, autocast=self.autocast_dtype
        )
        self.strategy = build_strategy(job, module, base.device, ranks, self.peak_rate, fp16=fp16)
        split = data.splits["train"]
        self.rows: Split | PackedRows = (
            pack_split(split, job.model.max_length) if job.train.packing else split
        )
        self.plan = BatchPlan(
            self.rows.lengths,
            schedule.batch_rows,
            job.train.seed,
            grouped=job.train.group_by_length,
        )
        if job.uses_padding_free or job.train.packing:
            self._check_example_separation(data.splits["train"])
        self._sums = torch.zeros(2, device=base.device)  # loss and targets since reset_loss
        self.on_pass: OnPass = ignore_phase
        # For dropout that is not drawn by row: it depends only on the trial and the process, not on
        # what ran in this process before.
        torch.manual_seed(job.train.seed + 1 + ranks.rank)

    @classmethod
    def build(
        cls, job: JobSpec, base: Base, data: TokenData, schedule: Schedule
    ) -> TrainingSession:
        """Return a session at step 0: a new adapter on the base, an optimiser, and the data order.

        Raises:
            UserError: The model does not support the job: layers, method, padding-free rows or
                packing.
            RuntimeError: The number of processes differs from the job's.
        """
        ranks = Ranks.from_environment()
        if ranks.world_size != job.resources.world_size:
            # A failed set-up would train replicas that never communicate.
            raise RuntimeError(
                f"{ranks.world_size} training processes started, but the job has "
                f"{job.resources.world_size}. Check resources.workers_per_node and "
                "resources.num_nodes"
            )
        return cls(job, base, data, schedule, ranks)

    @property
    def is_done(self) -> bool:
        """Return whether the last step has been taken."""
        return self.step >= self.schedule.total_steps

    @property
    def number_formats(self) -> str:
        """Number formats of weights and arithmetic, as text."""
        return describe_formats(self.job, self.base)

    @property
    def trainable_parameters(self) -> int:
        """Number of trained values, including the head's."""
        return self.strategy.trainable_parameters

    def advance(self, until: int, seconds: float = math.inf) -> dict[str, Any]:
        """Train until step `until` or for about `seconds`, and return a report.

        The report has the mean loss since `reset_loss` and the costs.

        Args:
            until: Step number, at most the schedule's last.
            seconds: Stop after the step in which this time has passed. Only a single process
                may stop by the clock: several would stop at different steps.

        Raises:
            TrainingFailure: A loss or a gradient is NaN or infinite (class `nan`).
        """
        started_at = time.perf_counter()
        while self.step < min(until, self.schedule.total_steps):
            self._run_optimizer_step()
            if time.perf_counter() - started_at > seconds and self.ranks.world_size == 1:
                break
        # GPU work is asynchronous: without waiting, its time would be counted in the next phase.
        if self.base.device.type == "cuda":
            torch.cuda.synchronize(self.base.device)
        self.meter.train_seconds += time.perf_counter() - started_at
        return self._build_report()

    def reset_loss(self) -> None:
        """Start a new mean of the reported loss."""
        self._sums.zero_()

    def _run_optimizer_step(self) -> None:
        """Run all micro-batches of one optimiser step and update the weights."""
        rows = self.plan.select_rows(self.step)
        split = self.rows
        # Count over all processes and micro-batches: a mean of means would weight tokens by their
        # neighbours' length.
        targets = max(1, count_targets(split, rows, classifies=self.classifies))
        micro_batches = split_micro_batches(
            rows, self.job.train.per_device_train_batch_size, self.ranks.rank, self.ranks.world_size
        )
        for number, chunk in enumerate(micro_batches, start=1):
            batch = self._make_batch(split, chunk)
            keys = compute_row_keys(self.job.train.seed, self.step, chunk)
            self.row_keys.set_rows(keys, self.base.device)
            with self.strategy.begin_micro_batch(last=number == len(micro_batches)):
                loss_sum, _ = self.strategy.module(batch)
                # Gradients are averaged over the processes. The factor turns the average back into
                # a sum over all targets.
                self.strategy.backward(loss_sum * (self.ranks.world_size / targets))
            self._sums += torch.stack([loss_sum.detach(), loss_sum.new_tensor(batch.targets)])
            self.on_pass("training")
        self.row_keys.clear()
        if self.first_gradient_at is None:
            self.first_gradient_at = time.time()
        factor = compute_rate_factor(self.step, self.schedule.total_steps, self.job.train)
        norm = self.strategy.step(self.peak_rate * factor)
        # Reading the norm waits for a GPU, so there only the report checks the loss. With fp16 an
        # infinite norm is normal: the scaler skips that step.
        if (
            self.base.device.type == "cpu"
            and not torch.isfinite(norm)
            and self.autocast_dtype is not torch.float16
        ):
            raise TrainingFailure(
                "nan",
                f"the gradient became NaN or infinite at step {self.step + 1} (learning rate "
                f"{self.peak_rate:.3g}). Try a lower learning rate, a smaller train.max_grad_norm, "
                "or bf16 instead of fp16",
            )
        self.step += 1
        self.meter.samples += len(rows)
        self.meter.tokens += int(split.lengths[rows].sum())

    def _make_batch(self, split: Split | PackedRows, rows: np.ndarray) -> Batch:
        """Return the rows as a batch in the layout that the job asks for."""
        is_flat = (
            self.job.uses_padding_free or self.job.model.attn_implementation == "flash_attention_2"
        )
        if self.job.uses_padding_free or (self.job.train.packing and is_flat):
            return make_padding_free_batch(
                split, rows, self.base.device
            )  # FlashAttention separates examples only within a single row
        if isinstance(split, PackedRows):
            return make_packed_batch(split, rows, self.data.pad_id, self.base.device)
        return make_batch(
            split, rows, self.data.pad_id, self.base.device, classifies=self.classifies
        )

    def _check_example_separation(self, split: Split) -> None:
        """Raise UserError if the model does not keep the examples of one row apart.

        The preceding example must not change an example's loss, and the loss must equal that of
        the example alone. Models with a state or a convolution over the row, or without
        position ids, do not keep examples apart.
        """
        examples = np.argsort(split.lengths, kind="stable")[-2:]
        first, second = (
            _get_tokens(split, example)[:_MAX_PROBE_TOKENS]
            for example in (examples[0], examples[-1])
        )
        # The first example is exchanged for another one of the same length, so only its content can
        # matter.
        candidates = (first[::-1], np.resize(second, len(first)), np.roll(first, 1))
        other = next((tokens for tokens in candidates if not np.array_equal(tokens, first)), None)
        # All tokens are equal, or there is no token to predict: nothing can be shown with this
        # data.
        if other is None or len(second) < _MIN_PROBE_TOKENS:
            return
        rows = np.arange(1)
        single_batch = make_batch(
            _build_probe([second]), rows, self.data.pad_id, self.base.device, classifies=False
        )
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                pairs = [
                    PackedRows(_build_probe([tokens, second]), [np.arange(2)])
                    for tokens in (first, other)
                ]
                packed_loss, packed_loss_other = (
                    float(self.strategy.loss(self._make_batch(pair, rows))[0]) for pair in pairs
                )
                loss_alone = float(self.strategy.loss(single_batch)[0])
        except TypeError:  # the model takes no position_ids
            packed_loss = packed_loss_other = loss_alone = math.nan
        finally:
            self.model.train(was_training)
        exact = self.autocast_dtype is None and self.base.dtype is torch.float32
        tolerance = _LOSS_TOLERANCE if exact else _LOSS_TOLERANCE_16BIT
        # Both packed rows have the same shape, so the sums run in the same order: the loss is equal
        # even in 16 bits.
        is_isolated = math.isclose(packed_loss, packed_loss_other, rel_tol=_ISOLATION_TOLERANCE)
        if not is_isolated or not math.isclose(packed_loss, loss_alone, rel_tol=tolerance):
            field = "train.packing" if self.job.train.packing else "train.padding_free"
            raise UserError(describe_packing_refusal(field, type(self.base.model).__name__))

    def _build_report(self) -> dict[str, Any]:
        """Return the mean loss, costs and metadata since the last report.

        Raises TrainingFailure if the loss is NaN or infinite.
        """
        # A copy, because all_reduce works in place and the sums go on growing.
        sums = self._sums.clone()
        if self.ranks.world_size > 1:
            distributed.all_reduce(sums)
        loss_sum, targets = sums.tolist()
        return build_report(
            self.job,
            self.schedule,
            self.step,
            self.peak_rate,
            loss_sum,
            targets,
            self.meter,
            rows=len(self.rows),
            trainable_parameters=self.trainable_parameters,
            number_formats=self.number_formats,
        )

    def evaluate(self, split_name: str = "validation") -> Scores:
        """Return metrics of the current adapter on one split, with intervals.

        All processes share the rows.
        """
        return self.evaluate_with_rows(split_name)[0]

    def evaluate_with_rows(self, split_name: str = "validation") -> tuple[Scores, RowResults]:
        """Return the result of `evaluate`, and the adapter's results for each row.

        Of the metrics that need answers, only those that decide between trials are computed.
        """
        started_at = time.perf_counter()
        results = evaluate_rows(
            self.strategy.loss,
            self.job,
            self.data,
            split_name,
            self.base.device,
            self.ranks,
            metrics=list_answer_metrics(self.job),
            equal_passes=self.strategy.equal_passes,
            on_pass=self.on_pass,
        )
        metrics = compute_scores(results, self.job.metric_names)
        self.meter.eval_seconds += time.perf_counter() - started_at
        return metrics, results

    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        """Save everything that a restart needs.

        This is the trained values, optimiser, random state, position, and the host's own
        `extra`. The previous checkpoint is kept as `NAME.old`.

        Args:
            folder: On a disk that all processes of the trial see.
            extra: Tensors and plain values only.
        """
        states = self._gather_rng_states()
        tensors = self.strategy.gather_tensors()  # complete on the first process only
        with self._open_common_folder(folder) as scratch:
            optimizer = self.strategy.save_optimizer(scratch)
            if self.ranks.rank == 0:
                checkpoint.save_tensors(scratch, tensors)
                state = {
                    "step": self.step,
                    "rng": states,
                    "meter": self.meter.to_state(),
                    "world_size": self.ranks.world_size,
                    "strategy": self.job.resources.strategy,
                    "extra": extra or {},
                }
                checkpoint.save_state(scratch, state | optimizer)
            # ZeRO writes one file for each process; all of them must be complete before they are
            # hashed.
            self._wait_for_all()
            if self.ranks.rank == 0:
                checkpoint.write_checksums(scratch)

    @contextmanager
    def _open_common_folder(self, target: Path) -> Iterator[Path]:
        """Yield a folder that every process writes into.

        The first process replaces `target` with it when all have finished.
        """
        is_first = self.ranks.rank == 0
        with (
            checkpoint.replace_folder(target, keep=True)
            if is_first
            else nullcontext(target) as scratch
        ):
            path = [str(scratch)]
            if self.ranks.world_size > 1:
                distributed.broadcast_object_list(path, src=0)
            yield Path(path[0])
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        """Wait until all processes have reached this point."""
        if self.ranks.world_size > 1:
            distributed.barrier()

    def _gather_rng_states(self) -> list[dict[str, torch.Tensor]]:
        """Return the random states of all processes, by rank."""
        local_state = checkpoint.get_rng_state()
        if self.ranks.world_size == 1:
            return [local_state]
        states: list[Any] = [None] * self.ranks.world_size
        distributed.all_gather_object(states, local_state)
        return states

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from the state that `save` wrote, and return the host's `extra`.

        The next step is the one that would have followed.
        """
        state = checkpoint.load_state(folder)
        self.strategy.load_tensors(checkpoint.load_tensors(folder))
        self.strategy.load_optimizer(folder, state)
        self.step = int(state["step"])
        self.meter.restore(state["meter"])
        # With another number of processes, random states cannot be assigned: dropout changes, the
        # data order does not.
        if state["world_size"] == self.ranks.world_size:
            checkpoint.set_rng_state(state["rng"][self.ranks.rank])
        extra: dict[str, Any] = state["extra"]
        return extra

    def save_weights(self, folder: Path) -> None:
        """Save what was trained, in a format that plain PEFT or transformers loads.

        All processes must call it: values may have to be gathered. Only the first one writes.
        """
        tensors = self.strategy.gather_tensors()
        if self.ranks.rank == 0:
            with checkpoint.replace_folder(folder) as scratch:
                save_weights(self.job, self.model, tensors, self.begun, scratch)

    def close(self) -> None:
        """Detach the method from the base and release the optimiser.

        The session cannot be used afterwards. Also call it after a failure, or the base keeps
        the adapter.
        """
        if self.dropout is not None:
            self.dropout.remove()
        self.strategy.close()
        detach(self.base, self.model)


def build_report(
    job: JobSpec,
    schedule: Schedule,
    step: int,
    peak_rate: float,
    loss_sum: float,
    targets: float,
    meter: Meter,
    *,
    rows: int,
    trainable_parameters: int,
    number_formats: str,
) -> dict[str, Any]:
    """Return the mean loss, costs and metadata of a trial since its last report.

    Args:
        loss_sum: Loss since the last report, over all processes.
        targets: Targets that it is the sum of.
        rows: Rows of an epoch.

    Raises:
        TrainingFailure: The loss is NaN or infinite.
    """
    if targets and not math.isfinite(loss_sum):
        raise TrainingFailure(
            "nan",
            f"the loss became NaN or infinite by step {step} (learning rate "
            f"{peak_rate:.3g}). Try a lower learning rate, a smaller train.max_grad_norm, "
            "or bf16 instead of fp16",
        )
    last_step = step - 1 if step else 0
    rate = peak_rate * compute_rate_factor(last_step, schedule.total_steps, job.train)
    return {
        "step": step,
        "samples": meter.samples,
        "epoch": round(meter.samples / rows, 4),
        "train_loss": loss_sum / targets if targets else None,
        "learning_rate": rate,
        "trainable_parameters": trainable_parameters,
        "number_formats": number_formats,
        **meter.summarize(),
        **read_gpu_metrics(meter.device),
    }


def list_answer_metrics(job: JobSpec) -> list[str]:
    """Return the metrics that an evaluation of a trial computes from its answers.

    Only those that decide between trials; the others wait for the held-out evaluation.
    """
    return [metric.name for metric in job.decision_metrics if metric.name in job.extra_metrics]


def describe_formats(job: JobSpec, base: Base) -> str:
    """Return the number formats of a trial's weights and arithmetic, as text."""
    dtype = resolve_autocast_dtype(job, base.device)
    arithmetic = None if dtype is None else str(dtype).removeprefix("torch.")
    return describe_number_formats(job, str(base.dtype).removeprefix("torch."), arithmetic)


def _get_tokens(split: Split, example: int) -> np.ndarray:
    """Return the token ids of an example."""
    return np.asarray(split.ids[int(split.starts[example]) : int(split.starts[example + 1])])


def _build_probe(examples: list[np.ndarray]) -> Split:
    """Return a split of the given examples in which only the last one has a loss."""
    starts = np.concatenate([[0], np.cumsum([len(tokens) for tokens in examples])])
    learnt = np.zeros(int(starts[-1]), dtype=bool)
    learnt[int(starts[-2]) + 1 :] = True
    indices = np.arange(len(examples))
    return Split(
        np.concatenate(examples), starts, np.ones(len(examples), dtype=np.int64), learnt, indices
    )
