"""Train the trials of a pack: one forward and one backward pass of the base for all of them.

group = PackedGroup(base, data, slots=4, max_rank=32)
group.enter(0, job, schedule)
while group.active:
    for slot in group.run_micro_batch():  # the slots that have completed a step
        ...
group.close()
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs.errors import TrainingFailure, UserError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.defaults import resolve_learning_rate
from lorafleet.jobs.trials.packing import find_packing_refusal
from lorafleet.jobs.trials.schedule import Schedule
from lorafleet.training.data import (
    Batch,
    BatchPlan,
    count_targets,
    make_batch,
    split_micro_batches,
)
from lorafleet.training.dropout import RowDropout, RowKeys, compute_row_keys, draws_attention
from lorafleet.training.evaluation import resolve_autocast_dtype
from lorafleet.training.loss import LossModule
from lorafleet.training.meter import Meter
from lorafleet.training.methods import (
    attach,
    copy_adapter_config,
    detach,
    get_trained_parameters,
    uses_gradient_checkpointing,
)
from lorafleet.training.model import Base, name_classes
from lorafleet.training.optim import compute_rate_factor
from lorafleet.training.packed.adamw import SlotOptimizer
from lorafleet.training.packed.buffers import SlotBuffers, TrainedShape
from lorafleet.training.packed.layers import (
    ModuleSwap,
    PackedLinear,
    PackedModule,
    RowMap,
    SlotTensors,
)

_PEFT_PREFIX = "base_model.model."
_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"
_SAVED = ".modules_to_save.default."


@dataclass
class Slot:
    """The trial of a slot, and its position in its data."""

    job: JobSpec
    schedule: Schedule
    data: TokenData
    plan: BatchPlan
    shapes: dict[str, tuple[int, ...]]
    """Names and true shapes of the trained tensors."""
    adapter_config: Any
    """PEFT's configuration of the adapter."""
    peak_rate: float
    optimizer: SlotOptimizer
    meter: Meter
    step: int = 0
    """Optimizer steps so far."""
    micro_batches: list[np.ndarray] = field(default_factory=list)
    """Micro-batches of the current step that are left."""
    last_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    """Rows of the micro-batch that was trained last."""
    step_targets: int = 1
    """Targets of all micro-batches of the current step."""
    loss_sum: float = 0.0
    targets: int = 0
    """Loss and targets since `reset_loss`."""
    step_loss_sum: float = 0.0
    """Loss of the current step."""
    failure: TrainingFailure | None = None
    first_gradient_at: float | None = None

    @property
    def classifies(self) -> bool:
        """Return whether the trial trains a classifier."""
        return self.job.task == "classification"

    @property
    def is_done(self) -> bool:
        """Return whether the last step was taken, or the trial has failed."""
        return self.failure is not None or self.step >= self.schedule.total_steps

    @property
    def trainable_parameters(self) -> int:
        """Number of trained values, including the head's."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def reset_loss(self) -> None:
        """Start a new mean of the reported loss."""
        self.loss_sum, self.targets = 0.0, 0

    def begin_step(self) -> None:
        """Select the rows of the next step, or of the current one again from its start."""
        rows = self.plan.select_rows(self.step)
        split = self.data.splits["train"]
        self.micro_batches = split_micro_batches(
            rows, self.job.train.per_device_train_batch_size, 0, 1
        )
        self.step_targets = max(1, count_targets(split, rows, classifies=self.classifies))
        self.step_loss_sum = 0.0

    def complete_step(self) -> None:
        """Count a step that was taken."""
        rows = self.plan.select_rows(self.step)
        split = self.data.splits["train"]
        self.step += 1
        self.meter.samples += len(rows)
        self.meter.tokens += int(split.lengths[rows].sum())


class PackedGroup:
    """Trials that share a base, and the micro-batches in which they are trained.

    All of them train the same layers (see `jobs.trials.packing.build_pack_key`). A slot that
    becomes free can be entered again between any two micro-batches. The base must not be used
    otherwise before `close`.

    Args:
        base: A base that no session uses.
        slots: Number of slots.
        max_rank: Largest rank that a trial may have.
        slots_per_pass: Maximum number of slots that share one forward pass; the others follow in
            passes of their own. None: all of them.
    """

    def __init__(
        self,
        base: Base,
        data: TokenData,
        slots: int,
        max_rank: int,
        slots_per_pass: int | None = None,
    ) -> None:
        self.base, self.data = base, data
        self.capacity, self.max_rank = slots, max_rank
        self.slots_per_pass = slots_per_pass or slots
        self.slots: dict[int, Slot] = {}
        self.row_keys = RowKeys()
        self.rows = RowMap(slots, base.device, self.row_keys)
        self.buffers: SlotBuffers | None = None
        self.dropout = RowDropout(base.model, self.row_keys, draws_attention(base.device))
        if data.labels:
            name_classes(base.model, data.labels)
        self._modules: dict[str, nn.Module] = {}
        self._swap: ModuleSwap | None = None
        self._loss: LossModule | None = None
        self._next_pass: list[int] = []
        self.last_pass: list[int] = []
        """Slots of the micro-batch that was trained last, or that failed."""

    @property
    def active(self) -> list[int]:
        """Return the slots whose trial is not done."""
        return [slot for slot, trial in sorted(self.slots.items()) if not trial.is_done]

    @property
    def free_slot(self) -> int | None:
        """Return a slot without a trial, or None."""
        return next((slot for slot in range(self.capacity) if slot not in self.slots), None)

    def enter(self, slot: int, job: JobSpec, schedule: Schedule) -> Slot:
        """Begin a trial in a slot. Its first values are those that it would have alone.

        Raises:
            UserError: The trial cannot be packed, or not with the trials of this group.
        """
        refusal = find_packing_refusal(job)
        if refusal is None and job.lora.lora_r > self.max_rank:
            refusal = f"its rank {job.lora.lora_r} is above that of the pack, {self.max_rank}"
        if refusal is not None:
            raise UserError(f"the trial cannot be packed: {refusal}")
        self._remove_modules()
        model = attach(job, self.base)
        try:
            tensors = {
                name: parameter.detach().clone()
                for name, parameter in get_trained_parameters(model).items()
            }
            scaling = _read_scaling(model)
            heads = _list_saved_modules(model, tensors)
            config = copy_adapter_config(model)
        finally:
            detach(self.base, model)
        if self.buffers is None:
            self._build(job, tensors, heads)
        buffers = self.buffers
        assert buffers is not None
        if tensors.keys() != buffers.shapes.keys():
            raise UserError("the trial cannot be packed: it trains other layers than the pack")
        buffers.clear(slot)
        buffers.write(slot, tensors)
        self.rows.scaling[slot] = scaling
        self.rows.lora_dropout[slot] = job.lora.lora_dropout
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        trial = Slot(
            job,
            schedule,
            self.data,
            BatchPlan(
                self.data.splits["train"].lengths,
                schedule.batch_rows,
                job.train.seed,
                grouped=job.train.group_by_length,
            ),
            shapes,
            config,
            resolve_learning_rate(job).value,
            SlotOptimizer(buffers, slot, job, shapes),
            Meter(self.base.device),
        )
        self.slots[slot] = trial
        return trial

    def copy(self, slot: int, target: int) -> None:
        """Begin the trial of a slot once more in another one: for measurements."""
        trial, buffers = self.slots[slot], self.buffers
        assert buffers is not None
        buffers.clear(target)
        buffers.write(target, buffers.read(slot, trial.shapes))
        self.rows.scaling[target] = self.rows.scaling[slot]
        self.rows.lora_dropout[target] = self.rows.lora_dropout[slot]
        self.slots[target] = replace(
            trial,
            optimizer=SlotOptimizer(buffers, target, trial.job, trial.shapes),
            meter=Meter(self.base.device),
            step=0,
            micro_batches=[],
        )

    def leave(self, slot: int) -> None:
        """End the trial of a slot, and forget its values."""
        self.slots.pop(slot, None)
        if self.buffers is not None:
            self.buffers.clear(slot)

    def close(self) -> None:
        """End all trials, and leave the base as it was. May be called twice."""
        # Before the layers leave the model: a replaced head has dropout of its own.
        self.base.model.eval()
        self._remove_modules()
        self.dropout.remove()
        self.slots, self.buffers, self._modules, self._loss = {}, None, {}, None

    def get_tensors(self, slot: int) -> dict[str, torch.Tensor]:
        """Return copies of what a slot has trained, by the names of a single trial."""
        assert self.buffers is not None
        return self.buffers.read(slot, self.slots[slot].shapes)

    def set_tensors(self, slot: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set what a slot has trained."""
        assert self.buffers is not None
        self.buffers.write(slot, tensors)

    def _build(
        self, job: JobSpec, tensors: dict[str, torch.Tensor], heads: dict[str, nn.Module]
    ) -> None:
        """Create the buffers and the layers for trials that train these tensors."""
        shapes = [
            TrainedShape(name, _pad_rank(name, tuple(tensor.shape), self.max_rank))
            for name, tensor in tensors.items()
        ]
        self.buffers = buffers = SlotBuffers(shapes, self.capacity, self.base.device)
        for name in tensors:
            if not name.endswith((_LORA_A, _LORA_B)) and _SAVED not in name:
                raise UserError(f"the trial cannot be packed: {name} is trained alone")
        parameters = {
            name: SlotTensors(buffers.make_parameter(name), buffers.make_slot_parameters(name))
            for name in tensors
        }
        for name, lora_a in parameters.items():
            if name.endswith(_LORA_A):
                path = name.removeprefix(_PEFT_PREFIX).removesuffix(_LORA_A)
                lora_b = parameters[name.removesuffix(_LORA_A) + _LORA_B]
                layer = self.base.model.get_submodule(path)
                self._modules[path] = PackedLinear(layer, lora_a, lora_b, self.rows, path)
        for path, module in heads.items():
            prefix = f"{_PEFT_PREFIX}{path}{_SAVED}"
            stacked = {
                name.removeprefix(prefix): parameter
                for name, parameter in parameters.items()
                if name.startswith(prefix)
            }
            self._modules[path] = PackedModule(module, stacked, self.rows)
        self._loss = LossModule(
            self.base.model,
            job.task,
            chunked=job.train.chunked_loss,
            autocast=resolve_autocast_dtype(job, self.base.device),
        )

    def use_modules(self) -> LossModule:
        """Put the adapters into the base until the next trial enters, and return its loss."""
        assert self._loss is not None
        if self._swap is None:
            self._swap = ModuleSwap(self.base.model, self._modules)
            job = next(iter(self.slots.values())).job
            if job.train.gradient_checkpointing:
                self.base.model.gradient_checkpointing_enable({"use_reentrant": False})
        return self._loss

    def _remove_modules(self) -> None:
        """Take the adapters out of the base."""
        if self._swap is not None:
            self._swap.restore()
            self._swap = None
            if uses_gradient_checkpointing(self.base.model):
                self.base.model.gradient_checkpointing_disable()
            self.base.model.eval()

    def run_micro_batch(self) -> list[int]:
        """Train the next micro-batch of the trials that are not done.

        With more of them than `slots_per_pass`, those of the next pass only.

        Returns:
            The slots that have completed a step, or have failed in it.
        """
        waiting = self.active
        self._next_pass = [slot for slot in self._next_pass if slot in waiting] or waiting
        active, self._next_pass = (
            self._next_pass[: self.slots_per_pass],
            self._next_pass[self.slots_per_pass :],
        )
        self.last_pass = active
        if not active:
            return []
        started_at = time.perf_counter()
        for slot in active:
            if not self.slots[slot].micro_batches:
                self.slots[slot].begin_step()
        chunks = {slot: self.slots[slot].micro_batches[0] for slot in active}
        module = self.use_modules()
        if not self.base.model.training:
            self.base.model.train()
        self._set_rows(chunks)
        losses_N = module.compute_row_losses(self._make_batch(chunks))
        self._backward(losses_N, chunks)
        self.row_keys.clear()
        for slot in active:
            self.slots[slot].last_rows = self.slots[slot].micro_batches.pop(0)
        completed = [slot for slot in active if not self.slots[slot].micro_batches]
        self._step(completed)
        self._share_time(time.perf_counter() - started_at, chunks)
        return completed

    def restart_steps(self) -> None:
        """Forget the micro-batches of all steps that are not complete: they are trained again.

        Call it after an error in `run_micro_batch`, which may have added a part of its gradients.
        """
        self.row_keys.clear()
        self._next_pass = []
        assert self.buffers is not None
        for slot, trial in self.slots.items():
            trial.micro_batches = []
            self.buffers.gradients_KP[slot].zero_()

    def _set_rows(self, chunks: Mapping[int, np.ndarray]) -> None:
        """Tell the layers which slot, and which row of its data, each row of the batch is."""
        self.rows.set_counts({slot: len(rows) for slot, rows in chunks.items()}, trains=True)
        keys = [
            compute_row_keys(self.slots[slot].job.train.seed, self.slots[slot].step, rows)
            for slot, rows in chunks.items()
        ]
        self.row_keys.set_rows(np.concatenate(keys), self.base.device)

    def _make_batch(self, chunks: Mapping[int, np.ndarray]) -> Batch:
        """Return the rows of all slots; rows that all of them share are collated once."""
        trials = [self.slots[slot] for slot in chunks]
        rows = list(chunks.values())
        split = trials[0].data.splits["train"]
        is_shared = all(np.array_equal(rows[0], other) for other in rows[1:])
        batch = make_batch(
            split,
            rows[0] if is_shared else np.concatenate(rows),
            self.data.pad_id,
            self.base.device,
            classifies=trials[0].classifies,
        )
        return repeat_rows(batch, len(rows)) if is_shared else batch

    def _backward(self, losses_N: torch.Tensor, chunks: Mapping[int, np.ndarray]) -> None:
        """Add the gradients of each slot: its loss over the targets of its own whole step."""
        weights = [
            1.0 / self.slots[slot].step_targets for slot, rows in chunks.items() for _ in rows
        ]
        weights_N = torch.tensor(weights, device=losses_N.device, dtype=losses_N.dtype)
        with warnings.catch_warnings():
            # Rows of a buffer are never dense in the way that torch's autograd prefers.
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient")
            (losses_N * weights_N).sum().backward()
        sums = losses_N.detach().cpu()
        now = time.time()
        for part in self.rows.parts:
            trial = self.slots[part.slot]
            trial.step_loss_sum += float(part.select(sums).sum())
            trial.first_gradient_at = trial.first_gradient_at or now

    def _step(self, completed: Iterable[int]) -> None:
        """Update the slots whose step is complete; one that is not finite fails alone."""
        for slot in completed:
            trial = self.slots[slot]
            factor = compute_rate_factor(trial.step, trial.schedule.total_steps, trial.job.train)
            if math.isfinite(trial.optimizer.step(trial.peak_rate * factor)):
                trial.loss_sum += trial.step_loss_sum
                trial.targets += trial.step_targets
                trial.complete_step()
                continue
            trial.failure = TrainingFailure(
                "nan",
                f"the gradient became NaN or infinite at step {trial.step + 1} (learning rate "
                f"{trial.peak_rate:.3g}). Try a lower learning rate, a smaller "
                "train.max_grad_norm, or bf16 instead of fp16",
            )

    def _share_time(self, seconds: float, chunks: Mapping[int, np.ndarray]) -> None:
        """Count the time of a micro-batch for its trials, by their tokens."""
        tokens = {
            slot: int(self.slots[slot].data.splits["train"].lengths[rows].sum())
            for slot, rows in chunks.items()
        }
        total = sum(tokens.values())
        for slot, count in tokens.items():
            self.slots[slot].meter.train_seconds += seconds * count / total


