"""Render a tokenizer's chat template, and describe its tokens.

This module knows how one template is called, and what the tokenizer's tokens are. Which
tokens are learnt is decided in `chat_format.py`, on top of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.errors import DataError, UserError

# The block tag of transformers around what the assistant writes (`return_assistant_tokens_mask`).
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CLOCK = re.compile(r"\bstrftime_now\b")
_PROBE_TEXT = "Probe7f3a"
_PART_SEPARATOR = "\n\n"
"""Text between the parts of a conversation if the tokenizer has no chat template."""

Range = tuple[int, int]
"""A part of a text: (first character, one past the last)."""


class TemplateRefusal(DataError):
    """Raised for a conversation that the chat template cannot render.

    Also raised where a template renders a row, but leaves out a part of it that must be
    learnt. The text does not name the row; the caller adds file and line.
    """


class ChatTemplate:
    """A tokenizer with its chat template and the job's template variables.

    A tokenizer without a chat template gets the plain form: parts joined by an empty line.
    Everything that depends only on the template is computed once, when it is first needed.

    Args:
        tokenizer: A transformers tokenizer. Slow ones work unless the template has markers.
        variables: Variables for the template (`data.chat_template_kwargs`).
    """

    def __init__(self, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})

    @cached_property
    def source(self) -> str:
        """Return the text of the template; empty if the tokenizer has none.

        Raises:
            UserError: If the tokenizer has several named templates and none is the default.
        """
        if not self.tokenizer.chat_template:
            return ""
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:
            raise UserError(
                "the tokenizer has several chat templates and no default one: name one in "
                f"data.chat_template ({error})"
            ) from error

    @cached_property
    def has_markers(self) -> bool:
        """Return whether the template marks what the assistant writes (`{% generation %}`)."""
        return bool(_MARKERS.search(self.source))

    @cached_property
    def unused_variables(self) -> list[str]:
        """Return the job's template variables that the template never mentions."""
        return [
            name for name in self.variables if not re.search(rf"\b{re.escape(name)}\b", self.source)
        ]

    @property
    def uses_date_string(self) -> bool:
        """Return whether the variable `date_string` sets the date in prompts."""
        return "date_string" in self.source

    @cached_property
    def has_current_date(self) -> bool:
        """Return whether prompts contain the date on which they are rendered.

        Then a model is asked with other prompts than it was trained with. Templates get the
        date from `strftime_now`, unless the variable `date_string` is set and the template uses
        it.
        """
        is_fixed = self.uses_date_string and "date_string" in self.variables
        return bool(_CLOCK.search(self.source)) and not is_fixed

    @cached_property
    def needs_content_parts(self) -> bool:
        """Return whether a message's content must be a list of parts.

        The templates of Idefics and LLaVA require this. It is found by rendering a probe both
        ways: such a template loops over the content, and of a plain text would render nothing
        usable.
        """
        probe = [Message("user", _PROBE_TEXT), Message("assistant", _PROBE_TEXT)]
        texts: list[str] = []
        for as_parts in (False, True):
            try:
                texts.append(
                    self._call_template(
                        probe, "", {"tokenize": False}, as_text=False, as_parts=as_parts
                    )
                )
            except _get_template_errors():
                texts.append("")
        # Parts are used only if they render both messages and a plain text does not.
        return texts[0].count(_PROBE_TEXT) < len(probe) <= texts[1].count(_PROBE_TEXT)

    @cached_property
    def atoms(self) -> frozenset[int]:
        """Return the ids of tokens that are never merged with text: special and added ones."""
        return frozenset({*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids})

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Return the ids of the special tokens."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset(
            {key for key, token in added.items() if token.special}
            | set(self.tokenizer.all_special_ids)
        )

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Return the texts of the special tokens, longest first.

        The order matters to `special_pattern`: a regular expression takes the first alternative
        that matches, so a text must come before its own beginning.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {str(token.content) for token in added if token.special} | set(
            self.tokenizer.all_special_tokens
        )
        return tuple(sorted((text for text in texts if text), key=lambda text: (-len(text), text)))

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Return a pattern for the text of any special token; None if there are none."""
        return (
            re.compile("|".join(map(re.escape, self.special_texts))) if self.special_texts else None
        )

    def get_token_text(self, token: int) -> str:
        """Return the text of a token of the vocabulary."""
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without added special tokens.

        The texts of special tokens inside it become those tokens. The template, or
        `ChatFormat`, adds start and end tokens.
        """
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Range]]:
        """Return the tokens of a text and the characters that each one covers.

        Needs a fast tokenizer. Only templates with markers need it.

        Returns:
            The token ids, and for each of them (first character, one past the last).
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [
            (int(first), int(last)) for first, last in encoded["offset_mapping"]
        ]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def render(self, messages: Sequence[Message], tools: str = "", *, generation: bool) -> str:
        """Return messages as text.

        Args:
            messages: The conversation.
            tools: Tool descriptions as JSON; empty for none.
            generation: True to add the generation prompt, which ends where the answer begins.

        Raises:
            TemplateRefusal: If the template refuses the conversation, with the template's message.
        """
        if not self.source:
            return self._render_plain(messages, tools, generation=generation)
        text: str = self._apply_template(
            messages, tools, add_generation_prompt=generation, tokenize=False
        )
        return text

    def find_marked_ranges(self, messages: Sequence[Message], tools: str = "") -> list[Range]:
        """Return the ranges of the rendered text that the template's own markers select.

        The text is that of `render(messages, generation=False)`.

        Returns:
            One range of characters for each selected token, in order. Characters and not
                tokens, because the same text may be tokenized differently when the answer is
                encoded after its prompt.

        Raises:
            TemplateRefusal: If the template refuses the conversation.
        """
        encoded = self._apply_template(
            messages,
            tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        pairs = zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True)
        return [(int(first), int(last)) for (first, last), is_marked in pairs if is_marked]

    def _apply_template(self, messages: Sequence[Message], tools: str, **options: Any) -> Any:
        """Call the template with the arguments of tool calls as objects.

        If that fails, the arguments are passed as JSON text, which DeepSeek's template needs.
        """
        errors = _get_template_errors()
        has_calls = any(message.tool_calls for message in messages)
        try:
            return self._call_template(
                messages, tools, options, as_text=False, as_parts=self.needs_content_parts
            )
        # A template that builds its text by concatenation (DeepSeek) raises a TypeError for
        # arguments that are an object.
        except errors as error:
            if has_calls:
                try:
                    return self._call_template(
                        messages, tools, options, as_text=True, as_parts=self.needs_content_parts
                    )
                except errors:
                    pass  # report the error of the first try, with objects
            reason = str(error) or type(error).__name__
            raise TemplateRefusal(
                f"the model's chat template refuses this row: {reason}"
            ) from error

    def _call_template(
        self,
        messages: Sequence[Message],
        tools: str,
        options: dict[str, Any],
        *,
        as_text: bool,
        as_parts: bool,
    ) -> Any:
        dictionaries = [
            message.to_template_dict(arguments_as_text=as_text, as_parts=as_parts)
            for message in messages
        ]
        tool_list = json.loads(tools) if tools else None
        return self.tokenizer.apply_chat_template(
            dictionaries, tools=tool_list, **options, **self.variables
        )

    def _render_plain(self, messages: Sequence[Message], tools: str, *, generation: bool) -> str:
        """Return the conversation in plain form, for a tokenizer without a chat template.

        Raises:
            TemplateRefusal: If the row has tools, tool calls or reasoning, which this form
                cannot show.
        """
        if tools or any(message.tool_calls or message.reasoning for message in messages):
            raise TemplateRefusal(
                "the row has tools, tool calls or reasoning, but the model's tokenizer has no chat "
                "template to render them; name one in data.chat_template"
            )
        text = _PART_SEPARATOR.join(message.content for message in messages)
        return text + _PART_SEPARATOR if generation else text


def _get_template_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that rendering a template can raise.

    They are jinja's own errors and those of the expressions in a template. Templates come
    from models and users, so any of these is a problem of the input and not of lorafleet.
    jinja2 is imported here, because the control plane does not need it.
    """
    from jinja2 import TemplateError

    expression_errors = (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        ArithmeticError,
    )
    return (TemplateError, *expression_errors, RecursionError, MemoryError)
