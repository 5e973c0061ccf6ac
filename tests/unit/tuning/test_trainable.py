"""What the warm actor does between its trials, without Ray."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lorafleet.jobs.runs.run import Run
from lorafleet.training.data import prepare_tokens
from lorafleet.tuning.trainable import WarmTrial
from lorafleet.tuning.trial_report import TrialReport
from lorafleet.tuning.trial_run import Work
from tests.conftest import JobMaker


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)  # an actor changes into its run's folder
    return tmp_path


def test_an_actor_that_is_being_set_up_does_not_touch_its_trial(
    bert_job: JobMaker, here: Path
) -> None:
    """Tune gives the trial of an actor that is not up yet to one that is: what the trial says must
    not be lost.
    """
    job = bert_job().job
    run = Run.create(here / "runs", "warm")
    trial = run.add_trial("0123456789", 0, {})
    trial.checkpoint.mkdir(parents=True)
    (trial.checkpoint / "trained.safetensors").write_bytes(b"half")
    before = _files(trial.path)
    threads = torch.get_num_threads()
    work = Work(job, str(run.path), str(prepare_tokens(job).folder), 0, False)
    config = {"trial_id": trial.id, "assignment": {}}
    try:
        slow, warm = WarmTrial.__new__(WarmTrial), WarmTrial.__new__(WarmTrial)
        slow.setup(config, work)
        assert slow.base_loads == 1
        assert _files(trial.path) == before
        warm.setup(config, work)
        report = TrialReport.from_result(warm.step())
    finally:
        torch.set_num_threads(threads)
    assert report is not None
    assert "the newest checkpoint is damaged" in str(report.warning)
    assert report.worker.base_loads == 1
    warm.cleanup()
    slow.cleanup()


def test_a_base_that_cannot_be_loaded_is_the_result_of_the_first_step(
    bert_job: JobMaker, here: Path
) -> None:
    job = bert_job().job
    run = Run.create(here / "runs", "warm")
    trial = run.add_trial("0123456789", 0, {})
    work = Work(job, str(run.path), str(prepare_tokens(job).folder), 0, False)
    gone = job.model_copy(
        update={"model": job.model.model_copy(update={"model_name_or_path": str(here / "gone")})}
    )
    threads = torch.get_num_threads()
    try:
        actor = WarmTrial.__new__(WarmTrial)
        before = _files(trial.path)
        actor.setup({"trial_id": trial.id, "assignment": {}}, dataclasses.replace(work, job=gone))
        assert _files(trial.path) == before
        failure = json.loads(actor.step()["report"])["failure"]
        for steps in (1, 0):  # the actor lives on, and the next trial has a base that is there
            actor.setup(
                {"trial_id": trial.id, "assignment": {}}, dataclasses.replace(work, job=gone)
            )
            assert [json.loads(actor.step()["report"]).get("failure") for _ in range(steps)] == [
                failure
            ] * steps
            actor.work = work
            actor.reset_config({"trial_id": trial.id, "assignment": {}})
            assert "row" in json.loads(actor.step()["report"])
            actor.cleanup()
    finally:
        torch.set_num_threads(threads)
    assert "gone" in failure["sentence"]


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
