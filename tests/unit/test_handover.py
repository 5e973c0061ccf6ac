"""A run that is handed over as texts: made once, whole, by the version that submitted it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.transfer import record
from jobs import files
from jobs.errors import RunError
from jobs.handover import pack, unpack
from jobs.run import Run, RunState

TEXTS = {"job.yaml": "name: x\n", "resolved.json": "{}\n", "plan.json": '{"schema_version": 1}\n'}


def mounted(folder: Path, **changes: str) -> Path:
    folder.mkdir()
    for name, text in (pack("x", TEXTS) | changes).items():
        (folder / name).write_text(text)
    return folder / "run.json"


def test_the_folder_is_made_once(tmp_path: Path) -> None:
    document = mounted(tmp_path / "etc")
    run = unpack(tmp_path / "runs" / "x-a1b2c3", document)
    assert {name: (run.path / name).read_text() for name in TEXTS} == TEXTS
    assert (run.state, run.status()["name"]) == (RunState.PENDING, "x")
    run.set_state(RunState.RUNNING)
    assert unpack(run.path, document).state is RunState.RUNNING
    assert [path.name for path in run.path.parent.iterdir()] == ["x-a1b2c3"]


def test_of_many_at_once_one_makes_it(tmp_path: Path) -> None:
    document = mounted(tmp_path / "etc")
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: unpack(tmp_path / "runs" / "x-a1b2c3", document), range(8)))
    assert {run.state for run in runs} == {RunState.PENDING}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x-a1b2c3"]


def test_a_users_stop_holds_until_the_run_is_submitted_again(tmp_path: Path) -> None:
    """Another attempt at the same submission is stopped as well; the next submission is not."""
    first = mounted(tmp_path / "first")
    run = unpack(tmp_path / "x-a1b2c3", first)
    (run.path / "stop").write_text("asked for by a user\n")
    unpack(run.path, first)
    assert (run.path / "stop").exists()
    second = mounted(tmp_path / "second", **pack("x", TEXTS, 2))
    unpack(run.path, second)
    assert not (run.path / "stop").exists()
    (run.path / "stop").write_text("asked for by a user\n")
    unpack(run.path, second)
    assert (run.path / "stop").exists()


def test_another_version_is_refused(tmp_path: Path) -> None:
    document = mounted(tmp_path / "etc", **{"run.json": json.dumps({"lorafleet": "9.9.9", "name": "x"})})
    with pytest.raises(RunError, match=r"submitted by lorafleet 9.9.9, and this is .*: the image must have"):
        unpack(tmp_path / "x-a1b2c3", document)
    assert not (tmp_path / "x-a1b2c3").exists()


def test_what_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match="is not the document of a run"):
        unpack(tmp_path / "x-a1b2c3", tmp_path / "run.json")


def test_exported_models_come_when_they_are_wanted(tmp_path: Path) -> None:
    run = Run(tmp_path / "r")
    for name in ("export/onnx/model.onnx.data", "export/onnx/parity.json", "export/export.json", "status.json"):
        files.write_text(run.path / name, "{}")
    assert {path.name for path in record(run)} == {"parity.json", "export.json", "status.json"}
    assert {path.name for path in record(run, "all")} == {"parity.json", "export.json", "status.json"}
    assert "model.onnx.data" in {path.name for path in record(run, "exports")}
