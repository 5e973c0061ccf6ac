"""The API server of a cluster, through the official client: what a run needs of it, and nothing more.

Objects are plain trees, as the server sends them. No Secret is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import stream
from kubernetes.watch import Watch
from lorafleet.jobs.errors import CommandFailed
from lorafleet.k8s.errors import ClusterError, Conflict
from urllib3 import Retry
from urllib3.exceptions import HTTPError
from websocket import ABNF, WebSocketException

Tree = dict[str, Any]
RAYJOBS = {"group": "ray.io", "version": "v1", "plural": "rayjobs"}
_SECONDS = (5.0, 30.0)
"""To connect, and for an answer."""
_WATCH_SECONDS = 240
"""After which a watch is begun anew: behind a NAT one can hang for ever."""
_LONGEST_PAUSE = 30.0
_TRIED = 6
"""How often a request is tried while the server is too busy or not there."""
_GONE, _CONFLICT, _FORBIDDEN, _NOT_FOUND = 410, 409, 403, 404
_STDOUT, _STDERR, _STATUS = 1, 2, 3
"""Channels of a command's WebSocket (v4.channel.k8s.io)."""
_BLOCK = 2**17
"""Bytes of one message into a pod."""
_STDERR_KEPT = 4000
_IDLE_SECONDS = 900.0
"""How long a command in a pod may say nothing: a large model is hashed meanwhile, but a connection may be dead."""


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Every way in which a request fails, as a sentence."""
    try:
        yield
    except ApiException as error:
        kind = Conflict if _status(error) == _CONFLICT else ClusterError
        raise kind(f"{what}: {_sentence(error)}", _status(error)) from error
    except (HTTPError, WebSocketException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ClusterError(f"{what}: the cluster's API server does not answer ({str(reason)[:200]})") from error


def _sent(line: Any, block: bytes) -> bool:
    """Send to a command's input; False where it takes no more."""
    try:
        for start in range(0, len(block), _BLOCK):
            line.write_stdin(block[start : start + _BLOCK])
    except (WebSocketException, OSError):
        return False
    return True


def _check_ended(pod: str, command: list[str], status: bytes, errors: str) -> None:
    """Raise what the last word on a command means; without one the connection broke off."""
    try:
        told = json.loads(status)
    except ValueError:
        raise ClusterError(f"the connection to pod {pod} broke off while {' '.join(command[:3])} ran") from None
    if told.get("status") == "Success":
        return
    words = " ".join(errors[-_STDERR_KEPT:].split()) or str(told.get("message") or "it did not say why")
    raise CommandFailed(words)


def _status(error: ApiException) -> int | None:
    """The status of an answer; a refused WebSocket has it in its words alone."""
    handshake = re.search(r"Handshake status (\d+)", str(error.reason))
    return int(handshake[1]) if handshake else error.status or None


def _sentence(error: ApiException) -> str:
    """What the server says, without the JSON around it."""
    try:
        said = json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        said = str(error.body or error.reason or f"status {error.status}")[:300]
    right = ' (docs/kubernetes.md, "Rights", says which it needs)' if _status(error) == _FORBIDDEN else ""
    return " ".join(str(said).split()) + right


