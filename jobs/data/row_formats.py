"""From a record of a data file to a row: every known shape is read as what it is, and nothing is dropped silently.

A key that changes what a row means is used, or named in an error. A key that is not known is counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorafleet.jobs.data.answer_frame import THINKING
from lorafleet.jobs.data.conversation import ROLES, Message
from lorafleet.jobs.schema.job import DataFormat, DataSpec, JobSpec

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold a conversation where `data.messages_column` names none."""
_SYSTEM_COLUMNS = ("system", "system_prompt")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLING_ROLES = ("function_call", "tool_call")
"""Those of ShareGPT whose text is a tool call."""
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_FLAG_KEYS = ("train", "training", "loss")
"""Of a message: axolotl's and ms-swift's words for whether it is learnt."""
_UNSUPPORTED_COLUMNS = (
    *("images", "image", "videos", "video", "audios", "audio"),
    *("documents", "functions", "function_call", "weight", "loss_weight"),
    *("chat_template_kwargs", "enable_thinking", "rejected", "assistant_masks"),
)
"""Columns that change what a row means and cannot be used."""
_UNLEARNT_COLUMNS = ("train", "training", "loss")
"""Columns by which a row says that nothing of it is learnt."""
_UNSUPPORTED_IN_MESSAGE = (
    *("function_call", "audio", "image", "images", "video", "refusal", "train_detail"),
    *("mask", "prefix"),
)
_WORDS_BEGUN = 48


class BadRow(Exception):
    """What is wrong with a record, as the end of a sentence that begins with its file and line."""


