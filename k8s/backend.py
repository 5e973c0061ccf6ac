"""The Kubernetes backend: a run is a KubeRay RayJob, one for each submission.

The run's local folder is a record: its plan, its last reported status, and copies of what the
run writes to the storage.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lorafleet.cluster import submitted_runs as registry
from lorafleet.cluster.backend import RunStatus, Say, WeightSelection, ignore_message
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.remote.backend import RemoteBackend
from lorafleet.cluster.remote.place import CommandRunner, download_record
from lorafleet.cluster.submission import (
    SubmissionRecord,
    find_record,
    read_last_status,
    read_record,
    record_final_state,
    record_if_missing,
    record_submission,
    update_record,
    write_run,
)
from lorafleet.jobs import files
from lorafleet.jobs.errors import CommandFailed, PlacementRefused, RunError, UserError
from lorafleet.jobs.extras import get_ray_version
from lorafleet.jobs.loading.job_file import LoadedJob, dump_resolved
from lorafleet.jobs.runs.bundle import TEXTS, pack
from lorafleet.jobs.runs.plan import MANIFEST, Plan
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.sites.kubernetes import WORKER_LABELS, KubernetesSite
from lorafleet.jobs.sites.placement import choose_node_count
from lorafleet.k8s import crd
from lorafleet.k8s import storage_pod as porter
from lorafleet.k8s.errors import ClusterError, Conflict
from lorafleet.k8s.lint import lint, lint_site
from lorafleet.k8s.render import (
    ATTEMPT_LABEL,
    CALL_ANNOTATION,
    RUN_LABEL,
    RenderContext,
    get_run_folder,
    make_object_name,
    render,
    to_label_value,
    to_yaml,
)
from lorafleet.k8s.states import find_pending_reason, parse_job_state
from lorafleet.k8s.storage_pod import get_account
from lorafleet.k8s.watch import KubernetesWatch, derive_status, has_started_driver

if TYPE_CHECKING:
    from lorafleet.cluster.doctor import Finding
    from lorafleet.k8s.client import Client, Tree

_CRD_VARIABLE = "LORAFLEET_RAYJOB_CRD"
"""Environment variable that names a file with the CustomResourceDefinition of RayJob."""
_MAX_DOWNLOAD_TRIES = 3
"""How often `refresh` tries to download the record of an ended run."""
_FINAL_POD_TIMEOUT_SECONDS = 120.0
"""Seconds that the end of a run waits for the storage pod that downloads its record; `pull`
waits longer.
"""


class KubernetesBackend(RemoteBackend[KubernetesSite]):
    """A backend that submits RayJobs to a namespace.

    It is created for each command, from a site file or from the record of a run. The
    cluster's client is created at its first use, because a manifest can be rendered without
    a cluster.
    """

    def __init__(self, site: KubernetesSite, nodes: int | None = None) -> None:
        self.site = site
        self.asked_nodes = nodes
        self.called = f"site {site.name}"
        self.mount = site.storage.mount_path
        self.storage = porter.build_storage_key(site)
        self.internet = site.internet

    @classmethod
    def from_record(cls, record: SubmissionRecord) -> KubernetesBackend:
        """Return the backend of a submitted run, with the site as it was then."""
        return cls(KubernetesSite.from_record(record.site))

    @functools.cached_property
    def client(self) -> Client:
        """Return the cluster's client. Raises ClusterError if nothing says where the cluster is."""
        from lorafleet.k8s.client import (
            Client,
        )  # imported here: rendering a manifest without it takes half the time

        return Client(self.site.namespace, self.site.context)

    @functools.cached_property
    def quick_client(self) -> Client:
        """Return a client for status queries.

        It tries a cluster that does not answer twice, not for minutes.
        """
        from lorafleet.k8s.client import Client

        return Client(self.site.namespace, self.site.context, max_retries=1)

    # --- before a run: plan, check, upload inputs

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Return the plan of everything that would happen.

        Raises:
            UserError: The job could not start.
        """
        nodes = choose_node_count(self.site, self.asked_nodes, loaded.job.resources.num_nodes)
        plan = make_plan(
            loaded, self.site.build_allocation(nodes), command, self.site.allow_environment
        )
        placement = plan.placement.model_copy(
            update={"labels": plan.placement.labels | WORKER_LABELS}
        )
        plan = plan.model_copy(
            update={"site": self.site.name, "nodes": nodes, "placement": placement}
        )
        plan = self.apply_remote_paths(plan)
        texts = {
            "job.yaml": loaded.text,
            "resolved.json": dump_resolved(loaded),
            "plan.json": plan.model_dump_json(indent=1),
        }
        manifest = to_yaml(
            render(
                self.site,
                self._build_manifest_context(
                    plan, pack(plan.job.name, texts, ray=get_ray_version())
                ),
            )
        )
        context = ["--context", self.site.context] if self.site.context else []
        line = shlex.join(["kubectl", *context, "apply", "--server-side", "-f", MANIFEST])
        return plan.model_copy(update={"files": {MANIFEST: manifest}, "command_line": line})

    def _build_manifest_context(self, plan: Plan, texts: dict[str, str]) -> RenderContext:
        # The same job on the same site gets the same name on every machine. The plan depends on
        # this machine's cache, so it is not part of the name.
        identity = (
            plan.job.model_dump_json(),
            self.site.model_dump_json(),
            plan.command,
            plan.nodes,
            version("lorafleet"),
        )
        suffix = hashlib.sha256("\0".join(map(str, identity)).encode()).hexdigest()[:6]
        return self._build_context(f"{plan.job.name}-{suffix}", 1, plan.nodes, texts)

    def _build_context(
        self, run: str, submission: int, nodes: int, texts: dict[str, str], call: str = ""
    ) -> RenderContext:
        return RenderContext(
            run=run,
            submission=submission,
            nodes=nodes,
            texts=texts,
            ray_version=get_ray_version(),
            user=self.site.user or get_account(),
            call=call,
        )

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """Check the job against KubeRay's schema, the operator's rules and the site.

        Returns:
            The problems, and what could not be checked; one message each.
        """
        *_, job = yaml.safe_load_all(plan.files[MANIFEST])
        problems, unchecked = self._check_rules(plan, job), self.list_missing_uploads(plan.job)
        schema_errors, schema_note = self._check_schema(job)
        return [*problems, *(f"schema: {error}" for error in schema_errors)], [
            *unchecked,
            *([schema_note] if schema_note else []),
        ]

    def _check_rules(self, plan: Plan, job: Tree) -> list[str]:
        """Return the problems that can be found without contacting the cluster."""
        problems = self.list_invisible_paths(plan.job)
        problems += lint_site(
            nodes=plan.nodes,
            read_write_many=self.site.storage.read_write_many,
            image=self.site.image,
            version=version("lorafleet"),
        )
        try:
            problems += [f"{violation.path}: {violation.sentence}" for violation in lint(job)]
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            # Rules index into the object without checking types. Only a patch can change its form.
            if not self.site.patch:
                raise
            reason = f"{type(error).__name__}: {error}"
            problems.append(
                f"patch of site {self.site.name} sets a field to a value of the wrong type "
                f"({reason})"
            )
        return problems

    def _check_schema(self, job: Tree) -> tuple[list[str], str]:
        """Check a RayJob against the cluster's schema, or else against the schema in a file.

        Returns:
            The schema errors, and a message if the cluster's own schema was not used.
        """
        from lorafleet.k8s.client import Client

        try:
            # A plan must not wait for minutes for a cluster that is down.
            single_try_client = Client(self.site.namespace, self.site.context, max_retries=0)
            definition = single_try_client.get_definition()
            if definition is None:
                return [
                    "the cluster does not know RayJob: an administrator must install KubeRay"
                ], ""
            return crd.Schema.from_definition(definition).list_errors(job), ""
        except ClusterError as error:
            if error.is_forbidden:
                return self._check_with_dry_run(single_try_client, job)
            reason = str(error)
        if os.environ.get(_CRD_VARIABLE):
            return crd.Schema.read(files.expand_home(os.environ[_CRD_VARIABLE])).list_errors(
                job
            ), ""
        return [], (
            "the job was checked against lorafleet's own models, but not against your cluster's "
            f"schema of RayJob ({reason}). To check it offline, set {_CRD_VARIABLE} to a file with "
            "the schema"
        )

    def _check_with_dry_run(self, client: Client, job: Tree) -> tuple[list[str], str]:
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

    def open_storage(self, say: Say) -> contextlib.AbstractContextManager[CommandRunner]:
        """Open access to the storage through a storage pod."""
        return porter.open_storage_pod(self.site, self.client, say)

    # --- submission

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Create the run's local record and its objects on the cluster.

        If the cluster does not answer, the record stays: it is unknown whether the objects exist,
        and `resume` finds out.

        Raises:
            UserError: The cluster refuses the objects; nothing is left behind.
        """
        *_, job = yaml.safe_load_all(plan.files[MANIFEST])
        problems = self._check_rules(plan, job)
        if problems:
            raise PlacementRefused("\n".join(problems))
        _ = self.client  # fail before the folder is written if no cluster is configured
        run = write_run(plan.model_copy(update={"files": {}, "command_line": ""}), loaded, runs)
        try:
            self._submit_objects(run, self._make_record(plan.nodes, 1))
        # Also an interrupt: objects may exist by now.
        except BaseException as error:  # noqa: BLE001
            record = find_record(run)
            is_surely_gone = record is None or record.taken_back
            self._raise_submission_failure(run, error, for_sure=is_surely_gone)
        registry.add(run, self.site.name)
        return run

    def _make_record(self, nodes: int, submission: int, call: str = "") -> SubmissionRecord:
        return SubmissionRecord(
            kind=self.site.kind,
            site=self.site.model_dump(mode="json"),
            nodes=nodes,
            submission=submission,
            call=call or secrets.token_hex(8),
        )

    def _submit_objects(self, run: Run, record: SubmissionRecord) -> None:
        """Create the objects of a submission.

        Their names and the mark of this call are recorded first, so that a repeated call
        recognises its own objects.
        """
        texts = {name: (run.path / name).read_text() for name in TEXTS}
        packed = pack(str(run.read_status().name), texts, record.submission, get_ray_version())
        context = self._build_context(run.id, record.submission, record.nodes, packed, record.call)
        objects = render(self.site, context)
        files.write_text(run.path / MANIFEST, to_yaml(objects))
        record_submission(run, record)
        try:
            *other_objects, job = [self._create_object(tree, record.call) for tree in objects]
            # Owned objects are deleted with the RayJob. They are created before it, and its uid is
            # known only now.
            for tree in other_objects:
                self.client.set_owner(job, tree["kind"], tree["metadata"]["name"])
        except BaseException as error:
            # Without an answer it is unknown whether an object exists. Nothing is deleted then:
            # `resume` finds out.
            is_unanswered = isinstance(error, ClusterError) and not error.is_refused
            taken_back = not is_unanswered and self._delete_created_objects(objects, record.call)
            update_record(run, record.submission, taken_back=taken_back)
            raise
        update_record(run, record.submission, handed_over=True)

    def _create_object(self, tree: Tree, call: str) -> Tree:
        """Create an object, or return the one that the same call created before.

        The request is repeated if an answer is lost, and then meets the object of the first
        try.

        Args:
            tree: The object, with the mark of the call among its annotations.
            call: The mark.

        Raises:
            RunError: An object of this name exists, and another call created it.
        """
        kind, name = tree["kind"], tree["metadata"]["name"]
        try:
            return {"kind": kind, "apiVersion": tree["apiVersion"]} | self.client.create(tree)
        except Conflict as error:
            existing = self.client.get(kind, name)
            if existing is None or not _is_from_call(existing, call):
                conflict = f"a {kind} {name} exists already, and another command created it"
                raise RunError(f"{conflict}: it was not changed") from error
            return {"kind": kind, "apiVersion": tree["apiVersion"]} | existing

    def _delete_created_objects(self, objects: list[Tree], call: str) -> bool:
        """Delete the objects that a call created; return whether surely none of them is left."""
        try:
            for tree in reversed(objects):
                existing = self.client.get(tree["kind"], tree["metadata"]["name"])
                if existing and _is_from_call(existing, call):
                    self.client.delete(tree["kind"], tree["metadata"]["name"])
        except ClusterError:
            return False
        return True

    def resume(self, run: Run) -> None:
        """Submit an unfinished run again, as a new RayJob.

        A submission that the cluster never confirmed is repeated under its own number and mark.
        Otherwise the ended RayJob is deleted and the next number is used.

        Raises:
            RunError: A RayJob of the run is still active or being deleted.
            ClusterError: The cluster does not answer.
        """
        record, name = read_record(run), self.get_object_name(run)
        job = self.client.get("RayJob", name)
        if not record.handed_over:
            return self._submit_objects(
                run, self._make_record(record.nodes, record.submission, record.call)
            )
        if (job or {}).get("metadata", {}).get("deletionTimestamp") or (
            job is None and self._has_running_pods(run)
        ):
            raise RunError(
                f"RayJob {name} of {run.id} is still being deleted: try again in a minute"
            )
        if job is not None:
            current = parse_job_state(job.get("status"), queued=self._uses_kueue)
            if not current.ended:
                raise RunError(f"{run.id} already has RayJob {name}, which {current.sentence}")
            self.kill(run)  # its head may still exist, to keep its logs
        return self._submit_objects(run, self._make_record(record.nodes, record.submission + 1))

    # --- during a run

    def get_run_folder(self, run: str) -> str:
        """Return the folder of a run as pods see it."""
        return get_run_folder(self.site, run)

    def find_newest_submission(self, run: str) -> int:
        """Return the number of a run's newest submission.

        The RayJobs on the cluster tell it, by their labels. It is 1 if the cluster has
        forgotten all of them.

        Raises:
            ClusterError: The cluster does not answer.
        """
        jobs = self.client.list_rayjobs({RUN_LABEL: to_label_value(run)})
        return max(
            (int(job["metadata"]["labels"].get(ATTEMPT_LABEL) or 1) for job in jobs), default=1
        )

    def get_object_name(self, run: Run) -> str:
        """Return the name of the run's newest objects."""
        return make_object_name(run.id, read_record(run).submission)

    @property
    def _uses_kueue(self) -> bool:
        return self.site.scheduler.kind == "kueue"

    def derive_status(self, run: Run, job: Tree | None) -> RunStatus:
        """Return the status of a run, given its RayJob."""
        # The RayJob is gone at once, but its pods live until their preStop hooks have saved the
        # trials.
        if job is None and read_record(run).stopping and self._has_running_pods(run):
            return RunStatus(
                RunState.RUNNING,
                "its RayJob was deleted; its pods are saving their trials and will stop",
            )
        return derive_status(run, self.get_object_name(run), job, queued=self._uses_kueue)

    def _has_running_pods(self, run: Run) -> bool:
        """Return whether pods of a run still run; False if the cluster cannot be asked."""
        with contextlib.suppress(UserError):
            pods = self.quick_client.list_pods(
                porter.build_submission_labels(run, read_record(run).submission)
            )
            return any(pod.get("status", {}).get("phase") == "Running" for pod in pods)
        return False

    def status(self, run: Run) -> RunStatus:
        """Return the run's status from the cluster.

        A final state is recorded in site.json, for the time when the RayJob is deleted. If the
        cluster does not answer, the last recorded status is returned.
        """
        try:
            job = self.quick_client.get("RayJob", self.get_object_name(run))
        except ClusterError as error:
            return read_last_status(run) or RunStatus(
                run.state, f"{error}; the last recorded state is {run.state}", fresh=False
            )
        status = self.derive_status(run, job)
        if status.state is RunState.PENDING and job is not None:
            reason = self.explain_pending(run, job)
            return RunStatus(status.state, status.message + (f": {reason}" if reason else ""))
        if job is not None and parse_job_state(job.get("status")).ended:
            record_final_state(run, read_record(run).submission, status)
        return status

    def explain_pending(self, run: Run, job: Tree) -> str:
        """Return why pods of a run do not start; an empty string if no event says so.

        Events of the RayJob, its Ray cluster, its pending pods and, with Kueue, its Workload
        are searched. Errors of the cluster are ignored: the explanation is optional.

        Args:
            job: The RayJob, as the server returned it.
        """
        name = self.get_object_name(run)
        with contextlib.suppress(UserError):
            events = self.quick_client.list_events(name=name)
            cluster = (job.get("status") or {}).get("rayClusterName")
            if cluster:
                events += self.quick_client.list_events(name=cluster)
            for pod in self.quick_client.list_pods(
                porter.build_submission_labels(run, read_record(run).submission)
            ):
                if pod.get("status", {}).get("phase") == "Pending":
                    events += self.quick_client.list_events(name=pod["metadata"]["name"])
            if self._uses_kueue:
                queue = self.quick_client.list_events(kind="Workload")
                events += [
                    # Kueue calls the Workload of a RayJob `rayjob-NAME-HASH`.
                    event
                    for event in queue
                    if f"rayjob-{name}" in event["involvedObject"]["name"]
                ]
            return find_pending_reason(events) or ""
        return ""

    def refresh(self, run: Run, say: Say = ignore_message) -> None:
        """Download what the run has written since the last call.

        That is its record through its head, or else its driver's output. The record of a run that
        has ended is downloaded once, through a storage pod if its own pods are gone.
        """
        number = read_record(run).submission
        try:
            if self.download_from_head(run, number):
                return
            job = self.quick_client.get("RayJob", self.get_object_name(run))
            record = read_record(run)
            is_live = self.derive_status(run, job).state in (RunState.PENDING, RunState.RUNNING)
            if record.handed_over and not is_live:
                if not record.collected and record.tries < _MAX_DOWNLOAD_TRIES:
                    say(
                        f"{run.id} has ended and its pods are gone: downloading its record through "
                        "a storage pod"
                    )
                    self.collect(run, number, ran=job is None or has_started_driver(job))
                return
            self._save_driver_output(run, number)
        except ClusterError:
            return  # `status` reports it

    def download_from_head(self, run: Run, submission: int) -> bool:
        """Download a run's record through its head.

        Returns False if the head is not running or refuses the command.

        Raises:
            ClusterError: No API server answers.
        """
        head = porter.find_head(self.quick_client, run, submission)
        if head is None:
            return False
        try:
            download_record(head, self.get_run_folder(run.id), run, wait=False)
        except (ClusterError, CommandFailed):
            return False
        if not (
            run.path / "logs" / "driver.log"
        ).is_file():  # the driver's own log has not come yet
            self._save_driver_output(run, submission)
        return True

    def _save_driver_output(self, run: Run, submission: int) -> None:
        """Save the driver's output from the submitter pod's log.

        Do nothing if the driver's own log is here.
        """
        with contextlib.suppress(ClusterError):
            output = porter.read_submitter_log(self.quick_client, run, submission)
            if output and not (run.path / "logs" / "driver.log").is_file():
                files.write_text(run.path / "logs" / "submitter.log", output)

    def collect(self, run: Run, submission: int, *, ran: bool) -> None:
        """Download the record of a submission that has ended.

        A failure is recorded, and the run's status shows it.

        Args:
            ran: Whether a driver started, so that there is something to download through a
                storage pod.
        """
        self._save_driver_output(run, submission)
        with record_if_missing(run, submission):
            self._download(
                run, submission, "none", through_pod=ran, up_seconds=_FINAL_POD_TIMEOUT_SECONDS
            )

    def pull(self, run: Run, weights: WeightSelection, say: Say) -> int:
        """Download a run's record, W&B's files and the selected weights.

        Unlike `refresh`, this waits for a transfer that is under way and for a slow storage
        pod, and it raises errors.

        Returns:
            The number of files.

        Raises:
            UserError: The files could not be downloaded.
        """
        number = read_record(run).submission
        count = self._download(run, number, weights, include_wandb=True, say=say)
        update_record(run, number, missing=None, collected=True)
        return count

    def _download(
        self,
        run: Run,
        submission: int,
        weights: WeightSelection,
        *,
        include_wandb: bool = False,
        through_pod: bool = True,
        say: Say = ignore_message,
        up_seconds: float | None = None,
    ) -> int:
        """Download a run's record through its head, or else through a storage pod.

        Args:
            through_pod: Start a storage pod if the head is gone.
            up_seconds: How long to wait for that pod; None: the default of `open_storage_pod`.

        Returns:
            The number of files; 0 if the head is gone and `through_pod` is false.
        """
        head = porter.find_head(self.client, run, submission)
        if head is not None:
            return download_record(
                head, self.get_run_folder(run.id), run, weights, include_wandb=include_wandb
            )
        if not through_pod:
            return 0
        with porter.open_storage_pod(self.site, self.client, say, up_seconds) as runner:
            return download_record(
                runner, self.get_run_folder(run.id), run, weights, include_wandb=include_wandb
            )

    def watch(self, run: Run) -> KubernetesWatch:
        """Return a watch that follows the run's RayJob."""
        return KubernetesWatch(self, run)

    def cancel(self, run: Run) -> str:
        """Delete the run's RayJob: the operator ends the driver, which has all trials saved first.

        This returns at once. Saving takes up to `deadlines.save_seconds`; `status` shows when
        the pods are gone.

        Returns:
            A message that says what happens.

        Raises:
            RunError: The run has no RayJob that waits or runs.
        """
        name, job = self.get_object_name(run), self.client.get("RayJob", self.get_object_name(run))
        if job is None or parse_job_state(job.get("status")).ended:
            raise RunError(
                f"{run.id} has no pending or running RayJob: it is {self.status(run).state}"
            )
        update_record(run, read_record(run).submission, stopping=True)
        self.kill(run)
        return (
            f"{run.id} is saving its trials and will stop (RayJob {name} is being deleted). "
            f"Continue it with `lorafleet resume {run.id}`; `lorafleet pull {run.id}` downloads "
            "what it has so far"
        )

    def kill(self, run: Run) -> None:
        """Delete the run's RayJob with everything that belongs to it."""
        self.client.delete("RayJob", self.get_object_name(run))

    def collect_findings(self) -> list[Finding]:
        """Check that the cluster has what a job needs, and start a pod of the image."""
        from lorafleet.k8s.doctor import collect_findings

        return collect_findings(self.site, self.client)


def _is_from_call(tree: Tree, call: str) -> bool:
    return bool((tree["metadata"].get("annotations") or {}).get(CALL_ANNOTATION) == call)
