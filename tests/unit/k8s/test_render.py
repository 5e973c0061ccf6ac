"""RayJobs: the same bytes as ever, accepted by the real schema, the core API's and the lint; no
value breaks out.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.jobs.errors import PlacementRefused
from lorafleet.jobs.loading.site_file import load_site
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.jobs.sites.placement import choose_node_count
from lorafleet.k8s.crd import Schema
from lorafleet.k8s.lint import get, lint, lint_site, list_templates
from lorafleet.k8s.render import (
    RenderContext,
    apply_merge_patch,
    format_entrypoint,
    make_object_name,
    render,
    to_yaml,
)
from tests.conftest import ROOT
from tests.kubernetes.crd import CRD

GOLDEN = ROOT / "tests" / "golden" / "kubernetes"
IMAGE = "registry/lorafleet:0.1.0@sha256:" + "1" * 64
BARE = {
    "name": "bare",
    "image": IMAGE,
    "storage": {"claim": "runs"},
    "cpus_per_node": 4,
    "memory_gb_per_node": 16.0,
}
EXTENDED: dict[str, Any] = {
    "annotations": {"policy.corp/team": "nlp", "karpenter.sh/do-not-disrupt": "false"},
    "storage": {"claim": "runs", "read_write_many": False},
    "pod": {
        "annotations": {"sidecar.istio.io/inject": "false"},
        "labels": {"cost-centre": "4711"},
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": "corpora", "readOnly": True}},
            {"name": "certs", "configMap": {"name": "corp-ca"}},
            {"name": "hugepages", "emptyDir": {"medium": "HugePages-2Mi"}},
        ],
        "mounts": [
            {"name": "data", "mount_path": "/data", "sub_path": "texts", "read_only": True},
            {"name": "certs", "mount_path": "/etc/corp-ca", "read_only": True},
        ],
        "affinity": {
            "nodeAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 10,
                        "preference": {
                            "matchExpressions": [
                                {"key": "disk", "operator": "In", "values": ["nvme"]}
                            ]
                        },
                    }
                ]
            }
        },
        "topology_spread": [
            {
                "maxSkew": 1,
                "topologyKey": "topology.kubernetes.io/zone",
                "whenUnsatisfiable": "ScheduleAnyway",
            }
        ],
        "runtime_class": "nvidia",
        "hugepages": {"2Mi": "1Gi"},
        "sidecars": [
            {
                "name": "agent",
                "image": "registry/agent@sha256:" + "3" * 64,
                "resources": {"limits": {"cpu": "100m", "memory": "64Mi"}},
            }
        ],
        "resource_claims": [
            {"name": "gpus", "template": "one-gpu"},
            {"name": "nic", "claim": "shared-nic"},
        ],
    },
    "head": {"pod": {"runtime_class": "gvisor", "labels": {"cost-centre": "4711"}}},
    "nodes": 1,
}
"""Everything that a platform team may add to pods."""
ORDER = RenderContext(
    run="quickstart-a1b2c3",
    submission=1,
    nodes=2,
    texts={"run.json": "{}\n", "job.yaml": "name: x\n"},
    ray_version="2.60.0",
    user="ana",
)


def bare(**changes: Any) -> KubernetesSite:
    return KubernetesSite.model_validate(BARE | changes)


def sites() -> dict[str, KubernetesSite]:
    loaded = {
        path.stem: load_site(str(path)).site
        for path in sorted((ROOT / "examples" / "sites").glob("*.yaml"))
    }
    examples = {name: site for name, site in loaded.items() if isinstance(site, KubernetesSite)}
    return examples | {
        "bare": bare(),
        "volcano": bare(scheduler={"kind": "volcano", "queue": "research"}),
        "yunikorn": bare(scheduler={"kind": "yunikorn", "queue": "root.research"}),
        "kai": bare(scheduler={"kind": "kai", "queue": "research"}),
        "autoscaled": bare(autoscale=True, network_policy=False),
        "extended": bare(**EXTENDED),
        "patched": bare(
            patch={"metadata": {"annotations": {"note": "ours"}}, "spec": {"backoffLimit": 0}}
        ),
    }


def rayjob(site: KubernetesSite, order: RenderContext = ORDER) -> dict[str, Any]:
    return render(site, order)[-1]


@pytest.fixture(scope="session")
def schema() -> Schema:
    """The real CRD of KubeRay."""
    return Schema.read(CRD)


@pytest.mark.parametrize("name", sites())
def test_golden_manifests(name: str) -> None:
    """LORAFLEET_WRITE_GOLDEN=1 writes them anew; the difference is for a reviewer's eyes."""
    text = to_yaml(render(sites()[name], ORDER))
    golden = GOLDEN / f"{name}.yaml"
    if os.environ.get("LORAFLEET_WRITE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.read_text() == text
    assert list(yaml.safe_load_all(text)) == render(sites()[name], ORDER)


@pytest.mark.parametrize("name", sites())
def test_the_real_schema_and_the_lint_accept_them(name: str, schema: Schema) -> None:
    job = rayjob(sites()[name])
    assert schema.list_errors(job) == []
    assert lint(job) == []


@pytest.mark.parametrize("name", sites())
def test_the_core_schemas_accept_their_pods(name: str) -> None:
    import kubernetes_validate

    *others, job = render(sites()[name], ORDER)
    for tree in others:
        kubernetes_validate.validate(tree, "1.34", strict=True)
    for _, template in list_templates(job):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": template["metadata"],
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, "1.34", strict=True)


