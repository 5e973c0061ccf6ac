"""Train several trials at once in this process, each in a slot of a pack.

A trial that cannot be packed is trained alone, while no other trial is here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.jobs.errors import TrainingFailure, make_disk_full_error
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.text import format_count
from lorafleet.jobs.trials import sampling as search
from lorafleet.jobs.trials.packing import build_pack_key, find_lone_reason
from lorafleet.training.cpu import set_up_cpu
from lorafleet.training.meter import free_unused_memory, is_out_of_memory
from lorafleet.training.packed.group import PackedGroup
from lorafleet.training.packed.session import PackedSession, evaluate_together
from lorafleet.training.watchdog import Watchdog
from lorafleet.tuning.failures import (
    WorkerUnusable,
    classify_exception,
    is_device_error,
    save_traceback,
)
from lorafleet.tuning.trial_host import TrialHost
from lorafleet.tuning.trial_report import TrialReport, WorkerInfo
from lorafleet.tuning.trial_run import (
    HEARTBEAT_SECONDS,
    NOTICE_SECONDS,
    EvaluationAborted,
    TrialRun,
)


@dataclass(frozen=True)
class PackSize:
    """How trials are packed."""

    trials: int
    """Maximum number of trials that are trained at once."""
    trials_per_pass: int
    """Maximum number of trials that share a forward pass."""
    max_rank: int
    """Largest rank of a trial."""


@dataclass
class _Member:
    """A trial that this process trains."""

    config: dict[str, Any]
    run: TrialRun | None = None
    session: PackedSession | None = None
    """Its slot; None for a trial that is trained alone."""
    error: Exception | None = None
    """What ended it, until it is reported."""
    is_training: bool = False
    """Whether its training since the last report is not over."""


class PackHost:
    """Process that trains several trials at once.

    Call `enter` for each trial while `can_enter` allows it, `step` until a report ends a trial,
    and then `leave` for that trial.

    Args:
        host: A host without a trial, for its base and data.
        warn: Called with a sentence about the pack for the report of the run.
        stacks: File of the run for the stacks of this process if it hangs.
    """

    def __init__(
        self, host: TrialHost, size: PackSize, warn: Callable[[str], None], stacks: Path
    ) -> None:
        self.host, self.size, self.warn, self.stacks = host, size, warn, stacks
        self.trials_per_pass = size.trials_per_pass
        self.group: PackedGroup | None = None
        self._key: Hashable = None
        self._members: dict[str, _Member] = {}
        self._watchdog: Watchdog | None = None
        self._beat_at = time.monotonic()
        self._is_stopping = False
        self._asked_node_at = time.monotonic()
        self.is_node_leaving = False
        """True if this machine will be preempted: all trials save and end, and none may enter."""
        # After a failed entry, the base may have the remains of an adapter in it. The trials that
        # are here replace all of its adapted layers; no other one may follow on it.
        self._must_drop_base = False

    @property
    def is_empty(self) -> bool:
        """Return whether no trial is here."""
        return not self._members

    def has(self, trial_id: str) -> bool:
        """Return whether a trial is here."""
        return trial_id in self._members

    def can_enter(self, config: dict[str, Any], *, alone: bool) -> bool:
        """Return whether a trial can be trained now, beside those that are here.

        Args:
            config: Its `trial_id`, `assignment` and `threads`.
            alone: The trial must not be packed.
        """
        if self.is_empty:
            return True
        job = self._build_job(config)
        if self.group is None or alone or find_lone_reason(job, self.size.max_rank) is not None:
            return False
        if self._must_drop_base:
            return False
        return self.group.free_slot is not None and build_pack_key(job) == self._key

    def _build_job(self, config: dict[str, Any]) -> JobSpec:
        return search.build_trial_job(self.host.work.job, config["assignment"])

    def enter(self, config: dict[str, Any], *, alone: bool) -> None:
        """Begin a trial, or continue it from its checkpoint. An error becomes its next report.

        Args:
            config: Its `trial_id`, `assignment` and `threads`.
            alone: The trial must not be packed.
        """
        member = self._members[config["trial_id"]] = _Member(config)
        try:
            self._open(member, alone=alone)
        # The boundary of a trial: any error becomes its result, and the others continue.
        except Exception as error:  # noqa: BLE001
            member.error = error
            self._must_drop_base = True

    def _open(self, member: _Member, *, alone: bool) -> None:
        host, config = self.host, member.config
        job = self._build_job(config)
        is_alone = alone or find_lone_reason(job, self.size.max_rank) is not None
        if self.group is None:
            set_up_cpu(config["threads"])
        member.run = TrialRun(
            host.work, config, host.data, None if is_alone else self._get_watchdog()
        )
        base = host.bases.get(member.run.job, len(host.data.labels))
        member.run.leaving_soon = self._ask_if_node_leaves
        if is_alone:
            member.run.open(base)
            return
        if self.group is None:
            self._key = build_pack_key(job)
            self.group = PackedGroup(
                base, member.run.data, self.size.trials, self.size.max_rank, self.trials_per_pass
            )
        slot = self.group.free_slot
        assert slot is not None
        self.group.enter(slot, member.run.job, member.run.plan)
        member.session = PackedSession(self.group, slot)
        member.run.use(member.session, base)

    def _get_watchdog(self) -> Watchdog:
        """Return the watchdog of the pack: a process has only one."""
        if self._watchdog is None:
            minutes = self.host.work.job.retries.hang_minutes
            self._watchdog = Watchdog(self.stacks, 60 * minutes)
        return self._watchdog

    def step(self) -> list[tuple[str, TrialReport]]:
        """Train until at least one trial has a report, and return all that there are.

        The reports are in the order in which the trials have entered.

        Raises:
            WorkerUnusable: The process must not train any longer; the error carries the failure.
        """
        reports = self._begin()
        if reports and self._watchdog is not None:
            self._watchdog.pause()  # the wait for the next call is not a hang
        if not reports:
            over = [self._get_alone()] if self.group is None else self._train()
            self._evaluate(over)
            reports = [(_get_id(member), self._finish(member)) for member in over]
        worker = WorkerInfo(
            name=f"{os.uname().nodename}:{os.getpid()}",
            base_loads=self.host.bases.loads,
            seconds=self.host.setup_seconds,
        )
        return [
            (trial_id, report.model_copy(update={"worker": worker})) for trial_id, report in reports
        ]

    def _get_alone(self) -> _Member:
        (member,) = self._members.values()
        return member

    def _begin(self) -> list[tuple[str, TrialReport]]:
        """Begin the training up to the next report of all trials that have reported."""
        reports = []
        for member in self._members.values():
            if member.error is not None:
                reports.append((_get_id(member), self._report_failure(member)))
            elif not member.is_training and member.session is not None:
                assert member.run is not None
                report = member.run.begin()
                member.is_training = report is None
                if report is not None:
                    reports.append((_get_id(member), report))
        return reports

    def _train(self) -> list[_Member]:
        """Train until a report of some trials is due, and return these."""
        while not (over := [member for member in self._members.values() if _is_over(member)]):
            self._run_micro_batch()
            self._get_watchdog().reset()
            self._beat()
        return over

    def _run_micro_batch(self) -> None:
        """Train the next micro-batch. After an error, smaller ones show whose it is."""
        group = self.group
        assert group is not None
        try:
            group.run_micro_batch()
        except Exception as error:
            if not group.last_pass:
                raise
            _refuse_device_error(error)
            self._divide_pass(group, error)

    def _divide_pass(self, group: PackedGroup, error: Exception) -> None:
        """Let fewer trials share a forward pass after an error; of one trial, it is its own."""
        slots = group.last_pass
        group.restart_steps()
        if is_out_of_memory(error):
            error.__traceback__ = None  # its frames hold the tensors that did not fit
            free_unused_memory(group.base.device)
        if len(slots) == 1:
            self._get_member(slots[0]).error = error
            group.slots_per_pass = self.trials_per_pass
            return
        group.slots_per_pass = len(slots) // 2
        if is_out_of_memory(error):
            self.trials_per_pass = group.slots_per_pass
            self.warn(
                f"{len(slots)} trials did not fit into memory together: at most "
                f"{format_count(self.trials_per_pass, 'trial')} share a forward pass now"
            )

    def _get_member(self, slot: int) -> _Member:
        return next(
            member
            for member in self._members.values()
            if member.session is not None and member.session.slot == slot
        )

    def _beat(self) -> None:
        """Send the progress of all trials from time to time, and ask whether the run must stop."""
        now = time.monotonic()
        if now - self._beat_at < HEARTBEAT_SECONDS:
            return
        self._beat_at = now
        self._check_for_stop()
        for member in self._members.values():
            if member.session is None or member.run is None or member.session.trial.failure:
                continue
            try:
                member.run.send_progress(member.session.build_report())
            except TrainingFailure as error:  # a NaN is the result of its trial alone
                member.error = error

    def _check_for_stop(self) -> None:
        """Tell the trials to save and end if the run must stop or this machine is preempted."""
        now = time.monotonic()
        if now - self._asked_node_at > NOTICE_SECONDS:
            self._asked_node_at = now
            self._ask_if_node_leaves()
        if self.is_node_leaving:
            for member in self._members.values():
                if member.run is not None:
                    member.run.leaving = True
        if self.host.work.is_stop_requested():
            for member in self._members.values():
                if member.run is not None:
                    member.run.stopping = True
            self._is_stopping = True

    def _ask_if_node_leaves(self) -> bool:
        self.is_node_leaving = self.is_node_leaving or self.host.is_node_leaving()
        return self.is_node_leaving

    def _handle_pass(self, phase: str) -> None:
        """Reset the watchdog, and abort an evaluation if the run stops."""
        self._get_watchdog().reset()
        self._check_for_stop()
        if self._is_stopping or self.is_node_leaving:
            raise EvaluationAborted

    def _evaluate(self, over: list[_Member]) -> None:
        """Evaluate the trials that have reached an evaluation, in the same forward passes.

        After an error each is evaluated alone, so that the error is that of its trial.
        """
        sessions = [
            member.session
            for member in over
            if member.session is not None
            and member.run is not None
            and member.error is None
            and member.session.trial.failure is None
            and member.run.must_evaluate
        ]
        if len(sessions) < 2:
            return
        try:
            evaluate_together(sessions, "validation", self._handle_pass)
        except EvaluationAborted:
            return
        except Exception as error:  # noqa: BLE001 - each trial's own evaluation meets it again
            _refuse_device_error(error)
            error.__traceback__ = None
            free_unused_memory(sessions[0].group.base.device)

    def _finish(self, member: _Member) -> TrialReport:
        """Return the report of a trial whose training is over for now."""
        run = member.run
        member.is_training = False
        try:
            if member.error is not None:
                raise member.error
            assert run is not None
            if member.session is None:
                return run.advance()
            return run.finish({} if run.due else member.session.build_report())
        except Exception as error:  # noqa: BLE001 - the boundary of a trial
            member.error = error
            return self._report_failure(member)
        finally:
            if self._watchdog is not None and member.session is not None:
                self._watchdog.pause()

    def _report_failure(self, member: _Member) -> TrialReport:
        """Return the error of a trial as its report.

        Raises WorkerUnusable if this process must not train any longer.
        """
        error, member.error = member.error, None
        assert error is not None
        run = Path(self.host.work.run)
        disk_full_error = make_disk_full_error(error, run)
        if disk_full_error:
            return TrialReport(disk_full=str(disk_full_error))
        save_traceback(run, _get_id(member), error)
        failure = classify_exception(error)
        error.__traceback__ = None  # its frames hold the tensors that did not fit
        if is_device_error(error):
            raise WorkerUnusable(failure) from error
        return TrialReport(failure=failure)

    def leave(self, trial_id: str) -> None:
        """End a trial; its slot is free. The last one leaves the base as it was."""
        member = self._members.pop(trial_id)
        if member.run is not None:
            member.run.close()
        if self.is_empty:
            self._close_group()

    def _close_group(self) -> None:
        group, self.group = self.group, None
        watchdog, self._watchdog = self._watchdog, None
        if group is not None:
            group.close()
        if watchdog is not None:
            watchdog.close()
        if self._must_drop_base:
            self._must_drop_base = False
            self.host.bases.drop()

    def close(self) -> None:
        """End all trials."""
        for trial_id in list(self._members):
            self.leave(trial_id)


def _refuse_device_error(error: Exception) -> None:
    """Raise WorkerUnusable if the process's GPU may be lost after an error."""
    if is_device_error(error):
        raise WorkerUnusable(classify_exception(error)) from error


def _get_id(member: _Member) -> str:
    trial_id: str = member.config["trial_id"]
    return trial_id


def _is_over(member: _Member) -> bool:
    """Return whether a trial must report now."""
    if member.error is not None or member.run is None or member.session is None:
        return True
    return member.session.trial.failure is not None or member.run.is_over
