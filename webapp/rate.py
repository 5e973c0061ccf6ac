"""The page on which a person rates answers without knowing whose they are."""

from __future__ import annotations

import threading
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from lorafleet.evaluation.report.human_rating import Notebook
from lorafleet.jobs.errors import UserError
from lorafleet.webapp.guard import Body
from lorafleet.webapp.local import by_token, guarded, static
from pydantic import BaseModel, ConfigDict

_MOST_BYTES = 64_000


class Rated(BaseModel):
    """One click."""

    model_config = ConfigDict(extra="forbid", strict=True)
    row: int
    slot: str
    criterion: str
    score: int


class Noted(BaseModel):
    """What a rater says of a row."""

    model_config = ConfigDict(extra="forbid", strict=True)
    row: int
    text: str


def rating_app(book: Notebook, title: str, token: str, port: int) -> FastAPI:
    """The page, and its few questions. Every rating is on disk before it is answered."""
    app = FastAPI(title="lorafleet rate", docs_url=None, redoc_url=None, openapi_url=None)
    one_at_a_time = threading.Lock()

    @app.exception_handler(UserError)
    async def refused(_request: Any, error: UserError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)

    @app.get("/api/sheet")
    def sheet() -> dict[str, Any]:
        return book.shown() | {"title": title}

    @app.get("/api/means")
    def means() -> dict[str, Any]:
        return {"means": book.means()}

    @app.post("/api/rate")
    def rate(rated: Rated) -> dict[str, Any]:
        with one_at_a_time:
            book.rate(rated.row, rated.slot, rated.criterion, rated.score)
        return {"missing": book.missing}

    @app.post("/api/undo")
    def undo() -> dict[str, Any]:
        with one_at_a_time:
            undone = book.undo()
        return book.shown() | {"title": title, "missing": book.missing, "undone": undone}

    @app.post("/api/note")
    def note(noted: Noted) -> dict[str, Any]:
        with one_at_a_time:
            book.note(noted.row, noted.text)
        return {"missing": book.missing}

    static(app, {"/": "rate.html", "/rate.js": "rate.js", "/rate.css": "rate.css"})
    app.add_middleware(Body, most=_MOST_BYTES, refuse=lambda text, code: JSONResponse({"error": text}, code))
    return guarded(app, port, by_token(token))
