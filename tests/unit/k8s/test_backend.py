"""Kubernetes sites in words, and what the command line says of a job on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafleet.cluster.remote.staging import list_local_inputs, list_missing_uploads, record_uploads
from lorafleet.cluster.remote.transfer import UploadItem
from lorafleet.commands.execute import _convert_exit_code
from lorafleet.jobs.errors import ExitCode, JobFileError, PlacementRefused, UserError
from lorafleet.jobs.loading.site_file import load_site
from lorafleet.jobs.runs.plan import MANIFEST
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.sites.kubernetes import KubernetesSite, Toleration
from lorafleet.k8s.backend import KubernetesBackend
from lorafleet.k8s.crd import Schema
from lorafleet.k8s.doctor import RIGHTS
from lorafleet.k8s.lint import get
from lorafleet.k8s.render import render
from tests.conftest import ROOT, JobMaker, lorafleet_here
from tests.unit.k8s.test_render import IMAGE, ORDER, bare

SITE = f"""
kind: kubernetes
image: {IMAGE}
storage: {{claim: runs}}
cpus_per_node: 4
memory_gb_per_node: 16
internet: true
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "here.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("image: lorafleet:0.1.0", "is not pinned: must be NAME:VERSION@sha256:DIGEST"),
        ("storage: s3://bucket/runs", "is object storage, which cannot hold runs"),
        ("storage: runs", "must be a block with the name of a volume claim"),
        ("storage: {claim: runs, sub_path: a/../../b}", "leaves the volume: do not use `..`"),
        ("nodes: 3\nmax_nodes: 2", "nodes is 3, but must not exceed max_nodes = 2"),
        ("shared_memory_gb: 16", "shared_memory_gb is 16, but must be below memory_gb_per_node"),
        ("environment: {HF_TOKEN: x}", "HF_TOKEN may hold a secret"),
        (
            "secrets: {A: {name: s, key: k}}\nenvironment: {A: x}",
            "A is set in secrets and in environment",
        ),
        (
            "secrets: {RAY_AUTH_TOKEN: {name: s, key: k}}",
            "is not a valid variable name for a Secret",
        ),
        ("deadlines: {start_minutes: 5}", "the scheduler is not kueue"),
        ("deadlines: {start_minutes: 5}\nscheduler: {kind: volcano}", "the scheduler is not kueue"),
        (
            "autoscale: true\nscheduler: {kind: kueue, queue: q}",
            "autoscale is true, but kueue admits a whole job",
        ),
        ("scheduler: {kind: kueue, queue: q, topology_required: true}", "topology names no level"),
        ("tolerations: [{key: gpu, operator: Exists, value: x}]", "operator Exists takes no value"),
        ("tolerations: [{key: gpu, operator: Equal}]", "operator Equal needs a value"),
        ("tolerations: [{value: x}]", "there is no key"),
        ("tolerations: [{key: x, toleration_seconds: 9}]", "needs effect NoExecute"),
        (
            "patch: {spec: {x: [{name: API_TOKEN, value: abc}]}}",
            "patch sets API_TOKEN, which may hold a secret",
        ),
        ("gpu_per_node: 4", "gpu_per_node is not a known key; did you mean 'gpus_per_node'?"),
    ],
)
def test_what_a_site_cannot_say(line: str, said: str, tmp_path: Path) -> None:
    own = {part.partition(":")[0] for part in line.splitlines()}
    kept = [text for text in SITE.splitlines() if text.partition(":")[0] not in own]
    with pytest.raises(JobFileError) as caught:
        load_site(str(written(tmp_path, "\n".join([*kept, line]))))
    assert said in str(caught.value)


def test_tolerations_as_kubernetes_wants_them() -> None:
    told = [
        {"key": "gpu"},
        {"key": "pool", "value": "ml", "effect": "NoSchedule"},
        {"key": "spot", "effect": "NoExecute", "toleration_seconds": 9},
        {},
    ]
    assert [Toleration.model_validate(one).to_dict() for one in told] == [
        {"key": "gpu", "operator": "Exists"},
        {"key": "pool", "value": "ml", "effect": "NoSchedule", "operator": "Equal"},
        {"key": "spot", "effect": "NoExecute", "operator": "Exists", "tolerationSeconds": 9},
        {"operator": "Exists"},
    ]


