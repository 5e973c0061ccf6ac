"""What a host does between its trials."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lorafleet.jobs.runs.run import Run
from lorafleet.training.data import prepare_tokens
from lorafleet.tuning.trial_host import TrialHost
from lorafleet.tuning.trial_run import Work
from tests.conftest import JobMaker


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)  # a host changes into its run's folder
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
    work = Work(job, str(run.path), str(prepare_tokens(job).folder), 0, 1, False)
    config = {"trial_id": trial.id, "assignment": {}, "threads": 1}
    try:
        slow = TrialHost(work)
        slow.set_up(config)
        assert slow.bases.loads == 1
        assert _files(trial.path) == before
        warm = TrialHost(work)
        warm.set_up(config)
        report = warm.step()
    finally:
        torch.set_num_threads(threads)
    assert "the newest checkpoint is damaged" in str(report.warning)
    assert report.worker is not None
    assert report.worker.base_loads == 1
    warm.close()
    slow.close()


def test_a_base_that_cannot_be_loaded_is_the_result_of_the_first_step(
    bert_job: JobMaker, here: Path
) -> None:
    job = bert_job().job
    run = Run.create(here / "runs", "warm")
    trial = run.add_trial("0123456789", 0, {})
    work = Work(job, str(run.path), str(prepare_tokens(job).folder), 0, 1, False)
    gone = job.model_copy(
        update={"model": job.model.model_copy(update={"model_name_or_path": str(here / "gone")})}
    )
    threads = torch.get_num_threads()
    try:
        before = _files(trial.path)
        config = {"trial_id": trial.id, "assignment": {}, "threads": 1}
        for steps in (1, 0):  # the host lives on, and the next trial has a base that is there
            host = TrialHost(dataclasses.replace(work, job=gone))
            host.set_up(config)
            assert _files(trial.path) == before
            failures = [host.step().failure for _ in range(steps)]
            assert all(failure and "gone" in failure.sentence for failure in failures)
            host.work = work
            host.set_trial(config)
            assert host.step().row is not None
            host.close()
            before = _files(trial.path)
    finally:
        torch.set_num_threads(threads)


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
