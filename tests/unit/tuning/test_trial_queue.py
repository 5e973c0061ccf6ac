"""The order in which trials are handed out, over attempts and restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.jobs.runs.run import Run, TrialState
from lorafleet.jobs.schema.types import Assignment
from lorafleet.tuning.ledger import Ledger
from lorafleet.tuning.proposals import ListProposals
from lorafleet.tuning.trial_queue import NoTrial, ThreadShare, TrialQueue, build_config
from lorafleet.tuning.trial_table import TrackedTrial
from tests.conftest import JobMaker

RATES: list[Assignment] = [{"train.learning_rate": rate} for rate in (1e-3, 2e-3, 3e-3)]

ONE_EACH = ThreadShare(usual=1, slots=2)


class Search:
    """A queue of three trials over a run in a folder."""

    def __init__(
        self,
        job_maker: JobMaker,
        folder: Path,
        max_open: int = 2,
        threads: ThreadShare = ONE_EACH,
    ) -> None:
        self.run = Run(folder / "run")
        self.run.path.mkdir(exist_ok=True)
        self.stopping = False
        self.ledger = Ledger(self.run, job_maker().job, searching=False)
        self.queue = TrialQueue(
            self.ledger,
            ListProposals(RATES),
            3,
            max_open,
            self.create,
            lambda: self.stopping,
            threads,
        )

    def create(self, assignment: Assignment, index: int) -> TrackedTrial:
        rate = assignment["train.learning_rate"]
        return self.ledger.add_trial(f"trial-{rate}", index, assignment)

    def take(self) -> TrackedTrial:
        trial = self.queue.take()
        assert isinstance(trial, TrackedTrial)
        return trial


def end(trial: TrackedTrial) -> TrackedTrial:
    trial.set_state(TrialState.FINISHED)
    return trial


def test_at_most_max_open_are_handed_out(bert_job: JobMaker, tmp_path: Path) -> None:
    search = Search(bert_job, tmp_path)
    first, second = search.take(), search.take()
    assert (first.id, second.id) == ("trial-0.001", "trial-0.002")
    assert search.queue.take() is NoTrial.FULL
    search.queue.complete(end(first))
    assert search.take().id == "trial-0.003"
    search.queue.complete(end(second))
    # The third one may still be restarted.
    assert search.queue.take() is NoTrial.WAIT


def test_a_trial_that_waits_for_a_restart_is_handed_out_again(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    search = Search(bert_job, tmp_path, max_open=1)
    first = search.take()
    first.set_state(TrialState.PENDING)
    search.queue.complete(first)
    assert search.take().id == first.id
    search.queue.complete(end(first))
    for _ in range(2):
        search.queue.complete(end(search.take()))
    assert search.queue.take() is NoTrial.END


def test_unfinished_trials_of_an_earlier_attempt_come_first(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    earlier = Search(bert_job, tmp_path)
    end(earlier.take())
    earlier.take().set_state(TrialState.PENDING)
    search = Search(bert_job, tmp_path, max_open=3)
    assert [search.take().id for _ in range(2)] == ["trial-0.002", "trial-0.003"]
    assert search.queue.take() is NoTrial.WAIT


@pytest.mark.parametrize("open_trials", [0, 1])
def test_a_search_that_stops_hands_out_nothing(
    bert_job: JobMaker, tmp_path: Path, open_trials: int
) -> None:
    search = Search(bert_job, tmp_path)
    for _ in range(open_trials):
        search.take()
    search.stopping = True
    assert search.queue.take() is NoTrial.END


@pytest.mark.parametrize(
    ("slots", "used", "left", "threads"),
    [
        (4, 0, 9, 2),  # every slot will be used
        (4, 6, 1, 2),
        (4, 0, 2, 4),  # two trials for four slots
        (4, 0, 3, 2),  # three trials: two, then three and three of the eight cores
        (4, 2, 2, 3),
        (4, 5, 1, 3),
        (4, 0, 1, 8),
        (4, 4, 1, 4),  # the last one, while two others run
        (4, 7, 1, 2),  # never fewer than usual
        (1, 0, 1, 2),
    ],
)
def test_a_trial_takes_the_cores_of_idle_slots(
    slots: int, used: int, left: int, threads: int
) -> None:
    assert ThreadShare(2, slots, takes_idle=True).compute(used, left) == threads
    assert ThreadShare(2, slots).compute(used, left) == 2


def test_a_trial_keeps_its_number_of_threads(bert_job: JobMaker, tmp_path: Path) -> None:
    """Also when it is resumed where more cores are idle."""
    share = ThreadShare(1, 2, takes_idle=True)
    earlier = Search(bert_job, tmp_path, threads=share)
    first, second = earlier.take(), earlier.take()
    earlier.queue.complete(end(first))
    third = earlier.take()
    assert [trial.read_status().threads for trial in (first, second, third)] == [1, 1, 1]
    for trial in (second, third):
        trial.set_state(TrialState.PENDING)
    resumed = Search(bert_job, tmp_path, threads=ThreadShare(8, 2, takes_idle=True))
    assert build_config(resumed.take())["threads"] == 1


def test_the_last_trial_of_a_resumed_search_gets_all_cores(
    bert_job: JobMaker, tmp_path: Path
) -> None:
    share = ThreadShare(1, 2, takes_idle=True)
    earlier = Search(bert_job, tmp_path, threads=share)
    for _ in range(2):
        end(earlier.take())
    resumed = Search(bert_job, tmp_path, threads=share)
    assert build_config(resumed.take())["threads"] == 2
