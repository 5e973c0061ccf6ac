"""How a conversation becomes tokens: what a model is given, and exactly what it has to write.

Training, metrics, `chat`, `serve` and exported models all build prompts and end tokens here. The learnt part of a turn
is what the model has to write after the prompt that the chat template renders for generation, through the token that
ends the turn. It is found by rendering the conversation with and without the turn, never by assuming a frame.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import commonprefix
from typing import Any, Literal

from jobs.answer_frame import THINKING, AnswerFrame
from jobs.conversation import Message
from jobs.errors import DataError

_QUESTION, _ANSWER, _REASON, _FOLLOW_UP = "Question7f3a", "Answer7f3a", "Because7f3a", "Followup7f3a"
"""Texts of the probe conversations: words that no template has, and that trimming does not change."""
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CLOCK = re.compile(r"\bstrftime_now\b")
_THINKING_TAGS = (
    THINKING,
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<reasoning>", "</reasoning>"),
)
_PART_SEPARATOR = "\n\n"
"""Between the parts of a conversation where the tokenizer has no chat template."""


class TemplateRefusal(DataError):
    """A conversation that the chat template cannot render as it is."""


@dataclass(frozen=True)
class Turn:
    """One assistant turn as the model meets it."""

    prompt_ids: list[int]
    """Tokens that the model is given."""
    answer_ids: list[int]
    """Tokens that it has to write, the one that ends the turn last."""
    reference: str
    """The answer itself, without frame and end token: what metrics compare with."""
    learnt: list[bool] = field(default_factory=list)
    """For each of `answer_ids`: whether it is learnt. All are, unless the template's own markers leave some out."""


