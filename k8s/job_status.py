"""Read the status of a run from its RayJob, its pods and their events."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafleet.cluster.backend import RunStatus
from lorafleet.cluster.submission import (
    infer_unknown_status,
    read_last_status,
    read_own_state,
    read_record,
    record_final_state,
)
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.k8s.connections import Connections
from lorafleet.k8s.errors import ClusterError
from lorafleet.k8s.render import make_object_name
from lorafleet.k8s.states import find_pending_reason, parse_job_state
from lorafleet.k8s.storage_pod import build_submission_labels

if TYPE_CHECKING:
    from lorafleet.k8s.client import Tree


@dataclass(frozen=True)
class JobStatusReader:
    """Reads the status of the runs of a site."""

    site: KubernetesSite
    connections: Connections

    @property
    def uses_kueue(self) -> bool:
        """Return whether Kueue admits the jobs of the site."""
        return self.site.scheduler.kind == "kueue"

    def get_object_name(self, run: Run) -> str:
        """Return the name of the run's newest objects."""
        return make_object_name(run.id, read_record(run).submission)

    def read(self, run: Run) -> RunStatus:
        """Return the run's status from the cluster.

        A final state is recorded in site.json, for the time when the RayJob is deleted. If the
        cluster does not answer, the last recorded status is returned.
        """
        try:
            job = self._get_job(run)
        except ClusterError as error:
            return read_last_status(run) or RunStatus(
                run.state, f"{error}; the last recorded state is {run.state}", fresh=False
            )
        status = self.derive(run, job)
        if status.state is RunState.PENDING and job is not None:
            reason = self.explain_pending(run, job)
            return RunStatus(status.state, status.message + (f": {reason}" if reason else ""))
        if job is not None and parse_job_state(job.get("status")).ended:
            record_final_state(run, read_record(run).submission, status)
        return status

    def observe(self, run: Run) -> RunStatus:
        """Return the run's status from the cluster, and record nothing.

        Raises ClusterError if the cluster does not answer.
        """
        return self.derive(run, self._get_job(run))

    def _get_job(self, run: Run) -> Tree | None:
        return self.connections.quick_client.get("RayJob", self.get_object_name(run))

    def derive(self, run: Run, job: Tree | None) -> RunStatus:
        """Return the status of a run, given its RayJob."""
        # The RayJob is gone at once, but its pods live until their preStop hooks have saved the
        # trials.
        if job is None and read_record(run).stopping and self.has_running_pods(run):
            return RunStatus(
                RunState.RUNNING,
                "its RayJob was deleted; its pods are saving their trials and will stop",
            )
        return derive_status(run, self.get_object_name(run), job, queued=self.uses_kueue)

    def has_running_pods(self, run: Run) -> bool:
        """Return whether pods of a run still run; False if the cluster cannot be asked."""
        with contextlib.suppress(UserError):
            pods = self.connections.quick_client.list_pods(
                build_submission_labels(run, read_record(run).submission)
            )
            return any(pod.get("status", {}).get("phase") == "Running" for pod in pods)
        return False

    def explain_pending(self, run: Run, job: Tree) -> str:
        """Return why pods of a run do not start; an empty string if no event says so.

        Events of the RayJob, its Ray cluster, its pending pods and, with Kueue, its Workload
        are searched. Errors of the cluster are ignored: the explanation is optional.

        Args:
            run: The run.
            job: The RayJob, as the server returned it.
        """
        with contextlib.suppress(UserError):
            return find_pending_reason(self._list_events(run, job)) or ""
        return ""

    def _list_events(self, run: Run, job: Tree) -> list[Tree]:
        """Return the events of everything that belongs to a run and may wait."""
        client, name = self.connections.quick_client, self.get_object_name(run)
        events = client.list_events(name=name)
        cluster = (job.get("status") or {}).get("rayClusterName")
        if cluster:
            events += client.list_events(name=cluster)
        for pod in client.list_pods(build_submission_labels(run, read_record(run).submission)):
            if pod.get("status", {}).get("phase") == "Pending":
                events += client.list_events(name=pod["metadata"]["name"])
        if self.uses_kueue:
            # Kueue calls the Workload of a RayJob `rayjob-NAME-HASH`.
            events += [
                event
                for event in client.list_events(kind="Workload")
                if f"rayjob-{name}" in event["involvedObject"]["name"]
            ]
        return events


def derive_status(run: Run, name: str, job: Tree | None, *, queued: bool) -> RunStatus:
    """Return the status of a run from its RayJob and its local record.

    The cluster decides while the RayJob lives. At its end, what the run itself recorded is
    more exact than the three end states of Ray.

    Args:
        name: Name of the RayJob, for messages.
        job: The RayJob; None if it does not exist.
        queued: True if a queue admits the job.
    """
    if job is None:
        return infer_unknown_status(
            run, f"RayJob {name} is no longer on the cluster, and lorafleet did not delete it"
        )
    state = parse_job_state(job.get("status"), queued=queued)
    if job.get("metadata", {}).get("deletionTimestamp") and not state.ended:
        return RunStatus(
            RunState.RUNNING, f"RayJob {name} is being deleted: its trials are saved first"
        )
    if not state.ended:
        return RunStatus(state.run, f"RayJob {name} {state.sentence}")
    own_state, reason = read_own_state(run)
    if state.run is RunState.FINISHED and own_state in (RunState.STOPPED, RunState.FAILED):
        return RunStatus(
            own_state, reason
        )  # Ray counts the job as succeeded, because a retry on another cluster could not help
    if state.run is RunState.FINISHED:
        return RunStatus(state.run, reason)
    # The driver's own reason says more than Ray's `exit code 2`.
    if state.run is RunState.FAILED and own_state is RunState.FAILED and reason:
        return RunStatus(RunState.FAILED, reason)
    if state.run is RunState.STOPPED:
        return RunStatus(
            RunState.STOPPED,
            f"RayJob {name} {state.sentence}; continue it with `lorafleet resume {run.id}`",
        )
    missing = reason if own_state is None else ""
    return RunStatus(
        state.run, "; ".join(filter(None, [f"RayJob {name} {state.sentence}", missing]))
    )
