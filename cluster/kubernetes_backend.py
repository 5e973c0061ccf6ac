"""A Kubernetes cluster with the KubeRay operator: a run is a RayJob."""

from __future__ import annotations

import getpass
import hashlib
import os
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import yaml

from cluster.backend import Watch
from cluster.planning import make_plan
from jobs import files
from jobs.errors import UserError
from jobs.handover import pack
from jobs.kubernetes_site import WORKER_LABELS, KubernetesSite
from jobs.load import LoadedJob, dump_resolved
from jobs.placement import nodes_of_job
from jobs.plan import MANIFEST, Plan
from jobs.run import Run
from jobs.spec import JobSpec
from k8s import crd
from k8s.lint import lint, lint_site
from k8s.render import Order, render, to_yaml

_PATHS = ("train_file", "validation_file", "test_file")
_CRD = "LORAFLEET_RAYJOB_CRD"
"""A file with the CustomResourceDefinition of RayJob."""


class KubernetesBackend:
    """Renders the objects of a job for a site, and checks them. It does not hand them over yet."""

    def __init__(self, site: KubernetesSite, nodes: int | None = None) -> None:
        self.site = site
        self.asked_nodes = nodes

    def runs_dir(self, given: Path) -> Path:
        """Where the storage has them, as pods see it."""
        return Path(self.site.storage.mount_path) / "runs"

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Everything that would happen. Raises a UserError where the job could not begin."""
        nodes = nodes_of_job(self.site, self.asked_nodes, loaded.job.resources.num_nodes)
        made = make_plan(loaded, self.site.allocation(nodes), command)
        placement = made.placement.model_copy(update={"labels": made.placement.labels | WORKER_LABELS})
        made = made.model_copy(update={"site": self.site.name, "nodes": nodes, "placement": placement})
        texts = {
            "job.yaml": loaded.text,
            "resolved.json": dump_resolved(loaded),
            "plan.json": made.model_dump_json(indent=1),
        }
        manifest = to_yaml(render(self.site, self._order(made, pack(made.job.name, texts))))
        context = ["--context", self.site.context] if self.site.context else []
        line = shlex.join(["kubectl", *context, "apply", "--server-side", "-f", MANIFEST])
        return made.model_copy(update={"files": {MANIFEST: manifest}, "command_line": line})

    def _order(self, made: Plan, texts: dict[str, str]) -> Order:
        # The same job on the same site has one name wherever it is rendered: the plan, which knows what lies in this
        # machine's cache, has no part in it.
        own = (made.job.model_dump_json(), self.site.model_dump_json(), made.command, made.nodes, version("lorafleet"))
        mark = hashlib.sha256("\0".join(map(str, own)).encode()).hexdigest()[:6]
        return Order(
            run=f"{made.job.name}-{mark}",
            submission=1,
            nodes=made.nodes,
            texts=texts,
            ray_version=version("ray"),
            user=self.site.user or _account(),
        )

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """What the schema of KubeRay, the operator's rules and the site have against the job; what was not asked."""
        *_, job = yaml.safe_load_all(plan.files[MANIFEST])
        refused = local_paths(plan.job, self.site.storage.mount_path)
        refused += lint_site(
            nodes=plan.nodes,
            read_write_many=self.site.storage.read_write_many,
            image=self.site.image,
            version=version("lorafleet"),
        )
        unasked = []
        if not self.site.internet:
            unasked.append(
                f"internet of site {self.site.name} is false: models and data must lie on its storage already, in "
                "cache/ (a pod with `lorafleet fetch JOB.yaml` and the variables of the manifest lays them there)"
            )
        if os.environ.get(_CRD):
            refused += [f"schema: {error}" for error in crd.Schema.read(files.in_home(os.environ[_CRD])).errors(job)]
        else:
            unasked.append(f"not held against your cluster's schema of RayJob: {_CRD} names a file with it")
        try:
            refused += [f"{found.path}: {found.sentence}" for found in lint(job)]
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            if not self.site.patch:
                raise
            what = f"{type(error).__name__}: {error}"
            refused.append(f"patch of site {self.site.name} gives a field a value of another form ({what})")
        return refused, unasked

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Raises UserError: not yet."""
        _not_yet("a job is not submitted")

    def stage(self) -> None:
        """Raises UserError: not yet."""
        _not_yet("nothing is brought to the storage")

    def resume(self, run: Run) -> None:
        """Raises UserError: not yet."""
        _not_yet("a run is not resumed")

    def look(self, run: Run) -> NoReturn:
        """Raises UserError: not yet."""
        _not_yet("a run is not asked about")

    def watch(self, run: Run) -> Watch:
        """Raises UserError: not yet."""
        _not_yet("a run is not followed")

    def cancel(self, run: Run) -> str:
        """Raises UserError: not yet."""
        _not_yet("a run is not ended")

    def examine(self, runs: Path) -> Run:
        """Raises UserError: not yet."""
        _not_yet("nodes are not looked at")

    def end_at_once(self, run: Run) -> None:
        """Raises UserError: not yet."""
        _not_yet("a run is not ended")


def _account() -> str:
    """The account here; a container may have none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _not_yet(what: str) -> NoReturn:
    raise UserError(
        f"{what} by lorafleet itself on Kubernetes yet: `lorafleet plan JOB.yaml --on SITE --format yaml` prints the "
        "manifest for `kubectl apply --server-side -f -`"
    )


def local_paths(job: JobSpec, mounted: str) -> list[str]:
    """What the job names by a path that pods do not see, a sentence each."""
    named = {f"data.{field}": getattr(job.data, field) for field in _PATHS}
    named["data.dataset_name"] = job.data.dataset_name if _is_path(job.data.dataset_name) else None
    named["train.init_adapter"] = job.train.init_adapter
    named["model.model_name_or_path"] = job.model.model_name_or_path
    return [
        f"{field} is {path}, which pods do not see: name one of the hub, or a path in {mounted}"
        for field, path in named.items()
        if path and _is_path(path) and not path.startswith(f"{mounted}/")
    ]


def _is_path(text: str | None) -> bool:
    return bool(text) and str(text).startswith(("/", "./", "../", "~"))
