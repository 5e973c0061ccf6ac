"""Serve an exported model with an OpenAI-compatible API.

It is meant for trying and testing, on one machine with few users. Parameters that would
change an answer and are not supported are refused, never ignored, so that a client
knows what it got.

Routes: /v1/models, and /v1/completions and /v1/chat/completions, or /v1/classify as in
vLLM. Requests are checked on the event loop; the model runs in threads, and
`_TurnQueue` decides how many at once.
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
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from lorafleet.deployment.answers import Piece, compute_max_tokens, generate_pieces
from lorafleet.deployment.decoding import Sampling
from lorafleet.deployment.runtime import LoadedModel
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.schema.validation_messages import describe_request_error
from lorafleet.webapp.guard import GONE, BodyMiddleware
from lorafleet.webapp.local import Admit, add_guard, is_same_token

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
# Below it decoding is greedy: clients mean that by a temperature of 0, which cannot divide.
_MIN_TEMPERATURE = 1e-4
_MAX_PROMPTS = 64


@dataclass(frozen=True)
class Limits:
    """Limits of one server."""

    body_kb: int = 256
    """Largest size of a request in KB. Default: 256."""
    new_tokens: int = 512
    """Largest number of tokens in an answer. Default: 512."""
    at_once: int = 1
    """Number of answers that are generated at the same time. Default: 1."""
    waiting: int = 8
    """Number of requests that may wait for their turn. Further ones get status 429. Default:
    8.
    """


class RequestRefused(Exception):
    """Raised to answer a request with an error in OpenAI's format.

    Attributes: `code` is the HTTP status, `about` the field of the request that is wrong,
    or None.
    """

    def __init__(self, message: str, code: int = 400, about: str | None = None) -> None:
        super().__init__(message)
        self.code, self.about = code, about


class _BaseRequest(BaseModel):
    """Fields of all requests. Additional fields are accepted here and checked by name later."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = None


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class _GenerationRequest(_BaseRequest):
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


class CompletionRequest(_GenerationRequest):
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


class ChatRequest(_GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class ClassifyRequest(_BaseRequest):
    """Body of POST /v1/classify, as in vLLM."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)]


class _TurnQueue:
    """Limits how many requests run and how many wait.

    Two semaphores: one for turns, one for places in the whole queue. Waiting requests hold
    a thread of the server's pool, so their number must be limited; further ones are refused
    at once.
    """

    def __init__(self, limits: Limits) -> None:
        self.free = threading.Semaphore(limits.at_once)
        self.places = threading.Semaphore(limits.at_once + limits.waiting)

    @contextmanager
    def take_turn(self, gone: threading.Event) -> Iterator[None]:
        """Wait for a turn and hold it while the block runs.

        Args:
            gone: Event that is set when the client leaves.

        Raises:
            RequestRefused: Too many requests wait (429), or the client leaves meanwhile (499).
        """
        if not self.places.acquire(blocking=False):
            raise RequestRefused("too many requests are waiting: try again soon", 429)
        try:
            # A client that leaves while it waits must give its place back, so the wait is
            # interrupted now and then.
            while not self.free.acquire(timeout=_POLL_SECONDS):
                check_connected(gone)
            try:
                yield
            finally:
                self.free.release()
        finally:
            self.places.release()


_POLL_SECONDS = 0.2
"""Seconds between two checks whether the client of a waiting request is still connected."""


def check_connected(gone: threading.Event) -> None:
    """Raise RequestRefused if the client has left, so that its turn is released.

    Status 499 is nginx's code for it. Nobody receives it.
    """
    if gone.is_set():
        raise RequestRefused("the client closed the connection", 499)


def check_surrogates(text: str) -> None:
    """Raise RequestRefused for a text with a lone surrogate, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestRefused("the text contains half a character (a lone surrogate)") from None


@dataclass
class _Server:
    """One model with its limits and its queue.

    `create_serving_app` makes one. Its methods that generate run in threads; everything
    that they change is in the queue.
    """

    loaded: LoadedModel
    name: str
    limits: Limits
    framed: Callable[[list[dict[str, str]]], str]
    made: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.turns = _TurnQueue(self.limits)

    def check(self, payload: _BaseRequest) -> None:
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
        self, prompt: list[int], max_tokens: int, payload: _GenerationRequest, gone: threading.Event
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
        payload: _GenerationRequest,
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


def create_serving_app(
    loaded: LoadedModel,
    name: str,
    token: str,
    port: int,
    limits: Limits,
    render_messages: Callable[[list[dict[str, str]]], str],
) -> FastAPI:
    """Create the web application that serves one model.

    A generating model gets the completion routes, a classifier the classification routes.

    Args:
        loaded: The model.
        name: Name of the model in requests and answers.
        token: API key that clients must send.
        port: Port of the server on 127.0.0.1.
        limits: Limits of the server.
        render_messages: Renders a conversation as text. It raises UserError for messages
            that it cannot render.
    """
    app = FastAPI(title="lorafleet serve", docs_url=None, redoc_url=None, openapi_url=None)
    server = _Server(loaded, name, limits, render_messages)
    _add_error_handlers(app)

    @app.get("/health")
    def get_health() -> dict[str, str]:
        return {"status": "ok"}

    description = {"id": name, "object": "model", "created": server.made, "owned_by": "lorafleet"}

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [description]}

    @app.get("/v1/models/{which}")
    def get_model(which: str) -> dict[str, Any]:
        server.check(_BaseRequest(model=which))
        return description

    if loaded.generates:
        _add_generation_routes(app, server)
    else:
        _add_classification_routes(app, server)
    app.add_middleware(
        BodyMiddleware,
        max_bytes=1000 * limits.body_kb,
        refuse=lambda text, code: _make_error_response(text, code, None),
    )
    # Added last, so it runs first: a request without the key is refused before its body is read.
    return add_guard(app, port, require_bearer_token(token))