def repeat_rows(batch: Batch, times: int) -> Batch:
    """Return a padded batch with all of its rows several times, one copy after the other."""
    if times == 1:
        return batch
    assert batch.mask_BT is not None
    labels = batch.labels.repeat(times, *[1] * (batch.labels.ndim - 1))
    return Batch(
        batch.ids_BT.repeat(times, 1),
        batch.mask_BT.repeat(times, 1),
        labels,
        times * batch.targets,
    )


def find_unreplaced_dropout(base: Base, data: TokenData, job: JobSpec) -> str | None:
    """Return why trials on this base cannot be packed although the job allows it, or None.

    A forward pass in training mode must not draw random numbers: what a model draws in functions
    of its own would be shared by the trials of a pack.

    Args:
        base: A base that no session uses.
    """
    keys = RowKeys()
    dropout = RowDropout(base.model, keys, draws_attention(base.device))
    rows = np.arange(min(2, len(data.splits["train"])))
    classifies = job.task == "classification"
    batch = make_batch(data.splits["train"], rows, data.pad_id, base.device, classifies=classifies)
    before = _read_random_state(base.device)
    base.model.train()
    try:
        keys.set_rows(compute_row_keys(0, 0, rows), base.device)
        module = LossModule(
            base.model, job.task, chunked=False, autocast=resolve_autocast_dtype(job, base.device)
        )
        with torch.no_grad():
            module.compute_row_losses(batch)
    finally:
        dropout.remove()
        base.model.eval()
    kind = type(base.model).__name__
    if not torch.equal(before, _read_random_state(base.device)):
        return f"{kind} has dropout of its own that trials of a pack would share"
    if keys.saw_other_rows:
        return f"{kind} mixes the rows of a batch before its dropout"
    return None


def _read_random_state(device: torch.device) -> torch.Tensor:
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return state.clone()


def _pad_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    if name.endswith(_LORA_A):
        return (rank, *shape[1:])
    return (*shape[:-1], rank) if name.endswith(_LORA_B) else shape


def _read_scaling(model: Any) -> float:
    """Return the scaling of a model's adapter, which is the same in all of its layers."""
    scalings = {
        float(module.scaling["default"])
        for module in model.modules()
        if isinstance(getattr(module, "scaling", None), dict) and "default" in module.scaling
    }
    (scaling,) = scalings
    return scaling


def _list_saved_modules(
    model: Any, tensors: Sequence[str] | Mapping[str, Any]
) -> dict[str, nn.Module]:
    """Return the modules that are trained whole, by their path in the base."""
    paths = {
        name.removeprefix(_PEFT_PREFIX).partition(_SAVED)[0] for name in tensors if _SAVED in name
    }
    return {
        path: model.get_submodule(f"{_PEFT_PREFIX}{path}").original_module for path in sorted(paths)
    }
