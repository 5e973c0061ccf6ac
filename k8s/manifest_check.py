"""Check a rendered RayJob: the operator's rules, the site, and the cluster's schema."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING

from lorafleet.jobs import files
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.k8s import crd
from lorafleet.k8s.errors import ClusterError, Conflict
from lorafleet.k8s.lint import lint, lint_site

if TYPE_CHECKING:
    from lorafleet.k8s.client import Client, Tree

_CRD_VARIABLE = "LORAFLEET_RAYJOB_CRD"
"""Environment variable that names a file with the CustomResourceDefinition of RayJob."""


def check_rules(site: KubernetesSite, nodes: int, job: Tree) -> list[str]:
    """Return the problems of a RayJob that can be found without contacting the cluster.

    Args:
        site: The site.
        nodes: Nodes of the job.
        job: The RayJob.
    """
    problems = lint_site(
        nodes=nodes,
        read_write_many=site.storage.read_write_many,
        image=site.image,
        version=version("lorafleet"),
    )
    try:
        problems += [
            f"{violation.path}: {violation.sentence}"
            + (
                f" (or name {violation.point} in `weaken` of the site file)"
                if violation.point
                else ""
            )
            for violation in lint(job)
            if violation.point is None or violation.point not in site.weaken
        ]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        # Rules index into the object without checking types. Only a patch can change its form.
        if not site.patch:
            raise
        reason = f"{type(error).__name__}: {error}"
        problems.append(
            f"patch of site {site.name} sets a field to a value of the wrong type ({reason})"
        )
    return problems


def check_schema(site: KubernetesSite, job: Tree) -> tuple[list[str], str]:
    """Check a RayJob against the cluster's schema, or else against the schema in a file.

    Returns:
        The schema errors, and a message if the cluster's own schema was not used.
    """
    from lorafleet.k8s.client import Client

    try:
        # A plan must not wait for minutes for a cluster that is down.
        single_try_client = Client(site.namespace, site.context, max_retries=0)
        definition = single_try_client.get_definition()
        if definition is None:
            return ["the cluster does not know RayJob: an administrator must install KubeRay"], ""
        return crd.Schema.from_definition(definition).list_errors(job), ""
    except ClusterError as error:
        if error.is_forbidden:
            return _check_with_dry_run(single_try_client, job)
        reason = str(error)
    schema_file = os.environ.get(_CRD_VARIABLE)
    if schema_file:
        return crd.Schema.read(files.expand_home(schema_file)).list_errors(job), ""
    return [], (
        "the job was checked against lorafleet's own models, but not against your cluster's "
        f"schema of RayJob ({reason}). To check it offline, set {_CRD_VARIABLE} to a file with "
        "the schema"
    )


def _check_with_dry_run(client: Client, job: Tree) -> tuple[list[str], str]:
    """Return the API server's own errors, for clusters whose schema the user may not read.

    Returns:
        The errors, and a message if the server did not check the job.
    """
    try:
        client.create(job, dry_run=True)
    # The server compares names last, so the object itself was accepted.
    except Conflict:
        return [], ""
    except ClusterError as error:
        if error.is_refused and not error.is_forbidden:
            return [str(error)], ""
        return [], f"the job was not checked against your cluster's schema of RayJob: {error}"
    return [], ""
