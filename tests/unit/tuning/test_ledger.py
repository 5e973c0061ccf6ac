"""The record of a search: what it writes, what it decides, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafleet.jobs import files
from lorafleet.jobs.runs.events import RungEvent
from lorafleet.jobs.runs.records import MetricsRow
from lorafleet.jobs.runs.run import Run, TrialState
from lorafleet.tuning.ledger import Decision, Ledger
from tests.conftest import JobMaker

SEARCH = """
search:
  num_samples: 12
  parameters:
    lora.lora_r: {values: [1, 2, 4, 8]}
    train.learning_rate: {distribution: log_uniform_values, min: 1e-5, max: 1e-2}
  scheduler: {type: asha, grace_period: 64, max_t: 640, reduction_factor: 3}
  keep: 2
"""


@pytest.fixture
def ledger(bert_job: JobMaker, tmp_path: Path) -> Ledger:
    return Ledger(Run.create(tmp_path, "search"), bert_job(SEARCH).job, searching=True)


def report(
    ledger: Ledger, name: str, step: int, accuracy: float | None = None, rung: int | None = None
) -> bool:
    """Report a result of a trial, which is created first; with an accuracy, an evaluation."""
    trial = ledger.add_trial(name, len(ledger.trials), {}, rung_levels=[64, 192, 640])
    values: dict[str, Any] = {"step": step, "train_seconds": float(step), "rung": rung}
    if accuracy is not None:
        values |= {"evaluated": True, "accuracy": accuracy, "loss": 1.0}
    return ledger.report(trial, MetricsRow.model_validate(values)) is Decision.CONTINUE


def end(ledger: Ledger, name: str, accuracy: float, state: TrialState) -> None:
    report(ledger, name, 1, accuracy)
    ledger.trials.get(name).get_weights_folder("lora").mkdir()
    ledger.end_trial(ledger.trials.get(name), state)


def test_only_the_best_weights_are_kept(ledger: Ledger) -> None:
    finished, stopped = TrialState.FINISHED, TrialState.STOPPED
    for name, accuracy, state, kept in (
        ("a", 0.5, stopped, {"a"}),
        ("b", 0.4, stopped, {"a", "b"}),
        ("c", 0.3, finished, {"c", "a"}),  # a finished trial precedes the stopped ones
        ("d", 0.2, finished, {"c", "d"}),
        ("e", 0.1, finished, {"c", "d"}),
        ("f", 0.2, finished, {"c", "d"}),  # as good as "d", and later
        ("g", 0.9, stopped, {"c", "d"}),
        ("h", 0.9, finished, {"h", "c"}),
    ):
        end(ledger, name, accuracy, state)
        assert {trial.id for trial in ledger.trials if trial.weights.is_dir()} == kept
    assert [trial.id for trial in ledger.rank_trials()] == list("hcdfegab")
    again = Ledger(ledger.run, ledger.job, searching=True)
    assert [trial.id for trial in again.rank_trials()] == list("hcdfegab")


def test_what_a_killed_driver_left_is_deleted(ledger: Ledger) -> None:
    for number, name in enumerate("abc"):
        end(ledger, name, 0.1 * number, TrialState.FINISHED)
        trial = ledger.trials.get(name)
        trial.weights.mkdir(exist_ok=True)
        trial.checkpoint.mkdir(parents=True)
    Ledger(ledger.run, ledger.job, searching=True).apply_due_decisions()
    assert {trial.id for trial in ledger.trials if trial.weights.is_dir()} == {"b", "c"}
    assert not any(trial.checkpoint.exists() for trial in ledger.trials)


def test_results_between_evaluations_wait_for_the_next_one(ledger: Ledger) -> None:
    def read(name: str) -> list[int]:
        return [row.step for row in ledger.run.get_trial(name).read_metrics()]

    for name in "abc":
        assert report(ledger, name, 1)
    assert report(ledger, "a", 2)
    assert (read("a"), read("b")) == ([], [])
    assert report(ledger, "a", 64, 0.5, rung=0)
    assert (read("a"), read("b")) == ([1, 2, 64], [])  # on the disk before it is decided
    report(ledger, "a", 66)
    ledger.end_trial(ledger.trials.get("a"), TrialState.FINISHED)
    assert read("a") == [1, 2, 64, 66]
    report(ledger, "b", 2)
    ledger.save_results()  # of two trials: written at once
    assert (read("b"), read("c")) == ([1, 2], [1])
    assert not ledger.journal.path.exists()
    assert ledger.trial_seconds == 66 + 2 + 1


def test_results_of_many_trials_survive_a_kill(ledger: Ledger) -> None:
    def read(name: str) -> list[int]:
        return [row.step for row in ledger.run.get_trial(name).read_metrics()]

    for name in "abcd":
        report(ledger, name, 1)
        report(ledger, name, 2)
    ledger.save_results()
    report(ledger, "a", 3)
    report(ledger, "b", 64, 0.5, rung=0)
    ledger.save_results()
    assert (read("a"), read("b")) == ([], [1, 2, 64])
    assert [row["step"] for row in files.read_jsonl(ledger.journal.path)] == [*[1, 2] * 4, 3]
    # As if the driver was killed here. A budget counts what the trials had reported.
    again = Ledger(ledger.run, ledger.job, searching=True)
    assert [read(name) for name in "abcd"] == [[1, 2, 3], [1, 2, 64], [1, 2], [1, 2]]
    assert again.trial_seconds == ledger.trial_seconds == 3 + 64 + 2 + 2
    assert not again.journal.path.exists()
    report(again, "d", 2)  # a resumed trial repeats its last report
    again.write_results()
    assert read("d") == [1, 2]


def test_a_journal_that_grows_is_emptied(ledger: Ledger) -> None:
    for step in range(300):
        for name in "abc":
            report(ledger, name, step)
        ledger.save_results()
    assert len(ledger.run.get_trial("a").read_metrics()) > 190
    assert ledger.journal.rows < 3 * 202
    ledger.write_results()
    assert [row.step for row in ledger.run.get_trial("c").read_metrics()] == list(range(300))
    assert not ledger.journal.path.exists()


def test_a_damaged_line_of_the_journal_costs_its_result(ledger: Ledger) -> None:
    report(ledger, "a", 64, 0.5, rung=0)
    lines = ('{"step": "x", "trial_id": "a"}', "{", '{"step": 70, "trial_id": "a"}')
    ledger.journal.path.write_text("\n".join(lines) + "\n")
    again = Ledger(ledger.run, ledger.job, searching=True)
    assert [row.step for row in again.trials.get("a").read_metrics()] == [64, 70]
    assert again.run.list_remarks() == []


def test_a_journal_that_cannot_be_read_costs_a_note(ledger: Ledger) -> None:
    ledger.journal.path.mkdir()
    again = Ledger(ledger.run, ledger.job, searching=True)
    (remark,) = again.run.list_remarks()
    assert remark.startswith("results without an evaluation are not shown: ")
    assert not again.journal.path.exists()


def test_a_decision_is_made_once(ledger: Ledger) -> None:
    assert report(ledger, "a", 64, 0.5, rung=0)
    assert not report(ledger, "b", 64, 0.4, rung=0)
    assert report(ledger, "c", 64, 0.6, rung=0)
    # Now 0.5 would not be enough any more, but the trial was told to go on.
    for attempt in (ledger, Ledger(ledger.run, ledger.job, searching=True)):
        assert attempt.decide(attempt.trials.get("a"), 0) is Decision.CONTINUE
        assert attempt.decide(attempt.trials.get("b"), 0) is Decision.STOP
    assert len(ledger.run.read_events(RungEvent)) == 3


def test_a_search_is_resumed_with_the_same_table_and_counts(ledger: Ledger) -> None:
    for name, accuracy in (("a", 0.5), ("b", 0.7), ("c", 0.6)):
        report(ledger, name, 64, accuracy, rung=0)
    ledger.end_trial(ledger.trials.get("b"), TrialState.FAILED)
    again = Ledger(ledger.run, ledger.job, searching=True)
    assert again.results == ledger.results
    assert again.rungs[0].scores == ledger.rungs[0].scores
    assert again.trials.counts == ledger.trials.counts
    assert list(again.trials.unended) == ["a", "c"]
    assert (again.searched, again.trial_seconds) == (3, 3 * 64.0)
