"""Discovers a Kubernetes namespace: writes a site file from what its API server shows."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafleet.k8s.client import Tree

# A placeholder that has the form of a digest, so that the new file loads before it is edited.
IMAGE = "registry.example.com/ml/lorafleet:{version}@sha256:" + "0" * 64
_GPU = re.compile(r"^[a-z0-9.-]+/(gpu|.*gpu)$")
_POD_SHARE = 0.9
"""Share of a node's allocatable resources that one pod may use: the system's own pods need some."""


def discover_cluster(context: str | None) -> tuple[str, str]:
    """Return (name, text) of a site file for the kubeconfig's context.

    Raises:
        ClusterError: No cluster answers.
    """
    from importlib.metadata import version

    from lorafleet.k8s.client import Client, get_context

    name, namespace = get_context(context)
    client = Client(namespace, context, max_retries=0)
    claims = client.list_objects("PersistentVolumeClaim") or []
    text = render_site_file(
        namespace=namespace,
        context=context,
        version=version("lorafleet"),
        claims=claims,
        nodes=client.list_objects("Node"),
        queues=client.list_objects("LocalQueue") or [],
        kuberay=client.has_api_group("ray.io"),
    )
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "kubernetes", text


def render_site_file(
    *,
    namespace: str,
    context: str | None,
    version: str,
    claims: list[Tree],
    nodes: list[Tree] | None,
    queues: list[Tree],
    kuberay: bool,
) -> str:
    """Return the text of a site file. Pure.

    Args:
        nodes: The cluster's nodes; None if the user may not list them.
        kuberay: Whether the cluster serves RayJob.
    """
    lines = [
        f"# Namespace {namespace}, as reported by its API server. Check the values, and set your "
        "image."
    ]
    if not kuberay:
        lines.append(
            "# This cluster has no RayJob yet: an administrator must install KubeRay 1.7 or newer."
        )
    lines += [
        "kind: kubernetes",
        *([f"context: {context}"] if context else []),
        f"namespace: {namespace}",
    ]
    lines += [
        f"image: {IMAGE.format(version=version)}   # set your image, by digest: docs/kubernetes.md "
        "has a Dockerfile"
    ]
    lines += [
        *_render_storage(claims),
        "nodes: 1",
        "max_nodes: 4",
        *_render_hardware(nodes),
        *_render_queue(queues),
    ]
    lines.append("internet: false                # true if pods can reach the hub and W&B")
    return "\n".join(lines) + "\n"


def _render_storage(claims: list[Tree]) -> list[str]:
    shared_claims = [
        claim
        for claim in claims
        if "ReadWriteMany" in (claim.get("spec", {}).get("accessModes") or [])
    ]
    chosen = (shared_claims or claims)[:1]
    others = [claim["metadata"]["name"] for claim in claims if claim not in chosen]
    comment = f"   # other claims: {', '.join(others[:5])}" if others else ""
    if not chosen:
        return [
            "storage: {claim: lorafleet}    # you can see no claim: create one with ReadWriteMany"
        ]
    name = chosen[0]["metadata"]["name"]
    if shared_claims:
        return [f"storage: {{claim: {name}}}{comment}"]
    return [
        f"storage: {{claim: {name}, read_write_many: false}}{comment}",
        "# One node at a time can mount this claim: one worker pod, beside the head, so set "
        "max_nodes to 1.",
    ]


def _render_hardware(nodes: list[Tree] | None) -> list[str]:
    if not nodes:
        reason = "are not visible to you" if nodes is None else "do not exist yet"
        comment = f"# The nodes {reason}: the sizes of a worker pod are guesses."
        return [comment, "cpus_per_node: 8", "memory_gb_per_node: 32"]
    kinds = Counter(_parse_node_kind(node) for node in nodes)
    # The kind with the most GPUs, and among equals the commonest.
    kind, count = max(kinds.items(), key=lambda item: (item[0][3], item[1], item[0]))
    cpus, gigabytes, resource, gpus = kind
    lines = [
        f"# {count} of {len(nodes)} nodes offer this much; a worker pod uses most of one node."
    ]
    lines += [
        f"cpus_per_node: {max(1, int(cpus * _POD_SHARE))}",
        f"memory_gb_per_node: {max(1, int(gigabytes * _POD_SHARE))}",
    ]
    if gpus:
        lines += [
            f"gpus_per_node: {gpus}",
            "gpu_memory_gb: 0               # memory of one GPU, so that plans can check what fits",
        ]
        lines += [f"gpu_resource: {resource}"] if resource != "nvidia.com/gpu" else []
    return lines


def _parse_node_kind(node: Tree) -> tuple[int, int, str, int]:
    """Return (CPU cores, GB, GPU resource, GPUs) that a node offers to pods."""
    allocatable: dict[str, Any] = node.get("status", {}).get("allocatable") or {}
    resource = next(
        (name for name in sorted(allocatable) if _GPU.match(name) and int(allocatable[name])), ""
    )
    return (
        int(_parse_quantity(allocatable.get("cpu"))),
        int(_parse_quantity(allocatable.get("memory")) / 1e9),
        resource,
        int(allocatable.get(resource, 0)),
    )


def _parse_quantity(text: Any) -> float:
    from lorafleet.k8s.lint import parse_quantity

    return parse_quantity(text) or 0.0


def _render_queue(queues: list[Tree]) -> list[str]:
    if not queues:
        return []
    names = [queue["metadata"]["name"] for queue in queues]
    comment = f"   # other queues: {', '.join(names[1:6])}" if names[1:] else ""
    return [f"scheduler: {{kind: kueue, queue: {names[0]}}}{comment}"]
