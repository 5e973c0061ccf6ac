"""Run ASHA in Ray Tune.

The recorder records each result and decides; the scheduler passes the decision to Tune.
"""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from lorafleet.jobs.runs.run import Run, TrialState
from lorafleet.tuning.failures import classify_crash, save_crash_output
from lorafleet.tuning.held_out import MAX_TRIES
from lorafleet.tuning.preemption import EndOfRun
from lorafleet.tuning.recorder import Recorder
from lorafleet.tuning.searcher import ProposalSearcher
from lorafleet.tuning.trial_report import EvaluationReport, TrialReport
from lorafleet.tuning.trial_table import TrackedTrial

_LOST_EVALUATION = f"its process died or hung {MAX_TRIES} times"


class RungScheduler(FIFOScheduler):
    """Tune scheduler that starts trials in proposal order and stops them as the ledger decides.

    Runs in the driver; Tune calls it for each result. Tune's own ASHA is not used, because
    its rungs are lost in a restart.

    Args:
        searcher: The searcher of the same search.
        ends_itself: True for groups of processes, which return after their last report.
    """

    def __init__(
        self, recorder: Recorder, searcher: ProposalSearcher, *, ends_itself: bool
    ) -> None:
        super().__init__()
        self.recorder, self.searcher = recorder, searcher
        self.ends_itself = ends_itself
        self._end_of_run = EndOfRun(searcher.stop_file)

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves it and nothing reads that: a resume starts from the run's own files.
        return {}

    @property
    def run(self) -> Run:
        """Run that the trials belong to."""
        return self.recorder.ledger.run

    def on_trial_result(
        self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        """Record the result, then return CONTINUE or STOP."""
        if "standby" in trial.config:
            goes_on = self.searcher.needs_standby() and not _has_waiting_task(tune_controller)
            return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP
        if "evaluation" in trial.config:
            evaluated = EvaluationReport.from_result(result)
            self._record_evaluation(trial.config["evaluation"], evaluated)
            return TrialScheduler.STOP
        run_trial = self._get_run_trial(trial)
        report = TrialReport.from_result(result)
        if _has_left(run_trial) or report is None:
            return TrialScheduler.STOP
        continues = self.recorder.record(run_trial, report)
        if self.ends_itself and report.ends_trial:
            # A group that ends by itself frees its workers; a group that Tune kills may not.
            continues = True
        return TrialScheduler.CONTINUE if continues else TrialScheduler.STOP

    def _record_evaluation(self, name: str, report: EvaluationReport | None) -> None:
        """Record the end of an evaluation. The worker has written its results."""
        if report is not None and report.disk_full is not None:
            self.recorder.handle_full_disk(report.disk_full)
        elif report is not None and self.searcher.evaluations is not None:
            self.searcher.evaluations.complete(name, report.failure)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Record that a trial's process died: the trial is restarted, or given up.

        Tune calls it instead of `on_trial_result`. A process that is lost while the run is
        ending costs no retry.
        """
        if "standby" in trial.config:
            return
        if "evaluation" in trial.config:
            if trial.status != TuneTrial.ERROR and self.searcher.evaluations is not None:
                self.searcher.evaluations.lose(trial.config["evaluation"], _LOST_EVALUATION)
            return
        run_trial = self._get_run_trial(trial)
        if _has_left(run_trial) or trial.status == TuneTrial.ERROR:
            return  # Tune may call this twice, the second time with the status already changed
        failure = classify_crash(save_crash_output(run_trial, trial.error_file), run_trial)
        if failure.failure_class == "worker_lost" and self._end_of_run.has_begun():
            # The run is ending, so the trial did not fail and no retry is spent.
            run_trial.set_state(TrialState.PENDING, reason="interrupted")
        else:
            self.recorder.record_crash(run_trial, failure)

    def _get_run_trial(self, trial: TuneTrial) -> TrackedTrial:
        """Return the run's trial for one of Tune's trials."""
        return self.recorder.ledger.trials.get(trial.config["trial_id"])


def _has_left(trial: TrackedTrial) -> bool:
    """Return whether a trial has ended or is paused, whatever its process still reports."""
    return trial.state.has_ended or trial.state is TrialState.PAUSED


def _has_waiting_task(tune_controller: Any) -> bool:
    """Return whether a trial or an evaluation waits for an actor."""
    return any(
        trial.status == TuneTrial.PENDING and "standby" not in trial.config
        for trial in tune_controller.get_trials()
    )
