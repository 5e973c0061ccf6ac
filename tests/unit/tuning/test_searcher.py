"""What Tune is given while a search ends: trials, evaluations, and what keeps idle actors."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from lorafleet.jobs.runs.run import Run, TrialState
from lorafleet.jobs.schema.types import Assignment
from lorafleet.tuning.evaluation_queue import EvaluationQueue
from lorafleet.tuning.ledger import Ledger
from lorafleet.tuning.progress import StopFile
from lorafleet.tuning.proposals import ListProposals
from lorafleet.tuning.searcher import ProposalSearcher
from lorafleet.tuning.trial_queue import ThreadShare, TrialQueue
from lorafleet.tuning.trial_table import TrackedTrial
from tests.conftest import JobMaker


class Tune:
    """Asks a searcher of two slots, as Tune does, and ends what it was given."""

    def __init__(
        self, job_maker: JobMaker, folder: Path, trials: int, finalists: list[str]
    ) -> None:
        self.run = Run(folder / "run")
        self.run.path.mkdir()
        rates: list[Assignment] = [{"train.learning_rate": (i + 1) * 1e-3} for i in range(trials)]
        self.ledger = Ledger(self.run, job_maker().job, searching=False)
        stop_file = StopFile(self.run.path / "stop", seconds=0.0)
        queue = TrialQueue(
            self.ledger,
            ListProposals(rates),
            trials,
            4,
            self.create,
            stop_file.exists,
            ThreadShare(usual=1, slots=2),
        )
        self.evaluations = EvaluationQueue(["base"], lambda: finalists)
        self.searcher = ProposalSearcher(queue, stop_file, self.evaluations, slots=2)
        self.asked = 0

    def create(self, assignment: Assignment, index: int) -> TrackedTrial:
        return self.ledger.add_trial(f"trial-{index}", index, assignment)

    def ask(self) -> tuple[str, Any]:
        """The id of a task, and what it is: a trial, `evaluate NAME`, `standby`, or Tune's words."""
        self.asked += 1
        name = str(self.asked)
        config = self.searcher.suggest(name)
        if not isinstance(config, dict):
            return name, config
        if "evaluation" in config:
            return name, f"evaluate {config['evaluation']}"
        return name, "standby" if "standby" in config else config["trial_id"]

    def end(self, name: str, state: TrialState | None = None) -> None:
        if state is not None:
            self.searcher.open_trials[name].set_state(state)
        self.searcher.on_trial_complete(name)


def test_tune_saves_nothing_of_the_search(bert_job: JobMaker, tmp_path: Path) -> None:
    """Tune pickles its searcher at the start: a ledger of thousands of trials stays out of it."""
    tune = Tune(bert_job, tmp_path, 3, [])
    tune.searcher.queue.ledger.listeners.append(threading.Lock())  # type: ignore[arg-type]
    assert len(pickle.dumps(tune.searcher)) < 200
    assert tune.ask()[1] == "trial-0"


def test_idle_actors_are_kept_until_the_finalists_are_known(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    tune = Tune(bert_job, tmp_path, 3, ["trial-1", "trial-2"])
    tasks = [tune.ask() for _ in range(3)]
    assert [what for _, what in tasks] == ["trial-0", "trial-1", "trial-2"]
    # Nothing else to train: the base waits for the first actor that becomes free.
    base, what = tune.ask()
    assert what == "evaluate base"
    assert tune.ask()[1] is None
    tune.end(tasks[0][0], TrialState.STOPPED)
    assert tune.ask()[1] is None  # trial-1 and trial-2 run, or trial-2 and the base
    tune.end(tasks[1][0], TrialState.FINISHED)
    finished, what = tune.ask()
    assert what == "evaluate trial-1"  # it was trained to the end, so it is a finalist
    tune.end(base)
    tune.end(finished)
    standby, what = tune.ask()
    assert what == "standby"
    assert tune.searcher.needs_standby()
    assert tune.ask()[1] is None
    tune.end(tasks[2][0], TrialState.FINISHED)
    last, what = tune.ask()
    assert what == "evaluate trial-2"
    assert not tune.searcher.is_over()
    tune.end(last)
    assert tune.searcher.is_over()
    assert not tune.searcher.needs_standby()
    tune.end(standby)
    assert tune.ask()[1] == Searcher.FINISHED


def test_a_standby_task_makes_way_for_a_restarted_trial(bert_job: JobMaker, tmp_path: Path) -> None:
    tune = Tune(bert_job, tmp_path, 2, [])
    first, second = tune.ask(), tune.ask()
    base, _ = tune.ask()
    tune.end(first[0], TrialState.STOPPED)
    tune.end(base)
    standby, what = tune.ask()
    assert what == "standby"
    tune.searcher.open_trials[second[0]].set_state(TrialState.PENDING)
    tune.searcher.on_trial_complete(second[0], error=True)
    assert tune.ask()[1] == "trial-1"
    assert tune.ask()[1] is None
    tune.end(standby)  # the scheduler stops it, because trial-1 waits for an actor
    assert tune.ask()[1] is None  # that actor is no longer idle


def test_no_standby_task_waits_for_an_actor_that_is_not_there(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    """An autoscaler would add a machine for it."""
    tune = Tune(bert_job, tmp_path, 1, [])
    trial, base = tune.ask(), tune.ask()
    assert (trial[1], base[1]) == ("trial-0", "evaluate base")
    assert tune.ask()[1] is None
    tune.searcher.on_trial_complete(base[0], error=True)
    assert tune.ask()[1] is None
    tune.end(trial[0], TrialState.FINISHED)


def test_a_stop_ends_the_search_without_evaluations(bert_job: JobMaker, tmp_path: Path) -> None:
    tune = Tune(bert_job, tmp_path, 2, ["trial-0"])
    trial = tune.ask()
    (tune.run.path / "stop").touch()
    assert tune.ask()[1] == Searcher.FINISHED
    tune.end(trial[0], TrialState.PENDING)
    assert tune.ask()[1] == Searcher.FINISHED
    assert not tune.searcher.needs_standby()
