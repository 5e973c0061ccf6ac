"""One rig for all tests of Slurm, and what a user on its login node has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.run import Run
from lorafleet.slurm.accounting import JobRecord, parse_scontrol
from lorafleet.slurm.states import JobState, get_job_state
from tests.slurm.rig import Rig, Unavailable, make_debian, missing


class Rigs:
    """One rig at a time: all of them have the same network."""

    def __init__(self) -> None:
        self.suite: str | None = None
        self.rig: Rig | None = None

    def use(self, suite: str | None) -> Rig:
        """The rig with the Slurm of a Debian; None: with this machine's."""
        if self.rig is not None and self.suite == suite:
            return self.rig
        self.end()
        root = make_debian(suite) if suite else None
        self.suite, self.rig = (
            suite,
            Rig(Path(tempfile.mkdtemp(prefix="rig-", dir="/tmp")), root=root),
        )
        self.rig.up()
        return self.rig

    def end(self) -> None:
        """Take the rig down."""
        if self.rig is not None:
            self.rig.down()
            shutil.rmtree(self.rig.folder, ignore_errors=True)
        self.rig = None


@pytest.fixture(scope="session")
def rigs() -> Iterator[Rigs]:
    rigs = Rigs()
    try:
        yield rigs
    finally:
        rigs.end()


@pytest.fixture
def rig(rigs: Rigs, request: pytest.FixtureRequest) -> Rig:
    """Two nodes. Where a rig cannot be, its tests are skipped with the reason.

    The parameter, if a test has one, is the Debian whose Slurm is used.
    """
    why = missing()
    if why:
        pytest.skip(why)
    try:
        return rigs.use(getattr(request, "param", None))
    except Unavailable as error:
        pytest.skip(str(error))


SITE = """
kind: slurm
cpus_per_node: 2
memory_gb_per_node: 3
time_limit: "15:00"
nodes: 2
scratch_dir: {local}
runs_dir: {runs}
requeue: {{signal_seconds: 60}}
"""


