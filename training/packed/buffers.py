"""Store the trained values of several trials, their gradients and Adam's moments, as rows.

Suffixes of names give dimensions: K slots, P trained numbers of a slot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainedShape:
    """One trained tensor of every slot."""

    name: str
    """Name of the parameter in the adapted model of a single trial."""
    shape: tuple[int, ...]
    """Shape of a slot's part; matrices of an adapter are padded to the pack's largest rank."""


def cut(value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the part of a padded tensor that has the true shape; it shares the memory."""
    return value[tuple(slice(0, size) for size in shape)]


class SlotBuffers:
    """Trained values, gradients and moments of K slots, each a row of a K x P float32 matrix.

    Clearing, saving and clipping a slot are operations on a row. What belongs to no slot is 0.

    Args:
        shapes: The trained tensors of a slot.
        slots: Number of slots.
    """

    def __init__(self, shapes: Sequence[TrainedShape], slots: int, device: torch.device) -> None:
        self.shapes = {shape.name: shape for shape in shapes}
        self.ranges: dict[str, slice] = {}
        start = 0
        for shape in shapes:
            size = math.prod(shape.shape)
            self.ranges[shape.name] = slice(start, start + size)
            start += size
        self.slots, self.width, self.device = slots, start, device
        self.values_KP = torch.zeros(slots, start, device=device)
        self.gradients_KP = torch.zeros_like(self.values_KP)
        self.exp_avg_KP = torch.zeros_like(self.values_KP)
        self.exp_avg_sq_KP = torch.zeros_like(self.values_KP)

    def make_parameter(self, name: str) -> torch.nn.Parameter:
        """Return a tensor of all slots as a parameter of shape K x shape.

        It shares its memory with the buffers, and so does its gradient: backward passes add to
        the row of each slot.
        """
        shape = (self.slots, *self.shapes[name].shape)
        columns = self.ranges[name]
        parameter = torch.nn.Parameter(self.values_KP[:, columns].view(shape))
        parameter.grad = self.gradients_KP[:, columns].view(shape)
        return parameter

    def make_slot_parameters(self, name: str) -> list[torch.nn.Parameter]:
        """Return a tensor as one parameter for each slot, of the same memory.

        The backward pass of one slot then writes to its own row alone.
        """
        parameters = []
        for slot in range(self.slots):
            parameter = torch.nn.Parameter(self.view(self.values_KP, slot, name))
            parameter.grad = self.view(self.gradients_KP, slot, name)
            parameters.append(parameter)
        return parameters

    def clear(self, slot: int) -> None:
        """Forget everything about the trial of a slot."""
        for rows in (self.values_KP, self.gradients_KP, self.exp_avg_KP, self.exp_avg_sq_KP):
            rows[slot].zero_()

    def write(self, slot: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the trained values of a slot; padding stays 0.

        Args:
            tensors: Name -> value, with the true rank.
        """
        for name, value in tensors.items():
            target = self.view(self.values_KP, slot, name)
            target.zero_()
            cut(target, value.shape).copy_(value)

    def read(self, slot: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Return copies of the trained values of a slot, cut to their true shapes."""
        return {
            name: cut(self.view(self.values_KP, slot, name), shape).clone()
            for name, shape in shapes.items()
        }

    def view(self, rows_KP: torch.Tensor, slot: int, name: str) -> torch.Tensor:
        """Return the part of a tensor in a row of one of the matrices; it shares the memory."""
        return rows_KP[slot, self.ranges[name]].view(self.shapes[name].shape)
