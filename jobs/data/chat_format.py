"""How a conversation becomes tokens: what a model is given, and exactly what it has to write.

Training, metrics, `chat`, `serve` and exported models all build prompts and end tokens here. The learnt part of a turn
is what the model has to write after the prompt that the chat template renders for generation, through the token that
ends the turn. It is found by rendering the conversation with and without the turn, never by assuming a frame.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os.path import commonprefix
from typing import Any, Literal, TypeVar

from lorafleet.jobs.data.answer_frame import PROMPT_TAIL, THINKING, AnswerFrame
from lorafleet.jobs.data.chat_template import ChatTemplate, Range, TemplateRefusal
from lorafleet.jobs.data.conversation import Message

_QUESTION, _ANSWER, _REASON, _FOLLOW_UP = "Question7f3a", "Answer7f3a", "Because7f3a", "Followup7f3a"
"""Texts of the probe conversations: words that no template has, and that trimming does not change."""
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "Tool7f3a",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "A key."}}},
    },
}
_PROBE_CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "Tool7f3a", "arguments": {"key": "value"}}}
_THINKING_TAGS = (
    THINKING,
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|channel>thought", "<channel|>"),
)


_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Turn:
    """One assistant turn as the model meets it."""

    prompt_ids: list[int]
    """Tokens that the model is given."""
    answer_ids: list[int]
    """Tokens that it has to write, the one that ends the turn last."""
    learnt: list[bool]
    """For each of `answer_ids`: whether it is learnt. All are, unless the template's own markers leave some out."""
    reference: str
    """The answer itself, without frame and end token: what metrics compare with."""
    end: int | None
    """The token that ends the turn; None: neither the template nor the tokenizer has one."""


@dataclass(frozen=True)
class _Written:
    """A turn between the prompt and the end of what the template renders."""

    prompt: str
    text: str
    """What the model has to write, and what the template writes behind it."""
    whole: str
    """The conversation as the template renders it."""
    added: int = 0
    """Characters at the beginning of `text` that the template does not render: a thinking block that is closed. The
    others are the end of `whole`."""


@dataclass(frozen=True)
class _Ending:
    """How a template ends a turn of the assistant."""

    tail: str
    """Text that the template writes after the answer when nothing follows."""
    kept: str
    """The part of `tail` that the model has to write: through the end token, or `closing`."""
    token: int | None
    """Token that ends the turn; None: neither the template nor the tokenizer has one."""
    appended: bool
    """Whether the template does not write `token` itself."""
    closing: str = ""
    """Text that ends a turn in a template whose end of turn is not a single token."""


