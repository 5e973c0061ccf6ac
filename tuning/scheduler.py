"""ASHA for Ray Tune: a result is recorded by the ledger, which also decides; Tune is told the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from jobs.run import Trial, TrialState
from tuning.ledger import Ledger


class RungScheduler(FIFOScheduler):
    """Trials start in the order in which they were proposed, and go on or stop as the ledger says."""

    def __init__(self, ledger: Ledger, out_of_budget: Callable[[], str | None]) -> None:
        super().__init__()
        self.ledger = ledger
        self.out_of_budget = out_of_budget

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """CONTINUE or STOP, after the result has been written down."""
        ours = self._ours(trial)
        if ours.state.ended:
            return TrialScheduler.STOP
        if "actor" in result:
            self.ledger.saw_actor(**result["actor"])
        failure = result.get("failure")
        if failure:
            self.ledger.end(ours, TrialState.FAILED, failure=failure, reason=failure["sentence"])
            return TrialScheduler.STOP
        if ours.state is not TrialState.RUNNING:
            self.ledger.begin(ours)
        goes_on = self.ledger.report(ours, result["row"]) if result.get("row") else True
        if result.get("done"):
            self.ledger.end(ours, TrialState.FINISHED)
            return TrialScheduler.STOP
        if not goes_on:
            self.ledger.end(ours, TrialState.STOPPED, reason=self.ledger.cut_reason(ours))
            return TrialScheduler.STOP
        spent = self.out_of_budget()
        if spent:
            self.ledger.end(ours, TrialState.STOPPED, reason=spent)
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """A trial whose process died more often than it may: the others go on."""
        ours = self._ours(trial)
        if not ours.state.ended:
            sentence = "its process died (killed, out of memory, or its node was lost) on every attempt"
            failure = {"failure_class": "worker_lost", "sentence": sentence}
            self.ledger.end(ours, TrialState.FAILED, failure=failure, reason=sentence)

    def _ours(self, trial: TuneTrial) -> Trial:
        return self.ledger.run.trial(trial.config["trial_id"])
