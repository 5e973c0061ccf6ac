"""What the command line logs: to standard error, and to a run's logs/client.log."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafleet.jobs.runs import client_log
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.runs.tracebacks import set_current_run
from lorafleet.jobs.runs.trust import find_distrust_reason

LOGGER = logging.getLogger("lorafleet.tests")


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    client_log.stop()


def test_records_reach_the_run_that_a_command_is_about(tmp_path: Path) -> None:
    client_log.start(verbose=False)
    LOGGER.info("before the run was known")
    run = Run.create(tmp_path / "runs", "x")
    LOGGER.info("after")
    LOGGER.debug("a detail")
    text = (run.path / "logs" / "client.log").read_text()
    assert [line.split(": ", 1)[1] for line in text.splitlines()] == [
        "before the run was known",
        "after",
    ]
    client_log.start(verbose=True)  # the next command, in the same process
    set_current_run(run.path)
    LOGGER.debug("a detail")
    assert (run.path / "logs" / "client.log").read_text().endswith("a detail\n")


def test_a_command_that_logs_nothing_leaves_nothing(tmp_path: Path) -> None:
    client_log.start(verbose=False)
    run = Run.create(tmp_path / "runs", "x")
    assert not (run.path / "logs").exists()


def test_drivers_and_workers_do_not_log(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "runs", "x")
    LOGGER.info("in a driver")
    assert not (run.path / "logs").exists()


def test_a_run_that_others_may_have_changed_is_not_written_to(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "runs", "x")
    run.path.chmod(0o777)
    assert find_distrust_reason(run.path) is not None
    client_log.start(verbose=False)
    set_current_run(run.path)
    LOGGER.info("about it")
    assert not (run.path / "logs").exists()


def test_a_run_that_is_gone_does_not_disturb(tmp_path: Path) -> None:
    client_log.start(verbose=False)
    run = Run.create(tmp_path / "runs", "x")
    shutil.rmtree(run.path)
    LOGGER.info("after it has gone")
    assert not run.path.exists()
