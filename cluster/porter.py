"""Reaching the storage of a Kubernetes site: through the head of a run that is up, or through a pod made for it."""

from __future__ import annotations

import contextlib
import getpass
import json
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.backend import Say
from cluster.transfer import Cargo, Unpacker, Which, framed, known
from jobs.errors import UserError
from jobs.kubernetes_site import KubernetesSite
from jobs.run import Run
from k8s.errors import CommandFailed
from k8s.render import ATTEMPT_LABEL, HEAD, PORTER, RUN_LABEL, porter, run_folder, run_label
from k8s.states import why_pending

if TYPE_CHECKING:
    from k8s.client import Client

_LIVES_SECONDS = 4 * 3600
"""After which a pod that was made for a transfer ends by itself, whatever became of the one who made it."""
_UP_SECONDS = 600.0
"""How long one may wait for such a pod: its image may have to be pulled."""


@dataclass(frozen=True)
class Place:
    """A container that sees the storage."""

    client: Client
    pod: str
    container: str

    def ask(self, command: list[str], question: Any) -> Any:
        """Run a command that reads one line of JSON and prints one. Raises ClusterError and CommandFailed."""
        said = bytearray()
        self.client.run_in(self.pod, self.container, command, said.extend, [json.dumps(question).encode() + b"\n"])
        try:
            return json.loads(said)
        except ValueError as error:
            raise CommandFailed(f"{' '.join(command)} in pod {self.pod} printed no answer: {said[:200]!r}") from error


def labels_of_submission(run: Run, submission: int) -> dict[str, str]:
    """What the pods of one RayJob of a run carry."""
    return {RUN_LABEL: run_label(run.id), ATTEMPT_LABEL: str(submission)}


def head_of(client: Client, run: Run, submission: int) -> Place | None:
    """The head of a run's cluster where it is up. Raises ClusterError."""
    for pod in client.pods(labels_of_submission(run, submission) | {"ray.io/node-type": "head"}):
        states = pod.get("status", {}).get("containerStatuses") or []
        if any(one["name"] == HEAD and "running" in (one.get("state") or {}) for one in states):
            return Place(client, pod["metadata"]["name"], HEAD)
    return None


@contextlib.contextmanager
def pod_for(site: KubernetesSite, client: Client, say: Say, up_seconds: float | None = None) -> Iterator[Place]:
    """A pod that sees the storage, for as long as it is wanted. Raises ClusterError, and UserError when none comes."""
    name = f"lorafleet-{PORTER}-{secrets.token_hex(3)}"
    client.create(porter(site, name, account(), _LIVES_SECONDS))
    try:
        yield Place(client, _up(client, name, say, up_seconds or _UP_SECONDS), PORTER)
    finally:
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


def bring(place: Place, site: KubernetesSite, run: Run, which: Which = "none", *, whole: bool = False) -> int:
    """Bring what of a run's record is not here yet; returns how many files came. Raises ClusterError, CommandFailed."""
    options = ["--weights", which, *(["--whole"] if whole else [])]
    command = ["lorafleet", "node", "send", run_folder(site, run.id), *options]
    unpacker = Unpacker(run.path)
    try:
        question = json.dumps(known(run.path)).encode() + b"\n"
        place.client.run_in(place.pod, place.container, command, unpacker.take, [question])
        return unpacker.finish()
    finally:
        unpacker.drop()


def send(place: Place, cargo: Iterable[Cargo], say: Say) -> None:
    """Lay files and folders on the storage, but those that are there already. Raises ClusterError, CommandFailed."""
    cargo = list(cargo)
    asked = [{"target": one.target, "digest": one.digest, "file": one.source.is_file()} for one in cargo]
    missing = set(place.ask(["lorafleet", "node", "lacks"], asked))
    for one in cargo:
        if one.target not in missing:
            say(f"{one.source} is there already, as {one.target}")
            continue
        say(f"{one.source} ({one.bytes / 1e6:,.1f} MB) goes to {one.target}")
        kind = ["--file"] if one.source.is_file() else []
        command = ["lorafleet", "node", "receive", one.target, one.digest, *kind]
        place.client.run_in(place.pod, place.container, command, lambda _: None, framed(one.source))


def submitters_words(client: Client, run: Run, submission: int) -> str:
    """What the newest submitter's pod has said: the driver's output. Raises ClusterError."""
    pods = client.pods(labels_of_submission(run, submission) | {"job-name": ""})
    return client.log(pods[0]["metadata"]["name"]) if pods else ""


def storage_key(site: KubernetesSite) -> str:
    """What tells a site's storage from another's."""
    return "/".join([site.context or "", site.namespace, site.storage.claim, site.storage.sub_path or ""])


def cache_in_pods(site: KubernetesSite) -> str:
    """Where pods see models and data."""
    return str(Path(site.storage.mount_path) / "cache")
