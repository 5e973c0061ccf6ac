"""A row as the tokens that are trained on: which of them are learnt, and what is left out where it is too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lorafleet.jobs.data.chat_format import ChatFormat, Turn
from lorafleet.jobs.data.chat_template import TemplateRefusal
from lorafleet.jobs.data.conversation import Message, learnable_turns
from lorafleet.jobs.data.row_formats import Row

_TAIL_TOKENS = 16


@dataclass(frozen=True)
class Example:
    """One sequence of tokens to train on. A row gives one, or one for each turn that it teaches."""

    ids: list[int]
    learnt: list[bool]
    """For each token whether it is learnt. The first never is: nothing stands before it."""
    answer_start: int
    """Position of the first token of the last answer."""


@dataclass(frozen=True)
class EncodedRow:
    """A row's examples, and what its last learnt answer says."""

    examples: list[Example]
    reference: str


class RowEncoder:
    """Turns rows into examples by one chat format. Counts what it had to do."""

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
        """Rows that were `cut`, that lost their oldest turns (`shortened`), that became several examples (`split`, and
        how many `examples` those are), and examples of which a cut left `nothing` to learn."""
        self.ends: dict[int, None] = {}
        """Tokens with which learnt turns ended."""

    def encode(self, row: Row) -> EncodedRow:
        """Return a row's examples. Raises TemplateRefusal for a row that teaches nothing or cannot be rendered."""
        if not row.messages:
            return EncodedRow([self._text(row.text)], row.reference)
        turns = learnable_turns(row.messages, self.train_on_turns)
        if not turns:
            raise TemplateRefusal(
                "nothing of this conversation is learnt: every answer has weight 0 or train: false, or comes before "
                "the first question"
            )
        before, of_format = Counter(self.counts), Counter(self.format.counts)
        self.format.check_context(row.messages, row.tools)
        if self.assistant_only_loss:
            encoded = self._conversation(row.messages[: turns[-1] + 1], turns, row.tools)
        else:
            reference = self.format.turn(row.messages, turns[-1], row.tools).reference
            encoded = EncodedRow([self._everything(row.messages, row.tools)], reference)
        for name in ("cut", "shortened"):  # rows are counted, not what was done to their examples
            if self.counts[name] > before[name]:
                self.counts[name] = before[name] + 1
        for name, count in of_format.items() | {(name, 0) for name in self.format.counts if name not in of_format}:
            self.format.counts[name] = min(self.format.counts[name], count + 1)
        return encoded

    def prompt(self, row: Row, room: int) -> list[int]:
        """Return the tokens that the last learnt answer follows, at most `room`: what generation begins with.

        Of a text alone: its beginning, as it stands.
        """
        if not row.messages:
            ids = self.format.text_ids(row.prompt)
            return fit(ids, [], room)[0]
        turns = learnable_turns(row.messages, "last")
        answered = row.messages[: turns[-1] + 1] if turns else row.messages
        messages = self._fitting(answered, row.tools)[0][:-1]  # as training has it: with room for the answer
        while True:
            ids = self.format.prompt_ids(messages, row.tools)
            shorter = _without_oldest(messages)
            if len(ids) <= room or shorter is None:
                return fit(ids, [], room)[0]
            messages = shorter

    def _text(self, text: str) -> Example:
        """Encode a text alone, which is learnt whole. Start and end tokens that it brings are not added again."""
        ids = self.format.text_ids(text)
        ends = self.format.model_ends[:1]
        if ends and ends[0] in ids:  # a text may bring its own end token, and a newline behind it
            last = len(ids) - 1 - ids[::-1].index(ends[0])
            ids = ids if self.format.template.decode(ids[last + 1 :]).strip() else ids[: last + 1]
        if ends and ids[-1:] != ends:
            ids = [*ids, *ends]
        if len(ids) > self.max_length:
            self.counts["cut"] += 1
            ids = ids[: self.max_length]
        return Example(ids, [False, *[True] * (len(ids) - 1)], 1)

    def _conversation(self, messages: tuple[Message, ...], turns: list[int], tools: str) -> EncodedRow:
        rendered = [self.format.turn(messages, index, tools) for index in turns]
        self.ends |= {turn.end: None for turn in rendered if turn.end is not None}
        last = rendered[-1]
        if not all(_begins(last, turn) for turn in rendered[:-1]):
            self.counts["split"] += 1
            self.counts["examples"] += len(turns)
            pairs = zip(turns, rendered, strict=True)
            examples = [self._alone(messages[: index + 1], tools, turn) for index, turn in pairs]
            return EncodedRow(examples, last.reference)
        if _length(last) > self.max_length:
            shorter, _ = self._fitting(messages, tools, last)
            dropped = len(messages) - len(shorter)
            if dropped:
                self.counts["shortened"] += 1
                kept = [index - dropped for index in turns if index - dropped > _leading(shorter)]
                rendered = [self.format.turn(shorter, index, tools) for index in kept]
        return EncodedRow(self._stretches(rendered), last.reference)

    def _stretches(self, turns: list[Turn]) -> list[Example]:
        """Return one example of all turns that fit together, and a cut one for each turn that does not.

        Turns are too long here where nothing more can be dropped: after one question, with many calls of tools.
        """
        fitting = [turn for turn in turns if _length(turn) <= self.max_length]
        together = [_example([*fitting[-1].prompt_ids, *fitting[-1].answer_ids], fitting)] if fitting else []
        return [*together, *(self._cut(turn) for turn in turns[len(fitting) :])]

    def _alone(self, messages: tuple[Message, ...], tools: str, turn: Turn) -> Example:
        """Return the last turn as an example of its own, without the oldest turns where it is too long."""
        shorter, turn = self._fitting(messages, tools, turn)
        if len(shorter) < len(messages):
            self.counts["shortened"] += 1
        if _length(turn) > self.max_length:
            return self._cut(turn)
        return _example([*turn.prompt_ids, *turn.answer_ids], [turn])

    def _fitting(
        self, messages: tuple[Message, ...], tools: str, turn: Turn | None = None
    ) -> tuple[tuple[Message, ...], Turn]:
        """Return a conversation, and its last turn, without as many of its oldest exchanges as do not fit.

        The number is found by halving, and by the prompt alone: long conversations take long to render.
        """
        turn = turn or self.format.turn(messages, len(messages) - 1, tools)
        candidates = _shorter_ones(messages) if _length(turn) > self.max_length else []
        if not candidates:
            return messages, turn
        answer, low, high = len(turn.answer_ids), 0, len(candidates) - 1
        while low < high:
            middle = (low + high) // 2
            prompt = self.format.prompt_ids(candidates[middle][:-1], tools)
            low, high = (low, middle) if len(prompt) + answer <= self.max_length else (middle + 1, high)
        while True:
            shorter = candidates[low]
            turn = self.format.turn(shorter, len(shorter) - 1, tools)
            if _length(turn) <= self.max_length or low == len(candidates) - 1:
                return shorter, turn
            low += 1  # the answer has more tokens here, in a template that renders it otherwise

    def _cut(self, turn: Turn) -> Example:
        """Cut a turn whose last exchange alone is too long."""
        self.counts["cut"] += 1
        prompt, answer = fit(turn.prompt_ids, turn.answer_ids, self.max_length)
        shorter = replace(turn, prompt_ids=prompt, answer_ids=answer, learnt=turn.learnt[: len(answer)])
        example = _example([*prompt, *answer], [shorter])
        if not any(example.learnt):
            self.counts["nothing"] += 1
        return example

    def _everything(self, messages: tuple[Message, ...], tools: str) -> Example:
        """Return a conversation that is learnt whole (`assistant_only_loss: false`), but for weight 0."""
        shorter, last = self._fitting(messages, tools)
        if len(shorter) < len(messages):
            self.counts["shortened"] += 1
        ids = [*last.prompt_ids, *last.answer_ids]
        text = "".join(self.format.template.decode(ids).split())
        if any("".join(message.reasoning.split()) not in text for message in shorter):
            raise TemplateRefusal(
                "the chat template leaves out the reasoning of earlier turns: it cannot be learnt with "
                "data.assistant_only_loss: false (with true each turn is rendered for itself)"
            )
        learnt = [False, *[True] * (len(ids) - 1)]
        for index, message in enumerate(shorter):
            if message.role == "assistant" and not message.learn:
                self._leave_out(shorter, index, tools, last, learnt)
        if len(ids) > self.max_length:
            self.counts["cut"] += 1
            begin = len(last.prompt_ids)
            prompt, answer = fit(range(begin), range(begin, len(ids)), self.max_length)
            places = [*prompt, *answer]
            ids, learnt = [ids[place] for place in places], [learnt[place] for place in places]
        return Example(ids, learnt, min(len(last.prompt_ids), len(ids) - 1))

    def _leave_out(self, messages: tuple[Message, ...], index: int, tools: str, last: Turn, learnt: list[bool]) -> None:
        turn = self.format.turn(messages, index, tools)
        if not _begins(last, turn):
            raise TemplateRefusal(
                "an answer has weight 0, but this chat template renders earlier turns differently from the last one: "
                "the answer cannot be left out of the loss with data.assistant_only_loss: false"
            )
        first = len(turn.prompt_ids)
        learnt[first : first + len(turn.answer_ids)] = [False] * len(turn.answer_ids)


