"""Convert a record of a data file to a row.

Every known layout is read according to its meaning, and nothing is dropped silently: a
key that changes the meaning of a row is used, or refused with an error. Unknown keys
are counted. The user's description of the layouts is docs/data-formats.md. Reading
files is in `data_files.py`; this module sees one record at a time and never a
tokenizer.
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
"""Columns that may hold a conversation if `data.messages_column` is not set."""
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
"""ShareGPT roles whose text is a tool call."""
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_FLAG_KEYS = ("train", "training", "loss")
"""Keys of a message by which axolotl and ms-swift say whether it is trained on."""
_UNSUPPORTED_COLUMNS = (
    *("images", "image", "videos", "video", "audios", "audio"),
    *("documents", "functions", "function_call", "weight", "loss_weight"),
    *("chat_template_kwargs", "enable_thinking", "rejected", "assistant_masks"),
)
"""Columns that change the meaning of a row and are not supported."""
_WEIGHT_COLUMNS = ("weight", "loss_weight")
_UNLEARNT_COLUMNS = ("train", "training", "loss")
"""Columns by which a row can exclude itself from training."""
_UNSUPPORTED_IN_MESSAGE = (
    *("function_call", "audio", "image", "images", "video", "refusal", "train_detail"),
    *("mask", "prefix"),
)
_MAX_PROMPT_WORDS = 48


class BadRow(Exception):
    """Problem with a record. The text continues a sentence that begins with the file and line.

    The callers in `rows.py` and `columns.py` know file and line, and turn it into a
    DataError or an entry of a list of bad rows.
    """


@dataclass(frozen=True)
class Row:
    """One row of any format: a text with a label, a text alone, or a conversation to answer.

    Prompt and completion, Alpaca and ShareGPT rows all become conversations. Rows are equal
    if they have the same content: `line` and `answer` are not compared, so equal rows are
    found wherever they stand.
    """

    text: str = ""
    label: str = ""
    messages: tuple[Message, ...] = ()
    """Conversation. The last message is the assistant's."""
    tools: str = ""
    """Tools that the conversation may call, as a JSON list; empty if there are none."""
    line: int = field(default=0, compare=False)
    """Line of the row in its file; its number in a .json or .parquet file."""
    answer: str | None = field(default=None, compare=False)
    """Answer that metrics compare with, as rendered by the chat template. None: the last
    message, unchanged.
    """

    @property
    def prompt(self) -> str:
        """Return the prompt of a conversation, without a chat template.

        For a labelled text it is the text, for a text alone its beginning.
        """
        if self.messages:
            return "\n\n".join(message.content for message in self.messages[: self._answer_index])
        return self.text if self.label else self.text[: self._prompt_length]

    @property
    def reference(self) -> str:
        """Return the reference answer, the label of a text, or the continuation of a text alone."""
        if self.answer is not None:
            return self.answer
        if self.messages:
            return self.messages[self._answer_index].content
        return self.label or self.text[self._prompt_length :].strip()

    @property
    def _answer_index(self) -> int:
        """Return the index of the last answer that may be trained on. Metrics evaluate that one."""
        # A conversation may end with an answer of weight 0. Metrics then evaluate the last answer
        # that the model learns, and not one that it was told to ignore.
        trained = (
            index
            for index in reversed(range(len(self.messages)))
            if _is_trained_on(self.messages[index])
        )
        return next(trained, len(self.messages) - 1)

    @property
    def _prompt_length(self) -> int:
        """Return how many characters of a text alone are the prompt.

        The prompt is the first half of its words, but at most 48 words. Metrics and samples let
        the model continue it. A text of one word is all prompt.
        """
        ends = [word.end() for word in re.finditer(r"\S+", self.text)]
        words = min(len(ends) // 2, _MAX_PROMPT_WORDS)
        return ends[words - 1] if words else len(self.text)

    @property
    def question(self) -> Row:
        """Return the row without its answer.

        Rows with equal questions belong together: the split keeps them on one side, because a
        model that has seen the prompt in training would be evaluated on it otherwise. The
        label, the line and the last answer are left out.
        """
        if self.messages:
            return Row(messages=self.messages[: self._answer_index], tools=self.tools)
        return Row(text=self.text)

    def to_display_record(self) -> dict[str, Any]:
        """Return what a run stores of a held-out row, so that it can be shown without the data.

        Returns:
            `prompt` and `reference` as texts, and for conversations `turns`: a list of `role`
                and `text` for the messages before the answer. A message without text shows its
                tool calls.
        """
        prompt_messages = self.messages[: self._answer_index] if self.messages else ()
        turns = [
            {"role": message.role, "text": message.content or message.tool_calls}
            for message in prompt_messages
        ]
        return {"prompt": self.prompt, "reference": self.reference} | (
            {"turns": turns} if turns else {}
        )

    def to_record(self) -> dict[str, Any]:
        """Return the JSON object that is stored. `from_record` reads it."""
        record: dict[str, Any] = {
            "text": self.text,
            "label": self.label,
            "messages": [message.to_record() for message in self.messages],
        }
        if self.tools:
            record["tools"] = self.tools
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Row:
        """Return the row of a record written by `to_record`, with its answer if the record has
        one.
        """
        messages = tuple(Message.from_record(message) for message in record["messages"])
        return cls(
            record["text"],
            record["label"],
            messages,
            record.get("tools", ""),
            answer=record.get("answer"),
        )


def _is_trained_on(message: Message) -> bool:
    return message.role == "assistant" and message.learn


def detect_row_format(record: Mapping[str, Any], job: JobSpec) -> DataFormat:
    """Return the format that the job names, or else the one that fits the keys of a record.

    The first record of a file decides for the whole file, so that a row with other keys is
    an error and not silently read as another format.

    Args:
        record: The first record of a file.
        job: The job. Classification always reads texts with labels.
    """
    if job.data.format != "auto":
        return job.data.format
    if job.task == "classification":
        return "text_label"
    if job.data.messages_column is not None or _find_messages_column(record, job.data) is not None:
        return "messages"
    if "instruction" in record:
        return "instruction"
    return "prompt_completion" if job.data.prompt_column in record else "text"


def convert_record(
    record: Mapping[str, Any], kind: DataFormat, data: DataSpec, unused: Counter[str]
) -> Row:
    """Return the row of a record.

    Args:
        record: One record of a data file.
        kind: Format of the record; not `auto`.
        data: Data settings of the job.
        unused: Counter to which unknown keys are added. Keys without a value do not count.

    Raises:
        BadRow: The record cannot be used.
    """
    if kind == "text_label":
        row, used = _convert_text_label(record, data), {data.text_column, data.label_column}
    elif kind == "text":
        row, used = Row(text=_get_text(record, data.text_column)), {data.text_column}
    else:
        row, used = _convert_conversation(record, kind, data, unused)
        _check_columns(record, used)
    for key, value in record.items():
        if key not in used and value is not None:
            unused[f"column {key!r}" if key else "the column without a name"] += 1
    return row


def _convert_conversation(
    record: Mapping[str, Any], kind: DataFormat, data: DataSpec, unused: Counter[str]
) -> tuple[Row, set[str]]:
    # Every format of conversations takes these columns besides its own.
    used = {*_SYSTEM_COLUMNS, "tools"}
    if kind == "messages":
        column = _find_messages_column(record, data)
        if column is None:
            raise BadRow(_describe_missing_column(record, data.messages_column or "messages"))
        used.add(column)
        if record.get("history") not in (None, "", []):
            raise BadRow(f"the row has history as well as {column}: put its turns into the list")
        messages = _parse_messages(record[column], column, unused)
    elif kind == "instruction":
        used |= {"instruction", "input", "output", "history"}
        messages = _convert_instruction(record)
    else:
        used |= {data.prompt_column, data.completion_column, "history"}
        messages = _convert_prompt_completion(record, data, unused)
    messages = _add_system_message(messages, record, data)
    if not any(message.role in ("user", "tool") for message in messages):
        raise BadRow("messages must have a message before the assistant's answer, as its prompt")
    return Row(messages=tuple(messages), tools=_parse_tools(record.get("tools"))), used


def _check_columns(record: Mapping[str, Any], used: set[str]) -> None:
    """Raise BadRow for columns that change the meaning of the row and are not supported."""
    if not record.keys() - used:
        return
    for key in _UNSUPPORTED_COLUMNS:
        value = record.get(key)
        # Empty values and a weight of 1 change nothing. (`enable_thinking: true` equals 1.)
        changes_nothing = value in (None, "", [], {}) or (key in _WEIGHT_COLUMNS and value == 1)
        if key in used or changes_nothing:
            continue
        advice = {
            "functions": "; use tools instead",
            "function_call": "; use tool_calls instead",
            "weight": "; set weight (0 or 1) per message instead",
            "chat_template_kwargs": "; set data.chat_template_kwargs for all rows instead",
            "enable_thinking": "; set data.chat_template_kwargs for all rows instead",
        }
        raise BadRow(
            f"{key} is {_shorten(value)}, which lorafleet does not support{advice.get(key, '')}; "
            "remove the column"
        )
    # True, or a number such as a loss that some tool has recorded, excludes nothing.
    for key in _UNLEARNT_COLUMNS:
        if key not in used and record.get(key) is False:
            raise BadRow(
                f"{key} is false, so the row has nothing to learn; remove the row, or the column"
            )


def _find_messages_column(record: Mapping[str, Any], data: DataSpec) -> str | None:
    if data.messages_column is not None:
        return data.messages_column if data.messages_column in record else None
    for name in CONVERSATION_COLUMNS:
        if isinstance(_parse_messages_cell(record.get(name)), list):
            return name
    # A `messages` column without a list is still chosen: the error then names what is wrong with
    # it.
    return CONVERSATION_COLUMNS[0] if record.get(CONVERSATION_COLUMNS[0]) is not None else None


def _parse_messages_cell(value: Any) -> Any:
    """Return the list of messages that a text cell (of a CSV file, for example) holds as JSON.

    Any other value is returned unchanged, including JSON that is not a list of messages.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        return value
    # A prompt may be a text that begins with a bracket, or JSON of something else. Only a list of
    # messages counts as a conversation.
    shapes = ({"role", "content"}, {"from", "value"})
    are_messages = all(
        isinstance(message, dict) and any(shape <= set(message) for shape in shapes)
        for message in messages
    )
    return messages if are_messages else value


def list_plain_columns(kind: DataFormat, data: DataSpec) -> tuple[str, ...] | None:
    """Return the columns that make up a row of a format; None if a row can have more columns.

    `columns.py` reads files of these formats column by column. A `prompt_completion` row
    may still have further columns (`system`, `tools`); the column reader checks for them.
    """
    if kind == "text_label":
        return (data.text_column, data.label_column)
    if kind == "text":
        return (data.text_column,)
    return (data.prompt_column, data.completion_column) if kind == "prompt_completion" else None


def _convert_text_label(record: Mapping[str, Any], data: DataSpec) -> Row:
    text = _get_text(record, data.text_column)
    if data.label_column not in record:
        raise BadRow(_describe_missing_column(record, data.label_column))
    return Row(text=text, label=parse_label(record[data.label_column], data))


def parse_label(label: Any, data: DataSpec) -> str:
    """Return the class that a label names.

    Args:
        label: The cell: a text, an integer or a boolean. Booleans become `true` and
            `false`.
        data: The job's data settings. With `labels`, an integer is an index into them.

    Raises:
        BadRow: If the label is of another type, or empty.
    """
    if isinstance(label, bool):
        label = str(label).lower()
    if not isinstance(label, str | int) or not str(label).strip():
        raise BadRow(
            f"{data.label_column} is {_shorten(label)}, but must be a text or a whole number"
        )
    _check_encodable(data.label_column, str(label))
    return _resolve_class_name(str(label).strip(), data.labels)


def _resolve_class_name(label: str, names: Sequence[str] | None) -> str:
    """Return the name of a class.

    An integer label is an index into `names`, unless one of the names is a number itself.
    """
    # If a name is itself a number, `1` could mean the name or the index. It then always means the
    # name.
    if names is None or label in names or any(map(_is_integer, names)):
        return label
    return names[int(label)] if _is_integer(label) and int(label) in range(len(names)) else label


def _is_integer(text: str) -> bool:
    """Return whether a text is an integer in ASCII digits.

    `str.isdigit` accepts digits of other scripts, which are words here. Eighteen digits fit
    into 64 bits.
    """
    return re.fullmatch(r"-?[0-9]{1,18}", text) is not None


def _convert_instruction(record: Mapping[str, Any]) -> list[Message]:
    extra = record.get("input")
    extra = "" if extra is None else extra
    if not isinstance(extra, str):
        raise BadRow(f"input is {_shorten(extra)}, but must be a text")
    _check_encodable("input", extra)
    question, answer = _get_text(record, "instruction"), _get_text(record, "output")
    # Alpaca's own prompt template wraps both in fixed English sentences. The chat template takes
    # that role here.
    question = f"{question}\n\n{extra}" if extra else question
    return [*_parse_history(record), Message("user", question), Message("assistant", answer)]


def _convert_prompt_completion(
    record: Mapping[str, Any], data: DataSpec, unused: Counter[str]
) -> list[Message]:
    columns = (data.prompt_column, data.completion_column)
    cells = {column: _parse_messages_cell(record[column]) for column in columns if column in record}
    # One list is enough: a mixture of list and text is reported there.
    if any(isinstance(cell, list) for cell in cells.values()):
        return _convert_message_lists({**record, **cells}, data, unused)
    question, answer = (
        _get_text(record, data.prompt_column),
        _get_text(record, data.completion_column),
    )
    return [*_parse_history(record), Message("user", question), Message("assistant", answer)]


def _convert_message_lists(
    record: Mapping[str, Any], data: DataSpec, unused: Counter[str]
) -> list[Message]:
    """Return the messages of TRL's conversational prompt and completion.

    Both are lists of messages; only the completion is trained on.
    """
    if record.get("history") not in (None, "", []):
        raise BadRow(
            "the row has history as well as a list of messages: put its turns into the list"
        )
    for column in (data.prompt_column, data.completion_column):
        if column not in record:
            raise BadRow(_describe_missing_column(record, column))
        if not isinstance(record[column], list):
            raise BadRow(
                f"{column} is {_shorten(record[column])}, but must be a list of messages like the "
                "other column"
            )
    prompt_messages = _parse_messages(
        record[data.prompt_column], data.prompt_column, unused, ends_with_answer=False
    )
    completion_messages = _parse_messages(
        record[data.completion_column], data.completion_column, unused
    )
    # TRL computes the loss on the completion only: an assistant's turn in the prompt is context.
    return [
        *(
            replace(message, learn=False) if message.role == "assistant" else message
            for message in prompt_messages
        ),
        *completion_messages,
    ]


def _parse_history(record: Mapping[str, Any]) -> list[Message]:
    """Return the messages of Alpaca's `history`: earlier pairs of question and answer."""
    history = _parse_json(record.get("history"), "history")
    if history in (None, "", []):
        return []
    if not isinstance(history, list):
        raise BadRow(
            f"history is {_shorten(history)}, but must be a list of [question, answer] pairs"
        )
    messages = []
    for pair in history:
        is_pair = (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(part, str) for part in pair)
        )
        if not is_pair or not all(part.strip() for part in pair):
            raise BadRow(
                f"history has {_shorten(pair)}, but must be a list of [question, answer] pairs of "
                "texts"
            )
        _check_encodable("history", "".join(pair))
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def _add_system_message(
    messages: list[Message], record: Mapping[str, Any], data: DataSpec
) -> list[Message]:
    """Return the messages with the row's system column, or `data.system_prompt`, in front.

    Raises BadRow if a column contradicts the system message of the conversation.
    """
    columns = {
        key: _get_text(record, key)
        for key in _SYSTEM_COLUMNS
        if key not in (data.prompt_column, data.completion_column)
        and record.get(key) not in (None, "")
    }
    existing = next(
        (message.content for message in messages if message.role in ("system", "developer")), None
    )
    texts = list(columns.values()) + ([existing] if existing is not None else [])
    if len({text.strip() for text in texts}) > 1:
        raise BadRow(
            f"{' and '.join(columns)} and the system message contradict each other: keep one of "
            "them"
        )
    if existing is not None:
        return messages
    if texts:
        return [Message("system", texts[0]), *messages]
    return [Message("system", data.system_prompt), *messages] if data.system_prompt else messages


