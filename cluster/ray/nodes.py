"""A Ray that is up already, and what of this process's environment its workers get."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lorafleet.jobs.errors import LorafleetError, PlacementRefused
from lorafleet.jobs.schema.environment import may_be_secret
from lorafleet.jobs.sites.base import Node, RaySite
from lorafleet.jobs.text import counted

_PASSED = (
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
"""Beginnings of the names that mean the same on every machine: the network, the caches."""
_GPU_SECONDS = 60.0


def environment_for_workers(environment: Mapping[str, str]) -> dict[str, str]:
    """What the processes on other machines are given of an environment: never a name that may hold a secret.

    Ray writes a job's environment into its logs and shows it on its dashboard.
    """
    return {name: value for name, value in environment.items() if name.startswith(_PASSED) and not may_be_secret(name)}


def nodes_of(table: Iterable[Mapping[str, Any]]) -> tuple[Node, ...]:
    """The machines of `ray.nodes()` that answer. Several may have one host name, so the address is named too."""
    nodes = []
    for row in table:
        if row["Alive"]:
            has = row["Resources"]
            nodes.append(
                Node(
                    name=node_name(row),
                    cpus=int(has.get("CPU", 0)),
                    gpus=int(has.get("GPU", 0)),
                    memory_gib=round(has.get("memory", 0) / 2**30, 1),
                    labels=row.get("Labels") or {},
                )
            )
    return tuple(sorted(nodes, key=lambda node: node.name))


def node_of_state(row: Any) -> Node:
    """A machine as Ray's state API tells of it."""
    has = row.resources_total or {}
    return Node(
        name=f"{row.node_name or row.node_ip} ({row.node_ip})",
        cpus=int(has.get("CPU", 0)),
        gpus=int(has.get("GPU", 0)),
        memory_gib=round(has.get("memory", 0) / 2**30, 1),
        labels=row.labels or {},
    )


def node_name(row: Mapping[str, Any]) -> str:
    """`host (address:port)` of a row of `ray.nodes()`."""
    return f"{row['NodeManagerHostname']} ({row['NodeManagerAddress']}:{row['NodeManagerPort']})"


def ray_site(address: str) -> RaySite:
    """Ask the Ray at an address what it has. Raises PlacementRefused when none answers."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PlacementRefused(
            f"RAY_ADDRESS is {address}, but no Ray can be joined there ({reason}); `ray status --address {address}` "
            "shows whether one is up; without RAY_ADDRESS a Ray of its own is started on this machine"
        ) from error
    try:
        table = ray.nodes()
        return RaySite(address=address, nodes=nodes_of(table), gpu_memory_gib=_gpu_memory(table))
    finally:
        ray.shutdown()


def on_each(table: Iterable[Mapping[str, Any]], look: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function on every machine of these rows of `ray.nodes()`; returns Ray's references to the answers."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(look)
    places = [NodeAffinitySchedulingStrategy(row["NodeID"], soft=False) for row in table]
    return [ask.options(scheduling_strategy=place).remote(*arguments) for place in places]


def _gpu_memory(table: list[dict[str, Any]]) -> float:
    """The smallest GPU's memory in GiB, asked of the driver of each machine that has some; 0 where one does not say."""
    import ray
    from lorafleet.cluster.hardware import find_gpus

    asked = on_each([row for row in table if row["Alive"] and row["Resources"].get("GPU")], find_gpus)
    try:
        return min((found.memory_gib for found in ray.get(asked, timeout=_GPU_SECONDS)), default=0.0)
    except ray.exceptions.RayError:  # a machine without lorafleet, or too busy: the plan says that it is not known
        return 0.0


def wait_for_nodes(address: str, nodes: int, seconds: float) -> None:
    """Return when so many nodes of the Ray at an address live. Raises LorafleetError after `seconds`."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    while not _listens(host, int(port)):
        if time.monotonic() > until:
            raise LorafleetError(f"no Ray listens at {address} after {seconds:.0f} s")
        time.sleep(0.3)
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import RaySystemError, RpcError

    said = "no node"
    while time.monotonic() < until:
        try:
            table = GcsClient(address=address).get_all_node_info().values()
        except (RpcError, RaySystemError) as error:  # its server starts
            said = f"no answer ({type(error).__name__})"
        else:
            alive = [row for row in table if row.state == 0]
            if len(alive) >= nodes:
                return
            said = counted(len(alive), "node")
        time.sleep(0.5)
    raise LorafleetError(f"the Ray at {address} has {said}, and not {nodes}, after {seconds:.0f} s")


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False
