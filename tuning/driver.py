"""A driver that trains: what every driver has, and a Ray of its own or the one that it was given."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from lorafleet.cluster.execution.allocation import allocation_here
from lorafleet.cluster.execution.driver import Driver, log
from lorafleet.cluster.ray.nodes import environment_for_workers, nodes_of
from lorafleet.jobs import files
from lorafleet.jobs.sites.base import Node
from lorafleet.jobs.sites.placement import fitted
from lorafleet.tuning.array_tasks import gather
from lorafleet.tuning.local_ray import keep_secrets_out_of_tune, local_ray


class TrainingDriver(Driver):
    """One attempt at a run whose trials are trained."""

    def _begin(self) -> None:
        super()._begin()
        gather(self.run, allocation_here(), log)

    @contextlib.contextmanager
    def _ray(self, attempt: int) -> Iterator[dict[str, Any]]:
        """A Ray of our own on this machine, or the one that RAY_ADDRESS names."""
        os.chdir(self.run.path)  # Ray puts the driver's folder first on every worker's path: ours holds no packages
        for name, value in _RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(self.placement.slots)
        address = os.environ.get("RAY_ADDRESS")
        with self._joined(address) if address else self._own_ray(attempt) as context:
            import ray

            keep_secrets_out_of_tune()
            for name in ("ray.tune", "ray.train", "ray.air"):
                logging.getLogger(name).setLevel(logging.ERROR)  # their warnings are for those who write trainables
            self._hear_signals()  # ray.init has taken SIGTERM for itself
            facts = {"session_dir": str(context.address_info.get("session_dir", "")), "own": not address}
            node = {"attempt": attempt, "node_id": ray.get_runtime_context().get_node_id()}
            files.write_json(self.run.path / "logs" / "ray.json", facts | node)
            if address and not os.environ.get("LF_AUTOSCALES"):  # there, machines come when trials wait for them
                self._fit_into(nodes_of(ray.nodes()))
            yield facts

    @contextlib.contextmanager
    def _joined(self, address: str) -> Iterator[Any]:
        import ray

        environment = {"env_vars": self._environment_for_workers()}
        try:
            yield ray.init(address=address, log_to_driver=False, configure_logging=False, runtime_env=environment)
        finally:
            ray.shutdown()

    def _own_ray(self, attempt: int) -> contextlib.AbstractContextManager[Any]:
        placement = self.placement
        options = {
            "num_cpus": placement.slots * placement.workers * placement.cpus_per_worker,
            "num_gpus": placement.slots * placement.workers * placement.gpus_per_worker,
            # Ray Train frees a stopped trial's workers only when the dashboard's state API is up.
            "include_dashboard": placement.distributed,
            "object_store_memory": 200 * 2**20,
        }
        return local_ray(options, self.run.path / "logs" / f"ray-{attempt}", log)

    def _environment_for_workers(self) -> dict[str, str]:
        return _RAY_ENVIRONMENT | environment_for_workers(os.environ) | self.job.environment

    def _fit_into(self, nodes: tuple[Node, ...]) -> None:
        """As many trials at once as the cluster really holds. Raises PlacementRefused when it is not one."""
        self.placement, fewer = fitted(self.placement, nodes)
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(self.placement.slots)
        if fewer:
            self.run.event("placement", slots=self.placement.slots, sentence=fewer)


_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # with which `verbose=0` still draws a box
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # a lost machine's successor takes minutes to come
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
