"""Run a training loop in a Ray Train (V2) worker group with torch.distributed set up.

The backend is gloo on CPU and NCCL on CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafleet.jobs.sites.placement import Placement
from lorafleet.training.node_bundles import choose_machines

_MAX_START_RETRIES = 3
"""Maximum number of retries of starting a worker group. Ray Train allows each one a minute."""
_AFTER_HANG_SECONDS = 600
"""Seconds that torch's collective timeout exceeds the watchdog's.

The watchdog fires first and writes the stacks of every process.
"""


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

    Does not restart the trial after a failure: the ledger decides that. Blocks; call it in
    the process of the Tune trial.

    Args:
        loop: The function of each process. Ray pickles it.
        storage: Folder for Ray Train's own files.
        name: Must be new. Ray Train silently resumes a run of the same name and folder.
        callbacks: Ray Train user callbacks, which run in its controller.
        hang_minutes: The watchdog's timeout, which torch's collective timeout is derived
            from. 0: the watchdog is off, and 30 minutes are used.

    Raises:
        ray.train.TrainingFailedError: A process died.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = placement.gpus_per_worker > 0
    with contextlib.ExitStack() as stack:
        labels: Any = placement.labels or None
        if placement.needs_node_bundles:
            labels = stack.enter_context(choose_machines(placement, storage))
        TorchTrainer(
            loop,
            train_loop_config=config,
            torch_config=TorchConfig(
                backend="nccl" if on_gpu else "gloo",
                timeout_s=round(60 * (hang_minutes or 30)) + _AFTER_HANG_SECONDS,
            ),
            scaling_config=ScalingConfig(
                num_workers=placement.workers,
                use_gpu=on_gpu,
                resources_per_worker={
                    "CPU": placement.cpus_per_worker,
                    "GPU": placement.gpus_per_worker,
                },
                placement_strategy=placement.spread,
                label_selector=labels,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(storage),
                callbacks=callbacks,
                # Ray's defaults retry forever: a set-up that cannot work would hang.
                failure_config=FailureConfig(
                    max_failures=0,
                    controller_failure_limit=_MAX_START_RETRIES,
                    max_preemption_failures=0,
                ),
            ),
        ).fit()
