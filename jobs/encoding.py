"""A row as the tokens that are trained on: which of them are learnt, and what is left out where it is too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jobs.chat_format import ChatFormat, Turn
from jobs.chat_template import TemplateRefusal
from jobs.conversation import Message, learnable_turns
from jobs.row_formats import Row

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
        messages = row.messages[: turns[-1] + 1]
        encoded = self._conversation(messages, turns, row.tools)
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
        messages = row.messages[: turns[-1]] if turns else row.messages[:-1]
        while True:
            ids = self.format.prompt_ids(messages, row.tools)
            shorter = _without_oldest(messages)
            if len(ids) <= room or shorter is None:
                return fit(ids, [], room)[0]
            messages = shorter

    def _text(self, text: str) -> Example:
        """A text alone, learnt whole. Start and end tokens that it brings are not added again."""
        ids = self.format.text_ids(text)
        end = self.format.model_ends[:1]
        if end and ids[-1:] != end:
            ids = [*ids, *end]
        if len(ids) > self.max_length:
            self.counts["cut"] += 1
            ids = ids[: self.max_length]
        return Example(ids, [False, *[True] * (len(ids) - 1)], 1)

    def _conversation(self, messages: tuple[Message, ...], turns: list[int], tools: str) -> EncodedRow:
        rendered = [self.format.turn(messages, index, tools) for index in turns]
        self.ends |= {turn.end: None for turn in rendered if turn.end is not None}
        last = rendered[-1]
        row_ids = [*last.prompt_ids, *last.answer_ids]
        together = all(_begins(row_ids, turn) for turn in rendered[:-1])
        if not self.assistant_only_loss:
            return self._everything(messages, tools)
        if not together:
            self.counts["split"] += 1
            self.counts["examples"] += len(turns)
            examples = [self._alone(messages[: index + 1], index, tools) for index in turns]
            return EncodedRow(examples, last.reference)
        if len(row_ids) <= self.max_length:
            return EncodedRow([_example(row_ids, rendered)], last.reference)
        shorter = _without_oldest(messages)
        if shorter is None:
            return EncodedRow([self._cut(last)], last.reference)
        self.counts["shortened"] += 1
        dropped = len(messages) - len(shorter)
        kept = [index - dropped for index in turns if index - dropped > _leading(shorter)]
        return EncodedRow(self._conversation(shorter, kept, tools).examples, last.reference)

    def _alone(self, messages: tuple[Message, ...], index: int, tools: str) -> Example:
        """One turn as an example of its own, without its oldest turns where it is too long."""
        turn = self.format.turn(messages, index, tools)
        shorter: tuple[Message, ...] | None = messages
        while len(turn.prompt_ids) + len(turn.answer_ids) > self.max_length:
            shorter = _without_oldest(messages)
            if shorter is None:
                return self._cut(turn)
            self.counts["shortened"] += 1
            messages = shorter
            turn = self.format.turn(messages, len(messages) - 1, tools)
        return _example([*turn.prompt_ids, *turn.answer_ids], [turn])

    def _cut(self, turn: Turn) -> Example:
        """A turn whose last exchange alone is too long."""
        self.counts["cut"] += 1
        prompt, answer = fit(turn.prompt_ids, turn.answer_ids, self.max_length)
        shorter = replace(turn, prompt_ids=prompt, answer_ids=answer, learnt=turn.learnt[: len(answer)])
        example = _example([*prompt, *answer], [shorter])
        if not any(example.learnt):
            self.counts["nothing"] += 1
        return example

    def _everything(self, messages: tuple[Message, ...], tools: str) -> EncodedRow:
        """A conversation that is learnt whole (`assistant_only_loss: false`), but for answers with weight 0."""
        last = self.format.turn(messages, len(messages) - 1, tools)
        ids = [*last.prompt_ids, *last.answer_ids]
        shorter = _without_oldest(messages)
        if len(ids) > self.max_length and shorter is not None:
            self.counts["shortened"] += 1
            return EncodedRow(self._everything(shorter, tools).examples, last.reference)
        text = "".join(self.format.template.decode(ids).split())
        if any("".join(message.reasoning.split()) not in text for message in messages):
            raise TemplateRefusal(
                "the chat template leaves out the reasoning of earlier turns: it cannot be learnt with "
                "data.assistant_only_loss: false (with true each turn is rendered for itself)"
            )
        learnt = [False, *[True] * (len(ids) - 1)]
        for index, message in enumerate(messages):
            if message.role == "assistant" and not message.learn:
                self._leave_out(messages, index, tools, ids, learnt)
        if len(ids) > self.max_length:
            self.counts["cut"] += 1
            begin = len(last.prompt_ids)
            prompt, answer = fit(range(begin), range(begin, len(ids)), self.max_length)
            kept = [*prompt, *answer]
            ids, learnt = [ids[place] for place in kept], [learnt[place] for place in kept]
        return EncodedRow([Example(ids, learnt, min(len(last.prompt_ids), len(ids) - 1))], last.reference)

    def _leave_out(
        self, messages: tuple[Message, ...], index: int, tools: str, ids: list[int], learnt: list[bool]
    ) -> None:
        turn = self.format.turn(messages, index, tools)
        if not _begins(ids, turn):
            raise TemplateRefusal(
                "an answer has weight 0, but this chat template renders earlier turns differently from the last one: "
                "the answer cannot be left out of the loss with data.assistant_only_loss: false"
            )
        first = len(turn.prompt_ids)
        learnt[first : first + len(turn.answer_ids)] = [False] * len(turn.answer_ids)


def _begins(row_ids: Sequence[int], turn: Turn) -> bool:
    """Whether a row's tokens begin with a turn exactly as generation would meet it."""
    end = len(turn.prompt_ids) + len(turn.answer_ids)
    return list(row_ids[:end]) == [*turn.prompt_ids, *turn.answer_ids]


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
    leading = _leading(messages)
    questions = [place for place, one in enumerate(messages) if one.role == "user" and place > leading]
    return (*messages[:leading], *messages[questions[0] :]) if questions else None


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
