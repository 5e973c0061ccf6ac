"""The Kubernetes backend: a run is a KubeRay RayJob, one for each submission.

The run's local folder is a record: its plan, its last reported status, and copies of what the
run writes to the storage.
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lorafleet.cluster import submitted_runs as registry
from lorafleet.cluster.backend import RunStatus, Say, WeightSelection, ignore_message
from lorafleet.cluster.planning.earlier_runs import read_earlier_trials
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.remote.backend import RemoteBackend
from lorafleet.cluster.remote.place import CommandRunner
from lorafleet.cluster.submission import (
    SubmissionRecord,
    find_record,
    read_record,
    update_record,
    write_run,
)
from lorafleet.jobs.errors import PlacementRefused, RunError
from lorafleet.jobs.extras import get_ray_version
from lorafleet.jobs.loading.job_file import LoadedJob, dump_resolved
from lorafleet.jobs.runs.bundle import pack
from lorafleet.jobs.runs.plan import MANIFEST, Plan
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.sites.kubernetes import WORKER_LABELS, KubernetesSite
from lorafleet.jobs.sites.placement import choose_node_count
from lorafleet.k8s import storage_pod as porter
from lorafleet.k8s.connections import Connections
from lorafleet.k8s.errors import ClusterError
from lorafleet.k8s.job_status import JobStatusReader
from lorafleet.k8s.manifest_check import check_rules, check_schema
from lorafleet.k8s.record_sync import RecordSync
from lorafleet.k8s.render import (
    ATTEMPT_LABEL,
    RUN_LABEL,
    RenderContext,
    get_run_folder,
    render,
    to_label_value,
    to_yaml,
)
from lorafleet.k8s.states import parse_job_state
from lorafleet.k8s.submitter import Submitter, build_render_context, make_submission_record
from lorafleet.k8s.watch import KubernetesWatch, has_started_driver

if TYPE_CHECKING:
    from lorafleet.cluster.doctor import Finding
    from lorafleet.k8s.client import Client, Tree

_MAX_DOWNLOAD_TRIES = 3
"""How often `refresh` tries to download the record of an ended run."""


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
        self.connections = Connections(site)
        self.job_status = JobStatusReader(site, self.connections)
        self.sync = RecordSync(site, self.connections)

    @classmethod
    def from_record(cls, record: SubmissionRecord) -> KubernetesBackend:
        """Return the backend of a submitted run, with the site as it was then."""
        return cls(KubernetesSite.from_record(record.site))

    @property
    def client(self) -> Client:
        """Return the cluster's client. Raises ClusterError if nothing says where the cluster is."""
        return self.connections.client

    # --- before a run: plan, check, upload inputs

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Return the plan of everything that would happen.

        Raises:
            UserError: The job could not start.
        """
        nodes = choose_node_count(self.site, self.asked_nodes, loaded.job.resources.num_nodes)
        plan = make_plan(
            loaded,
            self.site.build_allocation(nodes),
            command,
            self.site.allow_environment,
            read_earlier_trials(loaded.job.model.model_name_or_path, self.site.name),
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
        return build_render_context(self.site, f"{plan.job.name}-{suffix}", 1, plan.nodes, texts)

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """Check the job against KubeRay's schema, the operator's rules and the site.

        Returns:
            The problems, and what could not be checked; one message each.
        """
        *_, job = yaml.safe_load_all(plan.files[MANIFEST])
        problems = self._check_rules(plan, job)
        schema_errors, schema_note = check_schema(self.site, job)
        problems += [f"schema: {error}" for error in schema_errors]
        return problems, [schema_note] if schema_note else []

    def _check_rules(self, plan: Plan, job: Tree) -> list[str]:
        """Return the problems that can be found without contacting the cluster."""
        return self.list_invisible_paths(plan.job) + check_rules(self.site, plan.nodes, job)

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
            self._submitter.submit(run, make_submission_record(self.site, plan.nodes, 1))
        # Also an interrupt: objects may exist by now.
        except BaseException as error:  # noqa: BLE001
            record = find_record(run)
            is_surely_gone = record is None or record.taken_back
            self._raise_submission_failure(run, error, for_sure=is_surely_gone)
        registry.add(run, self.site.name)
        return run

    @property
    def _submitter(self) -> Submitter:
        return Submitter(self.site, self.client)

    def resume(self, run: Run) -> None:
        """Submit an unfinished run again, as a new RayJob.

        A submission that the cluster never confirmed is repeated under its own number and mark.
        Otherwise the ended RayJob is deleted and the next number is used.

        Raises:
            RunError: A RayJob of the run is still active or being deleted.
            ClusterError: The cluster does not answer.
        """
        record, name = read_record(run), self.job_status.get_object_name(run)
        job = self.client.get("RayJob", name)
        if not record.handed_over:
            repeated = make_submission_record(
                self.site, record.nodes, record.submission, record.call
            )
            return self._submitter.submit(run, repeated)
        if (job or {}).get("metadata", {}).get("deletionTimestamp") or (
            job is None and self.job_status.has_running_pods(run)
        ):
            raise RunError(
                f"RayJob {name} of {run.id} is still being deleted: try again in a minute"
            )
        if job is not None:
            current = parse_job_state(job.get("status"), queued=self.job_status.uses_kueue)
            if not current.ended:
                raise RunError(f"{run.id} already has RayJob {name}, which {current.sentence}")
            self.kill(run)  # its head may still exist, to keep its logs
        following = make_submission_record(self.site, record.nodes, record.submission + 1)
        return self._submitter.submit(run, following)

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

    def status(self, run: Run) -> RunStatus:
        """Return the run's status from the cluster (see `JobStatusReader.read`)."""
        return self.job_status.read(run)

    def observe(self, run: Run) -> RunStatus:
        """Return the run's status from the cluster (see `JobStatusReader.observe`)."""
        return self.job_status.observe(run)

    def refresh(self, run: Run, say: Say = ignore_message) -> None:
        """Download what the run has written since the last call.

        That is its record through its head, or else its driver's output. The record of a run that
        has ended is downloaded once, through a storage pod if its own pods are gone.
        """
        number = read_record(run).submission
        try:
            if self.sync.download_from_head(run, number):
                return
            job = self.connections.quick_client.get("RayJob", self.job_status.get_object_name(run))
            record = read_record(run)
            is_live = self.job_status.derive(run, job).state in (RunState.PENDING, RunState.RUNNING)
            if record.handed_over and not is_live:
                if not record.collected and record.tries < _MAX_DOWNLOAD_TRIES:
                    say(
                        f"{run.id} has ended and its pods are gone: downloading its record through "
                        "a storage pod"
                    )
                    self.sync.collect(run, number, ran=job is None or has_started_driver(job))
                return
            self.sync.save_driver_output(run, number)
        except ClusterError:
            return  # `status` reports it

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
        count = self.sync.download(run, number, weights, include_wandb=True, say=say)
        update_record(run, number, missing=None, collected=True)
        return count

    def watch(self, run: Run) -> KubernetesWatch:
        """Return a watch that follows the run's RayJob."""
        return KubernetesWatch(run, self.connections, self.job_status, self.sync)

    def cancel(self, run: Run) -> str:
        """Delete the run's RayJob: the operator ends the driver, which has all trials saved first.

        This returns at once. Saving takes up to `deadlines.save_seconds`; `status` shows when
        the pods are gone.

        Returns:
            A message that says what happens.

        Raises:
            RunError: The run has no RayJob that waits or runs.
        """
        name = self.job_status.get_object_name(run)
        job = self.client.get("RayJob", name)
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
        self.client.delete("RayJob", self.job_status.get_object_name(run))

    def collect_findings(self) -> list[Finding]:
        """Check that the cluster has what a job needs, and start a pod of the image."""
        from lorafleet.k8s.doctor import collect_findings

        return collect_findings(self.site, self.client)
