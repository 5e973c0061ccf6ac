"""The states that `list` shows: each cluster is asked once, and only about runs of this user."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.cluster import run_states
from lorafleet.cluster.backend import RunStatus
from lorafleet.cluster.submission import FinalState, SubmissionRecord, write_record
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.runs.trust import remove_run_record


class Answering:
    """A cluster that counts the questions."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.fresh = True

    def read_statuses(self, runs: list[Run]) -> list[RunStatus]:
        self.asked.append([run.id for run in runs])
        message = "" if self.fresh else "squeue did not answer; the last recorded state is pending"
        return [RunStatus(RunState.RUNNING, message, fresh=self.fresh) for _ in runs]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Answering:
    made = Answering()
    monkeypatch.setattr(run_states, "get_cluster_backend", lambda _record: made)
    return made


def make_run(folder: Path, kind: str | None, site: str = "a", last: bool = False) -> Run:
    run = Run.create(folder, "x")
    if kind is not None:
        final = FinalState(state=RunState.FINISHED) if last else None
        write_record(run, SubmissionRecord(kind=kind, site={"name": site}, last=final))  # type: ignore[arg-type]
    return run


def test_each_cluster_is_asked_once(tmp_path: Path, cluster: Answering) -> None:
    here = make_run(tmp_path, None)
    slurm = [make_run(tmp_path, "slurm", site) for site in ("a", "b")]
    pods = [make_run(tmp_path, "kubernetes", site) for site in ("a", "b")]
    over = make_run(tmp_path, "kubernetes", last=True)
    strangers = make_run(tmp_path, "slurm")
    remove_run_record(strangers.path)
    found = run_states.read_run_states([here, *slurm, *pods, over, strangers])
    assert cluster.asked == [[run.id for run in slurm], [pods[0].id], [pods[1].id]]
    assert set(found.statuses) == {run.path for run in (*slurm, *pods)}
    assert found.notes == []


def test_a_silent_cluster_is_one_note(tmp_path: Path, cluster: Answering) -> None:
    cluster.fresh = False
    runs = [make_run(tmp_path, "slurm") for _ in range(3)]
    found = run_states.read_run_states(runs)
    assert found.statuses == {}
    assert found.notes == [
        "squeue did not answer: the states shown for site a are the recorded ones"
    ]
