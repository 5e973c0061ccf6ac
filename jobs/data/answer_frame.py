"""Find the answer in the text that a model writes. Uses the standard library only.

Some chat templates make the model write a frame before its answer: a channel header, a
thinking block or a turn header. Metrics, `lorafleet chat`, `lorafleet serve` and
exported models all remove that frame with this module, so that they agree on what the
answer is. `lorafleet export` copies this file beside `run.py`, so it must not import
anything from lorafleet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

THINKING = ("<think>", "</think>")
PROMPT_TAIL = 32
"""Number of last prompt tokens to decode to see whether the prompt ends in an open thinking
block.
"""

Decode = Callable[[Sequence[int], bool], str]
"""Function (token ids, whether to skip special tokens) -> text."""


@dataclass(frozen=True)
class AnswerFrame:
    """The text that surrounds an answer in a model's output.

    `ChatFormat.frame` finds it with probe conversations. It is stored beside the tokens and
    in exported models (`to_dict`), and adapted to each prompt before it is used.
    """

    marker: str = THINKING[1]
    """The answer begins after the first occurrence of this text, if the output begins with
    `opener`.
    """
    opener: str = THINKING[0]
    """Text with which a frame begins. Output that begins otherwise is the answer, unchanged."""
    prompt_opens: bool = False
    """True if the prompt itself ends inside the frame (an open thinking block), so that all output
    begins inside it. `adapt_to_prompt` sets it for each prompt.
    """
    strict: bool = True
    """True if a frame that is opened but never closed holds no answer. False if no template is
    known to write a frame: the text is then the answer, unchanged.
    """
    closing: str = ""
    """Text that ends a turn if the template's end of turn is not a single token."""
    special_tokens: tuple[str, ...] = ()
    """Texts of the special tokens, which are never part of an answer."""
    call_ends: tuple[int, ...] = ()
    """End tokens of turns that call tools and have no answer in the frame: the whole output is
    then compared.
    """

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AnswerFrame:
        """Create a frame from the output of `to_dict`.

        Missing keys keep their defaults and unknown keys are ignored, so that files of older
        and newer versions stay readable.
        """
        fields = {key: value for key, value in values.items() if key in cls.__dataclass_fields__}
        for name in ("special_tokens", "call_ends"):
            if name in fields:
                fields[name] = tuple(fields[name])
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the frame as JSON values."""
        return {
            "marker": self.marker,
            "opener": self.opener,
            "strict": self.strict,
            "closing": self.closing,
            "special_tokens": list(self.special_tokens),
            "call_ends": list(self.call_ends),
        }

    def adapt_to_prompt(self, prompt: str) -> AnswerFrame:
        """Return the frame of the output that follows a prompt.

        A prompt that ends in an open thinking block has already opened the frame.

        Args:
            prompt: The prompt, or its end: the text of its last PROMPT_TAIL tokens is enough.
        """
        return replace(self, prompt_opens=prompt.rstrip().endswith(self.opener))

    def extract_visible_text(self, text: str, *, finished: bool = True) -> str:
        """Return the answer in a text, including the texts of special tokens.

        A frame that is never closed holds no answer: the result is empty. It is also empty for an
        unfinished text that may still turn out to begin with a frame.

        Args:
            text: The output of the model.
            finished: False while the model is still writing.
        """
        stripped = text.lstrip()
        if self.prompt_opens or stripped.startswith(self.opener):
            _, separator, remainder = text.partition(self.marker)
            if not separator and (self.strict or not finished):
                return ""
            text = remainder if separator else text
        # So far the output is only the beginning of an opener (`<thi`), or empty.
        elif not finished and self.opener.startswith(stripped):
            return ""
        if self.closing and text.rstrip().endswith(self.closing):
            text = text.rstrip().removesuffix(self.closing)
        return text

    def decode_answer(self, tokens: Sequence[int], decode: Decode, end: int | None = None) -> str:
        """Return the answer in the generated tokens, without surrounding spaces.

        Args:
            tokens: The generated tokens, without the end token.
            decode: Function that turns tokens into text.
            end: The end token; None if generation was cut off.
        """
        if end is not None and end in self.call_ends:
            return decode(tokens, True).strip()
        # Keep the special tokens at first: the opener and the marker may be special tokens
        # themselves, as in gpt-oss.
        output = decode(tokens, False)
        visible_text = self.extract_visible_text(output)
        # Nothing was removed, so the tokenizer itself can leave out the special tokens.
        if visible_text == output:
            return decode(tokens, True).strip()
        return self.remove_special_tokens(visible_text).strip()

    def remove_special_tokens(self, text: str) -> str:
        """Return the text without the texts of special tokens."""
        for token in self.special_tokens:
            text = text.replace(token, "")
        return text
