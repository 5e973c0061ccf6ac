"""An exported model behind the addresses that OpenAI's clients know: to try and to test with, one machine, few users.

What changes an answer and is not supported is refused, never ignored: a client then knows what it got.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from lorafleet.deployment.answers import Piece, pieces, room_for
from lorafleet.deployment.decoding import Sampling
from lorafleet.deployment.runtime import Loaded
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.schema.validation_messages import sentence_of
from lorafleet.webapp.guard import GONE, Body
from lorafleet.webapp.local import Admit, guarded, same
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

_CHANGES_NOTHING = frozenset("user metadata store service_tier parallel_tool_calls safety_identifier".split())
_AS_WITHOUT = {
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
"""What is not supported -> values of it, as JSON, that ask for nothing."""
_COLDEST = 1e-4
_MOST_PROMPTS = 64


@dataclass(frozen=True)
class Limits:
    """What one server takes on."""

    body_kb: int = 256
    """KB of a request."""
    new_tokens: int = 512
    """Tokens of an answer."""
    at_once: int = 1
    """Answers that are written at the same time."""
    waiting: int = 8
    """Requests that may wait for their turn; the next is told to come back (429)."""


class Refused(Exception):
    """A request that is answered with an error, as OpenAI's clients expect one."""

    def __init__(self, message: str, code: int = 400, about: str | None = None) -> None:
        super().__init__(message)
        self.code, self.about = code, about


class _Asked(BaseModel):
    """What all requests have; other fields are let through to be judged by name."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = None


class StreamOptions(BaseModel):
    """What a stream has beside the answer."""

    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class _Writing(_Asked):
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    n: Literal[1] | None = None

    @property
    def sampling(self) -> Sampling | None:
        """OpenAI's temperature is 1 where none is given."""
        heat = 1.0 if self.temperature is None else self.temperature
        if heat < _COLDEST:
            return None
        drawn_by = self.seed if self.seed is not None else uuid.uuid4().int
        return Sampling(heat, 1.0 if self.top_p is None else self.top_p, drawn_by % 2**63)

    @property
    def stops(self) -> list[str]:
        """Texts at which an answer is over."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]


class Completion(_Writing):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=_MOST_PROMPTS)]
    max_tokens: int | None = Field(None, ge=1)


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """Its text, whose parts are put together."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(_Writing):
    """POST /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class Classify(_Asked):
    """POST /v1/classify, as vLLM has it."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=_MOST_PROMPTS)]


class _Turns:
    """So many at once, and so many that wait."""

    def __init__(self, limits: Limits) -> None:
        self.free = threading.Semaphore(limits.at_once)
        self.places = threading.Semaphore(limits.at_once + limits.waiting)

    @contextmanager
    def turn(self, gone: threading.Event) -> Iterator[None]:
        """Hold a turn, once it has come. Raises Refused where too many wait, and for a client that leaves meanwhile."""
        if not self.places.acquire(blocking=False):
            raise Refused("too many requests wait already: try again soon", 429)
        try:
            while not self.free.acquire(timeout=_LOOK_SECONDS):
                check_there(gone)
            try:
                yield
            finally:
                self.free.release()
        finally:
            self.places.release()


_LOOK_SECONDS = 0.2
"""How often a request that waits looks whether its client is still there."""


def check_there(gone: threading.Event) -> None:
    """Raises Refused for a client that has left: nobody reads it, and its turn is given back."""
    if gone.is_set():
        raise Refused("the client has left", 499)


