"""Layers of a base model with the adapters of several trials beside them.

The rows of a micro-batch are ordered by slot. Rows of different trials are different rows of the
batch, never parts of one row, so that attention cannot carry a NaN from one trial to another.
Dimensions: N rows, T tokens, K slots, R rank, I and O sizes of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional


@dataclass(frozen=True)
class SlotRows:
    """The rows of one slot in a micro-batch."""

    slot: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Return the number of rows."""
        return self.stop - self.start


class RowMap:
    """The slots of the rows of the current micro-batch, which all layers of a pack read.

    It must not change between a forward pass and its backward pass: a checkpointed layer is
    computed again there.
    """

    def __init__(self) -> None:
        self.parts: tuple[SlotRows, ...] = ()

    def set_counts(self, counts: Mapping[int, int]) -> None:
        """Set the number of rows of each slot, in the order in which they follow each other."""
        parts, start = [], 0
        for slot, count in counts.items():
            parts.append(SlotRows(slot, start, start + count))
            start += count
        self.parts = tuple(parts)

    @property
    def are_equal(self) -> bool:
        """Return whether all slots have the same number of rows."""
        return len({part.count for part in self.parts}) <= 1


class PackedLinear(nn.Module):
    """A frozen matrix with one LoRA adapter for each slot.

    The result for a row is that of PEFT's layer with the row's adapter:
    base(x) + scaling x B A x.

    Args:
        base_layer: The frozen layer: linear, transposed (GPT-2), or quantised.
        lora_a_KRI: First matrices; rows above a slot's rank are 0.
        lora_b_KOR: Second matrices; columns above a slot's rank are 0.
        scaling_K: Scaling of each slot.
        rows: Slots of the rows.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        lora_a_KRI: nn.Parameter,
        lora_b_KOR: nn.Parameter,
        scaling_K: torch.Tensor,
        rows: RowMap,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a_KRI, self.lora_b_KOR = lora_a_KRI, lora_b_KOR
        self.scaling_K, self.rows = scaling_K, rows

    def forward(self, hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Return the layer's result for rows N x ... x I."""
        output: torch.Tensor = self.base_layer(hidden, *arguments, **options)
        inputs = hidden.to(self.lora_a_KRI.dtype)
        delta = self._apply_equal(inputs) if self.rows.are_equal else self._apply_each(inputs)
        return output + delta.to(output.dtype)

    def _apply_equal(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the adapters' part where all slots have as many rows: two batched products."""
        slots = [part.slot for part in self.rows.parts]
        is_whole = slots == list(range(len(self.lora_a_KRI)))
        lora_a = self.lora_a_KRI if is_whole else self.lora_a_KRI[slots]
        lora_b = self.lora_b_KOR if is_whole else self.lora_b_KOR[slots]
        grouped = inputs.reshape(len(slots), -1, inputs.shape[-1])
        delta = torch.bmm(torch.bmm(grouped, lora_a.transpose(1, 2)), lora_b.transpose(1, 2))
        delta = delta * self.scaling_K[slots].view(-1, 1, 1)
        return delta.view(*inputs.shape[:-1], -1)

    def _apply_each(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the adapters' part for any numbers of rows, one slot after another."""
        deltas = []
        for part in self.rows.parts:
            rows = inputs[part.start : part.stop]
            inner = functional.linear(rows, self.lora_a_KRI[part.slot])
            delta = functional.linear(inner, self.lora_b_KOR[part.slot])
            deltas.append(delta * self.scaling_K[part.slot])
        return torch.cat(deltas)


class PackedModule(nn.Module):
    """A module that is trained whole, with values of its own for each slot: a classifier's head.

    Args:
        module: The module; its own values are not used.
        parameters: Name in the module -> values of all slots, K x shape.
        rows: Slots of the rows.
    """

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, nn.Parameter], rows: RowMap
    ) -> None:
        super().__init__()
        self.module = module
        self.names = list(parameters)
        self.stacked = nn.ParameterList(parameters.values())
        self.rows = rows

    def forward(self, hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Return the result of each slot's module for its rows."""
        outputs = []
        for part in self.rows.parts:
            values = {
                name: stacked[part.slot]
                for name, stacked in zip(self.names, self.stacked, strict=True)
            }
            rows = (hidden[part.start : part.stop], *arguments)
            outputs.append(functional_call(self.module, values, rows, options))
        return torch.cat(outputs)


@contextmanager
def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of a model's, by their path, and put them back at the end."""
    originals = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        yield
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)
