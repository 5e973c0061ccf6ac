"""ASHA whose trials pause at rungs, against the rule computed by hand from all scores."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lorafleet.jobs.runs.events import Event, PauseEvent, RungEvent
from lorafleet.jobs.runs.records import FailureRecord, MetricsRow
from lorafleet.jobs.runs.run import Run, TrialState
from lorafleet.jobs.schema.search import SearchSpec
from lorafleet.jobs.schema.types import Assignment
from lorafleet.jobs.trials.asha import estimate_promoted_time
from lorafleet.tuning.ledger import Ledger
from lorafleet.tuning.proposals import ListProposals
from lorafleet.tuning.recorder import Recorder
from lorafleet.tuning.trial_queue import NoTrial, ThreadShare, TrialQueue, build_config
from lorafleet.tuning.trial_report import TrialReport
from lorafleet.tuning.trial_table import TrackedTrial
from tests.conftest import JobMaker

LEVELS = [1, 3, 9, 27]
ETA = 3
SEARCH = """
search:
  num_samples: 20
  parameters: {{train.learning_rate: {{distribution: log_uniform_values, min: 1e-5, max: 1e-2}}}}
  scheduler: {{type: asha, time_attr: step, mode: {mode}, grace_period: 1, max_t: 27}}
"""


class Search:
    """A search whose trials have fixed scores, and report in the order that `choose` picks."""

    def __init__(
        self,
        make: JobMaker,
        folder: Path,
        mode: str,
        scores: list[list[float]],
        *,
        workers: int = 3,
        failing: frozenset[int] = frozenset(),
        failing_later: frozenset[int] = frozenset(),
    ) -> None:
        self.job = make(SEARCH.format(mode=mode)).job
        self.run = Run.create(folder, "search")
        self.scores, self.workers, self.failing = scores, workers, failing
        self.failing_later = failing_later
        """Trials that fail once they have been promoted."""
        self.steps: dict[str, int] = {}
        """Steps that each trial has trained: those of its checkpoint."""
        self.open: list[TrackedTrial] = []
        self.begin()

    def begin(self) -> None:
        """Start an attempt."""
        self.ledger = Ledger(self.run, self.job, searching=True)
        self.recorder = Recorder(self.ledger, lambda: None, lambda sentence: None)
        self.ledger.apply_due_decisions()
        rates: list[Assignment] = [
            {"train.learning_rate": 1e-4 * (index + 1)} for index in range(len(self.scores))
        ]
        self.queue = TrialQueue(
            self.ledger,
            ListProposals(rates),
            len(rates),
            self.workers,
            self.create,
            lambda: False,
            ThreadShare(usual=1, slots=1),
        )
        self.open = []

    def create(self, assignment: Assignment, index: int) -> TrackedTrial:
        return self.ledger.add_trial(f"trial-{index}", index, assignment, rung_levels=LEVELS)

    def advance(self, choose: Callable[[int], int]) -> bool:
        """Hand out trials, and let one report; return whether there was any."""
        while len(self.open) < self.workers:
            trial = self.queue.take()
            if isinstance(trial, NoTrial):
                break
            self.ledger.start_trial(trial)
            build_config(trial)
            self.open.append(trial)
        if not self.open:
            return False
        trial = self.open[choose(len(self.open))]
        if not self.recorder.record(trial, self.train(trial)):
            self.open.remove(trial)
            self.queue.complete(trial)
        return True

    def train(self, trial: TrackedTrial) -> TrialReport:
        """Train a trial to its next rung."""
        index = trial.read_params().index
        if index in self.failing or (index in self.failing_later and trial.id in self.steps):
            failure = FailureRecord(failure_class="nan", sentence="planted")
            return TrialReport(failure=failure)
        rung = next(n for n, level in enumerate(LEVELS) if level > self.steps.get(trial.id, 0))
        self.steps[trial.id] = LEVELS[rung]
        accuracy = self.scores[index][rung]
        values = {"step": LEVELS[rung], "rung": rung, "evaluated": True, "loss": 1.0}
        row = MetricsRow.model_validate(values | {"accuracy": accuracy})
        return TrialReport(row=row, done=rung + 1 == len(LEVELS))

    def finish(self, seed: int) -> dict[str, int]:
        """Run the search to its end, and return how far each trial was trained."""
        choose = random.Random(seed).randrange
        while self.advance(choose):
            pass
        assert not self.ledger.trials.unended
        states = {trial.id: trial.state for trial in self.run.list_trials()}
        for name, state in states.items():
            if state is not TrialState.FAILED:
                whole = self.steps[name] == LEVELS[-1]
                assert state is (TrialState.FINISHED if whole else TrialState.STOPPED)
        return self.steps


def draw_scores(count: int, seed: int = 0) -> list[list[float]]:
    source = random.Random(seed)
    return [[source.choice([0.1, 0.2, source.random()]) for _ in LEVELS] for _ in range(count)]


def halve(scores: list[list[float]], failing: frozenset[int] = frozenset()) -> dict[str, int]:
    """Successive halving by hand: equal scores go to the trial that was created first."""
    left = [index for index in range(len(scores)) if index not in failing]
    steps = {f"trial-{index}": 0 for index in left}
    for rung, level in enumerate(LEVELS):
        for index in left:
            steps[f"trial-{index}"] = level
        ranked = sorted(left, key=lambda index: (-scores[index][rung], index))
        left = ranked[: max(1, len(left) // ETA)]
    return steps


@pytest.mark.parametrize("workers", [1, 3, 30])
def test_synchronous_halving_is_the_same_in_any_order(
    bert_job: JobMaker, tmp_path: Path, workers: int
) -> None:
    scores, failing = draw_scores(20), frozenset({4, 11})
    for seed in range(4):
        search = Search(bert_job, tmp_path, "synchronous", scores, workers=workers, failing=failing)
        assert search.finish(seed) == halve(scores, failing)


@pytest.mark.parametrize("mode", ["synchronous", "promote"])
def test_a_search_that_is_killed_again_and_again_goes_on(
    bert_job: JobMaker, tmp_path: Path, mode: str
) -> None:
    """An attempt continues with the files alone; a trial trains again from its checkpoint."""
    scores = draw_scores(20, 1)
    search = Search(bert_job, tmp_path, mode, scores)
    source = random.Random(3)
    for _ in range(12):
        for _ in range(source.randrange(1, 6)):
            search.advance(source.randrange)
        search.begin()
    steps = search.finish(5)
    if mode == "synchronous":
        assert steps == halve(scores)
    check_promotions(search)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example has its own run
)
@given(count=st.integers(1, 25), seed=st.integers(0, 10**6), workers=st.sampled_from([1, 2, 5, 30]))
def test_no_trial_goes_on_before_it_is_among_the_best(
    bert_job: JobMaker,
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    seed: int,
    workers: int,
) -> None:
    folder = tmp_path_factory.mktemp("promote")
    search = Search(bert_job, folder, "promote", draw_scores(count, seed), workers=workers)
    steps = search.finish(seed)
    assert LEVELS[-1] in steps.values()
    assert len(steps) == count
    check_promotions(search)


def check_promotions(search: Search) -> None:
    """Read the events again: a promoted trial was among the best 1/eta of those before it.

    At the end, where no other trial could go on, the best one of a rung goes on in any case.
    """
    arrived: dict[int, dict[str, float]] = {}
    paused: set[tuple[str, int]] = set()
    for event in search.run.read_events(Event):
        if isinstance(event, PauseEvent):
            assert event.score is not None
            arrived.setdefault(event.rung, {})[event.trial_id] = event.score
            paused.add((event.trial_id, event.rung))
        elif isinstance(event, RungEvent):
            assert (event.trial_id, event.rung) in paused
            scores = arrived[event.rung]
            assert event.scores == len(scores)
            better = sum(score > scores[event.trial_id] for score in scores.values())
            if event.goes_on:
                assert better < max(1, len(scores) // ETA)


def test_equal_scores_go_to_the_trial_that_was_created_first(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    search = Search(bert_job, tmp_path, "synchronous", [[0.5] * 4] * 9, workers=9)
    steps = search.finish(1)
    assert {name for name, step in steps.items() if step > 1} == {"trial-0", "trial-1", "trial-2"}
    assert [name for name, step in steps.items() if step == 27] == ["trial-0"]


def test_a_rung_of_trials_without_a_score_ends_the_search(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    for mode in ("synchronous", "promote"):
        search = Search(bert_job, tmp_path, mode, [[float("nan")] * 4] * 4)
        assert set(search.finish(0).values()) == {1}


def test_another_trial_is_trained_to_the_end_if_the_best_one_fails(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    scores = [[0.9] * 4, [0.5] * 4, [0.4] * 4]
    for workers in (1, 3):
        search = Search(
            bert_job,
            tmp_path,
            "promote",
            scores,
            workers=workers,
            failing_later=frozenset({0}),
        )
        assert search.finish(0) == {"trial-0": 1, "trial-1": 27, "trial-2": 1}


def test_a_cohort_of_which_nobody_passes_does_not_hold_others_up(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    """One trial skips the first rung, where all others have no score."""
    nan = float("nan")
    search = Search(bert_job, tmp_path, "synchronous", [[nan, 0.5, 0.5, 0.5]] * 3)
    search.steps["trial-0"] = LEVELS[0]
    assert search.finish(0) == {"trial-0": 27, "trial-1": 1, "trial-2": 1}


def test_what_pauses_is_refused_without_rungs_and_with_tpe() -> None:
    parameters = {"train.learning_rate": {"values": [1e-3, 1e-4]}}
    with pytest.raises(ValidationError, match="type none has no rungs"):
        SearchSpec.model_validate(
            {"parameters": parameters, "scheduler": {"type": "none", "mode": "promote"}}
        )
    with pytest.raises(ValidationError, match="method tpe needs the results"):
        SearchSpec.model_validate(
            {"parameters": parameters, "method": "tpe", "scheduler": {"mode": "synchronous"}}
        )


def test_the_planned_time_is_that_of_the_rungs() -> None:
    assert estimate_promoted_time(9, [1, 3, 9], 3) == 9 * 1 + 3 * 2 + 1 * 6
    assert estimate_promoted_time(2, [1, 3, 9], 3) == 2 * 1 + 1 * 2 + 1 * 6
    assert estimate_promoted_time(20, LEVELS, ETA) == sum(
        halve([[index / 20] * 4 for index in range(20)]).values()
    )
