"""The model that a server serves, with its limits and its queue."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from lorafleet.deployment.answers import Piece, generate_pieces
from lorafleet.deployment.runtime import LoadedModel
from lorafleet.webapp.request_models import (
    BaseRequest,
    ChatMessage,
    CompletionRequest,
    GenerationRequest,
    RequestRefused,
)
from lorafleet.webapp.request_queue import Limits, TurnQueue, check_connected

_IGNORED_FIELDS = frozenset(
    "user metadata store service_tier parallel_tool_calls safety_identifier".split()
)
# Clients and frameworks send these fields with their defaults. Refusing them would keep most
# clients out.
_NEUTRAL_VALUES = {
    "best_of": ("1",),
    "echo": ("false",),
    "frequency_penalty": ("0", "0.0"),
    "functions": ("[]",),
    "logit_bias": ("{}",),
    "logprobs": ("false",),
    "presence_penalty": ("0", "0.0"),
    "response_format": ('{"type": "text"}',),
    "suffix": ('""',),
    "tool_choice": ('"none"', '"auto"'),
    "tools": ("[]",),
}
"""Unsupported field -> values (as JSON) that have no effect and are therefore accepted."""


@dataclass
class ServedModel:
    """One model with its limits and its queue.

    `create_serving_app` makes one. Its methods that generate run in threads; everything
    that they change is in the queue.
    """

    loaded: LoadedModel
    name: str
    limits: Limits
    framed: Callable[[list[dict[str, str]]], str]
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.turns = TurnQueue(self.limits)

    def check(self, payload: BaseRequest) -> None:
        """Check the model's name and the fields that this server does not know.

        Unsupported fields with a value that has no effect are accepted, and so are fields that
        never change an answer.

        Raises:
            RequestRefused: The request names another model (404) or has an unsupported field
                (400).
        """
        if payload.model is not None and payload.model != self.name:
            raise RequestRefused(
                f"there is no model {payload.model!r}; this server has {self.name!r}", 404, "model"
            )
        for key, value in (payload.model_extra or {}).items():
            is_neutral = value is None or json.dumps(value) in _NEUTRAL_VALUES.get(key, ())
            if key not in _IGNORED_FIELDS and not is_neutral:
                raise RequestRefused(f"{key} is not supported", 400, key)

    def resolve_max_tokens(self, requested: int | None, default: int) -> int:
        """Return the largest number of tokens in an answer.

        Args:
            requested: Tokens that the request asks for; None for the default.
            default: Default of the route. It is reduced to the limit of the server without an
                error.

        Raises:
            RequestRefused: The request exceeds the limit of the server.
        """
        if requested is not None and requested > self.limits.new_tokens:
            raise RequestRefused(
                f"max_tokens is {requested}, but this server allows at most "
                f"{self.limits.new_tokens}",
                400,
            )
        return requested or min(default, self.limits.new_tokens)

    def encode_conversation(self, turns: list[ChatMessage]) -> list[int]:
        """Return the token ids of a conversation, up to the point where the answer begins.

        If it has no system message, the one of the training is added. A single user message
        takes the same way as in `chat` and `run.py`, so that all of them give the same tokens.

        Raises:
            RequestRefused: A text has a lone surrogate.
            UserError: The chat template refuses the messages.
        """
        check_surrogates("".join(turn.text for turn in turns))
        if len(turns) == 1 and turns[0].role == "user":
            return self.loaded.encode_prompt(
                turns[0].text
            )  # includes the system message of the training
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        artefact = self.loaded.artefact
        role = artefact.system_role or ("system" if artefact.system else "")
        if role and all(turn.role != "system" for turn in turns):
            messages.insert(0, {"role": role, "content": artefact.system})
        text = self.framed(messages)
        return list(self.loaded.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text that is to be continued as it is."""
        check_surrogates(text)
        start = self.loaded.artefact.start
        if not start:  # the tokenizer adds its own start token
            return list(self.loaded.tokenizer.encode(text, add_special_tokens=True).ids)
        return [*start, *self.loaded.tokenizer.encode(text, add_special_tokens=False).ids]

    def stream_answer(
        self, prompt: list[int], max_tokens: int, payload: GenerationRequest, gone: threading.Event
    ) -> Generator[Piece]:
        """Wait for a turn and yield the pieces of an answer.

        The turn is held until the generator ends or is closed: whoever starts it must close it.

        Args:
            prompt: Token ids of the prompt.
            max_tokens: Most tokens of the answer.
            payload: The request, for sampling and stop texts.
            gone: Event that is set when the client leaves.
        """
        with self.turns.take_turn(gone):
            # A completion continues a text as it is, so nothing is removed from it.
            is_raw = isinstance(payload, CompletionRequest)
            yield from generate_pieces(
                self.loaded, prompt, max_tokens, payload.sampling, payload.stops, raw=is_raw
            )

    def generate_answers(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        payload: GenerationRequest,
        gone: threading.Event,
    ) -> list[tuple[str, Piece]]:
        """Return (text, last piece) of each answer.

        All of them share one turn.

        Args:
            prompts: Token ids of each prompt.
            max_tokens: Most tokens of each answer.
            payload: The request, for sampling and stop texts.
            gone: Event that is set when the client leaves.

        Raises:
            RequestRefused: No turn is free, or the client leaves meanwhile.
        """
        answers = []
        with self.turns.take_turn(gone):
            for prompt in prompts:
                text, last = "", Piece("", 0)
                is_raw = isinstance(payload, CompletionRequest)
                for last in generate_pieces(
                    self.loaded, prompt, max_tokens, payload.sampling, payload.stops, raw=is_raw
                ):
                    text += last.text
                    check_connected(gone)
                answers.append((text, last))
        return answers


def check_surrogates(text: str) -> None:
    """Raise RequestRefused for a text with a lone surrogate, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestRefused("the text contains half a character (a lone surrogate)") from None
