"""Draw dropout masks as a function of the trial's seed, the step, the layer and the row.

torch draws masks from the state of a process, so they depend on everything that was drawn
before. Here, a row gets the same mask whether its trial is trained alone or in a pack, in one
process or several, in large or in small micro-batches, and when a checkpointed layer is computed
again. Dimensions: N rows of a micro-batch, C last dimension of a layer's input.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST_FACTOR, _SECOND_FACTOR = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of SplitMix64 (Steele, Lea and Flood, 2014)."""
_LINE_STRIDE = 2**20
"""Factor between the two indices of a line: attention has heads and queries."""
_LAYER_PREFIXES = ("base_model.model.", "module.")
_SAVED_PARTS = (".modules_to_save.default", ".original_module")
"""What PEFT and the strategies add to the path of a layer."""
_ATTRIBUTE = "lorafleet_dropout"


def compute_row_keys(seed: int, step: int, rows: np.ndarray) -> np.ndarray:
    """Return a random 64-bit number for each row of a trial's step, as int64 of shape N.

    Args:
        seed: `train.seed` of the trial.
        step: Number of the optimiser step, from 0.
        rows: Indices of the rows in the training split.
    """
    trial_step = _mix(_mix(np.uint64(seed)) + np.uint64(step))
    return _mix(trial_step + rows.astype(np.uint64)).view(np.int64)


