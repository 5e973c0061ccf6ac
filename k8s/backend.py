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
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lorafleet.cluster import submitted_runs as registry
from lorafleet.cluster.backend import Say, Seen, quietly
from lorafleet.cluster.local import write_run
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.remote.backend import (
    Away,
    Place,
    begin_submission,
    bring,
    keep,
    or_said_to_be_missing,
    seen_last,
    settled,
    stored,
)
from lorafleet.cluster.remote.transfer import Which
from lorafleet.jobs import files
from lorafleet.jobs.errors import CommandFailed, PlacementRefused, RunError, UserError
from lorafleet.jobs.loading.job_file import LoadedJob, dump_resolved
from lorafleet.jobs.runs.bundle import TEXTS, pack
from lorafleet.jobs.runs.plan import MANIFEST, Plan
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.sites.kubernetes import WORKER_LABELS, KubernetesSite
from lorafleet.jobs.sites.placement import nodes_of_job
from lorafleet.k8s import crd
from lorafleet.k8s import storage_pod as porter
from lorafleet.k8s.errors import ClusterError, Conflict
from lorafleet.k8s.lint import lint, lint_site
from lorafleet.k8s.render import (
    ATTEMPT_LABEL,
    CALL_ANNOTATION,
    RUN_LABEL,
    Order,
    label,
    object_name,
    render,
    run_folder,
    to_yaml,
)
from lorafleet.k8s.states import job_state, why_pending
from lorafleet.k8s.storage_pod import account
from lorafleet.k8s.watch import KubernetesWatch, has_run, seen

if TYPE_CHECKING:
    from lorafleet.cluster.doctor import Finding
    from lorafleet.k8s.client import Client, Tree

_CRD = "LORAFLEET_RAYJOB_CRD"
"""A file with the CustomResourceDefinition of RayJob."""
_TRIES = 3
"""How often the record of an ended run is tried to be brought unasked."""
_PATIENCE_AT_THE_END = 120.0
"""Seconds that the end of a run waits for a pod that brings its record; `pull` waits longer."""


