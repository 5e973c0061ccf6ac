"""An export, a benchmark and an evaluation as jobs of a queue."""

from __future__ import annotations

import json

import pytest

from tests.conftest import JobMaker
from tests.export.test_targets import trained
from tests.slurm.conftest import Login

pytestmark = pytest.mark.ray


def test_a_model_is_exported_measured_and_judged_where_it_lies(login: Login, bert_job: JobMaker) -> None:
    run = trained(bert_job(train__max_steps=30, train__learning_rate=1e-2), login.home)
    there = ("--on", "rig", "--wait")
    made = login.lorafleet("export", run.id, "--to", "merged,onnx,tensorrt", *there, "--format", "json")
    found = json.loads(made.stdout)
    assert [name for name, one in found["targets"].items() if one["accepted"]] == ["merged", "onnx"]
    assert found["targets"]["tensorrt"]["unavailable"].startswith("tensorrt needs an NVIDIA GPU")
    assert found["output"] == str(run.path / "export")
    assert (run.path / "export" / "onnx" / "model.onnx").is_file()
    shown = login.lorafleet("benchmark", run.id, "--rounds", "1", "--rows", "2", *there).stdout
    assert "Deploy onnx" in shown or "Deploy merged" in shown
    listed = login.lorafleet("list").stdout
    assert "export-" in listed
    assert "benchmark-" in listed
    again = json.loads(login.lorafleet("report", "benchmark", "--format", "json").stdout)
    assert [arm["arm"] for arm in again["arms"]] == ["base", "adapter", "merged", "onnx", "tensorrt"]


@pytest.mark.long
def test_a_model_is_judged_where_it_lies(login: Login, bert_job: JobMaker) -> None:
    run = trained(bert_job(train__max_steps=8), login.home)
    judged = login.lorafleet("evaluate", run.id, "--on", "rig", "--wait", "--format", "json")
    arms = {arm["arm"]: arm["metrics"]["accuracy"] for arm in json.loads(judged.stdout)["arms"]}
    assert len(arms) == 2
    assert all(0 <= accuracy <= 1 for accuracy in arms.values())


@pytest.mark.long
def test_a_target_that_is_refused_ends_the_job_with_its_code(login: Login, bert_job: JobMaker) -> None:
    strict = "export: {parity: {onnx: {max_logit_difference: 1e-12}}}"
    run = trained(bert_job(strict, train__max_steps=8), login.home)
    done = login.lorafleet("export", run.id, "--to", "onnx", "--no-measure", "--on", "rig", "--wait", check=False)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "rejected: a logit differs by" in " ".join(done.stdout.split())
    assert (run.path / "export" / "rejected" / "onnx" / "parity.json").is_file()
