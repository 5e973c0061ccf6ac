"""A tokenizer's chat template: rendering it, and knowing its tokens. Nothing here knows what is learnt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.errors import DataError, UserError

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CLOCK = re.compile(r"\bstrftime_now\b")
_PROBE = "Probe7f3a"
_PART_SEPARATOR = "\n\n"
"""Between the parts of a conversation where the tokenizer has no chat template."""

Range = tuple[int, int]
"""(first character, the one after the last) of a stretch of text."""


class TemplateRefusal(DataError):
    """A conversation that the chat template cannot render as it is."""


class ChatTemplate:
    """One tokenizer with its chat template and the variables of the job.

    A tokenizer without a chat template gets the plain form: parts joined by an empty line.
    """

    def __init__(self, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})

    @cached_property
    def source(self) -> str:
        """The template's text; empty: the tokenizer has none.

        Raises UserError for a tokenizer with named templates of which none is the default.
        """
        if not self.tokenizer.chat_template:
            return ""
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:
            raise UserError(
                f"the tokenizer has several chat templates and no default one: name one in data.chat_template ({error})"
            ) from error

    @cached_property
    def has_markers(self) -> bool:
        """Whether the template itself says what the assistant writes (`{% generation %}`)."""
        return bool(_MARKERS.search(self.source))

    @cached_property
    def unused_variables(self) -> list[str]:
        """Variables of the job that the template never mentions."""
        return [name for name in self.variables if not re.search(rf"\b{re.escape(name)}\b", self.source)]

    @property
    def takes_a_date(self) -> bool:
        """Whether the variable `date_string` says which day prompts hold."""
        return "date_string" in self.source

    @cached_property
    def tells_the_date(self) -> bool:
        """Whether prompts hold the day on which they are rendered."""
        fixed = self.takes_a_date and "date_string" in self.variables
        return bool(_CLOCK.search(self.source)) and not fixed

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template takes a message's content only as a list of parts (those of Idefics and LLaVA do)."""
        probe = [Message("user", _PROBE), Message("assistant", _PROBE)]
        texts: list[str] = []
        for as_parts in (False, True):
            try:
                texts.append(self._call(probe, "", {"tokenize": False}, as_text=False, as_parts=as_parts))
            except _template_errors():
                texts.append("")
        return texts[0].count(_PROBE) < len(probe) <= texts[1].count(_PROBE)

    @cached_property
    def atoms(self) -> frozenset[int]:
        """Ids of tokens that are never merged with text: special and added ones."""
        return frozenset({*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids})

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset({key for key, token in added.items() if token.special} | set(self.tokenizer.all_special_ids))

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of special tokens, longest first."""
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {str(token.content) for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return tuple(sorted((text for text in texts if text), key=lambda text: (-len(text), text)))

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Matches the text of any special token; None: there are none."""
        return re.compile("|".join(map(re.escape, self.special_texts))) if self.special_texts else None

    def name_of(self, token: int) -> str:
        """Return the text of a token of the vocabulary."""
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, and no others."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ids_with_offsets(self, text: str) -> tuple[list[int], list[Range]]:
        """Return the tokens of a text, and the characters that each covers (of a fast tokenizer)."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [(int(first), int(last)) for first, last in encoded["offset_mapping"]]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def render(self, messages: Sequence[Message], tools: str = "", *, generation: bool) -> str:
        """Render messages as a text; with `generation` up to where the answer begins.

        Raises TemplateRefusal with what the template says.
        """
        if not self.source:
            return self._plain(messages, tools, generation=generation)
        text: str = self._apply(messages, tools, add_generation_prompt=generation, tokenize=False)
        return text

    def marked(self, messages: Sequence[Message], tools: str = "") -> list[Range]:
        """Return the characters of `render(messages, generation=False)` that the template's own markers name."""
        encoded = self._apply(
            messages,
            tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        pairs = zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True)
        return [(int(first), int(last)) for (first, last), marked in pairs if marked]

    def _apply(self, messages: Sequence[Message], tools: str, **options: Any) -> Any:
        """Call the template. Arguments of tool calls go as objects, or else as JSON text, which DeepSeek's needs."""
        errors = _template_errors()
        calls = any(message.tool_calls for message in messages)
        try:
            return self._call(messages, tools, options, as_text=False, as_parts=self.takes_parts)
        except errors as error:
            if calls:
                try:
                    return self._call(messages, tools, options, as_text=True, as_parts=self.takes_parts)
                except errors:
                    pass  # what it says of objects is what counts
            what = str(error) or type(error).__name__
            raise TemplateRefusal(f"the model's chat template refuses this row: {what}") from error

    def _call(
        self, messages: Sequence[Message], tools: str, options: dict[str, Any], *, as_text: bool, as_parts: bool
    ) -> Any:
        dictionaries = [message.for_template(arguments_as_text=as_text, as_parts=as_parts) for message in messages]
        described = json.loads(tools) if tools else None
        return self.tokenizer.apply_chat_template(dictionaries, tools=described, **options, **self.variables)

    def _plain(self, messages: Sequence[Message], tools: str, *, generation: bool) -> str:
        if tools or any(message.tool_calls or message.reasoning for message in messages):
            raise TemplateRefusal(
                "the row has tools, tool calls or reasoning, but the model's tokenizer has no chat template that could "
                "render them; name one in data.chat_template"
            )
        text = _PART_SEPARATOR.join(message.content for message in messages)
        return text + _PART_SEPARATOR if generation else text


def _template_errors() -> tuple[type[Exception], ...]:
    """What rendering a template raises: jinja's own errors, and those of the expressions in it."""
    from jinja2 import TemplateError

    own = (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError)
    return (TemplateError, *own, RecursionError, MemoryError)