def _mix(values: Any) -> Any:
    """Return SplitMix64's hash of unsigned 64-bit numbers."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(_GOLDEN)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST_FACTOR)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND_FACTOR)
        return values ^ (values >> np.uint64(31))


class RowKeys:
    """Keys of the rows of the current micro-batch, which all dropout layers of a model read.

    They must not change between a forward pass and its backward pass: a checkpointed layer is
    computed again there. Without keys, layers draw their masks as torch does.
    """

    def __init__(self) -> None:
        self._keys_N: torch.Tensor | None = None
        self._lines: dict[tuple[int, ...], torch.Tensor] = {}
        self.saw_other_rows = False
        """Whether the first dimension of a layer's input was not the rows of the batch."""

    def set_rows(self, keys_N: np.ndarray, device: torch.device) -> None:
        """Set the keys of a micro-batch (see `compute_row_keys`)."""
        self._set(torch.from_numpy(keys_N).to(device, non_blocking=True))

    def clear(self) -> None:
        """Forget the keys."""
        self._set(None)

    def _set(self, keys_N: torch.Tensor | None) -> None:
        self._keys_N, self._lines = keys_N, {}

    @contextmanager
    def select(self, start: int, stop: int) -> Iterator[None]:
        """Use the keys of some of the rows, for a layer that is given only those."""
        keys_N, lines = self._keys_N, self._lines
        if keys_N is not None:
            self._set(keys_N[start:stop])
        try:
            yield
        finally:
            self._keys_N, self._lines = keys_N, lines

    def get_lines(self, shape: Sequence[int]) -> torch.Tensor | None:
        """Return two random int32 numbers for each line of a tensor: shape[:-1] x 1 x 2.

        A line is a part along the last dimension; its numbers depend on its row's key and on its
        position in the row. None if there are no keys.
        """
        if self._keys_N is None:
            return None
        sizes = tuple(shape[:-1])
        if sizes not in self._lines:
            self._lines[sizes] = self._compute_lines(self._keys_N, sizes)
        return self._lines[sizes]

    def _compute_lines(self, keys_N: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        rows, *middle = sizes
        if rows != len(keys_N):
            # Rows and positions in one dimension, say: the mask is that of the whole micro-batch.
            self.saw_other_rows = True
            rows, middle, keys_N = 1, list(sizes), keys_N.sum().view(1)
        position = torch.zeros((), dtype=torch.int64, device=keys_N.device)
        for size in middle:
            steps = torch.arange(size, device=keys_N.device)
            position = position.unsqueeze(-1) * _LINE_STRIDE + steps
        keys = keys_N.view(rows, *[1] * len(middle))
        return _mix_tensor(keys + position).view(torch.int32).view(*sizes, 1, 2)


def _mix_tensor(values: torch.Tensor) -> torch.Tensor:
    """Return SplitMix64's hash of int64 numbers, whose products wrap."""
    values = values + _wrap(_GOLDEN, 64)
    # torch shifts the sign in: the mask takes it out.
    values = (values ^ (values >> 30 & (1 << 34) - 1)) * _wrap(_FIRST_FACTOR, 64)
    values = (values ^ (values >> 27 & (1 << 37) - 1)) * _wrap(_SECOND_FACTOR, 64)
    return values ^ (values >> 31 & (1 << 33) - 1)


def _wrap(value: int, bits: int) -> int:
    """Return the signed number with the same lowest bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


@dataclass(frozen=True)
class DropRates:
    """Dropout of each row of a micro-batch whose rows belong to different trials."""

    thresholds_N: torch.Tensor
    scales_N: torch.Tensor

    @classmethod
    def build(cls, rates: Sequence[float], device: torch.device) -> DropRates:
        """Return them for the share of each row that is dropped."""
        thresholds = [_compute_threshold(p) for p in rates]
        scales = [1.0 / (1.0 - p) for p in rates]
        return cls(
            torch.tensor(thresholds, dtype=torch.int32, device=device),
            torch.tensor(scales, device=device),
        )


class LayerMasks:
    """Masks of one layer: for each number of its input, whether it is kept.

    With two random numbers a, c of a line and odd constants u, v, k of the layer, a number is
    dropped if a u[column] + c v + k, modulo 2^32, is among the smallest p 2^32. Any two numbers
    of the mask are then independent: Dietzfelbinger's multiply-shift hashing, at the cost of one
    multiplication and one comparison.

    Args:
        path: Path of the layer in the model. Layers with other paths have other masks.
    """

    def __init__(self, keys: RowKeys, path: str) -> None:
        self.keys = keys
        self._seed = np.uint64(zlib.crc32(_normalize(path).encode()))
        factor, offset = _mix(_mix(self._seed) + np.arange(1, 3, dtype=np.uint64)).tolist()
        self._factor, self._offset = _wrap(factor | 1, 32), _wrap(offset, 32)
        self._columns_C = torch.zeros(0, dtype=torch.int32)

    def drop(self, hidden: torch.Tensor, p: float) -> torch.Tensor:
        """Return the input with a share `p` of its numbers set to 0, and the others scaled."""
        lines = self.keys.get_lines(hidden.shape)
        if lines is None:
            return functional.dropout(hidden, p)
        keep = self._draw(lines, hidden.shape[-1]) >= _compute_threshold(p)
        # input * keep * scale in one pass, of which autograd keeps the mask alone.
        dropped: torch.Tensor = torch.ops.aten.native_dropout_backward(
            hidden, keep, 1.0 / (1.0 - p)
        )
        return dropped

    def drop_each(self, hidden: torch.Tensor, rates: DropRates) -> torch.Tensor:
        """Return the result of `drop` with another share for each row.

        Raises:
            RuntimeError: The rows have no keys.
        """
        lines = self.keys.get_lines(hidden.shape)
        if lines is None:
            raise RuntimeError("the rows of a pack have no keys")
        sizes = (len(rates.thresholds_N), *[1] * (hidden.ndim - 1))
        keep = self._draw(lines, hidden.shape[-1]) >= rates.thresholds_N.view(sizes)
        return hidden * (keep * rates.scales_N.view(sizes))

    def _draw(self, lines: torch.Tensor, columns: int) -> torch.Tensor:
        """Return a uniform int32 number for each number of the input."""
        if len(self._columns_C) < columns or self._columns_C.device != lines.device:
            numbers = _mix(_mix(self._seed + np.uint64(1)) + np.arange(columns, dtype=np.uint64))
            odd = (numbers.astype(np.uint32) | np.uint32(1)).view(np.int32)
            self._columns_C = torch.from_numpy(odd).to(lines.device)
        offsets = lines[..., 1] * self._factor + self._offset
        return torch.addcmul(offsets, lines[..., 0], self._columns_C[:columns])


def _compute_threshold(p: float) -> int:
    """Return the smallest number that is kept, of those from -2^31 to 2^31 - 1."""
    return round(p * 2**32) - 2**31


def _normalize(path: str) -> str:
    """Return the path of a layer in its base."""
    for prefix in _LAYER_PREFIXES:
        path = path.removeprefix(prefix)
    for part in _SAVED_PARTS:
        path = path.replace(part, "")
    return path


def draws_attention(device: torch.device) -> bool:
    """Return whether the dropout inside attention is drawn by row on a device.

    Not on GPUs, where fused kernels draw their own and keep no scores.
    """
    return device.type == "cpu"


class RowDropout:
    """The dropout of a model, drawn by row from its creation until `remove`.

    This covers every `nn.Dropout` and the dropout of scaled-dot-product attention. Other
    dropout, in a model's own functions, stays as torch draws it.

    Args:
        model: A base, with or without an adapter.
        keys: Holds the keys of the rows; the caller sets them for each micro-batch.
        covers_attention: Also draw the dropout inside attention by row (see `draws_attention`).
    """

    def __init__(self, model: nn.Module, keys: RowKeys, covers_attention: bool = True) -> None:
        self.model = model
        self.keys = keys
        self._layers: list[nn.Module] = []
        self._attentions: list[nn.Module] = []
        for path, module in model.named_modules():
            if type(module) is nn.Dropout:
                # An instance attribute hides the class's method; deleting it restores the method.
                module.forward = _make_forward(module, LayerMasks(keys, path))
                self._layers.append(module)
            elif covers_attention and "Attention" in type(module).__name__:
                setattr(module, _ATTRIBUTE, LayerMasks(keys, f"{path}.attention"))
                self._attentions.append(module)
        if self._attentions:
            _register_attention()

    def remove(self) -> None:
        """Let the model's layers draw their masks as torch does. May be called twice."""
        # Also in copies: PEFT copies a head with this, and leaves the copy in the base.
        for module in (*self._layers, *self.model.modules()):
            if type(module) is nn.Dropout:
                vars(module).pop("forward", None)
        for module in self._attentions:
            delattr(module, _ATTRIBUTE)
        self._layers, self._attentions = [], []


def _make_forward(module: nn.Dropout, masks: LayerMasks) -> Callable[..., torch.Tensor]:
    """Return the forward function of a dropout layer."""

    def drop(input: torch.Tensor) -> torch.Tensor:
        if not module.training or not module.p:
            return input
        return masks.drop(input, module.p)

    return drop


def _register_attention() -> None:
    """Let transformers' attention draw its masks by row in models that have a `RowDropout`."""
    from transformers import AttentionInterface

    # Models choose it, and the masks that go with it, by this name.
    AttentionInterface.register("sdpa", _compute_attention)


def _compute_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of a layer as transformers' `sdpa` does, with masks by row.

    Written out where it has dropout: torch takes no mask, and its fused kernels on CPU have no
    dropout either. Otherwise transformers' own function is called.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    masks: LayerMasks | None = getattr(module, _ATTRIBUTE, None)
    if not dropout or masks is None or options.get("position_bias") is not None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
        return result
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        sizes = scores.shape[-2:]
        attention_mask = torch.ones(sizes, dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
        if attention_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    output = torch.matmul(masks.drop(weights, dropout), value)
    return output.transpose(1, 2).contiguous(), None
