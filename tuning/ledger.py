"""Record a sweep: write the metrics and states of its trials, and decide at the rungs.

Only the driver writes this record. Every input of a decision is in the run's own files,
which are read once, at the start of an attempt. So a resumed sweep decides like one that
was never killed, and a result costs the same in a search of ten trials and of a thousand.
Ray Tune's scheduler state is not used: `Tuner.restore` loses the rungs (ray#30838).
"""

from __future__ import annotations

import bisect
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from lorafleet.evaluation.report.recommend_trial import (
    decide_over_folds,
    get_configuration_key,
    summarize_folds,
)
from lorafleet.evaluation.report.search import build_search_rule, load_fold_results, load_trial_rows
from lorafleet.jobs.runs.events import (
    BaseLoadedEvent,
    PauseEvent,
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
from lorafleet.jobs.trials.asha import Rung, make_rung_score
from lorafleet.jobs.trials.retries import get_retry_number
from lorafleet.jobs.trials.sampling import remove_fold
from lorafleet.tuning.results_journal import ResultsJournal
from lorafleet.tuning.trial_table import TrackedTrial, TrialTable


class Decision(Enum):
    """What happens to a trial after a report."""

    CONTINUE = "continue"
    STOP = "stop"
    """It is not among the best of its rung."""
    PAUSE = "pause"
    """It waits at its rung: others decide whether it goes on."""


class Listener(Protocol):
    """Observer that mirrors the record (for example to W&B).

    It is notified after the record was written, and cannot change it.
    """

    def on_begin(self, trial: Trial) -> None: ...
    def on_row(self, trial: Trial, row: MetricsRow) -> None: ...
    def on_end(self, trial: Trial) -> None: ...


@dataclass
class TrialResults:
    """Values of a trial's metrics.jsonl that the decisions of a search need."""

    last_step: int = -1
    """Last step that was reported."""
    rung: int | None = None
    """Last rung with a score."""
    scores: dict[int, float] = field(default_factory=dict)
    """Step -> value of the search's metric there."""
    best: float | None = None
    """Best of `scores`: that of the weights on disk."""
    seconds: float = 0.0
    """Time of training and evaluation, over all attempts."""


@dataclass
class Ledger:
    """Record of a sweep: scores by rung, and the decision on each report of a trial.

    One ledger per attempt, in the driver. `Recorder` calls it for each result,
    `SearchThenSeeds` asks it for the best configuration. Everything that decides is in the run's
    files before it is used.

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
        self.journal = ResultsJournal(self.run)
        self.journal.recover()
        self.trials = TrialTable(self.run)
        self.rungs: dict[int, Rung] = {}
        """Index of the rung, from 0 -> its scores."""
        self.results: dict[str, TrialResults] = {}
        """Trial id -> its results so far."""
        self.searched = 0
        """Number of trials of the search itself."""
        self.trial_seconds = 0.0
        """Time of training and evaluation, summed over all trials."""
        # (trial id, rung) -> whether the trial was promoted.
        self._decisions = {
            (event.trial_id, event.rung): event.goes_on for event in self.run.read_events(RungEvent)
        }
        # Actor -> number of loaded bases.
        self._actors: dict[str, int] = {}
        # Trials that have ended, best first.
        self._ranking: list[tuple[_RankKey, TrackedTrial]] = []
        # Whether a trial has paused since it was last asked which may go on: hosts ask often.
        self._has_news = True
        # Trials with results that wait to be written.
        self._unwritten: dict[str, TrackedTrial] = {}
        for trial in self.trials:
            self._count_searched(trial)
            for row in trial.read_metrics():
                self._record_results(trial.id, row)
            if trial.state.has_ended:
                self._rank(trial)

    @property
    def uses_halving(self) -> bool:
        """Return whether trials are stopped at rungs."""
        return (
            self.searching
            and self.job.search is not None
            and self.job.search.scheduler.type == "asha"
        )

    def add_trial(
        self, trial_id: str, index: int, assignment: Assignment, **params: Any
    ) -> TrackedTrial:
        """Create a trial, or return the one that exists.

        Args:
            params: Other fields of `TrialParams`.
        """
        is_new = trial_id not in self.trials
        trial = self.trials.add(trial_id, index, assignment, **params)
        if is_new:
            self._count_searched(trial)
        return trial

    def _count_searched(self, trial: TrackedTrial) -> None:
        self.searched += self._is_searched(trial)
        self.results[trial.id] = TrialResults()

    def _is_searched(self, trial: Trial) -> bool:
        """Return whether a trial belongs to the search itself, and is no later training of its
        best configuration.
        """
        return not trial.is_repeat and (trial.fold is not None or not self.folds)

    def _record_results(self, trial_id: str, row: MetricsRow) -> None:
        """Store the values of a row that decisions need."""
        results = self.results[trial_id]
        results.last_step = max(results.last_step, row.step)
        seconds = (row.train_seconds or 0.0) + (row.eval_seconds or 0.0)
        self.trial_seconds += seconds - results.seconds
        results.seconds = seconds
        score = row.get_metric(self.metric) if row.evaluated else None
        if score is not None:
            results.scores[row.step] = score
            if is_better(score, results.best, self.goal):
                results.best = score
        if row.rung is not None:
            results.rung = row.rung
            rung_score = make_rung_score(row.get_metric(self.metric), row.loss, self.goal)
            self.rungs.setdefault(row.rung, Rung()).add(trial_id, rung_score)

    def start_trial(self, trial: TrackedTrial) -> None:
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
        if base_loads > self._actors.get(name, 0):
            self._actors[name] = base_loads
            self.run.add_event(
                BaseLoadedEvent(actor=name, count=base_loads, seconds=round(seconds, 3))
            )

    def warn(self, trial: Trial, sentence: str) -> None:
        """Record a trial's warning, which the log and the report show."""
        self.run.add_event(WarningEvent(trial_id=trial.id, sentence=sentence))

    def report(self, trial: TrackedTrial, row: MetricsRow) -> Decision:
        """Record the result of a trial and return what happens to the trial.

        A row that an earlier attempt recorded is not recorded again: a resumed trial repeats
        its last report, because it cannot know whether the driver received it.

        Args:
            row: A line for metrics.jsonl.

        Returns:
            The decision at the row's rung. Between rungs, trials continue.
        """
        if row.step > self.results[trial.id].last_step:
            trial.add_rows(row)
            if trial.has_unwritten_rows:
                self._unwritten.setdefault(trial.id, trial)
            else:
                self._unwritten.pop(trial.id, None)
            self._record_results(trial.id, row)
            self._notify(lambda listener: listener.on_row(trial, row))
        if row.rung is None:
            return Decision.CONTINUE
        return self.decide(trial, row.rung)

    def save_results(self) -> None:
        """Save the results that wait, so that a kill does not lose them.

        Those of many trials are appended to the journal: how often the driver writes must not
        depend on the number of trials.
        """
        # A change of its state writes a trial's results, too.
        waiting = [trial for trial in self._unwritten.values() if trial.has_unwritten_rows]
        self._unwritten = {trial.id: trial for trial in waiting}
        if len(waiting) <= _DIRECT_TRIALS or self.journal.rows > _JOURNAL_ROWS * len(waiting):
            self.write_results()
        else:
            self.journal.append(
                (trial.id, row) for trial in waiting for row in trial.take_unsaved_rows()
            )

    def write_results(self) -> None:
        """Write all results that wait to the files of their trials."""
        for trial in list(self._unwritten.values()):
            trial.write_rows()
            del self._unwritten[trial.id]
        self.journal.clear()

    def decide(self, trial: TrackedTrial, rung: int) -> Decision:
        """Return what happens to a trial at a rung that it has a score for.

        A decision is final: it is recorded, and returned again by later calls. Trials that
        repeat the best configuration with another seed are never stopped.

        Args:
            rung: Index of the rung, from 0.
        """
        is_last = rung + 1 >= len(self.get_rung_levels(trial))
        if not self.uses_halving or is_last or trial.is_repeat:
            return Decision.CONTINUE
        # Scores arrive later than decisions: computed again, the same question could have another
        # answer.
        decided = self._decisions.get((trial.id, rung))
        if decided is None and self.pauses:
            return Decision.PAUSE
        if decided is None:
            promoted = self.rungs[rung].is_promoted(trial.id, self._eta)
            decided = self._record_decision(trial, rung, goes_on=promoted)
        return Decision.CONTINUE if decided else Decision.STOP

    @property
    def pauses(self) -> bool:
        """Return whether trials pause at a rung instead of being decided on at once."""
        return self.uses_halving and self._mode != "stop"

    @property
    def _mode(self) -> str:
        return self.job.search.scheduler.mode if self.job.search else "stop"

    @property
    def _eta(self) -> int:
        assert self.job.search is not None
        return self.job.search.scheduler.reduction_factor

    def _record_decision(self, trial: Trial, rung: int, *, goes_on: bool) -> bool:
        """Record a decision with the scores that it was derived from, and return it."""
        scores = self.rungs[rung]
        rung_score, cutoff = scores.scores[trial.id], scores.compute_cutoff(self._eta)
        self.run.add_event(
            RungEvent(
                trial_id=trial.id,
                rung=rung,
                score=_to_score(rung_score[0], self.goal),
                loss=_to_score(rung_score[1], "minimize"),
                scores=len(scores.scores),
                cutoff=_to_score(cutoff[0], self.goal),
                cutoff_loss=_to_score(cutoff[1], "minimize"),
                goes_on=goes_on,
            )
        )
        self._decisions[trial.id, rung] = goes_on
        return goes_on

    def pause_trial(self, trial: TrackedTrial) -> None:
        """Record that a trial waits at the last rung that it has reached."""
        rung = self.results[trial.id].rung
        assert rung is not None
        score, loss = self.rungs[rung].scores[trial.id]
        self.run.add_event(
            PauseEvent(
                trial_id=trial.id,
                rung=rung,
                score=_to_score(score, self.goal),
                loss=_to_score(loss, "minimize"),
            )
        )
        trial.set_state(TrialState.PAUSED, reason=f"paused at {self._describe_rung(trial)}")
        self._has_news = True

    def promote_paused(self) -> list[TrackedTrial]:
        """Promote the best paused trial that may go on already, from the highest rung on.

        Only with `mode: promote`. Source: Li et al. (see jobs/trials/asha.py), Algorithm 2.

        Returns:
            The trial, in a list, or an empty list.
        """
        if self._mode != "promote" or not self._has_news or not self._list_paused():
            return []
        promoted = self._promote_best(lambda arrived: arrived // self._eta)
        self._has_news = bool(promoted)
        return promoted

    def close_rungs(self, *, is_idle: bool) -> list[TrackedTrial]:
        """Decide on paused trials when no new trial will begin, and return the promoted ones.

        With `mode: synchronous`, a rung is decided when every trial that is left has reached it or
        one above. With `mode: promote`, once no trial runs, the best of a rung goes on although too
        few have arrived: one trial is trained to the end. Paused trials that cannot go on any more
        are stopped.

        Args:
            is_idle: No trial runs or waits to run.
        """
        paused = self._list_paused()
        if not paused:
            return []
        if self._mode == "synchronous":
            return self._close_cohorts()
        if not is_idle:
            return []
        promoted = self._promote_best(lambda arrived: max(1, arrived // self._eta))
        if not promoted:
            for trial in paused:
                self._stop_paused(trial)
        return promoted

    def _close_cohorts(self) -> list[TrackedTrial]:
        """Decide the lowest rung that all trials have reached, and the next if nobody passes it."""
        while self._list_paused():
            unended = self.trials.unended.values()
            lowest = min(self._get_rung(trial) for trial in unended)
            cohort = [trial for trial in unended if self._get_rung(trial) == lowest]
            if lowest < 0 or any(trial.state is not TrialState.PAUSED for trial in cohort):
                return []
            promoted = self._decide_cohort(lowest)
            if promoted:
                return promoted
        return []

    def _list_paused(self) -> list[TrackedTrial]:
        if not self.trials.counts[TrialState.PAUSED]:
            return []
        return [trial for trial in self.trials.unended.values() if trial.state is TrialState.PAUSED]

    def _get_rung(self, trial: Trial) -> int:
        """Return the last rung that a trial has reached; -1 if it has reached none."""
        rung = self.results[trial.id].rung
        return -1 if rung is None else rung

    def _rank_rung(self, rung: int, names: Iterable[str], count: int) -> list[str]:
        """Return the best of some trials that have reached a rung."""
        index = {name: self.trials.get(name).read_params().index for name in names}
        return self.rungs[rung].rank(index, count)

    def _promote_best(self, count: Callable[[int], int]) -> list[TrackedTrial]:
        """Promote the best paused trial of the highest rung at which one may go on.

        Args:
            count: Returns how many may go on of the number of trials that have arrived.
        """
        paused = {trial.id: trial for trial in self._list_paused()}
        for rung in sorted(self.rungs, reverse=True):
            arrived = [
                name
                for name in self.rungs[rung].scores
                # One that went on and failed takes no place.
                if self.trials.get(name).state is not TrialState.FAILED
            ]
            for name in self._rank_rung(rung, arrived, count(len(arrived))):
                if name in paused and self._get_rung(paused[name]) == rung:
                    return [self._promote(paused[name])]
        return []

    def _decide_cohort(self, rung: int) -> list[TrackedTrial]:
        """Promote the best of a rung that all have reached, and stop the others there."""
        scores = self.rungs[rung].scores
        best = set(self._rank_rung(rung, scores, max(1, len(scores) // self._eta)))
        cohort = [trial for trial in self._list_paused() if self._get_rung(trial) == rung]
        promoted = [trial for trial in cohort if trial.id in best]
        for trial in cohort:
            if trial.id not in best:
                self._stop_paused(trial)
        return [self._promote(trial) for trial in promoted]

    def _promote(self, trial: TrackedTrial) -> TrackedTrial:
        self._record_decision(trial, self._get_rung(trial), goes_on=True)
        reason = f"promoted at {self._describe_rung(trial)}"
        trial.set_state(TrialState.PENDING, reason=reason)
        return trial

    def _stop_paused(self, trial: TrackedTrial) -> None:
        self._record_decision(trial, self._get_rung(trial), goes_on=False)
        self.end_trial(trial, TrialState.STOPPED, reason=self.describe_stop(trial))

    def get_rung_levels(self, trial: Trial) -> list[int]:
        """Return the rungs of a trial, in `time_attr` units."""
        levels: list[int] = trial.read_params().rung_levels
        return levels

    def record_failure(self, trial: TrackedTrial, failure: FailureRecord) -> None:
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

    def end_trial(self, trial: TrackedTrial, state: TrialState, **details: Any) -> None:
        """Record how a trial ended, and delete the files that it no longer needs.

        Checkpoints are deleted, and the weights of all trials but the best `search.keep`.

        Args:
            state: A state that ends a trial.
            details: Further fields of its status.
        """
        details.setdefault("reason", None)
        rung = self.results[trial.id].rung
        if rung is not None:
            details["rung"] = rung
        trial.set_state(state, **details)
        _delete_checkpoints(trial)
        trial.save_stacks()
        self._delete_surplus_weights(trial, self._rank(trial))
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

    def _rank(self, trial: TrackedTrial) -> int | None:
        """Add an ended trial to the ranking, and return its rank there, from 0.

        Best first: those trained to the end, then the stopped ones; a stopped trial never
        precedes a finished one, whatever its score. Trials with equal scores are in the order of
        their creation. Trials without a score, repetitions with another seed and trials of a
        fold are left out: the result is None.
        """
        best = self.results[trial.id].best
        is_candidate = trial.state in _RANKED_STATES and not trial.is_repeat and trial.fold is None
        if best is None or not is_candidate:
            return None
        signed = -best if self.goal == "maximize" else best
        key = (_RANKED_STATES.index(trial.state), signed, trial.read_params().index)
        rank = bisect.bisect_right(self._ranking, key, key=lambda entry: entry[0])
        self._ranking.insert(rank, (key, trial))
        return rank

    def rank_trials(self) -> list[TrackedTrial]:
        """Return the trials that have ended with a score, best first (see `_rank`)."""
        return [trial for _, trial in self._ranking]

    def find_best_assignment(self) -> Assignment | None:
        """Return the best configuration once all searched trials have ended, else None.

        None, too, if no trial has a score.
        """
        # A trial that still runs or waits could become the best.
        if any(map(self._is_searched, self.trials.unended.values())) or not self.searched:
            return None
        if self.folds:
            return self._find_best_over_folds()
        return self._ranking[0][1].read_params().assignment if self._ranking else None

    @property
    def folds(self) -> int | None:
        """Number of folds of a cross-validation, or None."""
        return self.job.evaluate.folds if self.searching else None

    def _find_best_over_folds(self) -> Assignment | None:
        """Return the configuration with the best mean over its folds.

        A configuration with a missing fold is chosen only if there is no other.
        """
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

    def _delete_surplus_weights(self, trial: TrackedTrial, rank: int | None) -> None:
        """Delete the weights that are surplus now that a trial has ended.

        All but the best `search.keep` are, and those of folds: of them only the scores count, and
        the best configuration is trained again on all rows.

        Args:
            rank: Its rank among the trials that have ended, from 0, if it has one.
        """
        if trial.fold is not None and self.folds:
            shutil.rmtree(trial.weights, ignore_errors=True)
        elif rank is not None:
            # This trial's, or those of the trial that it has moved from the last kept rank.
            surplus = max(rank, self._keep)
            if surplus < len(self._ranking):
                shutil.rmtree(self._ranking[surplus][1].weights, ignore_errors=True)

    @property
    def _keep(self) -> int:
        """Number of the best trials whose weights are kept."""
        return self.job.search.keep if self.job.search else 1

    def delete_surplus_files(self) -> None:
        """Delete what should have been deleted when trials ended.

        A killed driver leaves such files, and a trial that was still writing when it was stopped.
        """
        for trial in self.trials:
            if trial.state.has_ended:
                _delete_checkpoints(trial)
                if trial.fold is not None and self.folds:
                    shutil.rmtree(trial.weights, ignore_errors=True)
        for _, surplus in self._ranking[self._keep :]:
            shutil.rmtree(surplus.weights, ignore_errors=True)

    def apply_due_decisions(self) -> None:
        """Make the decisions that were due before a kill, so that no stopped trial continues.

        Call it once at the start of an attempt, before trials are handed out. All other
        unfinished trials become pending, or are paused.
        """
        self.delete_surplus_files()
        for trial in list(self.trials.unended.values()):
            reached = self.results[trial.id].rung
            decision = Decision.CONTINUE if reached is None else self.decide(trial, reached)
            if decision is Decision.STOP:
                self.end_trial(trial, TrialState.STOPPED, reason=self.describe_stop(trial))
            elif decision is Decision.PAUSE:
                if trial.state is not TrialState.PAUSED:
                    self.pause_trial(trial)
            elif trial.state is not TrialState.PENDING:
                trial.set_state(TrialState.PENDING)

    def describe_stop(self, trial: Trial) -> str:
        """Return why a trial was stopped at a rung, as text."""
        return f"stopped early: not among the best at {self._describe_rung(trial)}"

    def _describe_rung(self, trial: Trial) -> str:
        """Return the last rung that a trial has reached, as in "600 samples"."""
        rung = self.results[trial.id].rung
        level = self.get_rung_levels(trial)[rung] if rung is not None else "?"
        unit = self.job.search.scheduler.time_attr if self.job.search else "step"
        return f"{level} {unit}"


_DIRECT_TRIALS = 2
"""Number of trials whose results are written to their own files at once, without the journal."""
_JOURNAL_ROWS = 200
"""Results in the journal for each trial that has some, at which all are written to the trials."""
_RankKey = tuple[int, float, int]
_RANKED_STATES = (TrialState.FINISHED, TrialState.STOPPED)


def _delete_checkpoints(trial: Trial) -> None:
    shutil.rmtree(trial.path / "checkpoints", ignore_errors=True)


def _to_score(signed_score: float, goal: Goal) -> float | None:
    """Return the original score of a signed rung score, or None if it is infinite."""
    if math.isinf(signed_score):
        return None
    return signed_score if goal == "maximize" else -signed_score