def test_pods_leave_a_lost_node_before_kuberay_gives_up() -> None:
    own = [
        {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "toleration_seconds": 9}
    ]
    job = render(bare(deadlines={"lost_node_seconds": 30}, tolerations=own), ORDER)[-1]
    head = get(job, "spec.rayClusterSpec.headGroupSpec.template.spec.tolerations")
    (group,) = get(job, "spec.rayClusterSpec.workerGroupSpecs")
    worker = get(group, "template.spec.tolerations")

    def seconds(tolerations: list[dict[str, Any]]) -> dict[str, int]:
        return {one["key"].partition("/")[2]: one["tolerationSeconds"] for one in tolerations}

    assert seconds(head) == {"not-ready": 30, "unreachable": 30}
    assert seconds(worker) == {"not-ready": 30, "unreachable": 9}


def test_a_volume_of_one_node_holds_the_worker_to_the_heads() -> None:
    job = render(bare(storage={"claim": "runs", "read_write_many": False}), ORDER)[-1]
    (worker,) = get(job, "spec.rayClusterSpec.workerGroupSpecs")
    (term,) = get(
        worker, "template.spec.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution"
    )
    assert term["labelSelector"]["matchLabels"]["ray.io/node-type"] == "head"
    assert get(render(bare(), ORDER)[-1], "spec.rayClusterSpec.workerGroupSpecs")[0]["template"]["spec"].get(
        "affinity"
    ) is None  # fmt: skip


def test_a_patch_that_leaves_no_rayjob() -> None:
    with pytest.raises(
        PlacementRefused, match="patch of site bare changes kind, which must be RayJob"
    ):
        render(bare(patch={"kind": None}), ORDER)


def test_what_is_no_definition_of_a_rayjob(tmp_path: Path) -> None:
    for text in ("", "{}", '{"spec": {"names": {"kind": "RayCluster"}}}'):
        with pytest.raises(UserError, match="this is not the definition of RayJob"):
            Schema.read(written(tmp_path, text))


