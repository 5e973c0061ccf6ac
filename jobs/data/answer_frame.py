"""Where the answer stands in the text that a model writes. Standard library only.

Some chat templates have the model write a frame before its answer: a channel header, a thinking block, a turn header.
Metrics, `lorafleet chat`, `lorafleet serve` and exported models all take that frame off here. `lorafleet export` copies
this file beside `run.py`, so it must not import anything of lorafleet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

THINKING = ("<think>", "</think>")
PROMPT_TAIL = 32
"""Tokens of a prompt that show whether it ends in an open thinking block."""

Decode = Callable[[Sequence[int], bool], str]
"""(token ids, whether special tokens are left out) -> text."""


@dataclass(frozen=True)
class AnswerFrame:
    """What stands around an answer in the text that a model writes."""

    marker: str = THINKING[1]
    """The answer begins after the first of these, where the text begins with `opener`."""
    opener: str = THINKING[0]
    """Text with which a frame begins. A text that begins otherwise is the answer as it is."""
    prompt_opens: bool = False
    """Whether the prompt itself ends inside the frame (an open thinking block): all text begins within it. `after` says
    so of each prompt."""
    strict: bool = True
    """Whether a frame that was begun and never closed holds no answer. False where no template is known to write one:
    the text is then the answer, as it stands."""
    closing: str = ""
    """Text that ends a turn where the template's end of turn is not a single token."""
    special_tokens: tuple[str, ...] = ()
    """Texts of special tokens: they are never part of an answer."""
    call_ends: tuple[int, ...] = ()
    """End tokens of turns that call tools and have no answer in the frame: all that is written is compared."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AnswerFrame:
        """Read what `as_dict` wrote. Missing keys keep their defaults, so that older files stay readable."""
        fields = {key: value for key, value in values.items() if key in cls.__dataclass_fields__}
        for name in ("special_tokens", "call_ends"):
            if name in fields:
                fields[name] = tuple(fields[name])
        return cls(**fields)

    def as_dict(self) -> dict[str, Any]:
        """Return the frame as JSON values."""
        return {
            "marker": self.marker,
            "opener": self.opener,
            "strict": self.strict,
            "closing": self.closing,
            "special_tokens": list(self.special_tokens),
            "call_ends": list(self.call_ends),
        }

    def after(self, prompt: str) -> AnswerFrame:
        """Return the frame of what follows a prompt: one that ends in an open thinking block opens it."""
        return replace(self, prompt_opens=prompt.rstrip().endswith(self.opener))

    def visible(self, text: str, *, finished: bool = True) -> str:
        """Return the answer in a text, special tokens' texts included.

        A frame that was never closed holds no answer: the result is empty, as it is for an unfinished text that may
        still turn out to begin with a frame.
        """
        begins = text.lstrip()
        if self.prompt_opens or begins.startswith(self.opener):
            _, closed, behind = text.partition(self.marker)
            if not closed and (self.strict or not finished):
                return ""
            text = behind if closed else text
        elif not finished and self.opener.startswith(begins):
            return ""
        if self.closing and text.rstrip().endswith(self.closing):
            text = text.rstrip().removesuffix(self.closing)
        return text

    def answer(self, tokens: Sequence[int], decode: Decode, end: int | None = None) -> str:
        """Return the answer that new tokens hold, without spaces at its ends.

        `tokens` do not include the end token; `end` is that token, None where generation was cut off.
        """
        if end is not None and end in self.call_ends:
            return decode(tokens, True).strip()
        written = decode(tokens, False)
        visible = self.visible(written)
        if visible == written:
            return decode(tokens, True).strip()
        return self.without_special_tokens(visible).strip()

    def without_special_tokens(self, text: str) -> str:
        """Remove the texts of special tokens."""
        for token in self.special_tokens:
            text = text.replace(token, "")
        return text
