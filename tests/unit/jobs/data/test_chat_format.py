"""Conversations as chat templates say: what is learnt, what ends a turn, and what metrics compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.jobs.data.answer_frame import AnswerFrame
from lorafleet.jobs.data.chat_format import ChatFormat
from lorafleet.jobs.data.chat_template import TemplateRefusal
from lorafleet.jobs.data.conversation import Message
from lorafleet.jobs.data.encoding import RowEncoder
from lorafleet.jobs.data.row_formats import Row
from tests.unit.jobs.data.chat_families import (
    BY_NAME,
    CHATML,
    FAMILIES,
    Family,
    build_tokenizer,
    conversation,
    learnt_spans,
    trl_template,
    trl_templates,
)

QUESTION, ANSWER = "what is the capital of country 9?", "it is city 9."


def encoder_of(family: Family, **options: Any) -> RowEncoder:
    return RowEncoder(family.format(), options.pop("max_length", 4000), **options)


def spans_of(encoder: RowEncoder, row: Row) -> list[str]:
    """The texts that are learnt, in their order."""
    decode = encoder.format.tokenizer.decode
    examples = encoder.encode(row).examples
    return [decode(span) for one in examples for span in learnt_spans(one.ids, one.learnt)]


def predicted(encoder: RowEncoder, prompt: list[int], written: list[int]) -> str:
    """What metrics make of tokens that a model writes after a prompt."""
    from lorafleet.evaluation.inference.generate import decode_answer

    chat = encoder.format
    return decode_answer(written, chat.ends, chat.tokenizer, chat.frame, prompt)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_turn_is_learnt_through_its_end(family: Family) -> None:
    encoder = encoder_of(family)
    row = Row(messages=conversation(QUESTION, ANSWER))
    (example,) = encoder.encode(row).examples
    (span,) = learnt_spans(example.ids, example.learnt)
    tokenizer = encoder.format.tokenizer
    assert tokenizer.decode(span) == f"{family.before}{ANSWER}{family.after}"
    assert tokenizer.convert_ids_to_tokens(span[-1]) == family.end
    assert span[-1] in encoder.format.ends
    # The tokens before it are those that generation is given.
    assert example.ids[: example.answer_start] == encoder.encode_prompt(row, 4000)
    prompt = tokenizer.decode(example.ids[: example.answer_start])
    assert QUESTION in prompt
    assert ANSWER not in prompt


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_model_that_writes_what_is_learnt_answers_rightly(family: Family) -> None:
    encoder = encoder_of(family)
    row = Row(messages=conversation(QUESTION, ANSWER))
    encoded = encoder.encode(row)
    (example,) = encoded.examples
    (span,) = learnt_spans(example.ids, example.learnt)
    assert encoded.reference == ANSWER
    prompt = example.ids[: example.answer_start]
    beyond = encoder.format.tokenizer("and more", add_special_tokens=False)["input_ids"]
    assert predicted(encoder, prompt, [*span, *beyond]) == ANSWER


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_turn_of_the_assistant_is_learnt(family: Family) -> None:
    row = Row(messages=conversation("and 1?", "city 1", "and 2?", "city 2", "and 3?", "city 3"))
    encoder = encoder_of(family)
    whole = [f"{family.before}city {number}{family.after}" for number in (1, 2, 3)]
    assert spans_of(encoder, row) == whole
    assert len(encoder.encode(row).examples) == (1 if family.together else 3)
    assert encoder.encode(row).reference == "city 3"
    last = encoder_of(family, train_on_turns="last")
    assert spans_of(last, row) == whole[-1:]
    assert last.encode(row).examples[-1].ids[
        : last.encode(row).examples[-1].answer_start
    ] == last.encode_prompt(row, 4000)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.system], ids=str)
def test_system_messages_are_given_and_not_learnt(family: Family) -> None:
    encoder = encoder_of(family)
    row = Row(messages=conversation(QUESTION, ANSWER, system="be kind"))
    (example,) = encoder.encode(row).examples
    tokenizer = encoder.format.tokenizer
    assert "be kind" in tokenizer.decode(example.ids[: example.answer_start])
    assert spans_of(encoder, row) == [f"{family.before}{ANSWER}{family.after}"]
    assert not encoder.format.counts["system_dropped"]


_WORD = st.sampled_from(
    ["city", "kind", "weather", "it is 9.", "sunny?", "naïve", "雨", "🌧 rain", "a\nb", "x  y"]
)
_TEXT = st.lists(_WORD, min_size=1, max_size=4).map(" ".join)
_TURNS = st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=4)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@given(turns=_TURNS, system=st.sampled_from(["", "be short"]))
def test_nothing_but_the_assistant_is_learnt(
    family: Family, turns: list[tuple[str, str]], system: str
) -> None:
    """The decoded spans are the assistant's turns with the family's frame, whatever is said."""
    asked = [f"Q{place} {question}" for place, (question, _) in enumerate(turns)]
    texts = [
        text
        for question, (_, answer) in zip(asked, turns, strict=True)
        for text in (question, answer)
    ]
    row = Row(messages=conversation(*texts, system=system if family.system else ""))
    encoder = _CACHED.setdefault(family.name, encoder_of(family))
    assert spans_of(encoder, row) == [
        f"{family.before}{answer}{family.after}" for _, answer in turns
    ]
    encoded = encoder.encode(row)
    assert encoded.reference == turns[-1][1].strip()
    for example in encoded.examples:
        assert not example.learnt[0]
        spans = list(learnt_spans(example.ids, example.learnt))
        first = example.learnt.index(True)
        prompt = list(row.messages[:-1]) if family.together else None
        if prompt and len(spans) == 1:
            assert example.ids[:first] == encoder.format.encode_prompt(prompt)


_CACHED: dict[str, RowEncoder] = {}


# ---- reasoning and tools ----

_WEATHER = (
    '[{"type":"function","function":{"name":"weather","description":"Weather of a '
    'city.","parameters":{"type":"object","properties":{}}}}]'
)
_CALL = (
    '[{"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": '
    '{"city": "Paris"}}}]'
)


@pytest.mark.parametrize(
    ("name", "span"),
    [
        ("qwen3", "<think>\nI count.\n</think>\n\nit is 9.<|im_end|>"),
        ("qwen3.5", "I count.\n</think>\n\nit is 9.<|im_end|>"),
        ("glm4.5", "\n<think>I count.</think>\nit is 9.<|user|>"),
        ("deepseek-v3", "I count.\n</think>\n\nit is 9.<｜end▁of▁sentence｜>"),
        ("nemotron3", "I count.\n</think>\nit is 9.<|im_end|>"),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>I "
            "count.<|end|><|start|>assistant<|channel|>final<|message|>it is 9.<|return|>",
        ),
    ],
)
def test_reasoning_is_learnt_and_not_compared(name: str, span: str) -> None:
    encoder = encoder_of(BY_NAME[name])
    row = Row(
        messages=(
            Message("user", "how many?"),
            Message("assistant", "it is 9.", reasoning="I count."),
        )
    )
    assert spans_of(encoder, row) == [span]
    encoded = encoder.encode(row)
    (example,) = encoded.examples
    assert encoded.reference == "it is 9."
    (written,) = learnt_spans(example.ids, example.learnt)
    assert predicted(encoder, example.ids[: example.answer_start], written) == "it is 9."


@pytest.mark.parametrize("name", ["llama3.1", "qwen2.5", "qwen3-off", "no-template", "gemma3"])
def test_reasoning_that_cannot_be_rendered_is_refused(name: str) -> None:
    row = Row(
        messages=(
            Message("user", "how many?"),
            Message("assistant", "it is 9.", reasoning="I count."),
        )
    )
    with pytest.raises(TemplateRefusal, match="reasoning"):
        encoder_of(BY_NAME[name]).encode(row)


@pytest.mark.parametrize(
    ("name", "call", "end"),
    [
        (
            "qwen2.5",
            '<tool_call>\n{"name": "weather", "arguments": {"city": '
            '"Paris"}}\n</tool_call><|im_end|>',
            "<|im_end|>",
        ),
        (
            "llama3.1",
            '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
            "<|eot_id|>",
        ),
        (
            "gpt-oss",
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
            "<|call|>",
        ),
        (
            "glm4.5",
            "\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"
            "<|observation|>",
            "<|observation|>",
        ),
        (
            "deepseek-v3",
            "\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
            '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
            "<｜end▁of▁sentence｜>",
        ),
    ],
)
def test_calls_of_tools_are_learnt(name: str, call: str, end: str) -> None:
    messages = (
        Message("user", "weather in Paris?"),
        Message("assistant", "", tool_calls=_CALL),
        Message("tool", "sunny", name="weather", tool_call_id="abcdefghi"),
        Message("assistant", "It is sunny."),
    )
    encoder = encoder_of(BY_NAME[name])
    row = Row(
        messages=messages, tools="" if name == "deepseek-v3" else _WEATHER
    )  # it renders calls, and no tools
    spans = spans_of(encoder, row)
    assert spans[0] == call
    assert "It is sunny." in spans[1]
    assert "sunny" not in spans[0]
    assert encoder.encode(row).reference == "It is sunny."
    assert encoder.format.tokenizer.convert_tokens_to_ids(end) in encoder.format.ends


@pytest.mark.parametrize("name", ["chatml-base", "gemma3", "phi3", "no-template", "deepseek-v3"])
def test_tools_that_the_template_leaves_out_are_refused(name: str) -> None:
    row = Row(messages=conversation("weather?", "sunny"), tools=_WEATHER)
    with pytest.raises(TemplateRefusal, match="tools"):
        encoder_of(BY_NAME[name]).encode(row)
    if name == "deepseek-v3":
        return
    call = Row(messages=(Message("user", "weather?"), Message("assistant", "", tool_calls=_CALL)))
    with pytest.raises(TemplateRefusal, match="tool"):
        encoder_of(BY_NAME[name]).encode(call)


# ---- what is learnt, and what is left out ----


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "no-end-token", "mistral"])
def test_answers_with_weight_0_are_context(name: str) -> None:
    family = BY_NAME[name]
    first, second, third, fourth = conversation("and 1?", "city 1", "and 2?", "city 2")
    bad_first = Row(
        messages=(first, Message("assistant", second.content, learn=False), third, fourth)
    )
    encoder = encoder_of(family)
    assert spans_of(encoder, bad_first) == [f"{family.before}city 2{family.after}"]
    bad_last = Row(
        messages=(first, second, third, Message("assistant", fourth.content, learn=False))
    )
    assert spans_of(encoder, bad_last) == [f"{family.before}city 1{family.after}"]
    assert encoder.encode(bad_last).reference == bad_last.reference == "city 1"
    assert bad_last.prompt == "and 1?"
    nothing = Row(messages=(first, Message("assistant", "city 1", learn=False)))
    with pytest.raises(TemplateRefusal, match="there is nothing to learn in this conversation"):
        encoder.encode(nothing)


def test_everything_can_be_learnt() -> None:
    encoder = encoder_of(BY_NAME["chatml-base"], assistant_only_loss=False)
    first, second, third, fourth = conversation("and 1?", "city 1", "and 2?", "city 2", system="")
    text = (
        "<|im_start|>user\nand 1?<|im_end|>\n<|im_start|>assistant\ncity 1<|im_end|>\n"
        "<|im_start|>user\nand 2?<|im_end|>\n<|im_start|>assistant\ncity 2<|im_end|>"
    )
    assert spans_of(encoder, Row(messages=(first, second, third, fourth))) == [
        text.removeprefix("<|im_start|>")
    ]
    without = Row(messages=(first, Message("assistant", "city 1", learn=False), third, fourth))
    assert spans_of(encoder, without) == [
        "user\nand 1?<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nand 2?<|im_end|>\n<|im_start|>assistant\ncity 2<|im_end|>",
    ]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "gpt-oss", "no-template"])
def test_a_long_conversation_loses_its_oldest_turns(name: str) -> None:
    family = BY_NAME[name]
    turns = [
        text for number in range(6) for text in (f"and country {number}?", f"it is city {number}.")
    ]
    row = Row(messages=conversation(*turns, system="be kind"))
    whole = encoder_of(family).encode(row).examples[-1]
    short = encoder_of(family, max_length=len(whole.ids) - 1)
    examples = short.encode(row).examples
    assert all(len(example.ids) < len(whole.ids) for example in examples)
    decode = short.format.tokenizer.decode
    last = decode(examples[-1].ids)
    assert "be kind" in last
    assert "country 0" not in last
    assert "it is city 5." in last
    assert short.counts["shortened"] == 1
    assert not short.counts["cut"]
    answers = [f"it is city {number}." for number in range(6)]
    learnt = "".join(spans_of(short, row))
    assert all(answer in learnt for answer in answers[1:])
    # Generation drops the same turns where its room is the same.
    assert (
        short.encode_prompt(row, examples[-1].answer_start)
        == examples[-1].ids[: examples[-1].answer_start]
    )


def test_one_exchange_that_is_too_long_is_cut() -> None:
    encoder = encoder_of(BY_NAME["qwen2.5"], max_length=40)
    row = Row(messages=conversation("why? " * 100, "city 9", system="be kind"))
    (example,) = encoder.encode(row).examples
    assert len(example.ids) == 40
    assert encoder.counts == {"cut": 1}
    assert spans_of(encoder, row) == ["city 9<|im_end|>"]
    lost = Row(messages=conversation("why?", "city 9 " * 100))
    (example,) = encoder.encode(lost).examples
    assert (
        example.ids[-1] not in encoder.format.ends
    )  # an end that was cut off is not learnt elsewhere


# ---- templates that are odd ----


def test_a_base_models_chatml_needs_no_token_of_its_own() -> None:
    """`<|im_end|>` as plain text: the tokenizer's end token comes after it, and is what ends
    generation.
    """
    tokenizer = build_tokenizer("", "</s>")
    tokenizer.chat_template = CHATML
    encoder = RowEncoder(ChatFormat(tokenizer), 4000)
    row = Row(messages=conversation(QUESTION, ANSWER))
    assert spans_of(encoder, row) == [f"{ANSWER}<|im_end|></s>"]
    encoded = encoder.encode(row)
    assert encoded.reference == ANSWER
    (example,) = encoded.examples
    (written,) = learnt_spans(example.ids, example.learnt)
    assert predicted(encoder, example.ids[: example.answer_start], written) == ANSWER


def test_a_template_that_drops_the_system_message_is_counted() -> None:
    template = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
    )
    encoder = RowEncoder(ChatFormat(build_tokenizer(template, "<|im_end|>")), 4000)
    for row in (conversation("a", "b", system="be kind"), conversation("a", "b")):
        encoder.encode(Row(messages=row))
    assert encoder.format.counts == {"system_dropped": 1}


def test_a_prompt_that_changes_once_it_is_answered() -> None:
    """Here the last question has a header that it loses when an answer follows: the prompt of
    generation is kept.
    """
    template = CHATML.replace(
        "{{ m['content'] }}",
        "{% if loop.last and m['role'] == 'user' %}Now: {% endif %}{{ m['content'] }}",
    )
    encoder = RowEncoder(ChatFormat(build_tokenizer(template, "<|im_end|>")), 4000)
    row = Row(messages=conversation("and 1?", "city 1", "and 2?", "city 2"))
    assert spans_of(encoder, row) == ["city 1<|im_end|>", "city 2<|im_end|>"]
    examples = encoder.encode(row).examples
    texts = [encoder.format.tokenizer.decode(example.ids) for example in examples]
    assert ["Now: and 1?" in text for text in texts] == [True, False]
    assert "Now: and 2?" in texts[1]
    assert encoder.format.counts["prompt_differs"] == 2  # two times one row
    assert encoder.counts["split"] == 2


def test_a_template_without_the_answer_is_refused() -> None:
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(TemplateRefusal, match="does not render the assistant's messages"):
        RowEncoder(ChatFormat(build_tokenizer(template, "</s>")), 400).encode(
            Row(messages=conversation("a", "b"))
        )


def test_what_the_template_refuses_is_said() -> None:
    template = (
        "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' }}"
        + CHATML
    )
    encoder = RowEncoder(ChatFormat(build_tokenizer(template, "<|im_end|>")), 400)
    with pytest.raises(TemplateRefusal, match="refuses this row: System role not supported"):
        encoder.encode(Row(messages=conversation("a", "b", system="s")))


_MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% else "
    "%}{{ m['content'] }}{% endif %}<|im_end|>\n",
)


def test_markers_without_the_end_are_extended_to_it() -> None:
    encoder = RowEncoder(ChatFormat(build_tokenizer(_MARKED, "<|im_end|>")), 4000)
    row = Row(messages=conversation("and 1?", "city 1", "and 2?", "city 2"))
    assert spans_of(encoder, row) == ["city 1<|im_end|>", "city 2<|im_end|>"]


def test_markers_that_leave_out_a_beginning_are_kept_to() -> None:
    template = _MARKED.replace("{% generation %}", "Well: {% generation %}")
    encoder = RowEncoder(ChatFormat(build_tokenizer(template, "<|im_end|>")), 4000)
    assert spans_of(encoder, Row(messages=conversation("and 1?", "city 1"))) == [
        " city 1<|im_end|>"
    ]
    assert encoder.format.counts == {"markers_begin_late": 1}


def test_an_end_that_a_text_brings_is_not_doubled() -> None:
    encoder = encoder_of(BY_NAME["qwen2.5"])
    assert spans_of(encoder, Row(messages=conversation("and 1?", "city 1<|im_end|>"))) == [
        "city 1<|im_end|>"
    ]
    plain = encoder_of(BY_NAME["no-template"])
    assert spans_of(plain, Row(messages=conversation("and 1?", "city 1</s>"))) == ["city 1</s>"]
    tokenizer = plain.format.tokenizer
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text in ("<s>city 1</s>", "city 1", "<s>city 1", "city 1</s>", "<s>city 1</s>\n"):
        (example,) = plain.encode(Row(text=text)).examples
        assert example.ids.count(start) == example.ids.count(end) == 1
        assert tokenizer.decode(example.ids) == "<s>city 1</s>"
        assert example.learnt == [False, *[True] * (len(example.ids) - 1)]


# ---- every template that TRL ships, whatever it writes ----

_TWO_CALLS = (
    '[{"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": '
    '{"city": "Paris"}}}, {"type": "function", "id": "abcdefghj", "function": {"name": "weather", '
    '"arguments": {"city": "Rome"}}}]'
)
_ROWS = {
    "turns": Row(messages=conversation("USER1 q?", "a1", "USER2 q?", "a2", system="SYSTEM s")),
    "repeated": Row(messages=conversation("USER1 q?", "a1", "USER1 q?", "a2", "USER1 q?", "a1")),
    "echo": Row(messages=conversation("USER1 q?", "it is", "USER2 q?", "end")),
    "reasoning": Row(
        messages=(
            *conversation("USER1 q?", "a1", "USER2 q?"),
            Message("assistant", "a2", reasoning="I count."),
        )
    ),
    "inline": Row(
        messages=conversation("USER1 q?", "a1", "USER2 q?", "<think>\nI count.\n</think>\n\na2")
    ),
    "tools": Row(
        messages=(
            Message("user", "USER1 q?"),
            Message("assistant", "", tool_calls=_CALL),
            Message("tool", "TOOL sunny", name="weather", tool_call_id="abcdefghi"),
            Message("assistant", "It is."),
        ),
        tools=_WEATHER,
    ),
    "thoughts and tools": Row(
        messages=(
            Message("user", "USER1 q?"),
            Message("assistant", "", tool_calls=_CALL, reasoning="I call."),
            Message("tool", "TOOL sunny", name="weather", tool_call_id="abcdefghi"),
            Message("assistant", "It is.", reasoning="I see."),
        ),
        tools=_WEATHER,
    ),
    "two calls": Row(
        messages=(Message("user", "USER1 q?"), Message("assistant", "", tool_calls=_TWO_CALLS)),
        tools=_WEATHER,
    ),
}


def _template_cases() -> Iterator[Any]:
    """Each template with the variables that it knows; those that TRL made for training are for
    `make test-all`.
    """
    for path in sorted(trl_templates().glob("*.jinja")):
        thinks = "enable_thinking" in path.read_text(encoding="utf-8")
        for variables in (
            {},
            *([{"enable_thinking": False}, {"enable_thinking": True}] if thinks else []),
        ):
            is_long = path.stem.endswith("_training") or variables == {"enable_thinking": True}
            marks = [pytest.mark.long] if is_long else []
            yield pytest.param(path.stem, variables, id=f"{path.stem} {variables}", marks=marks)


@pytest.mark.parametrize(("name", "variables"), _template_cases())
def test_what_others_say_is_never_learnt(name: str, variables: dict[str, bool]) -> None:
    """Each row is learnt exactly, or refused: no user, system or tool is learnt, and a right answer
    is seen as one.
    """
    tokenizer = build_tokenizer(trl_template(name), "<|eos|>", "<|bos|>")
    shared = RowEncoder(ChatFormat(tokenizer, (), variables), 4000)
    for what, row in _ROWS.items():
        encoder = RowEncoder(ChatFormat(tokenizer, (), variables), 4000)
        try:
            encoded = encoder.encode(row)
        except TemplateRefusal:
            continue
        spans = [span for one in encoded.examples for span in learnt_spans(one.ids, one.learnt)]
        learnt = "".join(map(tokenizer.decode, spans))
        assert not any(word in learnt for word in ("USER", "SYSTEM", "TOOL", "q?")), (what, learnt)
        for message in row.messages:
            if message.role == "assistant":
                assert message.content.rpartition("</think>")[2].strip() in learnt, (what, learnt)
                assert message.reasoning in learnt, (what, learnt)
                assert all(
                    call["function"]["arguments"]["city"] in learnt for call in message.calls
                ), (what, learnt)
        last = encoded.examples[-1]
        span = spans[-1]
        right = predicted(encoder, last.ids[: last.answer_start], last.ids[last.answer_start :])
        assert right == encoded.reference or encoder.format.counts["no_answer"], (
            what,
            right,
            encoded.reference,
        )
        assert span[-1] == last.ids[-1] in encoder.format.ends or span[-1] in encoder.ends
        after_others = shared.encode(row)  # what came before does not change a row
        assert [one.ids for one in after_others.examples] == [one.ids for one in encoded.examples]


@pytest.mark.parametrize(
    "name", ["qwen3_8", "glm4moe", "nemotron_3_nano", "qwen3_training", "qwen3_5_think"]
)
def test_thoughts_behind_a_closed_block_are_refused(name: str) -> None:
    tokenizer = build_tokenizer(trl_template(name), "<|eos|>")
    encoder = RowEncoder(ChatFormat(tokenizer, (), {"enable_thinking": False}), 4000)
    with pytest.raises(
        TemplateRefusal, match=r"closes the thinking block before the answer|reasoning_content"
    ):
        encoder.encode(_ROWS["reasoning"])


def test_calls_that_are_not_all_rendered_are_refused() -> None:
    row = Row(messages=_ROWS["two calls"].messages, tools=_WEATHER)
    with pytest.raises(TemplateRefusal, match="does not render all tool_calls"):
        encoder_of(BY_NAME["gpt-oss"]).encode(row)
    names_alone = CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}",
    )
    encoder = RowEncoder(ChatFormat(build_tokenizer(names_alone, "<|im_end|>")), 4000)
    with pytest.raises(TemplateRefusal, match="does not render all tool_calls"):
        encoder.encode(
            Row(messages=(Message("user", "weather?"), Message("assistant", "", tool_calls=_CALL)))
        )


def test_what_tools_answer_is_not_dropped() -> None:
    messages = (
        *conversation("weather?", "let me look"),
        Message("tool", "42 degrees"),
        Message("assistant", "It is 42."),
    )
    with pytest.raises(TemplateRefusal, match="does not render answers of tools"):
        encoder_of(BY_NAME["phi3"]).encode(Row(messages=messages))


def test_an_end_token_inside_an_answer_is_counted() -> None:
    encoder = encoder_of(BY_NAME["qwen2.5"])
    encoded = encoder.encode(
        Row(messages=conversation("how does a turn end?", "with <|im_end|> or not"))
    )
    assert encoded.reference == "with"  # what generation stops at
    assert encoder.format.counts == {"end_inside": 1, "special_inside": 1}


def test_frames_are_known_as_tokenizers_decode_them() -> None:
    """Sentencepiece puts a space behind a special token: `<|im_start|> assistant`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "▁",
        "\n",
        *"abcdefghijklmnopqrstuvwxyz0123456789?.QAFBW",
        "▁assistant",
        "▁city",
        "▁9",
    ]
    tokenizer = Tokenizer(
        models.Unigram([(word, -1.0 - place / 100) for place, word in enumerate(words)], unk_id=0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<unk>"
    )
    fast.chat_template = BY_NAME["no-generation-prompt"].text
    encoder = RowEncoder(ChatFormat(fast), 4000)
    encoded = encoder.encode(Row(messages=conversation("why?", "city 9")))
    (example,) = encoded.examples
    assert encoded.reference == "city 9"
    assert (
        predicted(encoder, example.ids[: example.answer_start], example.ids[example.answer_start :])
        == "city 9"
    )


def test_markers_hold_where_tokens_merge_over_the_prompts_end() -> None:
    template = _MARKED.replace("{% generation %}", "\nNote. {% generation %}")
    encoder = RowEncoder(ChatFormat(build_tokenizer(template, "<|im_end|>")), 4000)
    (span,) = spans_of(encoder, Row(messages=conversation("and 1?", "city 1")))
    assert span.strip() == "city 1<|im_end|>"
    assert not encoder.format.counts["markers_unusable"]


def test_reasoning_of_earlier_turns_cannot_be_learnt_in_one_text() -> None:
    messages = (
        Message("user", "and 1?"),
        Message("assistant", "city 1", reasoning="I count."),
        Message("user", "and 2?"),
        Message("assistant", "city 2", reasoning="I add."),
    )
    row = Row(messages=messages)
    with pytest.raises(TemplateRefusal, match="leaves out the reasoning of earlier turns"):
        encoder_of(BY_NAME["qwen3"], assistant_only_loss=False).encode(row)
    assert len(spans_of(encoder_of(BY_NAME["qwen3"]), row)) == 2


def test_a_call_behind_thoughts_is_compared_whole() -> None:
    """gpt-oss ends it with a token of its own: no answer comes, and what was called is compared."""
    row = Row(messages=_ROWS["thoughts and tools"].messages[:2], tools=_WEATHER)
    encoder = encoder_of(BY_NAME["gpt-oss"])
    encoded = encoder.encode(row)
    (example,) = encoded.examples
    prompt, written = example.ids[: example.answer_start], example.ids[example.answer_start :]
    assert '{"city": "Paris"}' in encoded.reference
    assert predicted(encoder, prompt, written) == encoded.reference
    assert predicted(encoder, prompt, written[:-3]) == ""  # it was cut off: there is no answer yet
    assert not encoder.format.counts["no_answer"]


def _agent_row(calls: int) -> Row:
    messages = [Message("user", "weather?")]
    for _ in range(calls):
        messages += [
            Message("assistant", "", tool_calls=_CALL),
            Message("tool", "sunny " * 20, name="weather"),
        ]
    return Row(messages=(*messages, Message("assistant", "done")), tools=_WEATHER)


def test_a_long_row_of_calls_keeps_the_turns_that_fit() -> None:
    """After one question nothing can be dropped: turns that fit are learnt together, and the others
    are cut.
    """
    whole = encoder_of(BY_NAME["qwen2.5"]).encode(_agent_row(4)).examples[0]
    encoder = encoder_of(BY_NAME["qwen2.5"], max_length=len(whole.ids) - 60)
    examples = encoder.encode(_agent_row(4)).examples
    learnt = [
        text
        for one in examples
        for text in map(encoder.format.template.decode, learnt_spans(one.ids, one.learnt))
    ]
    assert len(learnt) == 5
    assert sum("</tool_call>" in text for text in learnt) == 4
    assert learnt[-1] == "done<|im_end|>"
    assert encoder.counts == {"cut": 1}


@pytest.mark.parametrize("kept", range(1, 8))
def test_no_more_turns_are_dropped_than_needed(kept: int) -> None:
    turns = [
        text for number in range(8) for text in (f"and country {number}?", f"it is city {number}.")
    ]
    last_ones = Row(messages=conversation(*turns[-2 * kept :]))
    room = len(encoder_of(BY_NAME["chatml-base"]).encode(last_ones).examples[0].ids)
    encoder = encoder_of(BY_NAME["chatml-base"], max_length=room)
    (example,) = encoder.encode(Row(messages=conversation(*turns))).examples
    assert example.ids == encoder.encode(last_ones).examples[0].ids
    assert (
        encoder.encode_prompt(Row(messages=conversation(*turns)), 4000)
        == example.ids[: example.answer_start]
    )


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_templates_that_want_parts_get_them(name: str) -> None:
    tokenizer = build_tokenizer(trl_template(name), "<end_of_utterance>")
    encoder = RowEncoder(ChatFormat(tokenizer), 4000)
    (span,) = spans_of(encoder, Row(messages=conversation("why?", "city 9")))
    assert span.strip() == "city 9<end_of_utterance>"


def test_a_tokenizer_without_offsets() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    encoder = RowEncoder(ChatFormat(tokenizer), 4000)
    assert spans_of(encoder, Row(messages=conversation("why?", "city 9"))) == ["city 9</s>"]


def test_the_day_in_a_prompt_is_known() -> None:
    dated = BY_NAME["llama3.2"].format()
    assert dated.template.has_current_date
    fixed = ChatFormat(dated.tokenizer, (), {"date_string": "26 Jul 2024"})
    assert not fixed.template.has_current_date
    assert "26 Jul 2024" in fixed.template.render(conversation("why?"), generation=True)
    gpt_oss = ChatFormat(BY_NAME["gpt-oss"].tokenizer(), (), {"date_string": "26 Jul 2024"})
    assert gpt_oss.template.has_current_date  # it does not take that variable


# ---- the frame around an answer ----


@pytest.mark.parametrize(
    ("frame", "written", "answer"),
    [
        (AnswerFrame(), "city 9", "city 9"),
        (AnswerFrame(), "<think>\nso\n</think>\n\ncity 9", "\n\ncity 9"),
        (AnswerFrame(), "<think>\nso", ""),
        (AnswerFrame(strict=False), "<think> is the tag", "<think> is the tag"),
        (AnswerFrame(strict=False), "<think>\nso\n</think>\ncity 9", "\ncity 9"),
        (AnswerFrame(), "a </think> inside", "a </think> inside"),
        (AnswerFrame(prompt_opens=True), "so\n</think>\n\ncity 9", "\n\ncity 9"),
        (AnswerFrame(prompt_opens=True), "city 9", ""),
        (AnswerFrame("<|final|>", "<|"), "<|analysis|>so<|final|>city 9", "city 9"),
        (AnswerFrame("<|final|>", "<|"), "<|analysis|>so", ""),
        (AnswerFrame(closing="<end>"), "city 9<end>\n", "city 9"),
    ],
)
def test_the_frame_is_taken_off(frame: AnswerFrame, written: str, answer: str) -> None:
    assert frame.extract_visible_text(written) == answer
    assert (
        AnswerFrame.from_dict(frame.to_dict())
        .adapt_to_prompt("<think>" if frame.prompt_opens else "")
        .extract_visible_text(written)
        == answer
    )


def test_an_unfinished_text_shows_nothing_of_a_frame() -> None:
    frame = AnswerFrame()
    whole = "<think>\nso\n</think>\n\ncity 9"
    shown = [
        frame.extract_visible_text(whole[:size], finished=False).strip()
        for size in range(len(whole) + 1)
    ]
    assert all("city 9".startswith(text) for text in shown)
    assert shown[-1] == "city 9"
    assert frame.extract_visible_text("<thi", finished=False) == ""
    assert frame.extract_visible_text("<thi") == "<thi"
