"""The distributed host: a Tune function around a Ray Train group, for trials of several processes."""

from __future__ import annotations

import functools
import os
import uuid
from pathlib import Path
from typing import Any

from jobs.errors import TrainingFailure, UserError
from jobs.placement import Placement
from jobs.support import CUT_WEIGHTS
from tuning.trial_run import TrialRun, Work, classify, keep_traceback, pack


def distributed_trainable(work: Work, placement: Placement) -> Any:
    """A Tune trainable whose trials are groups of processes. The function itself has one CPU beside them."""
    from ray import tune

    return tune.with_resources(functools.partial(_trial, work=work, placement=placement), {"cpu": 1})


def _trial(config: dict[str, Any], work: Work, placement: Placement) -> None:
    """Runs in a process of its own: starts the group and passes its reports on to Tune."""
    from ray.tune.integration.ray_train import TuneReportCallback

    from training.launch import run_group

    run_group(
        _worker,
        {"work": work, "trial": config},
        placement,
        Path(work.run) / "tune" / "train",
        f"{config['trial_id']}-{uuid.uuid4().hex[:8]}",
        [TuneReportCallback()],
    )


def _worker(config: dict[str, Any]) -> None:
    """One process of a trial. Every process reports as often as every other: `ray.train.report` is a barrier."""
    import torch
    from ray import train
    from ray.train.torch import get_device

    from training.data import open_tokens
    from training.model import load_base, resolve_device

    work: Work = config["work"]
    os.chdir(work.run)
    torch.set_num_threads(max(1, work.job.resources.cpus_per_worker))
    data = open_tokens(Path(work.tokens))
    device = resolve_device(work.gpus)
    if device.type == "cuda":
        # Ray Train lets every process of a node see all its GPUs, and says which is its own.
        device = get_device()
        torch.cuda.set_device(device)
    try:
        run = TrialRun(work, config["trial"], data)
        sharded = run.job.resources.strategy in CUT_WEIGHTS
        run.open(load_base(run.job, len(data.labels), device, sharded=sharded))
        while True:
            report = run.advance()
            train.report(pack(report))
            if report["done"] or run.stopping:
                return
    except (TrainingFailure, UserError) as error:
        # These happen to all processes in the same step, so all come here and the barrier holds. Anything else (out of
        # memory, on one of them) ends the process, and with it the group, which Ray Train starts again.
        keep_traceback(work, config["trial"]["trial_id"], error)
        train.report(pack({"failure": classify(error)}))
