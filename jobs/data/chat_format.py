"""Turn conversations into tokens: the prompt of a model, and exactly what it must write.

Training, metrics, `chat`, `serve` and exported models all build prompts and end tokens
with this module. The learnt part of a turn is what the model must write after the
prompt that the chat template renders for generation, up to and including the token that
ends the turn. It is found by rendering the conversation with and without the turn,
never by assuming a frame. docs/conversations.md states the rules for users. Length
limits are in `encoding.py`.

A change of the tokens needs a new version in `_PROMPT_FORMATS`
(`jobs/trials/trial_id.py`).
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

_QUESTION, _ANSWER, _REASON, _FOLLOW_UP = (
    "Question7f3a",
    "Answer7f3a",
    "Because7f3a",
    "Followup7f3a",
)
"""Texts of the probe conversations: no template contains them, and trimming does not change
them.
"""
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "Tool7f3a",
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "A key."}},
        },
    },
}
_PROBE_CALL = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "Tool7f3a", "arguments": {"key": "value"}},
}
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
    """One turn of the assistant, as the model sees it.

    `prompt_ids` followed by `answer_ids` is the example of this turn alone. Earlier turns
    of the same conversation may have other tokens, because some templates render them
    differently.
    """

    prompt_ids: list[int]
    """Tokens of the prompt."""
    answer_ids: list[int]
    """Tokens that the model must write; the last one ends the turn."""
    learnt: list[bool]
    """Whether each token of `answer_ids` is learnt. All are, unless the template's own markers
    exclude some.
    """
    reference: str
    """Text of the answer without frame and end token; metrics compare with it."""
    end: int | None
    """Token that ends the turn; None if neither the template nor the tokenizer has one."""


@dataclass(frozen=True)
class _RenderedTurn:
    """A rendered turn: the text between the prompt and the end of the conversation.

    `prompt` is rendered for generation, and `whole` without the generation prompt. `prompt`
    + `text` need not equal `whole`: templates may render the prompt differently once an
    answer follows.
    """

    prompt: str
    text: str
    """What the model must write, followed by what the template writes after it."""
    whole: str
    """The whole conversation as the template renders it."""
    added: int = 0
    """Number of characters at the beginning of `text` that the template does not render: they
    close a thinking block. The remaining characters are the end of `whole`.
    """


@dataclass(frozen=True)
class _TurnEnding:
    """The way in which a template ends a turn of the assistant."""

    tail: str
    """Text that the template writes after the answer if nothing follows."""
    kept: str
    """Part of `tail` that the model must write: through the end token, or through `closing`."""
    token: int | None
    """Token that ends the turn; None if neither the template nor the tokenizer has one."""
    appended: bool
    """True if the template does not write `token` itself."""
    closing: str = ""
    """Text that ends a turn in a template whose end of turn is not a single token."""


class ChatFormat:
    """The chat template of one model, as this job uses it.

    What the template does is found with probe conversations, once, when it is first needed.
    `counts` collects what happened to rows; `evaluation/tokens.py` turns it into notes.

    Args:
        tokenizer: The model's tokenizer.
        end_ids: The model's own end tokens (its generation_config).
        template_kwargs: Variables for the chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Sequence[int] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, template_kwargs)
        eos = tokenizer.eos_token_id
        # The tokenizer's end token comes first: it is the one that is appended where a template
        # writes none.
        self.model_ends = list(dict.fromkeys([*([eos] if eos is not None else []), *end_ids]))
        self.counts: Counter[str] = Counter()
        """How often each thing that a user should know happened since the format was made
        (evaluation/tokens.py).
        """

    @property
    def start_ids(self) -> list[int]:
        """Return the tokens that precede a prompt if there is no chat template to begin it.

        Templates write the start token themselves. Adding another would give the model two.
        """
        bos = self.tokenizer.bos_token_id
        return [] if self.template.source or bos is None else [bos]

    @cached_property
    def ending(self) -> _TurnEnding:
        """Return how this template ends a turn; found with a probe conversation.

        Raises:
            TemplateRefusal: If the template does not render the assistant's messages.
        """
        conversation = [Message("user", _QUESTION), Message("assistant", _ANSWER)]
        rendered = self.template.render(conversation, generation=False)
        position = rendered.rfind(_ANSWER)
        if position < 0:
            raise TemplateRefusal("the chat template does not render the assistant's messages")
        return self._find_ending(
            rendered[position + len(_ANSWER) :], self._render_follow_up(conversation)
        )

    def _render_follow_up(self, conversation: list[Message]) -> str | None:
        """Return the text between an answer and the question after it.

        Returns None if the template refuses such a conversation.
        """
        try:
            rendered = self.template.render(
                [*conversation, Message("user", _FOLLOW_UP)], generation=False
            )
        except TemplateRefusal:
            return None
        begin, end = rendered.rfind(_ANSWER), rendered.find(_FOLLOW_UP)
        return rendered[begin + len(_ANSWER) : end] if 0 <= begin < end else None

    def _find_ending(self, tail: str, follow_up: str | None) -> _TurnEnding:
        """Return how a turn ends, given the text after its answer.

        Args:
            tail: Text after the answer if nothing follows.
            follow_up: Text between the answer and a following question; None if the template
                refuses one.
        """
        tail_ids = self.template.encode(tail)
        follow_ids = tail_ids if follow_up is None else self.template.encode(follow_up)
        # What follows an answer both at the end and before another question belongs to the turn.
        # What differs belongs to the end of the conversation or to the next turn.
        common = _find_common_prefix(tail_ids, follow_ids)
        final_only = tail_ids[len(common) :]
        candidates = [token for token in common if token in self.template.atoms]
        if not candidates:
            candidates = [token for token in tail_ids if token in self.template.atoms]
        # A token at which the model already stops is preferred to any other that the template
        # writes.
        declared = [token for token in candidates if token in self.model_ends]
        if candidates:
            # Tokens that come only at the end of a conversation (`<|end|>\n<|endoftext|>`, a header
            # that is always added) are not part of this turn. Otherwise the last token closes it
            # (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`).
            undeclared = candidates[0] if final_only else candidates[-1]
            token = declared[0] if declared else undeclared
            return _TurnEnding(tail, self._cut_after_token(tail, token), token, appended=False)
        # No token of its own ends the turn: a base model's ChatML, for example, writes `<|im_end|>`
        # as plain text. The model learns that text and then an end token, because only a token
        # stops generation.
        closing = _find_common_ending(tail, tail if follow_up is None else follow_up)
        written_tail = tail[: tail.find(closing) + len(closing)] if closing else ""
        next_ids = follow_ids[len(common) : len(common) + 1]
        has_speaker_end = (
            bool(next_ids) and next_ids[0] in self.model_ends
        )  # GLM: the next speaker's token ends the turn
        default_end = self.model_ends[0] if self.model_ends else None
        return _TurnEnding(
            tail,
            written_tail,
            next_ids[0] if has_speaker_end else default_end,
            appended=True,
            closing=closing,
        )

    def _cut_after_token(self, text: str, token: int) -> str:
        """Return a text up to and including the first occurrence of a token.

        The whole text if the token's text does not occur in it: byte-level tokenizers show a
        token by other characters than it decodes to.
        """
        token_text = self.template.get_token_text(token)
        position = text.find(token_text)
        return text[: position + len(token_text)] if position >= 0 else text

    @cached_property
    def call_end(self) -> int | None:
        """Return the token that ends a turn of tool calls; None if the template renders none.

        It may differ from the token that ends an answer: gpt-oss ends calls with a token of its
        own.
        """
        messages = [
            Message("user", _QUESTION),
            Message("assistant", "", tool_calls=json.dumps([_PROBE_CALL])),
        ]
        try:
            rendered_turn = self._split_turn(messages, 1, json.dumps([_PROBE_TOOL]))
            return self._cut_turn(rendered_turn, messages, json.dumps([_PROBE_TOOL]))[1]
        except TemplateRefusal:
            return None

    @cached_property
    def ends(self) -> list[int]:
        """Return the tokens that end an answer: the model's own and those of this template.

        Generation must stop at any of them. Base models often declare only the tokenizer's end
        token, while the template ends turns with another.
        """
        return self._run_probe(
            lambda: list(dict.fromkeys([*self.model_ends, *self._template_ends]))
        )

    @property
    def _template_ends(self) -> list[int]:
        """Return the tokens with which this template ends answers and tool calls."""
        return [token for token in (self.ending.token, self.call_end) if token is not None]

    @cached_property
    def generation_prompt(self) -> Literal["added", "missing", "always"]:
        """Return when the template begins an answer: on request, never, or always.

        Returns:
            `added`: with `add_generation_prompt`, as usual. `missing`: never, so the model
                writes the header of its turn itself. `always`: every rendered text ends with
                the header of the next answer, which is not learnt.
        """
        question = [Message("user", _QUESTION)]
        if self.template.render(question, generation=True) != self.template.render(
            question, generation=False
        ):
            return "added"
        has_more = self.ending.tail.strip() != self.ending.kept.strip()
        return (
            "always"
            if has_more
            and self._render_probe_answer(Message("assistant", _ANSWER)).startswith(_ANSWER)
            else "missing"
        )

    @cached_property
    def frame(self) -> AnswerFrame:
        """Return what the model writes around its answer; found with probe conversations."""
        return self._run_probe(self._find_frame)

    def _run_probe(self, probe: Callable[[], _Result]) -> _Result:
        """Run a probe without counting its events: probes are not rows."""
        counts = self.counts.copy()
        try:
            return probe()
        finally:
            self.counts = counts

    def _find_frame(self) -> AnswerFrame:
        """Return the answer frame, found with probe conversations."""
        answer_text = self._render_probe_answer(Message("assistant", _ANSWER))
        before = answer_text[: answer_text.rfind(_ANSWER)].strip()
        reason_before, reason_after = self._reasoning_frame
        open_tags = self._find_open_thinking(
            self.template.render([Message("user", _QUESTION)], generation=True)
        )
        # A thinking block that the prompt leaves open is the surest sign. Otherwise the probes
        # decide: with and without reasoning, then one of them alone.
        if open_tags is not None:
            opener, marker = (self._encode_and_decode(tag) for tag in open_tags)
        elif before and reason_after:
            # Directly before the answer, both probes have the same text: the common end is the
            # marker. What they have in common at the beginning is the opener.
            marker = commonprefix([before[::-1], reason_after[::-1]])[::-1].strip() or before
            opener = commonprefix([before, reason_before]).strip() or before
        elif before:
            tags = next(
                ((first, last) for first, last in _THINKING_TAGS if last in before),
                (before, before),
            )
            opener, marker = tags
        elif reason_after:
            marker, opener = reason_after, reason_before or THINKING[0]
        else:
            opener, marker = THINKING
        # If no template is known to write a frame, a `<think>` in an answer is ordinary text, and
        # must not hide the rest.
        writes_frames = (
            before
            or reason_after
            or open_tags
            or any(tag in self.template.source for tag in (opener, marker))
        )
        closing = self._encode_and_decode(self.ending.closing)
        # A separate end token of calls shows that no answer follows (gpt-oss). If calls and answers
        # end with the same token, only the frame can show it.
        call_end_tokens = [self.call_end] if self.call_end not in (None, self.ending.token) else []
        return AnswerFrame(
            marker,
            opener,
            strict=bool(writes_frames),
            closing=closing,
            special_tokens=self.template.special_texts,
            call_ends=tuple(token for token in call_end_tokens if token is not None),
        )

    @cached_property
    def _reasoning_frame(self) -> tuple[str, str]:
        """Return the texts before and after an answer's reasoning; empty if it is not rendered."""
        try:
            answer_text = self._render_probe_answer(
                Message("assistant", _ANSWER, reasoning=_REASON)
            )
        except TemplateRefusal:
            return "", ""
        if _REASON not in answer_text or _ANSWER not in answer_text:
            return "", ""
        before, _, after = answer_text.partition(_REASON)
        return before.strip(), after[: after.rfind(_ANSWER)].strip()

    def _render_probe_answer(self, answer: Message) -> str:
        """Return what the model writes for a probe's answer, as its tokens are decoded.

        Decoding may add spaces around special tokens (sentencepiece), and predictions are decoded
        too.
        """
        messages = [Message("user", _QUESTION), answer]
        rendered_turn = self._split_turn(messages, 1, "")
        answer_text, _ = self._cut_turn(rendered_turn, messages, "")
        decoded = self._encode_and_decode(answer_text)
        return decoded if _ANSWER in decoded else answer_text

    def _encode_and_decode(self, text: str) -> str:
        """Return a text as its tokens are decoded."""
        return self.template.decode(self.template.encode(text)).strip() if text else text

    def _find_open_thinking(self, prompt: str) -> tuple[str, str] | None:
        """Return the tags of the thinking block that a prompt leaves open, or None."""
        return next((tags for tags in _THINKING_TAGS if prompt.rstrip().endswith(tags[0])), None)

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a plain text.

        The start token is added unless the text already begins with it.
        """
        ids, bos = self.template.encode(text), self.tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def encode_prompt(self, messages: Sequence[Message], tools: str = "") -> list[int]:
        """Return the tokens of a prompt: what the model reads before it answers.

        Args:
            messages: The conversation up to the question or the tool's answer.
            tools: Tool descriptions as JSON; empty for none.

        Raises:
            TemplateRefusal: If the template refuses the conversation.
        """
        return self._add_start_token(
            self.template.encode(self.template.render(messages, tools, generation=True))
        )

    def _add_start_token(self, ids: list[int]) -> list[int]:
        """Return a prompt's tokens with the start token, unless text or template have it."""
        start_tokens = self.start_ids
        return ids if start_tokens and ids[:1] == start_tokens else [*start_tokens, *ids]

    def encode_turn(self, messages: Sequence[Message], index: int, tools: str = "") -> Turn:
        """Return the assistant's turn at `index`, with its prompt rendered as for generation.

        Messages after `index` are ignored. What the template changes without loss is counted in
        `counts`.

        Args:
            messages: The conversation.
            index: Position of the assistant's message.
            tools: Tool descriptions as JSON; empty for none.

        Raises:
            TemplateRefusal: If the template drops a part of the row.
        """
        context = messages[: index + 1]
        rendered_turn = self._split_turn(context, index, tools)
        answer_text, end = self._cut_turn(rendered_turn, context, tools)
        self._check_thinking(rendered_turn.prompt, answer_text)
        self._check_rendered(rendered_turn.prompt, answer_text, context, tools)
        bare_prompt_ids = self.template.encode(rendered_turn.prompt)
        prompt_ids = self._add_start_token(bare_prompt_ids)
        answer_ids, offsets = self._encode_answer(
            rendered_turn.prompt, bare_prompt_ids, answer_text
        )
        learnt = self._mark_learnt_tokens(rendered_turn, answer_text, context, tools, offsets)
        # The token that ends the turn is always learnt, also where the template or the tokenizer
        # leaves it out.
        if end is not None and answer_ids[-1:] != [end]:
            answer_ids, learnt = [*answer_ids, end], [*learnt, True]
        while len(answer_ids) > 1 and {answer_ids[-1], answer_ids[-2]} <= {*self.ends, end}:
            answer_ids, learnt = (
                answer_ids[:-1],
                learnt[:-1],
            )  # the text already has an end token of its own
        reference = self._make_reference(
            rendered_turn.prompt, prompt_ids, answer_ids, answer_text, context[index]
        )
        return Turn(prompt_ids, answer_ids, learnt, reference, end)

    def _split_turn(self, messages: Sequence[Message], index: int, tools: str) -> _RenderedTurn:
        """Split the rendered conversation into the generation prompt and the turn after it.

        Usually the rendered conversation begins with the generation prompt. If not, the
        beginning of the answer is looked for after the last message, after the header of the
        answer, and at the end of the text, in this order.

        Raises:
            TemplateRefusal: If the answer cannot be found without doubt.
        """
        context = messages[:index]
        prompt = self.template.render(context, tools, generation=True)
        rendered = self.template.render(messages[: index + 1], tools, generation=False)
        if rendered.startswith(prompt):
            return _RenderedTurn(prompt, rendered[len(prompt) :], rendered)
        closed_turn = self._close_thinking(prompt, rendered, messages[index])
        if closed_turn is not None:
            self.counts["thinking_closed"] += 1
            return closed_turn
        self.counts["prompt_differs"] += 1
        unanswered = self.template.render(context, tools, generation=False)
        start = _find_answer_after_last_message(prompt, unanswered, rendered, context)
        if start is None:
            start = _find_answer_after_header(prompt, unanswered, rendered)
        if start is None:
            start = self._find_answer_at_end(rendered, messages[index])
        if start is None:
            raise TemplateRefusal(
                "the model's chat template renders the prompt differently when an answer follows, "
                "so lorafleet cannot find the answer in the rendered text; name another template "
                "in data.chat_template"
            )
        return _RenderedTurn(prompt, rendered[start:], rendered)

    def _close_thinking(self, prompt: str, rendered: str, message: Message) -> _RenderedTurn | None:
        """Return the turn after a prompt that ends in an open thinking block, or None.

        The template renders the answer without that block (DeepSeek) or closes it at once
        (Nemotron). At inference the prompt opens the block, so the model must close it before
        its answer, and learns to do so.

        Returns:
            The turn; None if the prompt does not end in such a block.
        """
        tags = self._find_open_thinking(prompt)
        if tags is None:
            return None
        opening_tag, closing_tag = tags
        before = prompt.rstrip().removesuffix(opening_tag)
        if not rendered.startswith(before):
            return None
        remainder = rendered[len(before) :].removeprefix(opening_tag)
        reasoning = message.reasoning.strip()
        if not reasoning and closing_tag in message.content:
            reasoning = message.content.partition(closing_tag)[0].replace(opening_tag, "").strip()
        if remainder.lstrip().startswith(closing_tag) or (
            reasoning and remainder.lstrip().startswith(reasoning)
        ):
            return _RenderedTurn(prompt, remainder.lstrip(), rendered)
        # The template shows neither the reasoning nor the end of the block. Both are written as
        # models with `<think>` write them.
        closed_block = f"{reasoning}\n{closing_tag}\n\n"
        return _RenderedTurn(
            prompt, f"{closed_block}{remainder}", rendered, added=len(closed_block)
        )

    def _find_answer_at_end(self, rendered: str, message: Message) -> int | None:
        """Return where the answer at the end of a rendered conversation begins, or None."""
        for content in (message.content, message.content.strip()):
            ending_text = f"{content}{self.ending.tail}"
            if content.strip() and rendered.endswith(ending_text):
                return len(rendered) - len(ending_text)
        return None

    def _cut_turn(
        self, rendered_turn: _RenderedTurn, messages: Sequence[Message], tools: str
    ) -> tuple[str, int | None]:
        """Return the text that the model writes of a turn, and the token that must end it.

        The text excludes what the template adds after the turn, such as a newline or the end of
        the conversation.

        Returns:
            The text, and the end token; None if neither the template nor the tokenizer has one.
        """
        ending, text = self.ending, rendered_turn.text
        has_calls = bool(messages[-1].tool_calls)
        # The ending was found with a plain answer. Calls may end differently.
        if has_calls and (ending.appended or not text.endswith(ending.tail)):
            return self._cut_calls(rendered_turn, messages, tools)
        if text.endswith(ending.tail):
            return text[: len(text) - len(ending.tail)] + ending.kept, ending.token
        if text.rstrip().endswith(ending.tail.rstrip()):
            shorter = text.rstrip()
            return shorter[: len(shorter) - len(ending.tail.rstrip())] + ending.kept, ending.token
        return self._cut_at_last_atom(text)

    def _cut_at_last_atom(self, text: str) -> tuple[str, int | None]:
        """Cut after a special token that ends a text; without one, append the end token."""
        answer_text = text.rstrip()
        ids = self.template.encode(answer_text)
        ends_itself = bool(ids) and ids[-1] in self.template.special_ids
        return answer_text, ids[-1] if ends_itself else self.ending.token

    def _cut_calls(
        self, rendered_turn: _RenderedTurn, messages: Sequence[Message], tools: str
    ) -> tuple[str, int | None]:
        """Cut a turn that ends in tool calls.

        The conversation is rendered once more with a tool's answer after it. What both texts
        have in common is what the model writes; a special token at the cut ends the turn.

        Returns:
            The text, and the end token; None if there is none.
        """
        call = messages[-1].calls[0]
        name, call_id = str(call["function"]["name"]), str(call.get("id") or "")
        answer = Message("tool", _FOLLOW_UP, name=name, tool_call_id=call_id)
        begin = len(rendered_turn.whole) - len(rendered_turn.text) + rendered_turn.added
        try:
            rendered_with_answer = self.template.render(
                [*messages, answer], tools, generation=False
            )
        except TemplateRefusal:
            return self._cut_at_last_atom(rendered_turn.text)
        if not rendered_with_answer.startswith(rendered_turn.whole[:begin]):
            return self._cut_at_last_atom(rendered_turn.text)
        common_text = commonprefix([rendered_turn.whole, rendered_with_answer])
        answer_text = (rendered_turn.text[: rendered_turn.added] + common_text[begin:]).rstrip()
        ids = self.template.encode(answer_text)
        if ids and ids[-1] in self.template.special_ids:
            return answer_text, ids[-1]
        # GLM has no end of a turn: the token that names the next speaker stops generation.
        following = self.template.encode(rendered_with_answer[len(common_text) :].lstrip())[:1]
        if following and following[0] in self.template.special_ids and self.ending.appended:
            return answer_text, following[0]
        return answer_text, self.ending.token

    def _encode_answer(
        self, prompt: str, bare_prompt_ids: list[int], answer_text: str
    ) -> tuple[list[int], list[Range]]:
        """Return an answer's tokens after its prompt, and the characters that each one covers.

        The tokens of the whole text are used if the prompt has the same tokens with and without
        the answer. Otherwise the answer is encoded alone: at inference the prompt stands alone,
        and a token that spans both would never occur there.

        Args:
            prompt: Text of the prompt.
            bare_prompt_ids: Tokens of the prompt alone, without a start token.
            answer_text: Text of the answer.

        Returns:
            The token ids, and for each of them its range of characters, counted from the
                beginning of the answer.
        """
        encode = self._encode_with_offsets
        ids, offsets = encode(prompt + answer_text)
        if ids[: len(bare_prompt_ids)] == bare_prompt_ids:
            shifted = [
                (first - len(prompt), last - len(prompt))
                for first, last in offsets[len(bare_prompt_ids) :]
            ]
            return ids[len(bare_prompt_ids) :], shifted
        self.counts["boundary_merged"] += 1
        return encode(answer_text)

    def _encode_with_offsets(self, text: str) -> tuple[list[int], list[Range]]:
        """Return the tokens of a text and the characters that each one covers.

        The characters are zeros unless the template has markers, which alone need them: slow
        tokenizers have no offsets.
        """
        if self.template.has_markers:
            return self.template.encode_with_offsets(text)
        ids = self.template.encode(text)
        return ids, [(0, 0)] * len(ids)

    def _make_reference(
        self,
        prompt: str,
        prompt_ids: list[int],
        answer_ids: list[int],
        answer_text: str,
        message: Message,
    ) -> str:
        """Return what metrics extract from a model that writes exactly what is learnt.

        References and predictions are processed in the same way.
        """
        # An answer may contain an end token. Generation would stop at the first one, so the
        # reference stops there too.
        end_index = next(
            (position for position, token in enumerate(answer_ids) if token in self.ends),
            len(answer_ids),
        )
        frame = self.frame.adapt_to_prompt(self.template.decode(prompt_ids[-PROMPT_TAIL:]))
        end = answer_ids[end_index] if end_index < len(answer_ids) else None
        reference = frame.decode_answer(answer_ids[:end_index], self.template.decode, end)
        if end_index < len(answer_ids) - 1:
            self.counts["end_inside"] += 1
        if not reference and message.tool_calls:
            self.counts["no_answer"] += (
                1  # the frame holds only calls: there is no answer text to compare
            )
            return self.template.decode(answer_ids, True).strip()
        # Compare the reference with the text before it was tokenized: a tokenizer that lower-cases
        # or lacks a word cannot give the text back.
        text = self.frame.remove_special_tokens(
            self.frame.adapt_to_prompt(prompt).extract_visible_text(answer_text)
        )
        if end_index >= len(answer_ids) - 1 and _remove_spaces(text) != _remove_spaces(reference):
            self.counts["answer_lossy"] += 1
        return reference

    def _check_thinking(self, prompt: str, answer_text: str) -> None:
        """Refuse reasoning after a prompt that closes its thinking block (`enable_thinking:
        false`).
        """
        for opening_tag, closing_tag in _THINKING_TAGS:
            if prompt.rstrip().endswith(closing_tag) and answer_text.lstrip().startswith(
                opening_tag
            ):
                raise TemplateRefusal(_THINKS_AFTER_ALL)

    def _check_rendered(
        self, prompt: str, answer_text: str, messages: Sequence[Message], tools: str
    ) -> None:
        """Compare the content of a turn with what the template rendered of it.

        White space is ignored, because templates trim and re-indent. An answer that the
        template changes is learnt as rendered, and counted.

        Raises:
            TemplateRefusal: If tool calls, reasoning or the whole answer are dropped.
        """
        message = messages[-1]
        if message.tool_calls:
            self._check_calls(messages, message, tools)
        self._check_reasoning(prompt, answer_text, messages)
        answer = self.frame.extract_visible_text(message.content)
        if _remove_spaces(answer) not in _remove_spaces(answer_text):
            if not self.frame.adapt_to_prompt(prompt).extract_visible_text(answer_text).strip():
                raise TemplateRefusal("the model's chat template does not render the answer")
            self.counts["answer_changed"] += 1

    def check_context(self, messages: Sequence[Message], tools: str = "") -> None:
        """Compare everything before the last turn with what the template rendered of it.

        Call it once a conversation, before its turns are encoded. Dropped system and user
        messages are counted.

        Args:
            messages: The whole conversation, with its last answer.
            tools: Tool descriptions as JSON; empty for none.

        Raises:
            TemplateRefusal: If tools, tool calls or tool answers are dropped.
        """
        prompt = self.template.render(messages[:-1], tools, generation=True)
        # Templates describe tools in many layouts. Rendering with and without them shows for any
        # layout whether they are used.
        if tools and self.template.render(messages[:-1], generation=True) == prompt:
            raise TemplateRefusal(
                "the row has tools, but the model's chat template does not render them; name "
                "another template in data.chat_template"
            )
        squeezed = _remove_spaces(prompt)
        for message in messages[:-1]:
            # Calls that are learnt are checked when their turn is encoded.
            if message.tool_calls and not message.learn:
                self._check_calls(messages, message, tools)
            if _is_rendered(message.content, squeezed):
                continue
            if message.role == "tool":
                raise TemplateRefusal(
                    "the model's chat template does not render answers of tools; name another "
                    "template in data.chat_template"
                )
            if message.role == "user":
                self.counts["user_dropped"] += 1
            elif message.role != "assistant":
                self.counts["system_dropped"] += 1
        # A user can type `<|im_end|>`. The tokenizer reads it as that token, as it would at
        # inference.
        pattern = self.template.special_pattern
        if pattern is not None and any(pattern.search(message.content) for message in messages):
            self.counts["special_inside"] += 1

    def _check_reasoning(self, prompt: str, answer_text: str, messages: Sequence[Message]) -> None:
        """Refuse reasoning that the template never renders.

        Reasoning of earlier turns may be left out, as at inference.
        """
        message = messages[-1]
        if message.reasoning and _remove_spaces(message.reasoning) not in _remove_spaces(
            answer_text
        ):
            is_closed = any(
                prompt.rstrip().endswith(closing_tag) for _, closing_tag in _THINKING_TAGS
            )
            raise TemplateRefusal(_THINKS_AFTER_ALL if is_closed else _NO_REASONING)
        has_reasoning = any(earlier.reasoning for earlier in messages[:-1])
        if (
            has_reasoning
            and not self._reasoning_frame[1]
            and self._find_open_thinking(prompt) is None
        ):
            raise TemplateRefusal(_NO_REASONING)

    def _check_calls(self, messages: Sequence[Message], message: Message, tools: str) -> None:
        """Refuse tool calls that the template does not render, or not completely.

        Templates write calls in many forms, so the text cannot be searched for them. Instead
        each call, and the arguments of each, are left out in turn: if the text does not change,
        the template does not render them.

        Raises:
            TemplateRefusal: If a call or its arguments are not rendered.
        """
        calls = message.calls
        # By identity: an equal message may occur earlier in the conversation.
        position = next(number for number, candidate in enumerate(messages) if candidate is message)
        shorter = [json.dumps(calls[:number] + calls[number + 1 :]) for number in range(len(calls))]
        variants = [""] if len(calls) == 1 else shorter
        for number, call in enumerate(calls):
            if call["function"]["arguments"]:
                call_without_arguments = {**call, "function": {**call["function"], "arguments": {}}}
                variants.append(
                    json.dumps([*calls[:number], call_without_arguments, *calls[number + 1 :]])
                )
        rendered = self.template.render(messages[: position + 1], tools, generation=False)
        for variant in variants:
            changed_messages = [*messages[:position], replace(message, tool_calls=variant)]
            if self._is_rendered_as(changed_messages, tools, rendered):
                raise TemplateRefusal(
                    "the model's chat template does not render all tool_calls of the row"
                )

    def _is_rendered_as(self, messages: Sequence[Message], tools: str, text: str) -> bool:
        """Return whether the template renders a conversation as the given text."""
        try:
            return self.template.render(messages, tools, generation=False) == text
        except TemplateRefusal:
            return False

    def _mark_learnt_tokens(
        self,
        rendered_turn: _RenderedTurn,
        answer_text: str,
        messages: Sequence[Message],
        tools: str,
        offsets: Sequence[Range],
    ) -> list[bool]:
        """Return which tokens of an answer are learnt.

        These are the tokens that the template's own markers select, through the end of the
        turn; without markers, all.

        Args:
            rendered_turn: The turn as it was rendered.
            answer_text: Text of the answer, as it was cut.
            messages: The conversation up to the turn.
            tools: Tool descriptions as JSON; empty for none.
            offsets: Range of characters of each token, counted from the beginning of the
                answer.
        """
        all_learnt = [True] * len(offsets)
        if not self.template.has_markers:
            return all_learnt
        # The markers count characters of the whole conversation, and the offsets those of the
        # answer.
        shift = len(rendered_turn.whole) - len(rendered_turn.text)
        clipped = [
            (
                max(token_begin - shift, rendered_turn.added),
                min(token_end - shift, len(answer_text)),
            )
            for token_begin, token_end in self.template.find_marked_ranges(messages, tools)
        ]
        marked = [
            (token_begin, token_end)
            for token_begin, token_end in clipped
            if token_begin < token_end
        ]
        if not marked:
            self.counts["markers_unusable"] += 1
            return all_learnt
        last_marked = max(token_end for _, token_end in marked)
        # Markers often end before the end token, and cannot cover what was added to close a
        # thinking block. The model must write both.
        marked += [(0, rendered_turn.added), (last_marked, len(answer_text))]
        learnt = [
            any(token_begin < end and begin < token_end for begin, end in marked)
            for token_begin, token_end in offsets
        ]
        if not learnt[0]:
            self.counts["markers_begin_late"] += 1
        return learnt


