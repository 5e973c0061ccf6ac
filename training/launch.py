"""Ray Train (V2) around a training loop: processes with torch.distributed set up, gloo on CPU, NCCL on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.placement import Placement

RESTARTS = 2
"""How often a group whose worker died is started again; its loop goes on from the trial's checkpoint."""


def run_group(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    placement: Placement,
    storage: Path,
    name: str,
    callbacks: list[Any],
) -> None:
    """Run `loop(config)` on every process of a placement until all have returned.

    `name` must be new: Ray Train resumes a run of the same name and folder without a word. Raises Ray's
    TrainingFailedError when a worker dies more often than RESTARTS.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = placement.gpus_per_worker > 0
    TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=placement.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": placement.cpus_per_worker, "GPU": placement.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            callbacks=callbacks,
            # The default of unlimited controller restarts turns a set-up that cannot work into a hang.
            failure_config=FailureConfig(max_failures=RESTARTS, controller_failure_limit=3),
        ),
    ).fit()
