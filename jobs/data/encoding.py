"""Encode a row as the tokens to train on.

Decides which turns of a conversation are learnt together, and what is left out of a row
that is too long. What one turn looks like in tokens is decided in `chat_format.py`.
Batches and padding come later, in `training/data.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lorafleet.jobs.data.chat_format import ChatFormat, Turn
from lorafleet.jobs.data.chat_template import TemplateRefusal
from lorafleet.jobs.data.conversation import Message, find_learnable_turns
from lorafleet.jobs.data.row_formats import Row

_PROMPT_TAIL_TOKENS = 16


@dataclass(frozen=True)
class Example:
    """One sequence of tokens to train on. A row gives one, or one for each learnt turn.

    `ids` and `learnt` have the same length, at most `max_length` of the encoder.
    """

    ids: list[int]
    learnt: list[bool]
    """Whether each token is learnt. The first token never is, because nothing precedes it."""
    answer_start: int
    """Position of the first token of the last answer."""


@dataclass(frozen=True)
class EncodedRow:
    """A row's examples, and the text of its last learnt answer."""

    examples: list[Example]
    reference: str


class RowEncoder:
    """Encodes rows as examples with one chat format, and counts what it had to change.

    `evaluation/tokens.py` creates one encoder for each split, because `counts` and `ends`
    are reported by split.

    Args:
        chat_format: Chat format of the model.
        max_length: Maximum tokens of an example.
        train_on_turns: Whether to learn all answers or only the last one.
        assistant_only_loss: Whether to learn only the assistant's tokens.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        max_length: int,
        *,
        train_on_turns: Literal["all", "last"] = "all",
        assistant_only_loss: bool = True,
    ) -> None:
        self.format, self.max_length = chat_format, max_length
        self.train_on_turns, self.assistant_only_loss = train_on_turns, assistant_only_loss
        self.counts: Counter[str] = Counter()
        """Rows that were `cut`, that lost their oldest turns (`shortened`), that became several
        examples (`split`, and how many `examples` those are), and examples of which a cut left
        `nothing` to learn.
        """
        self.ends: dict[int, None] = {}
        """Tokens with which learnt turns ended."""

    def encode(self, row: Row) -> EncodedRow:
        """Return a row's examples.

        Returns:
            At least one example, in the order of the turns, and the reference of the last
                learnt answer. An example may have nothing left to learn after a cut.

        Raises:
            TemplateRefusal: If the row has nothing to learn or cannot be rendered.
        """
        if not row.messages:
            return EncodedRow([self._encode_text(row.text)], row.reference)
        turns = find_learnable_turns(row.messages, self.train_on_turns)
        if not turns:
            raise TemplateRefusal(
                "there is nothing to learn in this conversation: every answer has weight 0 or "
                "train: false, or comes before the first question"
            )
        old_counts, old_format_counts = Counter(self.counts), Counter(self.format.counts)
        self.format.check_context(row.messages, row.tools)
        if self.assistant_only_loss:
            # Messages after the last learnt answer cannot influence it, and would only take up
            # room.
            encoded = self._encode_conversation(row.messages[: turns[-1] + 1], turns, row.tools)
        else:
            reference = self.format.encode_turn(row.messages, turns[-1], row.tools).reference
            encoded = EncodedRow([self._encode_all_tokens(row.messages, row.tools)], reference)
        for name in (
            "cut",
            "shortened",
        ):  # count each row once, however many of its examples were changed
            if self.counts[name] > old_counts[name]:
                self.counts[name] = old_counts[name] + 1
        for name, count in old_format_counts.items() | {
            (name, 0) for name in self.format.counts if name not in old_format_counts
        }:
            self.format.counts[name] = min(self.format.counts[name], count + 1)
        return encoded

    def encode_prompt(self, row: Row, max_tokens: int) -> list[int]:
        """Return the tokens before the last learnt answer, with which generation begins.

        For a row that is only a text: the beginning of the text, unchanged. A conversation is
        shortened as in training, so that metrics ask with the prompt that was learnt; then
        further exchanges are dropped until it fits.

        Args:
            row: The row.
            max_tokens: Maximum number of tokens.
        """
        if not row.messages:
            ids = self.format.encode_text(row.prompt)
            return fit_to_length(ids, [], max_tokens)[0]
        turns = find_learnable_turns(row.messages, "last")
        answered = row.messages[: turns[-1] + 1] if turns else row.messages
        messages = self._shorten_conversation(answered, row.tools)[0][
            :-1
        ]  # as in training: leaves room for the answer
        while True:
            ids = self.format.encode_prompt(messages, row.tools)
            shorter = _drop_oldest_exchange(messages)
            if len(ids) <= max_tokens or shorter is None:
                return fit_to_length(ids, [], max_tokens)[0]
            messages = shorter

    def _encode_text(self, text: str) -> Example:
        """Encode a plain text, which is learnt completely.

        Start and end tokens that the text already has are not added again.
        """
        ids = self.format.encode_text(text)
        ends = self.format.model_ends[:1]
        if ends and ends[0] in ids:  # a text may have its own end token with a newline after it
            end_index = len(ids) - 1 - ids[::-1].index(ends[0])
            ids = (
                ids
                if self.format.template.decode(ids[end_index + 1 :]).strip()
                else ids[: end_index + 1]
            )
        if ends and ids[-1:] != ends:
            ids = [*ids, *ends]
        if len(ids) > self.max_length:
            self.counts["cut"] += 1
            ids = ids[: self.max_length]
        return Example(ids, [False, *[True] * (len(ids) - 1)], 1)

    def _encode_conversation(
        self, messages: tuple[Message, ...], turns: list[int], tools: str
    ) -> EncodedRow:
        """Encode the learnt turns of a conversation, in one example if possible."""
        # Each turn is encoded with the prompt that the model would see at that point.
        encoded_turns = [self.format.encode_turn(messages, index, tools) for index in turns]
        self.ends |= {turn.end: None for turn in encoded_turns if turn.end is not None}
        last = encoded_turns[-1]
        # One example can cover all turns only if the last prompt contains each earlier turn token
        # by token. Qwen3, for example, drops earlier thinking blocks, so each turn needs an example
        # of its own.
        if not all(_is_prefix(last, turn) for turn in encoded_turns[:-1]):
            self.counts["split"] += 1
            self.counts["examples"] += len(turns)
            pairs = zip(turns, encoded_turns, strict=True)
            examples = [
                self._encode_single_turn(messages[: index + 1], tools, turn)
                for index, turn in pairs
            ]
            return EncodedRow(examples, last.reference)
        if _count_tokens(last) > self.max_length:
            shorter, _ = self._shorten_conversation(messages, tools, last)
            dropped = len(messages) - len(shorter)
            if dropped:
                self.counts["shortened"] += 1
                remaining_turns = [
                    index - dropped
                    for index in turns
                    if index - dropped > _count_system_messages(shorter)
                ]
                encoded_turns = [
                    self.format.encode_turn(shorter, index, tools) for index in remaining_turns
                ]
        return EncodedRow(self._build_examples(encoded_turns), last.reference)

    def _build_examples(self, turns: list[Turn]) -> list[Example]:
        """Return one example of all turns that fit together, and a cut one for each other turn.

        Turns that do not fit are too long although nothing more can be dropped: after one question,
        with many tool calls.
        """
        fitting = [turn for turn in turns if _count_tokens(turn) <= self.max_length]
        joined = (
            [_make_example([*fitting[-1].prompt_ids, *fitting[-1].answer_ids], fitting)]
            if fitting
            else []
        )
        return [*joined, *(self._cut_turn(turn) for turn in turns[len(fitting) :])]

    def _encode_single_turn(self, messages: tuple[Message, ...], tools: str, turn: Turn) -> Example:
        """Return the last turn as an example of its own.

        If it is too long, its oldest turns are left out.
        """
        shorter, turn = self._shorten_conversation(messages, tools, turn)
        if len(shorter) < len(messages):
            self.counts["shortened"] += 1
        if _count_tokens(turn) > self.max_length:
            return self._cut_turn(turn)
        return _make_example([*turn.prompt_ids, *turn.answer_ids], [turn])

    def _shorten_conversation(
        self, messages: tuple[Message, ...], tools: str, turn: Turn | None = None
    ) -> tuple[tuple[Message, ...], Turn]:
        """Return a conversation, and its last turn, without the oldest exchanges that do not fit.

        The number of exchanges to drop is found by bisection and from the prompt alone, because
        long conversations take long to render.

        Args:
            messages: The conversation; its last message is the assistant's.
            tools: Tool descriptions as JSON; empty for none.
            turn: The last turn, if it is encoded already.

        Returns:
            The messages that stay and their last turn. The turn is still too long if the last
                exchange alone does not fit.
        """
        turn = turn or self.format.encode_turn(messages, len(messages) - 1, tools)
        candidates = (
            _list_shorter_conversations(messages) if _count_tokens(turn) > self.max_length else []
        )
        if not candidates:
            return messages, turn
        answer_length, low, high = len(turn.answer_ids), 0, len(candidates) - 1
        while low < high:
            middle = (low + high) // 2
            prompt = self.format.encode_prompt(candidates[middle][:-1], tools)
            low, high = (
                (low, middle)
                if len(prompt) + answer_length <= self.max_length
                else (middle + 1, high)
            )
        while True:
            shorter = candidates[low]
            turn = self.format.encode_turn(shorter, len(shorter) - 1, tools)
            if _count_tokens(turn) <= self.max_length or low == len(candidates) - 1:
                return shorter, turn
            low += 1  # this template renders the answer differently here, with more tokens

    def _cut_turn(self, turn: Turn) -> Example:
        """Cut a turn whose last exchange alone is too long."""
        self.counts["cut"] += 1
        prompt, answer = fit_to_length(turn.prompt_ids, turn.answer_ids, self.max_length)
        shorter = replace(
            turn, prompt_ids=prompt, answer_ids=answer, learnt=turn.learnt[: len(answer)]
        )
        example = _make_example([*prompt, *answer], [shorter])
        if not any(example.learnt):
            self.counts["nothing"] += 1
        return example

    def _encode_all_tokens(self, messages: tuple[Message, ...], tools: str) -> Example:
        """Return a conversation of which all tokens are learnt, except answers with weight 0.

        Used for `assistant_only_loss: false`, where the conversation is one text.

        Raises:
            TemplateRefusal: If the template drops the reasoning of earlier turns, or if an
                answer with weight 0 cannot be found in the text.
        """
        shorter, last = self._shorten_conversation(messages, tools)
        if len(shorter) < len(messages):
            self.counts["shortened"] += 1
        ids = [*last.prompt_ids, *last.answer_ids]
        # Earlier turns are part of the last prompt here, and there is no example of their own that
        # would show their reasoning.
        text = "".join(self.format.template.decode(ids).split())
        if any("".join(message.reasoning.split()) not in text for message in shorter):
            raise TemplateRefusal(
                "the chat template leaves out the reasoning of earlier turns, so it cannot be "
                "learnt with data.assistant_only_loss: false (with true, each turn is rendered "
                "separately)"
            )
        learnt = [False, *[True] * (len(ids) - 1)]
        for index, message in enumerate(shorter):
            if message.role == "assistant" and not message.learn:
                self._exclude_answer(shorter, index, tools, last, learnt)
        if len(ids) > self.max_length:
            self.counts["cut"] += 1
            prompt_length = len(last.prompt_ids)
            prompt, answer = fit_to_length(
                range(prompt_length), range(prompt_length, len(ids)), self.max_length
            )
            positions = [*prompt, *answer]
            ids, learnt = (
                [ids[position] for position in positions],
                [learnt[position] for position in positions],
            )
        return Example(ids, learnt, min(len(last.prompt_ids), len(ids) - 1))

    def _exclude_answer(
        self, messages: tuple[Message, ...], index: int, tools: str, last: Turn, learnt: list[bool]
    ) -> None:
        """Mark the tokens of the answer at `index` as not learnt. Raises TemplateRefusal."""
        turn = self.format.encode_turn(messages, index, tools)
        if not _is_prefix(last, turn):
            raise TemplateRefusal(
                "an answer has weight 0, but this chat template renders earlier turns differently "
                "from the last one, so the answer cannot be left out of the loss with "
                "data.assistant_only_loss: false"
            )
        first = len(turn.prompt_ids)
        learnt[first : first + len(turn.answer_ids)] = [False] * len(turn.answer_ids)


def _count_tokens(turn: Turn) -> int:
    """Return the number of tokens of a turn."""
    return len(turn.prompt_ids) + len(turn.answer_ids)


def _is_prefix(last: Turn, turn: Turn) -> bool:
    """Return whether a conversation's tokens begin with exactly those of an earlier turn."""
    ids = [*last.prompt_ids, *last.answer_ids]
    return ids[: _count_tokens(turn)] == [*turn.prompt_ids, *turn.answer_ids]


