"""Generate answers with any decoder that takes tokens and a cache.

ONNX Runtime, ExecuTorch and PyTorch models implement `Decoder`, so that one loop serves
the parity checks, `chat`, `serve` and `benchmark`. NumPy only: exported models run
without torch.

Shapes: B rows, T new tokens, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Decoder(Protocol):
    """A causal model that takes new tokens and a cache of the earlier ones.

    Rows of a batch are padded on the left, so that all of them end at the same column. The
    cache is the decoder's own: callers only pass it on.
    """

    def step(
        self, ids_BT: np.ndarray, mask_BS: np.ndarray, positions_BT: np.ndarray, cache: Any
    ) -> tuple[np.ndarray, Any]:
        """Run the model on the new tokens of each row.

        Args:
            ids_BT: New token ids.
            mask_BS: 1 for real tokens and 0 for padding, over all tokens so far and the new
                ones.
            positions_BT: Position of each new token, without the padding before it.
            cache: What the last step returned; None at first.

        Returns:
            (logits_BTV in float32, cache with the new tokens added).
        """
        ...


class _RowCaches(list[Any]):
    """One cache per row."""


class RowByRowDecoder:
    """A decoder that runs rows one after another, without the padding before them.

    It is for models that count positions from the first token they get. With `together`,
    rows without padding run as one batch.
    """

    def __init__(self, decoder: Decoder, *, together: bool = False) -> None:
        self.decoder, self.together = decoder, together

    def step(
        self, ids_BT: np.ndarray, mask_BS: np.ndarray, positions_BT: np.ndarray, cache: Any
    ) -> tuple[np.ndarray, Any]:
        """Return (logits_BTV, one cache per row). Logits of padding are 0."""
        # A batch that began row by row has one cache per row and must go on in that way.
        if self.together and mask_BS.all() and not isinstance(cache, _RowCaches):
            return self.decoder.step(ids_BT, mask_BS, positions_BT, cache)
        real_BT = mask_BS[:, -ids_BT.shape[1] :] == 1
        caches, row_logits = _RowCaches(), []
        for row, real_T in enumerate(real_BT):
            row_slice, mask_1S = (
                slice(row, row + 1),
                np.ones((1, int(mask_BS[row].sum())), np.int64),
            )
            row_cache = None if cache is None else cache[row]
            logits_1TV, new_cache = self.decoder.step(
                ids_BT[row_slice, real_T], mask_1S, positions_BT[row_slice, real_T], row_cache
            )
            row_logits.append(logits_1TV[0])
            caches.append(new_cache)
        logits_BTV = np.zeros((*ids_BT.shape, row_logits[0].shape[-1]), np.float32)
        for row, real_T in enumerate(real_BT):
            logits_BTV[row, real_T] = row_logits[row]
        return logits_BTV, caches


@dataclass(frozen=True)
class Sampling:
    """Settings for sampling the next token."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def generate_answers(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """Generate up to `new_tokens` token ids after each prompt, without the end token.

    Args:
        decoder: The model.
        prompts: Token ids of each prompt. None may be empty.
        new_tokens: Largest number of tokens in an answer.
        end_ids: Token ids that end an answer.
        pad_id: Token id for padding.
        sampling: Sampling settings. None: greedy.

    Raises:
        ValueError: A prompt is empty, or there are no prompts.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in iterate_tokens(decoder, prompts, new_tokens, end_ids, pad_id, sampling):
        for row, token in enumerate(tokens):
            if token is not None:
                rows[row].append(token)
    return rows


def iterate_tokens(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of each row, step by step; None for rows that have ended.

    It ends when all rows have ended or after `new_tokens` steps. Each row samples from its
    own random generator, so that an answer does not depend on the other rows of its batch.

    Args:
        decoder: The model.
        prompts: Token ids of each prompt.
        new_tokens: Most steps.
        end_ids: Token ids that end a row. They are not yielded. Empty for a fixed number of
            tokens.
        pad_id: Token id for padding, and for rows that have ended.
        sampling: Sampling settings. None: greedy.

    Raises:
        ValueError: A prompt is empty, or there are no prompts.
    """
    if not prompts or not all(prompts):
        raise ValueError("a prompt must have at least one token")
    select_next = _select_greedy if sampling is None else _make_sampler(sampling, len(prompts))
    ids_BT, mask_BS = pad_left(prompts, pad_id)
    positions_BT = compute_positions(mask_BS)
    cache: Any = None
    finished = [False] * len(prompts)
    for step_index in range(new_tokens):
        logits_BTV, cache = decoder.step(ids_BT, mask_BS, positions_BT, cache)
        next_B = select_next(logits_BTV[:, -1, :])
        finished = [
            has_ended or int(token) in end_ids
            for has_ended, token in zip(finished, next_B, strict=True)
        ]
        yield [
            None if has_ended else int(token)
            for has_ended, token in zip(finished, next_B, strict=True)
        ]
        # Without this, the last token would be run through the model although nobody needs its
        # logits.
        if all(finished) or step_index == new_tokens - 1:
            return
        ids_BT = np.where(finished, pad_id, next_B)[:, None].astype(np.int64)
        mask_BS = np.concatenate([mask_BS, np.ones((len(prompts), 1), np.int64)], axis=1)
        positions_BT = positions_BT[:, -1:] + 1


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids_BT, mask_BT) of prompts padded on the left to one width."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return np.array(ids, np.int64), np.array(mask, np.int64)


def compute_positions(mask_BT: np.ndarray) -> np.ndarray:
    """Return the position of each token, not counting the padding before it.

    Padding itself gets position 0: it is masked, but embeddings have no negative positions.
    """
    positions: np.ndarray = np.maximum(mask_BT.cumsum(axis=1) - 1, 0)
    return positions


def _select_greedy(logits_BV: np.ndarray) -> np.ndarray:
    """Return the most likely token of each row."""
    token_ids: np.ndarray = logits_BV.argmax(axis=1)
    return token_ids


def _make_sampler(sampling: Sampling, rows: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that samples the next token of each row."""
    generators = [np.random.default_rng([sampling.seed, row]) for row in range(rows)]

    def sample_next(logits_BV: np.ndarray) -> np.ndarray:
        """Sample one token per row."""
        pairs = zip(generators, logits_BV, strict=True)
        return np.array(
            [
                generator.choice(len(row_V), p=compute_probabilities(row_V, sampling))
                for generator, row_V in pairs
            ]
        )

    return sample_next


def compute_probabilities(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return the sampling probabilities: softmax at a temperature, restricted to the nucleus.

    The nucleus is the smallest set of the most likely tokens whose probabilities sum to
    `top_p`; the token that crosses the limit is included (Holtzman et al. 2020).
    """
    scaled = logits_V.astype(np.float64) / sampling.temperature
    exp_V = np.exp(scaled - scaled.max())
    probs_V = exp_V / exp_V.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probs_V, kind="stable")
        # Probability of all tokens that are likelier. The likeliest token is always kept.
        preceding = np.cumsum(probs_V[order]) - probs_V[order]
        probs_V[order[1:][preceding[1:] >= sampling.top_p]] = 0.0
        probs_V = probs_V / probs_V.sum()
    probabilities_V: np.ndarray = probs_V
    return probabilities_V
