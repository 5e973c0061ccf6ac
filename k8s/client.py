"""Access a cluster's API server through the official client, limited to what a run needs.

Objects are plain dicts, as the server sends them. No Secret is read.
"""

from __future__ import annotations

import contextlib
import json
import logging
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
from urllib3 import Retry
from urllib3.exceptions import HTTPError
from websocket import ABNF, WebSocketException

from lorafleet.jobs.errors import CommandFailed
from lorafleet.k8s.errors import ClusterError, Conflict

_LOGGER = logging.getLogger(__name__)
Tree = dict[str, Any]
RAYJOBS = {"group": "ray.io", "version": "v1", "plural": "rayjobs"}
_TIMEOUT_SECONDS = (5.0, 30.0)
"""Timeouts in seconds: to connect, and to get an answer."""
_WATCH_SECONDS = 240
"""Seconds after which a watch is restarted: behind a NAT a watch can hang forever."""
_MAX_PAUSE = 30.0
_MAX_RETRIES = 6
"""Retries of a request while the server is overloaded or unreachable."""
_GONE, _CONFLICT, _FORBIDDEN, _NOT_FOUND = 410, 409, 403, 404
_STDOUT, _STDERR, _STATUS = 1, 2, 3
"""Channels of a command's WebSocket (v4.channel.k8s.io)."""
_BLOCK_BYTES = 2**17
"""Bytes of one message to a pod."""
_MAX_STDERR = 4000
_IDLE_SECONDS = 900.0
"""Seconds that a command in a pod may be silent. Hashing a large model takes long, but a
dead connection must be noticed.
"""