class ChatFormat:
    """The chat template of one model, as this job uses it.

    `end_ids` are the model's own end tokens (its generation_config).
    """

    def __init__(
        self, tokenizer: Any, end_ids: Sequence[int] = (), template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, template_kwargs)
        eos = tokenizer.eos_token_id
        self.model_ends = list(dict.fromkeys([*([eos] if eos is not None else []), *end_ids]))
        self.counts: Counter[str] = Counter()
        """How often each thing that a user should know happened since the format was made (evaluation/tokens.py)."""

    @property
    def start_ids(self) -> list[int]:
        """Tokens before a prompt that no chat template begins."""
        bos = self.tokenizer.bos_token_id
        return [] if self.template.source or bos is None else [bos]

    @cached_property
    def ending(self) -> _Ending:
        """How this template ends a turn, found with a probe conversation."""
        asked = [Message("user", _QUESTION), Message("assistant", _ANSWER)]
        whole = self.template.render(asked, generation=False)
        position = whole.rfind(_ANSWER)
        if position < 0:
            raise TemplateRefusal("the chat template does not render the assistant's messages")
        return self._ending(whole[position + len(_ANSWER) :], self._follow_up(asked))

    def _follow_up(self, asked: list[Message]) -> str | None:
        """Return the text between an answer and the question after it; None where the template refuses that."""
        try:
            whole = self.template.render([*asked, Message("user", _FOLLOW_UP)], generation=False)
        except TemplateRefusal:
            return None
        begin, end = whole.rfind(_ANSWER), whole.find(_FOLLOW_UP)
        return whole[begin + len(_ANSWER) : end] if 0 <= begin < end else None

    def _ending(self, tail: str, follow_up: str | None) -> _Ending:
        tail_ids = self.template.ids(tail)
        follow_ids = tail_ids if follow_up is None else self.template.ids(follow_up)
        common = _common(tail_ids, follow_ids)
        only_at_the_end = tail_ids[len(common) :]
        candidates = [token for token in common if token in self.template.atoms]
        if not candidates:
            candidates = [token for token in tail_ids if token in self.template.atoms]
        declared = [token for token in candidates if token in self.model_ends]
        if candidates:
            # What comes only at the end of a conversation (`<|end|>\n<|endoftext|>`, a header that is always added) is
            # not of this turn; else the last token closes it (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`).
            undeclared = candidates[0] if only_at_the_end else candidates[-1]
            token = declared[0] if declared else undeclared
            return _Ending(tail, self._through(tail, token), token, appended=False)
        closing = _whole_lines(tail, tail if follow_up is None else follow_up)
        kept = tail[: tail.find(closing) + len(closing)] if closing else ""
        next_ids = follow_ids[len(common) : len(common) + 1]
        speaker_ends = bool(next_ids) and next_ids[0] in self.model_ends  # GLM: the next speaker's token ends the turn
        own = self.model_ends[0] if self.model_ends else None
        return _Ending(tail, kept, next_ids[0] if speaker_ends else own, appended=True, closing=closing)

    def _through(self, text: str, token: int) -> str:
        """Return a text through the first occurrence of a token."""
        name = self.template.name_of(token)
        place = text.find(name)
        return text[: place + len(name)] if place >= 0 else text

    @cached_property
    def call_end(self) -> int | None:
        """The token that ends a turn of tool calls; None: the template renders none."""
        messages = [Message("user", _QUESTION), Message("assistant", "", tool_calls=json.dumps([_PROBE_CALL]))]
        try:
            written = self._split(messages, 1, json.dumps([_PROBE_TOOL]))
            return self._cut(written, messages, json.dumps([_PROBE_TOOL]))[1]
        except TemplateRefusal:
            return None

    @cached_property
    def ends(self) -> list[int]:
        """Tokens at which an answer is over: the model's own, and those that this template writes."""
        return self._probed(lambda: list(dict.fromkeys([*self.model_ends, *self._template_ends])))

    @property
    def _template_ends(self) -> list[int]:
        return [token for token in (self.ending.token, self.call_end) if token is not None]

    @cached_property
    def generation_prompt(self) -> Literal["added", "missing", "always"]:
        """How the template begins an answer: where it is asked to, never, or always."""
        question = [Message("user", _QUESTION)]
        if self.template.render(question, generation=True) != self.template.render(question, generation=False):
            return "added"
        more = self.ending.tail.strip() != self.ending.kept.strip()
        return "always" if more and self._probe_text(Message("assistant", _ANSWER)).startswith(_ANSWER) else "missing"

    @cached_property
    def frame(self) -> AnswerFrame:
        """What the model writes before its answer, found with probe conversations."""
        return self._probed(self._probed_frame)

    def _probed(self, probe: Callable[[], _Result]) -> _Result:
        """Run a probe without counting: probes are no rows."""
        counts = self.counts.copy()
        try:
            return probe()
        finally:
            self.counts = counts

    def _probed_frame(self) -> AnswerFrame:
        written = self._probe_text(Message("assistant", _ANSWER))
        before = written[: written.rfind(_ANSWER)].strip()
        reason_before, reason_after = self._reasoning_frame
        opened = self._open_thinking(self.template.render([Message("user", _QUESTION)], generation=True))
        if opened is not None:
            opener, marker = (self._as_decoded(tag) for tag in opened)
        elif before and reason_after:
            marker = commonprefix([before[::-1], reason_after[::-1]])[::-1].strip() or before
            opener = commonprefix([before, reason_before]).strip() or before
        elif before:
            tags = next(((first, last) for first, last in _THINKING_TAGS if last in before), (before, before))
            opener, marker = tags
        elif reason_after:
            marker, opener = reason_after, reason_before or THINKING[0]
        else:
            opener, marker = THINKING
        writes_frames = before or reason_after or opened or any(tag in self.template.source for tag in (opener, marker))
        closing = self._as_decoded(self.ending.closing)
        # A call's own end token tells that no answer comes (gpt-oss); where both end alike the frame has to tell.
        calls = [self.call_end] if self.call_end not in (None, self.ending.token) else []
        return AnswerFrame(
            marker,
            opener,
            strict=bool(writes_frames),
            closing=closing,
            special_tokens=self.template.special_texts,
            call_ends=tuple(token for token in calls if token is not None),
        )

    @cached_property
    def _reasoning_frame(self) -> tuple[str, str]:
        """Texts before and after the thoughts of an answer that has some; empty where none are rendered."""
        try:
            written = self._probe_text(Message("assistant", _ANSWER, reasoning=_REASON))
        except TemplateRefusal:
            return "", ""
        if _REASON not in written or _ANSWER not in written:
            return "", ""
        before, _, after = written.partition(_REASON)
        return before.strip(), after[: after.rfind(_ANSWER)].strip()

    def _probe_text(self, answer: Message) -> str:
        """Return what the model writes for a probe's answer, as its tokens are decoded.

        Decoding may add spaces around special tokens (sentencepiece), and predictions come decoded.
        """
        messages = [Message("user", _QUESTION), answer]
        written = self._split(messages, 1, "")
        kept, _ = self._cut(written, messages, "")
        decoded = self._as_decoded(kept)
        return decoded if _ANSWER in decoded else kept

    def _as_decoded(self, text: str) -> str:
        """Return a text as its tokens are decoded."""
        return self.template.decode(self.template.ids(text)).strip() if text else text

    def _open_thinking(self, prompt: str) -> tuple[str, str] | None:
        """Return the tags of the thinking block in which a prompt ends; None: it ends in none."""
        return next((tags for tags in _THINKING_TAGS if prompt.rstrip().endswith(tags[0])), None)

    def text_ids(self, text: str) -> list[int]:
        """Return the tokens of a text alone, after the start token unless the text brings it."""
        ids, bos = self.template.ids(text), self.tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def prompt_ids(self, messages: Sequence[Message], tools: str = "") -> list[int]:
        """Return the tokens of a prompt: what the model is given before it answers."""
        return self._started(self.template.ids(self.template.render(messages, tools, generation=True)))

    def _started(self, ids: list[int]) -> list[int]:
        """Return a prompt's tokens with the start token, unless the text brings it or the template does."""
        start = self.start_ids
        return ids if start and ids[:1] == start else [*start, *ids]

    def turn(self, messages: Sequence[Message], index: int, tools: str = "") -> Turn:
        """Return the assistant's turn at `index`, rendered as for generation.

        Raises TemplateRefusal where the template drops what the row says.
        """
        before = messages[: index + 1]
        written = self._split(before, index, tools)
        kept, end = self._cut(written, before, tools)
        self._check_thinking(written.prompt, kept)
        self._check_rendered(written.prompt, kept, before, tools)
        alone = self.template.ids(written.prompt)
        prompt_ids = self._started(alone)
        answer_ids, offsets = self._answer_ids(written.prompt, alone, kept)
        learnt = self._marked(written, kept, before, tools, offsets)
        if end is not None and answer_ids[-1:] != [end]:
            answer_ids, learnt = [*answer_ids, end], [*learnt, True]
        while len(answer_ids) > 1 and {answer_ids[-1], answer_ids[-2]} <= {*self.ends, end}:
            answer_ids, learnt = answer_ids[:-1], learnt[:-1]  # a text that brings its own end gets no other
        reference = self._reference(written.prompt, prompt_ids, answer_ids, kept, before[index])
        return Turn(prompt_ids, answer_ids, learnt, reference, end)

    def _split(self, messages: Sequence[Message], index: int, tools: str) -> _Written:
        """Find where the prompt as for generation ends in the rendered conversation, and the turn begins."""
        context = messages[:index]
        prompt = self.template.render(context, tools, generation=True)
        whole = self.template.render(messages[: index + 1], tools, generation=False)
        if whole.startswith(prompt):
            return _Written(prompt, whole[len(prompt) :], whole)
        closed = self._close_thinking(prompt, whole, messages[index])
        if closed is not None:
            self.counts["thinking_closed"] += 1
            return closed
        self.counts["prompt_differs"] += 1
        unanswered = self.template.render(context, tools, generation=False)
        start = _behind_last_message(prompt, unanswered, whole, context)
        if start is None:
            start = _behind_header(prompt, unanswered, whole)
        if start is None:
            start = self._answer_at_the_end(whole, messages[index])
        if start is None:
            raise TemplateRefusal(
                "the model's chat template renders the prompt differently when the answer follows, and the answer "
                "cannot be found in what it renders; name another template in data.chat_template"
            )
        return _Written(prompt, whole[start:], whole)

    def _close_thinking(self, prompt: str, whole: str, message: Message) -> _Written | None:
        """Return what has to follow a prompt that ends in an open thinking block; None: it does not end in one.

        The template renders the answer without that block (DeepSeek) or closes it at once (Nemotron): what the model
        has to write closes it before the answer.
        """
        tags = self._open_thinking(prompt)
        if tags is None:
            return None
        first, last = tags
        before = prompt.rstrip().removesuffix(first)
        if not whole.startswith(before):
            return None
        rest = whole[len(before) :].removeprefix(first)
        reasoning = message.reasoning.strip()
        if not reasoning and last in message.content:
            reasoning = message.content.partition(last)[0].replace(first, "").strip()
        if rest.lstrip().startswith(last) or (reasoning and rest.lstrip().startswith(reasoning)):
            return _Written(prompt, rest.lstrip(), whole)
        closed = f"{reasoning}\n{last}\n\n"
        return _Written(prompt, f"{closed}{rest}", whole, added=len(closed))

    def _answer_at_the_end(self, whole: str, message: Message) -> int | None:
        """Return where an answer begins that the rendered conversation ends with; None: it does not."""
        for content in (message.content, message.content.strip()):
            ends_with = f"{content}{self.ending.tail}"
            if content.strip() and whole.endswith(ends_with):
                return len(whole) - len(ends_with)
        return None

    def _cut(self, written: _Written, messages: Sequence[Message], tools: str) -> tuple[str, int | None]:
        """Return (what the model writes of a turn's text, the token with which it has to end)."""
        ending, text = self.ending, written.text
        calls = bool(messages[-1].tool_calls)
        if calls and (ending.appended or not text.endswith(ending.tail)):
            return self._cut_calls(written, messages, tools)
        if text.endswith(ending.tail):
            return text[: len(text) - len(ending.tail)] + ending.kept, ending.token
        if text.rstrip().endswith(ending.tail.rstrip()):
            shorter = text.rstrip()
            return shorter[: len(shorter) - len(ending.tail.rstrip())] + ending.kept, ending.token
        return self._cut_at_last_atom(text)

    def _cut_at_last_atom(self, text: str) -> tuple[str, int | None]:
        """Cut behind the special token with which a text ends; without one, append the end token."""
        kept = text.rstrip()
        ids = self.template.ids(kept)
        ends_itself = bool(ids) and ids[-1] in self.template.special_ids
        return kept, ids[-1] if ends_itself else self.ending.token

    def _cut_calls(self, written: _Written, messages: Sequence[Message], tools: str) -> tuple[str, int | None]:
        """Cut a turn that ends in tool calls: by what the template writes between them and the tool's answer."""
        call = messages[-1].calls[0]
        name, call_id = str(call["function"]["name"]), str(call.get("id") or "")
        answer = Message("tool", _FOLLOW_UP, name=name, tool_call_id=call_id)
        begin = len(written.whole) - len(written.text) + written.added
        try:
            followed = self.template.render([*messages, answer], tools, generation=False)
        except TemplateRefusal:
            return self._cut_at_last_atom(written.text)
        if not followed.startswith(written.whole[:begin]):
            return self._cut_at_last_atom(written.text)
        shared = commonprefix([written.whole, followed])
        kept = (written.text[: written.added] + shared[begin:]).rstrip()
        ids = self.template.ids(kept)
        if ids and ids[-1] in self.template.special_ids:
            return kept, ids[-1]
        following = self.template.ids(followed[len(shared) :].lstrip())[:1]
        if following and following[0] in self.template.special_ids and self.ending.appended:
            return kept, following[0]
        return kept, self.ending.token

    def _answer_ids(self, prompt: str, alone: list[int], kept: str) -> tuple[list[int], list[Range]]:
        """Return the tokens of an answer behind its prompt, and the characters of `kept` that each covers.

        Those of the whole text, where the prompt has the same tokens with and without the answer (`alone`); else the
        answer's own: at inference the prompt stands alone, and a token over both would never be seen there.
        """
        encode = self._encode
        ids, offsets = encode(prompt + kept)
        if ids[: len(alone)] == alone:
            shifted = [(first - len(prompt), last - len(prompt)) for first, last in offsets[len(alone) :]]
            return ids[len(alone) :], shifted
        self.counts["boundary_merged"] += 1
        return encode(kept)

    def _encode(self, text: str) -> tuple[list[int], list[Range]]:
        """Return tokens with the characters that they cover; only a template with markers needs the latter."""
        if self.template.has_markers:
            return self.template.ids_with_offsets(text)
        ids = self.template.ids(text)
        return ids, [(0, 0)] * len(ids)

    def _reference(self, prompt: str, prompt_ids: list[int], answer_ids: list[int], kept: str, message: Message) -> str:
        """Return what metrics make of a model that writes exactly what is learnt: truth and prediction go one way."""
        over = next((place for place, token in enumerate(answer_ids) if token in self.ends), len(answer_ids))
        frame = self.frame.after(self.template.decode(prompt_ids[-PROMPT_TAIL:]))
        end = answer_ids[over] if over < len(answer_ids) else None
        reference = frame.answer(answer_ids[:over], self.template.decode, end)
        if over < len(answer_ids) - 1:
            self.counts["end_inside"] += 1
        if not reference and message.tool_calls:
            self.counts["no_answer"] += 1  # the frame holds calls alone: no text of it can be compared
            return self.template.decode(answer_ids, True).strip()
        text = self.frame.without_special_tokens(self.frame.after(prompt).visible(kept))
        if over >= len(answer_ids) - 1 and _squeezed(text) != _squeezed(reference):
            self.counts["answer_lossy"] += 1
        return reference

    def _check_thinking(self, prompt: str, kept: str) -> None:
        """Refuse thoughts behind a prompt that has closed its thinking block (`enable_thinking: false`)."""
        for first, last in _THINKING_TAGS:
            if prompt.rstrip().endswith(last) and kept.lstrip().startswith(first):
                raise TemplateRefusal(_THINKS_AFTER_ALL)

    def _check_rendered(self, prompt: str, kept: str, messages: Sequence[Message], tools: str) -> None:
        """Compare what a turn says with what the template made of it."""
        message = messages[-1]
        if message.tool_calls:
            self._check_calls(messages, message, tools)
        self._check_reasoning(prompt, kept, messages)
        answer = self.frame.visible(message.content)
        if _squeezed(answer) not in _squeezed(kept):
            if not self.frame.after(prompt).visible(kept).strip():
                raise TemplateRefusal("the model's chat template does not render the answer")
            self.counts["answer_changed"] += 1

    def check_context(self, messages: Sequence[Message], tools: str = "") -> None:
        """Compare what stands before the last turn with what the template made of it; once a conversation.

        Raises TemplateRefusal for tools, tool calls or tools' answers that are dropped, and counts what else is.
        """
        prompt = self.template.render(messages[:-1], tools, generation=True)
        if tools and self.template.render(messages[:-1], generation=True) == prompt:
            raise TemplateRefusal("the model's chat template does not render tools, but the row has some")
        squeezed = _squeezed(prompt)
        for message in messages[:-1]:
            if message.tool_calls and not message.learn:
                self._check_calls(messages, message, tools)
            if _is_in(message.content, squeezed):
                continue
            if message.role == "tool":
                raise TemplateRefusal("the model's chat template does not render what a tool answers")
            if message.role == "user":
                self.counts["user_dropped"] += 1
            elif message.role != "assistant":
                self.counts["system_dropped"] += 1
        pattern = self.template.special_pattern
        if pattern is not None and any(pattern.search(message.content) for message in messages):
            self.counts["special_inside"] += 1

    def _check_reasoning(self, prompt: str, kept: str, messages: Sequence[Message]) -> None:
        """Refuse thoughts that the template never renders. Those of earlier turns may be left out, as it will do."""
        message = messages[-1]
        if message.reasoning and _squeezed(message.reasoning) not in _squeezed(kept):
            closed = any(prompt.rstrip().endswith(last) for _, last in _THINKING_TAGS)
            raise TemplateRefusal(_THINKS_AFTER_ALL if closed else _NO_REASONING)
        thinks = any(one.reasoning for one in messages[:-1])
        if thinks and not self._reasoning_frame[1] and self._open_thinking(prompt) is None:
            raise TemplateRefusal(_NO_REASONING)

    def _check_calls(self, messages: Sequence[Message], message: Message, tools: str) -> None:
        """Refuse calls of tools of which the template renders nothing, or not all."""
        calls = message.calls
        place = next(number for number, one in enumerate(messages) if one is message)
        shorter = [json.dumps(calls[:number] + calls[number + 1 :]) for number in range(len(calls))]
        variants = [""] if len(calls) == 1 else shorter
        for number, call in enumerate(calls):
            if call["function"]["arguments"]:
                empty = {**call, "function": {**call["function"], "arguments": {}}}
                variants.append(json.dumps([*calls[:number], empty, *calls[number + 1 :]]))
        rendered = self.template.render(messages[: place + 1], tools, generation=False)
        for variant in variants:
            other = [*messages[:place], replace(message, tool_calls=variant)]
            if self._renders_as(other, tools, rendered):
                raise TemplateRefusal("the model's chat template does not render all tool_calls of the row")

    def _renders_as(self, messages: Sequence[Message], tools: str, text: str) -> bool:
        """Whether a conversation is rendered as a text."""
        try:
            return self.template.render(messages, tools, generation=False) == text
        except TemplateRefusal:
            return False

    def _marked(
        self, written: _Written, kept: str, messages: Sequence[Message], tools: str, offsets: Sequence[Range]
    ) -> list[bool]:
        """Return which tokens of an answer are learnt: those that the template's own markers name, through the end."""
        everything = [True] * len(offsets)
        if not self.template.has_markers:
            return everything
        shift = len(written.whole) - len(written.text)
        clipped = [
            (max(first - shift, written.added), min(last - shift, len(kept)))
            for first, last in self.template.marked(messages, tools)
        ]
        marked = [(first, last) for first, last in clipped if first < last]
        if not marked:
            self.counts["markers_unusable"] += 1
            return everything
        last_marked = max(last for _, last in marked)
        marked += [(0, written.added), (last_marked, len(kept))]
        learnt = [any(first < end and begin < last for begin, end in marked) for first, last in offsets]
        if not learnt[0]:
            self.counts["markers_begin_late"] += 1
        return learnt


