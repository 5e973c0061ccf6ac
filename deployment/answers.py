"""The text of an answer as it grows, piece by piece, from any exported model that writes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lorafleet.deployment.decoding import Sampling, tokens_of
from lorafleet.deployment.runtime import Loaded
from lorafleet.jobs.data.answer_frame import AnswerFrame
from lorafleet.jobs.errors import UserError

_HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """What an answer has grown by."""

    text: str
    tokens: int
    """Of the whole answer so far."""
    end: Literal["stop", "length"] | None = None
    """Why nothing follows: the model (or a stop text) ended it, or it has as many tokens as it may."""


def room_for(loaded: Loaded, prompt: Sequence[int], most: int) -> int:
    """Tokens that an answer may have. Raises UserError for a prompt that fills the model's positions."""
    positions = loaded.artefact.positions or sys.maxsize
    if len(prompt) >= positions:
        raise UserError(f"the prompt has {len(prompt)} tokens, but the model has {positions} positions")
    if not prompt:
        raise UserError("the prompt is empty: it must have at least one token")
    return min(most, positions - len(prompt))


def pieces(
    loaded: Loaded,
    prompt: Sequence[int],
    most: int,
    sampling: Sampling | None,
    stops: Sequence[str] = (),
    *,
    raw: bool = False,
) -> Iterator[Piece]:
    """Yield an answer of at most `most` tokens, up to the first of the stop texts; greedy without `sampling`.

    A token may be half a character, and the end of a piece the beginning of a stop text: both wait for what follows.
    What a chat template has the model write before its answer is left out, unless a text is continued (`raw`).
    """
    about, said, shown = loaded.artefact, list[int](), ""
    text, end, stopped = "", "length", False
    frame = None if raw else loaded.frame_after(prompt)
    for (token,) in tokens_of(
        loaded.model, [prompt], room_for(loaded, prompt, most), about.ends, about.pad_id, sampling
    ):
        if token is None:
            end = "stop"
            break
        said.append(token)
        text = _text(loaded, said, frame, finished=False)
        cut = first_of(text, stops)
        if cut is not None:
            text, end, stopped = text[:cut], "stop", True
            break
        sure = text[: len(text) - begun(text, stops)]
        if len(sure) > len(shown) and not sure.endswith(_HALF_A_CHARACTER):
            yield Piece(sure[len(shown) :], len(said))
            shown = sure
    if not stopped:
        text = _text(loaded, said, frame, finished=True)
    yield Piece(text[len(shown) :], len(said), "stop" if end == "stop" else "length")


def _text(loaded: Loaded, tokens: Sequence[int], frame: AnswerFrame | None, *, finished: bool) -> str:
    """Return the answer that tokens hold so far; empty while they may still be the frame before it."""
    if frame is None:
        return loaded.decode(tokens)
    written = loaded.decode(tokens, False)
    visible = frame.visible(written, finished=finished)
    text = loaded.decode(tokens) if visible == written else frame.without_special_tokens(visible)
    if frame.closing:  # what may begin the text that ends a turn waits for what follows
        text = text.rstrip() if finished else text[: len(text) - begun(text, [frame.closing])].rstrip()
    return text.lstrip()


def first_of(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of some texts begins; None where there is none."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def begun(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of one of some texts."""
    return max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
