"""Ray Train (V2) around a training loop: processes with torch.distributed set up, gloo on CPU, NCCL on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafleet.jobs.sites.placement import Placement

_START_AGAIN = 3
"""How often setting up a group is tried again; Ray Train gives each a minute."""
_AFTER_HANG_SECONDS = 600
"""So much later than the watchdog, which writes down where every process stands, torch gives a collective up."""


def run_group(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    placement: Placement,
    storage: Path,
    name: str,
    callbacks: list[Any],
    *,
    hang_minutes: float = 30.0,
) -> None:
    """Run `loop(config)` on every process of a placement until all have returned.

    `name` must be new: Ray Train resumes a run of the same name and folder without a word. Raises Ray's
    TrainingFailedError when a process dies: whether the trial begins again is not decided here.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = placement.gpus_per_worker > 0
    TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=TorchConfig(
            backend="nccl" if on_gpu else "gloo", timeout_s=round(60 * (hang_minutes or 30)) + _AFTER_HANG_SECONDS
        ),
        scaling_config=ScalingConfig(
            num_workers=placement.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": placement.cpus_per_worker, "GPU": placement.gpus_per_worker},
            placement_strategy=placement.spread,
            label_selector=placement.labels or None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            callbacks=callbacks,
            # Ray's defaults try for ever: a set-up that cannot work would hang.
            failure_config=FailureConfig(
                max_failures=0, controller_failure_limit=_START_AGAIN, max_preemption_failures=0
            ),
        ),
    ).fit()
