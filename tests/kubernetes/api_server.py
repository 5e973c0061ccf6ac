"""An API server over HTTP, for tests: what of Kubernetes' the clients here use, with faults when a
test wants them.

A double, not a proof: what speaks for it is that kubectl and the official client both work against
it. Objects lie in memory; RayJobs are held against the real CustomResourceDefinition where there is
one, other kinds against the schemas of kubernetes-validate.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import re
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from lorafleet.k8s.crd import Schema
from lorafleet.k8s.render import apply_merge_patch

Tree = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    kind: str
    plural: str
    group: str = ""
    version: str = "v1"
    namespaced: bool = True

    @property
    def base(self) -> str:
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


KINDS = (
    Kind("RayJob", "rayjobs", "ray.io"),
    Kind("ConfigMap", "configmaps"),
    Kind("Pod", "pods"),
    Kind("Event", "events"),
    Kind("PersistentVolumeClaim", "persistentvolumeclaims"),
    Kind("Namespace", "namespaces", namespaced=False),
    Kind("Node", "nodes", namespaced=False),
    Kind("NetworkPolicy", "networkpolicies", "networking.k8s.io"),
    Kind("Job", "jobs", "batch"),
    Kind(
        "CustomResourceDefinition",
        "customresourcedefinitions",
        "apiextensions.k8s.io",
        namespaced=False,
    ),
    Kind(
        "SelfSubjectAccessReview",
        "selfsubjectaccessreviews",
        "authorization.k8s.io",
        namespaced=False,
    ),
)


class Refused(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        self.code, self.reason, self.message = code, reason, message
        super().__init__(message)

    @property
    def tree(self) -> Tree:
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": self.code,
                "reason": self.reason, "message": self.message}  # fmt: skip


@dataclass
class Fault:
    """What the next requests of a kind are answered."""

    method: str
    path: str
    """A regular expression that the path and its query match."""
    status: int = 0
    """0: the connection is cut."""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False
    """Whether the request is carried out first, and its answer lost."""


@dataclass
class Store:
    """The objects, and what happened to them."""

    lock: threading.Condition = field(default_factory=threading.Condition)
    objects: dict[tuple[str, str, str], Tree] = field(default_factory=dict)
    history: list[tuple[int, str, Tree]] = field(default_factory=list)
    oldest: int = 0
    """Versions below are forgotten: a watch from there is answered 410."""
    version: int = 100

    def note(self, event: str, tree: Tree) -> None:
        """Under the lock: give an object its next version, and tell the watchers."""
        self.version += 1
        tree["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, event, copy.deepcopy(tree)))
        self.lock.notify_all()


class ApiServer:
    """Serves until `close`.

    `pods_log` and `pods_exec` say what a pod has said, and how a command is run in it.
    """

    def __init__(self, definition: Path | None) -> None:
        self.store = Store()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.forbidden: list[tuple[str, str]] = []
        """(method, regular expression of a path): what the user has no right to."""
        self.pods_log: Callable[[Tree], str] = lambda _: ""
        self.pods_exec: Callable[[Tree, list[str]], subprocess.Popen[bytes]] | None = None
        self.protocols = ("v5.channel.k8s.io", "v4.channel.k8s.io")
        self.chunk_of: Callable[[Tree], str] = lambda tree: json.dumps(tree) + "\n"
        """What a watch sends of an event."""
        self.schema: Schema | None = None
        self.closed = False
        if definition is not None:
            tree, self.schema = _read(definition)
            self.put_down(tree)
        self.put_down({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}})
        handler = type("Handler", (_Handler,), {"server_of": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def close(self) -> None:
        self.closed = True
        with self.store.lock:
            self.store.lock.notify_all()
        self.http.shutdown()
        self.http.server_close()

    def kubeconfig(self, path: Path) -> Path:
        """A file for this cluster."""
        cluster = {"name": "double", "cluster": {"server": self.url}}
        context = {
            "name": "double",
            "context": {"cluster": "double", "user": "me", "namespace": "default"},
        }
        tree = {"apiVersion": "v1", "kind": "Config", "current-context": "double", "clusters": [cluster],
                "contexts": [context], "users": [{"name": "me", "user": {"token": "t"}}]}  # fmt: skip
        path.write_text(yaml.safe_dump(tree))
        return path

    # --- what tests and stand-ins do to it

    def put_down(self, tree: Tree) -> Tree:
        """An object that is there, whoever made it."""
        return self.create(
            _kind(tree["kind"]), tree["metadata"].get("namespace") or "default", tree, trusted=True
        )

    def get(self, kind: str, name: str, namespace: str = "default") -> Tree | None:
        with self.store.lock:
            found = self.store.objects.get(
                (kind, namespace if _kind(kind).namespaced else "", name)
            )
            return copy.deepcopy(found)

    def all(self, kind: str) -> list[Tree]:
        with self.store.lock:
            return [
                copy.deepcopy(tree) for key, tree in self.store.objects.items() if key[0] == kind
            ]

    def set_status(self, kind: str, name: str, namespace: str = "default", **status: Any) -> None:
        """What a controller writes; fields are added to those that are there."""
        with self.store.lock:
            tree = self.store.objects[kind, namespace, name]
            tree["status"] = {**tree.get("status", {}), **status}
            self.store.note("MODIFIED", tree)

    def forget(self) -> None:
        """Compact: versions before this one are gone."""
        with self.store.lock:
            self.store.version += 1
            self.store.oldest = self.store.version
            self.store.history.clear()

    def event(
        self,
        involved: str,
        reason: str,
        message: str,
        kind: str = "Pod",
        namespace: str = "default",
    ) -> None:
        """An event about an object."""
        self.put_down({
            "apiVersion": "v1", "kind": "Event", "reason": reason, "message": message, "type": "Warning",
            "metadata": {"name": f"{involved}.{uuid.uuid4().hex[:8]}", "namespace": namespace}, "lastTimestamp": _now(),
            "involvedObject": {"kind": kind, "name": involved, "namespace": namespace},
        })  # fmt: skip

    # --- the verbs

    def create(self, kind: Kind, namespace: str, tree: Tree, *, dry: bool = False, strict: bool = False,
               trusted: bool = False) -> Tree:  # fmt: skip
        tree = copy.deepcopy(tree)
        meta = tree.setdefault("metadata", {})
        if kind.kind == "SelfSubjectAccessReview":
            return self._review(tree)
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = meta["generateName"] + uuid.uuid4().hex[:5]
        if kind.namespaced:
            meta.setdefault("namespace", namespace)
            if meta["namespace"] != namespace:
                raise Refused(
                    400, "BadRequest", "the namespace of the object does not match the request's"
                )
        if not trusted:
            tree.pop("status", None)
            self._validate(kind, tree, strict=strict)
        key = (kind.kind, namespace if kind.namespaced else "", meta["name"])
        with self.store.lock:
            if key in self.store.objects:
                raise Refused(
                    409, "AlreadyExists", f'{kind.plural} "{meta["name"]}" already exists'
                )
            meta |= {"uid": str(uuid.uuid4()), "generation": 1, "creationTimestamp": _now()}
            if not dry:
                self.store.objects[key] = tree
                self.store.note("ADDED", tree)
            return copy.deepcopy(tree)

    def _review(self, tree: Tree) -> Tree:
        asked = tree["spec"]["resourceAttributes"]
        what = "/".join(filter(None, [asked["resource"], asked.get("subresource")]))
        denied = any(
            verb == asked["verb"] and re.search(path, f"/{what}") for verb, path in self.forbidden
        )
        return tree | {"status": {"allowed": not denied}}

    def _validate(self, kind: Kind, tree: Tree, *, strict: bool) -> None:
        name = tree["metadata"].get("name", "")
        errors: list[str] = []
        if kind.kind == "RayJob":
            errors = self.schema.list_errors(tree) if self.schema else []
            unknown = [
                error for error in errors if "Additional properties" in error or "unknown" in error
            ]
            if unknown and strict:
                raise Refused(400, "BadRequest", f"strict decoding error: {'; '.join(unknown)}")
            errors = [error for error in errors if error not in unknown]
        elif kind.kind in ("ConfigMap", "NetworkPolicy", "Job"):
            import kubernetes_validate

            try:
                kubernetes_validate.validate(tree, "1.37", strict=strict)
            except kubernetes_validate.ValidationError as error:
                errors = [str(error.message)]
        if errors:
            raise Refused(422, "Invalid", f'{kind.kind} "{name}" is invalid: {"; ".join(errors)}')

    def replace(self, kind: Kind, namespace: str, name: str, change: Callable[[Tree], Tree], *, dry: bool, strict: bool,
                status: bool) -> Tree:  # fmt: skip
        key = (kind.kind, namespace if kind.namespaced else "", name)
        with self.store.lock:
            old = self.store.objects.get(key)
            if old is None:
                raise Refused(404, "NotFound", f'{kind.plural} "{name}" not found')
            new = change(copy.deepcopy(old))
            wanted = new.get("metadata", {}).get("resourceVersion")
            if wanted and wanted != old["metadata"]["resourceVersion"]:
                raise Refused(
                    409,
                    "Conflict",
                    "the object has been modified; please apply your changes to the latest",
                )
            if status:
                new = {**old, "status": new.get("status", {})}
            else:
                self._validate(
                    kind,
                    {key: value for key, value in new.items() if key != "status"},
                    strict=strict,
                )
                new = {**new, **({"status": old["status"]} if "status" in old else {})}
                if new.get("spec") != old.get("spec"):
                    new["metadata"]["generation"] = old["metadata"]["generation"] + 1
            kept = ("uid", "creationTimestamp", "deletionTimestamp")
            new["metadata"] |= {
                field: old["metadata"][field] for field in kept if field in old["metadata"]
            }
            if not dry:
                self.store.objects[key] = new
                self.store.note("MODIFIED", new)
                if new["metadata"].get("deletionTimestamp") and not new["metadata"].get(
                    "finalizers"
                ):
                    self._gone(key)
            return copy.deepcopy(new)

    def delete(self, kind: Kind, namespace: str, name: str) -> Tree:
        key = (kind.kind, namespace if kind.namespaced else "", name)
        with self.store.lock:
            tree = self.store.objects.get(key)
            if tree is None:
                raise Refused(404, "NotFound", f'{kind.plural} "{name}" not found')
            if not tree["metadata"].get("deletionTimestamp"):
                tree["metadata"]["deletionTimestamp"] = _now()
            if tree["metadata"].get("finalizers"):
                self.store.note("MODIFIED", tree)
                return copy.deepcopy(tree)
            self._gone(key)
            return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
                    "details": {"name": name, "uid": tree["metadata"]["uid"]}}  # fmt: skip

    def _gone(self, key: tuple[str, str, str]) -> None:
        """Under the lock: an object goes, and what it owns goes with it."""
        tree = self.store.objects.pop(key)
        self.store.note("DELETED", tree)
        uid = tree["metadata"]["uid"]
        for other, owned in list(self.store.objects.items()):
            if any(owner["uid"] == uid for owner in owned["metadata"].get("ownerReferences") or []):
                if owned["metadata"].get("finalizers"):
                    owned["metadata"].setdefault("deletionTimestamp", _now())
                    self.store.note("MODIFIED", owned)
                else:
                    self._gone(other)


@functools.cache
def _read(definition: Path) -> tuple[Tree, Schema]:
    """Once for all servers: it is large."""
    tree = json.loads(definition.read_text())
    return tree, Schema.from_definition(tree)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _kind(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.kind == name)


def _selected(tree: Tree, query: dict[str, str]) -> bool:
    labels = tree["metadata"].get("labels") or {}
    for part in filter(None, query.get("labelSelector", "").split(",")):
        key, given, value = part.partition("=")
        if key not in labels or (given and labels[key] != value.lstrip("=")):
            return False
    for part in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = part.partition("=")
        found: Any = tree
        for step in path.split("."):
            found = found.get(step, "") if isinstance(found, dict) else ""
        if found != value.lstrip("="):
            return False
    return True


def _patched(tree: Tree, patch: Any, how: str) -> Tree:
    if "json-patch" in how:
        for step in patch:
            *way, last = step["path"].strip("/").split("/")
            at = tree
            for name in way:
                at = at.setdefault(name, {})
            if step["op"] == "remove":
                at.pop(last)
            else:
                at[last] = step["value"]
        return tree
    return dict(apply_merge_patch(tree, patch))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: ApiServer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answered()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _answered(self) -> None:
        server, parts = self.server_of, urlsplit(self.path)
        query = {
            key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()
        }
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        server.requests.append((self.command, self.path))
        fault = self._fault()
        if fault and not fault.after:
            return self._fail(fault)
        try:
            if any(
                verb == _VERBS[self.command] and re.search(path, parts.path)
                for verb, path in server.forbidden
            ):
                raise Refused(
                    403, "Forbidden", f'User "me" cannot {_VERBS[self.command]} {parts.path}'
                )
            code, tree = self._do(
                parts.path.rstrip("/"), query, yaml.safe_load(body) if body else {}, body
            )
        except Refused as refused:
            code, tree = refused.code, refused.tree
        if fault:
            return self._fail(fault)
        if tree is not None:
            self._say(code, tree)
        return None

    def _fault(self) -> Fault | None:
        for fault in self.server_of.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, self.path):
                fault.times -= 1
                return fault
        return None

    def _fail(self, fault: Fault) -> None:
        if fault.status:
            refused = Refused(fault.status, "Fault", f"the test wants a {fault.status}")
            return self._say(fault.status, refused.tree, fault.headers)
        self.close_connection = True
        self.connection.shutdown(2)
        return None

    def _say(self, code: int, tree: Tree | str, headers: dict[str, str] | None = None) -> None:
        data = (tree if isinstance(tree, str) else json.dumps(tree)).encode()
        self.send_response(code)
        self.send_header(
            "Content-Type", "text/plain" if isinstance(tree, str) else "application/json"
        )
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _do(
        self, path: str, query: dict[str, str], tree: Any, body: bytes
    ) -> tuple[int, Tree | str | None]:
        known = _discovery(path)
        if known is not None:
            return 200, known
        server = self.server_of
        pattern = (
            r"(/api/v1|/apis/[^/]+/[^/]+)(?:/namespaces/([^/]+))?/([^/]+)(?:/([^/]+))?(?:/([^/]+))?"
        )
        found = re.fullmatch(pattern, path)
        if found and found[1] == "/api/v1" and found[3] == "namespaces" and not found[2]:
            base, namespace, plural, name, sub = found[1], "", "namespaces", found[4], found[5]
        elif found:
            base, namespace, plural, name, sub = found.groups()
        else:
            raise Refused(
                404, "NotFound", f"the server could not find the requested resource ({path})"
            )
        kind = next((kind for kind in KINDS if (kind.base, kind.plural) == (base, plural)), None)
        if kind is None:
            raise Refused(
                404, "NotFound", f"the server could not find the requested resource ({path})"
            )
        dry, strict = query.get("dryRun") == "All", query.get("fieldValidation") == "Strict"
        if sub == "log":
            return 200, server.pods_log(self._there(kind, name, namespace))
        if sub == "exec":
            return 0, self._exec(self._there(kind, name, namespace))
        if self.command == "POST":
            return 201, server.create(kind, namespace or "", tree, dry=dry, strict=strict)
        if self.command == "GET" and name:
            return 200, self._there(kind, name, namespace)
        if self.command == "GET":
            return self._listed(kind, namespace, query)
        if self.command == "DELETE":
            return 200, server.delete(kind, namespace or "", name)
        how = self.headers.get("Content-Type", "")
        if (
            self.command == "PATCH"
            and "apply" in how
            and server.get(kind.kind, name, namespace or "default") is None
        ):
            return 201, server.create(kind, namespace or "", tree, dry=dry, strict=strict)
        change = (
            (lambda old: _patched(old, tree, how)) if self.command == "PATCH" else (lambda _: tree)
        )
        return 200, server.replace(
            kind, namespace or "", name, change, dry=dry, strict=strict, status=sub == "status"
        )

    def _there(self, kind: Kind, name: str, namespace: str) -> Tree:
        found = self.server_of.get(kind.kind, name, namespace)
        if found is None:
            raise Refused(404, "NotFound", f'{kind.plural} "{name}" not found')
        return found

    def _listed(self, kind: Kind, namespace: str, query: dict[str, str]) -> tuple[int, Tree | None]:
        store = self.server_of.store
        if query.get("watch") in ("true", "1"):
            self._watch(kind, namespace, query)
            return 0, None
        with store.lock:
            all_of = [(key[1], tree) for key, tree in store.objects.items() if key[0] == kind.kind]
            items = [copy.deepcopy(tree) for where, tree in all_of
                     if namespace in (None, "", where) and _selected(tree, query)]  # fmt: skip
            return 200, {"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "items": items,
                         "metadata": {"resourceVersion": str(store.version)}}  # fmt: skip

    def _watch(self, kind: Kind, namespace: str, query: dict[str, str]) -> None:
        store, ends = (
            self.server_of.store,
            time.monotonic() + float(query.get("timeoutSeconds") or 300),
        )
        since = int(query.get("resourceVersion") or 0)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if query.get("sendInitialEvents") == "true":
            with store.lock:
                first = [
                    copy.deepcopy(tree)
                    for key, tree in store.objects.items()
                    if key[0] == kind.kind
                ]
                since = store.version
            for tree in first:
                if (not namespace or tree["metadata"]["namespace"] == namespace) and _selected(
                    tree, query
                ):
                    self._chunk({"type": "ADDED", "object": tree})
            mark = {
                "resourceVersion": str(since),
                "annotations": {"k8s.io/initial-events-end": "true"},
            }
            told = {"kind": kind.kind, "apiVersion": kind.api_version, "metadata": mark}
            self._chunk({"type": "BOOKMARK", "object": told})
        elif since and since < store.oldest:
            gone = Refused(410, "Expired", f"too old resource version: {since} ({store.oldest})")
            self._chunk({"type": "ERROR", "object": gone.tree})
            self.wfile.write(b"0\r\n\r\n")
            return
        cut = next(
            (fault for fault in self.server_of.faults if fault.method == "WATCH" and fault.times),
            None,
        )
        while time.monotonic() < ends and not self.server_of.closed:
            with store.lock:
                news = [row for row in store.history if row[0] > since]
                if not news:
                    store.lock.wait(0.2)
                since = max((row[0] for row in news), default=since)
            for _, event, tree in news:
                inside = tree["kind"] == kind.kind and (
                    not namespace or tree["metadata"].get("namespace") == namespace
                )
                if inside and _selected(tree, query):
                    self._chunk({"type": event, "object": tree})
                    if cut and cut.times:
                        cut.times -= 1
                        self.close_connection = True
                        self.connection.shutdown(2)
                        return
        with contextlib.suppress(OSError):  # the client may have gone
            self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, tree: Tree) -> None:
        data = self.server_of.chunk_of(tree).encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    # --- exec: a command's streams over a WebSocket

    def _exec(self, pod: Tree) -> None:
        asked = parse_qs(urlsplit(self.path).query)
        run = self.server_of.pods_exec
        if run is None:
            raise Refused(500, "InternalError", "no command can be run in pods here")
        offered = [
            word.strip() for word in self.headers.get("Sec-WebSocket-Protocol", "").split(",")
        ]
        protocol = next(name for name in offered if name in self.server_of.protocols)
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header(
            "Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        )
        self.send_header("Sec-WebSocket-Protocol", protocol)
        self.end_headers()
        self.close_connection = True
        process = run(pod, asked["command"])
        lock = threading.Lock()

        def pump(source: Any, channel: int) -> None:
            while block := source.read1(2**15):
                self._frame(bytes([channel]) + block, lock)

        outputs = ((process.stdout, 1), (process.stderr, 2))
        pumps = [threading.Thread(target=pump, args=output) for output in outputs]
        for thread in pumps:
            thread.start()
        feeder = threading.Thread(target=self._feed, args=(process,), daemon=True)
        feeder.start()
        code = process.wait()
        for thread in pumps:
            thread.join()
        status: Tree = {"metadata": {}, "status": "Success"}
        if code:
            causes = [{"reason": "ExitCode", "message": str(code)}]
            status = {"metadata": {}, "status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": causes},
                      "message": f"command terminated with non-zero exit code: {code}"}  # fmt: skip
        self._frame(b"\x03" + json.dumps(status).encode(), lock)
        self._frame(struct.pack(">H", 1000), lock, opcode=8)
        feeder.join(2)  # what the client still sends is taken, as an API server does

    def _frame(self, data: bytes, lock: threading.Lock, opcode: int = 2) -> None:
        size = len(data)
        head = bytes([0x80 | opcode]) + (
            bytes([size]) if size < 126 else bytes([126]) + struct.pack(">H", size) if size < 2**16
            else bytes([127]) + struct.pack(">Q", size)
        )  # fmt: skip
        with lock:
            try:
                self.wfile.write(head + data)
                self.wfile.flush()
            except OSError:  # the client has gone
                return

    def _feed(self, process: subprocess.Popen[bytes]) -> None:
        """What the client sends goes to the command's input."""
        assert process.stdin is not None
        for _ in itertools.count():
            head = self.rfile.read(2)
            if len(head) < 2 or head[0] & 15 == 8:
                break
            size = head[1] & 127
            if size > 125:
                size = struct.unpack(
                    ">H" if size == 126 else ">Q", self.rfile.read(2 if size == 126 else 8)
                )[0]
            mask = self.rfile.read(4)
            data = self.rfile.read(size)
            whole = (mask * (size // 4 + 1))[:size]
            data = (int.from_bytes(data, "big") ^ int.from_bytes(whole, "big")).to_bytes(
                size, "big"
            )
            if data[:1] == b"\xff":
                with contextlib.suppress(OSError):
                    process.stdin.close()
            if data[:1] == b"\x00":
                with contextlib.suppress(
                    OSError, ValueError
                ):  # a command that has ended takes no more
                    process.stdin.write(data[1:])
                    process.stdin.flush()
        try:
            process.stdin.close()
        except OSError:
            return


_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


def _discovery(path: str) -> Tree | None:
    """What kubectl asks before anything else."""
    groups = sorted({kind.group for kind in KINDS if kind.group})
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0-double"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        first = {group: {"groupVersion": f"{group}/v1", "version": "v1"} for group in groups}
        listed = [
            {"name": name, "versions": [version], "preferredVersion": version}
            for name, version in first.items()
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    for base in ("/api/v1", *(f"/apis/{group}/v1" for group in groups)):
        mine = [kind for kind in KINDS if kind.base == base]
        if path == base:
            verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
            listed = [{"name": kind.plural, "singularName": kind.kind.lower(), "namespaced": kind.namespaced,
                       "kind": kind.kind, "verbs": verbs} for kind in mine]  # fmt: skip
            version = mine[0].api_version
            return {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": version,
                "resources": listed,
            }
        if path == f"/openapi/v3{base}":
            paths = {}
            for kind in mine:
                gvk = {"group": kind.group, "version": kind.version, "kind": kind.kind}
                options = [{"name": name, "in": "query"} for name in ("fieldValidation", "dryRun")]
                told = {"x-kubernetes-group-version-kind": gvk, "parameters": options}
                paths[f"{base}/namespaces/{{namespace}}/{kind.plural}/{{name}}"] = {"patch": told}
            return {"openapi": "3.0.0", "info": {"title": "double", "version": "1"}, "paths": paths}
    if path == "/openapi/v3":
        bases = ["api/v1", *(f"apis/{group}/v1" for group in groups)]
        return {
            "paths": {base: {"serverRelativeURL": f"/openapi/v3/{base}?hash=1"} for base in bases}
        }
    return None