def _length(turn: Turn) -> int:
    return len(turn.prompt_ids) + len(turn.answer_ids)


def _begins(last: Turn, turn: Turn) -> bool:
    """Whether a conversation's tokens begin with an earlier turn exactly as generation would meet it."""
    ids = [*last.prompt_ids, *last.answer_ids]
    return ids[: _length(turn)] == [*turn.prompt_ids, *turn.answer_ids]


def _example(ids: list[int], turns: Sequence[Turn]) -> Example:
    learnt = [False] * len(ids)
    for turn in turns:
        first = len(turn.prompt_ids)
        learnt[first : first + len(turn.answer_ids)] = turn.learnt
    learnt[0] = False
    return Example(ids, learnt, len(turns[-1].prompt_ids))


def _leading(messages: Sequence[Message]) -> int:
    """Count the system messages with which a conversation begins."""
    return next((place for place, one in enumerate(messages) if one.role not in ("system", "developer")), len(messages))


def _without_oldest(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """Return a conversation without its first exchange; None: it has only one. System messages stay."""
    shorter = _shorter_ones(messages)
    return shorter[0] if shorter else None


def _shorter_ones(messages: tuple[Message, ...]) -> list[tuple[Message, ...]]:
    """Return a conversation without its first exchange, without its first two, and so on to its last one alone."""
    leading = _leading(messages)
    questions = [place for place, one in enumerate(messages) if one.role == "user" and place > leading]
    return [(*messages[:leading], *messages[place:]) for place in questions]


def fit(prompt: Sequence[int], answer: Sequence[int], max_length: int) -> tuple[list[int], list[int]]:
    """Cut a prompt and its answer to `max_length` tokens.

    The prompt's middle goes first (its question and its end, where a chat turn closes, stay), then the answer's end
    once it is over half.
    """
    prompt, answer = list(prompt), list(answer)
    if len(prompt) + len(answer) <= max_length:
        return prompt, answer
    room = max(max_length - len(answer), max_length // 2 - 1, 1)
    if len(prompt) > room:
        tail = min(_TAIL_TOKENS, room // 2)
        prompt = prompt[: room - tail] + (prompt[-tail:] if tail else [])
    return prompt, answer[: max_length - len(prompt)]
