"""Access to a Kubernetes site's storage, through a running head or through a storage pod."""

from __future__ import annotations

import contextlib
import getpass
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafleet.cluster.backend import Say
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.k8s.errors import ClusterError, Conflict
from lorafleet.k8s.render import (
    ATTEMPT_LABEL,
    HEAD,
    RUN_LABEL,
    STORAGE_POD,
    render_storage_pod,
    to_label_value,
)
from lorafleet.k8s.states import find_pending_reason

if TYPE_CHECKING:
    from lorafleet.k8s.client import Client

_MAX_LIFETIME_SECONDS = 4 * 3600
"""Seconds after which a storage pod ends by itself, even if its creator has died."""
_START_TIMEOUT_SECONDS = 600.0
"""Seconds to wait for a storage pod to start: its image may have to be pulled."""


@dataclass(frozen=True)
class StorageContainer:
    """A container that mounts the storage.

    It is the `CommandRunner` of this backend (cluster/remote/place.py): a running head and
    a storage pod are used alike.
    """

    client: Client
    pod: str
    container: str

    def run(
        self, command: list[str], take: Callable[[bytes], object], feed: Iterable[bytes] = ()
    ) -> None:
        """Run a command in the container. Raises ClusterError and CommandFailed."""
        self.client.run_command(self.pod, self.container, command, take, feed)


def build_submission_labels(run: Run, submission: int) -> dict[str, str]:
    """Return the labels that the pods of one RayJob of a run carry."""
    return {RUN_LABEL: to_label_value(run.id), ATTEMPT_LABEL: str(submission)}


def find_head(client: Client, run: Run, submission: int) -> StorageContainer | None:
    """Return the head of a run's Ray cluster if it is running, else None.

    Raises:
        ClusterError: The cluster does not answer.
    """
    for pod in client.list_pods(
        build_submission_labels(run, submission) | {"ray.io/node-type": "head"}
    ):
        # The pod's phase is not enough: with a second container, such as the autoscaler's, a pod
        # can run while its head does not.
        states = pod.get("status", {}).get("containerStatuses") or []
        if any(
            status["name"] == HEAD and "running" in (status.get("state") or {}) for status in states
        ):
            return StorageContainer(client, pod["metadata"]["name"], HEAD)
    return None


@contextlib.contextmanager
def open_storage_pod(
    site: KubernetesSite, client: Client, say: Say, up_seconds: float | None = None
) -> Iterator[StorageContainer]:
    """Start a storage pod and yield its container; delete the pod on exit.

    Args:
        up_seconds: How long to wait for the pod to start; by default 10 minutes.

    Raises:
        ClusterError: The API server does not answer or refuses.
        UserError: The pod does not start.
    """
    name = f"lorafleet-{STORAGE_POD}-{secrets.token_hex(3)}"
    try:
        with contextlib.suppress(Conflict):  # this call created it: the first response was lost
            client.create(render_storage_pod(site, name, get_account(), _MAX_LIFETIME_SECONDS))
        yield StorageContainer(
            client,
            _wait_until_running(client, name, say, up_seconds or _START_TIMEOUT_SECONDS),
            STORAGE_POD,
        )
    finally:
        with contextlib.suppress(
            ClusterError
        ):  # the pod ends by itself after _MAX_LIFETIME_SECONDS
            client.delete("Job", name)


def get_account() -> str:
    """Return the local account name, or `unknown` if there is none (possible in a container)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _wait_until_running(client: Client, name: str, say: Say, seconds: float) -> str:
    """Return the name of a Job's pod once it runs.

    Args:
        say: Called with each new reason why the pod waits.
        seconds: How long to wait.

    Raises:
        UserError: The pod ended, or did not start in time.
        ClusterError: The cluster does not answer.
    """
    deadline, last_reason = time.monotonic() + seconds, ""
    reason: str | None = None
    while time.monotonic() < deadline:
        for pod in client.list_pods({"job-name": name}):
            phase = pod.get("status", {}).get("phase")
            if phase == "Running":
                return str(pod["metadata"]["name"])
            if phase in ("Failed", "Succeeded"):
                raise UserError(
                    f"storage pod {pod['metadata']['name']} ended before the transfer began "
                    f"({phase}): run the command again, or see `kubectl describe pod "
                    f"{pod['metadata']['name']}`"
                )
            reason = find_pending_reason(client.list_events(name=pod["metadata"]["name"]))
        # If there is no pod at all, the Job's events say why: a quota, or a refused pod.
        reason = reason or find_pending_reason(client.list_events(name=name))
        if reason and reason != last_reason:
            last_reason = reason
            say(f"the storage pod is waiting: {reason}")
        time.sleep(0.5)
    time_limit = f"within {seconds / 60:.0f} minutes"
    raise UserError(
        f"the storage pod did not start {time_limit}: {reason or 'the cluster gives no reason'}"
    )


def read_submitter_log(client: Client, run: Run, submission: int) -> str:
    """Return the log of the newest submitter pod, which is the driver's output.

    It is empty if there is no such pod: with KAI jobs are submitted without one.

    Raises:
        ClusterError: The log cannot be read.
    """
    # Of a run's pods only the submitter belongs to a Job, and so has this label.
    pods = client.list_pods(build_submission_labels(run, submission) | {"job-name": ""})
    return client.read_log(pods[0]["metadata"]["name"]) if pods else ""


def build_storage_key(site: KubernetesSite) -> str:
    """Return the key that distinguishes a site's storage from that of other sites.

    What was uploaded is remembered under this key (cluster/remote/staging.py), so sites
    that share a volume and folder share their uploads.
    """
    return "/".join(
        [site.context or "", site.namespace, site.storage.claim, site.storage.sub_path or ""]
    )
