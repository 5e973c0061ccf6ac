"""What stands before every page and API on this machine: limits that no client passes, whatever it sends or how slowly.

`Body` ends what is too long, too slow or no value of ours; `Patient` ends connections that only wait; `serve` has both.
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
"""In a request's scope: a `threading.Event` that is set once the client has left."""
CONNECTIONS = 64
"""Connections at most, of all clients together; one more is closed at once."""
HEAD_SECONDS = 10.0
"""Until the head of a request must have come, from its first byte or from the connection's beginning."""
BODY_SECONDS = 30.0
"""Until the whole body must have come."""
IDLE_SECONDS = 5
"""Between two requests of one connection."""
UNREAD_SECONDS = 60.0
"""How long a client may leave an answer unread that does not fit the system's buffers."""

Refuse = Callable[[str, int], Response]
"""An answer in the form of the app: what it says, and its code."""


class Body:
    """Bodies end where they may, whether they say how long they are or not; and a client that leaves is noticed."""

    def __init__(self, app: ASGIApp, most: int, refuse: Refuse) -> None:
        self.app, self.most, self.refuse = app, most, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with 413 whose body is too long, with 408 a slow one, with 400 values that are none."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body, refused = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except TimeoutError:
            body, refused = b"", ("the request took too long to come", 408)
        if body is None:
            return
        if refused is not None:
            answer = self.refuse(*refused)
            answer.headers["Connection"] = "close"  # the rest of the body is not waited for
            await answer(scope, receive, send)
            return
        await self._pass_on(scope, body, receive, send)

    async def _read(self, receive: Receive) -> tuple[bytes | None, tuple[str, int] | None]:
        """Return the body, and why it is refused; None for the body where the client has left."""
        parts, size, more = list[bytes](), 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None, None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.most:
                return b"", (f"the request is larger than {self.most // 1000} KB", 413)
        body = b"".join(parts)
        sentence = unusable(body)
        return body, (sentence, 400) if sentence else None

    async def _pass_on(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        passed_on = False
        gone, left = scope.setdefault(GONE, threading.Event()), asyncio.Event()

        async def again() -> Message:
            nonlocal passed_on
            if passed_on:
                await left.wait()
                return {"type": "http.disconnect"}
            passed_on = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            left.set()

        watcher = asyncio.create_task(watch())
        try:
            await self.app(scope, again, send)
        finally:
            watcher.cancel()


def unusable(body: bytes) -> str | None:
    """Return why the values of a JSON body cannot be used: numbers that are none, half characters, endless nesting.

    None for a body that can, and for one that is no JSON at all, which the app has its own words for.
    """
    if body.startswith(b"\xef\xbb\xbf") or b"\0" in body:  # UTF-16 and UTF-32, which JSON's readers guess
        return "the request is not UTF-8"
    try:
        value = json.loads(body.decode(), parse_constant=_no_number, parse_float=_finite) if body else None
        json.dumps(value, ensure_ascii=False).encode()
    except _NoNumber as error:
        return f"{error} is not a number that JSON has"
    except UnicodeDecodeError:
        return "the request is not UTF-8"
    except UnicodeEncodeError:
        return "the text holds half a character (a lone surrogate)"
    except RecursionError:
        return "the request is nested too deeply"
    except ValueError:
        return None
    return None


class _NoNumber(Exception):
    """A number without a value."""


def _no_number(word: str) -> NoReturn:
    raise _NoNumber(word)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _NoNumber(digits[:40])
    return value


class Patient(H11Protocol):
    """A connection that is closed where its client only waits: h11's own protocol has no limit but between requests."""

    head_timer: asyncio.TimerHandle | None = None
    unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        else:
            self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Go on waiting where the head is not whole yet: a byte more does not begin the wait anew."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait_for_head()
        else:
            self._stop_waiting_for_head()

    def on_response_complete(self) -> None:
        """Close where the answer did not wait for the body: what still comes of it is nobody's."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not read."""
        super().pause_writing()
        if self.unread_timer is None:
            self.unread_timer = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        self._stop_waiting_for_reader()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
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


def server_of(app: FastAPI, **options: Any) -> uvicorn.Server:
    """A server for an app on this machine, with the limits of this module; `run(sockets=[...])` begins."""
    config = uvicorn.Config(
        app,
        http=Patient,
        ws="none",
        log_level="error",
        lifespan="off",
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        **options,
    )
    return uvicorn.Server(config)


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answer until Ctrl-C."""
    server_of(app).run(sockets=[listening])
