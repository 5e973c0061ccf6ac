"""Drive a run that trains: without Ray, with a Ray of its own, or on an existing cluster."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from lorafleet.cluster.execution.allocation import make_attempt_record
from lorafleet.cluster.execution.driver import Driver, log
from lorafleet.cluster.execution.supervisor import Restart
from lorafleet.cluster.ray.nodes import build_worker_environment, parse_nodes
from lorafleet.jobs import files
from lorafleet.jobs.runs.events import PlacementEvent, RayEvent
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.sites.base import Node
from lorafleet.jobs.sites.placement import fit_placement
from lorafleet.tuning.array_tasks import merge_tasks
from lorafleet.tuning.local_ray import remove_aws_keys_from_tune, start_local_ray
from lorafleet.tuning.progress import StopFile


class TrainingDriver(Driver):
    """One attempt at a run whose trials are trained.

    Adds Ray to `Driver`. `Sweep` and `Comparison` derive from it.
    """

    def __init__(self, run: Run, restart: Restart | None = None) -> None:
        super().__init__(run, restart)
        self.stop_request = StopFile(self.stop_file)

    def _request_stop(self) -> None:
        self.stop_request.touch()

    @property
    def is_on_cluster(self) -> bool:
        """Return whether RAY_ADDRESS names a cluster that this driver joins."""
        return bool(os.environ.get("RAY_ADDRESS"))

    @property
    def trains_in_process(self) -> bool:
        """Return whether this process trains all trials itself, one after another.

        It does where nothing would run beside it: one process for a trial, and one trial at a
        time, on this machine.
        """
        return not self.is_on_cluster and self.placement.fits_one_process

    @property
    def evaluates_in_process(self) -> bool:
        """Return whether this process evaluates all models on held-out rows itself.

        On several GPUs, several models are evaluated at once.
        """
        uses_gpus = self.placement.gpus_per_worker > 0
        return not self.is_on_cluster and not (uses_gpus and self.placement.slots > 1)

    def _compute_cores(self) -> int:
        """Return the number of CPU cores that the trials of the run may use together."""
        placement = self.placement
        return placement.slots * placement.workers * placement.cpus_per_worker

    def _prepare_process(self) -> None:
        """Prepare this process for libraries that train. Changes it for good.

        Call it before torch and transformers are imported.
        """
        os.chdir(
            self.run.path
            # Ray puts the driver's folder first on every worker's path: the run folder contains no
            # packages.
        )
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)

    def _prepare_attempt(self) -> None:
        """Merge the trials of array tasks before anything is read from earlier attempts."""
        super()._prepare_attempt()
        merge_tasks(self.run, make_attempt_record(), log)

    @contextlib.contextmanager
    def _open_ray(self, attempt: int) -> Iterator[RayEvent]:
        """Yield a connection to Ray: a new local one, or the cluster that RAY_ADDRESS names.

        Changes the working directory and the environment of this process for good. On a
        cluster, the number of parallel trials is reduced to what its nodes hold.

        Returns:
            A context manager. The yielded event has Ray's session folder and whether this
            driver started Ray.

        Raises:
            RunError: Ray did not start on this machine.
            PlacementRefused: The cluster's nodes cannot hold a single trial.
        """
        self._prepare_process()
        for name, value in _RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Tune's default for a searcher is one waiting trial, with which freed actors are torn down.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(self.placement.slots)
        address = os.environ.get("RAY_ADDRESS")
        with self._join_ray(address) if address else self._start_local_ray(attempt) as context:
            import ray

            remove_aws_keys_from_tune()
            for name in ("ray.tune", "ray.train", "ray.air"):
                logging.getLogger(name).setLevel(
                    logging.ERROR
                )  # their warnings address authors of trainables
            self._install_signal_handlers()  # ray.init has replaced the SIGTERM handler
            session_dir = str(context.address_info.get("session_dir", ""))
            session = RayEvent(session_dir=session_dir, started_by_driver=not address)
            node = {"attempt": attempt, "node_id": ray.get_runtime_context().get_node_id()}
            files.write_json(self.run.path / "logs" / "ray.json", session.to_dict() | node)
            # An autoscaler adds machines when trials wait for them, so the machines of this moment
            # are no limit.
            self._fit_to_cluster()
            yield session

    @contextlib.contextmanager
    def _join_ray(self, address: str) -> Iterator[Any]:
        """Connect to the Ray cluster at `address`, and disconnect on exit."""
        import ray

        environment = {"env_vars": self._build_worker_environment()}
        try:
            yield ray.init(
                address=address,
                log_to_driver=False,
                configure_logging=False,
                runtime_env=environment,
            )
        finally:
            ray.shutdown()

    def _start_local_ray(self, attempt: int) -> contextlib.AbstractContextManager[Any]:
        """Return a context that starts and stops a local Ray with the resources of the
        placement.
        """
        placement = self.placement
        options = {
            "num_cpus": self._compute_cores(),
            "num_gpus": placement.used_gpus,
            # Ray Train frees a stopped trial's workers only when the dashboard's state API is up.
            "include_dashboard": placement.is_distributed,
            # Ray would reserve a share of the memory, and nearly nothing goes through its object
            # store: weights and tokens are read from disk.
            "object_store_memory": 200 * 2**20,
        }
        return start_local_ray(options, self.run.path / "logs" / f"ray-{attempt}", log)

    def _build_worker_environment(self) -> dict[str, str]:
        """Return the environment variables of Ray's worker processes."""
        environment = _ENVIRONMENT | _RAY_ENVIRONMENT | build_worker_environment(os.environ)
        return environment | self.job.environment

    def _fit_to_cluster(self) -> None:
        """Fit the placement to the nodes that are up.

        A Ray of this driver has what was asked for, and an autoscaler adds what is missing.
        """
        import ray

        if os.environ.get("RAY_ADDRESS") and not os.environ.get("LF_AUTOSCALES"):
            self._fit_placement(parse_nodes(ray.nodes()))

    def _fit_placement(self, nodes: tuple[Node, ...]) -> None:
        """Reduce the number of parallel trials to what the cluster's nodes hold.

        Raises PlacementRefused if they cannot hold a single trial.
        """
        self.placement, notice = fit_placement(self.placement, nodes)
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(self.placement.slots)
        if notice:
            self.run.add_event(PlacementEvent(slots=self.placement.slots, sentence=notice))


_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Environment variables of every process that trains."""
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # otherwise `verbose=0` still draws a box
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A replacement for a lost machine takes minutes to start.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    # The driver handles SIGINT itself: it asks the trials to save first.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Nothing reads Tune's snapshots: the ledger is the record, and a resume starts a new Tuner.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
"""Environment variables that configure Ray."""
