"""Train packs of trials in several processes of Ray, each with a base of its own.

The driver deals out the trials itself, without Tune: a pack is one process with many trials.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.plan import PackingPlan
from lorafleet.jobs.runs.records import FailureRecord, PackRecord
from lorafleet.jobs.runs.run import Run, TrialState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.placement import Placement
from lorafleet.jobs.text import format_count
from lorafleet.jobs.trials.packing import find_lone_reason
from lorafleet.jobs.trials.sampling import build_trial_job
from lorafleet.tuning.failures import (
    classify_crash_output,
    classify_hang,
    classify_pack_hang,
)
from lorafleet.tuning.node_check import extract_error_line
from lorafleet.tuning.pack_host import PackHost, PackSize
from lorafleet.tuning.pack_size import choose_pack
from lorafleet.tuning.preemption import EndOfRun, is_node_leaving
from lorafleet.tuning.progress import ProgressExchange
from lorafleet.tuning.recorder import Recorder
from lorafleet.tuning.trial_host import TrialHost
from lorafleet.tuning.trial_queue import NoTrial, TrialQueue, build_config
from lorafleet.tuning.trial_report import TrialReport
from lorafleet.tuning.trial_run import Work
from lorafleet.tuning.trial_table import TrackedTrial

_POLL_SECONDS = 0.5
"""Seconds between two looks for free places and for a request to stop."""
_PING_SECONDS = 10.0
"""Seconds in which a process that does nothing must answer."""
_SAVE_SECONDS = 300.0
"""Seconds that trials have to save when the run is asked to stop."""
_MAX_FAILED_STARTS = 3
"""Number of processes in a row that could not start after which no other one is tried."""


@dataclass(frozen=True)
class Entry:
    """A trial that a process is to train."""

    config: dict[str, Any]
    """Its `trial_id`, `assignment` and `threads`."""
    alone: bool
    """True if it must not be packed."""

    @property
    def trial_id(self) -> str:
        """Return the id of the trial."""
        trial_id: str = self.config["trial_id"]
        return trial_id


@dataclass(frozen=True)
class Reply:
    """Reports of a process after a step."""

    reports: list[tuple[str, TrialReport]]
    """Trial id and report, for each trial that has one."""
    warnings: list[str]
    """Sentences for the report of the run."""
    is_leaving: bool
    """True if its machine will be preempted: it must not get another trial."""


class PackWorker:
    """Ray actor around a `PackHost`.

    Args:
        stacks: File of the run for the stacks of this process if it hangs.
    """

    def __init__(self, work: Work, stacks: Path) -> None:
        self.host = TrialHost(work, is_node_leaving)
        self.stacks = stacks
        self.pack: PackHost | None = None
        self._waiting: deque[Entry] = deque()
        self._warnings: list[str] = []

    def is_ready(self) -> bool:
        """Return True once the actor is running: Ray has placed it on a machine."""
        return True

    def choose(self, packing: PackingPlan, jobs: list[JobSpec]) -> PackRecord:
        """Return how many trials each process trains at once (see `choose_pack`)."""
        work = self.host.work
        run = Run(Path(work.run))
        return choose_pack(run, packing, jobs, self.host, work.threads, self.stacks)

    def step(self, size: PackSize, leaving: list[str], entering: list[Entry]) -> Reply:
        """Train until at least one trial has a report.

        A trial that cannot be trained beside the present ones waits here until they have left,
        and so do those behind it.

        Args:
            size: The same for all calls.
            leaving: Ids of the trials that end here.
            entering: Trials to begin or to continue.

        Raises:
            WorkerUnusable: The process must not train any longer.
        """
        if self.pack is None:
            self.pack = PackHost(self.host, size, self._warnings.append, self.stacks)
        pack = self.pack
        self.leave(leaving)
        self._waiting.extend(entering)
        while self._waiting and pack.can_enter(
            self._waiting[0].config, alone=self._waiting[0].alone
        ):
            entry = self._waiting.popleft()
            pack.enter(entry.config, alone=entry.alone)
        reports = pack.step()
        if self._waiting and (pack.is_node_leaving or self.host.work.is_stop_requested()):
            reports += [(entry.trial_id, TrialReport(stopping=True)) for entry in self._waiting]
            self._waiting.clear()
        warnings = list(self._warnings)
        self._warnings.clear()
        return Reply(reports, warnings, pack.is_node_leaving)

    def leave(self, trial_ids: list[str]) -> bool:
        """End trials here; those that have only waited are not in the pack. Returns True."""
        for trial_id in trial_ids:
            if self.pack is not None and self.pack.has(trial_id):
                self.pack.leave(trial_id)
        return True


@dataclass
class _Process:
    """A process of the pool, as the driver sees it."""

    number: int
    stacks: Path
    actor: Any
    answer: Any
    """Answer that is waited for: that it is ready, or its next reply. None: it has nothing to do.
    """
    is_ready: bool = False
    failed_starts: int = 0
    is_leaving: bool = False
    members: dict[str, TrackedTrial] = field(default_factory=dict)
    """Trials that it trains, and those that wait there."""
    entering: list[Entry] = field(default_factory=list)
    leaving: list[str] = field(default_factory=list)
    lone_id: str | None = None
    """Trial that it trains, or will train, alone."""

    def has_place(self, trials: int) -> bool:
        """Return whether it can be given a trial now.

        Args:
            trials: Maximum number of its trials.
        """
        is_free = self.is_ready and self.answer is None and not self.is_leaving
        return is_free and self.lone_id not in self.members and len(self.members) < trials


class PackPool:
    """Processes that each train a pack, in the driver's hands.

    Args:
        work: What the trials share; its link connects them with the driver.
        placement: Its `slots` are the number of processes.
        exchange: The driver's side of the link.
        warn: Called with a sentence for the report of the run.
    """

    def __init__(
        self,
        work: Work,
        placement: Placement,
        exchange: ProgressExchange,
        warn: Callable[[str], None],
    ) -> None:
        self.work, self.placement, self.exchange, self.warn = work, placement, exchange, warn
        self._end_of_run = EndOfRun(exchange.stop_file)
        self._processes: list[_Process] = []

    def choose(
        self, run: Run, packing: PackingPlan, jobs: list[JobSpec], on_wait: Callable[[], None]
    ) -> PackRecord | None:
        """Return how many trials each process trains at once; the first process measures it.

        The others start meanwhile.

        Args:
            packing: What the plan allows.
            jobs: Jobs of the trials that are known; at least one.
            on_wait: Called several times a second. It must not wait.

        Returns:
            None if the run is asked to stop before that is known.

        Raises:
            RunError: No process could be started.
        """
        record = run.read_pack()
        if record is not None and record.measuring is None:
            return record
        for number in range(self.placement.slots):
            self._start(number)
        while True:
            process = self._processes[0]
            answer = process.actor.choose.remote(packing, jobs)
            while not ray.wait([answer], timeout=_POLL_SECONDS)[0]:
                self.exchange.poll()
                on_wait()
                if self.exchange.stop_file.exists():
                    return None
            try:
                chosen: PackRecord = ray.get(answer)
            except ray.exceptions.RayError as error:
                # If it died while it measured, the next one reads how far it came.
                self._restart(process, error)
                continue
            return chosen

    def run(
        self,
        size: PackSize,
        queue: TrialQueue,
        recorder: Recorder,
        on_report: Callable[[], None],
    ) -> None:
        """Train the trials of a queue.

        Args:
            size: How many trials each process trains at once.
            queue: As many of its trials are open at a time as fit into all processes.
            recorder: Receives every report.
            on_report: Called several times a second. It must not wait.

        Raises:
            RunError: No process could be started.
        """
        number = len(self._processes)
        trials_left = len(queue.ledger.trials.unended) + queue.total - queue.created
        for index in range(number, min(self.placement.slots, trials_left)):
            self._start(index)
        asked_at = None
        while True:
            is_over = self._deal(size, queue, recorder)
            for process in self._processes:
                if process.answer is None and process.members:
                    self._step(process, size)
            is_idle = not any(process.members for process in self._processes)
            if is_idle and (is_over or queue.should_stop()):
                return
            self._take_answers(queue, recorder)
            self.exchange.poll()
            on_report()
            if self.exchange.stop_file.exists():
                asked_at = asked_at or time.monotonic()
                if time.monotonic() - asked_at > _SAVE_SECONDS:
                    return

    def _deal(self, size: PackSize, queue: TrialQueue, recorder: Recorder) -> bool:
        """Give free places to the next trials, where the fewest are.

        A process that has a trial to train alone gets no other one until that has ended.

        Returns:
            True if no trial is left.
        """
        while free := [process for process in self._processes if process.has_place(size.trials)]:
            process = min(free, key=lambda process: len(process.members))
            if not process.members and not self._is_alive(process):
                continue
            trial = queue.take()
            if isinstance(trial, NoTrial):
                return trial is NoTrial.END
            config = build_config(trial)
            job = build_trial_job(self.work.job, config["assignment"])
            alone = trial.read_status().trains_alone or bool(find_lone_reason(job, size.max_rank))
            # Recorded before anything can fail, as where the driver trains itself.
            recorder.ledger.start_trial(trial)
            process.members[trial.id] = trial
            process.entering.append(Entry(config, alone))
            if alone:
                process.lone_id = trial.id
        return False

    def _is_alive(self, process: _Process) -> bool:
        """Return whether a process without trials still answers; if not, another one is started.

        The trials that it would have got are not to blame.
        """
        try:
            ray.get(process.actor.is_ready.remote(), timeout=_PING_SECONDS)
        except ray.exceptions.RayError as error:
            self._restart(process, error)
            return False
        return True

    def _step(self, process: _Process, size: PackSize) -> None:
        process.answer = process.actor.step.remote(size, process.leaving, process.entering)
        process.leaving, process.entering = [], []

    def _take_answers(self, queue: TrialQueue, recorder: Recorder) -> None:
        """Wait a moment for answers, and record them."""
        pending = {
            process.answer: process for process in self._processes if process.answer is not None
        }
        if not pending:
            time.sleep(_POLL_SECONDS)
            return
        ready, _ = ray.wait(list(pending), timeout=_POLL_SECONDS)
        for answer in ready:
            process = pending[answer]
            try:
                reply = ray.get(answer)
            except ray.exceptions.RayError as error:
                self._record_loss(process, error, queue, recorder)
                continue
            process.answer = None
            process.failed_starts = 0
            if isinstance(reply, Reply):
                self._record(process, reply, queue, recorder)
            else:
                process.is_ready = True

    def _record(
        self, process: _Process, reply: Reply, queue: TrialQueue, recorder: Recorder
    ) -> None:
        """Record the reports of a process."""
        for sentence in reply.warnings:
            self.warn(sentence)
        for trial_id, report in reply.reports:
            if not recorder.record(process.members[trial_id], report):
                process.leaving.append(trial_id)
                queue.complete(process.members.pop(trial_id))
        process.is_leaving = reply.is_leaving
        if process.members:
            return
        if process.is_leaving:
            self._replace(process)  # Ray starts no process on a machine that leaves
        else:
            # It may wait long for its next trial, and must not keep the last ones until then.
            process.answer = process.actor.leave.remote(process.leaving)
            process.leaving = []

    def _record_loss(
        self, process: _Process, error: Exception, queue: TrialQueue, recorder: Recorder
    ) -> None:
        """Record the end of a process, and start another one."""
        members, process.members = process.members, {}
        if not members:
            self._restart(process, error)
            return
        output = str(error)
        hang = classify_pack_hang(process.stacks)
        if len(members) == 1:  # a trial that is trained alone has stacks of its own
            hang = classify_hang(next(iter(members.values()))) or hang
        failure = classify_crash_output(output, hang)
        for trial in members.values():
            files.write_text(trial.path / "traceback.txt", output)
        if failure.failure_class == "worker_lost" and self._end_of_run.has_begun():
            for trial in members.values():
                trial.set_state(TrialState.PENDING, reason="interrupted")
        else:
            self._record_failure(list(members.values()), failure, recorder)
        for trial in members.values():
            queue.complete(trial)
        self._replace(process)

    def _record_failure(
        self, members: list[TrackedTrial], failure: FailureRecord, recorder: Recorder
    ) -> None:
        """Record what ended a process with its trials."""
        if failure.failure_class == "preempted":
            # Known to be nobody's fault, so each is continued as it was.
            for trial in members:
                recorder.record_crash(trial, failure)
        else:
            recorder.record_shared_crash(members, failure)

    def _start(self, number: int) -> _Process:
        """Start a process."""
        stacks = Path(self.work.run) / "logs" / f"pack-stacks-{number}.txt"
        actor = self._start_actor(stacks)
        process = _Process(number, stacks, actor, actor.is_ready.remote())
        self._processes.append(process)
        return process

    def _start_actor(self, stacks: Path) -> Any:
        actor = ray.remote(PackWorker).options(
            num_cpus=self.placement.cpus_per_worker,
            num_gpus=self.placement.gpus_per_worker,
            label_selector=self.placement.labels or None,
            # Memory was planned for one process on each machine.
            scheduling_strategy="DEFAULT" if self.placement.gpus_per_worker else "SPREAD",
        )
        return actor.remote(self.work, stacks)

    def _replace(self, process: _Process) -> None:
        """End a process, and start another one in its place."""
        ray.kill(process.actor)
        process.actor = self._start_actor(process.stacks)
        process.answer = process.actor.is_ready.remote()
        process.is_ready = process.is_leaving = False
        process.entering, process.leaving = [], []

    def _restart(self, process: _Process, error: Exception) -> None:
        """Start a process again that ended without a trial. After some times it is given up.

        Raises RunError if it was the last one.
        """
        process.failed_starts += 1
        if process.failed_starts < _MAX_FAILED_STARTS:
            self._replace(process)
            return
        ray.kill(process.actor)
        self._processes.remove(process)
        line = extract_error_line(error)
        if not self._processes:
            raise RunError(f"no process could be started to train the trials: {line}") from error
        left = format_count(len(self._processes), "process")
        self.warn(
            f"a process could not be started {_MAX_FAILED_STARTS} times ({line}); {left} trained on"
        )

    def close(self) -> None:
        """End all processes, for example before others need their GPUs."""
        for process in self._processes:
            ray.kill(process.actor)
        self._processes = []
