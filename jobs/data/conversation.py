"""Represent the messages of a conversation, in data files and for chat templates.

The form is that of Hugging Face's chat templates. Reading the layouts of other tools is
in `row_formats.py`, and rendering in `chat_template.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One message. It is hashable, so that equal conversations can be found.

    Tool calls are therefore kept as JSON text and not as lists. The order of the fields is
    part of the format of `PackedRows`, which stores them by position.
    """

    role: str
    content: str
    reasoning: str = ""
    """Reasoning of an assistant before its answer (`reasoning_content`)."""
    tool_calls: str = ""
    """Tool calls of an assistant, as a JSON list; empty for none."""
    name: str = ""
    """Name of the tool, for a tool's answer."""
    tool_call_id: str = ""
    """Id of the call that a tool's answer belongs to."""
    learn: bool = True
    """Whether an assistant's message may be learnt. `weight: 0` and `train: false` in the data set
    it to False.
    """

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Return the tool calls, with their arguments as objects."""
        calls: list[dict[str, Any]] = json.loads(self.tool_calls) if self.tool_calls else []
        return calls

    def to_template_dict(
        self, *, arguments_as_text: bool = False, as_parts: bool = False
    ) -> dict[str, Any]:
        """Return the dictionary that a chat template takes (Hugging Face's form).

        Args:
            arguments_as_text: Pass the arguments of tool calls as JSON text, as OpenAI does. Most
                templates take them as an object.
            as_parts: Pass the content as a list of one text part.
        """
        content: Any = [{"type": "text", "text": self.content}] if as_parts else self.content
        message: dict[str, Any] = {"role": self.role, "content": content}
        # Keys without a value are left out: templates often test only whether a key is defined.
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                _format_call(call, as_text=arguments_as_text) for call in self.calls
            ]
        if self.name:
            message["name"] = self.name
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message

    def to_record(self) -> dict[str, Any]:
        """Return the JSON object to store; `from_record` reads it.

        Fields with their default values are left out, so that records of plain messages stay
        small and their digests do not change when a field is added.
        """
        record: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("reasoning", "tool_calls", "name", "tool_call_id"):
            if getattr(self, key):
                record[key] = getattr(self, key)
        if not self.learn:
            record["learn"] = False
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Message:
        """Create a message from the output of `to_record`."""
        return cls(**record)


def _format_call(call: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    """Return a tool call for a chat template, with its arguments as an object or as JSON text."""
    if not as_text:
        return call
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def has_prompt(messages: tuple[Message, ...], index: int) -> bool:
    """Return whether a user or a tool has spoken before the message at `index`."""
    return any(message.role in ("user", "tool") for message in messages[:index])


def find_learnable_turns(messages: tuple[Message, ...], train_on_turns: str) -> list[int]:
    """Return the positions of the assistant's messages that are learnt, in order.

    Messages with weight 0 are not learnt, and neither are those that answer nothing, such
    as a greeting before the first question.

    Args:
        messages: The conversation.
        train_on_turns: `all`, or `last` to keep only the last remaining one.

    Returns:
        The positions; empty if there is nothing to learn.
    """
    turns = [
        index
        for index, message in enumerate(messages)
        if message.role == "assistant" and message.learn and has_prompt(messages, index)
    ]
    return turns[-1:] if train_on_turns == "last" else turns
