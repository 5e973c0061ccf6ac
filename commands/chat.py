"""`lorafleet chat`: try an exported model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from lorafleet.commands.common import DEFAULT_RUNS, AnyRuns, hush_libraries, tell


def chat(
    artefact: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `lorafleet export` made.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this alone, and end.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the likeliest token each time; above, tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw among the likeliest that have it together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as many as the runtime likes.")] = 0,
    runs: AnyRuns = DEFAULT_RUNS,
) -> None:
    """Ask an exported model, a line at a time: each line alone, as in training. A classifier names the class."""
    from lorafleet.deployment.answers import pieces
    from lorafleet.deployment.decoding import Sampling
    from lorafleet.deployment.runtime import open_artefact

    hush_libraries()
    loaded = open_artefact(artefact, threads)
    drawn = Sampling(temperature, top_p, seed) if temperature > 0 else None
    for line in [prompt] if prompt is not None else _lines():
        if not line.strip():
            continue
        if loaded.generates:
            for piece in pieces(loaded, loaded.prompt(line), max_new_tokens, drawn):
                tell(piece.text, nl=False)
            tell()
        else:
            (shares,) = loaded.probabilities([line])
            best = int(shares.argmax())
            tell(f"{loaded.artefact.labels[best]}\t{shares[best]:.3f}")


def _lines() -> Iterator[str]:
    """What a person types, or what is piped in."""
    while True:
        if sys.stdin.isatty():
            tell("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")
