"""Reaching the storage of a Kubernetes site: through the head of a run that is up, or through a pod made for it."""

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
from lorafleet.k8s.render import ATTEMPT_LABEL, HEAD, PORTER, RUN_LABEL, label, porter
from lorafleet.k8s.states import why_pending

if TYPE_CHECKING:
    from lorafleet.k8s.client import Client

_LIVES_SECONDS = 4 * 3600
"""After which a pod that was made for a transfer ends by itself, whatever became of the one who made it."""
_UP_SECONDS = 600.0
"""How long one may wait for such a pod: its image may have to be pulled."""


@dataclass(frozen=True)
class Inside:
    """A container that sees the storage."""

    client: Client
    pod: str
    container: str

    def run(self, command: list[str], take: Callable[[bytes], object], feed: Iterable[bytes] = ()) -> None:
        """Run a command there. Raises ClusterError and CommandFailed."""
        self.client.run_in(self.pod, self.container, command, take, feed)


def labels_of_submission(run: Run, submission: int) -> dict[str, str]:
    """What the pods of one RayJob of a run carry."""
    return {RUN_LABEL: label(run.id), ATTEMPT_LABEL: str(submission)}


def head_of(client: Client, run: Run, submission: int) -> Inside | None:
    """The head of a run's cluster where it is up. Raises ClusterError."""
    for pod in client.pods(labels_of_submission(run, submission) | {"ray.io/node-type": "head"}):
        states = pod.get("status", {}).get("containerStatuses") or []
        if any(one["name"] == HEAD and "running" in (one.get("state") or {}) for one in states):
            return Inside(client, pod["metadata"]["name"], HEAD)
    return None


@contextlib.contextmanager
def pod_for(site: KubernetesSite, client: Client, say: Say, up_seconds: float | None = None) -> Iterator[Inside]:
    """A pod that sees the storage, for as long as it is wanted. Raises ClusterError, and UserError when none comes."""
    name = f"lorafleet-{PORTER}-{secrets.token_hex(3)}"
    try:
        with contextlib.suppress(Conflict):  # our own: the first answer was lost
            client.create(porter(site, name, account(), _LIVES_SECONDS))
        yield Inside(client, _up(client, name, say, up_seconds or _UP_SECONDS), PORTER)
    finally:
        with contextlib.suppress(ClusterError):  # it ends by itself in the end
            client.delete("Job", name)


def account() -> str:
    """The account here; a container may have none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _up(client: Client, name: str, say: Say, seconds: float) -> str:
    """The pod of a Job once it runs."""
    ends, told = time.monotonic() + seconds, ""
    why: str | None = None
    while time.monotonic() < ends:
        for pod in client.pods({"job-name": name}):
            phase = pod.get("status", {}).get("phase")
            if phase == "Running":
                return str(pod["metadata"]["name"])
            if phase in ("Failed", "Succeeded"):
                raise UserError(f"pod {pod['metadata']['name']} ended before anything went through it ({phase})")
            why = why_pending(client.events(name=pod["metadata"]["name"]))
        why = why or why_pending(client.events(name=name))
        if why and why != told:
            told = why
            say(f"the pod for the transfer waits: {why}")
        time.sleep(0.5)
    within = f"within {seconds / 60:.0f} minutes"
    raise UserError(f"the pod for the transfer did not start {within}: {why or 'no reason is given'}")


def submitters_words(client: Client, run: Run, submission: int) -> str:
    """What the newest submitter's pod has said: the driver's output. Raises ClusterError."""
    pods = client.pods(labels_of_submission(run, submission) | {"job-name": ""})
    return client.log(pods[0]["metadata"]["name"]) if pods else ""


def storage_key(site: KubernetesSite) -> str:
    """What tells a site's storage from another's."""
    return "/".join([site.context or "", site.namespace, site.storage.claim, site.storage.sub_path or ""])