@dataclass(frozen=True)
class Row:
    """One row, whatever it was read from: a text with a label, a text alone, or a conversation to answer."""

    text: str = ""
    label: str = ""
    messages: tuple[Message, ...] = ()
    """The conversation; the last message is the assistant's."""
    tools: str = ""
    """Tools that the conversation may call, as a JSON list; empty: none."""
    line: int = field(default=0, compare=False)
    """Line of the row in its file (in a .json or .parquet file: its number)."""
    answer: str | None = field(default=None, compare=False)
    """The answer that metrics compare with, where the chat template was asked; None: the last message as it is."""

    @property
    def prompt(self) -> str:
        """What is asked, without a chat template around it; a text with a label; the beginning of a text alone."""
        if self.messages:
            return "\n\n".join(message.content for message in self.messages[: self._answered])
        return self.text if self.label else self.text[: self._beginning]

    @property
    def reference(self) -> str:
        """The answer that is right; a text's label; how a text alone goes on."""
        if self.answer is not None:
            return self.answer
        if self.messages:
            return self.messages[self._answered].content
        return self.label or self.text[self._beginning :].strip()

    @property
    def _answered(self) -> int:
        """Position of the last answer that may be learnt: metrics judge that one."""
        learnt = (place for place in reversed(range(len(self.messages))) if _teaches(self.messages[place]))
        return next(learnt, len(self.messages) - 1)

    @property
    def _beginning(self) -> int:
        """Characters of a text alone after which a model is to go on: half its words, but few."""
        ends = [word.end() for word in re.finditer(r"\S+", self.text)]
        words = min(len(ends) // 2, _WORDS_BEGUN)
        return ends[words - 1] if words else len(self.text)

    @property
    def question(self) -> Row:
        """The row without its answer: rows with equal questions belong together."""
        if self.messages:
            return Row(messages=self.messages[: self._answered], tools=self.tools)
        return Row(text=self.text)

    def shown(self) -> dict[str, Any]:
        """What a run keeps of a held-out row, to be read where the data is not; of a conversation its turns too."""
        asked = self.messages[: self._answered] if self.messages else ()
        turns = [{"role": one.role, "text": one.content or one.tool_calls} for one in asked]
        return {"prompt": self.prompt, "reference": self.reference} | ({"turns": turns} if turns else {})

    def as_record(self) -> dict[str, Any]:
        """Build the JSON object that is stored; `from_record` reads it."""
        record: dict[str, Any] = {
            "text": self.text,
            "label": self.label,
            "messages": [message.as_record() for message in self.messages],
        }
        if self.tools:
            record["tools"] = self.tools
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Row:
        """Read what `as_record` wrote, and the answer where it was stored beside."""
        messages = tuple(Message.from_record(message) for message in record["messages"])
        return cls(record["text"], record["label"], messages, record.get("tools", ""), answer=record.get("answer"))


def _teaches(message: Message) -> bool:
    return message.role == "assistant" and message.learn


def row_format(record: Mapping[str, Any], job: JobSpec) -> DataFormat:
    """Return the format that the job names, or else the one that the keys of a row show."""
    if job.data.format != "auto":
        return job.data.format
    if job.task == "classification":
        return "text_label"
    if job.data.messages_column is not None or _messages_column(record, job.data) is not None:
        return "messages"
    if "instruction" in record:
        return "instruction"
    return "prompt_completion" if job.data.prompt_column in record else "text"


def convert(record: Mapping[str, Any], kind: DataFormat, data: DataSpec, unused: Counter[str]) -> Row:
    """Build a row from a record. Raises BadRow. Keys that are not known are counted in `unused`."""
    if kind == "text_label":
        row, used = _text_label(record, data), {data.text_column, data.label_column}
    elif kind == "text":
        row, used = Row(text=_text(record, data.text_column)), {data.text_column}
    else:
        row, used = _conversation_row(record, kind, data, unused)
        _check_columns(record, used)
    for key, value in record.items():
        if key not in used and value is not None:
            unused[f"column {key!r}" if key else "the column without a name"] += 1
    return row


def _conversation_row(
    record: Mapping[str, Any], kind: DataFormat, data: DataSpec, unused: Counter[str]
) -> tuple[Row, set[str]]:
    used = {*_SYSTEM_COLUMNS, "tools"}
    if kind == "messages":
        column = _messages_column(record, data)
        if column is None:
            raise BadRow(_no_column(record, data.messages_column or "messages"))
        used.add(column)
        if record.get("history") not in (None, "", []):
            raise BadRow(f"history stands beside {column}: put its turns into the list")
        messages = _messages(record[column], column, unused)
    elif kind == "instruction":
        used |= {"instruction", "input", "output", "history"}
        messages = _instruction(record)
    else:
        used |= {data.prompt_column, data.completion_column, "history"}
        messages = _prompt_completion(record, data, unused)
    messages = _with_system(messages, record, data)
    if not any(message.role in ("user", "tool") for message in messages):
        raise BadRow("messages must have something before the assistant's answer: it is the prompt")
    return Row(messages=tuple(messages), tools=_tools(record.get("tools"))), used


def _check_columns(record: Mapping[str, Any], used: set[str]) -> None:
    """Refuse columns that would change what the row means and cannot be used."""
    if not record.keys() - used:
        return
    for key in _UNSUPPORTED_COLUMNS:
        value = record.get(key)
        if key in used or value in (None, "", [], {}, 1, 1.0):
            continue
        advice = {
            "functions": "; name them in tools",
            "function_call": "; name it in tool_calls",
            "weight": "; a message can have weight 0 or 1",
            "chat_template_kwargs": "; data.chat_template_kwargs is for all rows",
            "enable_thinking": "; data.chat_template_kwargs is for all rows",
        }
        raise BadRow(f"{key} is {_short(value)}, which cannot be used here{advice.get(key, '')}; drop the column")
    for key in _UNLEARNT_COLUMNS:
        if key not in used and record.get(key) is False:
            raise BadRow(f"{key} is false: nothing of this row is to be learnt; drop the row, or the column")


def _messages_column(record: Mapping[str, Any], data: DataSpec) -> str | None:
    if data.messages_column is not None:
        return data.messages_column if data.messages_column in record else None
    for name in CONVERSATION_COLUMNS:
        if isinstance(_from_text_cell(record.get(name)), list):
            return name
    return CONVERSATION_COLUMNS[0] if record.get(CONVERSATION_COLUMNS[0]) is not None else None


def _from_text_cell(value: Any) -> Any:
    """Return the list of messages that a text cell (of a CSV file, say) holds as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        return value
    shapes = ({"role", "content"}, {"from", "value"})
    whole = all(isinstance(one, dict) and any(shape <= set(one) for shape in shapes) for one in messages)
    return messages if whole else value


def plain_columns(kind: DataFormat, data: DataSpec) -> tuple[str, ...] | None:
    """Return the columns whose cells make a row of a format; None where a row can have more to it."""
    if kind == "text_label":
        return (data.text_column, data.label_column)
    if kind == "text":
        return (data.text_column,)
    return (data.prompt_column, data.completion_column) if kind == "prompt_completion" else None


def _text_label(record: Mapping[str, Any], data: DataSpec) -> Row:
    text = _text(record, data.text_column)
    if data.label_column not in record:
        raise BadRow(_no_column(record, data.label_column))
    return Row(text=text, label=class_of(record[data.label_column], data))


def class_of(label: Any, data: DataSpec) -> str:
    """Return the class that a label names. Raises BadRow."""
    if isinstance(label, bool):
        label = str(label).lower()
    if not isinstance(label, str | int) or not str(label).strip():
        raise BadRow(f"{data.label_column} is {_short(label)}, but must be a text or a whole number")
    _check_whole_characters(data.label_column, str(label))
    return _class_name(str(label).strip(), data.labels)


def _class_name(label: str, names: Sequence[str] | None) -> str:
    """Return the name of a class: a whole number is a place among the names, unless one of them is a number itself."""
    if names is None or label in names or any(map(_is_whole, names)):
        return label
    return names[int(label)] if _is_whole(label) and int(label) in range(len(names)) else label


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,18}", text) is not None


def _instruction(record: Mapping[str, Any]) -> list[Message]:
    extra = record.get("input")
    extra = "" if extra is None else extra
    if not isinstance(extra, str):
        raise BadRow(f"input is {_short(extra)}, but must be a text")
    _check_whole_characters("input", extra)
    asked, answer = _text(record, "instruction"), _text(record, "output")
    asked = f"{asked}\n\n{extra}" if extra else asked
    return [*_history(record), Message("user", asked), Message("assistant", answer)]


def _prompt_completion(record: Mapping[str, Any], data: DataSpec, unused: Counter[str]) -> list[Message]:
    columns = (data.prompt_column, data.completion_column)
    cells = {column: _from_text_cell(record[column]) for column in columns if column in record}
    if any(isinstance(cell, list) for cell in cells.values()):
        return _conversational({**record, **cells}, data, unused)
    asked, answer = _text(record, data.prompt_column), _text(record, data.completion_column)
    return [*_history(record), Message("user", asked), Message("assistant", answer)]


def _conversational(record: Mapping[str, Any], data: DataSpec, unused: Counter[str]) -> list[Message]:
    """TRL's conversational prompt and completion: two lists of messages, of which the second is learnt."""
    if record.get("history") not in (None, "", []):
        raise BadRow("history stands beside a list of messages: put its turns into the list")
    for column in (data.prompt_column, data.completion_column):
        if column not in record:
            raise BadRow(_no_column(record, column))
        if not isinstance(record[column], list):
            raise BadRow(
                f"{column} is {_short(record[column])}, but must be a list of messages as the other column has one"
            )
    before = _messages(record[data.prompt_column], data.prompt_column, unused, whole=False)
    after = _messages(record[data.completion_column], data.completion_column, unused)
    # TRL's loss is on the completion: an assistant's turn in the prompt is context.
    return [*(replace(one, learn=False) if one.role == "assistant" else one for one in before), *after]


def _history(record: Mapping[str, Any]) -> list[Message]:
    """Alpaca's `history`: pairs of question and answer before this one."""
    history = _from_json(record.get("history"), "history")
    if history in (None, "", []):
        return []
    if not isinstance(history, list):
        raise BadRow(f"history is {_short(history)}, but must be a list of [question, answer] pairs")
    messages = []
    for pair in history:
        whole = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if not whole or not all(part.strip() for part in pair):
            raise BadRow(f"history has {_short(pair)}, but must be a list of [question, answer] pairs of texts")
        _check_whole_characters("history", "".join(pair))
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def _with_system(messages: list[Message], record: Mapping[str, Any], data: DataSpec) -> list[Message]:
    """Put the row's own system column, or the job's `data.system_prompt`, before the conversation."""
    columns = {
        key: _text(record, key)
        for key in _SYSTEM_COLUMNS
        if key not in (data.prompt_column, data.completion_column) and record.get(key) not in (None, "")
    }
    own = next((message.content for message in messages if message.role in ("system", "developer")), None)
    texts = list(columns.values()) + ([own] if own is not None else [])
    if len({text.strip() for text in texts}) > 1:
        raise BadRow(f"{' and '.join(columns)} and the system message contradict each other: keep one of them")
    if own is not None:
        return messages
    if texts:
        return [Message("system", texts[0]), *messages]
    return [Message("system", data.system_prompt), *messages] if data.system_prompt else messages


def _messages(value: Any, column: str, unused: Counter[str], *, whole: bool = True) -> list[Message]:
    """Read a list of messages. With `whole` the last one must be the assistant's."""
    if isinstance(value, str):  # in CSV and some Parquet files
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"{column} must be a list of {{role, content}}") from None
    if not isinstance(value, list) or not value:
        raise BadRow(f"{column} must be a list of {{role, content}}")
    messages = [_message(one, place, unused) for place, one in enumerate(value, start=1)]
    if whole and messages[-1].role != "assistant":
        raise BadRow(f"the last of {column} must be the assistant's, and not empty: it is what is learnt")
    for place, message in enumerate(messages, start=1):
        silent = not message.content.strip() and not message.tool_calls
        if message.role == "assistant" and message.learn and silent:
            last = place == len(messages)
            what = f"the last of {column} must be the assistant's, and not empty: it is what is learnt"
            raise BadRow(what if last else f"message {place} is the assistant's and empty; give it weight 0 or a text")
    return messages


