"""The Python interface, as a notebook uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorafleet
from tests.conftest import ASSETS, ROOT, JobMaker
from tests.processes.conftest import save


def test_the_example_runs_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "python" / "sweep.py")],
        cwd=tmp_path,
        env=os.environ | {"LORAFLEET_CACHE": ASSETS},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trials scored, best 0." in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    *_, decision, row, last = done.stdout.splitlines()
    assert "accuracy" in decision
    assert row.startswith("{'trial': '")
    assert last == f"{run.name} finished {run}"


def test_a_run_is_submitted_stopped_and_resumed(
    bert_job: JobMaker, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = bert_job(train__max_steps=3000, train__eval_steps=100)
    save(loaded, place)
    monkeypatch.chdir(place)
    job = lorafleet.load_job("job.yaml", loaded.overrides)
    assert lorafleet.plan(job).command == "train"
    run = lorafleet.submit(job)
    stopped: list[str] = []

    def stop_when_it_trains(report: lorafleet.Report) -> None:
        if not stopped and any(row.step for row in report.trials):
            stopped.append(run.stop())

    with pytest.raises(lorafleet.RunError, match=f"{run.id} stopped"):
        run.wait(stop_when_it_trains, poll_seconds=0.5)
    found = lorafleet.find_run(run.id)
    assert (found.path, str(found.status().state)) == (run.path, "stopped")
    found.resume()
    report = found.wait()
    assert [row.state for row in report.trials] == ["finished"]
