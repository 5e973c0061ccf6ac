"""A page for one person on this machine: on 127.0.0.1 alone, behind a random word, and deaf to other sites' pages.

Others share a login node: they can reach the port, and a page of another site that the user has open can too.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

STATIC = Path(__file__).parent / "static"
TOKEN_HEADER = "X-Lorafleet-Token"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def new_token() -> str:
    """A word that nobody guesses."""
    return secrets.token_urlsafe(24)


def free_socket(port: int) -> socket.socket:
    """A socket on 127.0.0.1 that listens on a port, or on any for 0. Raises OSError where it is taken."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("127.0.0.1", port))
    found.listen(128)  # who asks before the server is up waits, and is not sent away
    return found


Admit = Callable[[Request], Response | None]
"""Whether a request may come in: None, or what it is answered instead."""


def by_token(token: str) -> Admit:
    """Below /api, those who know the token of the page's address."""

    def admit(request: Request) -> Response | None:
        if not request.url.path.startswith("/api/"):
            return None
        if not same(request.headers.get(TOKEN_HEADER, ""), token):
            return JSONResponse({"error": "the address must be the one that was printed, with its token"}, 403)
        return None

    return admit


def same(given: str, token: str) -> bool:
    """Whether somebody knows a token; the time that it takes does not say how nearly."""
    return hmac.compare_digest(given.encode(), token.encode())


def guarded(app: FastAPI, port: int, admit: Admit) -> FastAPI:
    """An app that answers to its own name alone, to no other site's pages, and to those who are admitted."""
    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
    origins = {f"http://{host}" for host in hosts}

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.headers.get("host") not in hosts:
            return PlainTextResponse("this page answers to 127.0.0.1 alone", status_code=403)
        origin = request.headers.get("origin")
        if origin is not None and origin not in origins:
            return PlainTextResponse("not from another site", status_code=403)
        refusal = admit(request)
        if refusal is not None:
            return refusal
        answer = await call_next(request)
        answer.headers["Content-Security-Policy"] = _POLICY
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        answer.headers["Cache-Control"] = "no-store"
        return answer

    return app


def static(app: FastAPI, names: dict[str, str]) -> None:
    """Serve files of the package: path -> file name."""
    kinds = {".js": "text/javascript", ".css": "text/css"}
    for path, name in names.items():
        text = (STATIC / name).read_text(encoding="utf-8")
        kind = kinds.get(Path(name).suffix)
        answer = HTMLResponse(text) if kind is None else Response(text, media_type=kind)
        app.get(path, include_in_schema=False)(_always(answer))


def _always(answer: Response) -> Callable[[], Response]:
    return lambda: answer  # without parameters: FastAPI would take them from the address