def _message(value: Any, place: int, unused: Counter[str]) -> Message:
    plain = _plain_message(value)
    if plain is not None:
        return plain
    if not isinstance(value, Mapping):
        raise BadRow(f"message {place} is {_short(value)}, but must be {{role, content}}")
    record = {key: one for key, one in value.items() if one is not None}
    used = {*_REASONING_KEYS, *_FLAG_KEYS, "weight", "tool_calls", "tool_call_id", "name"}
    if "role" in record:
        used |= {"role", "content"}
        role = record["role"]
        if role not in ROLES:
            raise BadRow(f"role is {role!r}, but must be one of {', '.join(ROLES)}")
        content = record.get("content", "" if record.get("tool_calls") else None)
    elif "from" in record:
        used |= {"from", "value"}
        role = _SHAREGPT_ROLES.get(str(record["from"]))
        if role is None:
            raise BadRow(f"from is {record['from']!r}, but must be one of {', '.join(_SHAREGPT_ROLES)}")
        content = record.get("value")
    else:
        raise BadRow(f"message {place} has neither role nor from (it has: {', '.join(map(str, list(value)[:8]))})")
    for key in _UNSUPPORTED_IN_MESSAGE:
        if record.get(key) not in (None, "", [], {}):
            raise BadRow(f"{key} of message {place} cannot be used here: drop it, or the row")
    text = _content(content, place)
    calls = _tool_calls(record.get("tool_calls"), place)
    if record.get("from") in _CALLING_ROLES:
        if calls:
            raise BadRow(f"message {place} is a function call and has tool_calls as well: keep one")
        text, calls = "", _sharegpt_call(text, place)
    if role != "tool":
        used -= {"name", "tool_call_id"}
    for key in record:
        if key not in used:
            unused[f"message key {key!r}"] += 1
    reasoning = _reasoning(record, role, place)
    if reasoning and THINKING[1] in text:
        raise BadRow(f"message {place} has reasoning both in a field and as {THINKING[0]} in its content: keep one")
    learn = _learn(record, role, place, unused)
    if calls and role != "assistant":
        raise BadRow(f"message {place} has tool_calls, but its role is {role}: only an assistant calls tools")
    name, call_id = record.get("name", ""), record.get("tool_call_id", "")
    if not isinstance(name, str) or not isinstance(call_id, str):
        raise BadRow(f"name and tool_call_id of message {place} must be texts")
    _check_whole_characters("name", f"{name}{call_id}")
    if role != "tool":
        name, call_id = "", ""
    return Message(role, text, reasoning, calls, name, call_id, learn)


