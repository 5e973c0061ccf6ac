"""Errors in OpenAI's format, and the check of the API key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lorafleet.jobs.errors import UserError
from lorafleet.jobs.schema.validation_messages import describe_request_error
from lorafleet.webapp.local import Admit, is_same_token
from lorafleet.webapp.request_models import RequestRefused


def require_bearer_token(token: str) -> Admit:
    """Return a check that admits clients that send the token as their API key.

    Unlike a page's check it holds for every path, as clients send their key with each
    request.
    """

    def admit(request: Request) -> Response | None:
        if is_same_token(request.headers.get("authorization", ""), f"Bearer {token}"):
            return None
        return make_error_response(
            "the API key is wrong: use the one that `lorafleet serve` printed, or that of "
            "LORAFLEET_API_KEY",
            401,
            None,
        )

    return admit


def make_error_response(message: str, code: int, field: str | None) -> JSONResponse:
    """Return an error in OpenAI's format."""
    error_type = "invalid_request_error" if code < 500 else "server_error"
    headers = {"Retry-After": "1"} if code == 429 else None
    return JSONResponse(
        {"error": {"message": message, "type": error_type, "param": field, "code": None}},
        code,
        headers=headers,
    )


def add_error_handlers(app: FastAPI) -> None:
    """Add handlers that turn exceptions into errors in OpenAI's format."""

    @app.exception_handler(RequestRefused)
    async def handle_refused(_request: Any, error: RequestRefused) -> Response:
        return make_error_response(str(error), error.code, error.about)

    @app.exception_handler(HTTPException)
    async def handle_http_error(_request: Any, error: HTTPException) -> Response:
        return make_error_response(str(error.detail), error.status_code, None)

    @app.exception_handler(UserError)
    async def handle_user_error(_request: Any, error: UserError) -> Response:
        return make_error_response(str(error), 400, None)

    @app.exception_handler(Exception)
    async def handle_internal_error(
        _request: Any, error: Exception
    ) -> Response:  # the traceback is printed by the server
        return make_error_response(f"an error in lorafleet: {type(error).__name__}", 500, None)

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(_request: Any, error: RequestValidationError) -> Response:
        first_error = error.errors()[0]
        field = (
            ".".join(str(part) for part in first_error["loc"] if part != "body") or "the request"
        )
        return make_error_response(describe_request_error(first_error), 400, field)
