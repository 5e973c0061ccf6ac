"""Stream the text of an answer in pieces from any exported model that generates text.

`chat` and `serve` use it. Tokens do not end where characters, stop texts or the frame
of a chat template do, so text is sent only when no later token can change it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lorafleet.deployment.decoding import Sampling, iterate_tokens
from lorafleet.deployment.runtime import LoadedModel
from lorafleet.jobs.data.answer_frame import AnswerFrame
from lorafleet.jobs.errors import UserError

_REPLACEMENT_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """Text that was added to an answer."""

    text: str
    tokens: int
    """Number of tokens in the answer so far."""
    end: Literal["stop", "length"] | None = None
    """Reason why the answer ended: `stop` (the model or a stop text ended it) or `length`
    (token limit). None: more follows.
    """


def compute_max_tokens(loaded: LoadedModel, prompt: Sequence[int], max_tokens: int) -> int:
    """Return the number of tokens that an answer may have: as many as the positions leave.

    Args:
        loaded: A model that generates text.
        prompt: Token ids of the prompt.
        max_tokens: Tokens that were asked for.

    Raises:
        UserError: The prompt is empty or fills all positions of the model.
    """
    positions = loaded.artefact.positions or sys.maxsize
    if len(prompt) >= positions:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, but the model has {positions} positions"
        )
    if not prompt:
        raise UserError("the prompt is empty: it must have at least one token")
    return min(max_tokens, positions - len(prompt))


def generate_pieces(
    loaded: LoadedModel,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None,
    stops: Sequence[str] = (),
    *,
    raw: bool = False,
) -> Iterator[Piece]:
    """Yield an answer piece by piece, up to the first stop text.

    A token may end within a character, and a piece may end within a stop text: both are
    held back until more text follows. Text that the chat template has the model write
    before its answer is left out.

    Args:
        loaded: A model that generates text.
        prompt: Token ids of the prompt.
        max_tokens: Largest number of tokens in the answer.
        sampling: Sampling settings. None: greedy.
        stops: Texts that end the answer.
        raw: True to continue a text; nothing is left out then.

    Raises:
        UserError: The prompt is empty or fills all positions of the model.
    """
    artefact, token_ids, sent_text = loaded.artefact, list[int](), ""
    text, end, stopped = "", "length", False
    frame = None if raw else loaded.make_answer_frame(prompt)
    for (token,) in iterate_tokens(
        loaded.model,
        [prompt],
        compute_max_tokens(loaded, prompt, max_tokens),
        artefact.ends,
        artefact.pad_id,
        sampling,
    ):
        if token is None:
            end = "stop"
            break
        token_ids.append(token)
        text = _decode_answer(loaded, token_ids, frame, finished=False)
        stop_index = find_first_stop(text, stops)
        if stop_index is not None:
            text, end, stopped = text[:stop_index], "stop", True
            break
        settled_text = text[: len(text) - count_partial_stop(text, stops)]
        # A token may hold part of a character, which is decoded as the replacement character until
        # the rest follows.
        if len(settled_text) > len(sent_text) and not settled_text.endswith(_REPLACEMENT_CHARACTER):
            yield Piece(settled_text[len(sent_text) :], len(token_ids))
            sent_text = settled_text
    # Now that nothing follows, text that was held back is part of the answer.
    if not stopped:
        text = _decode_answer(loaded, token_ids, frame, finished=True)
    yield Piece(text[len(sent_text) :], len(token_ids), "stop" if end == "stop" else "length")


def _decode_answer(
    loaded: LoadedModel, tokens: Sequence[int], frame: AnswerFrame | None, *, finished: bool
) -> str:
    """Return the answer so far; empty while the tokens may belong to the frame before it.

    Args:
        loaded: The model.
        tokens: All token ids so far. They are decoded together, because a tokenizer joins
            tokens differently in context.
        frame: What the model writes around an answer; None if there is nothing to remove.
        finished: False while more tokens may follow.
    """
    if frame is None:
        return loaded.decode(tokens)
    full_text = loaded.decode(tokens, False)
    visible = frame.extract_visible_text(full_text, finished=finished)
    text = loaded.decode(tokens) if visible == full_text else frame.remove_special_tokens(visible)
    if frame.closing:  # hold back a possible start of the text that ends a turn
        text = (
            text.rstrip()
            if finished
            else text[: len(text) - count_partial_stop(text, [frame.closing])].rstrip()
        )
    return text.lstrip()


def find_first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return the index of the first stop text in a text, or None."""
    return min((index for stop in stops if (index := text.find(stop)) >= 0), default=None)


def count_partial_stop(text: str, stops: Sequence[str]) -> int:
    """Return how many of the last characters may be the start of a stop text."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )
