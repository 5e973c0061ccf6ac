"""Train the trials of a pack: one forward and one backward pass of the base for all of them.

group = PackedGroup(base, data, slots=4, max_rank=32)
group.enter(0, job, schedule)
while group.active:
    for slot in group.run_micro_batch():  # the slots that have completed a step
        ...
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs.errors import TrainingFailure, UserError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.defaults import resolve_learning_rate
from lorafleet.jobs.trials.schedule import Schedule
from lorafleet.training.data import (
    Batch,
    BatchPlan,
    count_targets,
    make_batch,
    split_micro_batches,
)
from lorafleet.training.evaluation import resolve_autocast_dtype
from lorafleet.training.loss import LossModule
from lorafleet.training.methods import attach, detach, get_trained_parameters
from lorafleet.training.model import Base
from lorafleet.training.optim import compute_rate_factor
from lorafleet.training.packed.adamw import SlotOptimizer, SlotRates
from lorafleet.training.packed.buffers import SlotBuffers, TrainedShape
from lorafleet.training.packed.layers import PackedLinear, PackedModule, RowMap, replace_modules

_PEFT_PREFIX = "base_model.model."
_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"
_SAVED = ".modules_to_save.default."


@dataclass
class Slot:
    """The trial of a slot, and where it is in its data."""

    job: JobSpec
    schedule: Schedule
    plan: BatchPlan
    shapes: dict[str, tuple[int, ...]]
    """Names and true shapes of the trained tensors."""
    peak_rate: float
    optimizer: SlotOptimizer
    step: int = 0
    """Optimizer steps so far."""
    micro_batches: list[np.ndarray] = field(default_factory=list)
    """Micro-batches of the current step that are left."""
    step_targets: int = 1
    """Targets of all micro-batches of the current step."""
    loss_sum: float = 0.0
    targets: int = 0
    """Loss and targets since `reset_loss`."""
    failure: TrainingFailure | None = None

    @property
    def is_done(self) -> bool:
        """Return whether the last step was taken, or the trial has failed."""
        return self.failure is not None or self.step >= self.schedule.total_steps

    def reset_loss(self) -> None:
        """Start a new mean of the reported loss."""
        self.loss_sum, self.targets = 0.0, 0


def get_packing_refusal(job: JobSpec, model: nn.Module) -> str | None:
    """Return why a trial cannot be packed, or None.

    Args:
        model: The base model.
    """
    lora = job.lora
    if job.method not in ("lora", "qlora"):
        return f"method {job.method} is trained alone"
    if lora.use_dora or lora.has_modified_base:
        return "DoRA, PiSSA and OLoRA are trained alone"
    if job.resources.world_size > 1:
        return "it has several processes"
    if job.train.optim != "adamw_torch":
        return f"train.optim is {job.train.optim}"
    if job.train.mixed_precision == "fp16":
        return "train.mixed_precision is fp16, whose loss scale would be shared"
    if job.train.packing or job.uses_padding_free or job.train.torch_compile:
        return "train.packing, train.padding_free and train.torch_compile are for trials alone"
    if lora.lora_dropout or any(
        module.p for module in model.modules() if isinstance(module, nn.Dropout)
    ):
        return "dropout is drawn for each trial alone"
    return None


class PackedGroup:
    """Trials that share a base, and the micro-batches in which they are trained.

    All of them have the same rows and the same `lora_target_modules`. A slot that becomes free
    can be entered again at any time between two micro-batches.

    Args:
        base: A base that no session uses. The group leaves it as it was after each call.
        slots: Number of slots.
        max_rank: Largest rank that a trial may have.
    """

    def __init__(self, base: Base, data: TokenData, slots: int, max_rank: int) -> None:
        self.base, self.data = base, data
        self.capacity, self.max_rank = slots, max_rank
        self.slots: dict[int, Slot] = {}
        self.rows = RowMap()
        self.scaling_K = torch.zeros(slots, device=base.device)
        self.buffers: SlotBuffers | None = None
        self._modules: dict[str, nn.Module] = {}
        # Rows of a buffer are never dense in the way that torch's autograd prefers.
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout")

    @property
    def active(self) -> list[int]:
        """Return the slots whose trial is not done."""
        return [slot for slot, trial in sorted(self.slots.items()) if not trial.is_done]

    def enter(self, slot: int, job: JobSpec, schedule: Schedule) -> Slot:
        """Begin a trial in a slot. Its first values are those that it would have alone.

        Raises:
            UserError: The trial cannot be packed, or not with the trials that are here.
        """
        refusal = get_packing_refusal(job, self.base.model)
        if refusal is None and job.lora.lora_r > self.max_rank:
            refusal = f"its rank {job.lora.lora_r} is above that of the pack, {self.max_rank}"
        if refusal is not None:
            raise UserError(f"the trial cannot be packed: {refusal}")
        model = attach(job, self.base)
        try:
            tensors = {
                name: parameter.detach().clone()
                for name, parameter in get_trained_parameters(model).items()
            }
            scaling = _read_scaling(model)
            heads = _list_saved_modules(model, tensors)
        finally:
            detach(self.base, model)
        if self.buffers is None:
            self._build(tensors, heads)
        buffers = self.buffers
        assert buffers is not None
        if tensors.keys() != buffers.shapes.keys():
            raise UserError("the trial cannot be packed: it trains other layers than the pack")
        buffers.clear(slot)
        buffers.write(slot, tensors)
        self.scaling_K[slot] = scaling
        split = self.data.splits["train"]
        trial = Slot(
            job,
            schedule,
            BatchPlan(
                split.lengths,
                schedule.batch_rows,
                job.train.seed,
                grouped=job.train.group_by_length,
            ),
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            resolve_learning_rate(job).value,
            SlotOptimizer(buffers, slot),
        )
        self.slots[slot] = trial
        return trial

    def leave(self, slot: int) -> None:
        """End the trial of a slot, and forget its values."""
        self.slots.pop(slot, None)
        if self.buffers is not None:
            self.buffers.clear(slot)

    def get_tensors(self, slot: int) -> dict[str, torch.Tensor]:
        """Return copies of what a slot has trained, by the names of a single trial."""
        assert self.buffers is not None
        return self.buffers.read(slot, self.slots[slot].shapes)

    def _build(self, tensors: dict[str, torch.Tensor], heads: dict[str, nn.Module]) -> None:
        """Create the buffers and the layers for trials that train these tensors."""
        shapes = [
            TrainedShape(name, _pad_rank(name, tuple(tensor.shape), self.max_rank))
            for name, tensor in tensors.items()
        ]
        self.buffers = buffers = SlotBuffers(shapes, self.capacity, self.base.device)
        parameters = {name: buffers.make_parameter(name) for name in tensors}
        for name, lora_a in parameters.items():
            if name.endswith(_LORA_A):
                path = name.removeprefix(_PEFT_PREFIX).removesuffix(_LORA_A)
                lora_b = parameters[name.removesuffix(_LORA_A) + _LORA_B]
                layer = self.base.model.get_submodule(path)
                self._modules[path] = PackedLinear(layer, lora_a, lora_b, self.scaling_K, self.rows)
        for path, module in heads.items():
            prefix = f"{_PEFT_PREFIX}{path}{_SAVED}"
            stacked = {
                name.removeprefix(prefix): parameter
                for name, parameter in parameters.items()
                if name.startswith(prefix)
            }
            self._modules[path] = PackedModule(module, stacked, self.rows)

    def run_micro_batch(self) -> list[int]:
        """Train the next micro-batch of every trial that is not done.

        Returns:
            The slots that have completed a step, or have failed in it.
        """
        active = self.active
        if not active:
            return []
        chunks = {slot: self._take_rows(self.slots[slot]) for slot in active}
        self.rows.set_counts({slot: len(rows) for slot, rows in chunks.items()})
        first = self.slots[active[0]].job
        batch = make_batch(
            self.data.splits["train"],
            np.concatenate(list(chunks.values())),
            self.data.pad_id,
            self.base.device,
            classifies=first.task == "classification",
        )
        self.base.model.train()
        try:
            with replace_modules(self.base.model, self._modules):
                losses_N = self._compute_losses(first, batch)
                self._backward(losses_N, active, chunks)
        finally:
            self.base.model.eval()
        completed = [slot for slot in active if not self.slots[slot].micro_batches]
        self._step(completed)
        return completed

    def _take_rows(self, trial: Slot) -> np.ndarray:
        """Return the rows of a trial's next micro-batch."""
        if not trial.micro_batches:
            rows = trial.plan.select_rows(trial.step)
            trial.micro_batches = split_micro_batches(
                rows, trial.job.train.per_device_train_batch_size, 0, 1
            )
            classifies = trial.job.task == "classification"
            split = self.data.splits["train"]
            trial.step_targets = max(1, count_targets(split, rows, classifies=classifies))
        return trial.micro_batches.pop(0)

    def _compute_losses(self, job: JobSpec, batch: Batch) -> torch.Tensor:
        """Return the summed loss of each row."""
        module = LossModule(
            self.base.model,
            job.task,
            chunked=job.train.chunked_loss,
            autocast=resolve_autocast_dtype(job, self.base.device),
        )
        return module.compute_row_losses(batch)

    def _backward(
        self, losses_N: torch.Tensor, active: Iterable[int], chunks: dict[int, np.ndarray]
    ) -> None:
        """Add the gradients of each slot: its loss over the targets of its own whole step."""
        weights, split = [], self.data.splits["train"]
        for slot in active:
            trial = self.slots[slot]
            weights += [1.0 / trial.step_targets] * len(chunks[slot])
        weights_N = torch.tensor(weights, device=losses_N.device, dtype=losses_N.dtype)
        (losses_N * weights_N).sum().backward()
        sums = losses_N.detach()
        for part in self.rows.parts:
            trial = self.slots[part.slot]
            trial.loss_sum += float(sums[part.start : part.stop].sum())
            trial.targets += count_targets(
                split, chunks[part.slot], classifies=trial.job.task == "classification"
            )

    def _step(self, completed: list[int]) -> None:
        """Update the slots whose step is complete; one that is not finite fails alone."""
        for slot in completed:
            trial = self.slots[slot]
            train, lora = trial.job.train, trial.job.lora
            factor = compute_rate_factor(trial.step, trial.schedule.total_steps, train)
            rates = SlotRates(
                trial.peak_rate * factor,
                lora.loraplus_lr_ratio or 1.0,
                train.weight_decay,
                train.max_grad_norm,
            )
            if math.isfinite(trial.optimizer.step(rates)):
                trial.step += 1
                continue
            trial.failure = TrainingFailure(
                "nan",
                f"the gradient became NaN or infinite at step {trial.step + 1} (learning rate "
                f"{trial.peak_rate:.3g}). Try a lower learning rate, a smaller "
                "train.max_grad_norm, or bf16 instead of fp16",
            )


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


def _list_saved_modules(model: Any, tensors: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules that are trained whole, by their path in the base."""
    paths = {
        name.removeprefix(_PEFT_PREFIX).partition(_SAVED)[0] for name in tensors if _SAVED in name
    }
    return {
        path: model.get_submodule(f"{_PEFT_PREFIX}{path}").original_module for path in sorted(paths)
    }
