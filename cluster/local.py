"""This machine: a run is a child process, `lorafleet exec RUN`, with a Ray of its own or the one RAY_ADDRESS names."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from lorafleet.cluster.backend import Say, Seen, quietly
from lorafleet.cluster.hardware import check_torch
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.remote.transfer import Which
from lorafleet.jobs import files
from lorafleet.jobs.errors import ExitCode, RunError, disk_full
from lorafleet.jobs.loading.job_file import LoadedJob, dump_resolved
from lorafleet.jobs.runs.plan import Plan
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.runs.stale_folders import clear_orphans
from lorafleet.jobs.sites.base import Site


class LocalBackend:
    """Runs a job here."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.child: subprocess.Popen[bytes] | None = None

    def runs_dir(self, given: Path) -> Path:
        """Where the user says."""
        return given

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Everything that would happen. Raises a UserError where the job cannot begin here."""
        return make_plan(loaded, self.site, command)

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """Nothing that the plan itself has not."""
        return [], []

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Write the run's folder, then start its driver."""
        check_torch(plan.placement.gpus_per_worker)
        run = write_run(plan, loaded, runs)
        self.start(run)
        return run

    def start(self, run: Run) -> None:
        """Start the driver, in a process group of its own: all signals reach it through the command that follows it.

        Whether the run is this user's own was asked before.
        """
        logs = run.path / "logs"
        logs.mkdir(exist_ok=True)
        with files.opened_to_append(logs / "driver.log") as log:
            self.child = subprocess.Popen(
                [*driver_command(), "exec", str(run.path), "--trust"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=run.path,
                process_group=0,
            )
        _STARTED.append(self.child)

    def refresh(self, run: Run, say: Say = quietly) -> None:
        """Nothing: the folder is the run's own."""

    def pull(self, run: Run, which: Which, say: Say) -> int:
        """Raises RunError: it is all here."""
        raise RunError(f"{run.id} lies in {run.path} itself: there is nothing to bring")

    def resume(self, run: Run) -> None:
        """Start the driver of a run whose last one is gone. Raises RunError when it still lives."""
        if run.alive():
            raise RunError(f"{run.id} is running (process {run.status()['pid']}); `lorafleet status {run.id}` shows it")
        clear_orphans(Path(tempfile.gettempdir()))
        clear_orphans(Path("/tmp"))  # nosec B108  # only what is ours
        (run.path / "stop").unlink(missing_ok=True)
        self.start(run)

    def look(self, run: Run) -> Seen:
        """The run's state; one whose driver died without a word is failed."""
        if run.gone():
            return Seen(RunState.FAILED, f"its driver is gone: `lorafleet resume {run.id}` goes on")
        return Seen(run.state, str(run.status().get("reason") or ""))

    def watch(self, run: Run) -> ChildWatch:
        """The driver that was started last."""
        assert self.child is not None
        return ChildWatch(self.child)

    def cancel(self, run: Run) -> str:
        """Ask the run to save and end."""
        if not run.alive():
            raise RunError(f"{run.id} is not running here: it is {self.look(run).state}")
        os.kill(int(run.status()["pid"]), signal.SIGINT)
        return f"{run.id} saves its trials and ends; `lorafleet resume {run.id}` goes on"


class ChildWatch:
    """A driver that is a child of this process."""

    detaches = False

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.child = child
        self.seen = Seen(RunState.RUNNING)

    def poll(self) -> int | None:
        """Its exit code once it has ended; one that a signal ended was interrupted."""
        code = self.child.poll()
        return ExitCode.INTERRUPTED if code is not None and code < 0 else code

    def send_signal(self, number: int) -> None:
        """Pass a signal on."""
        self.child.send_signal(number)

    def close(self) -> None:
        """Nothing: there is nothing of its own."""


_STARTED: list[subprocess.Popen[bytes]] = []


def interrupt_drivers() -> None:
    """Pass Ctrl-C on to drivers that this process has started, before anybody follows them."""
    for child in _STARTED:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)


def driver_command() -> list[str]:
    """The console script beside this Python; without it, the same function with a path that holds no foreign folder."""
    script = Path(sys.executable).with_name("lorafleet")
    if script.is_file():
        return [str(script)]
    return [sys.executable, "-P", "-c", "from lorafleet.commands.cli import main; main()"]


def write_run(plan: Plan, loaded: LoadedJob, runs: Path, share: str = "none") -> Run:
    """A new run's folder, whole, and pending; `share` is a site's (`make_run_folder`)."""
    run = Run.create(runs, plan.job.name, share)
    try:
        files.write_text(run.path / "job.yaml", loaded.text)
        files.write_text(run.path / "resolved.json", dump_resolved(loaded))
        files.write_json(run.path / "plan.json", plan.model_dump(mode="json"))
    except BaseException as error:
        shutil.rmtree(run.path, ignore_errors=True)
        full = disk_full(error, runs, "start again")
        if full is not None:
            raise full from error
        raise
    return run