def _parse_messages(
    value: Any, column: str, unused: Counter[str], *, ends_with_answer: bool = True
) -> list[Message]:
    """Return the messages of a list.

    Args:
        value: The list, or the same as JSON text.
        column: Name of the column, for messages.
        unused: Counter to which unknown keys of messages are added.
        ends_with_answer: The last message must be the assistant's, as the answer to learn.

    Raises:
        BadRow: If it is not a list of messages, or an answer that is learnt is empty.
    """
    if isinstance(value, str):  # in CSV and some Parquet files
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"{column} must be a list of {{role, content}}") from None
    if not isinstance(value, list) or not value:
        raise BadRow(f"{column} must be a list of {{role, content}}")
    messages = [_parse_message(item, number, unused) for number, item in enumerate(value, start=1)]
    if ends_with_answer and messages[-1].role != "assistant":
        raise BadRow(
            f"the last of {column} must be a non-empty message of the assistant: it is the answer "
            "to learn"
        )
    for number, message in enumerate(messages, start=1):
        is_empty = not message.content.strip() and not message.tool_calls
        if message.role == "assistant" and message.learn and is_empty:
            is_last = number == len(messages)
            problem = (
                f"the last of {column} must be a non-empty message of the assistant: it is the "
                "answer to learn"
            )
            raise BadRow(
                problem
                if is_last
                else (
                    f"message {number} is an empty message of the assistant; give it weight 0 or "
                    "some text"
                )
            )
    return messages


