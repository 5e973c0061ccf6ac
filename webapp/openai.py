"""Serve an exported model with an OpenAI-compatible API.

It is meant for trying and testing, on one machine with few users. Parameters that would
change an answer and are not supported are refused, never ignored, so that a client
knows what it got.

Routes: /v1/models, and /v1/completions and /v1/chat/completions, or /v1/classify as in
vLLM. Requests are checked on the event loop; the model runs in threads, and
`request_queue.TurnQueue` decides how many at once.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from lorafleet.deployment.answers import Piece
from lorafleet.deployment.runtime import LoadedModel
from lorafleet.webapp.guard import GONE, BodyMiddleware
from lorafleet.webapp.local import add_guard
from lorafleet.webapp.openai_errors import (
    add_error_handlers,
    make_error_response,
    require_bearer_token,
)
from lorafleet.webapp.request_models import (
    BaseRequest,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    RequestRefused,
)
from lorafleet.webapp.request_queue import Limits
from lorafleet.webapp.served_model import ServedModel
from lorafleet.webapp.streaming import count_usage, stream_answer


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
    server = ServedModel(loaded, name, limits, render_messages)
    add_error_handlers(app)

    @app.get("/health")
    def get_health() -> dict[str, str]:
        return {"status": "ok"}

    description = {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "lorafleet",
    }

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [description]}

    @app.get("/v1/models/{which}")
    def get_model(which: str) -> dict[str, Any]:
        server.check(BaseRequest(model=which))
        return description

    if loaded.generates:
        _add_generation_routes(app, server)
    else:
        _add_classification_routes(app, server)
    app.add_middleware(
        BodyMiddleware,
        max_bytes=1000 * limits.body_kb,
        refuse=lambda text, code: make_error_response(text, code, None),
    )
    # Added last, so it runs first: a request without the key is refused before its body is read.
    return add_guard(app, port, require_bearer_token(token))


def _add_generation_routes(app: FastAPI, server: ServedModel) -> None:
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

            return await stream_answer(
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
            "usage": count_usage(prompts, [last for _, last in answers]),
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
            return await stream_answer(
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
        return {**head, "choices": [choice], "usage": count_usage([prompt], [last])}


def _add_classification_routes(app: FastAPI, server: ServedModel) -> None:
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


def _build_head(id_prefix: str, object_type: str, server: ServedModel) -> dict[str, Any]:
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
