"""Limits for every page and API, whatever a client sends and however slowly.

`BodyMiddleware` refuses bodies that are too long, too slow or have unusable values.
`TimeoutProtocol` closes connections that only wait. `serve` runs an app with the
latter.

Uvicorn has a time limit only between requests: a few clients that send or read one byte
at a time could hold every connection, and JSON that Python accepts (NaN, lone
surrogates) fails deep inside an application.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import h11
import uvicorn
from fastapi import FastAPI, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

GONE = "lorafleet.gone"
"""Key in a request's scope: a `threading.Event` that is set when the client has left."""
CONNECTIONS = 64
"""Largest number of connections of all clients together. Further ones are closed at once."""
HEAD_SECONDS = 10.0
"""Seconds within which the head of a request must arrive, from its first byte or from the
start of the connection.
"""
BODY_SECONDS = 30.0
"""Seconds within which the whole body must arrive."""
IDLE_SECONDS = 5
"""Seconds that a connection may be idle between two requests."""
UNREAD_SECONDS = 60.0
"""Seconds that a client may leave an answer unread that does not fit the system's buffers."""

Refuse = Callable[[str, int], Response]
"""Makes an error response in the app's format from a message and a status code."""


class BodyMiddleware:
    """Middleware that limits request bodies in size and time and notices clients that leave.

    The limits hold whether or not a request states its length. The whole body is read
    before the application runs; then the connection is watched, and the event under `GONE`
    in the request's scope is set when the client leaves. Applications with long work must
    look at it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, refuse: Refuse) -> None:
        """Wrap an application.

        Args:
            app: The application.
            max_bytes: Largest body, in bytes.
            refuse: Makes error responses in the application's format.
        """
        self.app, self.max_bytes, self.refuse = app, max_bytes, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error.

        Status 413: the body is too long. 408: it is too slow. 400: its values are unusable.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body, refusal = await asyncio.wait_for(self._read_body(receive), BODY_SECONDS)
        except TimeoutError:
            body, refusal = b"", ("the request body did not arrive in time", 408)
        if body is None:
            return
        if refusal is not None:
            answer = self.refuse(*refusal)
            answer.headers["Connection"] = "close"  # do not wait for the rest of the body
            await answer(scope, receive, send)
            return
        await self._forward(scope, body, receive, send)

    async def _read_body(self, receive: Receive) -> tuple[bytes | None, tuple[str, int] | None]:
        """Return (body, refusal).

        The body is None if the client has left. The refusal is (message, status), or None if
        the body is accepted.
        """
        parts, size, has_more = list[bytes](), 0, True
        while has_more:
            message = await receive()
            if message["type"] != "http.request":
                return None, None
            parts.append(message.get("body", b""))
            size, has_more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.max_bytes:
                return b"", (f"the request is larger than {self.max_bytes // 1000} KB", 413)
        body = b"".join(parts)
        problem = find_body_problem(body)
        return body, (problem, 400) if problem else None

    async def _forward(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the app with the body, and set the scope's event when the client leaves."""
        was_sent = False
        gone_event, disconnected = scope.setdefault(GONE, threading.Event()), asyncio.Event()

        async def receive_again() -> Message:
            nonlocal was_sent
            if was_sent:
                await disconnected.wait()
                return {"type": "http.disconnect"}
            was_sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def watch_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone_event.set()
            disconnected.set()

        # Only one reader may call `receive`. It waits for the disconnect during the whole request,
        # also while the work runs in a thread.
        watcher = asyncio.create_task(watch_client())
        try:
            await self.app(scope, receive_again, send)
        finally:
            watcher.cancel()


def find_body_problem(body: bytes) -> str | None:
    """Return why the values of a JSON body are unusable, or None.

    Problems are NaN and infinite numbers, lone surrogates, and too deep nesting. None is
    also returned for a body that is not JSON, which the app reports itself.

    Args:
        body: The body as it was sent.
    """
    if (
        body.startswith(b"\xef\xbb\xbf") or b"\0" in body
    ):  # UTF-16 and UTF-32, which JSON parsers detect
        return "the request is not UTF-8"
    try:
        value = (
            json.loads(body.decode(), parse_constant=_refuse_constant, parse_float=_parse_finite)
            if body
            else None
        )
        # JSON can spell half a character (`\ud800`) that no text file, tokenizer or response can
        # hold.
        json.dumps(value, ensure_ascii=False).encode()
    except _NonFiniteNumber as error:
        return f"{error} is not a valid JSON number"
    except UnicodeDecodeError:
        return "the request is not UTF-8"
    except UnicodeEncodeError:
        return "the text contains half a character (a lone surrogate)"
    except RecursionError:
        return "the request is nested too deeply"
    except ValueError:
        return None
    return None


class _NonFiniteNumber(Exception):
    """Raised for a JSON number that is NaN or infinite."""


def _refuse_constant(constant: str) -> NoReturn:
    """Raise _NonFiniteNumber for the JSON constants NaN and Infinity."""
    raise _NonFiniteNumber(constant)


def _parse_finite(digits: str) -> float:
    """Parse a JSON number. Raises _NonFiniteNumber if it overflows."""
    value = float(digits)
    if not math.isfinite(value):
        raise _NonFiniteNumber(digits[:40])
    return value


class TimeoutProtocol(H11Protocol):
    """HTTP protocol that closes connections whose client only waits.

    Uvicorn's h11 protocol has a time limit only between requests. Connections are aborted,
    not closed: closing would wait until the client has read what is left to send.
    """

    head_timer: asyncio.TimerHandle | None = None
    unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse the connection if there are too many, else wait for the first head."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        else:
            self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Process data.

        Single bytes of an incomplete head do not restart the time limit. A client that sends a
        byte now and then would otherwise never run out of time.
        """
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait_for_head()
        else:
            self._stop_waiting_for_head()

    def on_response_complete(self) -> None:
        """Close the connection if the answer was sent before the whole body arrived."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()

    def pause_writing(self) -> None:
        """Start the time limit for a client that does not read."""
        super().pause_writing()
        if self.unread_timer is None:
            self.unread_timer = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the time limit: the client reads again."""
        self._stop_waiting_for_reader()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all time limits."""
        self._stop_waiting_for_head()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_waiting_for_head(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _stop_waiting_for_reader(self) -> None:
        if self.unread_timer is not None:
            self.unread_timer.cancel()
            self.unread_timer = None


def create_server(app: FastAPI, **options: Any) -> uvicorn.Server:
    """Create a server with the limits of this module.

    `run(sockets=[...])` starts it.

    Args:
        app: The application.
        options: Further options of `uvicorn.Config`.
    """
    config = uvicorn.Config(
        app,
        http=TimeoutProtocol,
        ws="none",
        log_level="error",
        lifespan="off",
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        **options,
    )
    return uvicorn.Server(config)


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C.

    Args:
        app: The application.
        listener: A listening socket from `open_socket`. It is opened before the model is
            loaded, so that a port in use is reported at once.
    """
    create_server(app).run(sockets=[listener])
