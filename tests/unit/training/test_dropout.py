"""Dropout masks that depend on trial, step, layer and row alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from lorafleet.training.dropout import (
    _ATTRIBUTE,
    DropRates,
    LayerMasks,
    RowDropout,
    RowKeys,
    _compute_attention,
    compute_row_keys,
)

CPU = torch.device("cpu")


def make_keys(rows: list[int], seed: int = 0, step: int = 0) -> RowKeys:
    keys = RowKeys()
    keys.set_rows(compute_row_keys(seed, step, np.array(rows)), CPU)
    return keys


def draw(shape: tuple[int, ...], p: float, keys: RowKeys, path: str = "a.layer") -> torch.Tensor:
    """True where a number is kept."""
    return LayerMasks(keys, path).drop(torch.ones(shape), p) != 0


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_a_share_p_is_dropped_and_the_others_are_scaled(p: float) -> None:
    shape = (40, 50, 500)
    dropped = LayerMasks(make_keys(list(range(40))), "layer").drop(torch.ones(shape), p)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / (1 - p))]
    # Standard deviations of a binomial share; rows and columns, too, have none above or below it.
    for axes in ((0, 1, 2), (1, 2), (0, 1), (0, 2)):
        count = math.prod(shape[axis] for axis in axes)
        share = (dropped == 0).float().mean(dim=axes)
        assert float((share - p).abs().max()) < 6 * math.sqrt(p * (1 - p) / count)


def test_masks_are_independent_of_each_other() -> None:
    """Masks of other rows, positions, columns, layers, steps and seeds agree as often as by chance."""
    p, shape = 0.3, (64, 32, 96)
    rows = list(range(64))
    base = draw(shape, p, make_keys(rows))
    others = {
        "row": base.roll(1, 0),
        "position": base.roll(1, 1),
        "column": base.roll(1, 2),
        "far column": base.roll(32, 2),
        "layer": draw(shape, p, make_keys(rows), "another.layer"),
        "step": draw(shape, p, make_keys(rows, step=1)),
        "seed": draw(shape, p, make_keys(rows, seed=1)),
    }
    expected = p**2 + (1 - p) ** 2
    for name, other in others.items():
        agreement = float((base == other).float().mean())
        deviation = math.sqrt(expected * (1 - expected) / base.numel())
        assert abs(agreement - expected) < 6 * deviation, name
    # Triples of neighbours: multiply-shift hashing guarantees only pairs.
    triple = (~base & ~base.roll(1, 2) & ~base.roll(2, 2)).float().mean()
    assert abs(float(triple) - p**3) < 0.002


def test_a_row_has_its_mask_whatever_is_beside_it() -> None:
    whole = draw((4, 9, 8), 0.4, make_keys([3, 5, 7, 9]))
    assert torch.equal(draw((2, 6, 8), 0.4, make_keys([7, 3])), whole[[2, 0], :6])
    heads = draw((4, 2, 9, 9), 0.4, make_keys([3, 5, 7, 9]))
    assert torch.equal(draw((1, 2, 5, 5), 0.4, make_keys([9])), heads[3:, :, :5, :5])
    pooled = draw((4, 8), 0.4, make_keys([3, 5, 7, 9]))
    assert torch.equal(draw((1, 8), 0.4, make_keys([5])), pooled[1:2])
    keys = make_keys([3, 5, 7, 9])
    with keys.select(1, 3):
        assert torch.equal(draw((2, 9, 8), 0.4, keys), whole[1:3])
    assert torch.equal(draw((4, 9, 8), 0.4, keys), whole)
    assert not keys.saw_other_rows


def test_each_row_can_have_a_share_of_its_own() -> None:
    keys = make_keys([1, 2, 3])
    hidden = torch.randn(3, 7, 16)
    masks = LayerMasks(keys, "layer")
    rates = (0.0, 0.2, 0.7)
    dropped = masks.drop_each(hidden, DropRates.build(rates, CPU))
    for row, p in enumerate(rates):
        alone = LayerMasks(make_keys([row + 1]), "layer").drop(hidden[row : row + 1], p)
        assert torch.equal(dropped[row : row + 1], alone)
    keys.clear()
    with pytest.raises(RuntimeError, match="have no keys"):
        masks.drop_each(hidden, DropRates.build(rates, CPU))


def test_gradients_pass_where_a_number_is_kept() -> None:
    hidden = torch.randn(2, 3, 5, requires_grad=True)
    dropped = LayerMasks(make_keys([0, 1]), "layer").drop(hidden, 0.4)
    dropped.sum().backward()
    expected = torch.where(dropped == 0, 0.0, 1 / 0.6)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, expected)


def test_other_rows_are_noticed() -> None:
    keys = make_keys([0, 1])
    flat = draw((6, 8), 0.4, keys)
    assert keys.saw_other_rows
    assert torch.equal(draw((6, 8), 0.4, make_keys([0, 1])), flat)


def test_a_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    keys = make_keys([0, 1])
    dropout = RowDropout(model, keys)
    inputs = torch.ones(2, 4)
    assert torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model[0](inputs))
    model.train()
    dropout.remove()
    dropout.remove()
    assert "forward" not in vars(model[1])
    torch.manual_seed(0)
    expected = functional.dropout(model[0](inputs), 0.5)
    torch.manual_seed(0)
    assert torch.equal(model(inputs), expected)


def test_a_copied_layer_is_left_as_it_was_too() -> None:
    """PEFT copies a head that is trained whole, and the copy stays in the base."""
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))})
    dropout = RowDropout(model, make_keys([0, 1]))
    model["head"] = copy.deepcopy(model["head"])
    dropout.remove()
    model.eval()
    assert all("forward" not in vars(module) for module in model.modules())
    inputs = torch.ones(2, 4)
    assert torch.equal(model["head"](inputs), model["head"][0](inputs))


class Attention(nn.Module):
    """Stand-in for an attention layer, with what transformers' functions read of it."""

    def __init__(self, groups: int, *, is_causal: bool) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, is_causal


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "bool mask", "float mask"])
def test_attention_is_torchs_but_for_the_mask(kind: str, groups: int) -> None:
    rows, heads, length, size = 2, 4, 6, 8
    query = torch.randn(rows, heads, length, size)
    key, value = (torch.randn(rows, heads // groups, length, size) for _ in range(2))
    module = Attention(groups, is_causal=kind != "bidirectional")
    keys = make_keys([4, 9])
    masks = LayerMasks(keys, "attention")
    setattr(module, _ATTRIBUTE, masks)
    visible = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
    visible[1, ..., :2] = False
    visible[1, :, :2, :2] = True  # no line without any key, which has no meaning
    mask: Any = {"bool mask": visible, "float mask": torch.where(visible, 0.0, -1e9)}.get(kind)
    repeated = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    expected = functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=mask, is_causal=kind == "causal"
    )
    # So small a share that nothing is dropped, and nothing is scaled.
    output, _ = _compute_attention(module, query, key, value, mask, dropout=1e-12)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    output, _ = _compute_attention(module, query, key, value, mask)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    # The weights of value 1 sum up to the share that was kept.
    output, _ = _compute_attention(module, query, key, torch.ones_like(value), mask, dropout=0.5)
    kept = LayerMasks(keys, "attention").drop(torch.ones(rows, heads, length, length), 0.5)
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) / math.sqrt(size)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    if kind != "bidirectional":
        hidden = ~mask if mask.dtype is torch.bool else mask < -1
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(dim=-1) * kept
    torch.testing.assert_close(output[..., 0], weights.sum(dim=-1).transpose(1, 2))


def test_a_checkpointed_model_has_the_same_gradients_and_draws_nothing_from_torch() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.3,
    )
    model = LlamaForCausalLM(config)
    keys = make_keys([0, 1])
    dropout = RowDropout(model, keys)
    ids = torch.randint(0, 50, (2, 7))
    model.train()

    def run() -> torch.Tensor:
        model.zero_grad()
        state = torch.get_rng_state()
        model(input_ids=ids, labels=ids).loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        gradient = model.model.layers[0].self_attn.q_proj.weight.grad
        assert gradient is not None
        return gradient.clone()

    plain = run()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(run(), plain)
    keys.set_rows(compute_row_keys(0, 1, np.arange(2)), CPU)
    assert not torch.allclose(run(), plain)
    dropout.remove()
