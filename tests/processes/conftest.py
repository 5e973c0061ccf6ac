"""Real sweeps: the command line, real Ray, several workers."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.events import BaseLoadedEvent, RungEvent
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.trials import asha as rungs
from tests.conftest import lorafleet

pytestmark = pytest.mark.ray


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "processes" in str(item.path):
            item.add_marker(pytest.mark.ray)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder to run in, with a foreign package that must not be imported."""
    folder = tmp_path / "place"
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "__init__.py").write_text(
        "raise SystemExit('a foreign package was imported')"
    )
    yield folder
    for process in psutil.process_iter(["cmdline"]):  # what a failed test may have left
        if any(str(folder) in word for word in process.info["cmdline"] or []):
            process.kill()


def accuracy_of(predictions: Path) -> float:
    """The share of rows that a stored predictions file has right."""
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(rows) >= 10
    return sum(row["predicted"] == row["label"] for row in rows) / len(rows)


def save(loaded: LoadedJob, folder: Path) -> Path:
    """A job as a file in the folder that the command runs in."""
    path = folder / "job.yaml"
    path.write_text(loaded.text)
    return path


def sweep(
    loaded: LoadedJob, place: Path, *words: str, command: str = "sweep"
) -> tuple[Run, subprocess.CompletedProcess[str]]:
    """Run a sweep to its end."""
    done = lorafleet(command, save(loaded, place), *loaded.overrides, *words, cwd=place)
    return newest(place), done


