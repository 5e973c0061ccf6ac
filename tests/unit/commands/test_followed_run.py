"""A run that is followed: what is shown is new, and what has not changed is not read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafleet.commands.followed_run import FollowedRun
from lorafleet.commands.view import collect_trials, iterate_news
from lorafleet.jobs import files
from lorafleet.jobs.runs.events import NoteEvent, SearchEvent
from lorafleet.jobs.runs.records import MetricsRow, Progress
from lorafleet.jobs.runs.run import Run, TrialState
from lorafleet.tuning.ledger import Ledger
from lorafleet.tuning.progress import ProgressBoard
from tests.conftest import JobMaker


class Search:
    """A driver of some trials, and a reader that follows them."""

    def __init__(self, job_maker: JobMaker, folder: Path, trials: int) -> None:
        self.run = Run.create(folder, "followed")
        job = job_maker().job
        files.write_json(self.run.path / "plan.json", {"job": job.model_dump(mode="json")})
        self.ledger = Ledger(self.run, job, searching=False)
        self.board = ProgressBoard()
        self.board.trials = self.ledger.trials
        self.ledger.listeners.append(self.board)
        for number in range(trials):
            trial = self.ledger.add_trial(f"t{number}", number, {}, rung_levels=[9])
            self.ledger.start_trial(trial)
        self.board.write()
        self.followed = FollowedRun(self.run)

    def report(self, name: str, step: int, accuracy: float | None = None) -> None:
        values: dict[str, Any] = {"step": step, "train_loss": 1.0, "train_seconds": 1.0 * step}
        if accuracy is not None:
            values |= {"evaluated": True, "accuracy": accuracy}
        self.ledger.report(self.ledger.trials.get(name), MetricsRow.model_validate(values))
        self.board.write()

    def show(self) -> list[tuple[str, int, float | None]]:
        return [(trial.state, trial.step, trial.score) for trial in collect_trials(self.followed)]


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, below the run."""
    names: list[str] = []
    read = files.read_regular_file

    def read_and_note(path: Path, *arguments: Any) -> bytes:
        if "runs" in path.parts:
            names.append("/".join(path.parts[path.parts.index("runs") + 2 :]))
        return read(path, *arguments)

    monkeypatch.setattr(files, "read_regular_file", read_and_note)
    return names


def test_only_changed_trials_are_read(
    bert_job: JobMaker, tmp_path: Path, read_files: list[str]
) -> None:
    search = Search(bert_job, tmp_path / "runs", 100)
    assert search.show() == [("running", 0, None)] * 100
    assert len(read_files) > 100
    read_files.clear()
    search.report("t50", 5, 0.7)
    shown = search.show()
    assert shown[50] == ("running", 5, 0.7)
    assert shown.count(("running", 0, None)) == 99
    # The changed one, and two others that are looked at anyway.
    trials = {name.split("/")[1] for name in read_files if name.startswith("trials")}
    assert len(trials) == 3
    assert "t50" in trials
    search.ledger.end_trial(search.ledger.trials.get("t7"), TrialState.FINISHED)
    search.board.write()
    assert search.show()[7][0] == "finished"
    for name in [f"t{number}" for number in range(100)]:
        if name != "t7":
            search.ledger.end_trial(search.ledger.trials.get(name), TrialState.STOPPED)
    search.board.write()
    assert [state for state, _, _ in search.show()].count("stopped") == 99
    read_files.clear()
    search.show()
    assert not [name for name in read_files if name.startswith("trials")]


def test_progress_is_shown_before_it_is_in_the_file_of_the_trial(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    search = Search(bert_job, tmp_path / "runs", 3)
    search.show()
    search.report("t0", 4)
    assert search.run.get_trial("t0").read_metrics() == []
    assert search.show()[0] == ("running", 4, None)
    search.board.update("t0", Progress(step=6, train_seconds=6.0))
    search.board.write()
    assert search.show()[0] == ("running", 6, None)


def test_a_new_trial_and_a_new_attempt_are_seen(bert_job: JobMaker, tmp_path: Path) -> None:
    search = Search(bert_job, tmp_path / "runs", 5)
    for number in range(5):
        search.report(f"t{number}", 1, 0.5)
    assert [score for _, _, score in search.show()] == [0.5] * 5
    again = Search.__new__(Search)
    again.run = Run(search.run.path, attempt=2)
    files.write_json(again.run.path / "attempts" / "2.json", {"attempt": 2})
    again.ledger = Ledger(again.run, search.ledger.job, searching=False)
    again.board = ProgressBoard()
    again.board.trials = again.ledger.trials
    again.ledger.listeners.append(again.board)
    for number in range(5):  # as many results as in the first attempt, and other ones
        again.report(f"t{number}", 2, 0.6)
    again.ledger.add_trial("t5", 5, {})
    again.board.write()
    assert search.show() == [("running", 2, 0.6)] * 5 + [("pending", 0, None)]


def test_a_run_without_heartbeats_is_read_whole(bert_job: JobMaker, tmp_path: Path) -> None:
    search = Search(bert_job, tmp_path / "runs", 5)
    search.run.progress_file.unlink()
    search.show()
    for number in range(5):
        search.run.get_trial(f"t{number}").add_rows(
            MetricsRow.model_validate({"step": 3, "evaluated": True, "accuracy": 0.1 * number})
        )
    assert [score for _, _, score in search.show()] == [0.1 * number for number in range(5)]


def test_files_that_are_older_than_the_heartbeats_are_read_later(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    """As when `metrics.jsonl` was downloaded before a result, and `progress.json` after it."""
    search = Search(bert_job, tmp_path / "runs", 7)
    metrics = search.run.get_trial("t3").path / "metrics.jsonl"
    search.report("t3", 5, 0.7)
    newest = metrics.read_bytes()
    metrics.unlink()
    assert search.show()[3] == ("running", 5, None)
    metrics.write_bytes(newest)
    for _ in range(4):
        shown = search.show()
    assert shown[3] == ("running", 5, 0.7)


def test_news_are_told_once(bert_job: JobMaker, tmp_path: Path) -> None:
    search, told = Search(bert_job, tmp_path / "runs", 2), set[str]()
    list(iterate_news(search.followed, told))
    search.run.add_event(SearchEvent(trials=2))
    search.run.add_event(NoteEvent(sentence="a node left"))
    search.report("t1", 5, 0.7)
    search.ledger.end_trial(
        search.ledger.trials.get("t0"), TrialState.FAILED, reason="out of memory"
    )
    search.board.write()
    assert list(iterate_news(search.followed, told)) == [
        "t0 failed: out of memory",
        "t1 step 5: accuracy 0.700, train loss 1.000, - tokens/s",
        "a node left",
    ]
    assert list(iterate_news(search.followed, told)) == []


def test_a_damaged_trial_is_left_out_until_it_is_whole(bert_job: JobMaker, tmp_path: Path) -> None:
    search = Search(bert_job, tmp_path / "runs", 3)
    status = search.run.get_trial("t1").path / "status.json"
    whole = status.read_text()
    status.write_text("{")
    assert len(search.show()) == 2
    status.write_text(whole)
    assert len(search.show()) == 3
    search.run.progress_file.write_text("{")
    assert len(search.show()) == 3
