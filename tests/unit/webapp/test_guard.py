"""The limits before every page and API, with real sockets: `serve` and `rate` alike."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from lorafleet.evaluation.report.human_rating import CRITERIA, Item, Notebook
from lorafleet.webapp import guard
from lorafleet.webapp.guard import find_body_problem
from lorafleet.webapp.openai import create_serving_app
from lorafleet.webapp.rate import create_rating_app
from lorafleet.webapp.request_queue import Limits
from tests.unit.deployment.test_export import Counting
from tests.unit.webapp.test_openai import loaded, running

TOKEN = "t0ken"


def serve_app(port: int) -> FastAPI:
    return create_serving_app(
        loaded(Counting(26)),
        "tiny",
        TOKEN,
        port,
        Limits(body_kb=4),
        lambda turns: turns[0]["content"],
    )


def send(port: int, data: bytes, seconds: float = 20) -> bytes:
    """What comes back until the other side closes, or the seconds are over."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        said = b""
        with suppress(TimeoutError, ConnectionResetError):
            while block := connection.recv(65536):
                said += block
        return said


def request(
    port: int, path: str, body: bytes, key: str = TOKEN, more: str = "Connection: close\r\n"
) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer "
        f"{key}\r\nX-Lorafleet-Token: {key}\r\n"
        f"Content-Type: application/json\r\n{more}"
    )
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture(params=["serve", "rate"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, str, bytes]]:
    """(port, an address that takes a body, a body that is right) of each server that there is."""
    if request.param == "serve":
        with running(serve_app, at_once=True) as port:
            yield (
                port,
                "/v1/completions",
                json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode(),
            )
        return
    book = Notebook.open(tmp_path / "ann.jsonl", [Item(0, "p", "r", ("a", "b"), ("x", "y"))])
    with running(lambda port: create_rating_app(book, "t", TOKEN, port), at_once=True) as port:
        body = {"row": 0, "slot": "A", "criterion": CRITERIA[0], "score": 3}
        yield port, "/api/rate", json.dumps(body).encode()


STRANGE = [b'{"x": '
           b'NaN}', b'{"x": '
                    b'Infinity}', b'{"x": '
                                  b'-Infinity}', b'{"x": 1e999}', b'"\\ud800"', b'{"\\udfff": 1}',
           b'{"prompt": '
           b'"a\\ud83d"}', b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"\xed\xa0\x80", b"",
           b"null", b"[]", b"1" * 5000, b'{"row": ' + b"9" * 5000 + b"}", b"\x00", b'{"score": '
                                                                                   b'"3"}', b"{", b"true",
           b'{"temperature": 1e308, "model": "tiny", '
           b'"prompt": "a"}', b'{"model": "tiny", "prompt": "\\u0000"}',
           b'{"row": 1e300, "slot": "A", "criterion": "x", "score": 3}']  # fmt: skip


def test_no_body_is_a_fault_of_ours(
    site: tuple[int, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, path, right = site
    assert b" 200 " in send(port, request(port, path, right)).splitlines()[0]
    for body in STRANGE:
        answer = send(port, request(port, path, body))
        code = int(answer.split()[1])
        assert code in (400, 404, 413, 422) or (code == 200 and b"u0000" in body), (
            body[:40],
            answer[:200],
        )
        json.loads(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("word", [b"NaN", b"Infinity", b"1e999", b'"\\ud800"'])
def test_numbers_and_texts_that_are_none_are_told(word: bytes) -> None:
    assert find_body_problem(b'{"x": [' + word + b"]}") is not None
    assert find_body_problem(b'{"x": [1e300, "\\ud83d\\ude00", -0.0]}') is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_another_encoding_is_no_way_round(encoding: str) -> None:
    assert find_body_problem('{"a": NaN}'.encode(encoding)) == "the request is not UTF-8"


def test_a_body_without_a_length_counts_as_well(site: tuple[int, str, bytes]) -> None:
    port, path, _ = site
    head = request(port, path, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    answer = send(port, head + b"".join(b"fa0\r\n" + b"x" * 4000 + b"\r\n" for _ in range(30)))
    assert not answer or b" 413 " in answer.splitlines()[0]


@pytest.mark.parametrize("begun", [b"", b"G", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_a_slow_head_is_not_waited_for(
    site: tuple[int, str, bytes], begun: bytes, monkeypatch: Any
) -> None:
    """Nor is one whose bytes come one by one."""
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.4)
    assert seconds_open(site[0], begun) < 5


def test_a_slow_head_after_a_request(
    site: tuple[int, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.4)
    port, path, right = site
    assert seconds_open(port, request(port, path, right, more="") + b"GET / HT") < 6


@pytest.mark.parametrize("key", [TOKEN, "another"])
def test_a_slow_body_is_not_waited_for(
    site: tuple[int, str, bytes], key: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.4)
    port, path, right = site
    begun = request(port, path, right, key, "").replace(
        f"Length: {len(right)}".encode(), b"Length: 900"
    )
    assert seconds_open(port, begun) < 5


def seconds_open(port: int, begun: bytes) -> float:
    """How long a client is heard that sends a byte now and then."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=0.1) as connection:
        connection.sendall(begun)
        while time.monotonic() - began < 12:
            try:
                if not connection.recv(65536):
                    break
            except TimeoutError:
                pass
            except ConnectionResetError:
                break
            try:
                connection.sendall(b"a" if begun else b"")
            except (BrokenPipeError, ConnectionResetError):
                break
    return time.monotonic() - began


def test_so_many_connections_and_no_more(
    site: tuple[int, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "CONNECTIONS", 8)
    port, path, right = site
    idle = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(8)]
    time.sleep(0.3)
    with suppress(ConnectionResetError, BrokenPipeError):
        assert send(port, request(port, path, right), 3) == b""
    for connection in idle:
        connection.close()
    time.sleep(0.3)
    assert b" 200 " in send(port, request(port, path, right)).splitlines()[0]


def test_an_answer_that_nobody_reads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is closed, and its turn is another's."""
    monkeypatch.setattr(guard, "UNREAD_SECONDS", 0.4)
    app = FastAPI()

    @app.get("/long")
    def long() -> Any:
        from fastapi.responses import StreamingResponse

        return StreamingResponse(b"x" * 100_000 for _ in range(10_000))

    with running(lambda _port: app, at_once=True) as port:
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        connection.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(3)
        size = 0
        with suppress(ConnectionResetError):
            while block := connection.recv(1 << 20):
                size += len(block)
        connection.close()
        assert size < 500_000_000