_NO_REASONING = "the model's chat template does not render reasoning_content, but the row has some"
_THINKS_AFTER_ALL = (
    "the row has reasoning, but the prompt closes the thinking block before the answer; drop enable_thinking: false "
    "from data.chat_template_kwargs, or the reasoning from the row"
)


def _behind_last_message(prompt: str, unanswered: str, whole: str, context: Sequence[Message]) -> int | None:
    """Return where an answer begins behind the last message before it and the header between; None: not found."""
    asked = context[-1].content.strip() if context else ""
    place = prompt.rfind(asked) if asked else -1
    if place < 0:
        return None
    header = prompt[place + len(asked) :]
    if whole.startswith(unanswered) and asked in unanswered:
        begin = unanswered.rfind(asked)
    else:  # the last message is rendered differently once it is answered
        begin = whole.find(asked, max(0, len(commonprefix([unanswered, whole])) - len(asked)))
    end = begin + len(asked)
    return end + len(header) if begin >= 0 and header and whole.startswith(header, end) else None


def _behind_header(prompt: str, unanswered: str, whole: str) -> int | None:
    """Return where an answer begins behind the generation prompt, where that stands once behind the context."""
    header = prompt.removeprefix(unanswered)
    if header == prompt or not header.strip():
        return None
    start = len(commonprefix([unanswered, whole]))
    return whole.find(header, start) + len(header) if whole.count(header, start) == 1 else None


def _common(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Return the tokens with which both begin."""
    shared = []
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        shared.append(left)
    return shared


def _whole_lines(tail: str, follow_up: str) -> str:
    """Return the text that ends a turn in any case: what a tail has in common with one that another turn follows."""
    shared = commonprefix([tail, follow_up])
    if shared != tail:
        shared = shared[: shared.rfind("\n") + 1]  # what comes after is the beginning of the next turn
    return shared.strip()


def _squeezed(text: str) -> str:
    """Return a text without spaces: templates trim and re-indent."""
    return "".join(text.split())


def _is_in(content: str, squeezed: str) -> bool:
    """Whether a text stands in a prompt (without its spaces), as it is or as JSON."""
    return _squeezed(content) in squeezed or _squeezed(json.dumps(content, ensure_ascii=False)[1:-1]) in squeezed
