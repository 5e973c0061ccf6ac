"""AdamW (Loshchilov and Hutter, 2019) for the trial of one slot: torch's own, on rows of a pack.

The values, gradients and moments stay in the pack's buffers. Like the optimiser of a single trial
(`training/optim.py`) it is fused, so that both give the same numbers to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.optim import group_parameters, set_rate
from lorafleet.training.packed.buffers import SlotBuffers, cut

_MOMENTS = ("exp_avg", "exp_avg_sq")


class SlotOptimizer:
    """The optimiser of one slot, for one trial: create another for the next one.

    Args:
        buffers: The buffers of the pack. The slot's moments must be 0.
        shapes: Name -> true shape of each trained tensor of the trial.
    """

    def __init__(
        self, buffers: SlotBuffers, slot: int, job: JobSpec, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.buffers, self.slot, self.shapes = buffers, slot, dict(shapes)
        self.max_grad_norm = job.train.max_grad_norm
        self._steps: dict[str, torch.Tensor] = {}
        parameters, state = {}, {}
        # A tensor each, as for a single trial: the kernel computes the end of a tensor in another
        # way than its middle, with other rounding.
        for name in shapes:
            parameter = torch.nn.Parameter(buffers.view(buffers.values_KP, slot, name))
            parameter.grad = buffers.view(buffers.gradients_KP, slot, name)
            self._steps[name] = torch.zeros((), device=buffers.device)
            parameters[name] = parameter
            state[parameter] = {"step": self._steps[name]} | self._view_moments(name)
        dimensions = {name: len(shape) for name, shape in shapes.items()}
        self._groups = group_parameters(dimensions, job)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [parameters[name] for name in group.names],
                    "weight_decay": group.weight_decay,
                    "lr_ratio": group.rate_ratio,
                }
                for group in self._groups
            ],
            fused=True,
        )
        self.optimizer.state.update(state)
        # Over the same tensors as for a single trial, whose norms are added in the same order.
        self._gradients = [parameter.grad for parameter in parameters.values()]

    def _view_moments(self, name: str) -> dict[str, torch.Tensor]:
        buffers = self.buffers
        moments = (buffers.exp_avg_KP, buffers.exp_avg_sq_KP)
        return {
            moment: buffers.view(rows_KP, self.slot, name)
            for moment, rows_KP in zip(_MOMENTS, moments, strict=True)
        }

    def step(self, rate: float) -> float:
        """Clip the slot's gradient, update its values, and reset the gradient.

        Values are left as they are if the gradient is NaN or infinite.

        Args:
            rate: Learning rate of this step, before the ratios of LoRA+.

        Returns:
            The norm of the gradient before clipping.
        """
        set_rate(self.optimizer, rate)
        norm = torch.nn.utils.get_total_norm(self._gradients)
        row = self.buffers.gradients_KP[self.slot]
        is_finite = bool(torch.isfinite(norm))
        if is_finite:
            # As torch.nn.utils.clip_grads_with_norm_ does.
            row.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
            self.optimizer.step()
        row.zero_()
        return float(norm)

    def to_state(self) -> dict[str, Any]:
        """Return the state that the optimiser of the trial alone would have.

        A trial can go on alone from the checkpoint of a packed one, and the other way round.
        """
        state = self.optimizer.state_dict()
        for index, name in enumerate(self._list_names()):
            moments = {
                moment: cut(value, self.shapes[name]).clone()
                for moment, value in self._view_moments(name).items()
            }
            state["state"][index] = {"step": self._steps[name].clone()} | moments
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `to_state`, or of the optimiser of the trial alone."""
        for index, name in enumerate(self._list_names()):
            values = state["state"].get(index)
            if values is None:
                continue  # no step has been taken
            self._steps[name].copy_(values["step"])
            for moment, view in self._view_moments(name).items():
                cut(view, self.shapes[name]).copy_(values[moment])

    def _list_names(self) -> list[str]:
        """Return the trained tensors in the order in which torch numbers them."""
        return [name for group in self._groups for name in group.names]
