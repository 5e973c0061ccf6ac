"""Messages of a conversation, as data files have them and as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One message. Hashable, so that equal conversations can be found."""

    role: str
    content: str
    reasoning: str = ""
    """What an assistant thought before its answer (`reasoning_content`)."""
    tool_calls: str = ""
    """An assistant's calls as a JSON list; empty: none."""
    name: str = ""
    """Of a tool's answer: the tool."""
    tool_call_id: str = ""
    """Of a tool's answer: the call that it answers."""
    learn: bool = True
    """Of an assistant's message: whether it may be learnt (`weight: 0` and `train: false` say that it is not)."""

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The tool calls, with their arguments as objects."""
        calls: list[dict[str, Any]] = json.loads(self.tool_calls) if self.tool_calls else []
        return calls

    def for_template(self, *, arguments_as_text: bool = False, as_parts: bool = False) -> dict[str, Any]:
        """Build the dictionary that a chat template takes (Hugging Face's form).

        Most templates take a call's arguments as an object; with `arguments_as_text` they are JSON, as OpenAI has them.
        With `as_parts` the content is a list of one text part.
        """
        content: Any = [{"type": "text", "text": self.content}] if as_parts else self.content
        message: dict[str, Any] = {"role": self.role, "content": content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [_call(call, as_text=arguments_as_text) for call in self.calls]
        if self.name:
            message["name"] = self.name
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message

    def as_record(self) -> dict[str, Any]:
        """Build the JSON object that is stored; `from_record` reads it."""
        record: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("reasoning", "tool_calls", "name", "tool_call_id"):
            if getattr(self, key):
                record[key] = getattr(self, key)
        if not self.learn:
            record["learn"] = False
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Message:
        """Read what `as_record` wrote."""
        return cls(**record)


def _call(call: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    if not as_text:
        return call
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def has_prompt(messages: tuple[Message, ...], index: int) -> bool:
    """Whether something was asked before the message at `index`: a user or a tool has spoken."""
    return any(message.role in ("user", "tool") for message in messages[:index])


def learnable_turns(messages: tuple[Message, ...], train_on_turns: str) -> list[int]:
    """Return the positions of the assistant's messages that are learnt, in their order.

    A message with weight 0 is not learnt, and neither is one that answers nothing (a greeting before the first
    question). `train_on_turns: last` keeps the last of those that are left.
    """
    turns = [
        index
        for index, message in enumerate(messages)
        if message.role == "assistant" and message.learn and has_prompt(messages, index)
    ]
    return turns[-1:] if train_on_turns == "last" else turns
