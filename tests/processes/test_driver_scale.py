"""The driver of a large search: what it costs a shared disk, and what survives its death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stub_search import PacedSearch, StubSearch
from lorafleet.cluster.local_site import detect_local_site
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.submission import write_run
from lorafleet.evaluation.report.search import load_trial_rows
from lorafleet.jobs.runs.events import RungEvent
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.tuning.progress import StopFile
from tests.conftest import ROOT, JobMaker

SEARCH = """
search:
  parameters:
    lora.lora_r: {values: [1, 2, 4, 8]}
    train.learning_rate: {distribution: log_uniform_values, min: 1e-5, max: 1e-2}
  scheduler: {type: asha, grace_period: 64, max_t: 640, reduction_factor: 3}
"""


def make_run(job_maker: JobMaker, folder: Path, trials: int) -> Run:
    loaded = job_maker(SEARCH, search__num_samples=trials, tracking__mode="disabled")
    return write_run(make_plan(loaded, detect_local_site(), "sweep"), loaded, folder)


class _Operations:
    """Counts operations that a shared file system would have to answer, of all threads."""

    def __init__(self) -> None:
        self.names = Counter[str]()
        self.is_counting = False

    def count(self, name: str) -> None:
        if self.is_counting:
            self.names[name] += 1

    @property
    def total(self) -> int:
        return sum(self.names.values())


_AUDITED = {
    "open",
    "os.chmod",
    "os.link",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "os.truncate",
    "os.utime",
}
_operations = _Operations()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    # Pipes and sockets are opened by number; sources of modules are not on the shared disk.
    if event in _AUDITED and not (event == "open" and isinstance(arguments[0], int)):
        _operations.count(event)


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Operations]:
    """Counts opens, renames, scans and so on by Python's audit events, and what has none."""
    if not hasattr(sys, "_lorafleet_audit"):
        sys.addaudithook(_audit)  # for good: a hook cannot be removed
        sys._lorafleet_audit = True  # type: ignore[attr-defined]

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            _operations.count(name)
            return function(*arguments, **options)

        return call

    for name in ("stat", "lstat", "fsync"):
        monkeypatch.setattr(os, name, counting(name, getattr(os, name)))
    _operations.names.clear()
    yield _operations
    _operations.is_counting = False


def test_the_operations_are_counted(operations: _Operations, tmp_path: Path) -> None:
    operations.is_counting = True
    (tmp_path / "y").unlink(missing_ok=True)
    assert operations.names == {"os.remove": 1}
    StopFile(tmp_path / "stop").exists()
    with (tmp_path / "x").open("w") as file:
        os.fsync(file.fileno())
    list(tmp_path.iterdir())
    assert operations.names == {
        "os.remove": 1,
        "stat": 1,
        "open": 1,
        "fsync": 1,
        "os.listdir": 1,
    }


def test_512_trials_cost_few_operations_a_second(
    bert_job: JobMaker, tmp_path: Path, operations: _Operations
) -> None:
    seconds = 12.0

    class Search(PacedSearch):
        def on_training(self) -> None:
            operations.is_counting = True

        def on_trained(self) -> None:
            operations.is_counting = False

    run = make_run(bert_job, tmp_path, 600)
    search = Search(run, 512, seconds)
    search.execute()
    assert search.heartbeats > 512 * (seconds / 1.5 - 1)
    assert len(search.run.read_progress()) == 512
    assert operations.total <= 5 * seconds
    assert "os.scandir" not in operations.names
    assert "os.listdir" not in operations.names


@pytest.mark.parametrize("trials", [20, 200])
def test_a_result_costs_the_same_in_a_large_search(
    bert_job: JobMaker, tmp_path: Path, operations: _Operations, trials: int
) -> None:
    run = make_run(bert_job, tmp_path, trials)
    search = StubSearch(run, 8)

    def count(results: int) -> None:
        operations.is_counting = True

    search.on_result = count
    simulate = search.simulate
    search.simulate = lambda queue, recorder: (  # type: ignore[method-assign]
        simulate(queue, recorder),
        setattr(operations, "is_counting", False),
    )[0]
    search.execute()
    assert run.state is RunState.FINISHED
    assert operations.total < 20 * search.results
    assert len(load_trial_rows(run, search.job)) == trials


def run_stub(run: Run, *, kill_after: int | None = None) -> None:
    """Run a simulated search with 64 slots; after so many results, its driver is killed."""
    command = [sys.executable, "-m", "benchmarks.stub_search", str(run.path), "--keeps-clocks"]
    driver = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert driver.stdout is not None
    for line in driver.stdout:
        if kill_after is not None and line.strip().isdigit() and int(line) >= kill_after:
            driver.send_signal(signal.SIGKILL)
            break
    else:
        assert driver.wait(60) == 0
        return
    driver.wait(60)


def read_table(run: Run) -> tuple[dict[str, Any], dict[tuple[str, int], Any]]:
    """The row of each trial with its curve, and the decision on each of its rungs."""
    job = JobSpec.from_record(run.read_plan().job)
    rows = {row.trial_id: row.model_dump() for row in load_trial_rows(run, job)}
    events = run.read_events(RungEvent)
    decisions = {(event.trial_id, event.rung): (event.goes_on, event.cutoff) for event in events}
    assert len(decisions) == len(events)  # none was made twice
    return rows, decisions


@pytest.mark.long
def test_a_search_killed_three_times_has_the_table_of_one_that_was_not(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    unkilled, killed = (make_run(bert_job, tmp_path / name, 1000) for name in ("a", "b"))
    run_stub(unkilled)
    for kill_after in (300, 1200, 700):
        run_stub(killed, kill_after=kill_after)
        assert killed.state is RunState.RUNNING
    run_stub(killed)
    assert killed.state is RunState.FINISHED
    rows, decisions = read_table(killed)
    assert len(rows) == 1000
    assert {row["state"] for row in rows.values()} == {"finished", "stopped"}
    expected_rows, expected_decisions = read_table(unkilled)
    assert decisions == expected_decisions
    assert rows == expected_rows
