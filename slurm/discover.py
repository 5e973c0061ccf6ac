"""A site file for the cluster that this is a login node of, from what `scontrol` says of its partitions and nodes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from lorafleet.jobs.errors import UserError
from lorafleet.slurm import client

_LONGEST_MINUTES = 24 * 60


@dataclass(frozen=True)
class Hardware:
    """What nodes that are alike have."""

    cpus: int
    memory_mb: int
    gpus: int = 0
    gpu_type: str = ""


def ask_cluster(partition: str | None) -> tuple[str, str]:
    """(name, text) of a site file. Raises SlurmError off a cluster, and UserError for a partition that is not there."""
    partitions = _pairs(client.ask(["scontrol", "show", "partition", "-o"]).out, "PartitionName=")
    nodes = _pairs(client.ask(["scontrol", "show", "node", "-o"]).out, "NodeName=")
    config = client.ask(["scontrol", "show", "config"]).out
    found = re.search(r"^ClusterName\s*=\s*(\S+)", config, re.MULTILINE)
    return (found[1] if found else "slurm", draft(partitions, nodes, partition))


def _pairs(text: str, start: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith(start)]
    return [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines]


def draft(partitions: list[dict[str, str]], nodes: list[dict[str, str]], wanted: str | None) -> str:
    """The text of a site file for a partition, or for the default one. Pure."""
    names = [row["PartitionName"] for row in partitions]
    if wanted is not None and wanted not in names:
        raise UserError(f"there is no partition {wanted}; there are {', '.join(names) or 'none'}")
    default = next((row for row in partitions if row.get("Default") == "YES"), None)
    partition = next((row for row in partitions if row["PartitionName"] == wanted), default)
    if partition is None:
        raise UserError(
            f"the cluster has no default partition: name one with --partition ({', '.join(names) or 'none'})"
        )
    name = partition["PartitionName"]
    kinds = Counter(hardware(row) for row in nodes if name in row.get("Partitions", "").split(","))
    if not kinds:
        raise UserError(f"partition {name} has no nodes that scontrol shows")
    most, _ = kinds.most_common(1)[0]
    others = [kind for kind in kinds if kind != most]
    limit = partition.get("MaxTime", "UNLIMITED")
    return _text(name, [row for row in names if row != name], most, others, sum(kinds.values()), limit)


def hardware(node: dict[str, str]) -> Hardware:
    """What one node has, from its line of `scontrol show node -o`."""
    gpus, kind = 0, ""
    for found in re.finditer(r"gpu(?::([^:(),]+))?:(\d+)(?=[(,]|$)", node.get("Gres", "")):
        gpus, kind = gpus + int(found[2]), found[1] or kind
    return Hardware(int(node.get("CPUTot", 1)), int(node.get("RealMemory", 0)), gpus, kind)


def _text(name: str, others: list[str], most: Hardware, rest: list[Hardware], count: int, limit: str) -> str:
    gigabytes = max(1, int(most.memory_mb * 2**20 / 1e9 * 0.95))
    finite = limit not in ("UNLIMITED", "INFINITE", "NONE")
    lines = [
        "# Written by `lorafleet init --site slurm` from what scontrol says. Lines with `check` are guesses.",
        "kind: slurm",
        f"partition: {name}" + (f"          # others: {', '.join(others)}" if others else ""),
        f"cpus_per_node: {most.cpus}          # of {count} nodes, most are like this one",
        f"memory_gb_per_node: {gigabytes}",
        f"time_limit: {limit if finite and _minutes(limit) <= _LONGEST_MINUTES else '4:00:00'}"
        f"          # check: the partition allows {limit}",
    ]
    if most.gpus:
        lines += [
            f"gpus_per_node: {most.gpus}",
            *([f"gpu_type: {most.gpu_type}"] if most.gpu_type else []),
            "gpu_request: gpus-per-node          # check: some clusters want gres",
            "gpu_memory_gb: 0          # check: memory of one GPU, so that a plan can say what fits",
        ]
    if rest:
        lines.append("node_types:          # what fits is judged by the smallest")
        for number, kind in enumerate(rest, start=1):
            gpus = f", gpus_per_node: {kind.gpus}" if kind.gpus else ""
            memory = max(1, int(kind.memory_mb * 2**20 / 1e9 * 0.95))
            lines.append(f"  kind{number}: {{cpus_per_node: {kind.cpus}, memory_gb_per_node: {memory}{gpus}}}")
    return "\n".join(
        [
            *lines,
            "# account: proj1234          # what is charged, where the cluster wants it",
            "# setup:                     # lines of bash that make lorafleet's environment on a node; left out: the",
            "#   - module load cuda       # environment that submits",
            "# runs_dir: /shared/runs     # a folder that all nodes see; left out: what --runs says",
            "# scratch_dir: /local        # each node's own fast disk; left out: /tmp, and the model is not staged",
            "",
        ]
    )


def _minutes(limit: str) -> float:
    from lorafleet.jobs.sites.slurm import slurm_seconds

    return slurm_seconds(limit) / 60
