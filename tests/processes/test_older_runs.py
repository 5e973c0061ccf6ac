"""A run that lorafleet 0.1 left unfinished is resumed by this version."""

from __future__ import annotations

from pathlib import Path

from lorafleet.jobs.errors import ExitCode
from lorafleet.jobs.runs.run import RunState
from tests.conftest import ASSETS, lorafleet
from tests.unit.jobs.runs.test_older_runs import unpack


def test_an_old_run_is_resumed_from_its_checkpoints(place: Path) -> None:
    run = unpack("stopped", place / "runs")
    before = {trial.id: trial.read_metrics() for trial in run.list_trials()}
    assert any(rows and rows[-1].step == 96 for rows in before.values())
    done = lorafleet("resume", run.path, cwd=place, LORAFLEET_CACHE=ASSETS)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert run.state is RunState.FINISHED
    for trial in run.list_trials():
        rows = trial.read_metrics()
        earlier = before[trial.id]
        assert rows[: len(earlier)] == earlier
        assert [row.step for row in rows] == sorted({row.step for row in rows})
