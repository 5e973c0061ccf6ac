"""Trials that are trained together, against each of them alone: the same losses and weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.packing import find_packing_refusal
from lorafleet.jobs.trials.schedule import build_schedule
from lorafleet.training.data import IGNORED, Batch, prepare_tokens
from lorafleet.training.model import Base, load_base
from lorafleet.training.packed.group import PackedGroup
from lorafleet.training.session import TrainingSession
from tests.conftest import JobMaker

CPU = torch.device("cpu")
STEPS = 12
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-3
"""Relative: what packing may change in float32. Adam turns the rounding of a gradient near 0 into a
step of the weight, which changes the loss little.
"""

OTHER_SHAPES = ((3, 0), (8, 5), (1, 1), (5, 2))
"""Rows and columns by which batches are enlarged to see how far rounding alone moves a trial."""

TRIALS: list[dict[str, Any]] = [
    {"lora__lora_r": 4, "train__learning_rate": 1e-3},
    {
        "lora__lora_r": 1,
        "train__learning_rate": 1e-2,
        "lora__lora_alpha": 64,
        "train__per_device_train_batch_size": 2,
    },
    {
        "lora__lora_r": 16,
        "train__learning_rate": 1e-5,
        "lora__use_rslora": True,
        "train__gradient_accumulation_steps": 3,
    },
    {
        "lora__lora_r": 8,
        "train__learning_rate": 3e-3,
        "lora__loraplus_lr_ratio": 8.0,
        "train__weight_decay": 0.1,
        "train__seed": 7,
        "train__lr_scheduler_type": "cosine",
        "train__max_grad_norm": 0.1,
    },
]
DROPOUTS = (0.1, 0.0, 0.4, 0.1)
"""LoRA dropout of the trials, where it is on."""


def make_jobs(make: JobMaker, trials: list[dict[str, Any]]) -> list[JobSpec]:
    fixed = {"lora__lora_dropout": 0.0, "train__max_steps": STEPS}
    return [make(**(fixed | values)).job for values in trials]


Losses = list[float]
Result = tuple[Losses, dict[str, torch.Tensor]]


def load(job: JobSpec, data: TokenData, dropout: float) -> Base:
    """A base, whose own dropout is set to a value."""
    base = load_base(job, len(data.labels), CPU)
    for module in base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return base


def train_alone(job: JobSpec, shape: tuple[int, int] = (0, 0), dropout: float = 0.0) -> Result:
    """Loss of each step, and the trained values at the end.

    Args:
        shape: Rows without loss, and columns of padding, that are added to each batch. They change
            nothing but rounding.
        dropout: The base's own.
    """
    data = prepare_tokens(job)
    base = load(job, data, dropout)
    schedule = build_schedule(job, data.count_training_rows(job), searching=False)
    session = TrainingSession.build(job, base, data, schedule)
    if any(shape):
        make_batch = session._make_batch
        session._make_batch = lambda split, rows: enlarge(  # type: ignore[method-assign]
            make_batch(split, rows), data.pad_id, shape
        )
        set_rows = session.row_keys.set_rows
        session.row_keys.set_rows = (
            lambda keys, device: set_rows(  # type: ignore[method-assign]
                np.concatenate([keys, keys[:1].repeat(shape[0])]), device
            )
        )
    losses = []
    while not session.is_done:
        session.reset_loss()
        losses.append(session.advance(session.step + 1)["train_loss"])
    tensors = {name: value.clone() for name, value in session.strategy.gather_tensors().items()}
    session.close()
    return losses, tensors


def enlarge(batch: Batch, pad_id: int, shape: tuple[int, int]) -> Batch:
    rows, columns = shape
    ids, mask, labels = batch.ids_BT, batch.mask_BT, batch.labels
    assert mask is not None
    ids = functional.pad(torch.cat([ids, ids[:1].repeat(rows, 1)]), (0, columns), value=pad_id)
    mask = functional.pad(torch.cat([mask, mask[:1].repeat(rows, 1)]), (0, columns))
    without_loss = torch.full_like(labels[:1], IGNORED)
    labels = torch.cat([labels, *[without_loss] * rows])
    if labels.dim() > 1:
        labels = functional.pad(labels, (0, columns), value=IGNORED)
    return replace(batch, ids_BT=ids, mask_BT=mask, labels=labels)


def make_group(
    job: JobSpec,
    slots: int,
    rank: int = 16,
    dropout: float = 0.0,
    slots_per_pass: int | None = None,
) -> PackedGroup:
    data = prepare_tokens(job)
    return PackedGroup(load(job, data, dropout), data, slots, rank, slots_per_pass)


def enter(group: PackedGroup, slot: int, job: JobSpec) -> None:
    rows = group.data.count_training_rows(job)
    group.enter(slot, job, build_schedule(job, rows, searching=False))


def train_packed(group: PackedGroup, jobs: dict[int, JobSpec]) -> dict[int, Result]:
    losses: dict[int, Losses] = {slot: [] for slot in jobs}
    for slot, job in jobs.items():
        enter(group, slot, job)
    while group.active:
        for slot in group.run_micro_batch():
            trial = group.slots[slot]
            losses[slot].append(trial.loss_sum / trial.targets)
            trial.reset_loss()
    results = {slot: (losses[slot], group.get_tensors(slot)) for slot in jobs}
    group.close()
    return results


def measure_gap(one: Result, other: Result) -> tuple[float, float]:
    """Largest relative difference of the losses, and of the trained tensors."""
    assert len(one[0]) == len(other[0])
    assert len(one[0]) >= STEPS
    assert one[1].keys() == other[1].keys()
    losses = max(
        abs(first - second) / abs(second) for first, second in zip(one[0], other[0], strict=True)
    )
    tensors = max(
        float((value - other[1][name]).norm() / other[1][name].norm().clamp(min=1e-6))
        for name, value in one[1].items()
    )
    return losses, tensors


def assert_same(packed: Result, job: JobSpec, dropout: float = 0.0) -> None:
    """Compare with the trial alone.

    A trial that rounding alone moves further (a high rate, a large alpha) may move three times as
    far: its own spread is measured with batches of other shapes.
    """
    alone = train_alone(job, dropout=dropout)
    gap = measure_gap(packed, alone)
    if gap[0] <= LOSS_TOLERANCE and gap[1] <= WEIGHT_TOLERANCE:
        return
    spreads = [measure_gap(train_alone(job, shape, dropout), alone) for shape in OTHER_SHAPES]
    spread = [max(values) for values in zip(*spreads, strict=True)]
    assert gap[0] <= max(LOSS_TOLERANCE, 3 * spread[0]), (gap, spread)
    assert gap[1] <= max(WEIGHT_TOLERANCE, 3 * spread[1]), (gap, spread)


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_a_packed_trial_is_the_trial_alone(
    task: str, bert_job: JobMaker, llama_job: JobMaker
) -> None:
    """Different ranks, rates, alphas, schedules, batch sizes and seeds, together."""
    jobs = make_jobs(bert_job if task == "classification" else llama_job, TRIALS)
    packed = train_packed(make_group(jobs[0], 4), dict(enumerate(jobs)))
    for slot, job in enumerate(jobs):
        assert_same(packed[slot], job)


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_dropout_of_a_packed_trial_is_that_of_the_trial_alone(
    task: str, bert_job: JobMaker, llama_job: JobMaker
) -> None:
    """That of the adapters, which differs between the trials, and that of the base."""
    trials = [
        trial | {"lora__lora_dropout": dropout}
        for trial, dropout in zip(TRIALS, DROPOUTS, strict=True)
    ]
    jobs = make_jobs(bert_job if task == "classification" else llama_job, trials)
    packed = train_packed(make_group(jobs[0], 4, dropout=0.2), dict(enumerate(jobs)))
    for slot, job in enumerate(jobs):
        assert_same(packed[slot], job, dropout=0.2)
    without = train_alone(jobs[1])
    assert measure_gap(packed[1], without)[0] > 100 * LOSS_TOLERANCE


@pytest.mark.parametrize(
    "kind",
    [
        "gpt2",
        pytest.param("gpt_neo", marks=pytest.mark.long),
        "nf4",
        pytest.param("int8", marks=pytest.mark.long),
        "all-linear",
        "checkpointing",
    ],
)
def test_kinds_of_bases(
    kind: str, llama_job: JobMaker, tiny_gpt2: Path, tiny_gpt_neo: Path
) -> None:
    """Transposed matrices, tied embeddings, quantised bases, and layers that are computed again."""
    values: dict[str, Any] = {
        "gpt2": {"model__model_name_or_path": str(tiny_gpt2)},
        "gpt_neo": {"model__model_name_or_path": str(tiny_gpt_neo)},
        "nf4": {"method": "qlora"},
        "int8": {"method": "qlora", "qlora__quant_type": "int8"},
        "all-linear": {"lora__lora_target_modules": "all-linear"},
        "checkpointing": {"train__gradient_checkpointing": True},
    }[kind]
    trials = [trial | values | {"lora__lora_dropout": 0.1} for trial in TRIALS[1:3]]
    jobs = make_jobs(llama_job, trials)
    packed = train_packed(make_group(jobs[0], 2, dropout=0.1), dict(enumerate(jobs)))
    for slot, job in enumerate(jobs):
        assert_same(packed[slot], job, dropout=0.1)


@pytest.mark.parametrize("slots_per_pass", [1, 3])
def test_passes_of_fewer_slots_train_the_same(llama_job: JobMaker, slots_per_pass: int) -> None:
    jobs = make_jobs(llama_job, TRIALS)
    group = make_group(jobs[0], 4, slots_per_pass=slots_per_pass)
    packed = train_packed(group, dict(enumerate(jobs)))
    for slot, job in enumerate(jobs):
        assert_same(packed[slot], job)


def test_an_error_in_a_micro_batch_costs_its_steps_alone(
    llama_job: JobMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes after a part of the gradients was added."""
    jobs = make_jobs(llama_job, TRIALS)
    group = make_group(jobs[0], 4)
    backward = PackedGroup._backward
    calls = 0

    def fail(self: PackedGroup, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        backward(self, *arguments)
        if calls in (3, 4, 11):
            raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(PackedGroup, "_backward", fail)
    for slot, job in enumerate(jobs):
        enter(group, slot, job)
    losses: dict[int, Losses] = {slot: [] for slot in range(4)}
    while group.active:
        try:
            completed = group.run_micro_batch()
        except torch.OutOfMemoryError:
            group.restart_steps()
            continue
        for slot in completed:
            trial = group.slots[slot]
            losses[slot].append(trial.loss_sum / trial.targets)
            trial.reset_loss()
    assert calls > 11
    for slot, job in enumerate(jobs):
        assert_same((losses[slot], group.get_tensors(slot)), job)


@pytest.mark.long
def test_order_and_neighbours_change_nothing_but_rounding(llama_job: JobMaker) -> None:
    jobs = make_jobs(llama_job, TRIALS)
    forward = train_packed(make_group(jobs[0], 4), dict(enumerate(jobs)))
    backward = train_packed(make_group(jobs[0], 4), dict(enumerate(reversed(jobs))))
    pair = train_packed(make_group(jobs[0], 6, rank=32), {4: jobs[1], 2: jobs[3]})
    for slot, job in enumerate(jobs):
        assert_same(forward[slot], job)
        assert_same(backward[3 - slot], job)
    assert_same(pair[4], jobs[1])
    assert_same(pair[2], jobs[3])


def test_a_slot_that_is_entered_again_begins_anew(llama_job: JobMaker) -> None:
    """Nothing of the earlier trial is left: values, moments, age, or place in the data."""
    first, second, third = make_jobs(llama_job, TRIALS[:3])
    group = make_group(first, 2)
    enter(group, 0, first)
    enter(group, 1, second)
    for _ in range(5):
        group.run_micro_batch()
    group.leave(1)
    enter(group, 1, third)
    losses: Losses = []
    while group.active:
        if 1 in group.run_micro_batch():
            trial = group.slots[1]
            losses.append(trial.loss_sum / trial.targets)
            trial.reset_loss()
    assert_same((losses, group.get_tensors(1)), third)


@pytest.mark.parametrize("where", ["values", "gradients", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_slot_that_is_not_finite_fails_alone(llama_job: JobMaker, where: str, bad: float) -> None:
    jobs = make_jobs(llama_job, [TRIALS[0], TRIALS[0] | {"train__seed": 3}])
    group = make_group(jobs[0], 2)
    for slot, job in enumerate(jobs):
        enter(group, slot, job)
    assert group.buffers is not None
    losses: Losses = []
    while group.active:
        if group.slots[0].step == 3 and group.slots[0].failure is None:
            getattr(group.buffers, f"{where}_KP")[0, 5] = bad
        for slot in group.run_micro_batch():
            if slot == 1:
                trial = group.slots[1]
                losses.append(trial.loss_sum / trial.targets)
                trial.reset_loss()
    failure = group.slots[0].failure
    if (where, math.isnan(bad)) == ("exp_avg_sq", False):
        assert failure is None  # torch's AdamW, too, leaves a value with an infinite moment alone
    else:
        assert failure is not None
        assert failure.failure_class == "nan"
        assert "became NaN or infinite at step" in str(failure)
    assert_same((losses, group.get_tensors(1)), jobs[1])


def test_the_base_is_left_as_it_was(llama_job: JobMaker) -> None:
    job = make_jobs(llama_job, TRIALS[:1])[0]
    group = make_group(job, 2)
    modules = [type(module) for module in group.base.model.modules()]
    weights = {name: value.clone() for name, value in group.base.model.state_dict().items()}
    train_packed(group, {0: job})
    assert [type(module) for module in group.base.model.modules()] == modules
    after = group.base.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())


@pytest.mark.long
def test_a_hundred_steps(llama_job: JobMaker) -> None:
    """With dropout, and all the differences that trials of a pack can have."""
    trials = [
        trial | {"lora__lora_dropout": rate, "train__max_steps": 100}
        for trial, rate in zip(TRIALS, DROPOUTS, strict=True)
    ]
    jobs = make_jobs(llama_job, trials)
    packed = train_packed(make_group(jobs[0], len(jobs)), dict(enumerate(jobs)))
    for slot, job in enumerate(jobs):
        assert_same(packed[slot], job)


@pytest.mark.long
@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking trains for minutes
)
@given(
    trials=st.lists(
        st.fixed_dictionaries(
            {
                "lora__lora_r": st.integers(1, 64),
                "lora__lora_alpha": st.sampled_from([1, 16, 128]),
                "lora__use_rslora": st.booleans(),
                "lora__lora_dropout": st.sampled_from([0.0, 0.1, 0.5]),
                "lora__loraplus_lr_ratio": st.sampled_from([None, 2.0, 16.0]),
                "train__learning_rate": st.floats(-5, -2).map(lambda power: 10**power),
                "train__per_device_train_batch_size": st.integers(1, 5),
                "train__gradient_accumulation_steps": st.integers(1, 3),
                "train__seed": st.integers(0, 3),
            }
        ),
        min_size=1,
        max_size=4,
    )
)
def test_random_packs(llama_job: JobMaker, trials: list[dict[str, Any]]) -> None:
    jobs = make_jobs(
        llama_job, [{k: v for k, v in trial.items() if v is not None} for trial in trials]
    )
    packed = train_packed(make_group(jobs[0], len(jobs), rank=64), dict(enumerate(jobs)))
    for slot, job in enumerate(jobs):
        assert_same(packed[slot], job)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"method": "full"}, "method full is trained alone"),
        ({"lora__use_dora": True}, "DoRA, PiSSA and OLoRA are trained alone"),
        ({"train__optim": "adamw_8bit"}, "train.optim is adamw_8bit"),
        ({"resources__workers_per_node": 2}, "it has several processes"),
        ({"lora__lora_r": 64}, "its rank 64 is above that of the pack, 16"),
    ],
)
def test_what_is_not_packed(llama_job: JobMaker, values: dict[str, Any], reason: str) -> None:
    job = llama_job(**({"lora__lora_dropout": 0.0} | values)).job
    group = make_group(llama_job(lora__lora_dropout=0.0).job, 1)
    with pytest.raises(UserError, match=f"the trial cannot be packed: {reason}"):
        enter(group, 0, job)
    assert find_packing_refusal(llama_job(lora__lora_dropout=0.0).job) is None