def _plain_message(value: Any) -> Message | None:
    """Read a message that has a role, a text and nothing else, as nearly all have; None for any other."""
    if not isinstance(value, dict) or len(value) != 2:
        return None
    role, content = value.get("role"), value.get("content")
    if role is None and isinstance(value.get("from"), str) and value["from"] not in _CALLING_ROLES:
        role, content = _SHAREGPT_ROLES.get(value["from"]), value.get("value")
    if role not in ROLES or not isinstance(content, str):
        return None
    _check_whole_characters("content", content)
    return Message(role, content)


def _content(value: Any, place: int) -> str:
    """Read a text, or a list of text parts. Raises BadRow for parts of any other type."""
    if isinstance(value, list):
        parts = []
        for part in value:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                what = f"a part of type {kind!r}" if kind not in (None, "text") else _short(part)
                raise BadRow(f"content of message {place} has {what}, but only {{type: text, text}} can be learnt")
            parts.append(part["text"])
        value = "".join(parts)
    if not isinstance(value, str):
        raise BadRow(f"each of messages must be {{role, content}} with a text as content (message {place})")
    _check_whole_characters("content", value)
    return value


def _reasoning(record: Mapping[str, Any], role: str, place: int) -> str:
    texts = {key: record[key] for key in _REASONING_KEYS if str(record.get(key) or "").strip()}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise BadRow(f"{key} of message {place} is {_short(text)}, but must be a text")
        if role != "assistant":
            raise BadRow(f"{key} stands in message {place}, but only an assistant's message has reasoning")
        _check_whole_characters(key, text)
    if len(set(texts.values())) > 1:
        raise BadRow(f"message {place} has {' and '.join(texts)}, which differ: keep one")
    return next(iter(texts.values()), "")


