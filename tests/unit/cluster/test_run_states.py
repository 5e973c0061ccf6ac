"""The states that `list` shows: each cluster is asked once, and only about runs of this user."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.cluster import run_states
from lorafleet.cluster.backend import RunStatus
from lorafleet.cluster.submission import (
    FinalState,
    SubmissionRecord,
    read_record,
    write_record,
)
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.runs.trust import remove_run_record


class Answering:
    """A cluster that counts the questions."""

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.fresh = True
        self.state = RunState.RUNNING

    def read_statuses(self, runs: list[Run]) -> list[RunStatus]:
        self.requests.append([run.id for run in runs])
        problem = "" if self.fresh else "squeue did not answer"
        return [RunStatus(self.state, fresh=self.fresh, problem=problem) for _ in runs]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Answering:
    answering = Answering()
    monkeypatch.setattr(run_states, "get_cluster_backend", lambda _record: answering)
    return answering


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
    states = run_states.read_run_states([here, *slurm, *pods, over, strangers])
    assert cluster.requests == [[run.id for run in slurm], [pods[0].id], [pods[1].id]]
    assert set(states.states) == {run.path for run in (*slurm, *pods)}
    assert states.notes == []


def test_a_silent_cluster_is_one_note(tmp_path: Path, cluster: Answering) -> None:
    cluster.fresh = False
    runs = [make_run(tmp_path, "slurm") for _ in range(3)]
    states = run_states.read_run_states(runs)
    assert states.states == {}
    assert states.notes == [
        "squeue did not answer: the states shown for site a are the recorded ones"
    ]


def test_a_silent_cluster_of_ended_runs_is_no_note(tmp_path: Path, cluster: Answering) -> None:
    cluster.fresh = False
    run = make_run(tmp_path, "slurm")
    run.set_state(RunState.RUNNING)
    run.set_state(RunState.FINISHED)
    assert run_states.read_run_states([run]).notes == []


def test_how_a_remote_run_ended_is_in_its_record(tmp_path: Path, cluster: Answering) -> None:
    """Ray reports a stopped run as succeeded."""
    cluster.state = RunState.FINISHED
    slurm, ray = make_run(tmp_path, "slurm"), make_run(tmp_path, "ray")
    states = run_states.read_run_states([slurm, ray]).states
    assert states == {slurm.path: "finished", ray.path: "ended"}
    assert read_record(ray).last is None


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path, cluster: Answering) -> None:
    whole, damaged = make_run(tmp_path, "slurm"), make_run(tmp_path, "slurm")
    (damaged.path / "status.json").write_text('{"state": "dreaming"}')
    assert set(run_states.read_run_states([damaged, whole]).states) == {whole.path}


def test_a_site_of_another_version_is_a_note(tmp_path: Path) -> None:
    run = make_run(tmp_path, "slurm")
    write_record(run, SubmissionRecord(kind="slurm", site={"name": "a", "new_key": 1}))
    (note,) = run_states.read_run_states([run]).notes
    assert note.startswith("site a was not asked: ")
