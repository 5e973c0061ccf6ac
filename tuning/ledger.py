"""The driver's record of a sweep: it alone writes trials' metrics and states, and decides at the rungs.

Everything that a decision depends on is read back from the run's own files, so a resumed sweep decides as one that was
never killed. Ray Tune's scheduler state is not used: `Tuner.restore` loses the rungs (ray#30838).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from lorafleet.evaluation.report.recommend_trial import configuration_key, decide_over_folds, over_folds
from lorafleet.evaluation.report.search import load_fold_results, load_trial_rows, search_rule
from lorafleet.jobs.runs.run import Run, Trial, TrialState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.metrics import is_better
from lorafleet.jobs.trials import asha as rungs
from lorafleet.jobs.trials.retries import retry_number
from lorafleet.jobs.trials.sampling import Assignment, without_fold


class Listener(Protocol):
    """Something that mirrors the record (W&B). It is told after the record was written, and cannot change it."""

    def on_begin(self, trial: Trial) -> None: ...
    def on_row(self, trial: Trial, row: dict[str, Any]) -> None: ...
    def on_end(self, trial: Trial) -> None: ...


@dataclass
class Ledger:
    """Scores by rung, and what is done with a report of a trial."""

    run: Run
    job: JobSpec
    searching: bool
    listeners: list[Listener] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.metric, self.goal = self.job.metric.name, self.job.metric.goal
        self.places: dict[int, dict[str, rungs.Place]] = {}
        self.last_step: dict[str, int] = {}
        self.actors: dict[str, int] = {}
        for trial in self.run.trials():
            for row in trial.metrics():
                self._remember(trial.id, row)

    @property
    def halving(self) -> bool:
        """Whether trials are cut at rungs."""
        return self.searching and self.job.search is not None and self.job.search.scheduler.type == "asha"

    def _remember(self, trial_id: str, row: dict[str, Any]) -> None:
        self.last_step[trial_id] = max(self.last_step.get(trial_id, -1), int(row["step"]))
        if row.get("rung") is not None:
            place = rungs.place(row.get(self.metric), row.get("loss"), self.goal)
            self.places.setdefault(row["rung"], {})[trial_id] = place

    def begin(self, trial: Trial) -> None:
        """A trial has an actor and trains."""
        if not trial.state.ended:
            trial.set_state(
                TrialState.RUNNING, reason=None, **({} if "started" in trial.status() else {"started": time.time()})
            )
            self._tell(lambda listener: listener.on_begin(trial))

    def saw_actor(self, name: str, base_loads: int, seconds: float) -> None:
        """Note each loading of a base: there should be one an actor."""
        if base_loads > self.actors.get(name, 0):
            self.actors[name] = base_loads
            self.run.event("base_loaded", actor=name, count=base_loads, seconds=round(seconds, 3))

    def warn(self, trial: Trial, sentence: str) -> None:
        """Note what a trial has to say beside its numbers; the log and the report show it."""
        self.run.event("warning", trial_id=trial.id, sentence=sentence)

    def report(self, trial: Trial, row: dict[str, Any]) -> bool:
        """Record one report of a trial, unless an earlier attempt did; say whether the trial goes on."""
        if int(row["step"]) > self.last_step.get(trial.id, -1):
            trial.add_row(row)
            self._remember(trial.id, row)
            self._tell(lambda listener: listener.on_row(trial, row))
        if row.get("rung") is None:
            return True
        return self.decide(trial, int(row["rung"]))

    def decide(self, trial: Trial, rung: int) -> bool:
        """Whether a trial goes on past a rung where its score stands. A decision once made is kept."""
        trial.set_state(trial.state, rung=rung)
        last = rung + 1 >= len(self.run_levels(trial))
        if not self.halving or last or trial.repeats:
            return True
        assert self.job.search is not None
        made = [e for e in self.run.events("rung") if e["trial_id"] == trial.id and e["rung"] == rung]
        if made:
            return bool(made[-1]["goes_on"])
        places = list(self.places[rung].values())
        own, eta = self.places[rung][trial.id], self.job.search.scheduler.reduction_factor
        goes_on = rungs.goes_on(own, places, eta)
        cutoff = rungs.rung_cutoff(places, eta)
        self.run.event(
            "rung",
            trial_id=trial.id,
            rung=rung,
            score=_value(own[0], self.goal),
            loss=_value(own[1], "minimize"),
            scores=len(places),
            cutoff=_value(cutoff[0], self.goal),
            cutoff_loss=_value(cutoff[1], "minimize"),
            goes_on=goes_on,
        )
        return goes_on

    def run_levels(self, trial: Trial) -> list[int]:
        """The rungs of a trial, in `time_attr` units."""
        levels: list[int] = trial.params().get("rung_levels", [])
        return levels

    def fail(self, trial: Trial, failure: dict[str, Any]) -> None:
        """A trial was ended by something: it waits to begin again from its checkpoint, or is given up."""
        status = trial.status()
        counts: dict[str, int] = status.get("retries", {})
        kind = failure["failure_class"]
        number = retry_number(failure, counts, self.job.retries)
        if number is None:
            known = {name: failure[name] for name in ("failure_class", "sentence")}
            self.end(trial, TrialState.FAILED, failure=known, reason=failure["sentence"])
            return
        self.run.event("retry", trial_id=trial.id, failure=failure, number=number)
        again = f"again after: {failure['sentence']}"
        trial.set_state(TrialState.PENDING, retries=counts | {kind: number}, reason=again)

    def end(self, trial: Trial, state: TrialState, **facts: Any) -> None:
        """Write how a trial ended, and free what it no longer needs."""
        trial.set_state(state, **({"reason": None} | facts))
        (trial.path / "progress.json").unlink(missing_ok=True)
        shutil.rmtree(trial.path / "checkpoints", ignore_errors=True)
        trial.keep_stacks()
        self._keep_best()
        self._tell(lambda listener: listener.on_end(trial))

    def _tell(self, what: Callable[[Listener], None]) -> None:
        """Tell the mirrors. One that fails is left out from then on: the record is here, and the sweep goes on."""
        for listener in list(self.listeners):
            try:
                what(listener)
            except Exception as error:  # whatever a tracker's client may raise, it must not cost the night
                self.listeners.remove(listener)
                self.run.event("tracking_failed", error=f"{type(error).__name__}: {error}"[:500])

    def best_score(self, trial: Trial) -> float | None:
        """The best validation score that a trial's adapter on disk has."""
        best: float | None = None
        for row in trial.evaluations():
            score = row.get(self.metric)
            if score is not None and is_better(score, best, self.goal):
                best = score
        return best

    def ranked(self) -> list[Trial]:
        """Trials trained to the end, best first, the sooner made first among equals; then the cut ones likewise.

        Those that repeat another with a seed of their own are not among them, nor are those of a fold.
        """
        return self._ranked(TrialState.FINISHED) + self._ranked(TrialState.STOPPED)

    def _ranked(self, state: TrialState) -> list[Trial]:
        found_here = [trial for trial in self.run.trials() if trial.state is state and not trial.repeats]
        found_here = [trial for trial in found_here if trial.fold is None]
        scored = [(trial, self.best_score(trial)) for trial in found_here]
        found = [(trial, score) for trial, score in scored if score is not None]
        return [trial for trial, _ in sorted(found, key=lambda pair: pair[1], reverse=self.goal == "maximize")]

    def searched(self) -> list[Trial]:
        """The trials of the search itself, without what is trained of its best."""
        trials = self.run.trials()
        return [trial for trial in trials if not trial.repeats and (trial.fold is not None or not self.folds)]

    def best_of_search(self) -> Assignment | None:
        """The best configuration, once all that were searched have ended."""
        searched = self.searched()
        if self.folds:
            return self._best_over_folds(searched)
        best = self.ranked()
        if not best or not all(trial.state.ended for trial in searched):
            return None
        assignment: Assignment = best[0].params()["assignment"]
        return assignment

    @property
    def folds(self) -> int | None:
        """Folds of a cross-validation."""
        return self.job.evaluate.folds if self.searching else None

    def _best_over_folds(self, searched: list[Trial]) -> Assignment | None:
        """The configuration with the best mean over its folds; one that a fold is missing of only without another."""
        if not searched or not all(trial.state.ended for trial in searched):
            return None
        rows = [row for row in load_trial_rows(self.run, self.job) if row.fold is not None]
        folds = over_folds(rows, self.metric, self.goal)
        if not folds:
            return None
        sizes = {repr(without_fold(row.params)): row.trainable_parameters for row in rows}
        results = load_fold_results(self.run, rows)
        decision, _ = decide_over_folds(folds, search_rule(self.job), results, sizes)
        option = decision.best if decision.has_too_few_rows else decision.chosen
        return next(one.params for one in folds if configuration_key(one) == option.name)

    def _keep_best(self) -> None:
        """Only the best `search.keep` adapters stay on disk, and none of a fold."""
        for trial in self.run.trials() if self.folds else ():
            if trial.fold is not None and trial.state.ended:
                shutil.rmtree(trial.weights, ignore_errors=True)
        keep = self.job.search.keep if self.job.search else 1
        for trial in self.ranked()[keep:]:
            shutil.rmtree(trial.weights, ignore_errors=True)

    def settle(self) -> None:
        """After a kill: make the decisions that were due, so that no trial goes on that should not."""
        for trial in self.run.trials():
            if trial.state.ended:
                continue
            due = [row for row in trial.metrics() if row.get("rung") is not None]
            if due and not self.decide(trial, int(due[-1]["rung"])):
                self.end(trial, TrialState.STOPPED, reason=self.cut_reason(trial))
            else:
                trial.set_state(TrialState.PENDING)

    def cut_reason(self, trial: Trial) -> str:
        """Why a trial was cut, in words."""
        rung = trial.status().get("rung")
        level = self.run_levels(trial)[rung] if rung is not None else "?"
        unit = self.job.search.scheduler.time_attr if self.job.search else "step"
        return f"not among the best at {level} {unit}"


def _value(signed: float, goal: rungs.Goal) -> float | None:
    """What a part of a place was made from."""
    if math.isinf(signed):
        return None
    return signed if goal == "maximize" else -signed