_NO_REASONING = (
    "the row has reasoning_content, but the model's chat template does not render it; name another "
    "template in data.chat_template"
)
_THINKS_AFTER_ALL = (
    "the row has reasoning, but the prompt closes the thinking block before the answer; remove "
    "enable_thinking: false from data.chat_template_kwargs, or the reasoning from the row"
)


def _find_answer_after_last_message(
    prompt: str, unanswered: str, rendered: str, context: Sequence[Message]
) -> int | None:
    """Return where the answer begins after the last message and the header, or None.

    Args:
        prompt: The conversation without the answer, rendered for generation.
        unanswered: The same, without the generation prompt.
        rendered: The conversation with the answer.
        context: The messages before the answer.
    """
    question = context[-1].content.strip() if context else ""
    position = prompt.rfind(question) if question else -1
    if position < 0:
        return None
    header = prompt[position + len(question) :]
    if rendered.startswith(unanswered) and question in unanswered:
        begin = unanswered.rfind(question)
    else:  # the template renders the last message differently once an answer follows
        begin = rendered.find(
            question, max(0, len(commonprefix([unanswered, rendered])) - len(question))
        )
    end = begin + len(question)
    return end + len(header) if begin >= 0 and header and rendered.startswith(header, end) else None


def _find_answer_after_header(prompt: str, unanswered: str, rendered: str) -> int | None:
    """Return where the answer begins after the generation prompt, or None.

    The generation prompt must occur exactly once after the context.
    """
    header = prompt.removeprefix(unanswered)
    if header == prompt or not header.strip():
        return None
    start = len(commonprefix([unanswered, rendered]))
    return (
        rendered.find(header, start) + len(header) if rendered.count(header, start) == 1 else None
    )


def _find_common_prefix(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Return the tokens with which both sequences begin."""
    shared = []
    for first_token, second_token in zip(first, second, strict=False):
        if first_token != second_token:
            break
        shared.append(first_token)
    return shared


def _find_common_ending(tail: str, follow_up: str) -> str:
    """Return the text that ends a turn in any case.

    It is what the text after the last answer has in common with the text before another turn.
    """
    common_text = commonprefix([tail, follow_up])
    if common_text != tail:
        common_text = common_text[
            : common_text.rfind("\n") + 1
        ]  # the text after this is the beginning of the next turn
    return common_text.strip()


def _remove_spaces(text: str) -> str:
    """Return a text without white space: templates trim and re-indent."""
    return "".join(text.split())


def _is_rendered(content: str, squeezed: str) -> bool:
    """Return whether a text occurs in a prompt without spaces, as it is or as JSON."""
    return (
        _remove_spaces(content) in squeezed
        or _remove_spaces(json.dumps(content, ensure_ascii=False)[1:-1]) in squeezed
    )
