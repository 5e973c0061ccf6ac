"""AdamW for several trials at once, against torch's own for each of them alone."""

from __future__ import annotations

import math

import pytest
import torch

from lorafleet.training.packed.adamw import SlotOptimizer, SlotRates
from lorafleet.training.packed.buffers import SlotBuffers, TrainedShape

SHAPES = [
    TrainedShape("layer.lora_A.default.weight", (4, 6)),
    TrainedShape("layer.lora_B.default.weight", (5, 4)),
    TrainedShape("classifier.bias", (3,)),
]
RATES = [
    SlotRates(learning_rate=1e-2, lora_b_ratio=16.0, weight_decay=0.1, max_grad_norm=1.0),
    SlotRates(learning_rate=1e-5, lora_b_ratio=1.0, weight_decay=0.0, max_grad_norm=0.01),
    SlotRates(learning_rate=3e-4, lora_b_ratio=1.0, weight_decay=0.5, max_grad_norm=1e9),
]


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {shape.name: torch.randn(shape.shape, generator=generator) for shape in SHAPES}


class Alone:
    """One trial with torch's fused AdamW, in groups as `training/optim.py` makes them."""

    def __init__(self, values: dict[str, torch.Tensor], rates: SlotRates) -> None:
        self.parameters = {
            name: torch.nn.Parameter(value.clone()) for name, value in values.items()
        }
        self.rates = rates
        groups = [
            {
                "params": [self.parameters[shape.name]],
                "weight_decay": rates.weight_decay if shape.kind.decays else 0.0,
                "lr": rates.learning_rate * (rates.lora_b_ratio if shape.kind.is_lora_b else 1.0),
            }
            for shape in SHAPES
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rates.learning_rate, fused=True)

    def step(self, gradients: dict[str, torch.Tensor]) -> float:
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.rates.max_grad_norm)
        self.optimizer.step()
        return float(norm)


def add_gradients(buffers: SlotBuffers, slot: int, gradients: dict[str, torch.Tensor]) -> None:
    for name, value in gradients.items():
        buffers.gradients_KP[slot, buffers.ranges[name]] += value.flatten()


def read(buffers: SlotBuffers, slot: int) -> dict[str, torch.Tensor]:
    return buffers.read(slot, {shape.name: shape.shape for shape in SHAPES})


def test_each_slot_is_trained_as_torch_would_alone() -> None:
    """Other rates, another clipping, and another age: a slot pauses and a later one begins."""
    buffers = SlotBuffers(SHAPES, 3, torch.device("cpu"))
    alone = [Alone(draw(slot), rates) for slot, rates in enumerate(RATES)]
    for slot in range(3):
        buffers.write(slot, draw(slot))
    optimizers = [SlotOptimizer(buffers, slot) for slot in range(3)]
    for step in range(60):
        stepping = [slot for slot in range(3) if step >= 10 * slot and (slot or step % 3)]
        for slot in stepping:
            gradients = draw(1000 * slot + step)
            add_gradients(buffers, slot, gradients)
            assert optimizers[slot].step(RATES[slot]) == alone[slot].step(gradients)
    assert not buffers.gradients_KP.any()
    for slot in range(3):
        for name, value in read(buffers, slot).items():
            assert torch.equal(value, alone[slot].parameters[name].detach())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_costs_its_slot_alone(bad: float) -> None:
    buffers = SlotBuffers(SHAPES, 2, torch.device("cpu"))
    alone = Alone(draw(1), RATES[0])
    for slot in range(2):
        buffers.write(slot, draw(slot))
    before = read(buffers, 0)
    add_gradients(buffers, 0, draw(5))
    buffers.gradients_KP[0, 3] = bad
    add_gradients(buffers, 1, draw(6))
    alone.step(draw(6))
    norms = [SlotOptimizer(buffers, slot).step(RATES[0]) for slot in range(2)]
    assert not math.isfinite(norms[0])
    for name, value in read(buffers, 0).items():
        assert torch.equal(value, before[name])
    for name, value in read(buffers, 1).items():
        assert torch.equal(value, alone.parameters[name].detach())
    assert not buffers.gradients_KP.any()


def test_padding_stays_zero_and_a_cleared_slot_remembers_nothing() -> None:
    buffers = SlotBuffers(SHAPES, 2, torch.device("cpu"))
    ranks = {"layer.lora_A.default.weight": (2, 6), "layer.lora_B.default.weight": (5, 2)}
    small = {
        name: draw(0)[name][tuple(slice(0, n) for n in shape)] for name, shape in ranks.items()
    }
    buffers.write(0, small)
    for name, value in buffers.read(0, ranks).items():
        assert torch.equal(value, small[name])
    assert int(buffers.values_KP[0].count_nonzero()) == 2 * 6 + 5 * 2
    assert not buffers.values_KP[1].any()
    add_gradients(buffers, 0, draw(3))
    SlotOptimizer(buffers, 0).step(RATES[0])
    buffers.clear(0)
    for rows in (buffers.values_KP, buffers.exp_avg_KP, buffers.exp_avg_sq_KP):
        assert not rows.any()


def test_a_parameter_shares_its_memory_with_the_rows() -> None:
    """Values and gradients: a backward pass adds to the rows, and copies nothing."""
    buffers = SlotBuffers(SHAPES, 2, torch.device("cpu"))
    for slot in range(2):
        buffers.write(slot, draw(slot))
    name = SHAPES[0].name
    parameter = buffers.make_parameter(name)
    for _ in range(2):
        (parameter[1] ** 2).sum().backward()
    columns = buffers.ranges[name]
    expected = 4 * draw(1)[name].flatten()
    torch.testing.assert_close(buffers.gradients_KP[1, columns], expected)
    assert not buffers.gradients_KP[0].any()
    buffers.values_KP[1, columns] = 0.0
    assert not parameter[1].any()
