"""Checks that a namespace has what a job needs, through the API server and a test pod."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorafleet.cluster.doctor import Finding, check_storage, check_version
from lorafleet.cluster.remote.place import run_json_command
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.k8s import crd
from lorafleet.k8s import storage_pod as porter
from lorafleet.k8s.errors import ClusterError

if TYPE_CHECKING:
    from lorafleet.k8s.client import Client

# A test compares these rights with k8s/role.yaml.
RIGHTS = (
    (
        "rayjobs",
        "ray.io",
        "",
        ("create", "get", "list", "watch", "delete"),
        "submit, follow and stop a run",
    ),
    ("configmaps", "", "", ("create", "get", "patch", "delete"), "pass the job file to a run"),
    (
        "networkpolicies",
        "networking.k8s.io",
        "",
        ("create", "get", "patch", "delete"),
        "isolate a run's Ray cluster",
    ),
    ("pods", "", "", ("list",), "explain why a run is pending"),
    ("pods", "", "log", ("get",), "show the driver's output"),
    ("events", "", "", ("list",), "explain why a run is pending"),
    ("pods", "", "exec", ("create", "get"), "download results and upload data"),
    (
        "jobs",
        "batch",
        "",
        ("create", "delete"),
        "transfer data while no run is up",
    ),
)
"""(resource, group, subresource, verbs, purpose): every right that lorafleet needs in a
namespace, as in docs/kubernetes.md.
"""


def collect_findings(site: KubernetesSite, client: Client) -> list[Finding]:
    """Run all checks; a check that the user has no right to make gives a note.

    The last check starts a pod of the image and may take minutes, so it runs only if
    nothing is missing.

    Raises:
        ClusterError: The cluster does not answer.
    """
    results = [Finding("API server", "ok", f"{client.host}, namespace {client.namespace}")]
    for run_check in (_check_kuberay, _check_rights, _check_claim):
        results += run_check(site, client)
    if not any(finding.verdict == "missing" for finding in results):
        results += _check_pod(site, client)
    return results


def _check_kuberay(_site: KubernetesSite, client: Client) -> Iterator[Finding]:
    try:
        definition = client.get_definition()
        if definition is None:
            yield Finding(
                "KubeRay",
                "missing",
                "the cluster does not know RayJob",
                "an administrator must install KubeRay 1.7 or newer",
            )
            return
        crd.Schema.from_definition(definition)
        yield Finding("KubeRay", "ok", "serves RayJob of ray.io/v1")
    except ClusterError as error:
        if not error.is_forbidden:
            raise
        yield Finding(
            "KubeRay",
            "note",
            "you have no right to read the definition of RayJob",
            "jobs are checked with a dry run instead",
        )


def _check_rights(site: KubernetesSite, client: Client) -> Iterator[Finding]:
    for resource, group, subresource, verbs, purpose in RIGHTS:
        if resource == "networkpolicies" and not site.network_policy:
            continue
        missing_verbs = [
            verb for verb in verbs if not client.is_allowed(verb, resource, group, subresource)
        ]
        resource_path = f"{resource}/{subresource}" if subresource else resource
        if missing_verbs:
            is_optional = resource == "networkpolicies"
            advice = (
                "or do without it: set network_policy: false"
                if is_optional
                else "docs/kubernetes.md has a Role with these rights"
            )
            yield Finding(
                f"right to {resource_path}",
                "missing",
                f"you have no right to {', '.join(missing_verbs)} them, needed to {purpose}",
                advice,
            )
        else:
            yield Finding(f"right to {resource_path}", "ok", ", ".join(verbs))


def _check_claim(site: KubernetesSite, client: Client) -> Iterator[Finding]:
    name = site.storage.claim
    try:
        claim = client.get("PersistentVolumeClaim", name)
    except ClusterError as error:
        if not error.is_forbidden:
            raise
        yield Finding("storage", "note", f"you have no right to read claim {name}")
        return
    if claim is None:
        yield Finding(
            "storage",
            "missing",
            f"there is no claim {name}",
            "an administrator must create one with ReadWriteMany",
        )
        return
    modes = claim.get("spec", {}).get("accessModes") or []
    if site.storage.read_write_many and "ReadWriteMany" not in modes:
        advice = "set storage.read_write_many: false, and use one worker pod"
        yield Finding("storage", "missing", f"claim {name} is {', '.join(modes)}", advice)
        return
    yield Finding("storage", "ok", f"claim {name}, {', '.join(modes)}")


def _check_pod(site: KubernetesSite, client: Client) -> Iterator[Finding]:
    """Check that the image starts with the storage and holds the same version as this machine."""
    messages: list[str] = []
    try:
        with porter.open_storage_pod(site, client, messages.append) as runner:
            report = run_json_command(
                runner, ["lorafleet", "node", "greet"], {"mount": site.storage.mount_path}
            )
    except UserError as error:
        yield Finding("a pod of the image", "missing", str(error))
        return
    for name in ("lorafleet", "ray"):
        yield check_version(report, name, "in the image")
    yield check_storage(
        report,
        "in a pod",
        "the owner of the storage must be run_as_user or run_as_group",
    )