def _add_generation_routes(app: FastAPI, server: _Server) -> None:
    """Add the routes that generate text."""

    @app.post("/v1/completions", response_model=None)
    async def create_completion(
        payload: CompletionRequest, request: Request
    ) -> Response | dict[str, Any]:
        server.check(payload)
        texts = [payload.prompt] if isinstance(payload.prompt, str) else payload.prompt
        prompts, max_tokens = (
            [server.encode_text(text) for text in texts],
            server.resolve_max_tokens(payload.max_tokens, 16),
        )
        head = _build_head("cmpl", "text_completion", server)
        if payload.stream and len(prompts) > 1:
            raise RequestRefused("stream supports only one prompt", 400, "stream")
        if payload.stream:

            def format_choice(piece: Piece) -> dict[str, Any]:
                return {
                    "index": 0,
                    "text": piece.text,
                    "finish_reason": piece.end,
                    "logprobs": None,
                }

            return await _stream(
                server, request, prompts[0], max_tokens, payload, head, format_choice
            )
        answers = await _run_in_thread(
            request, lambda gone: server.generate_answers(prompts, max_tokens, payload, gone)
        )
        choices = [
            {"index": index, "text": text, "finish_reason": last.end, "logprobs": None}
            for index, (text, last) in enumerate(answers)
        ]
        return {
            **head,
            "choices": choices,
            "usage": _count_usage(prompts, [last for _, last in answers]),
        }

    @app.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(
        payload: ChatRequest, request: Request
    ) -> Response | dict[str, Any]:
        server.check(payload)
        for turn in payload.messages:
            for key, value in (turn.model_extra or {}).items():
                if value:  # clients send received messages back, including null fields
                    raise RequestRefused(f"messages: {key} is not supported", 400, "messages")
        prompt = server.encode_conversation(payload.messages)
        max_tokens = server.resolve_max_tokens(
            payload.max_completion_tokens or payload.max_tokens, server.limits.new_tokens
        )
        if payload.stream:

            def format_choice(piece: Piece) -> dict[str, Any]:
                return {"index": 0, "delta": {"content": piece.text}, "finish_reason": piece.end}

            head = _build_head("chatcmpl", "chat.completion.chunk", server)
            first = {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "finish_reason": None,
            }
            return await _stream(
                server, request, prompt, max_tokens, payload, head, format_choice, first
            )
        ((text, last),) = await _run_in_thread(
            request, lambda gone: server.generate_answers([prompt], max_tokens, payload, gone)
        )
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": last.end,
        }
        head = _build_head("chatcmpl", "chat.completion", server)
        return {**head, "choices": [choice], "usage": _count_usage([prompt], [last])}


def _add_classification_routes(app: FastAPI, server: _Server) -> None:
    """Add the routes that classify text."""
    labels = server.loaded.artefact.labels

    @app.post("/v1/classify")
    @app.post("/classify")
    def classify(payload: ClassifyRequest, request: Request) -> dict[str, Any]:
        server.check(payload)
        texts = [payload.input] if isinstance(payload.input, str) else payload.input
        # The route is no coroutine, so FastAPI runs it in a thread and waiting here blocks nobody.
        with server.turns.take_turn(request.scope[GONE]):
            probabilities_RC = server.loaded.compute_probabilities(texts)
        data = [
            {
                "index": index,
                "label": labels[int(row_C.argmax())],
                "probs": row_C.tolist(),
                "num_classes": len(labels),
            }
            for index, row_C in enumerate(probabilities_RC)
        ]
        return {**_build_head("classify", "list", server), "data": data}


def _build_head(id_prefix: str, object_type: str, server: _Server) -> dict[str, Any]:
    """Return the fields that all answers share."""
    now = int(time.time())
    return {
        "id": f"{id_prefix}-{uuid.uuid4().hex[:24]}",
        "object": object_type,
        "created": now,
        "model": server.name,
    }


_Result = TypeVar("_Result")


async def _run_in_thread(request: Request, work: Callable[[threading.Event], _Result]) -> _Result:
    """Run work in a thread. It gets an event that is set when the client leaves."""
    return await run_in_threadpool(work, request.scope[GONE])


