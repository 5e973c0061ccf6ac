"""Run ASHA in Ray Tune.

The ledger records each result and decides; the scheduler passes the decision to Tune.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from lorafleet.jobs.runs.run import Trial, TrialState
from lorafleet.tuning.failures import DISK_FULL, classify_crash, save_crash_output
from lorafleet.tuning.ledger import Ledger
from lorafleet.tuning.trial_report import TrialReport

_STOP_FILE_SECONDS = 1.5


class RungScheduler(FIFOScheduler):
    """Tune scheduler that starts trials in proposal order and stops them as the ledger decides.

    Runs in the driver; Tune calls it for each result. Tune's own ASHA is not used, because
    its rungs are lost in a restart.

    Args:
        out_of_budget: Returns which budget is spent, as text, or None.
        full_disk: Called with a message if a trial could not write.
        ends_itself: True for groups of processes, which return after their last report.
    """

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

    def on_trial_result(
        self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        """Record the result, then return CONTINUE or STOP."""
        run_trial = self._get_run_trial(trial)
        report = TrialReport.from_result(result)
        if run_trial.state.has_ended or report is None:
            return TrialScheduler.STOP
        if report.disk_full is not None:
            self.full_disk(report.disk_full)
            return TrialScheduler.STOP
        continues = self._record_report(run_trial, report)
        if self.ends_itself and report.ends_trial:
            # A group that ends by itself frees its workers; a group that Tune kills may not.
            continues = True
        return TrialScheduler.CONTINUE if continues else TrialScheduler.STOP

    def _record_report(self, trial: Trial, report: TrialReport) -> bool:
        """Record a report, end the trial if necessary, and return whether it continues.

        A failure comes first, because such a report has no row. A trial that was stopped at a
        rung is ended even if the run is asked to stop: the decision is final.
        """
        ledger = self.ledger
        worker = report.worker
        if worker is not None:
            ledger.record_base_load(worker.name, worker.base_loads, worker.seconds)
        if report.warning:
            ledger.warn(trial, report.warning)
        if report.failure is not None:
            ledger.record_failure(trial, report.failure)
            return False
        if trial.state is not TrialState.RUNNING:
            ledger.start_trial(trial)
        promoted = ledger.report(trial, report.row) if report.row is not None else True
        if report.stopping and promoted and not report.done:
            trial.set_state(TrialState.PENDING, reason="interrupted")
            return False
        # After the row is recorded: what the trial has reached counts, whatever the budget says.
        spent_budget = self.out_of_budget()
        if report.done:
            # `done` comes before the rung's decision: nothing is left to stop.
            ledger.end_trial(trial, TrialState.FINISHED)
        elif not promoted:
            ledger.end_trial(trial, TrialState.STOPPED, reason=ledger.describe_stop(trial))
        elif spent_budget:
            ledger.end_trial(trial, TrialState.STOPPED, reason=spent_budget)
        else:
            return True
        return False

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Record that a trial's process died: the trial is restarted, or given up.

        Tune calls it instead of `on_trial_result`. A process that is lost while the run is
        ending costs no retry.
        """
        run_trial = self._get_run_trial(trial)
        if run_trial.state.has_ended or trial.status == TuneTrial.ERROR:
            return  # Tune may call this twice, the second time with the status already changed
        failure = classify_crash(save_crash_output(run_trial, trial.error_file), run_trial)
        if failure.failure_class == DISK_FULL:
            self.full_disk(failure.sentence)
        elif failure.failure_class == "worker_lost" and self._is_run_ending():
            # The run is ending, so the trial did not fail and no retry is spent.
            run_trial.set_state(TrialState.PENDING, reason="interrupted")
        else:
            self.ledger.record_failure(run_trial, failure)

    def _is_run_ending(self) -> bool:
        """Return whether the run is asked to stop.

        Waits a moment for the stop file, because a queue that ends a job signals its processes
        in no particular order.
        """
        deadline = time.monotonic() + _STOP_FILE_SECONDS
        while (
            not (stopping := (self.ledger.run.path / "stop").exists())
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        return stopping

    def _get_run_trial(self, trial: TuneTrial) -> Trial:
        """Return the run's trial for one of Tune's trials."""
        return self.ledger.run.get_trial(trial.config["trial_id"])
