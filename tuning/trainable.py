"""The warm host: an actor that imports and loads the base once, and then takes one trial after another.

A trial that cannot go on is reported as a result and not raised: the actor, with its loaded base, lives on.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import ray
import torch
from lorafleet.evaluation.tokens import open_tokens
from lorafleet.jobs.errors import disk_full
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials import sampling as search
from lorafleet.training.meter import free_unused_memory, memory_in_use_gib
from lorafleet.training.model import Base, load_base, resolve_device
from lorafleet.tuning.failures import SpoiledProcess, classify, is_device_error, is_oom, keep_traceback
from lorafleet.tuning.trial_run import TrialRun, Work, pack
from ray import tune

_SLACK_GIB = 0.25
"""So much more than before the trial may still be in use after it ran out of memory: allocators keep some."""


class WarmTrial(tune.Trainable):
    """One actor: set up once, then one trial after another through `reset_config`."""

    def setup(self, config: dict[str, Any], work: Work) -> None:
        """Import, and load the base."""
        began = time.monotonic()
        self.work = work
        os.chdir(work.run)
        torch.set_num_threads(max(1, work.job.resources.cpus_per_worker))
        self.base: Base | None = None
        self.base_loads = 0
        self.current: TrialRun | None = None
        self.unloaded: Exception | None = None
        self.usual_gib = 0.0
        self.data = open_tokens(Path(work.tokens))
        self._take(config)
        if not self.unbegun:
            try:
                self._base(search.trial(work.job, config["assignment"]))
            except Exception as error:  # whatever it is, it is the result of the trial that takes its first step here
                self.unloaded = error
        self.setup_seconds = time.monotonic() - began

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Swap the trial; the base stays."""
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        """The next trial is this one. Its folder is not touched before its first step: Tune takes a trial from an
        actor that is still being set up when a warm one is free sooner, and then both would be in it."""
        self._end()
        self.trial_config = config
        self.current_id = config["trial_id"]
        self.unloaded = None  # another trial may have another base
        self.unbegun = self.work.stop_requested()

    def _open(self) -> TrialRun:
        error, self.unloaded = self.unloaded, None
        if error is not None:
            raise error
        self.current = TrialRun(self.work, self.trial_config, self.data)
        self.current.leaving_soon = _this_node_leaves
        self.current.open(self._base(self.current.job))
        return self.current

    def _base(self, job: JobSpec) -> Base:
        labels = len(self.data.labels)
        if self.base is None or not self.base.serves(job, labels):
            self.base = None  # two bases would not fit where one does
            self.base = load_base(job, labels, resolve_device(self.work.gpus))
            self.base_loads += 1
        self.usual_gib = memory_in_use_gib(self.base.device)
        return self.base

    def step(self) -> dict[str, Any]:
        """One report, packed as Tune wants it (see `pack`)."""
        report = self._step()  # the first one of a trial may load another base
        loads = {
            "name": f"{os.uname().nodename}:{os.getpid()}",
            "base_loads": self.base_loads,
            "seconds": getattr(self, "setup_seconds", 0.0),
        }
        return pack(report | {"actor": loads})

    def _step(self) -> dict[str, Any]:
        """`row` for metrics.jsonl and whether the trial is `done`, or its `failure`."""
        if self.unbegun:
            return {"row": None, "done": False, "stopping": True}
        try:
            current = self.current or self._open()
            report = current.advance()
        except Exception as error:  # the edge of a trial: what goes wrong in it is its result, and the sweep goes on
            return self._failed(error)
        if current.leaving:
            raise SpoiledProcess(report["failure"])  # the next trial must not begin here either
        return report

    def _failed(self, error: BaseException) -> dict[str, Any]:
        """What went wrong, as a result; raised instead where this process cannot be trusted with another trial."""
        full = disk_full(error, Path(self.work.run))
        if full:
            self._let_go(error)
            return {"full_disk": str(full)}
        keep_traceback(Path(self.work.run), self.current_id, error)
        failure = classify(error)
        error.__traceback__ = None  # its frames hold the tensors that did not fit
        if is_device_error(error) or not self._let_go(error):
            raise SpoiledProcess(failure) from error
        return {"failure": failure}

    def _let_go(self, error: BaseException) -> bool:
        """End the trial; whether the base is whole again and a failed trial's memory was given back."""
        begun = self.current is not None and self.current.session is not None
        try:
            self._end()
        except Exception:  # whatever a half-built adapter does when it is taken off: this process is not kept
            return False
        if not begun:
            self.base = None  # half an adapter may be in it
        if not is_oom(error):
            return True
        device = resolve_device(self.work.gpus)
        free_unused_memory(device)
        return memory_in_use_gib(device) <= self.usual_gib + _SLACK_GIB

    def _end(self) -> None:
        current, self.current = self.current, None
        if current is not None:
            current.close()

    def cleanup(self) -> None:
        """The actor goes."""
        self._end()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any] | None:
        """Nothing: a trial's checkpoint is in its own folder, and the next actor finds it there."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: see `save_checkpoint`."""


def _this_node_leaves() -> bool:
    """Whether Ray was told that this machine will be taken away. Ray Train asks so; Tune has no word for it."""
    node: str = ray.get_runtime_context().get_node_id()
    return node in (ray._private.state.state.get_draining_nodes() or {})
