"""A comparison, an export, a benchmark and an evaluation as jobs of a queue."""

from __future__ import annotations

import json

import pytest

from lorafleet.jobs.runs.report import Report
from tests.conftest import JobMaker
from tests.export.test_targets import trained
from tests.slurm.conftest import Login

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def _by_the_same_user(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are made in this process are those of the user who logs in."""
    monkeypatch.setenv("XDG_STATE_HOME", str(login.home / "state"))


def test_a_model_is_exported_measured_and_judged_where_it_lies(
    login: Login, bert_job: JobMaker
) -> None:
    run = trained(bert_job(train__max_steps=30, train__learning_rate=1e-2), login.home)
    for words, line, nodes in (
        (("export", run.id, "--to", "onnx"), f"the recommended model of {run.path}: onnx to", 1),
        (
            ("benchmark", run.id, "--rounds", "2"),
            f"the recommended model of {run.path}: 2 rounds",
            1,
        ),
        (("evaluate", run.id), f"arms            {run.id}, base", 2),
    ):
        planned = login.lorafleet(*words, "--on", "rig", "--dry-run").stdout
        assert line in planned, planned
        assert f"#SBATCH --nodes={nodes}" in planned
    assert list(login.runs.glob("*")) == [run.path]
    there = ("--on", "rig", "--wait")
    made = login.lorafleet(
        "export", run.id, "--to", "merged,onnx,tensorrt", *there, "--format", "json"
    )
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
    assert [arm["arm"] for arm in again["arms"]] == [
        "base",
        "adapter",
        "merged",
        "onnx",
        "tensorrt",
    ]


ARMS = """
compare:
  arms:
    base: {method: base}
    lora: {method: lora, parameters: {train.learning_rate: [3e-3, 1e-2]}}
    hybrid: {adapter_of: lora, quantization: int8}
  budget: {samples: 1280}
  seeds: 2
  inference: {rounds: 1, rows: 4}
"""


@pytest.mark.long
def test_arms_are_trained_on_the_nodes_of_a_job(login: Login, bert_job: JobMaker) -> None:
    run = login.submit(bert_job(ARMS), command="compare")
    assert login.ended(run).state == "COMPLETED"
    report = Report.model_validate_json((run.path / "report" / "report.json").read_text())
    arms = {arm.arm: arm for arm in report.arms or []}
    assert list(arms) == ["base", "lora", "hybrid"]
    assert set(arms["lora"].seeds) == set(arms["hybrid"].seeds) == {"42", "43"}
    assert all(arm.inference and arm.inference.latency_ms for arm in arms.values())
    assert report.recommendation.arm in arms
    assert report.recommendation.sentence in " ".join(
        login.lorafleet("report", run.id).stdout.split()
    )
    assert login.left_behind() == []


@pytest.mark.long
def test_a_model_is_judged_where_it_lies(login: Login, bert_job: JobMaker) -> None:
    run = trained(bert_job(train__max_steps=8), login.home)
    judged = login.lorafleet("evaluate", run.id, "--on", "rig", "--wait", "--format", "json")
    arms = {arm["arm"]: arm["metrics"]["accuracy"] for arm in json.loads(judged.stdout)["arms"]}
    assert len(arms) == 2
    assert all(0 <= accuracy <= 1 for accuracy in arms.values())


@pytest.mark.long
def test_a_target_that_is_refused_ends_the_job_with_its_code(
    login: Login, bert_job: JobMaker
) -> None:
    strict = "export: {parity: {onnx: {max_logit_difference: 1e-12}}}"
    run = trained(bert_job(strict, train__max_steps=8), login.home)
    done = login.lorafleet(
        "export", run.id, "--to", "onnx", "--no-measure", "--on", "rig", "--wait", check=False
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "rejected: a logit differs by" in " ".join(done.stdout.split())
    assert (run.path / "export" / "rejected" / "onnx" / "parity.json").is_file()