@dataclass(frozen=True)
class _Ending:
    """How this template ends a turn of the assistant."""

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
    """One tokenizer with its chat template, as this job uses them.

    `end_ids` are the model's own end tokens (its generation_config). A tokenizer without a chat template gets the plain
    form: parts joined by an empty line, answers ended by the end token.
    """

    def __init__(
        self, tokenizer: Any, end_ids: Sequence[int] = (), template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        eos = tokenizer.eos_token_id
        self.model_ends = list(dict.fromkeys([*([eos] if eos is not None else []), *end_ids]))
        self.counts: Counter[str] = Counter()
        """How often each of `REMARKS` applied to a row since the format was made."""
        self._arguments_as_text = False
        self._tool_ends: dict[int, None] = {}

    @cached_property
    def template(self) -> str:
        """The chat template's source; empty: the tokenizer has none."""
        if not self.tokenizer.chat_template:
            return ""
        return str(self.tokenizer.get_chat_template())

    @cached_property
    def atoms(self) -> frozenset[int]:
        """Ids of tokens that are never merged with text: special and added ones."""
        return frozenset({*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids})

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of special tokens, longest first."""
        added = self.tokenizer.added_tokens_decoder
        texts = {str(token.content) for token in added.values() if token.special} | set(
            self.tokenizer.all_special_tokens
        )
        return tuple(sorted((text for text in texts if text), key=lambda text: (-len(text), text)))

    @cached_property
    def has_markers(self) -> bool:
        """Whether the template itself says what the assistant writes (`{% generation %}`)."""
        return bool(_MARKERS.search(self.template))

    @cached_property
    def tells_the_date(self) -> bool:
        """Whether prompts hold the day on which they are rendered."""
        return bool(_CLOCK.search(self.template)) and "date_string" not in self.template_kwargs

    @property
    def start_ids(self) -> list[int]:
        """Tokens before a prompt that no chat template begins."""
        bos = self.tokenizer.bos_token_id
        return [] if self.template or bos is None else [bos]

    @cached_property
    def ending(self) -> _Ending:
        """How this template ends a turn, found with a probe conversation."""
        asked = [Message("user", _QUESTION), Message("assistant", _ANSWER)]
        whole = self.render(asked, generation=False)
        position = whole.rfind(_ANSWER)
        if position < 0:
            raise TemplateRefusal("the chat template does not render the assistant's messages")
        tail = whole[position + len(_ANSWER) :]
        return self._ending(tail, self._follow_up(asked))

    def _follow_up(self, asked: list[Message]) -> str | None:
        """Return the text between an answer and the question after it; None where the template refuses that."""
        try:
            whole = self.render([*asked, Message("user", _FOLLOW_UP)], generation=False)
        except TemplateRefusal:
            return None
        begin, end = whole.rfind(_ANSWER), whole.find(_FOLLOW_UP)
        return whole[begin + len(_ANSWER) : end] if 0 <= begin < end else None

    def _ending(self, tail: str, follow_up: str | None) -> _Ending:
        tail_ids = self._ids(tail)
        follow_ids = tail_ids if follow_up is None else self._ids(follow_up)
        common = _common(tail_ids, follow_ids)
        only_at_the_end = tail_ids[len(common) :]
        candidates = [token for token in common if token in self.atoms]
        if not candidates:
            candidates = [token for token in tail_ids if token in self.atoms]
        known = [token for token in candidates if token in self.model_ends]
        if candidates:
            # Without a follow-up in common (`<|end|>\n<|endoftext|>`, or a header that is always added) what comes last
            # is not of this turn; else the last one closes it (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`).
            unknown = candidates[0] if only_at_the_end else candidates[-1]
            token = known[0] if known else unknown
            kept = self._through(tail, token)
            return _Ending(tail, kept, token, appended=False)
        closing = _whole_lines(tail, tail if follow_up is None else follow_up)
        next_ids = follow_ids[len(common) : len(common) + 1]
        speaker_ends = bool(next_ids) and next_ids[0] in self.model_ends  # GLM: the next speaker's token ends the turn
        own = self.model_ends[0] if self.model_ends else None
        kept = tail[: tail.find(closing) + len(closing)] if closing else ""
        return _Ending(tail, kept, next_ids[0] if speaker_ends else own, appended=True, closing=closing)

    def _through(self, text: str, token: int) -> str:
        """Return a text through the first occurrence of a token."""
        name = str(self.tokenizer.convert_ids_to_tokens(token))
        place = text.find(name)
        return text[: place + len(name)] if place >= 0 else text

    @property
    def ends(self) -> list[int]:
        """Tokens at which an answer is over: the model's own, and the one that this template writes."""
        token = self.ending.token
        return list(dict.fromkeys([*self.model_ends, *([] if token is None else [token]), *self._tool_ends]))

    @cached_property
    def generation_prompt(self) -> Literal["added", "missing", "always"]:
        """How the template begins an answer: where it is asked to, never, or always."""
        question = [Message("user", _QUESTION)]
        if self.render(question, generation=True) != self.render(question, generation=False):
            return "added"
        return "always" if self.ending.tail != self.ending.kept and self._answer_follows(question[0]) else "missing"

    def _answer_follows(self, question: Message) -> bool:
        """Whether an answer stands right behind the prompt, without a header of its own."""
        _, written = self._split([question, Message("assistant", _ANSWER)], 1, "")
        return written.lstrip().startswith(_ANSWER) and bool(self.ending.tail.strip())

    @cached_property
    def frame(self) -> AnswerFrame:
        """What the model writes before its answer, found with probe conversations."""
        counts = self.counts.copy()
        try:
            return self._probed_frame(Message("user", _QUESTION))
        finally:
            self.counts = counts  # probes are no rows

    def _probed_frame(self, question: Message) -> AnswerFrame:
        _, written = self._split([question, Message("assistant", _ANSWER)], 1, "")
        before = written[: written.rfind(_ANSWER)].strip()
        reason_before, reason_after = self._reasoning_frame(question)
        opened = self._open_thinking(self.render([question], generation=True))
        if opened is not None:
            opener, marker = opened
        elif before and reason_after:
            marker = commonprefix([before[::-1], reason_after[::-1]])[::-1].strip() or before
            opener = commonprefix([before, reason_before]).strip() or before
        elif before:
            marker, opener = before, before
            for first, last in _THINKING_TAGS:
                if last in before:
                    marker, opener = last, first
        elif reason_after:
            marker, opener = reason_after, reason_before or THINKING[0]
        else:
            marker, opener = THINKING[1], THINKING[0]
        return AnswerFrame(marker, opener, closing=self.ending.closing, special_tokens=self.special_texts)

    def _reasoning_frame(self, question: Message) -> tuple[str, str]:
        """Return the texts before and after the thoughts of an answer that has some; empty where none are rendered."""
        try:
            _, written = self._split([question, Message("assistant", _ANSWER, reasoning=_REASON)], 1, "")
        except TemplateRefusal:
            return "", ""
        if _REASON not in written:
            return "", ""
        before, _, after = written.partition(_REASON)
        return before.strip(), after[: after.rfind(_ANSWER)].strip()

    def _open_thinking(self, prompt: str) -> tuple[str, str] | None:
        """Return the tags of the thinking block in which a prompt ends; None: it ends in none."""
        for first, last in _THINKING_TAGS:
            if prompt.rstrip().endswith(first):
                return first, last
        return None

    def render(self, messages: Sequence[Message], tools: str = "", *, generation: bool) -> str:
        """Render messages as a text; with `generation` up to where the answer begins.

        Raises TemplateRefusal with what the template says.
        """
        if not self.template:
            return self._plain(messages, tools, generation=generation)
        try:
            return self._rendered(messages, tools, generation=generation)
        except _template_errors() as error:
            if any(message.tool_calls for message in messages) and not self._arguments_as_text:
                # DeepSeek's template joins a call's arguments to a text: there they have to be JSON.
                self._arguments_as_text = True
                try:
                    return self._rendered(messages, tools, generation=generation)
                except _template_errors():
                    self._arguments_as_text = False
            raise TemplateRefusal(f"the model's chat template refuses this row: {error}") from error

    def _rendered(self, messages: Sequence[Message], tools: str, *, generation: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            self._dictionaries(messages),
            tools=_tool_list(tools),
            add_generation_prompt=generation,
            tokenize=False,
            **self.template_kwargs,
        )
        return text

    def _dictionaries(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [message.for_template(arguments_as_text=self._arguments_as_text) for message in messages]

    def _plain(self, messages: Sequence[Message], tools: str, *, generation: bool) -> str:
        if tools or any(message.tool_calls or message.reasoning for message in messages):
            raise TemplateRefusal(
                "the row has tools, tool calls or reasoning, but the model's tokenizer has no chat template that could "
                "render them; name one in data.chat_template"
            )
        text = _PART_SEPARATOR.join(message.content for message in messages)
        return text + _PART_SEPARATOR if generation else text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prompt_ids(self, text: str) -> list[int]:
        ids = self._ids(text)
        start = self.start_ids
        return ids if start and ids[:1] == start else [*start, *ids]

    def text_ids(self, text: str) -> list[int]:
        """Return the tokens of a text alone, after the start token unless the text brings it."""
        ids, bos = self._ids(text), self.tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def prompt_ids(self, messages: Sequence[Message], tools: str = "") -> list[int]:
        """Return the tokens of a prompt: what the model is given before it answers."""
        return self._prompt_ids(self.render(messages, tools, generation=True))

    def turn(self, messages: Sequence[Message], index: int, tools: str = "") -> Turn:
        """Return the assistant's turn at `index`, rendered as for generation.

        Raises TemplateRefusal where the template drops what the row says.
        """
        before = messages[: index + 1]
        prompt, written = self._split(before, index, tools)
        kept, ends_with = self._cut(prompt + written, written, before, tools)
        self._check_thinking(prompt, kept)
        self._check_rendered(prompt, kept, before, tools)
        prompt_ids = self._prompt_ids(prompt)
        answer_ids = self._answer_ids(prompt, prompt_ids, kept)
        if ends_with is not None and answer_ids[-1:] != [ends_with]:
            answer_ids.append(ends_with)
        answer_ids = _ended_once(answer_ids, self.ends)
        reference = self._reference(prompt, kept)
        return Turn(prompt_ids, answer_ids, reference, self._marked(before, tools, prompt_ids, answer_ids))

    def _split(self, messages: Sequence[Message], index: int, tools: str) -> tuple[str, str]:
        """Return (prompt as for generation, text that the template writes for the turn and after it)."""
        prompt = self.render(messages[:index], tools, generation=True)
        whole = self.render(messages[: index + 1], tools, generation=False)
        if whole.startswith(prompt):
            return prompt, whole[len(prompt) :]
        closed = self._close_thinking(prompt, whole, messages[index])
        if closed is not None:
            self.counts["thinking_closed"] += 1
            return prompt, closed
        self.counts["prompt_differs"] += 1
        asked = messages[index - 1].content.strip() if index else ""
        anchor = prompt[prompt.rfind(asked) :] if asked else ""
        if anchor and anchor in whole:  # the last message before the answer, and what stands between the two
            return prompt, whole[whole.rfind(anchor) + len(anchor) :]
        header = prompt.removeprefix(self.render(messages[:index], tools, generation=False))
        if header and header != prompt and header.strip() and header in whole:
            return prompt, whole[whole.rfind(header) + len(header) :]
        content = messages[index].content.strip()
        if content and content in whole:
            return prompt, whole[whole.rfind(content) :]
        raise TemplateRefusal(
            "the model's chat template renders the prompt differently when the answer follows, and the answer cannot "
            "be found in what it renders; name another template in data.chat_template"
        )

    def _close_thinking(self, prompt: str, whole: str, message: Message) -> str | None:
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
            return rest.lstrip()
        return f"{reasoning}\n{last}\n\n{rest}"

    def _cut(self, whole: str, written: str, messages: Sequence[Message], tools: str) -> tuple[str, int | None]:
        """Return (what the model writes of a turn's text, the token with which it has to end)."""
        ending = self.ending
        calls = bool(messages[-1].tool_calls)
        if calls and (ending.appended or not written.endswith(ending.tail)):
            return self._cut_calls(whole, written, messages, tools)
        if written.endswith(ending.tail):
            return written[: len(written) - len(ending.tail)] + ending.kept, ending.token
        if written.rstrip().endswith(ending.tail.rstrip()):
            shorter = written.rstrip()
            return shorter[: len(shorter) - len(ending.tail.rstrip())] + ending.kept, ending.token
        return self._cut_at_last_atom(written)

    def _cut_at_last_atom(self, written: str) -> tuple[str, int | None]:
        """Cut after the last special token that only spaces follow; without one, append the end token."""
        ids = self._ids(written.rstrip())
        if ids and ids[-1] in self.atoms:
            self._tool_ends.setdefault(ids[-1])
            return written.rstrip(), ids[-1]
        return written.rstrip(), self.ending.token

    def _cut_calls(self, whole: str, written: str, messages: Sequence[Message], tools: str) -> tuple[str, int | None]:
        """Cut a turn that ends in tool calls: by what the template writes between them and the tool's answer."""
        call = messages[-1].calls[0]
        answer = Message("tool", _FOLLOW_UP, name=str(call["function"]["name"]), tool_call_id=str(call.get("id") or ""))
        try:
            followed = self.render([*messages, answer], tools, generation=False)
        except TemplateRefusal:
            return self._cut_at_last_atom(written)
        shared = commonprefix([whole, followed]) if followed.startswith(whole[: len(whole) - len(written)]) else ""
        kept = shared[len(whole) - len(written) :].rstrip() if shared else written.rstrip()
        ids = self._ids(kept)
        if ids and ids[-1] in self.atoms and ids[-1] in self.special_ids:
            self._tool_ends.setdefault(ids[-1])
            return kept, ids[-1]
        following = self._ids(followed[len(shared) :].lstrip())[:1] if shared else []
        if following and following[0] in self.atoms and following[0] in self.special_ids and self.ending.appended:
            self._tool_ends.setdefault(following[0])
            return kept, following[0]
        return self._cut_at_last_atom(written)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset({key for key, token in added.items() if token.special} | set(self.tokenizer.all_special_ids))

    def _answer_ids(self, prompt: str, prompt_ids: list[int], kept: str) -> list[int]:
        """Tokens of an answer behind its prompt.

        Those of the whole text, where the prompt is cut in the same way with and without the answer; else the answer's
        own: at inference the prompt stands alone, and a token over both would never be seen there.
        """
        whole = self._prompt_ids(prompt + kept)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        self.counts["boundary_merged"] += 1
        return self._ids(kept)

    def _reference(self, prompt: str, kept: str) -> str:
        ending = self.ending
        body = kept
        if not ending.appended and ending.kept and body.endswith(ending.kept):
            body = body[: len(body) - len(ending.kept)]
        visible = self.frame.after(prompt).visible(body)
        return self.frame.without_special_tokens(visible).strip()

    def _renders_alike(self, messages: Sequence[Message], last: Message, tools: str) -> bool:
        """Whether a conversation is the same text with another last message."""
        try:
            other = self.render([*messages[:-1], last], tools, generation=False)
        except TemplateRefusal:
            return False
        return other == self.render(messages, tools, generation=False)

    def _check_thinking(self, prompt: str, kept: str) -> None:
        """Refuse thoughts behind a prompt that has closed its thinking block (`enable_thinking: false`)."""
        for first, last in _THINKING_TAGS:
            if prompt.rstrip().endswith(last) and kept.lstrip().startswith(first):
                raise TemplateRefusal(
                    "the row has reasoning, but the prompt closes the thinking block before the answer; drop "
                    "enable_thinking: false from data.chat_template_kwargs, or the reasoning from the row"
                )

    def _check_rendered(self, prompt: str, kept: str, messages: Sequence[Message], tools: str) -> None:
        """Compare what a row says with what the template made of it."""
        message = messages[-1]
        if tools and self.render(messages[:-1], generation=True) == prompt:
            raise TemplateRefusal("the model's chat template does not render tools, but the row has some")
        if message.tool_calls and self._renders_alike(messages, replace(message, tool_calls=""), tools):
            raise TemplateRefusal("the model's chat template does not render tool_calls, but the row has some")
        if message.reasoning and _squeezed(message.reasoning) not in _squeezed(kept):
            raise TemplateRefusal("the model's chat template does not render reasoning_content")
        answer = self.frame.visible(message.content)
        if _squeezed(answer) not in _squeezed(kept):
            if not self.frame.after(prompt).visible(kept).strip():
                raise TemplateRefusal("the model's chat template does not render the answer")
            self.counts["answer_changed"] += 1
        squeezed = _squeezed(prompt)
        for earlier in messages[:-1]:
            if earlier.role in ("system", "developer", "user") and _squeezed(earlier.content) not in squeezed:
                self.counts["user_dropped" if earlier.role == "user" else "system_dropped"] += 1
                break

    def _marked(
        self, messages: Sequence[Message], tools: str, prompt_ids: list[int], answer_ids: list[int]
    ) -> list[bool]:
        """Return which tokens of an answer are learnt: those that the template's own markers name, through the end."""
        everything = [True] * len(answer_ids)
        if not self.has_markers:
            return everything
        encoded = self.tokenizer.apply_chat_template(
            self._dictionaries(messages),
            tools=_tool_list(tools),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **self.template_kwargs,
        )
        ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
        row = [*prompt_ids, *answer_ids]
        common = len(_common(ids, row))
        marked = [bool(flag) for flag in mask[len(prompt_ids) : common]]
        if common < len(prompt_ids) or not any(marked):
            self.counts["markers_unusable"] += 1
            return everything
        marked += [False] * (len(answer_ids) - len(marked))
        last = max(place for place, flag in enumerate(marked) if flag)
        learnt = marked[: last + 1] + [True] * (len(answer_ids) - last - 1)
        if not learnt[0]:
            self.counts["markers_begin_late"] += 1
        return learnt


def _template_errors() -> tuple[type[Exception], ...]:
    """What rendering a template raises: jinja's own errors, and those of the expressions in it."""
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError)


def _tool_list(tools: str) -> list[dict[str, Any]] | None:
    import json

    return json.loads(tools) if tools else None


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


def _ended_once(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Drop end tokens that stand twice at the end: a text that brings its own gets no other."""
    while len(ids) > 1 and ids[-1] in ends and ids[-2] in ends:
        ids = ids[:-1]
    return ids
