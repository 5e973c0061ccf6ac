"""Layers of a base model with the adapters of several trials beside them.

The rows of a micro-batch are ordered by slot. Rows of different trials are different rows of the
batch, never parts of one row, so that attention cannot carry a NaN from one trial to another.
Dimensions: N rows, T tokens, K slots, S slots that have rows, R rank, I and O sizes of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from lorafleet.training.dropout import DropRates, LayerMasks, RowKeys


@dataclass(frozen=True)
class SlotRows:
    """The rows of one slot in a micro-batch."""

    slot: int
    start: int
    stop: int | None
    """None for the end of the micro-batch, whatever its length."""

    def select(self, rows: torch.Tensor) -> torch.Tensor:
        """Return these rows of a tensor; they share its memory."""
        return rows[self.start : self.stop]


class RowMap:
    """The slots of the rows of the current micro-batch, which all layers of a pack read.

    It must not change between a forward pass and its backward pass: a checkpointed layer is
    computed again there.

    Args:
        slots: Number of slots.
        keys: Keys of the rows, for dropout.
    """

    def __init__(self, slots: int, device: torch.device, keys: RowKeys) -> None:
        self.keys = keys
        self.device = device
        self.scaling: list[float] = [1.0] * slots
        """Scaling of each slot's adapter."""
        self.lora_dropout: list[float] = [0.0] * slots
        """Dropout before each slot's adapter."""
        self.parts: tuple[SlotRows, ...] = ()
        self.are_equal = True
        """Whether all slots have the same number of rows."""
        self.drop_rates: DropRates | None = None
        """Dropout of each row; None if no row has any, or outside training."""
        self.scaling_S = torch.zeros(0)
        self.is_whole = True
        """Whether all slots have rows, in their order."""

    def set_counts(self, counts: Mapping[int, int], *, trains: bool) -> None:
        """Set the number of rows of each slot, in the order in which they follow each other.

        Args:
            trains: Dropout is on.
        """
        parts, start = [], 0
        for slot, count in counts.items():
            parts.append(SlotRows(slot, start, start + count))
            start += count
        self._set(parts, are_equal=len(set(counts.values())) <= 1)
        rates = [self.lora_dropout[slot] for slot, count in counts.items() for _ in range(count)]
        has_dropout = trains and any(rates)
        self.drop_rates = DropRates.build(rates, self.device) if has_dropout else None

    def set_single(self, slot: int) -> None:
        """Let all rows of all following micro-batches belong to one slot, without dropout."""
        self._set([SlotRows(slot, 0, None)], are_equal=True)
        self.drop_rates = None

    def _set(self, parts: Sequence[SlotRows], *, are_equal: bool) -> None:
        slots = [part.slot for part in parts]
        self.parts, self.are_equal = tuple(parts), are_equal
        self.scaling_S = torch.tensor([self.scaling[slot] for slot in slots], device=self.device)
        self.is_whole = slots == list(range(len(self.scaling)))


@dataclass(frozen=True)
class SlotTensors:
    """A trained tensor of all slots, together and of each slot: two views of one memory."""

    stacked: nn.Parameter
    """K x shape."""
    slots: list[nn.Parameter]
    """One of the shape for each slot."""

    def stack(self, rows: RowMap) -> torch.Tensor:
        """Return the tensors of the slots that have rows, in their order."""
        if rows.is_whole:
            return self.stacked
        return torch.stack([self.slots[part.slot] for part in rows.parts])


class PackedLinear(nn.Module):
    """A frozen matrix with one LoRA adapter for each slot.

    The result for a row is that of PEFT's layer with the row's adapter:
    base(x) + scaling x B A dropout(x).

    Args:
        base_layer: The frozen layer: linear, transposed (GPT-2), or quantised.
        lora_a: First matrices, R x I; rows above a slot's rank are 0.
        lora_b: Second matrices, O x R; columns above a slot's rank are 0.
        rows: Slots of the rows.
        path: Path of the layer in the base.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        lora_a: SlotTensors,
        lora_b: SlotTensors,
        rows: RowMap,
        path: str,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a, self.lora_b = lora_a, lora_b
        self.rows = rows
        # The path of PEFT's dropout layer: its masks are those of the trial alone.
        self.masks = LayerMasks(rows.keys, f"{path}.lora_dropout.default")

    def forward(self, hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Return the layer's result for rows N x ... x I."""
        output: torch.Tensor = self.base_layer(hidden, *arguments, **options)
        inputs = hidden.to(self.lora_a.stacked.dtype)
        if self.rows.drop_rates is not None:
            inputs = self.masks.drop_each(inputs, self.rows.drop_rates)
        is_batched = self.rows.are_equal and len(self.rows.parts) > 1
        delta = self._apply_equal(inputs) if is_batched else self._apply_each(inputs)
        return output + delta.to(output.dtype)

    def _apply_equal(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the adapters' part where all slots have as many rows: two batched products."""
        rows = self.rows
        lora_a, lora_b = self.lora_a.stack(rows), self.lora_b.stack(rows)
        grouped = inputs.reshape(len(rows.parts), -1, inputs.shape[-1])
        inner = torch.bmm(grouped, lora_a.transpose(1, 2))
        delta = torch.bmm(inner, lora_b.transpose(1, 2))
        delta = delta * rows.scaling_S.to(delta.dtype).view(-1, 1, 1)
        return delta.view(*inputs.shape[:-1], -1)

    def _apply_each(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the adapters' part for any numbers of rows, one slot after another."""
        deltas = []
        for part in self.rows.parts:
            inner = functional.linear(part.select(inputs), self.lora_a.slots[part.slot])
            delta = functional.linear(inner, self.lora_b.slots[part.slot])
            deltas.append(delta * self.rows.scaling[part.slot])
        return deltas[0] if len(deltas) == 1 else torch.cat(deltas)


class PackedModule(nn.Module):
    """A module that is trained whole, with values of its own for each slot: a classifier's head.

    Args:
        module: The module; its own values are not used.
        parameters: Name in the module -> values of the slots.
        rows: Slots of the rows.
    """

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, SlotTensors], rows: RowMap
    ) -> None:
        super().__init__()
        self.module = module
        self.parameters_of_slots = dict(parameters)
        self.rows = rows

    def forward(self, hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Return the result of each slot's module for its rows."""
        outputs = []
        for part in self.rows.parts:
            values = {
                name: tensors.slots[part.slot] for name, tensors in self.parameters_of_slots.items()
            }
            # Its dropout sees the rows of this slot alone.
            own_keys = (
                nullcontext() if part.stop is None else self.rows.keys.select(part.start, part.stop)
            )
            with own_keys:
                arguments_of_slot = (part.select(hidden), *arguments)
                outputs.append(functional_call(self.module, values, arguments_of_slot, options))
        return torch.cat(outputs)


class ModuleSwap:
    """Replaces modules of a model by others, by their path, until `restore`.

    Args:
        modules: Path -> the module that takes its place.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.model = model
        self._originals = {path: model.get_submodule(path) for path in modules}
        for path, module in modules.items():
            model.set_submodule(path, module)

    def restore(self) -> None:
        """Put the model's own modules back. May be called twice."""
        for path, module in self._originals.items():
            self.model.set_submodule(path, module)
        self._originals = {}