def _learn(record: Mapping[str, Any], role: str, place: int, unused: Counter[str]) -> bool:
    """Read `weight`, `train`, `training` and `loss`."""
    flags = []
    if "weight" in record:
        weight = record["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
            raise BadRow(f"weight of message {place} is {_short(weight)}, but must be 0 or 1")
        flags.append(bool(weight))
    for key in _FLAG_KEYS:
        if key in record:
            if not isinstance(record[key], bool):
                raise BadRow(f"{key} of message {place} is {_short(record[key])}, but must be true or false")
            flags.append(record[key])
    if len(set(flags)) > 1:
        raise BadRow(f"message {place} says both that it is learnt and that it is not (weight, train)")
    if flags and flags[0] and role != "assistant":
        unused[f"weight 1 of a {role} message, which is not learnt"] += 1
    return flags[0] if flags else True


def _tools(value: Any) -> str:
    """Read a row's tools: a list of function descriptions, or the same as JSON text."""
    value = _from_json(value, "tools")
    if value in (None, "", []):
        return ""
    if not isinstance(value, list) or not all(_is_tool(tool) for tool in value):
        raise BadRow(f"tools is {_short(value)}, but must be a list of functions, each with a name")
    text = json.dumps(value, ensure_ascii=False)
    _check_whole_characters("tools", text)
    return text


def _is_tool(tool: Any) -> bool:
    if not isinstance(tool, Mapping):
        return False
    function = tool.get("function", tool)
    return isinstance(function, Mapping) and isinstance(function.get("name"), str) and bool(function["name"])


def _tool_calls(value: Any, place: int) -> str:
    """Read an assistant's calls; arguments may be an object, or JSON text as OpenAI has them."""
    value = _from_json(value, f"tool_calls of message {place}")
    if value in (None, "", []):
        return ""
    if not isinstance(value, list):
        raise BadRow(f"tool_calls of message {place} is {_short(value)}, but must be a list")
    text = json.dumps([_call(call, place) for call in value], ensure_ascii=False)
    _check_whole_characters(f"tool_calls of message {place}", text)
    return text


_CALL_KEYS = frozenset({"id", "type", "function", "index"})
_FUNCTION_KEYS = frozenset({"name", "arguments", "parameters", "input"})
"""Other names of a call's arguments: Llama's, and Anthropic's."""


def _call(value: Any, place: int) -> dict[str, Any]:
    what = f"a tool call of message {place}"
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(f"tool_calls of message {place} has {_short(value)}, but each must name a function")
    allowed = _CALL_KEYS if function is not value else _CALL_KEYS | _FUNCTION_KEYS
    strange = [key for key in value if key not in allowed]
    strange += [key for key in function if function is not value and key not in _FUNCTION_KEYS]
    if strange:
        raise BadRow(f"{what} has {strange[0]!r}, which cannot be used: it may have id, type, name and arguments")
    if value.get("type") not in (None, "function"):
        raise BadRow(f"type of {what} is {_short(value['type'])}, but must be function")
    keys = [key for key in ("arguments", "parameters", "input") if function.get(key) is not None]
    if len(keys) > 1:
        raise BadRow(f"{what} has both {keys[0]} and {keys[1]}: keep one")
    arguments = _from_json(function[keys[0]], f"arguments of {what}") if keys else {}
    arguments = {} if arguments == "" else arguments  # OpenAI's calls without arguments
    if not isinstance(arguments, Mapping):
        raise BadRow(f"arguments of {what} is {_short(arguments)}, but must be an object")
    call: dict[str, Any] = {"type": "function"}
    call_id = value.get("id")
    if call_id is not None and not isinstance(call_id, str):
        raise BadRow(f"id of {what} is {_short(call_id)}, but must be a text")
    if call_id:
        call["id"] = call_id
    call["function"] = {"name": function["name"], "arguments": dict(arguments)}
    return call


def _sharegpt_call(text: str, place: int) -> str:
    """LLaMA-Factory's `function_call`: the message is the call (or several) as JSON."""
    value = _from_json(text, f"the function call of message {place}")
    return _tool_calls(value if isinstance(value, list) else [value], place)


def _from_json(value: Any, what: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{what} is {_short(value)}, which is not JSON") from None


def _text(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise BadRow(_no_column(record, key))
    text = record[key]
    if not isinstance(text, str):
        raise BadRow(f"{key} is {_short(text)}, but must be a text")
    if not text.strip():
        raise BadRow(f"{key} is empty")
    _check_whole_characters(key, text)
    return text


def _no_column(record: Iterable[str], key: str) -> str:
    return f"no column {key!r} (there are: {', '.join(map(str, list(record)[:8]))})"


def _check_whole_characters(key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{key} holds half a character (a lone surrogate): it was cut or wrongly decoded") from None


def _short(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)[:40]
