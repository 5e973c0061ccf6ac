"""What a namespace has of all that a job on it needs: asked of the API server, and of a pod of the image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorafleet.cluster.doctor import Finding, same_version, storage
from lorafleet.cluster.remote.backend import ask
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.k8s import crd
from lorafleet.k8s import storage_pod as porter
from lorafleet.k8s.errors import ClusterError

if TYPE_CHECKING:
    from lorafleet.k8s.client import Client

RIGHTS = (
    ("rayjobs", "ray.io", "", ("create", "get", "list", "watch", "delete"), "submit, follow and end a run"),
    ("configmaps", "", "", ("create", "get", "patch", "delete"), "hand a run its job file"),
    ("networkpolicies", "networking.k8s.io", "", ("create", "get", "patch", "delete"), "keep others from a run's Ray"),
    ("pods", "", "", ("list",), "say why a run waits"),
    ("pods", "", "log", ("get",), "show what a driver says"),
    ("events", "", "", ("list",), "say why a run waits"),
    ("pods", "", "exec", ("create", "get"), "bring results here and data there"),
    ("jobs", "batch", "", ("create", "delete"), "bring results here and data there when no run is up"),
)
"""(resource, group, subresource, verbs, what for): all that lorafleet asks of a namespace, as in docs/kubernetes.md."""


def findings(site: KubernetesSite, client: Client) -> list[Finding]:
    """Look at everything; what cannot be asked is a note."""
    found = [Finding("API server", "ok", f"{client.host}, namespace {client.namespace}")]
    for look in (_kuberay, _rights, _claim):
        found += look(site, client)
    if not any(finding.verdict == "missing" for finding in found):
        found += _a_pod(site, client)
    return found


def _kuberay(_site: KubernetesSite, client: Client) -> Iterator[Finding]:
    try:
        definition = client.definition()
        if definition is None:
            yield Finding("KubeRay", "missing", "the cluster has no RayJob", "an administrator installs KubeRay 1.7+")
            return
        crd.Schema.of(definition)
        yield Finding("KubeRay", "ok", "serves RayJob of ray.io/v1")
    except ClusterError as error:
        if not error.forbidden:
            raise
        yield Finding("KubeRay", "note", "you may not read its definition of RayJob", "jobs are tried with a dry run")


def _rights(site: KubernetesSite, client: Client) -> Iterator[Finding]:
    for resource, group, subresource, verbs, purpose in RIGHTS:
        if resource == "networkpolicies" and not site.network_policy:
            continue
        lacking = [verb for verb in verbs if not client.may(verb, resource, group, subresource)]
        what = f"{resource}/{subresource}" if subresource else resource
        if lacking:
            without = resource == "networkpolicies"
            advice = "network_policy: false does without" if without else "docs/kubernetes.md has a Role"
            yield Finding(f"right to {what}", "missing", f"you may not {', '.join(lacking)} them: to {purpose}", advice)
        else:
            yield Finding(f"right to {what}", "ok", ", ".join(verbs))


def _claim(site: KubernetesSite, client: Client) -> Iterator[Finding]:
    name = site.storage.claim
    try:
        claim = client.get("PersistentVolumeClaim", name)
    except ClusterError as error:
        if not error.forbidden:
            raise
        yield Finding("storage", "note", f"claim {name} may not be read by you")
        return
    if claim is None:
        yield Finding("storage", "missing", f"there is no claim {name}", "an administrator makes a ReadWriteMany one")
        return
    modes = claim.get("spec", {}).get("accessModes") or []
    if site.storage.read_write_many and "ReadWriteMany" not in modes:
        advice = "storage.read_write_many: false, and one worker pod"
        yield Finding("storage", "missing", f"claim {name} is {', '.join(modes)}", advice)
        return
    yield Finding("storage", "ok", f"claim {name}, {', '.join(modes)}")


def _a_pod(site: KubernetesSite, client: Client) -> Iterator[Finding]:
    """The image starts, with the storage, and holds the version that is here."""
    said: list[str] = []
    try:
        with porter.pod_for(site, client, said.append) as place:
            told = ask(place, ["lorafleet", "node", "greet"], {"mount": site.storage.mount_path})
    except UserError as error:
        yield Finding("a pod of the image", "missing", str(error))
        return
    for name in ("lorafleet", "ray"):
        yield same_version(told, name, "in the image")
    yield storage(told, "in a pod", "its owner must be run_as_user or run_as_group")
