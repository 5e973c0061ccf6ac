"""`lorafleet node`: commands that a job's scripts call on the nodes of a cluster. Never typed by
hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

node = typer.Typer(
    name="node", help="Commands that a job's scripts run on its nodes.", no_args_is_help=True
)

_UP_SECONDS = 900.0
"""Seconds that nodes may take to join: staging a model is slow, and nodes that cannot join end the
job at once.
"""


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
    """Print this node's hardware, software and ports as one line of JSON."""
    from lorafleet.cluster.execution.node import inspect_node as look_here

    report = look_here(run, nonce, address, node, number, interface, scratch)
    typer.echo(report.model_dump_json())


@node.command()
def agree(
    run: Path,
    reports: Path,
    nonce: Annotated[str, typer.Option()],
    nodes: Annotated[int, typer.Option()],
    cpus: Annotated[int, typer.Option()],
    job: Annotated[int, typer.Option()],
    memory_gb: Annotated[float, typer.Option()] = 0.0,
    gpus: Annotated[int, typer.Option()] = 0,
    gpu_memory_gb: Annotated[float, typer.Option()] = 0.0,
) -> None:
    """Print the address and ports of the job's Ray if all nodes agree.

    Each must have the CPU cores, the memory and the GPUs that the site file states. LF_HEAD_WORKS
    is 0 if the head runs no trials.
    """
    import os

    from lorafleet.cluster.execution.node import StatedResources
    from lorafleet.cluster.execution.node import resolve_ray_address as agree_on

    stated = StatedResources(cpus=cpus, memory_gb=memory_gb, gpus=gpus, gpu_memory_gb=gpu_memory_gb)
    head_works = os.environ.get("LF_HEAD_WORKS") != "0"
    typer.echo(agree_on(run, reports, nonce, nodes, stated, job, head_works=head_works))


@node.command()
def stage(run: Path) -> None:
    """Copy the run's models to this node's own disk."""
    import os

    from lorafleet.cluster.execution.node import stage_models
    from lorafleet.jobs.runs.run import Run

    stage_models(Run(run), Path(os.environ["LORAFLEET_STAGE"]), typer.echo)


@node.command()
def wait(address: str, nodes: int) -> None:
    """Wait until all nodes of the job's Ray are alive."""
    from lorafleet.cluster.ray.nodes import wait_for_nodes

    wait_for_nodes(address, nodes, _UP_SECONDS)


@node.command()
def examine(folder: Path) -> None:
    """Check all nodes of the job's Ray, for `lorafleet doctor --on`."""
    from lorafleet.jobs.errors import ExitCode
    from lorafleet.tuning.site_check import check_site as examine_all

    raise typer.Exit(ExitCode.OK if examine_all(folder.absolute()) else ExitCode.GATE_REFUSED)


@node.command()
def probe(run: Path) -> None:
    """Measure a few steps of the run's first trial, for `lorafleet plan --probe`."""
    from lorafleet.cluster.probe import PACE_FILE, measure_rate
    from lorafleet.jobs import files
    from lorafleet.jobs.runs.plan import read_plan

    folder = run.absolute()
    rate = measure_rate(read_plan(folder / "plan.json"), folder)
    files.write_json(folder / PACE_FILE, rate.model_dump())


@node.command()
def failed(run: Path, sentence: str) -> None:
    """Record in the run's state why its driver never started."""
    from lorafleet.cluster.execution.node import mark_failed
    from lorafleet.jobs.runs.run import Run

    mark_failed(Run(run), sentence)


@node.command()
def send(
    run: Path,
    weights: Annotated[
        str, typer.Option(help="Weights to send: none, best, all or exports.")
    ] = "none",
    whole: Annotated[bool, typer.Option("--whole", help="Also send the W&B records.")] = False,
    texts: Annotated[bool, typer.Option("--texts", help="Also send the job and the plan.")] = False,
) -> None:
    """Print the files of a run's record that the other side lacks, as a compressed tar.

    The other side sends one line of JSON on standard input: the files it has, with size and time
    of change.
    """
    import json
    import sys
    from typing import get_args

    from lorafleet.cluster.backend import WeightSelection
    from lorafleet.cluster.remote.transfer import pack
    from lorafleet.jobs.runs.run import Run

    have = {
        name: (size, changed) for name, (size, changed) in json.loads(sys.stdin.readline()).items()
    }
    # An unknown word, from a client of another version, sends no weights.
    which: WeightSelection = next(
        (choice for choice in get_args(WeightSelection) if choice == weights), "none"
    )
    pack(Run(run), have, which, sys.stdout.buffer, include_wandb=whole, texts=texts)


@node.command()
def lacks() -> None:
    """Print the upload targets that are missing or differ in this machine's cache.

    The targets and their digests come as one line of JSON on standard input.
    """
    import json
    import sys

    from lorafleet.cluster.remote.transfer import has_digest
    from lorafleet.jobs.data.assets import get_cache_dir

    requests = json.loads(sys.stdin.readline())
    missing = [
        request["target"]
        for request in requests
        if not has_digest(get_cache_dir() / request["target"], request["digest"])
    ]
    typer.echo(json.dumps(missing))


@node.command()
def greet() -> None:
    """Print this image's versions, and whether the storage can be written.

    One line of JSON on standard input names the storage.
    """
    import json
    import sys

    from lorafleet.cluster.execution.node import inspect_storage as greet_here

    typer.echo(json.dumps(greet_here(Path(json.loads(sys.stdin.readline())["mount"]))))


@node.command()
def relay(source: Path, command: list[str]) -> None:
    """Run a `node` command on a file's bytes and print its output as text.

    Ray's job logs carry the text.
    """
    from lorafleet.cluster.ray.client import relay as relay_here

    relay_here(source, command)


@node.command()
def stop(run: Path) -> None:
    """Ask a run's driver to save and stop."""
    from lorafleet.cluster.execution.node import request_stop
    from lorafleet.jobs.runs.run import Run

    request_stop(Run(run))


@node.command()
def receive(
    target: str, digest: str, file: Annotated[bool, typer.Option("--file")] = False
) -> None:
    """Store framed data from standard input in the cache, completely or not at all."""
    import sys

    from lorafleet.cluster.remote.transfer import receive as receive_here
    from lorafleet.jobs.data.assets import get_cache_dir

    receive_here(get_cache_dir() / target, digest, sys.stdin.buffer, file=file)


@node.command()
def leave(
    run: Path,
    seconds: Annotated[float, typer.Option(help="Seconds until the pod is killed.")],
    drain: Annotated[
        bool,
        typer.Option("--drain", help="The pod is a worker: tell Ray that this node will go away."),
    ] = False,
) -> None:
    """Save a run's trials before its pod is deleted.

    Returns when that is done or the time is up.
    """
    from lorafleet.cluster.execution.node import stop_before_deletion as leave_pod
    from lorafleet.jobs.runs.run import Run

    leave_pod(Run(run), seconds, drain=drain)
