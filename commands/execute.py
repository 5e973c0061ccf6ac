"""`lorafleet exec RUN`: the driver of a run. A backend starts it, never a person.

The same command on every backend. With `--job`, it first creates the run's folder from
a bundle, because the submitting machine cannot write to the cluster's storage.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.commands.common import Trust, confirm_trust, print_message

if TYPE_CHECKING:
    from lorafleet.cluster.execution.driver import Driver
    from lorafleet.cluster.execution.supervisor import Restart
    from lorafleet.jobs.runs.run import Run

_UP_SECONDS = 900.0
"""Seconds that the pods of a cluster may take to join its Ray."""


def execute(
    run: Path,
    job: Annotated[
        Path | None,
        typer.Option("--job", help="The packed run, used if its folder does not exist yet."),
    ] = None,
    trust: Trust = False,
) -> None:
    """Run the remaining work of a submitted run."""
    from lorafleet.jobs.errors import ExitCode
    from lorafleet.jobs.runs.lease import HasDriver
    from lorafleet.jobs.runs.run import Run
    from lorafleet.jobs.runs.tracebacks import set_current_run

    # Absolute, because the driver changes its working directory.
    selected_run = Run(run.absolute())
    set_current_run(selected_run.path)
    if job is not None:
        selected_run = _unpack_run(run.absolute(), job)
    from lorafleet.cluster.execution.allocation import get_allocation
    from lorafleet.cluster.execution.supervisor import RESTART_STATUS

    if (
        job is None and not get_allocation()
    ):  # inside an allocation the submitter has already confirmed
        confirm_trust(selected_run, "exec", trust=trust)
    try:
        restart = _fork_supervised(selected_run) if job is None else None
        code = _create_driver(selected_run, restart).execute()
        if code == RESTART_STATUS:
            # Without the usual clean-up: this process may have lost its GPU.
            sys.stderr.flush()
            os._exit(code)
    # In a Slurm job this is normal: the queue may start a job again while its first start is alive.
    # The code tells the batch script that the run is not over.
    except HasDriver as error:
        if not get_allocation():
            raise
        print_message(str(error))
        code = ExitCode.TAKEN
    raise typer.Exit(code if job is None else _convert_exit_code(selected_run, code))


def _fork_supervised(run: Run) -> Restart | None:
    """Fork the driver if it trains or evaluates in its own process, and may die of it.

    Where Ray runs the trials and evaluations, the driver survives them.

    Returns:
        In the driver: why its supervisor has started it again, or None.
    """
    from lorafleet.cluster.execution.supervisor import fork_driver
    from lorafleet.jobs.sites.placement import Placement

    plan = run.read_plan()
    if plan.command not in ("train", "sweep", "compare") or os.environ.get("RAY_ADDRESS"):
        return None
    placement = Placement.model_validate(plan.placement)
    trains = plan.command != "compare" and placement.fits_one_process
    if trains or plan.command == "compare" or placement.is_distributed:
        return fork_driver(run, trains=trains)
    return None


def _create_driver(run: Run, restart: Restart | None) -> Driver:
    # Each driver is imported only when it is needed: an export must not load Ray.
    command = run.read_plan().command
    if command in ("export", "benchmark"):
        from lorafleet.deployment.driver import DeliveryDriver

        return DeliveryDriver(run)
    if command == "compare":
        from lorafleet.tuning.compare import Comparison

        return Comparison(run, restart)
    from lorafleet.tuning.sweep import Sweep

    return Sweep(run, restart)


def _convert_exit_code(run: Run, code: int) -> int:
    """Return the exit code to report to Ray for a driver's exit code.

    Ray knows only success and failure, and retries a failure on a new cluster. A finished run,
    whatever became of single trials, and a run that a user stopped therefore count as success. A
    driver that had to save because its pod is being deleted counts as failure, so that Ray
    retries it.
    """
    from lorafleet.jobs.errors import ExitCode
    from lorafleet.jobs.runs.run import RunState

    # A user's request has text in the file; a signal leaves it empty.
    stop_file = run.path / "stop"
    ended_by_user = stop_file.is_file() and bool(stop_file.read_text())
    is_finished = (
        run.state is RunState.FINISHED
    )  # not a failure to retry: also an export with a refused or failed target
    return (
        ExitCode.OK if ended_by_user or is_finished or code == ExitCode.SOME_TRIALS_FAILED else code
    )


def _unpack_run(folder: Path, document: Path) -> Run:
    """Unpack the run's folder, fetch what its job names, and wait for its Ray.

    The driver's output also goes to the run's logs/driver.log.
    """
    from lorafleet.cluster.fetch import fetch_job
    from lorafleet.cluster.ray.nodes import wait_for_nodes
    from lorafleet.jobs.runs.bundle import unpack
    from lorafleet.jobs.runs.plan import read_plan

    run = unpack(folder, document)
    _tee_output(run.path / "logs" / "driver.log")
    # Set for sites without internet access, whose inputs were uploaded.
    if not os.environ.get("HF_HUB_OFFLINE"):
        fetch_job(read_plan(run.path / "plan.json").job, print_message)
    address, nodes = os.environ.get("RAY_ADDRESS"), int(os.environ.get("LF_NODES") or 0)
    if address and nodes and not os.environ.get("LF_AUTOSCALES"):
        wait_for_nodes(address, nodes + 1, _UP_SECONDS)  # workers and the head
    return run


def _tee_output(log: Path) -> None:
    """Copy standard output and error of this process and its children to a file.

    A cluster deletes its own logs together with the job.
    """
    log.parent.mkdir(exist_ok=True)
    # A process, because output of child processes and C libraries must be copied too. `-i` and a
    # session of its own keep signals away from it, so that it outlives this process and writes the
    # last lines.
    tee = subprocess.Popen(
        ["tee", "-i", "-a", str(log)], stdin=subprocess.PIPE, start_new_session=True
    )
    assert tee.stdin is not None
    sys.stdout.flush()
    for output in (1, 2):
        os.dup2(tee.stdin.fileno(), output)
    tee.stdin.close()
