"""Runs that lorafleet 0.1 wrote: they are listed, reported, compared and (in Ray's tests) resumed.

Their weights, logs, W&B records and Tune's own files were left out, and their host was renamed.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lorafleet.evaluation.report.build import build_report
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.runs.trust import record_own_run
from tests.conftest import ROOT, lorafleet_here

OLD_RUNS = ROOT / "tests" / "fixtures" / "runs-0.1"


def unpack(name: str, folder: Path) -> Run:
    """Lay an old run into a folder of runs, as one of this user's own."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(OLD_RUNS / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    run = Run(folder / name)
    run.path.chmod(0o700)
    record_own_run(run.path)
    return run


def without_prose(value: Any) -> Any:
    """A part of a report without its sentences, and without sizes of weights that were left out."""
    if isinstance(value, dict):
        left_out = ("what", "remarks", "sentence", "weights_mb")
        return {key: without_prose(item) for key, item in value.items() if key not in left_out}
    return [without_prose(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["sweep", "compare"])
def test_an_old_run_gets_the_report_that_it_had(name: str, tmp_path: Path) -> None:
    run = unpack(name, tmp_path / "runs")
    before = json.loads((run.path / "report" / "report.json").read_text())
    after = json.loads(build_report(run).model_dump_json())
    assert run.state is RunState.FINISHED
    for key in ("trials", "base", "baselines", "arms", "pairs", "metrics", "metric", "rungs"):
        assert without_prose(after[key]) == without_prose(before[key]), key
    for key in ("trial_id", "arm", "decided"):
        assert after["recommendation"].get(key) == before["recommendation"].get(key), key


def test_the_commands_read_old_runs(tmp_path: Path) -> None:
    for name in ("sweep", "compare", "stopped"):
        unpack(name, tmp_path / "runs")
    listed = lorafleet_here("list", "--format", "json", cwd=tmp_path)
    rows = {row["run"]: row for row in json.loads(listed.stdout)["runs"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "sweep": "finished",
        "compare": "finished",
        "stopped": "stopped",
    }
    for words in (["status", "stopped"], ["report", "sweep"], ["report", "compare"]):
        done = lorafleet_here(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "stopped" in lorafleet_here("status", "stopped", cwd=tmp_path).stdout


def test_old_runs_are_compared_with_each_other(tmp_path: Path) -> None:
    """Both were evaluated on the same rows."""
    for name in ("sweep", "compare"):
        unpack(name, tmp_path / "runs")
    done = lorafleet_here("compare", "sweep", "compare", "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arms = json.loads(done.stdout)["arms"]
    assert len(arms) >= 2
