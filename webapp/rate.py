"""Serve the page on which a person rates answers without knowing which model wrote them.

The routes only pass requests to a `Notebook`; what a rater may see is decided there.
The page is static (`static/rate.html`) and gets all texts from /api/sheet.
"""

from __future__ import annotations

import threading
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from lorafleet.evaluation.report.human_rating import Notebook
from lorafleet.jobs.errors import UserError
from lorafleet.webapp.guard import BodyMiddleware
from lorafleet.webapp.local import add_guard, add_static_files, require_token

# Enough for a note: it is cut to 4,000 characters, which take up to 12 bytes each in JSON.
_MAX_BYTES = 64_000


class RatingRequest(BaseModel):
    """Body of POST /api/rate: one rating."""

    model_config = ConfigDict(extra="forbid", strict=True)
    row: int
    slot: str
    criterion: str
    score: int


class NoteRequest(BaseModel):
    """Body of POST /api/note: a rater's note on a row."""

    model_config = ConfigDict(extra="forbid", strict=True)
    row: int
    text: str


def create_rating_app(notebook: Notebook, title: str, token: str, port: int) -> FastAPI:
    """Create the web application of the rating page.

    Every rating is on disk before the request is answered.

    Args:
        notebook: The notebook that stores the ratings.
        title: Title of the page.
        token: Token that the page's requests must carry.
        port: Port of the server on 127.0.0.1.
    """
    app = FastAPI(title="lorafleet rate", docs_url=None, redoc_url=None, openapi_url=None)
    # Routes that are no coroutines run in threads, and a notebook serves one at a time.
    lock = threading.Lock()

    @app.exception_handler(UserError)
    async def handle_user_error(_request: Any, error: UserError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)

    @app.get("/api/sheet")
    def get_sheet() -> dict[str, Any]:
        return notebook.to_dict() | {"title": title}

    @app.get("/api/means")
    def get_means() -> dict[str, Any]:
        return {"means": notebook.compute_means()}

    @app.post("/api/rate")
    def add_rating(rating: RatingRequest) -> dict[str, Any]:
        with lock:
            notebook.rate(rating.row, rating.slot, rating.criterion, rating.score)
        return {"missing": notebook.missing}

    @app.post("/api/undo")
    def undo_rating() -> dict[str, Any]:
        with lock:
            undone = notebook.undo()
        return notebook.to_dict() | {"title": title, "missing": notebook.missing, "undone": undone}

    @app.post("/api/note")
    def add_note(note: NoteRequest) -> dict[str, Any]:
        with lock:
            notebook.add_note(note.row, note.text)
        return {"missing": notebook.missing}

    add_static_files(app, {"/": "rate.html", "/rate.js": "rate.js", "/rate.css": "rate.css"})
    app.add_middleware(
        BodyMiddleware,
        max_bytes=_MAX_BYTES,
        refuse=lambda text, code: JSONResponse({"error": text}, code),
    )
    # Added last, so it runs first: a request without the token is refused before its body is read.
    return add_guard(app, port, require_token(token))