def check_whole(text: str) -> None:
    """Raises Refused for a text with half a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused("the text holds half a character (a lone surrogate)") from None


@dataclass
class _Server:
    loaded: Loaded
    name: str
    limits: Limits
    framed: Callable[[list[dict[str, str]]], str]
    made: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.turns = _Turns(self.limits)

    def check(self, asked: _Asked) -> None:
        """Raises Refused for another model's name and for what would change the answer if it were heeded."""
        if asked.model is not None and asked.model != self.name:
            raise Refused(f"there is no model {asked.model!r} here, only {self.name!r}", 404, "model")
        for key, value in (asked.model_extra or {}).items():
            nothing = value is None or json.dumps(value) in _AS_WITHOUT.get(key, ())
            if key not in _CHANGES_NOTHING and not nothing:
                raise Refused(f"{key} is not supported here", 400, key)

    def most(self, asked: int | None, default: int) -> int:
        """Tokens of an answer. Raises Refused above the limit."""
        if asked is not None and asked > self.limits.new_tokens:
            raise Refused(f"max_tokens is {asked}, but this server gives {self.limits.new_tokens} at most", 400)
        return asked or min(default, self.limits.new_tokens)

    def prompt(self, turns: list[Turn]) -> list[int]:
        """Tokens of a conversation, up to where the answer begins."""
        check_whole("".join(turn.text for turn in turns))
        if len(turns) == 1 and turns[0].role == "user":
            return self.loaded.prompt(turns[0].text)  # with training's own system message
        said = [{"role": turn.role, "content": turn.text} for turn in turns]
        about = self.loaded.artefact
        role = about.system_role or ("system" if about.system else "")
        if role and all(turn.role != "system" for turn in turns):
            said.insert(0, {"role": role, "content": about.system})
        text = self.framed(said)
        return list(self.loaded.tokenizer.encode(text, add_special_tokens=False).ids)

    def raw(self, text: str) -> list[int]:
        """Tokens of a text that is to be continued as it is."""
        check_whole(text)
        start = self.loaded.artefact.start
        if not start:  # a chat template names its own; here the tokenizer does
            return list(self.loaded.tokenizer.encode(text, add_special_tokens=True).ids)
        return [*start, *self.loaded.tokenizer.encode(text, add_special_tokens=False).ids]

    def answer(self, prompt: list[int], most: int, asked: _Writing, gone: threading.Event) -> Generator[Piece]:
        """The pieces of an answer, in its turn."""
        with self.turns.turn(gone):
            raw = isinstance(asked, Completion)
            yield from pieces(self.loaded, prompt, most, asked.sampling, asked.stops, raw=raw)

    def whole(
        self, prompts: list[list[int]], most: int, asked: _Writing, gone: threading.Event
    ) -> list[tuple[str, Piece]]:
        """(text, last piece) of each answer, all in one turn; it ends early for a client that has left."""
        found = []
        with self.turns.turn(gone):
            for prompt in prompts:
                said, last = "", Piece("", 0)
                raw = isinstance(asked, Completion)
                for last in pieces(self.loaded, prompt, most, asked.sampling, asked.stops, raw=raw):
                    said += last.text
                    check_there(gone)
                found.append((said, last))
        return found


def serving_app(
    loaded: Loaded, name: str, token: str, port: int, limits: Limits, framed: Callable[[list[dict[str, str]]], str]
) -> FastAPI:
    """The addresses of one model. `framed` makes a conversation a text; it raises UserError where it cannot."""
    app = FastAPI(title="lorafleet serve", docs_url=None, redoc_url=None, openapi_url=None)
    server = _Server(loaded, name, limits, framed)
    _errors(app)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    one = {"id": name, "object": "model", "created": server.made, "owned_by": "lorafleet"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [one]}

    @app.get("/v1/models/{which}")
    def model(which: str) -> dict[str, Any]:
        server.check(_Asked(model=which))
        return one

    if loaded.generates:
        _writers(app, server)
    else:
        _classifiers(app, server)
    app.add_middleware(Body, most=1000 * limits.body_kb, refuse=lambda text, code: _error(text, code, None))
    return guarded(app, port, by_bearer(token))


def _writers(app: FastAPI, server: _Server) -> None:
    @app.post("/v1/completions", response_model=None)
    async def complete(asked: Completion, request: Request) -> Response | dict[str, Any]:
        server.check(asked)
        texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        prompts, most = [server.raw(text) for text in texts], server.most(asked.max_tokens, 16)
        head = _head("cmpl", "text_completion", server)
        if asked.stream and len(prompts) > 1:
            raise Refused("stream is for one prompt", 400, "stream")
        if asked.stream:

            def shape(piece: Piece) -> dict[str, Any]:
                return {"index": 0, "text": piece.text, "finish_reason": piece.end, "logprobs": None}

            return await _stream(server, request, prompts[0], most, asked, head, shape)
        answers = await _patiently(request, lambda gone: server.whole(prompts, most, asked, gone))
        choices = [
            {"index": index, "text": text, "finish_reason": last.end, "logprobs": None}
            for index, (text, last) in enumerate(answers)
        ]
        return {**head, "choices": choices, "usage": _usage(prompts, [last for _, last in answers])}

    @app.post("/v1/chat/completions", response_model=None)
    async def converse(asked: Chat, request: Request) -> Response | dict[str, Any]:
        server.check(asked)
        for turn in asked.messages:
            for key, value in (turn.model_extra or {}).items():
                if value:  # clients send back what they got, with nulls in it
                    raise Refused(f"messages: {key} is not supported here", 400, "messages")
        prompt = server.prompt(asked.messages)
        most = server.most(asked.max_completion_tokens or asked.max_tokens, server.limits.new_tokens)
        if asked.stream:

            def shape(piece: Piece) -> dict[str, Any]:
                return {"index": 0, "delta": {"content": piece.text}, "finish_reason": piece.end}

            head = _head("chatcmpl", "chat.completion.chunk", server)
            first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            return await _stream(server, request, prompt, most, asked, head, shape, first)
        ((text, last),) = await _patiently(request, lambda gone: server.whole([prompt], most, asked, gone))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": last.end}
        head = _head("chatcmpl", "chat.completion", server)
        return {**head, "choices": [choice], "usage": _usage([prompt], [last])}