def _parse_message(value: Any, number: int, unused: Counter[str]) -> Message:
    plain = _parse_plain_message(value)
    if plain is not None:
        return plain
    if not isinstance(value, Mapping):
        raise BadRow(f"message {number} is {_shorten(value)}, but must be {{role, content}}")
    # In Parquet files and Arrow tables, every message has the keys of all others; those that were
    # not set are null.
    record = {key: entry for key, entry in value.items() if entry is not None}
    role, content, used = _parse_role(record, number, list(value))
    for key in _UNSUPPORTED_IN_MESSAGE:
        if record.get(key) not in (None, "", [], {}):
            raise BadRow(f"{key} of message {number} is not supported: remove it, or the row")
    text = _parse_content(content, number)
    calls = _parse_tool_calls(record.get("tool_calls"), number)
    # LLaMA-Factory writes a call as the text of a message with its own role.
    if record.get("from") in _CALLING_ROLES:
        if calls:
            raise BadRow(f"message {number} has both a function call and tool_calls: keep one")
        text, calls = "", _parse_sharegpt_call(text, number)
    unused.update(f"message key {key!r}" for key in record if key not in used)
    reasoning = _parse_reasoning(record, role, number)
    # Templates split a thinking block off the content themselves, and would then have two.
    if reasoning and THINKING[1] in text:
        raise BadRow(
            f"message {number} has reasoning both in a field and as {THINKING[0]} in its content: "
            "keep one"
        )
    learn = _parse_training_flag(record, role, number, unused)
    if calls and role != "assistant":
        raise BadRow(
            f"message {number} has tool_calls, but its role is {role}: only an assistant calls "
            "tools"
        )
    name, call_id = _parse_tool_reference(record, role, number)
    return Message(role, text, reasoning, calls, name, call_id, learn)


