"""`lorafleet exec RUN`: the driver of a run. Started by a backend, never by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from lorafleet.commands.common import Trust, confirm_trust, say

if TYPE_CHECKING:
    from lorafleet.cluster.execution.driver import Driver
    from lorafleet.jobs.runs.run import Run

_UP_SECONDS = 900.0
"""How long the pods of a cluster may take to join its Ray."""


def execute(
    run: Path,
    job: Annotated[
        Path | None, typer.Option("--job", help="The document of the run, where its folder is not there yet.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Run what is left of a submitted run."""
    from lorafleet.jobs.errors import ExitCode
    from lorafleet.jobs.runs.lease import HasDriver
    from lorafleet.jobs.runs.run import Run
    from lorafleet.jobs.runs.tracebacks import at_run

    found = Run(run.absolute())
    at_run(found.path)
    if job is not None:
        found = _begin(run.absolute(), job)
    from lorafleet.cluster.execution.allocation import allocation_here

    if job is None and not allocation_here():  # there, whoever submitted the job has been asked
        confirm_trust(found, "exec", trust=trust)
    try:
        code = _driver(found).execute()
    except HasDriver as error:
        if not allocation_here():
            raise
        say(str(error))
        code = ExitCode.TAKEN
    raise typer.Exit(code if job is None else _as_a_job(found, code))


def _driver(run: Run) -> Driver:
    from lorafleet.jobs import files

    command = files.read_json(run.path / "plan.json").get("command")
    if command in ("export", "benchmark"):
        from lorafleet.deployment.driver import DeliveryDriver

        return DeliveryDriver(run)
    if command == "compare":
        from lorafleet.tuning.compare import Comparison

        return Comparison(run)
    from lorafleet.tuning.sweep import Sweep

    return Sweep(run)


def _as_a_job(run: Run, code: int) -> int:
    """What Ray is told: it knows success and failure alone, and a failure is tried again on a new cluster.

    A run that is over is none, whatever became of single trials; nor is one that a user ended. A driver that was asked
    to save, since its pod goes, is.
    """
    from lorafleet.jobs.errors import ExitCode
    from lorafleet.jobs.runs.run import RunState

    stop = run.path / "stop"
    ended_by_user = stop.is_file() and bool(stop.read_text())
    over = run.state is RunState.FINISHED  # an export whose gate refused, or with a target that failed, is none
    return ExitCode.OK if ended_by_user or over or code == ExitCode.SOME_TRIALS_FAILED else code


def _begin(folder: Path, document: Path) -> Run:
    """The run's folder, what the job names, and its Ray; what the driver says is written into the folder too."""
    from lorafleet.cluster.fetch import fetch_job
    from lorafleet.cluster.ray.nodes import wait_for_nodes
    from lorafleet.jobs.runs.bundle import unpack
    from lorafleet.jobs.runs.plan import Plan

    run = unpack(folder, document)
    _say_it_there_too(run.path / "logs" / "driver.log")
    if not os.environ.get("HF_HUB_OFFLINE"):
        fetch_job(Plan.model_validate_json((run.path / "plan.json").read_text()).job, say)
    address, nodes = os.environ.get("RAY_ADDRESS"), int(os.environ.get("LF_NODES") or 0)
    if address and nodes and not os.environ.get("LF_AUTOSCALES"):
        wait_for_nodes(address, nodes + 1, _UP_SECONDS)  # and the head
    return run


def _say_it_there_too(log: Path) -> None:
    """Both outputs of this process and its children, in a file as well: a cluster's own logs go with it."""
    log.parent.mkdir(exist_ok=True)
    tee = subprocess.Popen(["tee", "-i", "-a", str(log)], stdin=subprocess.PIPE, start_new_session=True)
    assert tee.stdin is not None
    sys.stdout.flush()
    for output in (1, 2):
        os.dup2(tee.stdin.fileno(), output)
    tee.stdin.close()