@contextlib.contextmanager
def _convert_errors(failure: str) -> Iterator[None]:
    """Raise any failure of a request as ClusterError or Conflict with a message."""
    try:
        yield
    except ApiException as error:
        error_class = Conflict if _get_status(error) == _CONFLICT else ClusterError
        raise error_class(f"{failure}: {_get_message(error)}", _get_status(error)) from error
    except (HTTPError, WebSocketException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ClusterError(
            f"{failure}: the cluster's API server does not answer ({str(reason)[:200]}). Check the "
            "network and the current context (`kubectl cluster-info`)"
        ) from error


def _send_input(connection: Any, block: bytes) -> bool:
    """Send data to a command's input. Returns False if the command accepts no more."""
    try:
        for start in range(0, len(block), _BLOCK_BYTES):
            connection.write_stdin(block[start : start + _BLOCK_BYTES])
    except (WebSocketException, OSError):
        return False
    return True


def _check_command_status(pod: str, command: list[str], status: bytes, errors: str) -> None:
    """Raise the error that a command's final status stands for.

    Raises:
        ClusterError: There is no status, since the connection broke off.
        CommandFailed: The command failed; the message holds the end of its error output.
    """
    try:
        result = json.loads(status)
    except ValueError:
        raise ClusterError(
            f"the connection to pod {pod} was lost while {' '.join(command[:3])} ran; run the "
            "command again"
        ) from None
    if result.get("status") == "Success":
        return
    message = " ".join(errors[-_MAX_STDERR:].split()) or str(
        result.get("message") or "it gave no reason"
    )
    raise CommandFailed(message)


def _get_status(error: ApiException) -> int | None:
    """Return the HTTP status of an error, or None.

    For a refused WebSocket, the status is only in the text of the error.
    """
    handshake = re.search(r"Handshake status (\d+)", str(error.reason))
    return int(handshake[1]) if handshake else error.status or None


def _get_message(error: ApiException) -> str:
    """Return the server's message without the JSON around it."""
    try:
        message = json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        message = str(error.body or error.reason or f"status {error.status}")[:300]
    permission_hint = (
        ' (docs/kubernetes.md, "Rights", lists the rights that lorafleet needs)'
        if _get_status(error) == _FORBIDDEN
        else ""
    )
    return " ".join(str(message).split()) + permission_hint


class Client:
    """Client for one namespace of a cluster.

    Every request has a timeout, is repeated while the server is overloaded or unreachable,
    and raises ClusterError or Conflict if it fails. `follow` blocks and runs in a thread of
    its own; `stop_following` ends it from another one.
    """

    def __init__(
        self, namespace: str, context: str | None = None, max_retries: int = _MAX_RETRIES
    ) -> None:
        """Load the kubeconfig or the service account.

        Args:
            namespace: Namespace of all objects.
            context: Context of the kubeconfig. None: the current one.
            max_retries: Retries of a request while the server is overloaded or unreachable.

        Raises:
            ClusterError: Neither a kubeconfig nor a service account names a cluster.
        """
        self.namespace = namespace
        self.settings = _load_settings(context)
        self.settings.retries = Retry(
            total=max_retries,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None,  # a repeated create ends in a conflict with our own object
            backoff_factor=0.5,
            backoff_max=_MAX_PAUSE,
            retry_after_max=int(_MAX_PAUSE),
            # The last answer is returned instead of an error, because its body has the server's
            # message.
            raise_on_status=False,
        )
        self.api = client.ApiClient(self.settings)
        self.custom = client.CustomObjectsApi(self.api)
        self.core = client.CoreV1Api(self.api)
        self.watching: Watch | None = None

    @property
    def host(self) -> str:
        """Return the server's address."""
        return str(self.settings.host)

    # --- objects of a run

    def create(self, tree: Tree, *, dry_run: bool = False) -> Tree:
        """Create an object. Unknown fields are refused, not dropped.

        Raises:
            Conflict: An object of this name exists.
            ClusterError: The request failed.
        """
        dry_run_options = {"dry_run": "All"} if dry_run else {}
        with _convert_errors(f"{tree['kind']} {tree['metadata']['name']} was not created"):
            return self._send_request(
                self._get_request(tree["kind"], "create"),
                body=tree,
                field_validation="Strict",
                **dry_run_options,
            )

    def get(self, kind: str, name: str) -> Tree | None:
        """Return an object, or None if it does not exist. Raises ClusterError."""
        with _convert_errors(f"{kind} {name} cannot be read"):
            try:
                return self._send_request(self._get_request(kind, "read"), name=name)
            except ApiException as error:
                if error.status == _NOT_FOUND:
                    return None
                raise

    def delete(self, kind: str, name: str) -> bool:
        """Request the deletion of an object.

        This returns before the object is gone: the finalizer of a RayJob first stops the Ray
        job, and dependent objects follow in the background.

        Returns:
            False if the object does not exist.

        Raises:
            ClusterError: The request failed.
        """
        with _convert_errors(f"{kind} {name} cannot be deleted"):
            try:
                self._send_request(
                    self._get_request(kind, "delete"), name=name, propagation_policy="Background"
                )
            except ApiException as error:
                if error.status == _NOT_FOUND:
                    return False
                raise
        return True

    def set_owner(self, owner: Tree, kind: str, name: str) -> None:
        """Set the owner of an object, so that both are deleted together.

        Args:
            owner: The owner as the server returned it: its uid is needed, which exists only
                after its creation.
            kind: Kind of the owned object.
            name: Name of the owned object.

        Raises:
            ClusterError: The request failed.
        """
        reference = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
        }
        with _convert_errors(f"the owner of {kind} {name} cannot be set"):
            self._send_request(
                self._get_request(kind, "patch"),
                name=name,
                body={"metadata": {"ownerReferences": [reference]}},
            )

    def _get_request(self, kind: str, verb: str) -> Callable[..., Any]:
        """Return the client's function for a verb on a kind of object in this namespace."""
        if kind == "RayJob":
            # CustomObjectsApi calls `get` what the typed clients call `read`.
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

    def _send_request(self, request: Callable[..., Any], **options: Any) -> Tree:
        """Send a request and return the answer as the server sent it.

        The client's own models refuse an answer that lacks a field they expect.
        """
        answer = request(**options, _preload_content=False, _request_timeout=_TIMEOUT_SECONDS)
        _LOGGER.debug(
            "%s %s answered %d",
            getattr(request, "__name__", "request"),
            options.get("name") or options.get("label_selector") or "",
            answer.status,
        )
        body = self._read_body(answer)
        try:
            tree = json.loads(body)
        except ValueError:
            tree = None
        if not isinstance(tree, dict):
            raise ClusterError(
                f"{self.host} does not answer like a Kubernetes API server: {body[:80]!r}. Check "
                "the server address in the kubeconfig"
            )
        return tree

    def _read_body(self, answer: Any) -> bytes:
        """Return the bytes of an answer that was not read yet. Raises for an error status."""
        if not 200 <= answer.status <= 299:
            self.api.response_deserialize(answer, {})  # raises the error for this status
        return bytes(answer.data)

    # --- following a RayJob

    def follow(
        self,
        name: str,
        on_change: Callable[[Tree | None], None],
        on_error: Callable[[str], None],
        end: threading.Event,
    ) -> None:
        """Report a RayJob as it is and at each change, until `end` is set.

        Lists the object and watches it from there, as a reflector does. It lists again when the
        watch ends, is dropped, or its version is too old (410).

        Args:
            name: Name of the RayJob.
            on_change: Called with the RayJob, or None if it does not exist.
            on_error: Called with the message of an error. The request is then tried again with
                growing pauses.
            end: Event that ends this function.
        """
        pause = 0.0
        while not end.wait(pause):
            try:
                self._follow_once(name, on_change, end)
                pause = 1.0  # do not flood a server that ends watches at once
            except ClusterError as error:
                if error.status != _GONE:
                    on_error(str(error))
                pause = min(_MAX_PAUSE, 2 * pause or 0.5)

    def _follow_once(
        self, name: str, on_change: Callable[[Tree | None], None], end: threading.Event
    ) -> None:
        """List the RayJob once, and watch it from there until the watch ends.

        Raises ClusterError.
        """
        selector = {
            **RAYJOBS,
            "namespace": self.namespace,
            "field_selector": f"metadata.name={name}",
        }
        with _convert_errors(f"RayJob {name} cannot be watched"):
            listed = self._send_request(self.custom.list_namespaced_custom_object, **selector)
            on_change(next(iter(listed["items"]), None))
            for kind, job in self._iterate_events(selector, listed["metadata"]["resourceVersion"]):
                if end.is_set():
                    return
                # A bookmark has only a version, for clients that continue a watch from it.
                if kind != "BOOKMARK":
                    on_change(None if kind == "DELETED" else job)

    def _iterate_events(self, selector: dict[str, str], version: str) -> Iterator[tuple[str, Tree]]:
        """Yield (kind, object) of each event of a watch.

        The client's own stream takes events apart without checking them. Raises ClusterError
        for data that no API server sends.
        """
        self.watching = Watch()
        events = self.watching.stream(
            self.custom.list_namespaced_custom_object,
            **selector,
            resource_version=version,
            # The server ends the watch by this time. The socket waits a little longer and notices a
            # dead connection.
            timeout_seconds=_WATCH_SECONDS,
            _request_timeout=(_TIMEOUT_SECONDS[0], _WATCH_SECONDS + _TIMEOUT_SECONDS[1]),
        )
        while True:
            try:
                event = next(events)
                kind_and_object = str(event["type"]), event["object"]
            except StopIteration:
                return
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise ClusterError(
                    f"{self.host} does not answer like a Kubernetes API server ({reason}). Check "
                    "the server address in the kubeconfig"
                ) from error
            yield kind_and_object

    def stop_following(self) -> None:
        """End a `follow` that waits for news by closing its connection.

        A watch that is just being opened misses the call, so callers repeat it until the thread
        has ended.
        """
        if self.watching is not None:
            self.watching.stop()

    # --- pods

    def list_pods(self, labels: dict[str, str]) -> list[Tree]:
        """Return the pods with these labels, newest first.

        Args:
            labels: Label -> value. An empty value selects all pods that have the label.

        Raises:
            ClusterError: The request failed.
        """
        selector = ",".join(f"{key}={value}" if value else key for key, value in labels.items())
        with _convert_errors("pods cannot be listed"):
            listed = self._send_request(
                self.core.list_namespaced_pod, namespace=self.namespace, label_selector=selector
            )
        return sorted(listed["items"], key=_get_creation_time, reverse=True)

    def list_rayjobs(self, labels: dict[str, str]) -> list[Tree]:
        """Return the RayJobs with these labels. Raises ClusterError."""
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        with _convert_errors("RayJobs cannot be listed"):
            listed = self._send_request(
                self.custom.list_namespaced_custom_object,
                namespace=self.namespace,
                label_selector=selector,
                **RAYJOBS,
            )
        items: list[Tree] = listed["items"]
        return items

    def list_events(self, **involved: str) -> list[Tree]:
        """Return the events of an object, selected by fields of `involvedObject`.

        Raises ClusterError.
        """
        selector = ",".join(f"involvedObject.{key}={value}" for key, value in involved.items())
        with _convert_errors("events cannot be listed"):
            listed = self._send_request(
                self.core.list_namespaced_event, namespace=self.namespace, field_selector=selector
            )
        items: list[Tree] = listed["items"]
        return items

    def read_log(self, pod: str) -> str:
        """Return the whole log of a pod that has one container.

        Raises:
            ClusterError: The request failed, for example because the pod is gone.
        """
        with _convert_errors(f"the log of pod {pod} cannot be read"):
            answer = self.core.read_namespaced_pod_log(
                pod, self.namespace, _preload_content=False, _request_timeout=_TIMEOUT_SECONDS
            )
            return self._read_body(answer).decode(errors="replace")

    def run_command(
        self,
        pod: str,
        container: str,
        command: list[str],
        on_output: Callable[[bytes], object],
        input_blocks: Iterable[bytes] = (),
    ) -> None:
        """Run a command in a pod.

        Args:
            pod: Name of the pod.
            container: Name of the container.
            command: The command and its arguments.
            on_output: Called with each block of standard output.
            input_blocks: Data for standard input.

        Raises:
            ClusterError: The command could not be started, or the connection broke off.
            CommandFailed: The command failed; the message holds the end of its error output.
        """
        failure = f"the command cannot be run in pod {pod}"
        with _convert_errors(failure):
            connection = self._open_connection(pod, container, command)
        errors, status = bytearray(), bytearray()
        try:
            for block in input_blocks:
                if not _send_input(connection, block):
                    break  # the command has ended: its status says why
            while True:
                try:
                    with _convert_errors(failure):
                        opcode, frame = connection.sock.recv_data_frame(True)
                except ClusterError:
                    if status:  # complete: the server closed without a close frame
                        break
                    raise
                if opcode == ABNF.OPCODE_CLOSE:
                    break
                if opcode in (ABNF.OPCODE_BINARY, ABNF.OPCODE_TEXT) and frame.data:
                    # The first byte of a frame names its channel.
                    channel, data = frame.data[0], frame.data[1:]
                    if channel == _STDOUT:
                        on_output(data)
                    elif channel == _STDERR:
                        errors += data
                    elif channel == _STATUS:
                        status += data
        finally:
            connection.close(timeout=1)
        _check_command_status(pod, command, bytes(status), errors.decode(errors="replace"))

    def _open_connection(self, pod: str, container: str, command: list[str]) -> Any:
        """Open the WebSocket of a command.

        Its client's own read method is not used: it copies all received data at every frame.
        """
        connection = stream(
            # A new ApiClient: `stream` replaces the request method of the one that it gets, while
            # other threads may be using it.
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
        connection.sock.settimeout(_IDLE_SECONDS)
        return connection

    # --- the cluster itself

    def get_definition(self) -> Tree | None:
        """Return the CustomResourceDefinition of RayJob, or None if there is none.

        Raises ClusterError.
        """
        api = client.ApiextensionsV1Api(self.api)
        with _convert_errors("the cluster's definition of RayJob cannot be read"):
            try:
                return self._send_request(
                    api.read_custom_resource_definition, name="rayjobs.ray.io"
                )
            except ApiException as error:
                if error.status == _NOT_FOUND:
                    return None
                raise

    def list_objects(self, kind: str) -> list[Tree] | None:
        """Return the objects of a kind that the user may see.

        None if the user may not list them, or if the kind does not exist. Raises ClusterError
        if no server answers.
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
                version=self._get_group_version("kueue.x-k8s.io"),
                plural="localqueues",
            ),
        }
        with _convert_errors(f"objects of kind {kind} cannot be listed"):
            try:
                items: list[Tree] = self._send_request(requests[kind])["items"]
            except ApiException as error:
                if error.status in (_FORBIDDEN, _NOT_FOUND):
                    return None
                raise
        return items

    def has_api_group(self, group: str) -> bool:
        """Return whether the cluster has an API group. Raises ClusterError."""
        return bool(self._get_group_version(group))

    def _get_group_version(self, group: str) -> str:
        """Return the preferred version of an API group; empty if the cluster does not have it."""
        with _convert_errors("the cluster's API groups cannot be read"):
            groups = self._send_request(client.ApisApi(self.api).get_api_versions)["groups"]
        return next(
            (
                str(api_group["preferredVersion"]["version"])
                for api_group in groups
                if api_group["name"] == group
            ),
            "",
        )

    def is_allowed(self, verb: str, resource: str, group: str = "", subresource: str = "") -> bool:
        """Return whether the user may do this in the namespace.

        The server answers a SelfSubjectAccessReview, which changes nothing.

        Args:
            verb: Such as `create` or `list`.
            resource: Plural name, such as `pods`.
            group: API group; empty for the core API.
            subresource: Such as `log` or `exec`.

        Raises:
            ClusterError: The request failed.
        """
        attributes = {
            "namespace": self.namespace,
            "verb": verb,
            "resource": resource,
            "group": group,
        }
        if subresource:
            attributes["subresource"] = subresource
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        with _convert_errors("your rights on the cluster cannot be checked"):
            answer = self._send_request(
                client.AuthorizationV1Api(self.api).create_self_subject_access_review, body=body
            )
        return bool(answer["status"]["allowed"])


def get_context(context: str | None) -> tuple[str, str]:
    """Return (name, namespace) of a kubeconfig context, by default the current one.

    The namespace is `default` if the context names none.

    Raises:
        ClusterError: There is no kubeconfig, it cannot be read, or it has no such context.
    """
    try:
        contexts, current_context = config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))
    except (config.ConfigException, yaml.YAMLError) as error:
        raise ClusterError(
            f"no Kubernetes cluster is configured: {error}. Set KUBECONFIG, or create "
            "~/.kube/config"
        ) from error
    selected = (
        next((item for item in contexts if item["name"] == context), None)
        if context
        else current_context
    )
    if not selected:
        names = ", ".join(item["name"] for item in contexts) or "none"
        raise ClusterError(f"there is no context {context} in the kubeconfig; it has {names}")
    return str(selected["name"]), str(selected["context"].get("namespace") or "default")


def _get_creation_time(tree: Tree) -> str:
    """Return the creation time of an object, or an empty string."""
    return str(tree["metadata"].get("creationTimestamp") or "")


def _load_settings(context: str | None) -> client.Configuration:
    """Load the address of the cluster and the user's credentials.

    They come from the kubeconfig or, in a pod without one, from its service account. Raises
    ClusterError.
    """
    settings = client.Configuration()
    try:
        config.load_kube_config(
            os.environ.get("KUBECONFIG"), context=context, client_configuration=settings
        )
    except yaml.YAMLError as error:
        raise ClusterError(
            f"the kubeconfig is not valid YAML: {' '.join(str(error).split())[:200]}"
        ) from error
    except config.ConfigException as error:
        # A context exists only in a kubeconfig. Without one, this may be a pod with a service
        # account.
        if context is None:
            with contextlib.suppress(config.ConfigException):
                config.load_incluster_config(client_configuration=settings)
                return settings
        raise ClusterError(
            f"no Kubernetes cluster is configured: {error}. Set KUBECONFIG, create ~/.kube/config, "
            "or correct `context` in the site file"
        ) from error
    return settings
