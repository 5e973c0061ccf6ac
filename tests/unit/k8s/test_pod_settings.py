"""Pod settings and patches of a Kubernetes site."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lorafleet.jobs.errors import PlacementRefused, SpecProblems
from lorafleet.k8s.lint import get, list_groups
from tests.unit.k8s.test_render import EXTENDED, ORDER, bare, rayjob


def worker(site: Any) -> dict[str, Any]:
    """The pod template of the workers."""
    template: dict[str, Any] = list_groups(rayjob(site))[1][1]["template"]
    return template


def test_settings_reach_the_pods_that_they_are_for() -> None:
    job = rayjob(bare(**EXTENDED))
    (_, head), (_, workers) = list_groups(job)
    pod = workers["template"]["spec"]
    ray, agent = pod["containers"]
    assert ray["name"] == "ray-worker"
    assert agent["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"name": "data", "mountPath": "/data", "subPath": "texts", "readOnly": True} in ray[
        "volumeMounts"
    ]
    assert ray["resources"]["limits"]["hugepages-2Mi"] == "1Gi"
    assert ray["resources"]["requests"]["hugepages-2Mi"] == "1Gi"
    assert ray["resources"]["claims"] == [{"name": "gpus"}, {"name": "nic"}]
    assert pod["resourceClaims"] == [
        {"name": "gpus", "resourceClaimTemplateName": "one-gpu"},
        {"name": "nic", "resourceClaimName": "shared-nic"},
    ]
    # The volume can only be mounted on one node: the site's affinity does not replace that rule.
    assert set(pod["affinity"]) == {"nodeAffinity", "podAffinity"}
    assert pod["runtimeClassName"] == "nvidia"
    assert head["template"]["spec"]["runtimeClassName"] == "gvisor"
    assert "resourceClaims" not in head["template"]["spec"]
    assert head["template"]["metadata"]["labels"]["cost-centre"] == "4711"
    assert workers["template"]["metadata"]["annotations"]["sidecar.istio.io/inject"] == "false"
    assert "sidecar.istio.io/inject" not in head["template"]["metadata"]["annotations"]


def test_no_node_is_emptied_under_a_job() -> None:
    """The head, the workers and the submitter have the annotations; a site can change them."""
    job = rayjob(bare())
    templates = [group["template"] for _, group in list_groups(job)]
    for template in [*templates, job["spec"]["submitterPodTemplate"]]:
        assert template["metadata"]["annotations"] == {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }
    changed = worker(bare(annotations={"karpenter.sh/do-not-disrupt": "false"}))
    assert changed["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "false"


def test_labels_of_a_site_do_not_replace_those_by_which_runs_are_found() -> None:
    labels = worker(bare(pod={"labels": {"lorafleet.dev/run": "x", "team": "a"}}))["metadata"][
        "labels"
    ]
    assert labels["lorafleet.dev/run"] == ORDER.run
    assert labels["team"] == "a"


def test_a_list_is_a_json_patch() -> None:
    workers = "/spec/rayClusterSpec/workerGroupSpecs/0/template/spec"
    patch = [
        {"op": "test", "path": "/spec/backoffLimit", "value": 2},
        {
            "op": "add",
            "path": f"{workers}/containers/0/env/-",
            "value": {"name": "A", "value": "1"},
        },
        {"op": "replace", "path": "/spec/backoffLimit", "value": 0},
        {"op": "remove", "path": f"{workers}/automountServiceAccountToken"},
    ]
    job = rayjob(bare(patch=patch))
    pod = list_groups(job)[1][1]["template"]["spec"]
    assert pod["containers"][0]["env"][-1] == {"name": "A", "value": "1"}
    assert len(pod["containers"][0]["env"]) > 1  # a merge patch can only replace the whole list
    assert get(job, "spec.backoffLimit") == 0
    assert "automountServiceAccountToken" not in pod


@pytest.mark.parametrize(
    ("patch", "sentence"),
    [
        ([{"op": "test", "path": "/spec/backoffLimit", "value": 9}], "cannot be applied: "),
        ([{"op": "remove", "path": "/spec/nothing"}], "cannot be applied: "),
        ([{"op": "fly", "path": "/spec"}], "cannot be applied: "),
        ([{"path": "/spec"}], "cannot be applied: "),
        ([{"op": "add", "path": "spec", "value": 1}], "cannot be applied: "),
        ([{"op": "replace", "path": "", "value": []}], "replaces the RayJob by something else"),
        (
            [{"op": "replace", "path": "/metadata/name", "value": "x"}],
            "patch of site bare changes metadata.name, which must be",
        ),
    ],
)
def test_a_patch_that_cannot_be_applied(patch: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(PlacementRefused) as refused:
        rayjob(bare(patch=patch))
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mounts": [{"name": "data", "mount_path": "/data"}]}, "mounts names data, but volumes"),
        ({"volumes": [{"emptyDir": {}}]}, "each of volumes needs a name"),
        ({"sidecars": [{"image": "x"}]}, "each of sidecars needs a name"),
        ({"resource_claims": [{"name": "a"}]}, "set one of claim and template"),
        ({"hugepages": {"4Mi": "1Gi"}}, "2Mi"),
        ({"hugepages": {"2Mi": "1 GB"}}, "pattern"),
        ({"runtime_class": "Nvidia!"}, "pattern"),
        ({"volumes": [{"name": "tmp", "emptyDir": {}}]}, "volumes has tmp, a name that lorafleet"),
        ({"volumes": [{"name": "a"}, {"name": "a"}]}, "volumes has a twice"),
        ({"sidecars": [{"name": "ray-worker"}]}, "sidecars has ray-worker, a name that lorafleet"),
        (
            {"resource_claims": [{"name": "a", "claim": "x"}, {"name": "a", "claim": "y"}]},
            "resource_claims has a twice",
        ),
        ({"mounts": [{"name": "storage", "mount_path": "/tmp"}]}, "which lorafleet mounts itself"),
        ({"affinity": {"podAffinity": None}}, "affinity.podAffinity must be a mapping of rules"),
        (
            {"affinity": {"podAffinity": {"required": None}}},
            "affinity.podAffinity must be a mapping of rules",
        ),
        (
            {"sidecars": [{"name": "a", "env": [{"name": "API_TOKEN", "value": "x"}]}]},
            "pod.sidecars sets API_TOKEN, which may hold a secret",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValidationError, SpecProblems)) as refused:
        bare(pod=settings)
    assert sentence in str(refused.value)
