"""Run Ray Tune for a search, with lorafleet's own searcher, scheduler and record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lorafleet.jobs.runs.events import RayLeftEvent
from lorafleet.jobs.runs.run import Run

if TYPE_CHECKING:
    from lorafleet.tuning.searcher import ProposalSearcher

_RELEASE_SECONDS = 5.0
"""Seconds that Ray has to release the placement groups of stopped trials."""


def run_tuner(
    run: Run,
    attempt: int,
    trainable: Any,
    searcher: ProposalSearcher,
    scheduler: Any,
    on_tick: Callable[[], None],
    *,
    reuse_actors: bool,
) -> None:
    """Run Ray Tune until the searcher has no trial left, or the run is asked to stop.

    Args:
        run: The run; Tune's own files are below its `tune/`.
        attempt: Number of the attempt, which names Tune's experiment.
        trainable: What Tune runs for each trial.
        searcher: The `ProposalSearcher`, which ends the search.
        scheduler: It records results and stops trials.
        on_tick: Called several times a second. It must not wait.
        reuse_actors: Keep the process of a trial for the next one.
    """
    from ray import tune
    from ray.tune import FailureConfig

    from lorafleet.tuning.stopper import SearchStopper

    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            # The searcher ends the search. Tune's own count would include restarted trials.
            num_samples=-1,
            reuse_actors=reuse_actors,
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(run.path / "tune"),
            # The ledger decides about restarts: it knows what ended a trial, and how often.
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_frequency=0, checkpoint_at_end=False
            ),
            stop=SearchStopper(searcher, on_tick),
            verbose=0,
        ),
    )
    with _silence_tune():
        tuner.fit()


def record_leaked_groups(run: Run) -> None:
    """Record the placement groups of stopped trials that Ray did not release.

    These hold CPUs and GPUs.
    """
    from ray.util.placement_group import placement_group_table

    deadline = time.monotonic() + _RELEASE_SECONDS
    while leaked := [row for row in placement_group_table().values() if row["state"] != "REMOVED"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    run.add_event(RayLeftEvent(placement_groups=len(leaked)))


@contextlib.contextmanager
def _silence_tune() -> Iterator[None]:
    """Suppress Tune's warnings about missing result files: the run's own files hold the results."""
    import logging

    names = ("ray.tune.analysis.experiment_analysis", "ray.tune.result_grid")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
