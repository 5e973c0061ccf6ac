"""Send an answer as server-sent events while it is generated."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

from fastapi import Request, Response
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from lorafleet.deployment.answers import Piece, compute_max_tokens
from lorafleet.webapp.guard import GONE
from lorafleet.webapp.request_models import GenerationRequest
from lorafleet.webapp.request_queue import check_connected
from lorafleet.webapp.served_model import ServedModel


class EventStream(EventSourceResponse):
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


async def stream_answer(
    server: ServedModel,
    request: Request,
    prompt: list[int],
    max_tokens: int,
    payload: GenerationRequest,
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
                {**head, "choices": [], "usage": count_usage([prompt], [Piece("", tokens)])}
            )
        yield {"data": "[DONE]"}

    return EventStream(iterate_events(), answer)


def _format_event(data: dict[str, Any]) -> dict[str, str]:
    """Return a server-sent event whose data is JSON."""
    return {"data": json.dumps(data, ensure_ascii=False)}


def count_usage(prompts: list[list[int]], last_pieces: list[Piece]) -> dict[str, int]:
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
