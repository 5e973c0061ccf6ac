"""AdamW for several trials at once, against torch's own for each of them alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from lorafleet.jobs.schema.job import JobSpec
from lorafleet.training.optim import build_optimizer
from lorafleet.training.packed.adamw import SlotOptimizer
from lorafleet.training.packed.buffers import SlotBuffers, TrainedShape
from tests.conftest import JobMaker


@dataclass(frozen=True)
class SlotRates:
    """Settings of a trial's optimiser."""

    learning_rate: float
    lora_b_ratio: float
    weight_decay: float
    max_grad_norm: float

    def make_job(self, make: JobMaker) -> JobSpec:
        ratio = {} if self.lora_b_ratio == 1.0 else {"lora__loraplus_lr_ratio": self.lora_b_ratio}
        return make(
            train__weight_decay=self.weight_decay, train__max_grad_norm=self.max_grad_norm, **ratio
        ).job


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
                "weight_decay": rates.weight_decay if len(shape.shape) > 1 else 0.0,
                "lr": rates.learning_rate * (rates.lora_b_ratio if "lora_B" in shape.name else 1.0),
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


TRUE_SHAPES = {shape.name: shape.shape for shape in SHAPES}


def read(buffers: SlotBuffers, slot: int) -> dict[str, torch.Tensor]:
    return buffers.read(slot, TRUE_SHAPES)


def make_optimizer(buffers: SlotBuffers, slot: int, job: JobSpec) -> SlotOptimizer:
    return SlotOptimizer(buffers, slot, job, TRUE_SHAPES)


def test_each_slot_is_trained_as_torch_would_alone(llama_job: JobMaker) -> None:
    """Other rates, another clipping, and another age: a slot pauses and a later one begins."""
    buffers = SlotBuffers(SHAPES, 3, torch.device("cpu"))
    alone = [Alone(draw(slot), rates) for slot, rates in enumerate(RATES)]
    for slot in range(3):
        buffers.write(slot, draw(slot))
    optimizers = [
        make_optimizer(buffers, slot, rates.make_job(llama_job)) for slot, rates in enumerate(RATES)
    ]
    for step in range(60):
        stepping = [slot for slot in range(3) if step >= 10 * slot and (slot or step % 3)]
        for slot in stepping:
            gradients = draw(1000 * slot + step)
            add_gradients(buffers, slot, gradients)
            rate = RATES[slot].learning_rate
            assert optimizers[slot].step(rate) == alone[slot].step(gradients)
    assert not buffers.gradients_KP.any()
    for slot in range(3):
        for name, value in read(buffers, slot).items():
            assert torch.equal(value, alone[slot].parameters[name].detach())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_costs_its_slot_alone(
    llama_job: JobMaker, bad: float
) -> None:
    buffers = SlotBuffers(SHAPES, 2, torch.device("cpu"))
    alone = Alone(draw(1), RATES[0])
    for slot in range(2):
        buffers.write(slot, draw(slot))
    before = read(buffers, 0)
    add_gradients(buffers, 0, draw(5))
    buffers.gradients_KP[0, 3] = bad
    add_gradients(buffers, 1, draw(6))
    alone.step(draw(6))
    job, rate = RATES[0].make_job(llama_job), RATES[0].learning_rate
    norms = [make_optimizer(buffers, slot, job).step(rate) for slot in range(2)]
    assert not math.isfinite(norms[0])
    for name, value in read(buffers, 0).items():
        assert torch.equal(value, before[name])
    for name, value in read(buffers, 1).items():
        assert torch.equal(value, alone.parameters[name].detach())
    assert not buffers.gradients_KP.any()


def test_padding_stays_zero_and_a_cleared_slot_remembers_nothing(llama_job: JobMaker) -> None:
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
    make_optimizer(buffers, 0, RATES[0].make_job(llama_job)).step(RATES[0].learning_rate)
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


@pytest.mark.parametrize("rates", RATES)
def test_a_trial_goes_on_alone_from_a_slot_and_back(llama_job: JobMaker, rates: SlotRates) -> None:
    """The state of a slot is that of the optimiser of a trial alone, with the true rank."""
    job = rates.make_job(llama_job)
    ranks = TRUE_SHAPES | {
        "layer.lora_A.default.weight": (2, 6),
        "layer.lora_B.default.weight": (5, 2),
    }
    start = {name: draw(0)[name][tuple(map(slice, shape))] for name, shape in ranks.items()}

    def draw_gradients(step: int) -> dict[str, torch.Tensor]:
        return {name: draw(step)[name][tuple(map(slice, shape))] for name, shape in ranks.items()}

    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    alone = build_optimizer(parameters, job, rates.learning_rate)

    def step_alone(step: int) -> None:
        for name, parameter in parameters.items():
            parameter.grad = draw_gradients(step)[name].clone()
        torch.nn.utils.clip_grad_norm_(parameters.values(), rates.max_grad_norm)
        alone.step()

    def step_slot(optimizer: SlotOptimizer, step: int) -> None:
        buffers = optimizer.buffers
        for name, value in draw_gradients(step).items():
            view = buffers.view(buffers.gradients_KP, optimizer.slot, name)
            view[tuple(map(slice, value.shape))] += value
        optimizer.step(rates.learning_rate)

    for step in range(5):
        step_alone(step)
    buffers = SlotBuffers(SHAPES, 2, torch.device("cpu"))
    buffers.write(1, {name: value.detach() for name, value in parameters.items()})
    slot = SlotOptimizer(buffers, 1, job, ranks)
    slot.load_state(alone.state_dict())
    step_slot(slot, 5)
    step_alone(5)
    for name, value in buffers.read(1, ranks).items():
        torch.testing.assert_close(value, parameters[name].detach(), rtol=1e-6, atol=1e-8)
    alone.load_state_dict(slot.to_state())
    with torch.no_grad():
        for name, value in buffers.read(1, ranks).items():
            parameters[name].copy_(value)
    step_slot(slot, 6)
    step_alone(6)
    for name, value in buffers.read(1, ranks).items():
        torch.testing.assert_close(value, parameters[name].detach(), rtol=1e-6, atol=1e-8)
