"""The local backend: a run is a child process, `lorafleet exec RUN`.

The process trains itself, has its own Ray, or uses the one that RAY_ADDRESS names. If it may die of
what it trains, `exec` divides into a supervisor, which is the child, and the driver.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lorafleet.cluster.backend import RunStatus, Say, WeightSelection, ignore_message
from lorafleet.cluster.execution.command import get_driver_command
from lorafleet.cluster.hardware import check_torch
from lorafleet.cluster.submission import write_run
from lorafleet.jobs import files
from lorafleet.jobs.errors import ExitCode, RunError
from lorafleet.jobs.extras import require_training
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.runs.stale_folders import remove_orphans
from lorafleet.jobs.sites.base import Site

if TYPE_CHECKING:
    from lorafleet.jobs.loading.job_file import LoadedJob
    from lorafleet.jobs.runs.plan import Plan

_START_SECONDS = 10.0
"""Longest wait for a driver that was started to record that it has the run."""
_START_POLL_SECONDS = 0.05


class LocalBackend:
    """A backend that runs jobs on this machine.

    The driver is a child process but lives on its own: it continues if the command is
    killed, and later commands find it by the process id in status.json.

    Args:
        site: This machine, or the Ray that RAY_ADDRESS names. None: this machine; it is examined
            only if a job is planned.
    """

    def __init__(self, site: Site | None = None) -> None:
        self._site = site
        self.child: subprocess.Popen[bytes] | None = None

    shares_disk = True

    def describe_run_location(self, run: str, runs: Path) -> str:
        """Return where a run of this name is, for people."""
        return str(runs / run)

    def resolve_runs_dir(self, requested: Path) -> Path:
        """Return the folder that the user names."""
        return requested

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Return the plan of everything that would happen.

        Raises:
            UserError: The job cannot start on this machine.
        """
        # Imported here: planning builds the schema of the whole job, which `status` does not need.
        from lorafleet.cluster.local_site import detect_local_site
        from lorafleet.cluster.planning.earlier_runs import read_earlier_trials
        from lorafleet.cluster.planning.plan import make_plan

        earlier = read_earlier_trials(loaded.job.model.model_name_or_path, "here")
        return make_plan(loaded, self._site or detect_local_site(), command, earlier=earlier)

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """Return no problems: the plan has already made every check."""
        return [], []

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Write the run's folder, then start its driver.

        Raises:
            PlacementRefused: The job uses GPUs, but the installed torch is a CPU build.
            DiskFull: The folder could not be written.
        """
        require_training("running a job on this machine")
        check_torch(plan.placement.gpus_per_worker)
        run = write_run(plan, loaded, runs)
        self.start(run)
        return run

    def start(self, run: Run) -> None:
        """Start the driver in its own process group, apart from the terminal's signals.

        All signals reach it through the command that watches it. The caller has already checked
        that the run belongs to this user. Returns when the driver has the run, so that a later
        command, such as `stop`, finds it.
        """
        logs = run.path / "logs"
        logs.mkdir(exist_ok=True)
        earlier_attempt = run.read_status().attempt
        with files.open_to_append(logs / "driver.log") as log:
            self.child = subprocess.Popen(
                [*get_driver_command(), "exec", str(run.path), "--trust"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=run.path,
                # Ctrl-C signals the whole foreground group: the driver would get it twice, from the
                # terminal and from the command.
                process_group=0,
            )
        _STARTED_DRIVERS.append(self.child)
        # A driver that waits for the silence of an earlier one takes longer; it is not waited for.
        deadline = time.monotonic() + _START_SECONDS
        while run.read_status().attempt == earlier_attempt and time.monotonic() < deadline:
            if self.child.poll() is not None:
                break
            time.sleep(_START_POLL_SECONDS)

    def refresh(self, run: Run, say: Say = ignore_message) -> None:
        """Do nothing: the local folder is the run itself."""

    def pull(self, run: Run, weights: WeightSelection, say: Say) -> int:
        """Raise RunError: all files are already here."""
        raise RunError(f"{run.id} ran on this machine, in {run.path}: there is nothing to download")

    def resume(self, run: Run) -> None:
        """Start the driver of a run whose last driver has died.

        Raises:
            RunError: The last driver is still running.
        """
        if run.is_alive():
            raise RunError(
                f"{run.id} is already running (process {run.read_status().pid}): see `lorafleet "
                f"status {run.id}`"
            )
        remove_orphans(Path(tempfile.gettempdir()))
        # It removes only lorafleet's own folders.
        remove_orphans(Path("/tmp"))  # nosec B108
        # A user's request to stop lasts until here.
        (run.path / "stop").unlink(missing_ok=True)
        self.start(run)

    def status(self, run: Run) -> RunStatus:
        """Return the run's status; a run whose driver died without a recorded end has failed."""
        if run.has_lost_driver():
            return RunStatus(
                RunState.FAILED, f"its driver died: continue it with `lorafleet resume {run.id}`"
            )
        return RunStatus(run.state, str(run.read_status().reason or ""))

    def watch(self, run: Run) -> ChildWatch:
        """Return a watch on the driver that was started last."""
        assert self.child is not None
        return ChildWatch(self.child)

    def cancel(self, run: Run) -> str:
        """Ask the run to save and end."""
        pid = run.read_status().pid
        if not pid or not run.is_alive():
            raise RunError(
                f"{run.id} is not running on this machine: it is {self.status(run).state}"
            )
        # `is_alive` has compared host, process id and start time, so the id is the driver's.
        os.kill(pid, signal.SIGINT)
        return (
            f"{run.id} is saving its trials and will stop; continue it with `lorafleet resume "
            f"{run.id}`"
        )


class ChildWatch:
    """A watch on a driver that is a child of this process."""

    detaches = False

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.child = child
        self.status = RunStatus(RunState.RUNNING)

    def poll(self) -> int | None:
        """Return the exit code once the driver has ended; death by a signal counts as
        interrupted.
        """
        code = self.child.poll()
        return ExitCode.INTERRUPTED if code is not None and code < 0 else code

    def send_signal(self, number: int) -> None:
        """Pass a signal on to the driver."""
        self.child.send_signal(number)

    def close(self) -> None:
        """Do nothing: this watch holds no resources."""


_STARTED_DRIVERS: list[subprocess.Popen[bytes]] = []


def interrupt_drivers() -> None:
    """Pass Ctrl-C on to drivers that this process has started, before anything watches them.

    The command's last resort: an interrupt between the start of the driver and `follow`
    would leave it running unseen.
    """
    for child in _STARTED_DRIVERS:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
