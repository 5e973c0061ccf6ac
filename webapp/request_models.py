"""Bodies of the requests of an OpenAI-compatible API, and the error that refuses one."""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorafleet.deployment.decoding import Sampling

_MIN_TEMPERATURE = 1e-4
"""Below it decoding is greedy: clients mean that by a temperature of 0, which cannot divide."""
_MAX_PROMPTS = 64


class RequestRefused(Exception):
    """Raised to answer a request with an error in OpenAI's format.

    Attributes: `code` is the HTTP status, `about` the field of the request that is wrong,
    or None.
    """

    def __init__(self, message: str, code: int = 400, about: str | None = None) -> None:
        super().__init__(message)
        self.code, self.about = code, about


class BaseRequest(BaseModel):
    """Fields of all requests. Additional fields are accepted here and checked by name later."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = None


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class GenerationRequest(BaseRequest):
    """Fields of requests that generate text."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    n: Literal[1] | None = None

    @property
    def sampling(self) -> Sampling | None:
        """Return the sampling settings, or None for greedy decoding.

        The temperature is 1 by default, as in OpenAI's API.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature < _MIN_TEMPERATURE:
            return None
        seed = self.seed if self.seed is not None else uuid.uuid4().int
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, seed % 2**63)

    @property
    def stops(self) -> list[str]:
        """Return the texts that end an answer."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in texts if text]


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)]
    max_tokens: int | None = Field(None, ge=1)


class TextPart(BaseModel):
    """Text part of a message."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """Return the text of the message, with its parts joined."""
        return (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class ClassifyRequest(BaseRequest):
    """Body of POST /v1/classify, as in vLLM."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)]