def newest(place: Path) -> Run:
    folders = sorted((place / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    assert folders, "no run was made"
    return Run(folders[-1])


def begin(
    loaded: LoadedJob, place: Path, *words: str, command: str = "sweep", **env: str
) -> subprocess.Popen[str]:
    """Start a sweep in a process group of its own, as a terminal does."""
    line = [
        str(Path(sys.executable).with_name("lorafleet")),
        command,
        str(save(loaded, place)),
        *loaded.overrides,
    ]
    return subprocess.Popen(
        [*line, *words],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | env,
    )


def wait_for(condition: Callable[[], Any], seconds: float = 300.0) -> Any:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def kill_tree(process: subprocess.Popen[str]) -> None:
    """kill -9 of a process and all that it started."""
    parent = psutil.Process(process.pid)
    victims = [parent, *parent.children(recursive=True)]
    for victim in victims:
        victim.kill()
    process.wait()
    psutil.wait_procs(victims, timeout=30)  # a signal that was sent is not a process that is gone


PAIR = """
search:
  method: grid
  max_concurrent_trials: 2
  scheduler: {type: none, max_t: 160000}
  parameters: {train.learning_rate: {values: [1e-3, 3e-3]}}
"""
"""Two trials at once, for which the driver starts a Ray. A single trial it trains itself."""

RANDOM = """
search:
  num_samples: 8
  max_concurrent_trials: 2
  keep: 3
  scheduler: {type: asha, max_t: 144, reduction_factor: 3}
  parameters:
    lora.lora_r: {values: [2, 4, 8]}
    train.learning_rate: {distribution: log_uniform_values, min: 1e-3, max: 5e-2}
"""


FAULTS = Path(__file__).parent / "faults"


def planted(place: Path, at: str, do: str, **more: object) -> dict[str, str]:
    """The environment in which one call of one function goes wrong once (see
    faults/sitecustomize.py).
    """
    fault = {"at": at, "do": do, "flag": str(place / "it-happened"), **more}
    return {"LORAFLEET_TEST_FAULT": json.dumps(fault), "PYTHONPATH": str(FAULTS)}


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C: the terminal signals every process of the group."""
    os.killpg(process.pid, signal.SIGINT)


def base_loads(run: Run) -> int:
    return sum({event.actor: event.count for event in run.read_events(BaseLoadedEvent)}.values())


def check_cuts(run: Run) -> int:
    """Compare every decision at a rung with what the scores recorded until then imply; returns how
    many there were.
    """
    plan = json.loads((run.path / "plan.json").read_text())
    metric = plan["job"]["search"]["metric"] or {"name": "accuracy", "goal": "maximize"}
    eta = plan["job"]["search"]["scheduler"]["reduction_factor"]
    rows = [
        (row.time, row.rung, row.get_metric(metric["name"]), row.loss)
        for trial in run.list_trials()
        for row in trial.read_metrics()
        if row.rung is not None
    ]
    events = run.read_events(RungEvent)
    for event in events:
        recorded = [
            rungs.make_rung_score(score, loss, metric["goal"])
            for when, rung, score, loss in rows
            if rung == event.rung and when <= event.time
        ]
        rung_score = rungs.make_rung_score(event.score, event.loss, metric["goal"])
        assert rung_score in recorded
        assert len(recorded) == event.scores
        kept = sorted(recorded, reverse=True)[: max(1, len(recorded) // eta)]
        assert event.goes_on == (rung_score[0] > -math.inf and rung_score >= kept[-1])
    stopped = {trial.id for trial in run.list_trials() if trial.state == "stopped"}
    assert stopped == {event.trial_id for event in events if not event.goes_on}
    assert len({(event.trial_id, event.rung) for event in events}) == len(
        events
    )  # none was made twice
    return len(events)


class Machines:
    """A head without CPU cores, as clusters have it, and workers with one each, the first in a pool
    of its own.
    """

    def __init__(self, workers: int) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": _free_port()}
        self.cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        self.workers = [self.add("two" if number else "one") for number in range(workers)]

    def add(self, pool: str = "two", cpus: int = 1) -> Any:
        """One more machine."""
        return self.cluster.add_node(num_cpus=cpus, labels={"pool": pool})

    @property
    def environment(self) -> dict[str, str]:
        """What a user has set."""
        return {"RAY_ADDRESS": self.cluster.address}

    def left(self) -> list[str]:
        """Actors and placement groups that are still there, asked from a process of its own.

        Ray Train keeps two actors of its own for a cluster, whoever uses it: they are not counted.
        """
        code = (
            "import ray, json; ray.init(log_to_driver=False); from ray.util.state import "
            "list_actors, list_placement_groups as groups; own = ('TrainStateActor', "
            "'_AutoscalingCoordinatorActor'); print(json.dumps([a.class_name for a in "
            "list_actors() if a.state == 'ALIVE' and a.class_name not in own] + "
            "[g.placement_group_id for g in groups() if g.state != 'REMOVED']))"
        )
        found: list[str] = json.loads(self._asked(code))
        return found

    def used(self, run: Run) -> Any:
        """A machine that has a worker of a trial and not the run's driver, or None.

        All have one address here, and Ray lets the driver join any of them; on a real cluster it is
        on the head.
        """
        driver = json.loads((run.path / "logs" / "ray.json").read_text())["node_id"]
        found = self.hosts("RayTrainWorker")
        return next(
            (node for node in self.workers if node.node_id in found and node.node_id != driver),
            None,
        )

    def hosts(self, actor: str) -> list[str]:
        """The machines of the actors whose class has this in its name."""
        code = (
            "import ray; ray.init(log_to_driver=False); from ray.util.state import list_actors; "
            f"print(*(a.node_id for a in list_actors() if a.state == 'ALIVE' and {actor!r} in "
            "a.class_name))"
        )
        return self._asked(code).split()

    def kill(self, node: Any) -> None:
        """The machine and all that runs on it is gone at once."""
        self.workers.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def _asked(self, code: str) -> str:
        """The last line that a process of its own prints."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return (done.stdout.splitlines() or [""])[-1]


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Of the tests' own environment Ray passes LORAFLEET_TEST_FAULT on, to every machine; what acts
    # on it is here.
    monkeypatch.setenv("PYTHONPATH", str(FAULTS))
    made = Machines(3)
    try:
        yield made
    finally:
        made.cluster.shutdown()


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port: int = asked.getsockname()[1]
        return port


KILLS = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line a cell of the kill matrix."""
    for line in terminalreporter.config.stash.get(KILLS, []):
        terminalreporter.write_line(line)
