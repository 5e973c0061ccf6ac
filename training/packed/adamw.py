"""AdamW (Loshchilov and Hutter, 2019) for the trial of one slot: torch's own, on rows of a pack.

The values, gradients and moments stay in the pack's buffers. Like the optimiser of a single trial
(`training/optim.py`) it is fused, so that both give the same numbers to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorafleet.training.packed.buffers import SlotBuffers, TrainedKind


@dataclass(frozen=True)
class SlotRates:
    """Settings of a slot's optimiser in one step."""

    learning_rate: float
    lora_b_ratio: float
    """Factor on the rate of B matrices (LoRA+)."""
    weight_decay: float
    max_grad_norm: float


class SlotOptimizer:
    """The optimiser of one slot, for one trial: create another for the next one.

    Args:
        buffers: The buffers of the pack. The slot's moments must be 0.
    """

    def __init__(self, buffers: SlotBuffers, slot: int) -> None:
        self.buffers, self.slot = buffers, slot
        groups: dict[TrainedKind, list[torch.nn.Parameter]] = {}
        state = {}
        # A tensor each, as for a single trial: the kernel computes the end of a tensor in another
        # way than its middle, with other rounding.
        for name, shape in buffers.shapes.items():
            parameter = torch.nn.Parameter(buffers.view(buffers.values_KP, slot, name))
            parameter.grad = buffers.view(buffers.gradients_KP, slot, name)
            groups.setdefault(shape.kind, []).append(parameter)
            state[parameter] = {
                "step": torch.zeros((), device=buffers.device),
                "exp_avg": buffers.view(buffers.exp_avg_KP, slot, name),
                "exp_avg_sq": buffers.view(buffers.exp_avg_sq_KP, slot, name),
            }
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "kind": kind} for kind, parameters in groups.items()],
            fused=True,
        )
        self.optimizer.state.update(state)

    def step(self, rates: SlotRates) -> float:
        """Clip the slot's gradient, update its values, and reset the gradient.

        Values are left as they are if the gradient is NaN or infinite.

        Returns:
            The norm of the gradient before clipping.
        """
        for group in self.optimizer.param_groups:
            kind = group["kind"]
            group["lr"] = rates.learning_rate * (rates.lora_b_ratio if kind.is_lora_b else 1.0)
            group["weight_decay"] = rates.weight_decay if kind.decays else 0.0
        # Over the same tensors as for a single trial, whose norms are added in the same order.
        norm = torch.nn.utils.get_total_norm(self._list_gradients())
        row = self.buffers.gradients_KP[self.slot]
        is_finite = bool(torch.isfinite(norm))
        if is_finite:
            # As torch.nn.utils.clip_grads_with_norm_ does.
            row.mul_((rates.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
            self.optimizer.step()
        row.zero_()
        return float(norm)

    def _list_gradients(self) -> list[torch.Tensor]:
        buffers = self.buffers
        return [buffers.view(buffers.gradients_KP, self.slot, name) for name in buffers.shapes]
