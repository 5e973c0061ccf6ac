"""The distributed host: a Tune function around a Ray Train group, for trials of several processes."""

from __future__ import annotations

import functools
import os
import uuid
from pathlib import Path
from typing import Any

from lorafleet.jobs.errors import TrainingFailure, disk_full
from lorafleet.jobs.schema.compatibility import CUT_WEIGHTS
from lorafleet.jobs.sites.placement import Placement
from lorafleet.tuning.failures import SpoiledProcess, classify, keep_traceback
from lorafleet.tuning.trial_run import TrialRun, Work, pack


def distributed_trainable(work: Work, placement: Placement) -> Any:
    """A Tune trainable whose trials are groups of processes.

    The function itself takes no CPU that a group could need: it stands on the head, which may have none to give.
    """
    from ray import tune

    beside = tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    return tune.with_resources(functools.partial(_trial, work=work, placement=placement), beside)


def _trial(config: dict[str, Any], work: Work, placement: Placement) -> None:
    """Runs in a process of its own: starts the group and passes its reports on to Tune."""
    from lorafleet.training.launch import run_group
    from ray.tune.integration.ray_train import TuneReportCallback

    run_group(
        _worker,
        {"work": work, "trial": config},
        placement,
        Path(work.run) / "tune" / "train",
        f"{config['trial_id']}-{uuid.uuid4().hex[:8]}",
        [TuneReportCallback()],
        hang_minutes=work.job.retries.hang_minutes,
    )


def _worker(config: dict[str, Any]) -> None:
    """One process of a trial. Every process reports as often as every other: `ray.train.report` is a barrier."""
    import torch
    from lorafleet.evaluation.tokens import open_tokens
    from lorafleet.training.model import load_base, resolve_device
    from ray import train
    from ray.train.torch import get_device

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
        run.leaving_soon, run.nodes = _node_leaves, _nodes()
        run.warn_of_layout()
        sharded = run.job.resources.strategy in CUT_WEIGHTS
        run.open(load_base(run.job, len(data.labels), device, sharded=sharded))
        while True:
            report = run.advance()
            train.report(pack(report))
            if report["done"] or run.stopping or "failure" in report:
                return
    except TrainingFailure as error:
        # This happens to all processes in the same step, so all come here and the barrier holds.
        keep_traceback(Path(work.run), config["trial"]["trial_id"], error)
        train.report(pack({"failure": classify(error)}))
    except Exception as error:
        # Anything else (a model that this machine lacks) may have happened to this process alone: the group ends.
        raise _last_words(error, work, config["trial"]["trial_id"]) from error


def _last_words(error: Exception, work: Work, trial_id: str) -> Exception:
    """What the driver is to read out of a group's end."""
    full = disk_full(error, Path(work.run))
    if full:
        return SpoiledProcess({"full_disk": str(full)})
    keep_traceback(Path(work.run), trial_id, error)
    return SpoiledProcess(classify(error))


def _node_leaves() -> bool:
    """Whether Ray was told that a node of this group will be taken away; the same answer on all processes."""
    from ray import train

    return train.get_preemption_info() is not None


def _nodes() -> int:
    """Machines of the group."""
    import ray
    from torch import distributed

    found: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(found, ray.get_runtime_context().get_node_id())
    return len(set(found))