def _parse_role(record: dict[str, Any], number: int, keys: list[Any]) -> tuple[str, Any, set[str]]:
    """Return the role of a message, its raw content, and the keys that are read.

    Args:
        record: The message without its empty values.
        number: Number of the message in its row, from 1.
        keys: All keys of the message, for the error message.

    Raises:
        BadRow: There is no role, or an unknown one.
    """
    used = {*_REASONING_KEYS, *_FLAG_KEYS, "weight", "tool_calls"}
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
            raise BadRow(
                f"from is {record['from']!r}, but must be one of {', '.join(_SHAREGPT_ROLES)}"
            )
        content = record.get("value")
    else:
        raise BadRow(
            f"message {number} has neither role nor from (it has: {', '.join(map(str, keys[:8]))})"
        )
    if role == "tool":
        used |= {"name", "tool_call_id"}
    return role, content, used


def _parse_tool_reference(record: dict[str, Any], role: str, number: int) -> tuple[str, str]:
    """Return the tool's name and the id of its call; empty for other roles. Raises BadRow."""
    name, call_id = record.get("name", ""), record.get("tool_call_id", "")
    if not isinstance(name, str) or not isinstance(call_id, str):
        raise BadRow(f"name and tool_call_id of message {number} must be texts")
    _check_encodable("name", f"{name}{call_id}")
    return (name, call_id) if role == "tool" else ("", "")