class Client:
    """One namespace of one cluster."""

    def __init__(self, namespace: str, context: str | None = None, tried: int = _TRIED) -> None:
        """Raises ClusterError when neither a kubeconfig nor a service account says where the cluster is."""
        self.namespace = namespace
        self.settings = _settings(context)
        self.settings.retries = Retry(
            total=tried,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None,  # a create that was done already is met as a conflict, and is our own
            backoff_factor=0.5,
            backoff_max=_LONGEST_PAUSE,
            retry_after_max=int(_LONGEST_PAUSE),
            raise_on_status=False,
        )
        self.api = client.ApiClient(self.settings)
        self.custom = client.CustomObjectsApi(self.api)
        self.core = client.CoreV1Api(self.api)
        self.watching: Watch | None = None

    @property
    def host(self) -> str:
        """The server's address."""
        return str(self.settings.host)

    # --- the objects of a run

    def create(self, tree: Tree, *, dry_run: bool = False) -> Tree:
        """Make an object; unknown fields are refused, not dropped.

        Raises Conflict where there is one of this name, and ClusterError.
        """
        dry = {"dry_run": "All"} if dry_run else {}
        with _said(f"{tree['kind']} {tree['metadata']['name']} was not created"):
            return self._ask(self._of(tree["kind"], "create"), body=tree, field_validation="Strict", **dry)

    def get(self, kind: str, name: str) -> Tree | None:
        """An object, or None where there is none. Raises ClusterError."""
        with _said(f"{kind} {name} cannot be read"):
            try:
                return self._ask(self._of(kind, "read"), name=name)
            except ApiException as error:
                if error.status == _NOT_FOUND:
                    return None
                raise

    def delete(self, kind: str, name: str) -> bool:
        """Ask for an object to be taken away; returns False where there is none. Raises ClusterError."""
        with _said(f"{kind} {name} cannot be taken away"):
            try:
                self._ask(self._of(kind, "delete"), name=name, propagation_policy="Background")
            except ApiException as error:
                if error.status == _NOT_FOUND:
                    return False
                raise
        return True

    def give_to(self, owner: Tree, kind: str, name: str) -> None:
        """Have an object go when its owner goes. Raises ClusterError."""
        reference = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
        }
        with _said(f"{kind} {name} cannot be given to its owner"):
            self._ask(self._of(kind, "patch"), name=name, body={"metadata": {"ownerReferences": [reference]}})

    def _of(self, kind: str, verb: str) -> Callable[..., Any]:
        """The client's function for a verb on a kind of object, in our namespace."""
        if kind == "RayJob":
            name = f"{'get' if verb == 'read' else verb}_namespaced_custom_object"
            return partial(getattr(self.custom, name), namespace=self.namespace, **RAYJOBS)
        apis = {
            "ConfigMap": (self.core, "config_map"),
            "Job": (client.BatchV1Api(self.api), "job"),
            "NetworkPolicy": (client.NetworkingV1Api(self.api), "network_policy"),
            "PersistentVolumeClaim": (self.core, "persistent_volume_claim"),
        }
        api, noun = apis[kind]
        return partial(getattr(api, f"{verb}_namespaced_{noun}"), namespace=self.namespace)

    def _ask(self, request: Callable[..., Any], **options: Any) -> Tree:
        """The answer as the server sent it: the client's models refuse one that lacks a field they count on."""
        body = self._body(request(**options, _preload_content=False, _request_timeout=_SECONDS))
        try:
            tree = json.loads(body)
        except ValueError:
            tree = None
        if not isinstance(tree, dict):
            raise ClusterError(f"{self.host} does not answer as an API server does: {body[:80]!r}")
        return tree

    def _body(self, answer: Any) -> bytes:
        """The bytes of an answer that was not read yet."""
        if not 200 <= answer.status <= 299:
            self.api.response_deserialize(answer, {})  # raises what the status means
        return bytes(answer.data)

    # --- following one

    def follow(
        self, name: str, seen: Callable[[Tree | None], None], failed: Callable[[str], None], end: threading.Event
    ) -> None:
        """Tell of a RayJob as it is, and at each change (None: it is gone), until `end` is set.

        A list and a watch from there, as a reflector does: listed again when the watch ends, is dropped, or its version
        is too old (410). What goes wrong is told to `failed`, and tried again with growing pauses.
        """
        pause = 0.0
        while not end.wait(pause):
            try:
                self._follow(name, seen, end)
                pause = 1.0  # a server that ends watches at once is not asked without pause
            except ClusterError as error:
                if error.status != _GONE:
                    failed(str(error))
                pause = min(_LONGEST_PAUSE, 2 * pause or 0.5)

    def _follow(self, name: str, seen: Callable[[Tree | None], None], end: threading.Event) -> None:
        """One list, and one watch from there to its end. Raises ClusterError."""
        where = {**RAYJOBS, "namespace": self.namespace, "field_selector": f"metadata.name={name}"}
        with _said(f"RayJob {name} cannot be followed"):
            listed = self._ask(self.custom.list_namespaced_custom_object, **where)
            seen(next(iter(listed["items"]), None))
            for kind, job in self._events(where, listed["metadata"]["resourceVersion"]):
                if end.is_set():
                    return
                if kind != "BOOKMARK":
                    seen(None if kind == "DELETED" else job)

    def _events(self, where: dict[str, str], version: str) -> Iterator[tuple[str, Tree]]:
        """(kind, object) of each event of a watch. The client's own takes what comes apart without a look.

        Raises ClusterError for what no API server sends.
        """
        self.watching = Watch()
        events = self.watching.stream(
            self.custom.list_namespaced_custom_object,
            **where,
            resource_version=version,
            timeout_seconds=_WATCH_SECONDS,
            _request_timeout=(_SECONDS[0], _WATCH_SECONDS + _SECONDS[1]),
        )
        while True:
            try:
                event = next(events)
                told = str(event["type"]), event["object"]
            except StopIteration:
                return
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                what = f"{type(error).__name__}: {error}"
                raise ClusterError(f"{self.host} does not answer as an API server does ({what})") from error
            yield told

    def stop_following(self) -> None:
        """End a `follow` that waits for news: its connection is cut."""
        if self.watching is not None:
            self.watching.stop()

    # --- pods

    def pods(self, labels: dict[str, str]) -> list[Tree]:
        """The pods with these labels, the newest first. Raises ClusterError."""
        selector = ",".join(f"{key}={value}" if value else key for key, value in labels.items())
        with _said("pods cannot be listed"):
            listed = self._ask(self.core.list_namespaced_pod, namespace=self.namespace, label_selector=selector)
        return sorted(listed["items"], key=_created, reverse=True)

    def rayjobs(self, labels: dict[str, str]) -> list[Tree]:
        """The RayJobs with these labels. Raises ClusterError."""
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        with _said("RayJobs cannot be listed"):
            listed = self._ask(
                self.custom.list_namespaced_custom_object,
                namespace=self.namespace,
                label_selector=selector,
                **RAYJOBS,
            )
        found: list[Tree] = listed["items"]
        return found

    def events(self, **involved: str) -> list[Tree]:
        """The events of an object, by fields of `involvedObject`. Raises ClusterError."""
        selector = ",".join(f"involvedObject.{key}={value}" for key, value in involved.items())
        with _said("events cannot be listed"):
            listed = self._ask(self.core.list_namespaced_event, namespace=self.namespace, field_selector=selector)
        found: list[Tree] = listed["items"]
        return found

    def log(self, pod: str) -> str:
        """All that a pod's container has said. Raises ClusterError."""
        with _said(f"the log of pod {pod} cannot be read"):
            answer = self.core.read_namespaced_pod_log(
                pod, self.namespace, _preload_content=False, _request_timeout=_SECONDS
            )
            return self._body(answer).decode(errors="replace")

    def run_in(
        self, pod: str, container: str, command: list[str], take: Callable[[bytes], object], feed: Iterable[bytes] = ()
    ) -> None:
        """Run a command in a pod: `feed` goes to its input, and `take` gets what it prints.

        Raises ClusterError, and CommandFailed with the command's last words where it fails.
        """
        what = f"nothing can be run in pod {pod}"
        with _said(what):
            line = self._line(pod, container, command)
        errors, status = bytearray(), bytearray()
        try:
            for block in feed:
                if not _sent(line, block):
                    break  # the command has ended: it says why
            while True:
                try:
                    with _said(what):
                        opcode, frame = line.sock.recv_data_frame(True)
                except ClusterError:
                    if status:  # all was said, and the other side did not wait for our goodbye
                        break
                    raise
                if opcode == ABNF.OPCODE_CLOSE:
                    break
                if opcode in (ABNF.OPCODE_BINARY, ABNF.OPCODE_TEXT) and frame.data:
                    channel, data = frame.data[0], frame.data[1:]
                    if channel == _STDOUT:
                        take(data)
                    elif channel == _STDERR:
                        errors += data
                    elif channel == _STATUS:
                        status += data
        finally:
            line.close(timeout=1)
        _check_ended(pod, command, bytes(status), errors.decode(errors="replace"))

    def _line(self, pod: str, container: str, command: list[str]) -> Any:
        """The WebSocket of a command. Its client's own reading is not used: it copies all that came at every frame."""
        line = stream(
            client.CoreV1Api(client.ApiClient(self.settings)).connect_get_namespaced_pod_exec,
            pod,
            self.namespace,
            container=container,
            command=command,
            stdin=True,
            stdout=True,
            stderr=True,
            tty=False,
            binary=True,
            _preload_content=False,
        )
        line.sock.settimeout(_IDLE_SECONDS)
        return line

    # --- the cluster itself

    def definition(self) -> Tree | None:
        """The cluster's CustomResourceDefinition of RayJob, or None where there is none. Raises ClusterError."""
        api = client.ApiextensionsV1Api(self.api)
        with _said("the cluster's definition of RayJob cannot be read"):
            try:
                return self._ask(api.read_custom_resource_definition, name="rayjobs.ray.io")
            except ApiException as error:
                if error.status == _NOT_FOUND:
                    return None
                raise

    def all_of(self, kind: str) -> list[Tree] | None:
        """The objects of a kind that the user may see; None where it may not, or there is no such kind.

        Raises ClusterError where no server answers.
        """
        requests = {
            "Node": partial(self.core.list_node),
            "PersistentVolumeClaim": partial(
                self.core.list_namespaced_persistent_volume_claim, namespace=self.namespace
            ),
            "LocalQueue": partial(
                self.custom.list_namespaced_custom_object,
                namespace=self.namespace,
                group="kueue.x-k8s.io",
                version=self._version_of("kueue.x-k8s.io"),
                plural="localqueues",
            ),
        }
        with _said(f"objects of kind {kind} cannot be listed"):
            try:
                found: list[Tree] = self._ask(requests[kind])["items"]
            except ApiException as error:
                if error.status in (_FORBIDDEN, _NOT_FOUND):
                    return None
                raise
        return found

    def serves(self, group: str) -> bool:
        """Whether the cluster has an API group. Raises ClusterError."""
        return bool(self._version_of(group))

    def _version_of(self, group: str) -> str:
        """What the cluster prefers of an API group; empty where it has none."""
        with _said("the cluster's API groups cannot be read"):
            groups = self._ask(client.ApisApi(self.api).get_api_versions)["groups"]
        return next((str(found["preferredVersion"]["version"]) for found in groups if found["name"] == group), "")

    def may(self, verb: str, resource: str, group: str = "", subresource: str = "") -> bool:
        """Whether the user has a right in the namespace. Raises ClusterError."""
        asked = {"namespace": self.namespace, "verb": verb, "resource": resource, "group": group}
        if subresource:
            asked["subresource"] = subresource
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked},
        }
        with _said("the cluster cannot be asked for rights"):
            answer = self._ask(client.AuthorizationV1Api(self.api).create_self_subject_access_review, body=body)
        return bool(answer["status"]["allowed"])


