"""Discovers a Slurm cluster: writes a site file from what `scontrol` reports.

It runs on a login node and reads the cluster's partitions and nodes.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from lorafleet.jobs.errors import UserError
from lorafleet.slurm import client

_MAX_TIME_LIMIT_MINUTES = 24 * 60


@dataclass(frozen=True)
class Hardware:
    """The hardware of a group of identical nodes."""

    cpus: int
    memory_mb: int
    gpus: int = 0
    gpu_type: str = ""


def discover_cluster(partition: str | None) -> tuple[str, str]:
    """Return (name, text) of a site file for this login node's cluster.

    Raises:
        SlurmError: This machine is not on a Slurm cluster.
        UserError: The partition does not exist.
    """
    partitions = _parse_records(
        client.run_command(["scontrol", "show", "partition", "-o"]).out, "PartitionName="
    )
    nodes = _parse_records(client.run_command(["scontrol", "show", "node", "-o"]).out, "NodeName=")
    config = client.run_command(["scontrol", "show", "config"]).out
    match = re.search(r"^ClusterName\s*=\s*(\S+)", config, re.MULTILINE)
    return (match[1] if match else "slurm", render_site_file(partitions, nodes, partition))


def _parse_records(text: str, prefix: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith(prefix)]
    return [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines]


def render_site_file(
    partitions: list[dict[str, str]], nodes: list[dict[str, str]], requested: str | None
) -> str:
    """Return the text of a site file for a partition, or for the default one. Pure.

    Raises:
        UserError: The partition does not exist or has no nodes, or there is no default
            partition.
    """
    names = [row["PartitionName"] for row in partitions]
    if requested is not None and requested not in names:
        raise UserError(
            f"there is no partition {requested}; the cluster has {', '.join(names) or 'none'}"
        )
    default = next((row for row in partitions if row.get("Default") == "YES"), None)
    partition = next((row for row in partitions if row["PartitionName"] == requested), default)
    if partition is None:
        raise UserError(
            "the cluster has no default partition: name one with --partition "
            f"({', '.join(names) or 'none'})"
        )
    name = partition["PartitionName"]
    kinds = Counter(
        parse_hardware(row) for row in nodes if name in row.get("Partitions", "").split(",")
    )
    if not kinds:
        raise UserError(
            f"scontrol shows no nodes in partition {name}: choose another one with --partition"
        )
    common_kind, _ = kinds.most_common(1)[0]
    other_kinds = [kind for kind in kinds if kind != common_kind]
    limit = partition.get("MaxTime", "UNLIMITED")
    return _format_site_file(
        name,
        [row for row in names if row != name],
        common_kind,
        other_kinds,
        sum(kinds.values()),
        limit,
    )


def parse_hardware(node: dict[str, str]) -> Hardware:
    """Return one node's hardware from its record in `scontrol show node -o`."""
    gpus, kind = 0, ""
    # Such as `gpu:a100:4(S:0-1)`: the type and the sockets are optional.
    for match in re.finditer(r"gpu(?::([^:(),]+))?:(\d+)(?=[(,]|$)", node.get("Gres", "")):
        gpus, kind = gpus + int(match[2]), match[1] or kind
    return Hardware(int(node.get("CPUTot", 1)), int(node.get("RealMemory", 0)), gpus, kind)


def _format_site_file(
    name: str,
    other_partitions: list[str],
    common_kind: Hardware,
    other_kinds: list[Hardware],
    node_count: int,
    time_limit: str,
) -> str:
    # Five per cent less than the node has: a cluster may reserve memory for the system, and a
    # request for all of it would not be met.
    gigabytes = max(1, int(common_kind.memory_mb * 2**20 / 1e9 * 0.95))
    is_finite = time_limit not in ("UNLIMITED", "INFINITE", "NONE")
    is_short = is_finite and _parse_minutes(time_limit) <= _MAX_TIME_LIMIT_MINUTES
    lines = [
        "# Written by `lorafleet init --site slurm` from the output of scontrol. Check the lines "
        "marked `check`.",
        "kind: slurm",
        f"partition: {name}"
        + (f"          # others: {', '.join(other_partitions)}" if other_partitions else ""),
        f"cpus_per_node: {common_kind.cpus}          # of {node_count} nodes, most have this many",
        f"memory_gb_per_node: {gigabytes}",
        f"time_limit: {time_limit if is_short else '4:00:00'}          # check: the partition "
        f"allows {time_limit}",
    ]
    if common_kind.gpus:
        lines += [
            f"gpus_per_node: {common_kind.gpus}",
            *([f"gpu_type: {common_kind.gpu_type}"] if common_kind.gpu_type else []),
            "gpu_request: gpus-per-node          # check: some clusters need gres",
            "gpu_memory_gb: 0          # check: memory of one GPU, so that plans can check what "
            "fits",
        ]
    if other_kinds:
        lines.append("node_types:          # plans check trials against the smallest type")
        for number, kind in enumerate(other_kinds, start=1):
            gpus = f", gpus_per_node: {kind.gpus}" if kind.gpus else ""
            memory = max(1, int(kind.memory_mb * 2**20 / 1e9 * 0.95))
            lines.append(
                f"  kind{number}: {{cpus_per_node: {kind.cpus}, memory_gb_per_node: "
                f"{memory}{gpus}}}"
            )
    return "\n".join(
        [
            *lines,
            "# account: proj1234          # account to charge, if the cluster requires one",
            "# setup:                     # bash lines that create lorafleet's environment on a "
            "node; default: the",
            "#   - module load cuda       # environment that submits the job",
            "# runs_dir: /shared/runs     # a folder that all nodes see; default: the folder of "
            "--runs",
            "# scratch_dir: /local        # fast local disk of each node; default: /tmp, and "
            "models are not copied",
            "",
        ]
    )


def _parse_minutes(limit: str) -> float:
    from lorafleet.jobs.sites.slurm import parse_slurm_time

    return parse_slurm_time(limit) / 60