def _parse_plain_message(value: Any) -> Message | None:
    """Return a message that has only a role and a text; None for any other.

    Nearly all messages are of this kind, so large files need this path: it skips the checks
    of all other keys. It must accept nothing that `_parse_message` refuses.
    """
    if not isinstance(value, dict) or len(value) != 2:
        return None
    role, content = value.get("role"), value.get("content")
    if role is None and isinstance(value.get("from"), str) and value["from"] not in _CALLING_ROLES:
        role, content = _SHAREGPT_ROLES.get(value["from"]), value.get("value")
    if role not in ROLES or not isinstance(content, str):
        return None
    _check_encodable("content", content)
    return Message(role, content)


def _parse_content(value: Any, number: int) -> str:
    """Return the text of a message's content: a text, or a list of text parts.

    Raises BadRow for parts of any other type.
    """
    if isinstance(value, list):
        parts = []
        for part in value:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                description = (
                    f"a part of type {kind!r}" if kind not in (None, "text") else _shorten(part)
                )
                raise BadRow(
                    f"content of message {number} has {description}, but only {{type: text, text}} "
                    "can be learnt"
                )
            parts.append(part["text"])
        value = "".join(parts)
    if not isinstance(value, str):
        raise BadRow(
            f"each of messages must be {{role, content}} with a text as content (message {number})"
        )
    _check_encodable("content", value)
    return value


