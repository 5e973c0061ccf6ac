"""Record the reports of trials, and tell their host whether the trial continues."""

from __future__ import annotations

from collections.abc import Callable

from lorafleet.jobs.runs.events import NoteEvent
from lorafleet.jobs.runs.records import FailureRecord
from lorafleet.jobs.runs.run import TrialState
from lorafleet.tuning.failures import DISK_FULL, classify_hang
from lorafleet.tuning.ledger import Decision, Ledger
from lorafleet.tuning.trial_report import TrialReport
from lorafleet.tuning.trial_table import TrackedTrial


class Recorder:
    """Writes what trials report to the ledger. Every host of trials reports to one.

    Args:
        describe_spent_budget: Returns which budget is spent, as text, or None.
        handle_full_disk: Called with a message if a trial could not write.
    """

    def __init__(
        self,
        ledger: Ledger,
        describe_spent_budget: Callable[[], str | None],
        handle_full_disk: Callable[[str], None],
    ) -> None:
        self.ledger = ledger
        self.describe_spent_budget = describe_spent_budget
        self.handle_full_disk = handle_full_disk

    def record(self, trial: TrackedTrial, report: TrialReport) -> bool:
        """Record a report, end or pause the trial if necessary, and return whether it continues.

        A failure comes first, because such a report has no row. A trial that was stopped at a
        rung is ended even if the run is asked to stop: the decision is final.
        """
        ledger = self.ledger
        # A group may report once more before it is ended.
        if trial.state.has_ended or trial.state is TrialState.PAUSED:
            return False
        if report.disk_full is not None:
            self.handle_full_disk(report.disk_full)
            return False
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
        decision = Decision.CONTINUE
        if report.row is not None:
            decision = ledger.report(trial, report.row)
        if report.stopping and decision is Decision.CONTINUE and not report.done:
            trial.set_state(TrialState.PENDING, reason="interrupted")
            return False
        # `done` comes before the rung's decision: nothing is left to stop.
        if report.done:
            ledger.end_trial(trial, TrialState.FINISHED)
            return False
        return self._follow(trial, decision)

    def _follow(self, trial: TrackedTrial, decision: Decision) -> bool:
        """Stop or pause a trial if that was decided, and return whether it continues."""
        ledger = self.ledger
        # After the row is recorded: what the trial has reached counts, whatever the budget says.
        spent_budget = self.describe_spent_budget()
        if decision is Decision.STOP:
            ledger.end_trial(trial, TrialState.STOPPED, reason=ledger.describe_stop(trial))
        elif decision is Decision.PAUSE:
            ledger.pause_trial(trial)
        elif spent_budget:
            ledger.end_trial(trial, TrialState.STOPPED, reason=spent_budget)
        else:
            return True
        return False

    def record_crash(self, trial: TrackedTrial, failure: FailureRecord) -> None:
        """Record that the process of a trial died: the trial is restarted, or given up."""
        if failure.failure_class == DISK_FULL:
            self.handle_full_disk(failure.sentence)
        else:
            self.ledger.record_failure(trial, failure)

    def record_shared_crash(self, trials: list[TrackedTrial], failure: FailureRecord) -> None:
        """Record that a process died that trained several trials.

        Nobody knows which of them ended it. So it costs none of them a retry, and each is trained
        alone from its checkpoint on: another crash is its own.

        Args:
            trials: The trials of the process; of one trial alone, the crash is its own.
        """
        if failure.failure_class == DISK_FULL or len(trials) == 1:
            for trial in trials:
                self.record_crash(trial, failure)
            return
        self.ledger.run.add_event(
            NoteEvent(
                sentence=f"a process that trained {len(trials)} trials together ended "
                f"({failure.sentence}); they were continued one at a time"
            )
        )
        for trial in trials:
            reason = f"restarted after: {failure.sentence}"
            trial.set_state(TrialState.PENDING, trains_alone=True, reason=reason)


def record_lost_driver(recorder: Recorder, failure: FailureRecord | None) -> None:
    """Record the failure of the trials that the previous driver trained when it died.

    Args:
        failure: What ended the driver, as its supervisor saw it. None: the driver recorded it.
    """
    running = [
        trial
        for trial in recorder.ledger.trials.unended.values()
        if trial.state is TrialState.RUNNING
    ]
    if len(running) > 1 and failure is not None:
        recorder.record_shared_crash(running, failure)
        return
    for trial in running:
        crash = classify_hang(trial) or failure
        if crash is not None:
            recorder.record_crash(trial, crash)
