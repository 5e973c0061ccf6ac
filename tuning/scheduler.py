"""ASHA for Ray Tune: a result is recorded by the ledger, which also decides; Tune is told the answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from lorafleet.jobs.runs.run import Trial, TrialState
from lorafleet.tuning.failures import host_failure, keep_last_words
from lorafleet.tuning.ledger import Ledger
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

_SAME_INSTANT_SECONDS = 1.5


class RungScheduler(FIFOScheduler):
    """Trials start in the order in which they were proposed, and go on or stop as the ledger says."""

    def __init__(
        self,
        ledger: Ledger,
        out_of_budget: Callable[[], str | None],
        full_disk: Callable[[str], None],
        *,
        ends_itself: bool,
    ) -> None:
        super().__init__()
        self.full_disk = full_disk
        self.ends_itself = ends_itself
        self.ledger = ledger
        self.out_of_budget = out_of_budget

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """CONTINUE or STOP, after the result has been written down."""
        ours = self._ours(trial)
        if ours.state.ended or "report" not in result:
            return TrialScheduler.STOP
        report = json.loads(result["report"])
        if "full_disk" in report:
            self.full_disk(report["full_disk"])
            return TrialScheduler.STOP
        goes_on = self._take(ours, report)
        if self.ends_itself and (report.get("done") or report.get("stopping") or report.get("failure")):
            goes_on = True  # a group that is ending by itself frees its workers; one that is killed there may not
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def _take(self, trial: Trial, report: dict[str, Any]) -> bool:
        """Record a report and end the trial if it is to end."""
        ledger = self.ledger
        if "actor" in report:
            ledger.saw_actor(**report["actor"])
        if report.get("warning"):
            ledger.warn(trial, report["warning"])
        failure = report.get("failure")
        if failure:
            ledger.fail(trial, failure)
            return False
        if trial.state is not TrialState.RUNNING:
            ledger.begin(trial)
        goes_on = ledger.report(trial, report["row"]) if report.get("row") else True
        if report.get("stopping") and goes_on and not report.get("done"):
            trial.set_state(TrialState.PENDING, reason="interrupted")
            return False
        spent = self.out_of_budget()
        if report.get("done"):
            ledger.end(trial, TrialState.FINISHED)
        elif not goes_on:
            ledger.end(trial, TrialState.STOPPED, reason=ledger.cut_reason(trial))
        elif spent:
            ledger.end(trial, TrialState.STOPPED, reason=spent)
        else:
            return True
        return False

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """A trial whose process died: it begins again, or the others go on without it."""
        ours = self._ours(trial)
        if ours.state.ended or trial.status == TuneTrial.ERROR:
            return  # Tune may say it twice, the second time with the status already changed
        failure = host_failure(keep_last_words(ours, trial.error_file), ours)
        if "full_disk" in failure:
            self.full_disk(failure["full_disk"])
        elif failure["failure_class"] == "worker_lost" and self._run_ends():
            ours.set_state(TrialState.PENDING, reason="interrupted")  # not a failure of its own: no retry is spent
        else:
            self.ledger.fail(ours, failure)

    def _run_ends(self) -> bool:
        """Whether the run is asked to end: a queue that ends a job tells its processes in no order."""
        ends = time.monotonic() + _SAME_INSTANT_SECONDS
        while not (stopping := (self.ledger.run.path / "stop").exists()) and time.monotonic() < ends:
            time.sleep(0.1)
        return stopping

    def _ours(self, trial: TuneTrial) -> Trial:
        return self.ledger.run.trial(trial.config["trial_id"])
