"""Run Ray Tune for a search, with lorafleet's own searcher, scheduler and record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorafleet.jobs.runs.events import RayLeftEvent
from lorafleet.jobs.runs.run import Run, TrialState

_RELEASE_SECONDS = 5.0
"""Seconds that Ray has to release the placement groups of stopped trials."""
_STOP_CHECK_SECONDS = 1.0
"""Seconds between two checks of the trials of a run that is asked to stop."""
_SAVE_SECONDS = 300.0
"""Seconds that trials have to save when a run is asked to stop."""


def run_tuner(
    run: Run,
    attempt: int,
    trainable: Any,
    searcher: Any,
    scheduler: Any,
    stop_file: Path,
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
        stop_file: The file that asks the run to stop.
        reuse_actors: Keep the process of a trial for the next one.
    """
    from ray import tune
    from ray.tune import FailureConfig

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
            stop=_build_stopper(run, stop_file, searcher.is_over),
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


def _build_stopper(run: Run, path: Path, is_over: Callable[[], bool]) -> Any:
    """Return Tune's stopper for the stop file, and for the end of the search.

    Trials check the file themselves, save and end. Tune would kill an actor after ten
    seconds, so this stopper ends the search only when no trial runs (all may wait for
    machines that never come), or after `_SAVE_SECONDS`.

    Args:
        path: The stop file.
        is_over: Returns whether nothing is left to do. Tasks of the searcher that still wait for
            machines are then given up.
    """
    from ray.tune.stopper import Stopper

    class OnFile(Stopper):
        looked_at = 0.0

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            if is_over():
                return True
            try:
                age = time.time() - path.stat().st_mtime
            except FileNotFoundError:
                return False
            if age > _SAVE_SECONDS:
                return True
            if (
                time.monotonic() - self.looked_at < _STOP_CHECK_SECONDS
            ):  # Tune asks ten times a second
                return False
            self.looked_at = time.monotonic()
            return not any(trial.state is TrialState.RUNNING for trial in run.list_trials())

    return OnFile()


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
