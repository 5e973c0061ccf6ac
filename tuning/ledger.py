"""Record a sweep: write the metrics and states of its trials, and decide at the rungs.

Only the driver writes this record. Every input of a decision is read back from the
run's own files, so a resumed sweep decides like one that was never killed. Ray Tune's
scheduler state is not used: `Tuner.restore` loses the rungs (ray#30838).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from lorafleet.evaluation.report.recommend_trial import (
    decide_over_folds,
    get_configuration_key,
    summarize_folds,
)
from lorafleet.evaluation.report.search import build_search_rule, load_fold_results, load_trial_rows
from lorafleet.jobs.runs.events import (
    BaseLoadedEvent,
    RetryEvent,
    RungEvent,
    TrackingFailedEvent,
    WarningEvent,
)
from lorafleet.jobs.runs.records import FailureRecord, MetricsRow
from lorafleet.jobs.runs.run import Run, Trial, TrialState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.metrics import is_better
from lorafleet.jobs.schema.types import Assignment, Goal
from lorafleet.jobs.trials import asha as rungs
from lorafleet.jobs.trials.retries import get_retry_number
from lorafleet.jobs.trials.sampling import remove_fold


class Listener(Protocol):
    """Observer that mirrors the record (for example to W&B).

    It is notified after the record was written, and cannot change it.
    """

    def on_begin(self, trial: Trial) -> None: ...
    def on_row(self, trial: Trial, row: MetricsRow) -> None: ...
    def on_end(self, trial: Trial) -> None: ...


@dataclass
class Ledger:
    """Record of a sweep: scores by rung, and the decision on each report of a trial.

    One ledger per attempt, in the driver. `Recorder` calls it for each result,
    `SearchThenSeeds` asks it for the best configuration. It caches only what it can rebuild
    from the run's files.

    Args:
        searching: False for a single training: there are no rungs.
        listeners: Observers of the record; one that raises is dropped.
    """

    run: Run
    job: JobSpec
    searching: bool
    listeners: list[Listener] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.metric, self.goal = self.job.metric.name, self.job.metric.goal
        # Rung -> trial id -> score; trial id -> last recorded step; actor -> number of loaded
        # bases.
        self.places: dict[int, dict[str, rungs.RungScore]] = {}
        self.last_step: dict[str, int] = {}
        self.actors: dict[str, int] = {}
        for trial in self.run.list_trials():
            for row in trial.read_metrics():
                self._record_score(trial.id, row)

    @property
    def uses_halving(self) -> bool:
        """Return whether trials are stopped at rungs."""
        return (
            self.searching
            and self.job.search is not None
            and self.job.search.scheduler.type == "asha"
        )

    def _record_score(self, trial_id: str, row: MetricsRow) -> None:
        """Store a row's step and, if it is at a rung, its score."""
        self.last_step[trial_id] = max(self.last_step.get(trial_id, -1), row.step)
        if row.rung is not None:
            rung_score = rungs.make_rung_score(row.get_metric(self.metric), row.loss, self.goal)
            self.places.setdefault(row.rung, {})[trial_id] = rung_score

    def start_trial(self, trial: Trial) -> None:
        """Record that a trial has an actor and trains."""
        if not trial.state.has_ended:
            trial.set_state(
                TrialState.RUNNING,
                reason=None,
                **({} if trial.read_status().started is not None else {"started": time.time()}),
            )
            self._notify(lambda listener: listener.on_begin(trial))

    def record_base_load(self, name: str, base_loads: int, seconds: float) -> None:
        """Record each loading of a base model: there should be one per actor.

        Args:
            name: Host and process id of the actor.
            base_loads: Number of loadings in its life so far.
            seconds: Time of its set-up.
        """
        if base_loads > self.actors.get(name, 0):
            self.actors[name] = base_loads
            self.run.add_event(
                BaseLoadedEvent(actor=name, count=base_loads, seconds=round(seconds, 3))
            )

    def warn(self, trial: Trial, sentence: str) -> None:
        """Record a trial's warning, which the log and the report show."""
        self.run.add_event(WarningEvent(trial_id=trial.id, sentence=sentence))

    def report(self, trial: Trial, row: MetricsRow) -> bool:
        """Record the result of a trial and return whether the trial is promoted.

        A row that an earlier attempt recorded is not recorded again: a resumed trial repeats
        its last report, because it cannot know whether the driver received it.

        Args:
            row: A line for metrics.jsonl.

        Returns:
            True if the trial continues. Always True between rungs.
        """
        if row.step > self.last_step.get(trial.id, -1):
            trial.add_row(row)
            self._record_score(trial.id, row)
            self._notify(lambda listener: listener.on_row(trial, row))
        if row.rung is None:
            return True
        return self.decide(trial, row.rung)

    def decide(self, trial: Trial, rung: int) -> bool:
        """Return whether a trial is promoted past a rung that it has a score for.

        A decision is final: it is recorded, and returned again by later calls. Trials that
        repeat the best configuration with another seed are never stopped.

        Args:
            rung: Index of the rung, from 0.
        """
        trial.set_state(trial.state, rung=rung)
        is_last = rung + 1 >= len(self.get_rung_levels(trial))
        if not self.uses_halving or is_last or trial.is_repeat:
            return True
        assert self.job.search is not None
        # Scores arrive later than decisions: computed again, the same question could have another
        # answer.
        decisions = [
            event
            for event in self.run.read_events(RungEvent)
            if event.trial_id == trial.id and event.rung == rung
        ]
        if decisions:
            return decisions[-1].goes_on
        rung_scores = list(self.places[rung].values())
        rung_score, eta = self.places[rung][trial.id], self.job.search.scheduler.reduction_factor
        promoted = rungs.is_promoted(rung_score, rung_scores, eta)
        cutoff = rungs.compute_rung_cutoff(rung_scores, eta)
        self.run.add_event(
            RungEvent(
                trial_id=trial.id,
                rung=rung,
                score=_to_score(rung_score[0], self.goal),
                loss=_to_score(rung_score[1], "minimize"),
                scores=len(rung_scores),
                cutoff=_to_score(cutoff[0], self.goal),
                cutoff_loss=_to_score(cutoff[1], "minimize"),
                goes_on=promoted,
            )
        )
        return promoted

    def get_rung_levels(self, trial: Trial) -> list[int]:
        """Return the rungs of a trial, in `time_attr` units."""
        levels: list[int] = trial.read_params().rung_levels
        return levels

    def record_failure(self, trial: Trial, failure: FailureRecord) -> None:
        """Record the failure of a trial.

        The trial is queued to restart from its checkpoint, or marked as failed if it has no
        retries left. Retries are counted by class in its status, so the count survives a
        restart of the driver.
        """
        status = trial.read_status()
        counts: dict[str, int] = status.retries
        kind = failure.failure_class
        number = get_retry_number(failure, counts, self.job.retries)
        if number is None:
            recorded = {"failure_class": kind, "sentence": failure.sentence}
            self.end_trial(trial, TrialState.FAILED, failure=recorded, reason=failure.sentence)
            return
        self.run.add_event(RetryEvent(trial_id=trial.id, failure=failure, number=number))
        reason = f"restarted after: {failure.sentence}"
        trial.set_state(TrialState.PENDING, retries=counts | {kind: number}, reason=reason)

    def end_trial(self, trial: Trial, state: TrialState, **facts: Any) -> None:
        """Record how a trial ended, and delete the files that it no longer needs.

        Checkpoints are deleted, and the weights of all trials but the best `search.keep`.

        Args:
            state: A state that ends a trial.
        """
        trial.set_state(state, **({"reason": None} | facts))
        (trial.path / "progress.json").unlink(missing_ok=True)
        shutil.rmtree(trial.path / "checkpoints", ignore_errors=True)
        trial.save_stacks()
        self._delete_surplus_weights()
        self._notify(lambda listener: listener.on_end(trial))

    def _notify(self, notify: Callable[[Listener], None]) -> None:
        """Notify the listeners, and drop a listener that raises.

        The record is complete without it, so the sweep continues.
        """
        for listener in list(self.listeners):
            try:
                notify(listener)
            # Whatever a tracker's client may raise: it must not end the sweep.
            except Exception as error:  # noqa: BLE001
                self.listeners.remove(listener)
                self.run.add_event(
                    TrackingFailedEvent(error=f"{type(error).__name__}: {error}"[:500])
                )

    def find_best_score(self, trial: Trial) -> float | None:
        """Return the best validation score of a trial: that of its adapter on disk."""
        best: float | None = None
        for row in trial.read_evaluations():
            score = row.get_metric(self.metric)
            if score is not None and is_better(score, best, self.goal):
                best = score
        return best

    def rank_trials(self) -> list[Trial]:
        """Return the trials, best first: those trained to the end, then the stopped ones.

        A stopped trial never precedes a finished one, whatever its score. Trials with equal
        scores are in the order of their creation. Repetitions of a trial with another seed and
        trials of a fold are left out.
        """
        return self._rank_by_state(TrialState.FINISHED) + self._rank_by_state(TrialState.STOPPED)

    def _rank_by_state(self, state: TrialState) -> list[Trial]:
        """Return the trials with this state and a score, best first."""
        trials = [
            trial
            for trial in self.run.list_trials()
            if trial.state is state and not trial.is_repeat
        ]
        trials = [trial for trial in trials if trial.fold is None]
        scored = [(trial, self.find_best_score(trial)) for trial in trials]
        with_score = [(trial, score) for trial, score in scored if score is not None]
        return [
            trial
            for trial, _ in sorted(
                with_score, key=lambda pair: pair[1], reverse=self.goal == "maximize"
            )
        ]

    def list_searched(self) -> list[Trial]:
        """Return the trials of the search itself, without later trainings of its best
        configuration.
        """
        trials = self.run.list_trials()
        return [
            trial
            for trial in trials
            if not trial.is_repeat and (trial.fold is not None or not self.folds)
        ]

    def find_best_assignment(self) -> Assignment | None:
        """Return the best configuration once all searched trials have ended, else None.

        None, too, if no trial has a score.
        """
        searched = self.list_searched()
        if self.folds:
            return self._find_best_over_folds(searched)
        ranking = self.rank_trials()
        # A trial that still runs or waits could become the best.
        if not ranking or not all(trial.state.has_ended for trial in searched):
            return None
        assignment: Assignment = ranking[0].read_params().assignment
        return assignment

    @property
    def folds(self) -> int | None:
        """Number of folds of a cross-validation, or None."""
        return self.job.evaluate.folds if self.searching else None

    def _find_best_over_folds(self, searched: list[Trial]) -> Assignment | None:
        """Return the configuration with the best mean over its folds.

        A configuration with a missing fold is chosen only if there is no other.
        """
        if not searched or not all(trial.state.has_ended for trial in searched):
            return None
        rows = [row for row in load_trial_rows(self.run, self.job) if row.fold is not None]
        folds = summarize_folds(rows, self.metric, self.goal)
        if not folds:
            return None
        sizes = {repr(remove_fold(row.params)): row.trainable_parameters for row in rows}
        results = load_fold_results(self.run, rows)
        decision, _ = decide_over_folds(folds, build_search_rule(self.job), results, sizes)
        option = decision.best if decision.has_too_few_rows else decision.chosen
        return next(
            candidate.params
            for candidate in folds
            if get_configuration_key(candidate) == option.name
        )

    def _delete_surplus_weights(self) -> None:
        """Delete all adapters except the best `search.keep`; those of folds are always deleted."""
        # Of folds only the scores count; the best configuration is trained again on all rows.
        for trial in self.run.list_trials() if self.folds else ():
            if trial.fold is not None and trial.state.has_ended:
                shutil.rmtree(trial.weights, ignore_errors=True)
        keep = self.job.search.keep if self.job.search else 1
        for trial in self.rank_trials()[keep:]:
            shutil.rmtree(trial.weights, ignore_errors=True)

    def apply_due_decisions(self) -> None:
        """Make the decisions that were due before a kill, so that no stopped trial continues.

        Call it once at the start of an attempt, before trials are handed out. All other
        unfinished trials become pending.
        """
        for trial in self.run.list_trials():
            if trial.state.has_ended:
                continue
            reached = [row.rung for row in trial.read_metrics() if row.rung is not None]
            if reached and not self.decide(trial, reached[-1]):
                self.end_trial(trial, TrialState.STOPPED, reason=self.describe_stop(trial))
            else:
                trial.set_state(TrialState.PENDING)

    def describe_stop(self, trial: Trial) -> str:
        """Return why a trial was stopped at a rung, as text."""
        rung = trial.read_status().rung
        level = self.get_rung_levels(trial)[rung] if rung is not None else "?"
        unit = self.job.search.scheduler.time_attr if self.job.search else "step"
        return f"stopped early: not among the best at {level} {unit}"


def _to_score(signed_score: float, goal: Goal) -> float | None:
    """Return the original score of a signed rung score, or None if it is infinite."""
    if math.isinf(signed_score):
        return None
    return signed_score if goal == "maximize" else -signed_score
