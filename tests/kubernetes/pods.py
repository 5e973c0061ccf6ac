"""What stands beside the API server of the tests: a kubelet for transfer pods.

The operator is the test itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kubernetes.api_server import ApiServer, Tree

BIN = Path(sys.executable).parent


def environment(container: Tree) -> dict[str, str]:
    """The variables of a container, those from Secrets left out."""
    told = {row["name"]: row["value"] for row in container.get("env") or [] if "value" in row}
    return {name: value.replace("$$(", "$(") for name, value in told.items()}


class Kubelet:
    """Runs the pods of plain Jobs, as processes of this machine: their paths are this machine's."""

    def __init__(self, server: ApiServer) -> None:
        self.server, self.end = server, threading.Event()
        self.holds_back: Callable[[Tree], bool] = lambda _: False
        server.pods_exec = self.run
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while not self.end.wait(0.05):
            for job in self.server.all("Job"):
                name = job["metadata"]["name"]
                if self.server.get("Pod", f"{name}-pod") is None and not self.holds_back(job):
                    template = job["spec"]["template"]
                    owner = {
                        "apiVersion": "batch/v1",
                        "kind": "Job",
                        "name": name,
                        "uid": job["metadata"]["uid"],
                    }
                    labels = template["metadata"]["labels"] | {"job-name": name}
                    self.pod(f"{name}-pod", labels, template["spec"], owner)

    def pod(
        self,
        name: str,
        labels: dict[str, str],
        spec: Tree,
        owner: Tree | None = None,
        phase: str = "Running",
    ) -> None:
        """A pod that is there."""
        states = [{"name": one["name"], "state": {"running": {}}} for one in spec["containers"]]
        self.server.put_down({
            "apiVersion": "v1", "kind": "Pod", "spec": spec,
            "metadata": {"name": name, "labels": labels, "ownerReferences": [owner] if owner else []},
            "status": {"phase": phase, **({"containerStatuses": states} if phase == "Running" else {})},
        })  # fmt: skip

    def run(self, pod: Tree, command: list[str]) -> subprocess.Popen[bytes]:
        """A command in a pod."""
        own = environment(pod["spec"]["containers"][0])
        env = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": os.environ["HOME"], **own}
        return subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )


def became(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """What a condition says once it holds."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def secrets_asked(server: ApiServer) -> list[tuple[str, str]]:
    """Requests about Secrets: there must be none."""
    return [request for request in server.requests if re.search(r"/secrets\b", request[1])]