def test_a_manifest_on_the_command_line(bert_job: JobMaker, tmp_path: Path) -> None:
    """A path of this machine is refused with exit code 3; the same path on the volume is not."""
    job = tmp_path / "job.yaml"
    loaded = bert_job()
    job.write_text(loaded.text)
    site = written(tmp_path, SITE)
    refused = lorafleet_here("plan", job, "--on", site, "--format", "yaml", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (ExitCode.GATE_REFUSED, "")
    assert (
        f"data.train_file is {loaded.job.data.train_file}, which site here cannot read"
        in refused.stderr
    )
    mounted = written(tmp_path, SITE.replace("claim: runs", "claim: runs, mount_path: /"
                                             + str(loaded.job.data.train_file).split("/")[1]))  # fmt: skip
    planned = lorafleet_here("plan", job, "--on", mounted, "--format", "yaml", cwd=tmp_path)
    assert planned.returncode == ExitCode.OK, planned.stderr
    objects = list(yaml.safe_load_all(planned.stdout))
    assert [tree["kind"] for tree in objects] == ["ConfigMap", "NetworkPolicy", "RayJob"]
    assert objects[0]["data"]["job.yaml"] == loaded.text
    done = lorafleet_here("train", job, "--on", mounted, "--runs", tmp_path / "runs", cwd=tmp_path)
    assert done.returncode == ExitCode.USER_INPUT
    assert "no Kubernetes cluster is configured" in done.stderr
    assert not (tmp_path / "runs").exists()
    shown = lorafleet_here("plan", job, "--on", mounted, cwd=tmp_path)
    folder = " ".join(shown.stdout.split())
    assert "/runs/tiny-... on the storage; its record on this machine in runs/tiny-..." in folder
    asked = lorafleet_here("plan", job, "--format", "yaml", cwd=tmp_path)
    assert asked.returncode == ExitCode.USER_INPUT
    assert "use it with --on SITE, where SITE is of kind kubernetes" in asked.stderr


def test_names_change_with_the_job_and_the_site_alone(bert_job: JobMaker) -> None:
    def name(site: KubernetesSite, nodes: int | None = None, **changes: Any) -> str:
        plan = KubernetesBackend(site, nodes).plan(bert_job(**changes), "train")
        return str(next(yaml.safe_load_all(plan.files[MANIFEST]))["metadata"]["name"])

    first = name(bare())
    assert name(bare()) == first
    others = {name(bare(memory_gb_per_node=8.0)), name(bare(), 2), name(bare(), train__seed=7)}
    assert len(others | {first}) == 4


def test_a_patch_of_another_form_is_the_sites_mistake(bert_job: JobMaker) -> None:
    head = {"spec": {"rayClusterSpec": {"headGroupSpec": {"rayStartParams": {"num-cpus": 0}}}}}
    backend = KubernetesBackend(bare(patch=head, internet=True))
    refused, _ = backend.check(backend.plan(bert_job(), "train"))
    assert any(
        "patch of site bare sets a field to a value of the wrong type" in sentence
        for sentence in refused
    )


def test_what_pods_do_not_see(bert_job: JobMaker) -> None:
    job = bert_job(train__init_adapter="/home/me/adapter").job
    named = dict(list_local_inputs(job))
    assert named["train.init_adapter"] == "/home/me/adapter"
    assert named["data.train_file"] == job.data.train_file
    assert named["model.model_name_or_path"] == job.model.model_name_or_path
    asset = bert_job(model__model_name_or_path="asset:minilm-l6").job
    assert "model.model_name_or_path" not in dict(list_local_inputs(asset))


def test_the_role_has_what_the_doctor_asks_for() -> None:
    role = yaml.safe_load((ROOT / "k8s" / "role.yaml").read_text())
    written = {
        (group, resource): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    asked = {
        (group, f"{resource}/{subresource}" if subresource else resource): set(verbs)
        for resource, group, subresource, verbs, _ in RIGHTS
    }
    # What the documented `kubectl apply --server-side` needs beyond lorafleet itself.
    asked["ray.io", "rayjobs"].add("patch")
    assert written == asked | {("", "persistentvolumeclaims"): {"get"}}
    assert not any("secrets" in resource for _, resource in written)


@pytest.mark.parametrize(
    ("stop", "code", "told"),
    [
        (None, ExitCode.OK, ExitCode.OK),
        (None, ExitCode.SOME_TRIALS_FAILED, ExitCode.OK),
        (None, ExitCode.OUR_FAULT, ExitCode.OUR_FAULT),
        ("", ExitCode.INTERRUPTED, ExitCode.INTERRUPTED),
        ("asked for by a user\n", ExitCode.INTERRUPTED, ExitCode.OK),
    ],
)
def test_what_ray_is_told(stop: str | None, code: ExitCode, told: ExitCode, tmp_path: Path) -> None:
    """A failure is tried again on a new cluster: a run that is over, or that a user ended, must be
    none.
    """
    if stop is not None:
        (tmp_path / "stop").write_text(stop)
    assert _convert_exit_code(Run(tmp_path), code) == told


def test_what_was_brought_is_told_apart_by_its_revision(
    bert_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm's own revision of a model is another model for machines that have no internet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    arms = "compare: {arms: {a: {method: base}, b: {method: base, set: {model.revision: r2}}}}"
    job = bert_job(arms, model__model_name_or_path="org/m").job

    def brought(name: str) -> None:
        (tmp_path / "thing").write_text(name)
        record_uploads(
            "there", [UploadItem(tmp_path / "thing", f"hub/models--org--m/{name}", name)]
        )

    assert list_missing_uploads("there", job) == ["org/m", "org/m"]
    brought("refs/main")
    assert list_missing_uploads("there", job) == ["org/m"]
    brought("refs/r2")
    assert list_missing_uploads("there", job) == []
    pinned = job.model_copy(
        update={"compare": None, "model": job.model.model_copy(update={"revision": "0123abc"})}
    )
    assert list_missing_uploads("there", pinned) == ["org/m"]
    brought("snapshots/0123abc")
    assert list_missing_uploads("there", pinned) == []