def _count_usage(prompts: list[list[int]], last_pieces: list[Piece]) -> dict[str, int]:
    """Return the token counts of prompts and answers."""
    prompt_tokens, completion_tokens = (
        sum(map(len, prompts)),
        sum(piece.tokens for piece in last_pieces),
    )
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class _EventStream(EventSourceResponse):
    """A stream that always closes its answer, and so releases its turn.

    A client may leave before the first event is sent. The generator of events is then never
    started and cannot close the answer itself.
    """

    def __init__(self, events: AsyncIterator[dict[str, str]], answer: Generator[Piece]) -> None:
        # The separator that most clients' own parsers expect. Pings keep proxies from closing a
        # stream whose first token takes long.
        super().__init__(events, sep="\n")
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events and release the turn."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.close()


async def _stream(
    server: _Server,
    request: Request,
    prompt: list[int],
    max_tokens: int,
    payload: _GenerationRequest,
    head: dict[str, Any],
    format_choice: Callable[[Piece], dict[str, Any]],
    first: dict[str, Any] | None = None,
) -> Response:
    """Return an answer as server-sent events.

    The first piece is generated before the response starts, so that a refused request gets
    its own status code.

    Args:
        server: The model.
        request: The HTTP request.
        prompt: Token ids of the prompt.
        max_tokens: Most tokens of the answer.
        payload: The request's body.
        head: Fields that all events share.
        format_choice: Makes the choice of an event from a piece.
        first: Choice of an additional first event; None for none.

    Raises:
        RequestRefused: No turn is free, or the client has left.
        UserError: The prompt is empty or fills all positions of the model.
    """
    compute_max_tokens(server.loaded, prompt, max_tokens)
    gone = request.scope[GONE]
    answer = server.stream_answer(prompt, max_tokens, payload, gone)
    try:
        # With a default, because StopIteration cannot be raised through a future.
        piece = await run_in_threadpool(next, answer, None)
        check_connected(gone)
    # Also for a cancelled task: the turn would otherwise be held until the garbage collector finds
    # the generator.
    except BaseException:
        answer.close()
        raise

    async def iterate_events() -> AsyncIterator[dict[str, str]]:
        current = piece
        if first is not None:
            yield _format_event({**head, "choices": [first]})
        tokens = 0
        while current is not None:
            tokens = current.tokens
            yield _format_event({**head, "choices": [format_choice(current)]})
            current = await run_in_threadpool(next, answer, None)
        if payload.stream_options and payload.stream_options.include_usage:
            yield _format_event(
                {**head, "choices": [], "usage": _count_usage([prompt], [Piece("", tokens)])}
            )
        yield {"data": "[DONE]"}

    return _EventStream(iterate_events(), answer)


def _format_event(data: dict[str, Any]) -> dict[str, str]:
    """Return a server-sent event whose data is JSON."""
    return {"data": json.dumps(data, ensure_ascii=False)}


def require_bearer_token(token: str) -> Admit:
    """Return a check that admits clients that send the token as their API key.

    Unlike a page's check it holds for every path, as clients send their key with each
    request.
    """

    def admit(request: Request) -> Response | None:
        if is_same_token(request.headers.get("authorization", ""), f"Bearer {token}"):
            return None
        return _make_error_response(
            "the API key is wrong: use the one that `lorafleet serve` printed, or that of "
            "LORAFLEET_API_KEY",
            401,
            None,
        )

    return admit


def _make_error_response(message: str, code: int, field: str | None) -> JSONResponse:
    """Return an error in OpenAI's format."""
    error_type = "invalid_request_error" if code < 500 else "server_error"
    headers = {"Retry-After": "1"} if code == 429 else None
    return JSONResponse(
        {"error": {"message": message, "type": error_type, "param": field, "code": None}},
        code,
        headers=headers,
    )


def _add_error_handlers(app: FastAPI) -> None:
    """Add handlers that turn exceptions into errors in OpenAI's format."""

    @app.exception_handler(RequestRefused)
    async def handle_refused(_request: Any, error: RequestRefused) -> Response:
        return _make_error_response(str(error), error.code, error.about)

    @app.exception_handler(HTTPException)
    async def handle_http_error(_request: Any, error: HTTPException) -> Response:
        return _make_error_response(str(error.detail), error.status_code, None)

    @app.exception_handler(UserError)
    async def handle_user_error(_request: Any, error: UserError) -> Response:
        return _make_error_response(str(error), 400, None)

    @app.exception_handler(Exception)
    async def handle_internal_error(
        _request: Any, error: Exception
    ) -> Response:  # the traceback is printed by the server
        return _make_error_response(f"an error in lorafleet: {type(error).__name__}", 500, None)

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(_request: Any, error: RequestValidationError) -> Response:
        first_error = error.errors()[0]
        field = (
            ".".join(str(part) for part in first_error["loc"] if part != "body") or "the request"
        )
        return _make_error_response(describe_request_error(first_error), 400, field)
