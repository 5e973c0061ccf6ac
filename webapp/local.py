"""Protect pages that are for one user on this machine.

They listen on 127.0.0.1 only, require a random token, and refuse requests from other
sites. On a login node other users can reach the port, and so can a page of another site
that the user has open.
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
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' "
    "data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_token() -> str:
    """Return a random token of 192 bits, in characters that a URL can hold."""
    return secrets.token_urlsafe(24)


def open_socket(port: int) -> socket.socket:
    """Return a socket that listens on 127.0.0.1 on a port, or on any free one for port 0.

    Raises:
        OSError: The port is in use.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)  # early requests wait until the server is up
    return listener


Admit = Callable[[Request], Response | None]
"""Checks a request: None admits it, a Response is sent instead."""


def require_token(token: str) -> Admit:
    """Return a check that admits requests below /api only with the page's token.

    The token is in the fragment of the address, which browsers do not send; the page's
    script sends it in a header. The page itself holds no data and needs no token.

    Args:
        token: The token that the command printed.
    """

    def admit(request: Request) -> Response | None:
        if not request.url.path.startswith("/api/"):
            return None
        if not is_same_token(request.headers.get(TOKEN_HEADER, ""), token):
            return JSONResponse(
                {
                    "error": (
                        "open the page with the full address that was printed, including its token"
                    )
                },
                403,
            )
        return None

    return admit


def is_same_token(value: str, token: str) -> bool:
    """Return whether a value equals the token, in constant time."""
    return hmac.compare_digest(value.encode(), token.encode())


def add_guard(app: FastAPI, port: int, admit: Admit) -> FastAPI:
    """Add checks to an app: its own host name, no other site's pages, and the check `admit`.

    It must be added last, so that it runs before everything else.

    Args:
        app: The application, which is changed and returned.
        port: Port of the server; only requests to 127.0.0.1 or localhost on it are
            answered.
        admit: Further check of each request.
    """
    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
    origins = {f"http://{host}" for host in hosts}

    @app.middleware("http")
    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        # A site can let its own name resolve to 127.0.0.1 (DNS rebinding) and would then count as
        # the same origin. Its name in the Host header gives it away.
        if request.headers.get("host") not in hosts:
            return PlainTextResponse("this page is only available at 127.0.0.1", status_code=403)
        origin = request.headers.get("origin")
        if origin is not None and origin not in origins:
            return PlainTextResponse("requests from other sites are not allowed", status_code=403)
        refusal = admit(request)
        if refusal is not None:
            return refusal
        answer = await call_next(request)
        # Answers of models and texts of the data are shown on these pages. Even if one were read as
        # markup, no script of it would run and nothing would be sent elsewhere.
        answer.headers["Content-Security-Policy"] = _POLICY
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        answer.headers["Cache-Control"] = "no-store"
        return answer

    return app


def add_static_files(app: FastAPI, names: dict[str, str]) -> None:
    """Add routes that serve files of the package.

    The files are read once: they are small, and a request can never name a path.

    Args:
        app: The application.
        names: Path of the route -> file name in `static`.
    """
    kinds = {".js": "text/javascript", ".css": "text/css"}
    for path, name in names.items():
        text = (STATIC / name).read_text(encoding="utf-8")
        kind = kinds.get(Path(name).suffix)
        answer = HTMLResponse(text) if kind is None else Response(text, media_type=kind)
        app.get(path, include_in_schema=False)(_make_handler(answer))


def _make_handler(answer: Response) -> Callable[[], Response]:
    """Return a route handler that always sends the same answer."""
    return lambda: answer  # no parameters: FastAPI would read them from the URL
