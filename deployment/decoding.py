"""Writing answers with any decoder that takes tokens and a cache. B rows, T new tokens, S so far, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Decoder(Protocol):
    """A causal model that is given new tokens, and keeps what it knows of those before them."""

    def step(
        self, ids_BT: np.ndarray, mask_BS: np.ndarray, positions_BT: np.ndarray, cache: Any
    ) -> tuple[np.ndarray, Any]:
        """(logits_BTV, the cache with the new tokens in it). The first cache is None."""
        ...


class _RowCaches(list[Any]):
    """A cache for each row."""


class RowByRow:
    """Rows one after another, without the padding before them: for models that count from what they are given first.

    With `together` rows that have no padding go side by side.
    """

    def __init__(self, decoder: Decoder, *, together: bool = False) -> None:
        self.decoder, self.together = decoder, together

    def step(
        self, ids_BT: np.ndarray, mask_BS: np.ndarray, positions_BT: np.ndarray, cache: Any
    ) -> tuple[np.ndarray, Any]:
        """(logits_BTV, each row's cache); logits of padding are 0."""
        if self.together and mask_BS.all() and not isinstance(cache, _RowCaches):
            return self.decoder.step(ids_BT, mask_BS, positions_BT, cache)
        kept_BT = mask_BS[:, -ids_BT.shape[1] :] == 1
        caches, said = _RowCaches(), []
        for row, kept_T in enumerate(kept_BT):
            one, mask_1S = slice(row, row + 1), np.ones((1, int(mask_BS[row].sum())), np.int64)
            before = None if cache is None else cache[row]
            logits_1TV, after = self.decoder.step(ids_BT[one, kept_T], mask_1S, positions_BT[one, kept_T], before)
            said.append(logits_1TV[0])
            caches.append(after)
        logits_BTV = np.zeros((*ids_BT.shape, said[0].shape[-1]), np.float32)
        for row, kept_T in enumerate(kept_BT):
            logits_BTV[row, kept_T] = said[row]
        return logits_BTV, caches


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def write(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: Sequence[int],
    pad_id: int,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """What follows each prompt (token ids), up to `new_tokens` tokens and without the token that ends it."""
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in tokens_of(decoder, prompts, new_tokens, ends, pad_id, sampling):
        for row, token in enumerate(tokens):
            if token is not None:
                rows[row].append(token)
    return rows


def tokens_of(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: Sequence[int],
    pad_id: int,
    sampling: Sampling | None = None,
) -> Iterator[list[int | None]]:
    """The next token of each row, step by step; None for rows that are over. Greedy without `sampling`.

    Each row draws from a generator of its own, so that what it says does not depend on what stands beside it.
    """
    if not prompts or not all(prompts):
        raise ValueError("a prompt must have at least one token")
    pick = _greedy if sampling is None else _drawn(sampling, len(prompts))
    ids_BT, mask_BS = left_padded(prompts, pad_id)
    positions_BT = positions_of(mask_BS)
    cache: Any = None
    over = [False] * len(prompts)
    for number in range(new_tokens):
        logits_BTV, cache = decoder.step(ids_BT, mask_BS, positions_BT, cache)
        next_B = pick(logits_BTV[:, -1, :])
        over = [done or int(token) in ends for done, token in zip(over, next_B, strict=True)]
        yield [None if done else int(token) for done, token in zip(over, next_B, strict=True)]
        if all(over) or number == new_tokens - 1:
            return
        ids_BT = np.where(over, pad_id, next_B)[:, None].astype(np.int64)
        mask_BS = np.concatenate([mask_BS, np.ones((len(prompts), 1), np.int64)], axis=1)
        positions_BT = positions_BT[:, -1:] + 1


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids_BT, mask_BT) of prompts of one width, the padding first."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return np.array(ids, np.int64), np.array(mask, np.int64)


def positions_of(mask_BT: np.ndarray) -> np.ndarray:
    """Places of tokens that do not count the padding before them."""
    positions: np.ndarray = np.maximum(mask_BT.cumsum(axis=1) - 1, 0)
    return positions


def _greedy(logits_BV: np.ndarray) -> np.ndarray:
    best: np.ndarray = logits_BV.argmax(axis=1)
    return best


def _drawn(sampling: Sampling, rows: int) -> Callable[[np.ndarray], np.ndarray]:
    draws = [np.random.default_rng([sampling.seed, row]) for row in range(rows)]

    def pick(logits_BV: np.ndarray) -> np.ndarray:
        pairs = zip(draws, logits_BV, strict=True)
        return np.array([draw.choice(len(row_V), p=probabilities(row_V, sampling)) for draw, row_V in pairs])

    return pick


def probabilities(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What a token is drawn by: the softmax at a temperature, of the likeliest that have `top_p` together
    (Holtzman et al. 2020: the one that passes the limit still counts)."""
    scaled = logits_V.astype(np.float64) / sampling.temperature
    exp_V = np.exp(scaled - scaled.max())
    shares_V = exp_V / exp_V.sum()
    if sampling.top_p < 1:
        order = np.argsort(-shares_V, kind="stable")
        before = np.cumsum(shares_V[order]) - shares_V[order]
        shares_V[order[1:][before[1:] >= sampling.top_p]] = 0.0
        shares_V = shares_V / shares_V.sum()
    kept: np.ndarray = shares_V
    return kept