@dataclass
class Login:
    """A user on the login node: a home of their own, a site file, a folder of runs."""

    rig: Rig
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        return self.rig.environment | {
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "XDG_STATE_HOME": str(self.home / "state"),
            "WANDB_API_KEY": PLANTED,
            "HF_TOKEN": PLANTED,
            "LORAFLEET_TEST_SECRET": PLANTED,
        }

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    def write_site(self, name: str = "rig", more: str = "", **values: Any) -> None:
        """A site file in the user's folder; `values` take the place of its keys."""
        text = SITE.format(local=self.rig.local, runs=self.runs)
        lines = [line for line in text.splitlines() if line.partition(":")[0] not in values]
        lines += [f"{key}: {json.dumps(value)}" for key, value in values.items()]
        folder = self.home / "config" / "lorafleet" / "sites"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n" + more)

    def wrap(self, program: str, script: str) -> None:
        """Put a script of a test's in the place of a program of the jobs; PROGRAM in it is the real
        one.
        """
        real = Path(sys.executable).with_name(program)
        fake = self.home / "bin"
        fake.mkdir()
        (fake / program).write_text(f"#!/bin/bash\n{script.replace('PROGRAM', str(real))}\n")
        (fake / program).chmod(0o755)
        self.write_site(setup=[f"export PATH={fake}:{real.parent}:$PATH"])

    def command(self, *words: str | Path) -> list[str]:
        return [str(Path(sys.executable).with_name("lorafleet")), *map(str, words)]

    def lorafleet(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        done = subprocess.run(
            self.command(*words), cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=600,
            check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def begin(self, *words: str | Path) -> subprocess.Popen[str]:
        """Start a command in a process group of its own, as a terminal does."""
        return subprocess.Popen(
            self.command(*words), cwd=self.home, env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def submit(
        self, loaded: LoadedJob, *words: str, command: str = "sweep", site: str = "rig"
    ) -> Run:
        """Hand a job over and return at once."""
        path = self.home / f"job-{time.monotonic_ns()}.yaml"
        path.write_text(loaded.text)
        done = self.lorafleet(command, path, *loaded.overrides, *words, "--on", site, "--detach")
        return Run(self.runs / done.stdout.strip())

    def job(self, run: Run) -> str:
        """The number of a run's job."""
        return (run.path / "slurm" / "jobs").read_text().split()[0]

    def record(self, run: Run) -> JobRecord:
        return parse_scontrol(self.rig.asked("scontrol", "show", "job", "-o", self.job(run)))[0]

    def over(self, run: Run) -> bool:
        """Whether all jobs of a run have ended."""
        jobs = run.path / "slurm" / "jobs"
        said = (
            [
                self.rig.asked("scontrol", "show", "job", "-o", job)
                for job in jobs.read_text().split()
            ]
            if (jobs.is_file())
            else []
        )
        return bool(said) and all(
            get_job_state(record.state).ended for text in said for record in parse_scontrol(text)
        )

    def ended(self, run: Run, seconds: float = 240) -> JobRecord:
        """The job once Slurm says that it is over."""
        return self.when(
            run, lambda: get_job_state(self.record(run).state).ended and self.record(run), seconds
        )

    def ended_however_often(self, run: Run) -> JobRecord:
        """The job once it is over, with no wait where it is requeued again: how often depends on
        the machine.
        """
        while not self.when(
            run, partial(self._ended_or_back, run, self.record(run).restarts)
        ).ended:
            self.start_now(run)
        return self.record(run)

    def _ended_or_back(self, run: Run, restarts: int) -> JobState | None:
        record = self.record(run)
        state = get_job_state(record.state)
        back = record.state == "PENDING" and record.restarts > restarts
        return state if state.ended or back else None

    def when(self, run: Run, condition: Callable[[], Any], seconds: float = 240) -> Any:
        """What a condition says once it holds; else all that is known of the run."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            found = condition()
            if found:
                return found
            if self.over(run):  # what was waited for does not come any more
                ends = min(ends, time.monotonic() + 10)
            time.sleep(0.2)
        logs = [
            *(run.path / "slurm").glob("*.out"),
            run.path / "logs" / "driver.log",
            run.path / "status.json",
        ]
        said = "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in logs if log.is_file())
        raise AssertionError(f"it did not come to that: {self.rig.asked('squeue', '-a')}\n{said}")

    def start_now(self, run: Run) -> None:
        """A requeued job waits for two minutes: not this one."""
        self.when(run, lambda: self.record(run).state == "PENDING" and self.record(run).restarts)
        time.sleep(3)  # sooner Slurm may still hold the credential of the incarnation that it ended
        self.rig.asked("scontrol", "update", f"jobid={self.job(run)}", "StartTime=now")

    def left_behind(self) -> list[str]:
        """Processes and folders of jobs on the nodes, once a job that was cancelled has had
        KillWait's time.
        """
        ends = time.monotonic() + 35
        while (found := self._left_now()) and time.monotonic() < ends:
            time.sleep(0.2)
        return found

    def _left_now(self) -> list[str]:
        found = []
        for number in self.rig.parents:
            found += self.rig.processes(number)
        return found + [
            what for what in self.folders() if not what.endswith(f"lorafleet-{os.getuid()}")
        ]

    def folders(self) -> list[str]:
        """What lies on the nodes' own disks."""
        return [
            f"node{number}: {name}"
            for number in self.rig.parents
            for name in self.rig.on(number, "ls", str(self.rig.local)).split()
        ]


PLANTED = "planted-secret-4711"


@pytest.fixture
def login(rig: Rig, tmp_path: Path) -> Iterator[Login]:
    """A user with a site file `rig`; what their jobs left is cancelled."""
    made = Login(rig, tmp_path)
    made.write_site()
    yield made
    rig.asked("scancel", "--user=root")
    ends = time.monotonic() + 60
    while rig.asked("squeue", "-h") and time.monotonic() < ends:
        time.sleep(0.2)
