"""Every shape of a row that people post: read as what it is, or refused with its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.row_formats import Row
from lorafleet.jobs.data.rows import Rows, load_rows
from lorafleet.jobs.errors import DataError, JobFileError
from lorafleet.jobs.loading.job_file import load_text
from tests.conftest import write_rows

USER, ANSWER = Message("user", "u"), Message("assistant", "a")
CALL = '[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]'


def load(path: Path, **data: Any) -> Rows:
    settings = json.dumps(
        {"train_file": str(path), "validation_file": str(path), "test_file": str(path), **data}
    )
    text = (
        "name: shapes\ntask: generation\nmodel: {model_name_or_path: org/model}\ndata: "
        f"{settings}\n"
    )
    return load_rows(load_text(text, path.with_name("job.yaml")).job)


def read(record: dict[str, Any], tmp_path: Path, **data: Any) -> Row:
    return load(write_rows(tmp_path / "rows.jsonl", [record]), **data).train[0]


def turns(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        # Alpaca
        (
            {"instruction": "u", "input": "", "output": "a", "system": "s"},
            (Message("system", "s"), USER, ANSWER),
        ),
        (
            {"instruction": "u", "input": "x", "output": "a", "history": [["h", "b"], ["i", "c"]]},
            (
                Message("user", "h"),
                Message("assistant", "b"),
                Message("user", "i"),
                Message("assistant", "c"),
                Message("user", "u\n\nx"),
                ANSWER,
            ),
        ),
        ({"instruction": "u", "output": "a", "history": [], "system": ""}, (USER, ANSWER)),
        ({"instruction": "u", "output": "a", "history": "[]", "messages": None}, (USER, ANSWER)),
        (turns(said("user", "u"), said("assistant", "a", reasoning_content=" ")), (USER, ANSWER)),
        (
            {"prompt": "u", "completion": "a", "system_prompt": "s"},
            (Message("system", "s"), USER, ANSWER),
        ),
        # OpenAI and Hugging Face
        (turns(said("user", "u"), said("assistant", "a", weight=1)), (USER, ANSWER)),
        (turns(said("user", "u"), said("assistant", "a", weight=None)), (USER, ANSWER)),
        (
            turns(
                said("user", "h"),
                said("assistant", "b", weight=0),
                said("user", "u"),
                said("assistant", "a"),
            ),
            (Message("user", "h"), Message("assistant", "b", learn=False), USER, ANSWER),
        ),
        (
            turns(
                said("user", "h"),
                said("assistant", "b", train=False),
                said("user", "u"),
                said("assistant", "a"),
            ),
            (Message("user", "h"), Message("assistant", "b", learn=False), USER, ANSWER),
        ),
        (
            turns(
                said("user", [{"type": "text", "text": "u"}]),
                said("assistant", [{"type": "text", "text": "a"}]),
            ),
            (USER, ANSWER),
        ),
        (
            turns(
                said("user", [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]),
                said("assistant", "a"),
            ),
            (Message("user", "xy"), ANSWER),
        ),
        (
            turns(said("user", "u"), said("assistant", "a", reasoning_content="r")),
            (USER, Message("assistant", "a", reasoning="r")),
        ),
        (
            turns(said("user", "u"), said("assistant", "a", thinking="r")),
            (USER, Message("assistant", "a", reasoning="r")),
        ),
        (
            turns(said("user", "u"), said("assistant", "a"), system="s"),
            (Message("system", "s"), USER, ANSWER),
        ),
        (
            turns(said("developer", "d"), said("user", "u"), said("assistant", "a")),
            (Message("developer", "d"), USER, ANSWER),
        ),
        (
            turns(
                said("user", "u"),
                said(
                    "assistant",
                    None,
                    tool_calls=[{"function": {"name": "f", "arguments": '{"x": 1}'}}],
                ),
                said("tool", "1", tool_call_id="c1", name="f"),
                said("assistant", "a"),
            ),
            (
                USER,
                Message("assistant", "", tool_calls=CALL),
                Message("tool", "1", name="f", tool_call_id="c1"),
                ANSWER,
            ),
        ),
        # ShareGPT, and `conversations` with roles
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            (USER, ANSWER),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "u"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            (Message("system", "s"), USER, ANSWER),
        ),
        (
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "u"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "a"},
                ],
            },
            (
                Message("system", "s"),
                USER,
                Message("assistant", "", tool_calls=CALL),
                Message("tool", "1"),
                ANSWER,
            ),
        ),
        ({"conversations": [said("user", "u"), said("assistant", "a")]}, (USER, ANSWER)),
        # cells of a CSV file
        (
            {
                "prompt": json.dumps([said("user", "u")]),
                "completion": json.dumps([said("assistant", "a")]),
            },
            (USER, ANSWER),
        ),
        (
            {"conversations": json.dumps([said("user", "u"), said("assistant", "a")], indent=1)},
            (USER, ANSWER),
        ),
        # Llama's word for the arguments of a call
        (
            turns(
                said("user", "u"),
                said("assistant", "", tool_calls=[{"name": "f", "parameters": {"x": 1}}]),
            ),
            (USER, Message("assistant", "", tool_calls=CALL)),
        ),
        # TRL's conversational prompt and completion: the loss is on the completion
        ({"prompt": [said("user", "u")], "completion": [said("assistant", "a")]}, (USER, ANSWER)),
        (
            {
                "prompt": [said("user", "h"), said("assistant", "b"), said("user", "u")],
                "completion": [said("assistant", "a")],
            },
            (
                Message("user", "h"),
                Message("assistant", "b", learn=False),
                Message("user", "u", learn=False),
                ANSWER,
            ),
        ),
    ],
)
def test_a_row_is_read_as_what_it_is(
    record: dict[str, Any], messages: tuple[Message, ...], tmp_path: Path
) -> None:
    found = read(record, tmp_path).messages
    learnt = [one.learn for one in found if one.role == "assistant"]
    assert learnt == [one.learn for one in messages if one.role == "assistant"]
    assert [one.to_record() | {"learn": True} for one in found] == [
        one.to_record() | {"learn": True} for one in messages
    ]


def test_a_conversation_is_stored_and_read_again(tmp_path: Path) -> None:
    record = turns(
        said("user", "u"),
        said("assistant", "", tool_calls=json.loads(CALL), reasoning_content="r", weight=0),
        said("tool", "1", name="f", tool_call_id="c"),
        said("assistant", "a"),
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    row = read(record, tmp_path)
    assert Row.from_record(json.loads(json.dumps(row.to_record()))) == row
    assert row.messages[1].calls[0]["function"]["arguments"] == {"x": 1}
    assert json.loads(row.tools)[0]["function"]["name"] == "f"
    as_text = {**record, "tools": json.dumps(record["tools"])}
    assert read(as_text, tmp_path) == row


def test_the_column_of_messages_can_be_named(tmp_path: Path) -> None:
    record = {
        "chat": [said("user", "u"), said("assistant", "a")],
        "messages": [said("user", "other")],
        "text": "t",
    }
    assert read(record, tmp_path, messages_column="chat").messages == (USER, ANSWER)
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: no column 'dialog' \(the row has: chat, messages, text\)"
    ):
        read(record, tmp_path, messages_column="dialog")


def test_a_system_prompt_goes_to_rows_without_one(tmp_path: Path) -> None:
    rows = [
        turns(said("user", "u"), said("assistant", "a")),
        turns(said("system", "own"), said("user", "u"), said("assistant", "a")),
        {**turns(said("user", "u"), said("assistant", "a")), "system": "column"},
    ]
    found = load(write_rows(tmp_path / "rows.jsonl", rows), system_prompt="default").train
    assert [row.messages[0].content for row in found] == ["default", "own", "column"]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (
            turns(said("user", "u"), said("assistant", "a", weight=2)),
            "weight of message 2 is 2, but must be 0 or 1",
        ),
        (
            turns(said("user", "u"), said("assistant", "a", weight=0.5)),
            "weight of message 2 is 0.5, but must be",
        ),
        (
            turns(said("user", "u"), said("assistant", "a", weight=True)),
            "weight of message 2 is true",
        ),
        (
            turns(said("user", "u"), said("assistant", "a", train="no")),
            'train of message 2 is "no", but must be true',
        ),
        (
            turns(said("user", "u"), said("assistant", "a", train=True, weight=0)),
            "is marked both as learnt",
        ),
        (
            turns(said("user", [{"type": "image", "url": "x"}]), said("assistant", "a")),
            "a part of type 'image'",
        ),
        (
            turns(said("user", [{"type": "image_url"}]), said("assistant", "a")),
            "only {type: text, text} can be learnt",
        ),
        (
            turns(said("user", "u"), said("assistant", "a", reasoning_content=3)),
            "reasoning_content of message 2 is 3",
        ),
        (
            turns(said("user", "u", reasoning_content="r"), said("assistant", "a")),
            "only an assistant's message may have",
        ),
        (
            turns(said("user", "u"), said("assistant", "a", reasoning="r", thinking="t")),
            "with different texts: keep one",
        ),
        (
            turns(said("user", "u"), said("assistant", "a", tool_calls="x")),
            "tool_calls of message 2 is",
        ),
        (
            turns(said("user", "u"), said("assistant", "", tool_calls=[{"id": "1"}])),
            "each must name a function",
        ),
        (
            turns(
                said("user", "u"),
                said("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "x"}}]),
            ),
            "arguments of a tool call of message 2 is",
        ),
        (
            turns(said("user", "u", tool_calls=[{"name": "f"}]), said("assistant", "a")),
            "only an assistant calls tools",
        ),
        (
            turns(
                said("user", "u"),
                said("assistant", "", tool_calls=[{"name": "f", "args": {"x": 1}}]),
            ),
            "a tool call of message 2 has 'args', which is not supported",
        ),
        (
            turns(
                said("user", "u"),
                said("assistant", "", tool_calls=[{"type": "custom", "function": {"name": "f"}}]),
            ),
            "type of a tool call of message 2",
        ),
        (
            turns(
                said("user", "u"),
                said("assistant", "", tool_calls=[{"id": 5, "function": {"name": "f"}}]),
            ),
            "id of a tool call of message 2 is 5",
        ),
        (
            turns(
                said("user", "u"),
                said("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": "\ud800"}}]),
            ),
            "half a character",
        ),
        (
            {
                "prompt": [said("user", "u")],
                "completion": [said("assistant", "a")],
                "history": [["a", "b"]],
            },
            "history",
        ),
        ({"instruction": "u", "input": 0, "output": "a"}, "input is 0, but must be a text"),
        (turns(said("user", "u"), said("assistant", "a"), tools=["f"]), "tools is"),
        (turns(said("user", "u"), said("assistant", "a"), tools="[f"), "which is not JSON"),
        (turns(said("user", "u"), said("assistant", "a"), images=["x.png"]), "images is"),
        (turns(said("user", "u"), said("assistant", "a"), documents=[{}]), "documents is"),
        (
            turns(said("user", "u"), said("assistant", "a"), train=False),
            "train is false, so the row has nothing to",
        ),
        (
            turns(said("user", "u"), said("assistant", "a"), enable_thinking=False),
            "set data.chat_template_kwargs for",
        ),
        (
            turns(said("user", "u"), said("assistant", "a"), enable_thinking=True),
            "set data.chat_template_kwargs for",
        ),
        (
            turns(said("user", "u"), said("assistant", "a"), history=[["x", "y"]]),
            "the row has history as well as messages",
        ),
        (
            turns(said("user", "u"), said("assistant", "a", prefix=True)),
            "prefix of message 2 is not supported",
        ),
        (
            turns(said("user", "u"), said("assistant", "a"), functions=[{"name": "f"}]),
            "use tools instead",
        ),
        (
            turns(said("user", "u"), said("assistant", "a", function_call={"name": "f"})),
            "function_call of message 2",
        ),
        (
            turns(said("system", "s"), said("user", "u"), said("assistant", "a"), system="t"),
            "contradict each other",
        ),
        (
            turns(said("user", "u"), said("assistant", "")),
            "must be a non-empty message of the assistant",
        ),
        (
            turns(
                said("user", "u"), said("assistant", ""), said("user", "v"), said("assistant", "a")
            ),
            "message 2 is",
        ),
        (
            turns(said("user", "u"), said("assistant", "a"), said("user", "v")),
            "the last of messages must be",
        ),
        (turns(said("system", "s"), said("assistant", "a")), "must have a message before"),
        (
            turns(said("narrator", "u"), said("assistant", "a")),
            "role is 'narrator', but must be one of",
        ),
        (
            {"conversations": [{"from": "alien", "value": "u"}, {"from": "gpt", "value": "a"}]},
            "from is 'alien'",
        ),
        (
            {"conversations": [{"speaker": "u"}, {"from": "gpt", "value": "a"}]},
            "message 1 has neither role nor from",
        ),
        (
            {"instruction": "u", "output": "a", "history": 3},
            "must be a list of [question, answer] pairs",
        ),
        ({"instruction": "u", "output": "a", "history": "x"}, 'history is "x", which is not JSON'),
        (
            turns(said("user", "u"), said("assistant", "<think>t</think>a", reasoning_content="r")),
            "has reasoning both in a field and as <think> in its content",
        ),
        ({"messages": "[" * 100_000}, "messages must be a list"),
        (
            {"instruction": "u", "output": "a", "history": [["x"]]},
            "must be a list of [question, answer] pairs",
        ),
        ({"instruction": "u", "output": "a", "system": 3}, "system is 3, but must be a text"),
        (
            {"prompt": [said("user", "u")], "completion": "a"},
            "must be a list of messages like the other column",
        ),
        ({"prompt": "u", "completion": [said("assistant", "a")]}, "must be a list of messages"),
    ],
)
def test_what_cannot_be_used_is_named(
    record: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [record])
    with pytest.raises(DataError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:1: ")
    assert sentence in str(error.value)


def test_keys_that_are_not_known_are_named_once(tmp_path: Path) -> None:
    rows = [
        {
            **turns(said("user", "u", lang="en"), said("assistant", "a", rating=5)),
            "id": number,
            "source": "web",
        }
        for number in range(3)
    ]
    found = load(write_rows(tmp_path / "rows.jsonl", rows))
    notes = [note for note in found.warnings if note.startswith("not used: ")]
    assert notes == [
        "not used: column 'id' (9 times), column 'source' (9 times), message key 'lang' (9 times), "
        "message key 'rating' (9 times)"
    ]
    weighed = [turns(said("user", "u", weight=1), said("assistant", "a"))]
    notes = [
        note
        for note in load(write_rows(tmp_path / "rows.jsonl", weighed)).warnings
        if "not used" in note
    ]
    assert notes == ["not used: weight 1 of a user message, which is never learnt (3 times)"]


def test_parquet_fills_structs_up_with_nulls(tmp_path: Path) -> None:
    """Its calls have the arguments of all others: what is null there was never said."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        turns(
            said("user", "u"),
            said("assistant", "", tool_calls=json.loads(CALL)),
            said("tool", "1"),
            said("assistant", "a"),
        ),
        turns(
            said("user", "v"),
            said(
                "assistant",
                "",
                tool_calls=[
                    {"type": "function", "function": {"name": "g", "arguments": {"y": "2"}}}
                ],
            ),
            said("tool", "2"),
            said("assistant", "b"),
        ),
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    first, second = load(path).train
    assert first.messages[1].calls[0]["function"]["arguments"] == {"x": 1}
    assert second.messages[1].calls[0]["function"]["arguments"] == {"y": "2"}


