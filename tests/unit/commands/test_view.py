"""What `status`, the live view and `logs` say of a run."""

from __future__ import annotations

from pathlib import Path

from lorafleet.commands.view import describe_recommendation
from lorafleet.jobs import files
from lorafleet.jobs.runs.events import Event, SearchEndedEvent, SearchEvent
from lorafleet.jobs.runs.run import Run
from tests.conftest import lorafleet_here


def test_a_trial_is_recommended_when_the_search_has_ended(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert describe_recommendation(run.read_events(Event)) is None
    run.add_event(SearchEvent(trials=2))
    assert describe_recommendation(run.read_events(Event)) is None
    run.add_event(
        SearchEndedEvent(
            trial_id="0123456789",
            metric="accuracy",
            score=0.8,
            rows=300,
            adapter="trials/0123456789/adapter",
        )
    )
    assert describe_recommendation(run.read_events(Event)) == (
        "recommended by the search: 0123456789 (trials/0123456789/adapter) with accuracy 0.800 on "
        "300 validation rows"
    )
    # A resumed run searches again.
    run.add_event(SearchEvent(trials=4))
    assert describe_recommendation(run.read_events(Event)) is None


def test_a_recommendation_without_weights_and_rows_is_short(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.add_event(SearchEndedEvent(trial_id="0123456789", metric="loss", score=1.5))
    assert describe_recommendation(run.read_events(Event)) == (
        "recommended by the search: 0123456789 with loss 1.500"
    )


def test_a_run_without_a_log_says_why(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "runs", "waiting")
    files.write_json(run.path / "plan.json", {"command": "train"})
    done = lorafleet_here("logs", run.id, cwd=tmp_path)
    assert done.returncode == 0
    assert f"{run.id} has no log yet. It is pending" in done.stderr
    (run.path / "logs").mkdir(exist_ok=True)
    (run.path / "logs" / "driver.log").write_text("attempt 1\n")
    done = lorafleet_here("logs", run.id, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("attempt 1\n", "")
