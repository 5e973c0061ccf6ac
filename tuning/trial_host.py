"""Train one trial after another in this process, on a base that is loaded only once.

The driver uses it directly, and `WarmTrial` in a Ray actor. A trial that cannot continue
is reported as a result and not raised, so that the process lives on with its loaded base.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafleet.cluster.planning.memory import RUNTIME_CUDA_GIB
from lorafleet.evaluation.tokens import open_tokens
from lorafleet.jobs.errors import make_disk_full_error
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials import sampling as search
from lorafleet.training.cpu import set_up_cpu
from lorafleet.training.meter import (
    free_unused_memory,
    get_memory_in_use_gib,
    is_out_of_memory,
    limit_gpu_memory,
)
from lorafleet.training.model import Base, resolve_device
from lorafleet.tuning.base_cache import BaseCache
from lorafleet.tuning.failures import (
    WorkerUnusable,
    classify_exception,
    is_device_error,
    save_traceback,
)
from lorafleet.tuning.trial_report import TrialReport, WorkerInfo
from lorafleet.tuning.trial_run import TrialRun, Work

_SLACK_GIB = 0.25
"""GiB that may still be in use after a trial ran out of memory, beyond the usage before it.

Allocators keep some memory.
"""


class TrialHost:
    """Process that trains trials of one process each, one after another.

    Call `set_up` once, with the first trial; then `step` until its report ends the trial;
    then `set_trial` for the next one. A trial whose base cannot be reused (another model, or
    a `spent` one) loads another.

    Changes the working directory and the number of threads of this process for good.

    Args:
        is_node_leaving: Returns whether this machine will be preempted soon.
    """

    def __init__(self, work: Work, is_node_leaving: Callable[[], bool] = lambda: False) -> None:
        self.started_at = time.monotonic()
        self.work = work
        self.is_node_leaving = is_node_leaving
        os.chdir(work.run)
        set_up_cpu(work.threads)
        if work.gpus:
            limit_gpu_memory(work.job.resources.trials_per_gpu, RUNTIME_CUDA_GIB)
        self.bases = BaseCache(work.gpus)
        self.data = open_tokens(Path(work.tokens))
        self.setup_seconds = 0.0
        self.current: TrialRun | None = None
        # An error of loading in `set_up`, which belongs to the first trial and not to the process.
        self.unloaded: Exception | None = None
        # Memory in use with the base and without a trial.
        self.usual_gib = 0.0

    def set_up(self, config: dict[str, Any]) -> None:
        """Load the base of the first trial, without touching the trial's folder.

        Args:
            config: `trial_id`, `assignment` and `threads` of the trial.
        """
        self.set_trial(config)
        if not self.is_stopped:
            try:
                self._get_base(search.build_trial_job(self.work.job, config["assignment"]))
            # Any error becomes the result of the trial that takes its first step here.
            except Exception as error:  # noqa: BLE001
                self.unloaded = error
        self.setup_seconds = time.monotonic() - self.started_at

    def set_trial(self, config: dict[str, Any]) -> None:
        """Set the next trial.

        Its folder is not touched before its first step: if a warm actor becomes free sooner,
        Tune moves a trial away from an actor that is still being set up, and then both would
        write to the folder.
        """
        self.close()
        self.trial_config = config
        set_up_cpu(config["threads"])
        self.unloaded = None  # another trial may have another base
        self.is_stopped = self.work.is_stop_requested()

    def _open_trial(self) -> TrialRun:
        """Build the trial's session. Raises the error of `set_up`, if there was one."""
        error, self.unloaded = self.unloaded, None
        if error is not None:
            raise error
        self.current = TrialRun(self.work, self.trial_config, self.data)
        self.current.leaving_soon = self.is_node_leaving
        self.current.open(self._get_base(self.current.job))
        return self.current

    def _get_base(self, job: JobSpec) -> Base:
        """Return a base for the job, loading one if the current base does not fit."""
        base = self.bases.get(job, len(self.data.labels))
        self.usual_gib = get_memory_in_use_gib(base.device)
        return base

    def step(self) -> TrialReport:
        """Train to the next report, and return it.

        Raises:
            WorkerUnusable: The process must not take another trial; the error carries the
                trial's failure.
        """
        report = self._run_step()  # the first step of a trial may load another base
        worker = WorkerInfo(
            name=f"{os.uname().nodename}:{os.getpid()}",
            base_loads=self.bases.loads,
            seconds=self.setup_seconds,
        )
        return report.model_copy(update={"worker": worker})

    def _run_step(self) -> TrialReport:
        if self.is_stopped:
            return TrialReport(stopping=True)
        try:
            current = self.current or self._open_trial()
            report = current.advance()
        # The boundary of a trial: any error becomes its result, and the sweep continues.
        except Exception as error:  # noqa: BLE001
            return self._report_failure(error)
        if current.leaving and report.failure is not None:
            # The next trial must not start on this node either.
            raise WorkerUnusable(report.failure)
        return report

    def _report_failure(self, error: BaseException) -> TrialReport:
        """Return an error as a report.

        Raises WorkerUnusable if this process must not take another trial.
        """
        disk_full_error = make_disk_full_error(error, Path(self.work.run))
        if disk_full_error:
            self._release_trial(error)
            return TrialReport(disk_full=str(disk_full_error))
        save_traceback(Path(self.work.run), self.trial_config["trial_id"], error)
        failure = classify_exception(error)
        error.__traceback__ = None  # its frames hold the tensors that did not fit
        if is_device_error(error) or not self._release_trial(error):
            raise WorkerUnusable(failure) from error
        return TrialReport(failure=failure)

    def _release_trial(self, error: BaseException) -> bool:
        """End the trial, and return whether the process can take another one.

        It cannot if the adapter could not be detached or the memory of a failed trial was not
        released.
        """
        has_session = self.current is not None and self.current.session is not None
        try:
            self.close()
        # Detaching a half-built adapter can raise anything: this process is not kept.
        except Exception:  # noqa: BLE001
            return False
        if not has_session:
            self.bases.drop()  # a half-built adapter may still be attached to the base
        if not is_out_of_memory(error):
            return True
        device = resolve_device(self.work.gpus)
        # Memory that something still holds would be missing to all later trials of this process.
        free_unused_memory(device)
        return get_memory_in_use_gib(device) <= self.usual_gib + _SLACK_GIB

    def close(self) -> None:
        """Close the current trial, if there is one."""
        current, self.current = self.current, None
        if current is not None:
            current.close()
