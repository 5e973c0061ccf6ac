"""The warm host: an actor that imports and loads the base once, and then takes one trial after another.

A trial that cannot go on is reported as a result and not raised: the actor, with its loaded base, lives on.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from ray import tune

from jobs.spec import JobSpec
from training.data import open_tokens
from training.model import Base, load_base, resolve_device
from tuning.trial_run import TrialRun, Work, classify, halved, keep_traceback, pack


class WarmTrial(tune.Trainable):
    """One actor: set up once, then a trial after another through `reset_config`."""

    def setup(self, config: dict[str, Any], work: Work) -> None:
        """Import, load the base, begin the first trial."""
        began = time.monotonic()
        self.work = work
        os.chdir(work.run)
        torch.set_num_threads(max(1, work.job.resources.cpus_per_worker))
        self.base: Base | None = None
        self.base_loads = 0
        self.current: TrialRun | None = None
        self.refused: dict[str, Any] | None = None
        self.data = open_tokens(Path(work.tokens))
        self._begin(config)
        self.setup_seconds = time.monotonic() - began

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Swap the trial; the base stays."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._end()
        self.current_id = config["trial_id"]
        self.refused = None
        self.unbegun = self.work.stop_requested()
        if self.unbegun:
            return
        try:
            self.current = TrialRun(self.work, config, self.data)
            self.current.open(self._base(self.current.job))
        except Exception as error:  # the edge of a trial: what goes wrong in it is its result, and the sweep goes on
            self.refused = self._failure(error)
            if self.current is None or self.current.session is None:
                self.base = None  # half an adapter may be in it
                self.current = None

    def _base(self, job: JobSpec) -> Base:
        labels = len(self.data.labels)
        if self.base is None or not self.base.serves(job, labels):
            self.base = None  # two bases would not fit where one does
            self.base = load_base(job, labels, resolve_device(self.work.gpus))
            self.base_loads += 1
        return self.base

    def step(self) -> dict[str, Any]:
        """One report, packed as Tune wants it (see `pack`)."""
        loads = {
            "name": f"{os.uname().nodename}:{os.getpid()}",
            "base_loads": self.base_loads,
            "seconds": getattr(self, "setup_seconds", 0.0),
        }
        return pack(self._step() | {"actor": loads})

    def _step(self) -> dict[str, Any]:
        """`row` for metrics.jsonl and whether the trial is `done`, or its `failure`."""
        if self.unbegun:
            return {"row": None, "done": False, "stopping": True}
        if self.refused is not None:
            return {"failure": self.refused}
        assert self.current is not None
        try:
            return self.current.advance()
        except torch.OutOfMemoryError as error:
            return self._with_half_the_batch(error)
        except Exception as error:  # see _begin
            return {"failure": self._failure(error)}

    def _with_half_the_batch(self, error: BaseException) -> dict[str, Any]:
        """Go on from the last checkpoint with half the rows a pass and twice the passes: the searched batch stays."""
        assert self.current is not None
        smaller = halved(self.current.job)
        if smaller is None:
            return {"failure": self._failure(error)}
        self.current.close()
        torch.cuda.empty_cache()
        self.current.job = smaller
        self.current.open(self._base(smaller))
        return {"row": None, "done": False}

    def _failure(self, error: BaseException) -> dict[str, Any]:
        keep_traceback(self.work, self.current_id, error)
        return classify(error)

    def _end(self) -> None:
        if self.current is not None:
            self.current.close()
            self.current = None

    def cleanup(self) -> None:
        """The actor goes."""
        self._end()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any] | None:
        """Nothing: a trial's checkpoint is in its own folder, and the next actor finds it there."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: see `save_checkpoint`."""
