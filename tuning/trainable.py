"""Run one trial after another in a warm actor, which loads the base only once.

A trial that cannot continue is reported as a result and not raised, so that the actor
lives on with its loaded base.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from lorafleet.evaluation.tokens import open_tokens
from lorafleet.jobs.errors import make_disk_full_error
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials import sampling as search
from lorafleet.training.meter import free_unused_memory, get_memory_in_use_gib
from lorafleet.training.model import Base, load_base, resolve_device
from lorafleet.tuning.failures import (
    WorkerUnusable,
    classify_exception,
    is_device_error,
    is_oom,
    save_traceback,
)
from lorafleet.tuning.trial_report import TrialReport, WorkerInfo
from lorafleet.tuning.trial_run import TrialRun, Work

_SLACK_GIB = 0.25
"""GiB that may still be in use after a trial ran out of memory, beyond the usage before it.

Allocators keep some memory.
"""


class WarmTrial(tune.Trainable):
    """Ray actor that is set up once and then runs trial after trial through `reset_config`.

    Tune calls `setup` once, `step` for each report, and `reset_config` for the next trial.
    A trial whose base cannot be reused (another model, or a `spent` one) loads another. If
    the process itself cannot be trusted any more, `step` raises WorkerUnusable and Tune
    replaces the actor.
    """

    def setup(self, config: dict[str, Any], work: Work) -> None:
        """Import the libraries and load the base."""
        started_at = time.monotonic()
        self.work = work
        os.chdir(work.run)
        torch.set_num_threads(max(1, work.job.resources.cpus_per_worker))
        self.base: Base | None = None
        self.base_loads = 0
        self.current: TrialRun | None = None
        # An error of loading in `setup`, which belongs to the first trial and not to the actor.
        self.unloaded: Exception | None = None
        # Memory in use with the base and without a trial.
        self.usual_gib = 0.0
        self.data = open_tokens(Path(work.tokens))
        self._set_trial(config)
        if not self.unbegun:
            try:
                self._get_base(search.build_trial_job(work.job, config["assignment"]))
            # Any error becomes the result of the trial that takes its first step here.
            except Exception as error:  # noqa: BLE001
                self.unloaded = error
        self.setup_seconds = time.monotonic() - started_at

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Switch to another trial and keep the base."""
        self._set_trial(new_config)
        return True

    def _set_trial(self, config: dict[str, Any]) -> None:
        """Set the next trial.

        Its folder is not touched before its first step: if a warm actor becomes free sooner,
        Tune moves a trial away from an actor that is still being set up, and then both would
        write to the folder.
        """
        self._close_trial()
        self.trial_config = config
        self.current_id = config["trial_id"]
        self.unloaded = None  # another trial may have another base
        self.unbegun = self.work.is_stop_requested()

    def _open_trial(self) -> TrialRun:
        """Build the trial's session. Raises the error of `setup`, if there was one."""
        error, self.unloaded = self.unloaded, None
        if error is not None:
            raise error
        self.current = TrialRun(self.work, self.trial_config, self.data)
        self.current.leaving_soon = _is_node_leaving
        self.current.open(self._get_base(self.current.job))
        return self.current

    def _get_base(self, job: JobSpec) -> Base:
        """Return a base for the job, loading one if the current base does not fit."""
        labels = len(self.data.labels)
        if self.base is None or not self.base.can_serve(job, labels):
            self.base = None  # two bases may not fit into memory at the same time
            self.base = load_base(job, labels, resolve_device(self.work.gpus))
            self.base_loads += 1
        self.usual_gib = get_memory_in_use_gib(self.base.device)
        return self.base

    def step(self) -> dict[str, Any]:
        """Return one report, packed for Tune (see `TrialReport.to_result`).

        Raises:
            WorkerUnusable: The process must not take another trial; the error carries the
                trial's failure.
        """
        report = self._run_step()  # the first step of a trial may load another base
        worker = WorkerInfo(
            name=f"{os.uname().nodename}:{os.getpid()}",
            base_loads=self.base_loads,
            seconds=getattr(self, "setup_seconds", 0.0),
        )
        return report.model_copy(update={"worker": worker}).to_result()

    def _run_step(self) -> TrialReport:
        """Train to the next report, and return it."""
        if self.unbegun:
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
        save_traceback(Path(self.work.run), self.current_id, error)
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
            self._close_trial()
        # Detaching a half-built adapter can raise anything: this process is not kept.
        except Exception:  # noqa: BLE001
            return False
        if not has_session:
            self.base = None  # a half-built adapter may still be attached to it
        if not is_oom(error):
            return True
        device = resolve_device(self.work.gpus)
        # Memory that something still holds would be missing to all later trials of this actor.
        free_unused_memory(device)
        return get_memory_in_use_gib(device) <= self.usual_gib + _SLACK_GIB

    def _close_trial(self) -> None:
        """Close the current trial, if there is one."""
        current, self.current = self.current, None
        if current is not None:
            current.close()

    def cleanup(self) -> None:
        """Close the current trial before the actor ends."""
        self._close_trial()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any] | None:
        """Do nothing: a trial's checkpoint is in its own folder, where the next actor finds it."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing: see `save_checkpoint`."""


def _is_node_leaving() -> bool:
    """Return whether Ray announced that this machine will be preempted.

    Ray Train checks it in the same way; Tune has no API for it.
    """
    node: str = ray.get_runtime_context().get_node_id()
    return node in (ray._private.state.state.get_draining_nodes() or {})