def test_a_question_with_two_answers_stays_on_one_side(tmp_path: Path) -> None:
    rows = [
        turns(said("user", f"u{number % 6}"), said("assistant", f"a{number}"))
        for number in range(24)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    text = (
        "name: x\ntask: generation\nmodel: {model_name_or_path: o/m}\ndata: {train_file: "
        f'"{path}"}}\n'
    )
    found = load_rows(load_text(text, tmp_path / "job.yaml").job)
    train = {row.question for row in found.train}
    assert not train & {row.question for row in found.validation}


def test_all_tokens_of_the_last_turn_alone_is_a_contradiction(tmp_path: Path) -> None:
    record = turns(said("user", "u"), said("assistant", "a"))
    with pytest.raises(JobFileError, match="train_on_turns is last, but must be all with"):
        read(record, tmp_path, assistant_only_loss=False, train_on_turns="last")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "u", "completion": "a"}\n{"prompt": "u", "completion": "a", "prompt": "v"}\n'
    )
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: the key 'prompt' occurs twice in one object"
    ):
        load(path)
    whole = tmp_path / "rows.json"
    whole.write_text('[{"messages": [{"role": "user", "content": "u", "content": "v"}]}]')
    with pytest.raises(DataError, match="the key 'content' occurs twice in one object"):
        load(whole)