def test_names_hold_what_tells_runs_apart() -> None:
    assert make_object_name("quickstart-a1b2c3", 1) == "quickstart-a1b2c3-1"
    longest = make_object_name("4" * 40 + "-a1b2c3", 12)
    assert longest.endswith("-a1b2c3-12")
    assert len(longest) == 47
    assert longest.startswith("r-444")


@given(
    st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?\Z"),
    st.from_regex(r"\A[0-9a-f]{6}\Z"),
    st.integers(1, 999),
)
def test_names_are_names(job: str, mark: str, submission: int) -> None:
    name = make_object_name(f"{job}-{mark}", submission)
    assert [
        finding for finding in lint({"metadata": {"name": name}}) if finding.rule == "name"
    ] == []
    assert f"-{mark}-" in name


nasty = st.sampled_from(
    [
        "$(touch OOPS)",
        "`touch OOPS`",
        "'; touch OOPS; '",
        '"',
        "$HOME",
        "\\",
        "${x:?}",
        "&& touch OOPS",
        "# x",
        "日本",
        "{{x}}",
        "a: b",
        "!!object",
        "~",
        "no",
        "1e3",
    ]
)
others = st.characters(blacklist_characters="\n\0\r", blacklist_categories=("Cs",))
texts = st.one_of(nasty, st.text(others, max_size=20))
variables = st.dictionaries(st.from_regex(r"\AA[A-Z0-9_]{0,8}\Z"), texts, max_size=4)


@given(values=variables, document=st.text(max_size=60), user=texts)
def test_no_value_breaks_out(values: dict[str, str], document: str, user: str) -> None:
    """Whatever a value is, the manifest that is read back has it as a value, and nothing that a
    shell reads has it.
    """
    safe = {
        name: value for name, value in values.items() if "KEY" not in name and "TOKEN" not in name
    }
    order = RenderContext("x-a1b2c3", 1, 1, {"run.json": document}, "2.60.0", user)
    read = list(yaml.safe_load_all(to_yaml(render(bare(environment=safe), order))))
    assert read == render(bare(environment=safe), order)
    assert read[0]["data"]["run.json"] == document
    job = read[-1]
    assert lint(job) == []
    (container,) = get(job, "spec.rayClusterSpec.headGroupSpec.template.spec.containers")
    got = {variable["name"]: variable["value"] for variable in container["env"]}
    assert {name: got[name].replace("$$(", "$(") for name in safe} == safe
    plain = rayjob(bare(), RenderContext("x-a1b2c3", 1, 1, {"run.json": ""}, "2.60.0", "ana"))
    read_by_shells = (
        "entrypoint",
        "metadata",
        "entrypointResources",
        "rayClusterSpec.headGroupSpec.rayStartParams",
    )
    for path in read_by_shells:
        assert get(job, f"spec.{path}") == get(plain, f"spec.{path}")


