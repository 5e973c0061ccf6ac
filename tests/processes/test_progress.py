"""How far trials are, told through Ray; and the request to stop, told back."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from lorafleet.jobs.runs.records import Progress
from lorafleet.jobs.runs.run import Run
from lorafleet.tuning.evaluation_pool import _wait_for_one
from lorafleet.tuning.progress import (
    ProgressBoard,
    ProgressExchange,
    RayLink,
    StopFile,
    open_exchange,
)
from lorafleet.tuning.trial_table import TrialTable
from tests.conftest import read_step


@pytest.fixture(scope="module", autouse=True)
def _local_ray() -> Iterator[None]:
    ray.init(
        "local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False
    )
    yield
    ray.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path, "far")
    run.add_trial("a", 0, {})
    return run


def open_board(run: Run) -> ProgressBoard:
    board = ProgressBoard()
    board.trials = TrialTable(run)
    return board


def read_a(run: Run) -> int:
    return read_step(run.get_trial("a"))


def poll_until(exchange: ProgressExchange, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        exchange.poll()
        time.sleep(0.05)


def test_progress_reaches_the_file_and_a_stop_reaches_the_trials(run: Run) -> None:
    board, stop_file = open_board(run), StopFile(run.path / "stop")
    with open_exchange(board, stop_file) as exchange:
        # As a worker gets it. Two processes of one driver share an actor.
        link, other = (pickle.loads(pickle.dumps(RayLink(exchange.actor))) for _ in range(2))
        assert not link.is_stop_requested()
        link.send_progress("a", Progress(step=3, total=9))
        poll_until(exchange, lambda: read_a(run) == 3)
        stop_file.path.touch()
        poll_until(exchange, link.is_stop_requested)
        poll_until(exchange, other.is_stop_requested)
        link.send_progress("a", Progress(step=5, total=9))
    board.write()  # what was sent last is not lost
    assert read_a(run) == 5


def test_a_lost_actor_is_restarted(run: Run) -> None:
    board, stop_file = open_board(run), StopFile(run.path / "stop")
    with open_exchange(board, stop_file) as exchange:
        link = RayLink(exchange.actor)
        link.send_progress("a", Progress(step=3))
        poll_until(exchange, lambda: read_a(run) == 3)
        ray.kill(exchange.actor, no_restart=False)
        step = 3

        def has_arrived() -> bool:
            nonlocal step
            step += 1
            link.send_progress("a", Progress(step=step))
            return read_a(run) > 3

        poll_until(exchange, has_arrived)
        assert not link.is_stop_requested()
        stop_file.path.touch()
        poll_until(exchange, link.is_stop_requested)


def test_a_trial_does_not_wait_for_an_actor_that_does_not_answer(run: Run) -> None:
    @ray.remote(num_cpus=0)
    class Sleeper:
        def send_progress(self, trial_id: str, progress: Progress) -> bool:
            time.sleep(60)
            return True

    link = RayLink(Sleeper.remote())  # type: ignore[attr-defined]
    before = time.monotonic()
    for step in range(100):
        link.send_progress("a", Progress(step=step))
        assert not link.is_stop_requested()
    assert time.monotonic() - before < 2.0


def test_late_answers_do_not_slow_a_trial_down(run: Run) -> None:
    @ray.remote(num_cpus=0)
    class Slow:
        def send_progress(self, trial_id: str, progress: Progress) -> bool:
            time.sleep(0.7)
            return progress.step > 5

    link, waited = RayLink(Slow.remote()), 0.0  # type: ignore[attr-defined]
    for step in range(8):
        before = time.monotonic()
        link.send_progress("a", Progress(step=step))
        waited += time.monotonic() - before
        time.sleep(0.8)
    assert waited < 1.0  # for the first answer only
    assert link.is_stop_requested()


def test_workers_are_told_to_stop_while_replies_keep_coming(run: Run) -> None:
    @ray.remote(num_cpus=0)
    class Worker:
        def evaluate(self, seconds: float) -> None:
            time.sleep(seconds)

    worker, stop_file = Worker.remote(), StopFile(run.path / "stop")  # type: ignore[attr-defined]
    with open_exchange(None, stop_file) as exchange:
        link = RayLink(exchange.actor)
        stop_file.path.touch()
        deadline = time.monotonic() + 30
        while not link.is_stop_requested():
            assert time.monotonic() < deadline
            ray.get(_wait_for_one([worker.evaluate.remote(0.02)], exchange))
        with pytest.raises(ray.exceptions.GetTimeoutError, match="no reply within 0 seconds"):
            _wait_for_one([worker.evaluate.remote(5)], exchange, timeout=0.1)