def _make_example(ids: list[int], turns: Sequence[Turn]) -> Example:
    """Return an example in which the answers of the given turns are learnt."""
    learnt = [False] * len(ids)
    for turn in turns:
        first = len(turn.prompt_ids)
        learnt[first : first + len(turn.answer_ids)] = turn.learnt
    # Nothing precedes the first token, so there is no prediction of it.
    learnt[0] = False
    return Example(ids, learnt, len(turns[-1].prompt_ids))


def _count_system_messages(messages: Sequence[Message]) -> int:
    """Return the number of system messages at the beginning of a conversation."""
    return next(
        (
            position
            for position, message in enumerate(messages)
            if message.role not in ("system", "developer")
        ),
        len(messages),
    )


def _drop_oldest_exchange(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """Return a conversation without its first exchange; None if it has only one.

    System messages stay.
    """
    shorter = _list_shorter_conversations(messages)
    return shorter[0] if shorter else None


def _list_shorter_conversations(messages: tuple[Message, ...]) -> list[tuple[Message, ...]]:
    """Return the conversation without its first exchange, without its first two, and so on.

    An exchange begins with a user's message and lasts until the next one, tool calls
    included, so a tool's answer is never separated from its call. System messages stay. The
    last item has only the last exchange; the list is empty if there is only one.
    """
    system_count = _count_system_messages(messages)
    questions = [
        position
        for position, message in enumerate(messages)
        if message.role == "user" and position > system_count
    ]
    return [(*messages[:system_count], *messages[position:]) for position in questions]


def fit_to_length(
    prompt: Sequence[int], answer: Sequence[int], max_length: int
) -> tuple[list[int], list[int]]:
    """Cut a prompt and its answer to `max_length` tokens together.

    The middle of the prompt is cut first; its beginning and its end, where a chat turn
    closes, stay. Then the end of the answer is cut, if the answer takes more than half of
    `max_length`.

    Args:
        prompt: Tokens of the prompt.
        answer: Tokens of the answer; empty to cut a prompt alone.
        max_length: Maximum number of tokens of both.

    Returns:
        The tokens of the prompt and of the answer.
    """
    prompt, answer = list(prompt), list(answer)
    if len(prompt) + len(answer) <= max_length:
        return prompt, answer
    # The prompt keeps at least about half of the length: an answer without its question teaches
    # nothing.
    room = max(max_length - len(answer), max_length // 2 - 1, 1)
    if len(prompt) > room:
        tail = min(_PROMPT_TAIL_TOKENS, room // 2)
        prompt = prompt[: room - tail] + (prompt[-tail:] if tail else [])
    return prompt, answer[: max_length - len(prompt)]
