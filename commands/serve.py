"""`lorafleet serve`: an exported model behind OpenAI's addresses, for trying and testing."""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from lorafleet.commands.common import DEFAULT_RUNS, AnyRuns, hush_libraries, say

if TYPE_CHECKING:
    import socket

    from lorafleet.jobs.runs.export_result import Artefact

_KEY = "LORAFLEET_API_KEY"


def serve(
    artefact: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `lorafleet export` made.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0: any that is free.")] = 8000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    max_body_kb: Annotated[int, typer.Option(min=1, help="KB of a request, at most.")] = 256,
    concurrency: Annotated[int, typer.Option(min=1, max=8, help="Answers that are written at the same time.")] = 1,
    queue: Annotated[int, typer.Option(min=0, max=24, help="Requests that may wait; the next gets 429.")] = 8,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as many as the runtime likes.")] = 0,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Serve an exported model to OpenAI clients on this machine, for trying and testing; vLLM is for production.

    The API key is LORAFLEET_API_KEY, or a random one that is printed.
    """
    from lorafleet.deployment.chat_template import framed
    from lorafleet.deployment.runtime import open_artefact, read_artefact
    from lorafleet.jobs.errors import UserError
    from lorafleet.webapp.guard import serve as answer_requests
    from lorafleet.webapp.local import free_socket, new_token
    from lorafleet.webapp.openai import Limits, serving_app

    hush_libraries()
    about = read_artefact(artefact)
    try:
        listening = free_socket(port)
    except OSError as error:
        raise UserError(f"--port is {port}, which cannot be had on 127.0.0.1: {error.strerror}") from error
    with listening:
        say(f"loading {artefact}")
        loaded = open_artefact(artefact, threads)
        taken, own = listening.getsockname()[1], os.environ.get(_KEY) or None
        token = own or new_token()
        limits = Limits(max_body_kb, max_tokens, concurrency, queue)
        name = artefact.absolute().name
        app = serving_app(
            loaded, name, token, taken, limits, lambda turns: framed(artefact, turns, about.chat_template_kwargs)
        )
        say(f"for production: {production(about, artefact)}")
        _invite(about, name, token if own is None else None, listening)
        with contextlib.suppress(KeyboardInterrupt):
            answer_requests(app, listening)


def _invite(about: Artefact, name: str, token: str | None, listening: socket.socket) -> None:
    """How it is asked, as a line to copy. A key from the environment is not repeated."""
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    say(f"serving {name} at {address} (this machine alone; Ctrl-C ends)")
    if token is not None:
        say(f"export {_KEY}={token}")
    path, body = "classify", '{"input": "a text"}'
    if about.task != "classification":
        path, body = "chat/completions", '{"messages": [{"role": "user", "content": "a prompt"}]}'
    say(f"curl {address}/{path} -H \"Authorization: Bearer ${_KEY}\" -H 'Content-Type: application/json' -d '{body}'")


def production(about: Artefact, folder: Path) -> str:
    """The line that serves the same model by vLLM, which takes a merged model: this one, or the one beside it."""
    from lorafleet.deployment.runtime import read_artefact
    from lorafleet.jobs.errors import UserError

    merged, same = folder.absolute(), about.target == "merged"
    if not same:
        merged = merged.with_name("merged")
        with contextlib.suppress(UserError):  # there is none, or one of another version
            beside = read_artefact(merged)
            same = beside.source == about.source
            about = beside if same else about
    kind = ["--runner", "pooling"] if about.task == "classification" else []
    length = ["--max-model-len", str(about.positions)] if about.positions else []
    line = shlex.join(["vllm", "serve", str(merged) if same else "MERGED", *kind, *length])
    if same:
        return line
    source = about.source
    run = f"{source['run']}:{source['trial_id']}" if source.get("trial_id") else source["run"]
    return f"`lorafleet export {run} --to merged`, and vLLM with its folder: {line}"
