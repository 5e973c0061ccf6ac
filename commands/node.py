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

    from lorafleet.cluster.execution.node import look as look_here

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
    from lorafleet.cluster.execution.node import agree as agree_on

    typer.echo(agree_on(run, reports, nonce, nodes, cpus, job))


@node.command()
def stage(run: Path) -> None:
    """Bring the run's models to this node's own disk."""
    import os

    from lorafleet.cluster.execution.node import stage_models
    from lorafleet.jobs.runs.run import Run

    stage_models(Run(run), Path(os.environ["LORAFLEET_STAGE"]), typer.echo)


@node.command()
def wait(address: str, nodes: int) -> None:
    """Return when all nodes of the job's Ray live."""
    from lorafleet.cluster.ray.nodes import wait_for_nodes

    wait_for_nodes(address, nodes, _UP_SECONDS)


@node.command()
def examine(folder: Path) -> None:
    """Look at all nodes of the job's Ray, for `lorafleet doctor --on`."""
    from lorafleet.jobs.errors import ExitCode
    from lorafleet.tuning.site_check import examine as examine_all

    raise typer.Exit(ExitCode.OK if examine_all(folder.absolute()) else ExitCode.GATE_REFUSED)


@node.command()
def failed(run: Path, sentence: str) -> None:
    """Say in the run's state why its driver never began."""
    from lorafleet.cluster.execution.node import mark_failed
    from lorafleet.jobs.runs.run import Run

    mark_failed(Run(run), sentence)


@node.command()
def send(
    run: Path,
    weights: Annotated[str, typer.Option(help="none, best, all or exports.")] = "none",
    whole: Annotated[bool, typer.Option("--whole", help="W&B's records too.")] = False,
    texts: Annotated[bool, typer.Option("--texts", help="The job and the plan too.")] = False,
) -> None:
    """Print what of a run's record the other side lacks as a compressed tar; it says on one line what it has."""
    import json
    import sys
    from typing import get_args

    from lorafleet.cluster.remote.transfer import Which, pack
    from lorafleet.jobs.runs.run import Run

    have = {name: (size, changed) for name, (size, changed) in json.loads(sys.stdin.readline()).items()}
    which: Which = next((known for known in get_args(Which) if known == weights), "none")
    pack(Run(run), have, which, sys.stdout.buffer, whole=whole, texts=texts)


@node.command()
def lacks() -> None:
    """Print which of the targets on one line of JSON are not in this machine's cache as they should be."""
    import json
    import sys

    from lorafleet.cluster.remote.transfer import is_there
    from lorafleet.jobs.data.assets import cache_dir

    asked = json.loads(sys.stdin.readline())
    missing = [one["target"] for one in asked if not is_there(cache_dir() / one["target"], one["digest"])]
    typer.echo(json.dumps(missing))


@node.command()
def greet() -> None:
    """Say what this image is, and whether the storage that one line of JSON names can be written."""
    import json
    import sys

    from lorafleet.cluster.execution.node import greet as greet_here

    typer.echo(json.dumps(greet_here(Path(json.loads(sys.stdin.readline())["mount"]))))


@node.command()
def relay(source: Path, command: list[str]) -> None:
    """Run one of these commands on a file's bytes, and print what it says as text: for Ray's job logs."""
    from lorafleet.cluster.ray.client import relay as relay_here

    relay_here(source, command)


@node.command()
def stop(run: Path) -> None:
    """Ask a run's driver to save and end."""
    from lorafleet.cluster.execution.node import ask_to_stop
    from lorafleet.jobs.runs.run import Run

    ask_to_stop(Run(run))


@node.command()
def receive(target: str, digest: str, file: Annotated[bool, typer.Option("--file")] = False) -> None:
    """Put what comes in frames on standard input into the cache: whole, or not at all."""
    import sys

    from lorafleet.cluster.remote.transfer import receive as receive_here
    from lorafleet.jobs.data.assets import cache_dir

    receive_here(cache_dir() / target, digest, sys.stdin.buffer, file=file)


@node.command()
def leave(
    run: Path,
    seconds: Annotated[float, typer.Option(help="How long the pod may still live.")],
    drain: Annotated[bool, typer.Option("--drain", help="This is a worker: Ray is told that it goes.")] = False,
) -> None:
    """Before a pod is taken away: have the trials saved, and return when that is done or the time is up."""
    from lorafleet.cluster.execution.node import leave as leave_pod
    from lorafleet.jobs.runs.run import Run

    leave_pod(Run(run), seconds, drain=drain)
