"""This machine: a run is a child process, `lorafleet exec RUN`, with a Ray of its own or the one RAY_ADDRESS names."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from cluster.backend import Say, Seen, quietly
from cluster.machine import check_torch
from cluster.planning import make_plan
from cluster.transfer import Which
from jobs import files
from jobs.errors import ExitCode, RunError
from jobs.load import LoadedJob, dump_resolved
from jobs.plan import Plan
from jobs.run import Run, RunState
from jobs.site import Site


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
        """Start the driver. It stays in this process group: a terminal that closes takes it along."""
        logs = run.path / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / "driver.log").open("ab") as log:
            self.child = subprocess.Popen(
                [*driver_command(), "exec", str(run.path)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=run.path,
            )

    def refresh(self, run: Run, say: Say = quietly) -> None:
        """Nothing: the folder is the run's own."""

    def pull(self, run: Run, which: Which, say: Say) -> int:
        """Raises RunError: it is all here."""
        raise RunError(f"{run.id} lies in {run.path} itself: there is nothing to bring")

    def resume(self, run: Run) -> None:
        """Start the driver of a run whose last one is gone. Raises RunError when it still lives."""
        if run.alive():
            raise RunError(f"{run.id} is running (process {run.status()['pid']}); `lorafleet status {run.id}` shows it")
        clear_leftovers(run)
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


def driver_command() -> list[str]:
    """The console script beside this Python; without it, the same function with a path that holds no foreign folder."""
    script = Path(sys.executable).with_name("lorafleet")
    if script.is_file():
        return [str(script)]
    return [sys.executable, "-P", "-c", "from commands.cli import main; main()"]


def write_run(plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
    """A new run's folder, whole, and pending."""
    run = Run.create(runs, plan.job.name)
    files.write_text(run.path / "job.yaml", loaded.text)
    files.write_text(run.path / "resolved.json", dump_resolved(loaded))
    files.write_json(run.path / "plan.json", plan.model_dump(mode="json"))
    return run


def clear_leftovers(run: Run) -> None:
    """End what killed drivers left of their own Ray: processes that have its session's folder on their command line."""
    for one in [run, *run.arms()]:
        _clear_session(one)


def _clear_session(run: Run) -> None:
    import psutil

    ray = files.read_json(run.path / "logs" / "ray.json")
    session = Path(str(ray.get("session_dir") or "/")).name
    if not ray.get("own") or not session.startswith("session_"):
        return
    left = []
    for process in psutil.process_iter(["cmdline"]):
        if any(session in word for word in process.info["cmdline"] or []):
            left.append(process)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)
    if ray.get("scratch"):
        shutil.rmtree(Path(ray["scratch"]), ignore_errors=True)
