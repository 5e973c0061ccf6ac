"""`lorafleet node`: what a job's scripts call on the nodes of a cluster. Never typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

node = typer.Typer(name="node", help="What a job's scripts call on its nodes.", no_args_is_help=True)

_UP_SECONDS = 900.0
"""How long nodes may take; those that cannot come end the job at once, and staging a model takes its time."""


@node.command()
def look(
    run: Path,
    nonce: Annotated[str, typer.Option()],
    address: Annotated[str, typer.Option()],
    node: Annotated[str, typer.Option()],
    number: Annotated[int, typer.Option()],
    scratch: Annotated[Path, typer.Option()],
    interface: Annotated[str, typer.Option()] = "",
) -> None:
    """Print what this node has as one line of JSON."""
    import json

    from cluster.node import look as look_here

    typer.echo(json.dumps(look_here(run, nonce, address, node, number, interface, scratch)))


@node.command()
def agree(
    run: Path,
    reports: Path,
    nonce: Annotated[str, typer.Option()],
    nodes: Annotated[int, typer.Option()],
    cpus: Annotated[int, typer.Option()],
    job: Annotated[int, typer.Option()],
) -> None:
    """Print the address and the ports of the job's Ray, if all nodes agree."""
    from cluster.node import agree as agree_on

    typer.echo(agree_on(run, reports, nonce, nodes, cpus, job))


@node.command()
def stage(run: Path) -> None:
    """Bring the run's models to this node's own disk."""
    import os

    from cluster.node import stage_models
    from jobs.run import Run

    stage_models(Run(run), Path(os.environ["LORAFLEET_STAGE"]), typer.echo)


@node.command()
def wait(address: str, nodes: int) -> None:
    """Return when all nodes of the job's Ray live."""
    from cluster.ray_site import wait_for_nodes

    wait_for_nodes(address, nodes, _UP_SECONDS)


@node.command()
def examine(folder: Path) -> None:
    """Look at all nodes of the job's Ray, for `lorafleet doctor --on`."""
    from jobs.errors import ExitCode
    from jobs.ours import check_packages

    check_packages()
    from tuning.examine import examine as examine_all

    raise typer.Exit(ExitCode.OK if examine_all(folder.absolute()) else ExitCode.GATE_REFUSED)


@node.command()
def failed(run: Path, sentence: str) -> None:
    """Say in the run's state why its driver never began."""
    from cluster.node import mark_failed
    from jobs.run import Run

    mark_failed(Run(run), sentence)


@node.command()
def leave(
    run: Path,
    seconds: Annotated[float, typer.Option(help="How long the pod may still live.")],
    drain: Annotated[bool, typer.Option("--drain", help="This is a worker: Ray is told that it goes.")] = False,
) -> None:
    """Before a pod is taken away: have the trials saved, and return when that is done or the time is up."""
    from cluster.node import leave as leave_pod
    from jobs.run import Run

    leave_pod(Run(run), seconds, drain=drain)
