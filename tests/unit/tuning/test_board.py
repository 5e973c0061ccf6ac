"""What the driver shows of running trials."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from lorafleet.jobs.runs.records import MetricsRow, Progress
from lorafleet.jobs.runs.run import Run, TrialState
from lorafleet.tuning.ledger import Ledger
from lorafleet.tuning.progress import ProgressBoard, StopFile
from lorafleet.tuning.sweep import Sweep
from tests.conftest import JobMaker


def test_the_board_shows_trials_that_have_not_ended(bert_job: JobMaker, tmp_path: Path) -> None:
    run = Run.create(tmp_path, "shown")
    ledger = Ledger(run, bert_job().job, searching=False)
    board = ProgressBoard()
    board.trials = ledger.trials
    ledger.listeners.append(board)
    for number, name in enumerate("abc"):
        ledger.add_trial(name, number, {})
    ledger.start_trial(ledger.trials.get("a"))
    board.update("a", Progress(step=3, total=9))
    ledger.report(ledger.trials.get("a"), MetricsRow(step=4, train_loss=0.5))
    ledger.end_trial(ledger.trials.get("c"), TrialState.FAILED)
    board.update("c", Progress(step=7))  # sent before its end
    board.write()
    shown = run.read_progress()
    assert sorted(shown) == ["a", "b"]
    a = shown["a"]
    assert (a.state, a.results, a.step, a.total, a.train_loss) == ("running", 1, 4, 9, 0.5)
    assert (shown["b"].state, shown["b"].results, shown["b"].step) == ("pending", 0, 0)


def test_what_is_only_shown_ends_no_search(bert_job: JobMaker, tmp_path: Path) -> None:
    """As when the disk is full. A folder in the file's place fails in the same way."""
    run = Run.create(tmp_path, "shown")
    board = ProgressBoard()
    board.write()  # before the search
    board.trials = Ledger(run, bert_job().job, searching=False).trials
    run.progress_file.mkdir()
    board.write()
    shutil.rmtree(run.path)
    run.path.touch()
    board.write()


def test_a_trial_that_was_created_and_no_more_is_pending(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    run = Run.create(tmp_path, "killed")
    run.add_trial("a", 0, {}, rung_levels=[1, 3])
    ledger = Ledger(run, bert_job().job, searching=False)
    ledger.apply_due_decisions()
    trial = ledger.trials.get("a")
    assert (trial.state, trial.read_params().rung_levels) == (TrialState.PENDING, [1, 3])
    assert list(ledger.trials.unended) == ["a"]


def test_a_signal_is_a_request_to_stop_at_once(tmp_path: Path) -> None:
    driver = Sweep.__new__(Sweep)
    driver.stop_signal, driver.stop_signal_at = None, 0.0
    driver.stop_request = StopFile(tmp_path / "stop", seconds=60.0)
    assert not driver.stop_request.exists()
    driver._handle_signal(signal.SIGUSR1, None)
    assert driver.stop_request.exists()
    assert (tmp_path / "stop").exists()
