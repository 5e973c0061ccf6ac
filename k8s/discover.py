"""A site file for a namespace of a Kubernetes cluster, from what its API server lets one see."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafleet.k8s.client import Tree

IMAGE = "registry.example.com/ml/lorafleet:{version}@sha256:" + "0" * 64
_GPU = re.compile(r"^[a-z0-9.-]+/(gpu|.*gpu)$")
_SHARE = 0.9
"""Of a node's room that one pod may have: the system's own pods want some."""


def ask_cluster(context: str | None) -> tuple[str, str]:
    """(name, text) of a site file for the kubeconfig's context. Raises ClusterError where no cluster answers."""
    from importlib.metadata import version

    from lorafleet.k8s.client import Client, current

    name, namespace = current(context)
    client = Client(namespace, context, tried=0)
    claims = client.all_of("PersistentVolumeClaim") or []
    text = draft(
        namespace=namespace,
        context=context,
        version=version("lorafleet"),
        claims=claims,
        nodes=client.all_of("Node"),
        queues=client.all_of("LocalQueue") or [],
        kuberay=client.serves("ray.io"),
    )
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "kubernetes", text


def draft(
    *,
    namespace: str,
    context: str | None,
    version: str,
    claims: list[Tree],
    nodes: list[Tree] | None,
    queues: list[Tree],
    kuberay: bool,
) -> str:
    """The text of a site file; `nodes` is None where they may not be seen. Pure."""
    lines = [f"# Namespace {namespace}, as its API server tells of it. Read it, and name your image."]
    if not kuberay:
        lines.append("# There is no RayJob on this cluster yet: an administrator installs KubeRay 1.7 or newer.")
    lines += ["kind: kubernetes", *([f"context: {context}"] if context else []), f"namespace: {namespace}"]
    lines += [f"image: {IMAGE.format(version=version)}   # yours, by digest: docs/kubernetes.md has a Dockerfile"]
    lines += [*_storage(claims), "nodes: 1", "max_nodes: 4", *_hardware(nodes), *_queue(queues)]
    lines.append("internet: false                # true where pods reach the hub and W&B")
    return "\n".join(lines) + "\n"


def _storage(claims: list[Tree]) -> list[str]:
    shared = [claim for claim in claims if "ReadWriteMany" in (claim.get("spec", {}).get("accessModes") or [])]
    chosen = (shared or claims)[:1]
    others = [claim["metadata"]["name"] for claim in claims if claim not in chosen]
    note = f"   # others here: {', '.join(others[:5])}" if others else ""
    if not chosen:
        return ["storage: {claim: lorafleet}    # there is none that you may see: a ReadWriteMany claim is needed"]
    name = chosen[0]["metadata"]["name"]
    if shared:
        return [f"storage: {{claim: {name}}}{note}"]
    return [
        f"storage: {{claim: {name}, read_write_many: false}}{note}",
        "# It is for one node at a time: one worker pod, beside the head. max_nodes must be 1 then.",
    ]


def _hardware(nodes: list[Tree] | None) -> list[str]:
    if not nodes:
        why = "may not be seen by you" if nodes is None else "are not there yet"
        guess = f"# The nodes {why}: what one worker pod gets is a guess."
        return [guess, "cpus_per_node: 8", "memory_gb_per_node: 32"]
    kinds = Counter(_kind(node) for node in nodes)
    kind, count = max(kinds.items(), key=lambda found: (found[0][3], found[1], found[0]))
    cpus, gigabytes, resource, gpus = kind
    lines = [f"# {count} of {len(nodes)} nodes have this much to give; a worker pod takes most of one."]
    lines += [f"cpus_per_node: {max(1, int(cpus * _SHARE))}", f"memory_gb_per_node: {max(1, int(gigabytes * _SHARE))}"]
    if gpus:
        lines += [f"gpus_per_node: {gpus}", "gpu_memory_gb: 0               # of one GPU: then plans say what fits"]
        lines += [f"gpu_resource: {resource}"] if resource != "nvidia.com/gpu" else []
    return lines


def _kind(node: Tree) -> tuple[int, int, str, int]:
    """(CPU cores, GB, GPU resource, GPUs) that pods may have of a node."""
    has: dict[str, Any] = node.get("status", {}).get("allocatable") or {}
    resource = next((name for name in sorted(has) if _GPU.match(name) and int(has[name])), "")
    return int(_quantity(has.get("cpu"))), int(_quantity(has.get("memory")) / 1e9), resource, int(has.get(resource, 0))


def _quantity(text: Any) -> float:
    from lorafleet.k8s.lint import quantity

    return quantity(text) or 0.0


def _queue(queues: list[Tree]) -> list[str]:
    if not queues:
        return []
    names = [queue["metadata"]["name"] for queue in queues]
    note = f"   # others here: {', '.join(names[1:6])}" if names[1:] else ""
    return [f"scheduler: {{kind: kueue, queue: {names[0]}}}{note}"]