def current(context: str | None) -> tuple[str, str]:
    """(name, namespace) of a context of the kubeconfig, or of its current one. Raises ClusterError."""
    try:
        known, now = config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))
    except (config.ConfigException, yaml.YAMLError) as error:
        raise ClusterError(f"there is no cluster to ask: {error}") from error
    found = next((one for one in known if one["name"] == context), None) if context else now
    if not found:
        names = ", ".join(one["name"] for one in known) or "none"
        raise ClusterError(f"there is no context {context} in the kubeconfig; there are {names}")
    return str(found["name"]), str(found["context"].get("namespace") or "default")


def _created(tree: Tree) -> str:
    return str(tree["metadata"].get("creationTimestamp") or "")


def _settings(context: str | None) -> client.Configuration:
    """Where the cluster is and who asks: the kubeconfig, or inside a pod without one its service account."""
    settings = client.Configuration()
    try:
        config.load_kube_config(os.environ.get("KUBECONFIG"), context=context, client_configuration=settings)
    except yaml.YAMLError as error:
        raise ClusterError(f"the kubeconfig is not whole YAML: {' '.join(str(error).split())[:200]}") from error
    except config.ConfigException as error:
        if context is None:
            with contextlib.suppress(config.ConfigException):
                config.load_incluster_config(client_configuration=settings)
                return settings
        raise ClusterError(f"there is no cluster to ask: {error}") from error
    return settings
