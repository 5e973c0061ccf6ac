"""A Kubernetes cluster with the KubeRay operator: a run is a RayJob for each time that it is submitted.

What is here is the run's record: its plan, what the cluster said last, and copies of what the run writes on the
storage.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster import porter, registry, staging
from cluster.backend import Say, Seen
from cluster.backends import SITE_FILE
from cluster.fetch import fetch_asset, fetch_job
from cluster.kubernetes_watch import KubernetesWatch, seen
from cluster.local import write_run
from cluster.planning import make_plan
from cluster.porter import account
from cluster.transfer import Cargo, Which
from jobs import files
from jobs.assets import asset
from jobs.errors import LorafleetError, PlacementRefused, RunError, UserError
from jobs.handover import TEXTS, pack
from jobs.kubernetes_site import WORKER_LABELS, KubernetesSite
from jobs.load import LoadedJob, dump_resolved
from jobs.placement import nodes_of_job
from jobs.plan import MANIFEST, Plan
from jobs.run import Run, RunState
from jobs.spec import JobSpec
from jobs.words import counted
from k8s import crd
from k8s.errors import ClusterError
from k8s.lint import lint, lint_site
from k8s.render import CALL_ANNOTATION, Order, object_name, render, to_yaml
from k8s.states import job_state, why_pending

if TYPE_CHECKING:
    from k8s.client import Client, Tree

_CRD = "LORAFLEET_RAYJOB_CRD"
"""A file with the CustomResourceDefinition of RayJob."""
_CONFLICT = 409
_PATIENCE_AT_THE_END = 120.0
"""Seconds that the end of a run waits for a pod that brings its record; `pull` waits longer."""


class KubernetesBackend:
    """Submits RayJobs to a namespace."""

    def __init__(self, site: KubernetesSite, nodes: int | None = None) -> None:
        self.site = site
        self.asked_nodes = nodes

    @functools.cached_property
    def client(self) -> Client:
        """The cluster. Raises ClusterError when nothing says where it is."""
        from k8s.client import Client  # a manifest is rendered without it, in half the time

        return Client(self.site.namespace, self.site.context)

    def runs_dir(self, given: Path) -> Path:
        """Where the records are, on this machine: the runs themselves lie on the site's storage."""
        return given

    # --- before: plan, check, bring what is needed

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Everything that would happen. Raises a UserError where the job could not begin."""
        nodes = nodes_of_job(self.site, self.asked_nodes, loaded.job.resources.num_nodes)
        made = make_plan(loaded, self.site.allocation(nodes), command)
        placement = made.placement.model_copy(update={"labels": made.placement.labels | WORKER_LABELS})
        made = made.model_copy(update={"site": self.site.name, "nodes": nodes, "placement": placement})
        places = staging.staged(self._storage, made.job, self._cache)
        made = Plan.model_validate_json(json.dumps(staging.moved(made.model_dump(mode="json"), places)))
        texts = {
            "job.yaml": loaded.text,
            "resolved.json": dump_resolved(loaded),
            "plan.json": made.model_dump_json(indent=1),
        }
        manifest = to_yaml(render(self.site, self._order_to_keep(made, pack(made.job.name, texts))))
        context = ["--context", self.site.context] if self.site.context else []
        line = shlex.join(["kubectl", *context, "apply", "--server-side", "-f", MANIFEST])
        return made.model_copy(update={"files": {MANIFEST: manifest}, "command_line": line})

    def _order_to_keep(self, made: Plan, texts: dict[str, str]) -> Order:
        # The same job on the same site has one name wherever it is rendered: the plan, which knows what lies in this
        # machine's cache, has no part in it.
        own = (made.job.model_dump_json(), self.site.model_dump_json(), made.command, made.nodes, version("lorafleet"))
        mark = hashlib.sha256("\0".join(map(str, own)).encode()).hexdigest()[:6]
        return self._order(f"{made.job.name}-{mark}", 1, made.nodes, texts)

    def _order(self, run: str, submission: int, nodes: int, texts: dict[str, str], call: str = "") -> Order:
        return Order(
            run=run,
            submission=submission,
            nodes=nodes,
            texts=texts,
            ray_version=version("ray"),
            user=self.site.user or account(),
            call=call,
        )

    @property
    def _storage(self) -> str:
        return porter.storage_key(self.site)

    @property
    def _cache(self) -> str:
        return porter.cache_in_pods(self.site)

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """What the schema of KubeRay, the operator's rules and the site have against the job; what was not asked."""
        *_, job = yaml.safe_load_all(plan.files[MANIFEST])
        refused, unasked = self._rules(plan, job), []
        missing = [] if self.site.internet else staging.not_brought(self._storage, plan.job)
        if missing:
            unasked.append(
                f"internet of site {self.site.name} is false, and {', '.join(missing)} was not brought to its storage "
                f"from here: `lorafleet fetch JOB.yaml --on {self.site.name}` does so"
            )
        wrong, source = self._schema(job)
        return [*refused, *(f"schema: {error}" for error in wrong)], [*unasked, *([source] if source else [])]

    def _rules(self, plan: Plan, job: Tree) -> list[str]:
        """What is known without asking anybody."""
        refused = [
            f"{field} is {path}, which pods do not see: `lorafleet fetch JOB.yaml --on {self.site.name}` brings it to "
            "the storage as it is now"
            for field, path in staging.named_paths(plan.job)
            if not path.startswith(f"{self.site.storage.mount_path}/")
        ]
        refused += lint_site(
            nodes=plan.nodes,
            read_write_many=self.site.storage.read_write_many,
            image=self.site.image,
            version=version("lorafleet"),
        )
        try:
            refused += [f"{found.path}: {found.sentence}" for found in lint(job)]
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            if not self.site.patch:
                raise
            what = f"{type(error).__name__}: {error}"
            refused.append(f"patch of site {self.site.name} gives a field a value of another form ({what})")
        return refused

    def _schema(self, job: Tree) -> tuple[list[str], str]:
        """(what a schema has against a RayJob, a sentence where it was not the cluster's): the cluster is asked first,
        then a file."""
        from k8s.client import Client

        try:
            quick = Client(self.site.namespace, self.site.context, tried=0)
            definition = quick.definition()
            if definition is None:
                return ["the cluster has no RayJob: KubeRay is not installed there"], ""
            return crd.Schema.of(definition).errors(job), ""
        except ClusterError as error:
            if error.forbidden:
                return self._dry_run(quick, job)
            why = str(error)
        if os.environ.get(_CRD):
            return crd.Schema.read(files.in_home(os.environ[_CRD])).errors(job), ""
        return [], (
            f"not held against your cluster's schema of RayJob ({why}), but against lorafleet's own models alone; "
            f"{_CRD} may name a file with the schema"
        )

    def _dry_run(self, quick: Client, job: Tree) -> tuple[list[str], str]:
        """What the API server itself says, where its schema may not be read."""
        try:
            quick.create(job, dry_run=True)
        except ClusterError as error:
            if error.refused and error.status != _CONFLICT and not error.forbidden:
                return [str(error)], ""
            if error.status != _CONFLICT:
                return [], f"not held against your cluster's schema of RayJob: {error}"
        return [], ""

    def provide(self, job: JobSpec, say: Say) -> str:
        """Bring what a job names to the storage: what lies on this machine by a path, and where pods have no internet
        also what it names of the hub and of the assets, which is fetched to this machine first."""
        own = [staging.own_cargo(path) for _, path in staging.named_paths(job) if not self._in_pods(path)]
        if not self.site.internet:
            fetch_job(job, say)
            own += staging.fetched_cargo(job)
        if own:
            self._deliver(own, say)
        left = "; what it names of the hub and of the assets is fetched by the pods" if self.site.internet else ""
        return f"{counted(len(own), 'part')} of it brought to the storage{left}"

    def provide_asset(self, name: str, say: Say) -> str:
        """Bring an asset to the storage."""
        folder = fetch_asset(asset(name), say)
        self._deliver([staging.asset_cargo(folder)], say)
        return f"{self._cache}/{staging.asset_cargo(folder).target}"

    def _deliver(self, cargo: list[Cargo], say: Say) -> None:
        with porter.pod_for(self.site, self.client, say) as place:
            porter.send(place, cargo, say)
        staging.remember(self._storage, cargo)

    def _in_pods(self, path: str) -> bool:
        return path.startswith(f"{self.site.storage.mount_path}/")

    # --- handing over

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Make the run's record here, and its objects on the cluster.

        Raises a UserError, and leaves nothing, where the cluster refuses them. Where it does not answer, the record
        stays: nobody knows whether they were made, and `resume` finds out.
        """
        *_, job = yaml.safe_load_all(plan.files[MANIFEST])
        refused = self._rules(plan, job)
        if refused:
            raise PlacementRefused("\n".join(refused))
        _ = self.client  # there is a cluster to ask
        run = write_run(plan.model_copy(update={"files": {}, "command_line": ""}), loaded, runs)
        try:
            self._hand_over(run, {"nodes": plan.nodes, "submission": 1})
        except UserError as error:
            if getattr(error, "refused", True):
                shutil.rmtree(run.path, ignore_errors=True)
                raise
            registry.add(run, self.site.name)
            raise RunError(
                f"{error}\nWhether the job was taken is not known: `lorafleet status {run.id}` asks, and "
                f"`lorafleet resume {run.id}` hands it over if it was not"
            ) from error
        except BaseException:
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        registry.add(run, self.site.name)
        return run

    def _hand_over(self, run: Run, facts: dict[str, Any]) -> None:
        """Make the objects of a submission.

        Their names and what marks them as this call's are written down first: a call that is tried again meets its own
        objects, and knows them.
        """
        stored = {"kind": self.site.kind, "site": self.site.model_dump(mode="json"), "handed_over": False, **facts}
        stored.setdefault("call", secrets.token_hex(8))
        texts = {name: (run.path / name).read_text() for name in TEXTS}
        packed = pack(str(run.status()["name"]), texts)
        order = self._order(run.id, stored["submission"], stored["nodes"], packed, stored["call"])
        objects = render(self.site, order)
        files.write_text(run.path / MANIFEST, to_yaml(objects))
        files.write_json(run.path / SITE_FILE, stored)
        try:
            *others, job = [self._create(tree, stored["call"]) for tree in objects]
            for tree in others:
                self.client.give_to(job, tree["kind"], tree["metadata"]["name"])
        except BaseException as error:
            if getattr(error, "refused", True):  # else it is open what there is
                self._take_back(objects, stored["call"])
            raise
        files.write_json(run.path / SITE_FILE, stored | {"handed_over": True})

    def _create(self, tree: Tree, call: str) -> Tree:
        """Make an object; one that the same call has made before is as good."""
        kind, name = tree["kind"], tree["metadata"]["name"]
        try:
            return {"kind": kind, "apiVersion": tree["apiVersion"]} | self.client.create(tree)
        except ClusterError as error:
            if error.status != _CONFLICT:
                raise
            found = self.client.get(kind, name)
            if found is None or not _is_of(found, call):
                what = f"there is a {kind} {name} already, which this call has not made"
                raise RunError(f"{what}: it is left alone") from error
            return {"kind": kind, "apiVersion": tree["apiVersion"]} | found

    def _take_back(self, objects: list[Tree], call: str) -> None:
        for tree in reversed(objects):
            with contextlib.suppress(UserError):
                found = self.client.get(tree["kind"], tree["metadata"]["name"])
                if found and _is_of(found, call):
                    self.client.delete(tree["kind"], tree["metadata"]["name"])

    def resume(self, run: Run) -> None:
        """Hand an unfinished run over again, as a RayJob of its own. Raises RunError while one of it lives."""
        stored, name = _stored(run), self.name_of(run)
        job = self.client.get("RayJob", name)
        if not stored.get("handed_over"):
            return self._hand_over(run, {key: stored[key] for key in ("nodes", "submission", "call")})
        if job is not None:
            if job["metadata"].get("deletionTimestamp"):
                raise RunError(f"RayJob {name} of {run.id} is still being taken away; try again in a minute")
            now = job_state(job.get("status"), queued=self._queued)
            if not now.ended:
                raise RunError(f"{run.id} has RayJob {name}, which {now.sentence}")
            self._drop(name)  # its head may still stand there, for its logs
        return self._hand_over(run, {"nodes": stored["nodes"], "submission": int(stored["submission"]) + 1})

    def _drop(self, name: str) -> None:
        for kind in ("RayJob", "ConfigMap", *(["NetworkPolicy"] if self.site.network_policy else [])):
            self.client.delete(kind, name)

    # --- while it lives

    def name_of(self, run: Run) -> str:
        """The name of the run's newest objects."""
        return object_name(run.id, int(_stored(run)["submission"]))

    @property
    def _queued(self) -> bool:
        return self.site.scheduler.kind == "kueue"

    def seen(self, run: Run, job: Tree | None) -> Seen:
        """Where a run is, when this is its RayJob."""
        return seen(run, self.name_of(run), _stored(run), job, queued=self._queued)

    def look(self, run: Run) -> Seen:
        """Where a run is: asked of the cluster first, of what was seen last where that does not answer."""
        try:
            job = self.client.get("RayJob", self.name_of(run))
        except ClusterError as error:
            last = _stored(run).get("last")
            if last:
                return Seen(RunState(last["state"]), last["sentence"])
            return Seen(run.state, f"{error}; the record here says {run.state}")
        found = self.seen(run, job)
        if found.state is RunState.PENDING and job is not None:
            why = self.why(run, job)
            return Seen(found.state, found.sentence + (f": {why}" if why else ""))
        if job is not None and job_state(job.get("status")).ended:
            self.settle(run, job)
        return found

    def settle(self, run: Run, job: Tree | None) -> Seen:
        """Note how a run ended, for the time when its RayJob is gone."""
        found = self.seen(run, job)
        last = {"state": str(found.state), "sentence": found.sentence}
        files.write_json(run.path / SITE_FILE, _stored(run) | {"last": last})
        return found

    def why(self, run: Run, job: Tree) -> str:
        """Why pods of a run do not start, in words; empty when nothing says so."""
        name = self.name_of(run)
        with contextlib.suppress(UserError):
            events = self.client.events(name=name)
            cluster = (job.get("status") or {}).get("rayClusterName")
            if cluster:
                events += self.client.events(name=cluster)
            for pod in self.client.pods(porter.labels_of_submission(run, int(_stored(run)["submission"]))):
                if pod.get("status", {}).get("phase") == "Pending":
                    events += self.client.events(name=pod["metadata"]["name"])
            if self._queued:
                queue = self.client.events(kind="Workload")
                events += [event for event in queue if f"rayjob-{name}" in event["involvedObject"]["name"]]
            return why_pending(events) or ""
        return ""

    def refresh(self, run: Run) -> None:
        """Bring what the run has written since: its record through its head, or else what its driver has said."""
        number = int(_stored(run)["submission"])
        with contextlib.suppress(UserError, LorafleetError):
            head = porter.head_of(self.client, run, number)
            if head is not None:
                porter.bring(head, self.site, run)
                return
        with contextlib.suppress(UserError):
            words = porter.submitters_words(self.client, run, number)
            if words:
                files.write_text(run.path / "logs" / "submitter.log", words)

    def collect(self, run: Run, *, ran: bool) -> None:
        """Bring the record of a run that has ended; what hinders it is written down, and `seen` says it."""
        stored = _stored(run)
        try:
            self._bring(run, "none", whole=False, through_pod=ran, up_seconds=_PATIENCE_AT_THE_END)
        except LorafleetError as error:
            missing = f"its record is not here ({error}): `lorafleet pull {run.id}` brings it"
            files.write_json(run.path / SITE_FILE, stored | {"missing": missing})

    def pull(self, run: Run, which: Which, say: Say) -> int:
        """Bring a run's record, W&B's files and the weights of `which` trials; returns how many files came."""
        count = self._bring(run, which, whole=True, through_pod=True, say=say)
        files.write_json(run.path / SITE_FILE, {**_stored(run), "missing": None})
        return count

    def _bring(
        self,
        run: Run,
        which: Which,
        *,
        whole: bool,
        through_pod: bool,
        say: Say = lambda _: None,
        up_seconds: float | None = None,
    ) -> int:
        head = porter.head_of(self.client, run, int(_stored(run)["submission"]))
        if head is not None:
            return porter.bring(head, self.site, run, which, whole=whole)
        if not through_pod:
            return 0
        with porter.pod_for(self.site, self.client, say, up_seconds) as place:
            return porter.bring(place, self.site, run, which, whole=whole)

    def watch(self, run: Run) -> KubernetesWatch:
        """The RayJob, followed."""
        return KubernetesWatch(self, run)

    def cancel(self, run: Run) -> str:
        """Take the run's RayJob away: the operator ends the driver, which has all trials saved."""
        name, job = self.name_of(run), self.client.get("RayJob", self.name_of(run))
        if job is None or job_state(job.get("status")).ended:
            raise RunError(f"{run.id} has no RayJob that waits or runs: it is {self.look(run).state}")
        self.refresh(run)
        files.write_json(run.path / SITE_FILE, _stored(run) | {"stopping": True})
        self.end_at_once(run)
        return (
            f"{run.id} saves its trials and ends: RayJob {name} is being taken away; `lorafleet resume {run.id}` goes "
            f"on, `lorafleet pull {run.id}` brings what it has so far"
        )

    def end_at_once(self, run: Run) -> None:
        """Take the run's objects away."""
        self._drop(self.name_of(run))

    def examine(self, runs: Path) -> Run:
        """Ask the cluster for what a job needs, and start a pod of the image; the findings are in the run's folder."""
        from cluster.kubernetes_doctor import findings

        run = Run.create(runs, "doctor")
        try:
            found = [finding.as_dict() for finding in findings(self.site, self.client)]
            files.write_json(run.path / "findings.json", {"findings": found})
        except BaseException:
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        return run


def stored_backend(stored: dict[str, Any]) -> KubernetesBackend:
    """The backend of a run's stored site."""
    return KubernetesBackend(KubernetesSite.model_validate_json(json.dumps(stored["site"])))


def _stored(run: Run) -> dict[str, Any]:
    return files.read_json(run.path / SITE_FILE)


def _is_of(tree: Tree, call: str) -> bool:
    return bool((tree["metadata"].get("annotations") or {}).get(CALL_ANNOTATION) == call)