@given(
    st.lists(st.one_of(texts, st.from_regex(r"\A[a-z0-9/._=-]{1,12}\Z")), min_size=1, max_size=4)
)
def test_a_command_is_its_words_or_is_refused(words: list[str]) -> None:
    """KubeRay pastes the command into a bash script: bash must read the very words."""
    try:
        command = format_entrypoint(words)
    except PlacementRefused:
        return
    said = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True, cwd="/"
    ).stdout.decode()
    assert said.split("\0")[:-1] == words
    assert shlex.split(command) == words


def test_a_value_is_not_taken_for_a_variable_of_kubernetes() -> None:
    job = rayjob(bare(environment={"GREETING": "$(HOME) and $HOME"}))
    (container,) = get(job, "spec.rayClusterSpec.headGroupSpec.template.spec.containers")
    assert {"name": "GREETING", "value": "$$(HOME) and $HOME"} in container["env"]


def test_secrets_are_referenced() -> None:
    site = bare(secrets={"HF_TOKEN": {"name": "hf", "key": "token", "optional": True}})
    text = to_yaml(render(site, ORDER))
    assert text.count("secretKeyRef") == 2  # head and workers; the submitter needs none
    (container,) = get(rayjob(site), "spec.rayClusterSpec.headGroupSpec.template.spec.containers")
    assert container["env"][-1]["valueFrom"] == {
        "secretKeyRef": {"name": "hf", "key": "token", "optional": True}
    }


def test_what_kueue_and_others_want() -> None:
    every = sites()
    kueue = rayjob(every["kubernetes-kueue"])
    assert kueue["spec"]["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in kueue["spec"]
    assert "suspend" not in kueue["spec"]
    worker = kueue["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    assert "kueue.x-k8s.io/podset-preferred-topology" in worker["metadata"]["annotations"]
    assert worker["spec"]["containers"][0]["securityContext"]["capabilities"] == {
        "drop": ["ALL"],
        "add": ["IPC_LOCK"],
    }
    assert rayjob(every["kai"])["spec"]["submissionMode"] == "HTTPMode"
    assert (
        rayjob(every["autoscaled"])["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"]
        == 1
    )
    patched = rayjob(every["patched"])
    assert patched["spec"]["backoffLimit"] == 0
    assert patched["metadata"]["annotations"] == {"note": "ours"}


def test_merge_patch() -> None:
    """The table of RFC 7386, appendix A, in part."""
    for target, patch, result in (
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": "b"}, ["c"], ["c"]),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ):
        assert apply_merge_patch(target, patch) == result


def test_how_many_worker_pods() -> None:
    assert choose_node_count(bare(), None, 2) == 2
    assert choose_node_count(bare(nodes=3), None, 2) == 3
    with pytest.raises(PlacementRefused, match="--nodes is 1, but each trial needs 2 worker pods"):
        choose_node_count(bare(), 1, 2)
    with pytest.raises(
        PlacementRefused, match="the job would have 9 worker pods, but max_nodes of site bare is 4"
    ):
        choose_node_count(bare(max_nodes=4), 9, 2)


def test_a_job_that_is_too_large_for_a_config_map() -> None:
    with pytest.raises(PlacementRefused, match=r"a ConfigMap holds only 900,000: use fewer trials"):
        render(
            bare(), RenderContext("x-a1b2c3", 1, 1, {"job.yaml": "x" * 1_000_000}, "2.60.0", "ana")
        )


def test_between_the_objects_and_the_site() -> None:
    fine = {"nodes": 1, "read_write_many": False, "image": IMAGE, "version": "0.1.0"}
    assert lint_site(**fine) == []
    assert "use a ReadWriteMany claim" in lint_site(**fine | {"nodes": 2})[0]
    assert lint_site(**fine | {"version": "0.2.0"}) == [
        "image has lorafleet 0.1.0, but this machine has 0.2.0, so the pods would reject the job: use an image of the same version"
    ]
