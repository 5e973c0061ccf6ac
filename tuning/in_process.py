"""Search and evaluate in the driver's own process, where one trial at a time fits.

No Ray is started. A process that cannot be trusted any more ends with `RestartNeeded`, and
the supervisor (`cluster/execution/supervisor.py`) starts the driver again.
"""

from __future__ import annotations

from collections.abc import Callable

from lorafleet.cluster.execution.supervisor import RestartNeeded
from lorafleet.jobs.errors import DiskFull
from lorafleet.training.cpu import set_up_cpu
from lorafleet.tuning.base_cache import BaseCache
from lorafleet.tuning.failures import WorkerUnusable
from lorafleet.tuning.held_out import MAX_TRIES, Evaluator, HeldOutEvaluation
from lorafleet.tuning.pack_host import PackHost
from lorafleet.tuning.recorder import Recorder
from lorafleet.tuning.trial_host import TrialHost
from lorafleet.tuning.trial_queue import NoTrial, TrialQueue, build_config
from lorafleet.tuning.trial_run import Work
from lorafleet.tuning.trial_table import TrackedTrial


def run_trials(
    host: TrialHost, queue: TrialQueue, recorder: Recorder, on_report: Callable[[], None]
) -> None:
    """Train the trials of a queue, one after another.

    Args:
        host: A host that has no trial yet.
        queue: At most one of its trials is open at a time.
        recorder: Receives every report.
        on_report: Called after each report, which is at least every 15 seconds while a trial
            trains.

    Raises:
        RestartNeeded: This process must not take another trial.
    """
    is_first = True
    while not isinstance(trial := queue.take(), NoTrial):
        # Recorded before anything can fail: if this process dies, the next one knows whose fault
        # it was.
        recorder.ledger.start_trial(trial)
        config = build_config(trial)
        if is_first:
            host.set_up(config)
        else:
            host.set_trial(config)
        is_first = False
        _run_trial(host, trial, recorder, on_report)
        queue.complete(trial)
    host.close()


def _run_trial(
    host: TrialHost, trial: TrackedTrial, recorder: Recorder, on_report: Callable[[], None]
) -> None:
    """Train a trial until it ends, or until its report says that it continues later."""
    continues = True
    while continues:
        try:
            report = host.step()
        except WorkerUnusable as error:
            recorder.record_crash(trial, error.failure)
            raise RestartNeeded(error.failure.sentence) from error
        continues = recorder.record(trial, report)
        on_report()


def run_packed_trials(
    host: PackHost, queue: TrialQueue, recorder: Recorder, on_report: Callable[[], None]
) -> None:
    """Train the trials of a queue, several at once.

    Args:
        host: A host that has no trial.
        queue: As many of its trials are open at a time as the host takes.
        recorder: Receives every report.
        on_report: Called after the reports of a step, which are at least every 15 seconds.

    Raises:
        RestartNeeded: This process must not train any longer.
    """
    members: dict[str, TrackedTrial] = {}
    waiting: TrackedTrial | None = None
    while True:
        while True:
            if waiting is None:
                trial = queue.take()
                waiting = None if isinstance(trial, NoTrial) else trial
            if waiting is not None and queue.should_stop():
                queue.complete(waiting)  # it has not begun
                waiting = None
            if waiting is None:
                break
            config, alone = build_config(waiting), waiting.read_status().trains_alone
            if not host.can_enter(config, alone=alone):
                break
            # Recorded before anything can fail: see `run_trials`.
            recorder.ledger.start_trial(waiting)
            host.enter(config, alone=alone)
            members[waiting.id], waiting = waiting, None
        if not members:
            break
        try:
            reports = host.step()
        except WorkerUnusable as error:
            recorder.record_shared_crash(list(members.values()), error.failure)
            raise RestartNeeded(error.failure.sentence) from error
        for trial_id, report in reports:
            if not recorder.record(members[trial_id], report):
                host.leave(trial_id)
                queue.complete(members.pop(trial_id))
        on_report()
    host.close()


def evaluate_in_process(
    work: Work,
    bases: BaseCache,
    evaluations: list[HeldOutEvaluation],
    *,
    threads: int,
    is_restart: bool,
) -> dict[str, str]:
    """Evaluate models, one after another.

    A failure costs only that model's numbers. A model during whose evaluation `MAX_TRIES`
    processes have died is not tried again.

    Args:
        threads: Number of threads; this process keeps it.
        is_restart: True if the supervisor started this process after another one had died.

    Returns:
        Model name -> reason, for each model that could not be evaluated.

    Raises:
        DiskFull: The results could not be written.
        RestartNeeded: This process must not evaluate another model.
    """
    set_up_cpu(threads)
    evaluator, failed = Evaluator(work, bases), {}
    for evaluation in evaluations:
        if work.is_stop_requested():
            break
        if not is_restart:
            evaluation.forget_lost_processes()
        lost = evaluation.count_lost_processes()
        if lost >= MAX_TRIES:
            failed[evaluation.name] = f"its process died or hung {lost} times"
            continue
        try:
            report = evaluator.try_evaluate(evaluation, lost + 1)
        except WorkerUnusable as error:
            # Counted as a lost process: the next one tries again, or gives the model up.
            evaluation.get_stacks_path(lost + 1).write_text(error.failure.sentence)
            raise RestartNeeded(error.failure.sentence) from error
        if report.disk_full is not None:
            raise DiskFull(report.disk_full)
        if report.failure is not None:
            failed[evaluation.name] = report.failure
    return failed
