"""The parts of a job array put together: nothing lost, nothing twice, and what is written
afterwards counts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.events import WarningEvent
from lorafleet.jobs.runs.lease import Lease, StaleAttempt
from lorafleet.jobs.runs.records import AttemptRecord, MetricsRow
from lorafleet.jobs.runs.run import Run, RunState, TrialState
from lorafleet.tuning.array_tasks import merge_tasks
from lorafleet.tuning.results_journal import ResultsJournal


def a_part(run: Run, number: int, attempts: int) -> Run:
    """A part with one trial, whose task was started so many times."""
    part = run.get_array_task(number)
    part.path.mkdir(parents=True)
    files.write_json(part.path / "plan.json", {"share": [number, number + 1]})
    part.set_state(RunState.PENDING, created=1.0, name="x")
    for attempt in range(1, attempts + 1):
        lease = Lease.acquire(part.path, AttemptRecord())
        writer = Run(part.path, attempt=lease.attempt)
        writer.set_state(RunState.RUNNING, wall_seconds=10.0 * attempt)
        trial = writer.add_trial(f"t{number}", number, {})
        trial.add_rows(MetricsRow.model_validate({"step": attempt}))
        writer.add_event(WarningEvent(trial_id=trial.id, sentence=f"said {attempt}"))
        lease.release()
    return part


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run.create(tmp_path, "x")
    first = a_part(made, 0, attempts=3)
    first.get_trial("t0").set_state(TrialState.FINISHED)
    a_part(made, 1, attempts=1)
    lease = Lease.acquire(made.path, AttemptRecord())
    lease.release()
    driven = Run(made.path, attempt=lease.attempt)
    driven.mark_running()
    return driven


def test_trials_of_all_parts_go_on_in_the_run(run: Run) -> None:
    assert [trial.id for trial in run.list_trials()] == ["t0", "t1"]
    merge_tasks(run, AttemptRecord(), lambda _: None)
    assert not (run.path / "parts").exists()
    assert [str(trial.state) for trial in run.list_trials()] == ["finished", "pending"]
    run.get_trial("t0").add_rows(
        MetricsRow.model_validate({"step": 4})
    )  # the run's first attempt, after a part's third
    assert [row.step for row in run.get_trial("t0").read_metrics()] == [1, 2, 3, 4]
    assert run.read_status().wall_seconds == 30.0
    assert len(run.read_events(WarningEvent)) == 4
    merge_tasks(run, AttemptRecord(), lambda _: None)


def test_results_that_a_killed_task_had_not_moved_are_kept(run: Run) -> None:
    part = run.get_array_task(0)
    journal = ResultsJournal(Run(part.path, attempt=3))
    journal.append([("t0", MetricsRow(step=7)), ("t0", MetricsRow(step=8))])
    merge_tasks(run, AttemptRecord(), lambda _: None)
    assert [row.step for row in run.get_trial("t0").read_metrics()] == [1, 2, 3, 7, 8]


def test_a_gathering_that_was_killed_is_ended_by_the_next(run: Run) -> None:
    (run.path / "parts" / "0" / "plan.json").unlink()  # killed while it took the first part away
    merge_tasks(run, AttemptRecord(), lambda _: None)
    assert not (run.path / "parts").exists()


def test_a_part_that_was_taken_over_writes_nothing_more(run: Run) -> None:
    stale = Run(run.get_array_task(1).path, attempt=1)
    merge_tasks(run, AttemptRecord(), lambda _: None)
    with pytest.raises(StaleAttempt, match="was replaced by another one, and stops writing"):
        stale.get_trial("t1").add_rows(MetricsRow.model_validate({"step": 9}))
    assert not (run.path / "parts").exists()


def test_killed_parts_are_watched_together_and_a_live_one_is_left_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    for number in (0, 1):
        attempts = run.get_array_task(number).path / "attempts"
        for end in attempts.glob("*.end"):
            end.unlink()
        newest = max(attempts.glob("*.json"))
        newest.write_text(
            json.dumps(
                json.loads(newest.read_text()) | {"machine": ["elsewhere"], "slurm_job": "7"}
            )
        )
    said: list[str] = []
    merge_tasks(run, AttemptRecord(), said.append)
    assert "2 of 2 drivers did not record their end" in said[0]
    assert not (run.path / "parts").exists()


def test_a_part_whose_driver_lives_stays_as_it_is(run: Run) -> None:
    Lease.acquire(run.get_array_task(1).path, AttemptRecord())  # this process lives
    with pytest.raises(RunError, match="already has a driver"):
        merge_tasks(run, AttemptRecord(), lambda _: None)
    assert (run.path / "parts" / "1" / "trials" / "t1").is_dir()
