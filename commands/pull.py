"""`lorafleet pull`: bring a run from a cluster's storage."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from commands.common import DEFAULT_RUNS, OneRun, Runs, say


class Adapters(StrEnum):
    """Whose weights come along."""

    BEST = "best"
    ALL = "all"
    NONE = "none"


def pull(
    run: OneRun,
    adapters: Annotated[
        Adapters, typer.Option("--adapters", help="Whose weights come along: the recommended trial's, all, or none.")
    ] = Adapters.BEST,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Bring report, metrics, W&B's records and adapters of a run elsewhere (Kubernetes, Ray): what has changed."""
    from cluster.backends import backend_of
    from cluster.store import find_run
    from jobs.words import counted

    found = find_run(runs, run)
    count = backend_of(found).pull(found, adapters.value, say)
    typer.echo(f"{counted(count, 'file')} came to {found.path}")