class KubernetesBackend(Away[KubernetesSite]):
    """Submits RayJobs to a namespace."""

    def __init__(self, site: KubernetesSite, nodes: int | None = None) -> None:
        self.site = site
        self.asked_nodes = nodes
        self.called = f"site {site.name}"
        self.mount = site.storage.mount_path
        self.storage = porter.storage_key(site)
        self.internet = site.internet

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> KubernetesBackend:
        """Return the backend of a submitted run, with the site as it was then."""
        return cls(KubernetesSite.model_validate_json(json.dumps(record["site"])))

    @functools.cached_property
    def client(self) -> Client:
        """The cluster. Raises ClusterError when nothing says where it is."""
        from lorafleet.k8s.client import Client  # a manifest is rendered without it, in half the time

        return Client(self.site.namespace, self.site.context)

    @functools.cached_property
    def glance(self) -> Client:
        """The same, for those who only want to know: a cluster that does not answer is tried twice, not for minutes."""
        from lorafleet.k8s.client import Client

        return Client(self.site.namespace, self.site.context, tried=1)

    # --- before: plan, check, bring what is needed

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Everything that would happen. Raises a UserError where the job could not begin."""
        nodes = nodes_of_job(self.site, self.asked_nodes, loaded.job.resources.num_nodes)
        made = make_plan(loaded, self.site.allocation(nodes), command, self.site.allow_environment)
        placement = made.placement.model_copy(update={"labels": made.placement.labels | WORKER_LABELS})
        made = made.model_copy(update={"site": self.site.name, "nodes": nodes, "placement": placement})
        made = self.moved(made)
        texts = {
            "job.yaml": loaded.text,
            "resolved.json": dump_resolved(loaded),
            "plan.json": made.model_dump_json(indent=1),
        }
        manifest = to_yaml(render(self.site, self._order_to_keep(made, pack(made.job.name, texts, ray=version("ray")))))
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

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """What the schema of KubeRay, the operator's rules and the site have against the job; what was not asked."""
        *_, job = yaml.safe_load_all(plan.files[MANIFEST])
        refused, unasked = self._rules(plan, job), self.unbrought(plan.job)
        wrong, source = self._schema(job)
        return [*refused, *(f"schema: {error}" for error in wrong)], [*unasked, *([source] if source else [])]

    def _rules(self, plan: Plan, job: Tree) -> list[str]:
        """What is known without asking anybody."""
        refused = self.unseen(plan.job)
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
        from lorafleet.k8s.client import Client

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
        except Conflict:
            return [], ""
        except ClusterError as error:
            if error.refused and not error.forbidden:
                return [str(error)], ""
            return [], f"not held against your cluster's schema of RayJob: {error}"
        return [], ""

    def reached(self, say: Say) -> contextlib.AbstractContextManager[Place]:
        """A pod that sees the storage."""
        return porter.pod_for(self.site, self.client, say)

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
        except BaseException as error:
            self._not_taken(run, error, for_sure=stored(run).get("taken_back", True))
        registry.add(run, self.site.name)
        return run

    def _hand_over(self, run: Run, facts: dict[str, Any]) -> None:
        """Make the objects of a submission.

        Their names and what marks them as this call's are written down first: a call that is tried again meets its own
        objects, and knows them.
        """
        facts = {"call": secrets.token_hex(8)} | facts | {"handed_over": False}
        facts |= {"kind": self.site.kind, "site": self.site.model_dump(mode="json")}
        texts = {name: (run.path / name).read_text() for name in TEXTS}
        packed = pack(str(run.status()["name"]), texts, facts["submission"], version("ray"))
        order = self._order(run.id, facts["submission"], facts["nodes"], packed, facts["call"])
        objects = render(self.site, order)
        files.write_text(run.path / MANIFEST, to_yaml(objects))
        begin_submission(run, facts)
        try:
            *others, job = [self._create(tree, facts["call"]) for tree in objects]
            for tree in others:
                self.client.give_to(job, tree["kind"], tree["metadata"]["name"])
        except BaseException as error:
            open_end = isinstance(error, ClusterError) and not error.refused
            taken_back = not open_end and self._take_back(objects, facts["call"])
            keep(run, facts["submission"], taken_back=taken_back)
            raise
        keep(run, facts["submission"], handed_over=True)

    def _create(self, tree: Tree, call: str) -> Tree:
        """Make an object; one that the same call has made before is as good."""
        kind, name = tree["kind"], tree["metadata"]["name"]
        try:
            return {"kind": kind, "apiVersion": tree["apiVersion"]} | self.client.create(tree)
        except Conflict as error:
            found = self.client.get(kind, name)
            if found is None or not _is_of(found, call):
                what = f"there is a {kind} {name} already, which this call has not made"
                raise RunError(f"{what}: it is left alone") from error
            return {"kind": kind, "apiVersion": tree["apiVersion"]} | found

    def _take_back(self, objects: list[Tree], call: str) -> bool:
        """Take away what a call has made; returns whether nothing of it is left for sure."""
        try:
            for tree in reversed(objects):
                found = self.client.get(tree["kind"], tree["metadata"]["name"])
                if found and _is_of(found, call):
                    self.client.delete(tree["kind"], tree["metadata"]["name"])
        except ClusterError:
            return False
        return True

    def resume(self, run: Run) -> None:
        """Hand an unfinished run over again, as a RayJob of its own. Raises RunError while one of it lives."""
        facts, name = stored(run), self.name_of(run)
        job = self.client.get("RayJob", name)
        if not facts.get("handed_over"):
            return self._hand_over(run, {key: facts[key] for key in ("nodes", "submission", "call")})
        if (job or {}).get("metadata", {}).get("deletionTimestamp") or (job is None and self._saves(run)):
            raise RunError(f"RayJob {name} of {run.id} is still being taken away; try again in a minute")
        if job is not None:
            now = job_state(job.get("status"), queued=self._queued)
            if not now.ended:
                raise RunError(f"{run.id} has RayJob {name}, which {now.sentence}")
            self.end_at_once(run)  # its head may still stand there, for its logs
        return self._hand_over(run, {"nodes": facts["nodes"], "submission": int(facts["submission"]) + 1})

    # --- while it lives

    def folder_of(self, run: str) -> str:
        """Where pods see a run."""
        return run_folder(self.site, run)

    def newest(self, run: str) -> int:
        """Which submission of a run the cluster knows as the newest; the first where it has forgotten all."""
        jobs = self.client.rayjobs({RUN_LABEL: label(run)})
        return max((int(job["metadata"]["labels"].get(ATTEMPT_LABEL) or 1) for job in jobs), default=1)

    def name_of(self, run: Run) -> str:
        """The name of the run's newest objects."""
        return object_name(run.id, int(stored(run)["submission"]))

    @property
    def _queued(self) -> bool:
        return self.site.scheduler.kind == "kueue"

    def seen(self, run: Run, job: Tree | None) -> Seen:
        """Where a run is, when this is its RayJob."""
        if job is None and stored(run).get("stopping") and self._saves(run):
            return Seen(RunState.RUNNING, "its RayJob is gone, and its pods save their trials and end")
        return seen(run, self.name_of(run), job, queued=self._queued)

    def _saves(self, run: Run) -> bool:
        """Whether pods of a run still live; where nobody can say, they do not."""
        with contextlib.suppress(UserError):
            pods = self.glance.pods(porter.labels_of_submission(run, int(stored(run)["submission"])))
            return any(pod.get("status", {}).get("phase") == "Running" for pod in pods)
        return False

    def look(self, run: Run) -> Seen:
        """Where a run is: asked of the cluster first, of what was seen last where that does not answer."""
        try:
            job = self.glance.get("RayJob", self.name_of(run))
        except ClusterError as error:
            return seen_last(run) or Seen(run.state, f"{error}; the record here says {run.state}", asked=False)
        found = self.seen(run, job)
        if found.state is RunState.PENDING and job is not None:
            why = self.why(run, job)
            return Seen(found.state, found.sentence + (f": {why}" if why else ""))
        if job is not None and job_state(job.get("status")).ended:
            settled(run, int(stored(run)["submission"]), found)
        return found

    def why(self, run: Run, job: Tree) -> str:
        """Why pods of a run do not start, in words; empty when nothing says so."""
        name = self.name_of(run)
        with contextlib.suppress(UserError):
            events = self.glance.events(name=name)
            cluster = (job.get("status") or {}).get("rayClusterName")
            if cluster:
                events += self.glance.events(name=cluster)
            for pod in self.glance.pods(porter.labels_of_submission(run, int(stored(run)["submission"]))):
                if pod.get("status", {}).get("phase") == "Pending":
                    events += self.glance.events(name=pod["metadata"]["name"])
            if self._queued:
                queue = self.glance.events(kind="Workload")
                events += [event for event in queue if f"rayjob-{name}" in event["involvedObject"]["name"]]
            return why_pending(events) or ""
        return ""

    def refresh(self, run: Run, say: Say = quietly) -> None:
        """Bring what the run has written since: its record through its head, or else what its driver has said.

        Of a run that has ended the record comes once, through a pod where its own are gone.
        """
        number = int(stored(run)["submission"])
        try:
            if self.peek(run, number):
                return
            job = self.glance.get("RayJob", self.name_of(run))
            if stored(run).get("handed_over") and self.seen(run, job).state not in (RunState.PENDING, RunState.RUNNING):
                facts = stored(run)
                if not facts.get("collected") and int(facts.get("tries") or 0) < _TRIES:
                    say(f"{run.id} has ended, and its pods are gone: its record comes through one more")
                    self.collect(run, number, ran=job is None or has_run(job))
                return
            self._words(run, number)
        except ClusterError:
            return  # `look` says so

    def peek(self, run: Run, submission: int) -> bool:
        """Bring a run's record through its head; False where that is not up, or does not let one in.

        Raises ClusterError where no API server answers.
        """
        head = porter.head_of(self.glance, run, submission)
        if head is None:
            return False
        try:
            bring(head, self.folder_of(run.id), run, wait=False)
        except (ClusterError, CommandFailed):
            return False
        if not (run.path / "logs" / "driver.log").is_file():  # it did not come so far
            self._words(run, submission)
        return True

    def _words(self, run: Run, submission: int) -> None:
        """What the driver has said, as the submitter's pod has it, where the driver's own log is not here."""
        with contextlib.suppress(ClusterError):
            words = porter.submitters_words(self.glance, run, submission)
            if words and not (run.path / "logs" / "driver.log").is_file():
                files.write_text(run.path / "logs" / "submitter.log", words)

    def collect(self, run: Run, submission: int, *, ran: bool) -> None:
        """Bring the record of a submission that has ended; what hinders it is written down, and `seen` says it."""
        self._words(run, submission)
        with or_said_to_be_missing(run, submission):
            self._bring(run, submission, "none", through_pod=ran, up_seconds=_PATIENCE_AT_THE_END)

    def pull(self, run: Run, which: Which, say: Say) -> int:
        """Bring a run's record, W&B's files and the weights of `which` trials; returns how many files came."""
        number = int(stored(run)["submission"])
        count = self._bring(run, number, which, whole=True, say=say)
        keep(run, number, missing=None, collected=True)
        return count

    def _bring(
        self,
        run: Run,
        submission: int,
        which: Which,
        *,
        whole: bool = False,
        through_pod: bool = True,
        say: Say = quietly,
        up_seconds: float | None = None,
    ) -> int:
        head = porter.head_of(self.client, run, submission)
        if head is not None:
            return bring(head, self.folder_of(run.id), run, which, whole=whole)
        if not through_pod:
            return 0
        with porter.pod_for(self.site, self.client, say, up_seconds) as place:
            return bring(place, self.folder_of(run.id), run, which, whole=whole)

    def watch(self, run: Run) -> KubernetesWatch:
        """The RayJob, followed."""
        return KubernetesWatch(self, run)

    def cancel(self, run: Run) -> str:
        """Take the run's RayJob away: the operator ends the driver, which has all trials saved."""
        name, job = self.name_of(run), self.client.get("RayJob", self.name_of(run))
        if job is None or job_state(job.get("status")).ended:
            raise RunError(f"{run.id} has no RayJob that waits or runs: it is {self.look(run).state}")
        keep(run, int(stored(run)["submission"]), stopping=True)
        self.end_at_once(run)
        return (
            f"{run.id} saves its trials and ends: RayJob {name} is being taken away; `lorafleet resume {run.id}` goes "
            f"on, `lorafleet pull {run.id}` brings what it has so far"
        )

    def end_at_once(self, run: Run) -> None:
        """Take the run's RayJob away; what belongs to it goes with it."""
        self.client.delete("RayJob", self.name_of(run))

    def findings(self) -> list[Finding]:
        """Ask the cluster for what a job needs, and start a pod of the image."""
        from lorafleet.k8s.doctor import findings

        return findings(self.site, self.client)


def _is_of(tree: Tree, call: str) -> bool:
    return bool((tree["metadata"].get("annotations") or {}).get(CALL_ANNOTATION) == call)