def _classifiers(app: FastAPI, server: _Server) -> None:
    labels = server.loaded.artefact.labels

    @app.post("/v1/classify")
    @app.post("/classify")
    def classify(asked: Classify, request: Request) -> dict[str, Any]:
        server.check(asked)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        with server.turns.turn(request.scope[GONE]):
            shares_RC = server.loaded.probabilities(texts)
        data = [
            {"index": index, "label": labels[int(row_C.argmax())], "probs": row_C.tolist(), "num_classes": len(labels)}
            for index, row_C in enumerate(shares_RC)
        ]
        return {**_head("classify", "list", server), "data": data}


def _head(kind: str, what: str, server: _Server) -> dict[str, Any]:
    now = int(time.time())
    return {"id": f"{kind}-{uuid.uuid4().hex[:24]}", "object": what, "created": now, "model": server.name}


_Found = TypeVar("_Found")


async def _patiently(request: Request, work: Callable[[threading.Event], _Found]) -> _Found:
    """Do work in a thread; the event that it is given says that the client has left."""
    return await run_in_threadpool(work, request.scope[GONE])


def _usage(prompts: list[list[int]], last: list[Piece]) -> dict[str, int]:
    given, made = sum(map(len, prompts)), sum(piece.tokens for piece in last)
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


class _Events(StreamingResponse):
    """A stream that ends its answer however it ends: a client may have left before the first event was sent."""

    def __init__(self, events: AsyncIterator[str], answer: Generator[Piece]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; give the turn back."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.close()


async def _stream(
    server: _Server,
    request: Request,
    prompt: list[int],
    most: int,
    asked: _Writing,
    head: dict[str, Any],
    shape: Callable[[Piece], dict[str, Any]],
    first: dict[str, Any] | None = None,
) -> Response:
    """Server-sent events. The first piece is written before the answer begins: what is refused has its own code."""
    room_for(server.loaded, prompt, most)
    gone = request.scope[GONE]
    answer = server.answer(prompt, most, asked, gone)
    try:
        piece = await run_in_threadpool(next, answer, None)
        check_there(gone)
    except BaseException:
        answer.close()
        raise

    async def events() -> AsyncIterator[str]:
        now = piece
        if first is not None:
            yield _event({**head, "choices": [first]})
        tokens = 0
        while now is not None:
            tokens = now.tokens
            yield _event({**head, "choices": [shape(now)]})
            now = await run_in_threadpool(next, answer, None)
        if asked.stream_options and asked.stream_options.include_usage:
            yield _event({**head, "choices": [], "usage": _usage([prompt], [Piece("", tokens)])})
        yield "data: [DONE]\n\n"

    return _Events(events(), answer)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def by_bearer(token: str) -> Admit:
    """Those who send the token as OpenAI's clients send a key."""

    def admit(request: Request) -> Response | None:
        if same(request.headers.get("authorization", ""), f"Bearer {token}"):
            return None
        return _error("the API key is not the one that `lorafleet serve` printed", 401, None)

    return admit


def _error(message: str, code: int, about: str | None) -> JSONResponse:
    kind = "invalid_request_error" if code < 500 else "server_error"
    more = {"Retry-After": "1"} if code == 429 else None
    return JSONResponse({"error": {"message": message, "type": kind, "param": about, "code": None}}, code, headers=more)


def _errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_request: Any, error: Refused) -> Response:
        return _error(str(error), error.code, error.about)

    @app.exception_handler(HTTPException)
    async def no_such_address(_request: Any, error: HTTPException) -> Response:
        return _error(str(error.detail), error.status_code, None)

    @app.exception_handler(UserError)
    async def impossible(_request: Any, error: UserError) -> Response:
        return _error(str(error), 400, None)

    @app.exception_handler(Exception)
    async def ours(_request: Any, error: Exception) -> Response:  # its traceback is in the server's terminal
        return _error(f"a fault of lorafleet: {type(error).__name__}", 500, None)

    @app.exception_handler(RequestValidationError)
    async def misspelt(_request: Any, error: RequestValidationError) -> Response:
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"] if part != "body") or "the request"
        return _error(sentence_of(found), 400, where)
