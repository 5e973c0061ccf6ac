"""`lorafleet serve`: serve an exported model with an OpenAI-compatible API, for trying and
testing.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.commands.common import DEFAULT_RUNS, AnyRuns, print_message, silence_libraries

if TYPE_CHECKING:
    import socket

    from lorafleet.jobs.runs.export_result import Artefact

_API_KEY_VARIABLE = "LORAFLEET_API_KEY"


def serve(
    artefact: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that `lorafleet export` wrote.")
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1. 0: any free port.")
    ] = 8000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 512,
    max_body_kb: Annotated[int, typer.Option(min=1, help="Maximum size of a request in KB.")] = 256,
    concurrency: Annotated[
        int, typer.Option(min=1, max=8, help="Answers generated at the same time.")
    ] = 1,
    queue: Annotated[
        int,
        typer.Option(
            min=0, max=24, help="Requests that may wait; further ones are answered with 429."
        ),
    ] = 8,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads. 0: the runtime decides.")] = 0,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Serve an exported model to OpenAI clients on this machine, for trying and testing.

    For production use vLLM. The API key is LORAFLEET_API_KEY, or a random one that is printed.
    """
    from lorafleet.deployment.chat_template import render_conversation
    from lorafleet.deployment.runtime import open_artefact, read_artefact
    from lorafleet.jobs.errors import UserError
    from lorafleet.webapp.guard import serve as answer_requests
    from lorafleet.webapp.local import create_token, open_socket
    from lorafleet.webapp.openai import create_serving_app
    from lorafleet.webapp.request_queue import Limits

    silence_libraries()
    record = read_artefact(artefact)
    try:
        # Opened before the model is loaded: a port that is in use is an error at once, and not only
        # after loading.
        listener = open_socket(port)
    except OSError as error:
        raise UserError(
            f"--port is {port}, which cannot be opened on 127.0.0.1 ({error.strerror}): choose "
            "another port, or 0 for any free one"
        ) from error
    with listener:
        print_message(f"loading {artefact}")
        loaded = open_artefact(artefact, threads)
        bound_port, configured_key = (
            listener.getsockname()[1],
            os.environ.get(_API_KEY_VARIABLE) or None,
        )
        token = configured_key or create_token()
        limits = Limits(max_body_kb, max_tokens, concurrency, queue)
        name = artefact.absolute().name
        app = create_serving_app(
            loaded,
            name,
            token,
            bound_port,
            limits,
            lambda turns: render_conversation(artefact, turns, record.chat_template_kwargs),
        )
        print_message(f"for production: {build_vllm_command(record, artefact)}")
        _print_usage(record, name, token if configured_key is None else None, listener)
        with contextlib.suppress(KeyboardInterrupt):
            answer_requests(app, listener)


def _print_usage(record: Artefact, name: str, token: str | None, listener: socket.socket) -> None:
    """Print the address and a request to copy.

    A key from the environment is not printed.
    """
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    print_message(f"serving {name} at {address} (only reachable from this machine; Ctrl-C ends)")
    if token is not None:
        print_message(f"export {_API_KEY_VARIABLE}={token}")
    path, body = "classify", '{"input": "a text"}'
    if record.task != "classification":
        path, body = "chat/completions", '{"messages": [{"role": "user", "content": "a prompt"}]}'
    print_message(
        f'curl {address}/{path} -H "Authorization: Bearer ${_API_KEY_VARIABLE}" -H '
        f"'Content-Type: application/json' -d '{body}'"
    )


def build_vllm_command(record: Artefact, folder: Path) -> str:
    """Return the command that serves the same model with vLLM.

    vLLM needs a merged model: this one, or the one in the folder `merged` beside it. Without
    either, the text says how to export it.
    """
    from lorafleet.deployment.runtime import read_artefact
    from lorafleet.jobs.errors import UserError

    merged, is_merged = folder.absolute(), record.target == "merged"
    if not is_merged:
        merged = merged.with_name("merged")
        with contextlib.suppress(UserError):  # missing, or written by another version
            sibling = read_artefact(merged)
            is_merged = sibling.source == record.source
            record = sibling if is_merged else record
    kind = ["--runner", "pooling"] if record.task == "classification" else []
    length = ["--max-model-len", str(record.positions)] if record.positions else []
    line = shlex.join(["vllm", "serve", str(merged) if is_merged else "MERGED", *kind, *length])
    if is_merged:
        return line
    source = record.source
    run = f"{source['run']}:{source['trial_id']}" if source.get("trial_id") else source["run"]
    return f"`lorafleet export {run} --to merged`, then run vLLM on its folder: {line}"