def _parse_reasoning(record: Mapping[str, Any], role: str, number: int) -> str:
    texts = {key: record[key] for key in _REASONING_KEYS if str(record.get(key) or "").strip()}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise BadRow(f"{key} of message {number} is {_shorten(text)}, but must be a text")
        if role != "assistant":
            raise BadRow(
                f"message {number} has {key}, but only an assistant's message may have reasoning"
            )
        _check_encodable(key, text)
    if len(set(texts.values())) > 1:
        raise BadRow(f"message {number} has {' and '.join(texts)}, with different texts: keep one")
    return next(iter(texts.values()), "")


def _parse_training_flag(
    record: Mapping[str, Any], role: str, number: int, unused: Counter[str]
) -> bool:
    """Return whether a message is trained on, from `weight`, `train`, `training` and `loss`.

    A message without any of them is. Of a message that is not the assistant's, a flag of
    true is only counted in `unused`: it is never trained on.

    Raises:
        BadRow: If a weight is neither 0 nor 1, or two flags contradict each other.
    """
    flags = []
    if "weight" in record:
        weight = record["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
            raise BadRow(f"weight of message {number} is {_shorten(weight)}, but must be 0 or 1")
        flags.append(bool(weight))
    for key in _FLAG_KEYS:
        if key in record:
            if not isinstance(record[key], bool):
                raise BadRow(
                    f"{key} of message {number} is {_shorten(record[key])}, but must be true or "
                    "false"
                )
            flags.append(record[key])
    if len(set(flags)) > 1:
        raise BadRow(
            f"message {number} is marked both as learnt and as not learnt (weight, train): keep one"
        )
    if flags and flags[0] and role != "assistant":
        unused[f"weight 1 of a {role} message, which is never learnt"] += 1
    return flags[0] if flags else True


def _parse_tools(value: Any) -> str:
    """Return the tools of a row as JSON text.

    They are a list of function descriptions, or the same as JSON text.
    """
    value = _parse_json(value, "tools")
    if value in (None, "", []):
        return ""
    if not isinstance(value, list) or not all(_is_tool(tool) for tool in value):
        raise BadRow(
            f"tools is {_shorten(value)}, but must be a list of functions, each with a name"
        )
    text = json.dumps(value, ensure_ascii=False)
    _check_encodable("tools", text)
    return text


def _is_tool(tool: Any) -> bool:
    if not isinstance(tool, Mapping):
        return False
    function = tool.get("function", tool)
    return (
        isinstance(function, Mapping)
        and isinstance(function.get("name"), str)
        and bool(function["name"])
    )


def _parse_tool_calls(value: Any, number: int) -> str:
    """Return an assistant's calls as JSON text, in OpenAI's form with arguments as objects.

    Args:
        value: A list of calls, or the same as JSON text. Arguments may be objects, or JSON
            text as OpenAI writes them.
        number: Number of the message (from 1), for messages.

    Raises:
        BadRow: If a call has no function, unknown keys or arguments that are not an object.
    """
    value = _parse_json(value, f"tool_calls of message {number}")
    if value in (None, "", []):
        return ""
    if not isinstance(value, list):
        raise BadRow(f"tool_calls of message {number} is {_shorten(value)}, but must be a list")
    text = json.dumps([_parse_call(call, number) for call in value], ensure_ascii=False)
    _check_encodable(f"tool_calls of message {number}", text)
    return text


_CALL_KEYS = frozenset({"id", "type", "function", "index"})
_FUNCTION_KEYS = frozenset({"name", "arguments", "parameters", "input"})
"""Keys of a called function, with the names that Llama and Anthropic use for its arguments."""


def _parse_call(value: Any, number: int) -> dict[str, Any]:
    description = f"a tool call of message {number}"
    # Some data sets write the function's name and arguments without the `function` block around
    # them.
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if (
        not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
        or not function["name"]
    ):
        raise BadRow(
            f"tool_calls of message {number} has {_shorten(value)}, but each must name a function"
        )
    allowed = _CALL_KEYS if function is not value else _CALL_KEYS | _FUNCTION_KEYS
    unknown_keys = [key for key in value if key not in allowed]
    unknown_keys += [key for key in function if function is not value and key not in _FUNCTION_KEYS]
    # An unknown key could change which function is called, and no template would render it.
    if unknown_keys:
        raise BadRow(
            f"{description} has {unknown_keys[0]!r}, which is not supported: it may have id, type, "
            "name and arguments"
        )
    if value.get("type") not in (None, "function"):
        raise BadRow(f"type of {description} is {_shorten(value['type'])}, but must be function")
    keys = [key for key in ("arguments", "parameters", "input") if function.get(key) is not None]
    if len(keys) > 1:
        raise BadRow(f"{description} has both {keys[0]} and {keys[1]}: keep one")
    arguments = _parse_json(function[keys[0]], f"arguments of {description}") if keys else {}
    arguments = (
        {} if arguments == "" else arguments
    )  # OpenAI writes an empty text for a call without arguments
    if not isinstance(arguments, Mapping):
        raise BadRow(f"arguments of {description} is {_shorten(arguments)}, but must be an object")
    call: dict[str, Any] = {"type": "function"}
    call_id = value.get("id")
    if call_id is not None and not isinstance(call_id, str):
        raise BadRow(f"id of {description} is {_shorten(call_id)}, but must be a text")
    if call_id:
        call["id"] = call_id
    call["function"] = {"name": function["name"], "arguments": dict(arguments)}
    return call


def _parse_sharegpt_call(text: str, number: int) -> str:
    """Return the tool calls of a LLaMA-Factory `function_call` message.

    The message is one call, or a list of calls, as JSON.
    """
    value = _parse_json(text, f"the function call of message {number}")
    return _parse_tool_calls(value if isinstance(value, list) else [value], number)


def _parse_json(value: Any, description: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{description} is {_shorten(value)}, which is not JSON") from None


def _get_text(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise BadRow(_describe_missing_column(record, key))
    text = record[key]
    if not isinstance(text, str):
        raise BadRow(f"{key} is {_shorten(text)}, but must be a text")
    if not text.strip():
        raise BadRow(f"{key} is empty")
    _check_encodable(key, text)
    return text


def _describe_missing_column(record: Iterable[str], key: str) -> str:
    return f"no column {key!r} (the row has: {', '.join(map(str, list(record)[:8]))})"


def _check_encodable(key: str, text: str) -> None:
    """Raise BadRow if a text contains a lone surrogate.

    Half of a surrogate pair, written as an escape in JSON, is read as such a character. It
    cannot be encoded as UTF-8, and so neither tokenized nor stored.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(
            f"{key} contains half a character (a lone surrogate): the text was cut or decoded "
            "wrongly"
        ) from None


def _shorten(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)[:40]
