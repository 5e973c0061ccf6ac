"""`lorafleet chat`: try an exported model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from lorafleet.commands.common import DEFAULT_RUNS, AnyRuns, print_text, silence_libraries


def chat(
    artefact: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that `lorafleet export` wrote.")
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this prompt and exit.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens in an answer.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="Sampling temperature. 0 always takes the most likely token."),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help=(
                "Sample only from the most likely tokens whose probabilities add up to this value."
            ),
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for sampling.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads. 0: the runtime decides.")] = 0,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Ask an exported model, one line at a time.

    Each line is a prompt of its own, as in training. A classifier prints the class and its
    probability.
    """
    from lorafleet.deployment.answers import generate_pieces
    from lorafleet.deployment.decoding import Sampling
    from lorafleet.deployment.runtime import open_artefact

    silence_libraries()
    loaded = open_artefact(artefact, threads)
    sampling = Sampling(temperature, top_p, seed) if temperature > 0 else None
    for line in [prompt] if prompt is not None else _read_lines():
        if not line.strip():
            continue
        if loaded.generates:
            for piece in generate_pieces(
                loaded, loaded.encode_prompt(line), max_new_tokens, sampling
            ):
                print_text(piece.text, nl=False)
            print_text()
        else:
            (probabilities,) = loaded.compute_probabilities([line])
            best = int(probabilities.argmax())
            print_text(f"{loaded.artefact.labels[best]}\t{probabilities[best]:.3f}")


def _read_lines() -> Iterator[str]:
    """Yield lines from the keyboard or from a pipe.

    The prompt goes to standard error, so that a pipe on standard output gets answers only.
    """
    while True:
        if sys.stdin.isatty():
            print_text("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")
