"""Run trials of several processes: a Tune function around a Ray Train group.

Three processes take part: the Tune function in a process of its own, Ray Train's
controller, and the group's workers. `TrialRun` runs in each worker. All workers must
call `train.report` equally often.
"""

from __future__ import annotations

import functools
import os
import uuid
from pathlib import Path
from typing import Any

from lorafleet.jobs.errors import TrainingFailure, make_disk_full_error
from lorafleet.jobs.schema.compatibility import WEIGHT_SHARDING_STRATEGIES
from lorafleet.jobs.sites.placement import Placement
from lorafleet.tuning.failures import (
    WorkerUnusable,
    classify_exception,
    make_disk_full_failure,
    save_traceback,
)
from lorafleet.tuning.trial_report import TrialReport
from lorafleet.tuning.trial_run import TrialRun, Work


def build_distributed_trainable(work: Work, placement: Placement) -> Any:
    """Return a Tune trainable whose trials are groups of processes.

    The function itself takes no CPU that a group could need: it runs on the head node,
    which may have no CPU to give.

    Args:
        work: Sent to every worker.
        placement: Workers of one trial and their resources.
    """
    from ray import tune

    # Tune refuses an empty request, and the smallest request for a CPU would keep a worker from a
    # node whose CPUs are all needed.
    head_bundle = tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    return tune.with_resources(
        functools.partial(_run_trial, work=work, placement=placement), head_bundle
    )


def _run_trial(config: dict[str, Any], work: Work, placement: Placement) -> None:
    """Start the group of a trial and pass its reports to Tune.

    Runs in a process of its own.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    from lorafleet.training.launch import run_group

    run_group(
        _run_worker,
        {"work": work, "trial": config},
        placement,
        Path(work.run) / "tune" / "train",
        # Ray Train would silently resume a run of an earlier attempt with the same name.
        f"{config['trial_id']}-{uuid.uuid4().hex[:8]}",
        [TuneReportCallback()],
        hang_minutes=work.job.retries.hang_minutes,
    )


def _run_worker(config: dict[str, Any]) -> None:
    """Run one process of a trial.

    Every process reports equally often, because `ray.train.report` is a barrier.

    Raises:
        WorkerUnusable: The trial failed with an error that other processes may not have.
            The driver reads the failure from its text.
    """
    import torch
    from ray import train
    from ray.train.torch import get_device

    from lorafleet.evaluation.tokens import open_tokens
    from lorafleet.training.cpu import set_up_cpu
    from lorafleet.training.model import load_base, resolve_device

    work: Work = config["work"]
    # Threads of several processes on the same cores slow each other down many times.
    os.chdir(work.run)
    set_up_cpu(config["trial"]["threads"])
    data = open_tokens(Path(work.tokens))
    device = resolve_device(work.gpus)
    if device.type == "cuda":
        # Ray Train shows all GPUs of a node to each of its processes, and tells each which one to
        # use.
        device = get_device()
        torch.cuda.set_device(device)
    try:
        run = TrialRun(work, config["trial"], data)
        run.leaving_soon, run.nodes = _is_node_leaving, _count_nodes()
        run.warn_of_layout()
        sharded = run.job.resources.strategy in WEIGHT_SHARDING_STRATEGIES
        run.open(load_base(run.job, len(data.labels), device, sharded=sharded))
        while True:
            report = run.advance()
            train.report(report.to_result())
            # The group returns by itself: Ray frees its workers at once, but not always those of a
            # killed group.
            if report.ends_trial or run.stopping:
                return
    except TrainingFailure as error:
        # All processes raise this in the same step, so all reach this report and the barrier does
        # not hang.
        save_traceback(Path(work.run), config["trial"]["trial_id"], error)
        train.report(TrialReport(failure=classify_exception(error)).to_result())
    except Exception as error:
        # Any other error (such as a missing model) may affect this process alone, so the whole
        # group must end.
        raise _to_worker_unusable(error, work, config["trial"]["trial_id"]) from error


def _to_worker_unusable(error: Exception, work: Work, trial_id: str) -> Exception:
    """Return the error that tells the driver why the group ended."""
    full = make_disk_full_error(error, Path(work.run))
    if full:
        return WorkerUnusable(make_disk_full_failure(str(full)))
    save_traceback(Path(work.run), trial_id, error)
    return WorkerUnusable(classify_exception(error))


def _is_node_leaving() -> bool:
    """Return whether Ray announced that a node of this group will be preempted.

    The answer is the same on all processes.
    """
    from ray import train

    return train.get_preemption_info() is not None


def _count_nodes() -> int:
    """Return the number of machines of the group.

    Collective: every process of the group must call it.
    """
    import ray
    from torch import distributed

    node_ids: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(node_ids, ray.get_runtime_context().get_node_id())
    return len(set(node_ids))
