"""Detects a running Ray cluster's nodes, and selects its workers' environment variables."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lorafleet.jobs.errors import LorafleetError, PlacementRefused
from lorafleet.jobs.schema.environment import is_secret_name
from lorafleet.jobs.sites.base import Node, RaySite
from lorafleet.jobs.text import format_count

_PASSED_PREFIXES = (
    "NCCL_",
    "GLOO_",
    "TORCH_NCCL_",
    "UCX_",
    "FI_",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_HUB_CACHE",
    "LORAFLEET_",
    "TORCH_EXTENSIONS_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "RAY_TRAIN_",
)
"""Prefixes of the variables that mean the same on every machine: the network, the caches."""
_GPU_QUERY_TIMEOUT_SECONDS = 60.0


def build_worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of an environment that processes on other machines receive.

    Names that may hold a secret are never included: Ray writes a job's environment into its
    logs and shows it on its dashboard.
    """
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_PASSED_PREFIXES) and not is_secret_name(name)
    }


def parse_nodes(table: Iterable[Mapping[str, Any]]) -> tuple[Node, ...]:
    """Return the alive machines of `ray.nodes()`.

    Several may have the same host name, so their names include the address.
    """
    nodes = []
    for row in table:
        if row["Alive"]:
            resources = row["Resources"]
            nodes.append(
                Node(
                    name=format_node_name(row),
                    cpus=int(resources.get("CPU", 0)),
                    gpus=int(resources.get("GPU", 0)),
                    memory_gib=round(resources.get("memory", 0) / 2**30, 1),
                    labels=row.get("Labels") or {},
                )
            )
    return tuple(sorted(nodes, key=lambda node: node.name))


def parse_state_node(row: Any) -> Node:
    """Return a machine from a row of Ray's state API.

    The state API is asked over HTTP, without joining the cluster; `parse_nodes` reads what
    a connected process sees.
    """
    resources = row.resources_total or {}
    return Node(
        name=f"{row.node_name or row.node_ip} ({row.node_ip})",
        cpus=int(resources.get("CPU", 0)),
        gpus=int(resources.get("GPU", 0)),
        memory_gib=round(resources.get("memory", 0) / 2**30, 1),
        labels=row.labels or {},
    )


def format_node_name(row: Mapping[str, Any]) -> str:
    """Return `host (address:port)` of a row of `ray.nodes()`."""
    return f"{row['NodeManagerHostname']} ({row['NodeManagerAddress']}:{row['NodeManagerPort']})"


def detect_ray_site(address: str) -> RaySite:
    """Return the Ray cluster at an address as a site. Raises PlacementRefused if none answers.

    Connects and disconnects; a short task on each machine with GPUs reports their memory.
    """
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(
            address=address, log_to_driver=False, configure_logging=False, logging_level="ERROR"
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PlacementRefused(
            f"RAY_ADDRESS is {address}, but no Ray cluster can be reached there ({reason}). Check "
            f"it with `ray status --address {address}`, or unset RAY_ADDRESS to start Ray on this "
            "machine"
        ) from error
    try:
        table = ray.nodes()
        return RaySite(
            address=address, nodes=parse_nodes(table), gpu_memory_gib=_query_gpu_memory(table)
        )
    finally:
        ray.shutdown()


def run_on_each_node(
    table: Iterable[Mapping[str, Any]], function: Callable[..., Any], *arguments: Any
) -> list[Any]:
    """Call a function on every machine of these rows of `ray.nodes()`.

    Returns:
        Ray's references to the results.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Without a CPU of its own, the task also runs on a machine whose CPUs are all in use.
    remote_function = ray.remote(num_cpus=0, max_retries=0)(function)
    strategies = [NodeAffinitySchedulingStrategy(row["NodeID"], soft=False) for row in table]
    return [
        remote_function.options(scheduling_strategy=strategy).remote(*arguments)
        for strategy in strategies
    ]


def _query_gpu_memory(table: list[dict[str, Any]]) -> float:
    """Return the smallest GPU's memory in GiB, from the driver of each machine with GPUs.

    Returns 0 if a machine does not report it.
    """
    import ray

    from lorafleet.cluster.hardware import find_gpus

    references = run_on_each_node(
        [row for row in table if row["Alive"] and row["Resources"].get("GPU")], find_gpus
    )
    try:
        return min(
            (gpus.memory_gib for gpus in ray.get(references, timeout=_GPU_QUERY_TIMEOUT_SECONDS)),
            default=0.0,
        )
    except (
        ray.exceptions.RayError
    ):  # a machine without lorafleet, or too busy: the plan then says that the memory is unknown
        return 0.0


def wait_for_nodes(address: str, nodes: int, seconds: float) -> None:
    """Wait until `nodes` nodes of the Ray at an address are alive.

    Raises:
        LorafleetError: They are not alive after `seconds`.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while not _is_listening(host, int(port)):
        if time.monotonic() > deadline:
            raise LorafleetError(f"no Ray cluster answers at {address} after {seconds:.0f} s")
        time.sleep(0.3)
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import RaySystemError, RpcError

    last_answer = "no node"
    while time.monotonic() < deadline:
        try:
            table = GcsClient(address=address).get_all_node_info().values()
        except (RpcError, RaySystemError) as error:  # its server is starting
            last_answer = f"no answer ({type(error).__name__})"
        else:
            # 0 is ALIVE. Dead nodes stay in the table, so counting rows would be wrong.
            alive = [row for row in table if row.state == 0]
            if len(alive) >= nodes:
                return
            last_answer = format_count(len(alive), "node")
        time.sleep(0.5)
    raise LorafleetError(
        f"the Ray cluster at {address} has {last_answer} after {seconds:.0f} s, but needs {nodes}"
    )


def _is_listening(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False
