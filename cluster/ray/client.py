"""Ray's job server, through Ray's own client: jobs by their submission id, and commands run as jobs."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.cluster.ray.nodes import node_of_state
from lorafleet.jobs.errors import CommandFailed, PlacementRefused, UserError
from lorafleet.jobs.sites.base import Node

_MOST_BYTES = 500_000_000
"""Ray takes packages of half a GiB."""
_COMMAND_SECONDS = 1800.0
_SECONDS = (5.0, 60.0)
"""To connect, and for an answer."""
_OTHER_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
RELAYED = "lorafleet-relay"


class RayUnreachable(UserError):
    """No job server answers, or it answers with an error."""


@contextlib.contextmanager
def _no_other_address() -> Iterator[None]:
    """Ray's clients take what these variables say before what they are told."""
    kept = {name: os.environ.pop(name) for name in _OTHER_ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@dataclass(frozen=True)
class JobInfo:
    """What Ray says of a job."""

    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    code: int | None
    """What its command ended with."""
    metadata: dict[str, str]

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class RayJobs:
    """The jobs of one Ray cluster."""

    def __init__(self, address: str) -> None:
        """Raises RayUnreachable when no job server answers."""
        self.address = address
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):  # type: ignore[misc]
            """Ray's, whose requests may take for ever otherwise."""

            def _do_request(self, *words: Any, **options: Any) -> Any:
                return super()._do_request(*words, **{"timeout": _SECONDS} | options)

        with self._said(), _no_other_address():
            self.client = Client(address)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """Every way in which a request fails, as a sentence."""
        from ray.exceptions import AuthenticationError, RayError

        try:
            yield
        except AuthenticationError as error:
            raise RayUnreachable(
                f"the Ray at {self.address} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN in your shell"
            ) from error
        except (RayError, ConnectionError, RuntimeError, OSError, ValueError) as error:
            words = " ".join(str(error).split())[:300]
            raise RayUnreachable(f"the Ray at {self.address} does not take that: {words}") from error

    def nodes(self) -> tuple[Node, ...]:
        """The machines that live. Raises RayUnreachable."""
        from ray.util.state import list_nodes
        from ray.util.state.exception import RayStateApiException

        with self._said(), _no_other_address():
            try:
                rows = list_nodes(self.address, filters=[("state", "=", "ALIVE")], limit=1000, detail=True)
            except RayStateApiException as error:
                raise RuntimeError(str(error)) from error
        return tuple(sorted((node_of_state(row) for row in rows), key=lambda node: node.name))

    def submit(self, name: str, entrypoint: str, folder: Path | None, metadata: dict[str, str]) -> None:
        """Hand a job over; the folder is where its command runs. Raises RayUnreachable."""
        env = {"working_dir": str(folder)} if folder else {}
        with self._said():
            self.client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=env, metadata=metadata)

    def info(self, name: str) -> JobInfo | None:
        """What is known of a job, or None. Raises RayUnreachable."""
        with self._said():
            try:
                found = self.client.get_job_info(name)
            except RuntimeError as error:
                if "status code 404" in str(error) and f"Job {name} does not exist" in str(error):
                    return None
                raise
        status = str(getattr(found.status, "value", found.status))
        code = found.driver_exit_code
        return JobInfo(status, str(found.message or ""), code, dict(found.metadata or {}))

    def names(self) -> list[str]:
        """The submission ids that the cluster knows. Raises RayUnreachable."""
        with self._said():
            return [str(job.submission_id) for job in self.client.list_jobs() if job.submission_id]

    def stop(self, name: str) -> None:
        """End a job: Ray gives it a few seconds. Raises RayUnreachable."""
        with self._said():
            self.client.stop_job(name)

    def words(self, name: str) -> str:
        """All that a job has said. Raises RayUnreachable."""
        with self._said():
            return str(self.client.get_job_logs(name))

    def forget(self, name: str) -> None:
        """Have Ray forget a job that has ended."""
        with contextlib.suppress(RayUnreachable), self._said():
            self.client.delete_job(name)


@dataclass(frozen=True)
class AsJobs:
    """Commands that see the storage, each run as a short job on the cluster's head."""

    jobs: RayJobs
    environment: dict[str, str]

    def run(self, command: list[str], take: Callable[[bytes], object], feed: Iterable[bytes] = ()) -> None:
        """Run one: its input goes along as a file, and what it prints comes back in the job's log, as text.

        Raises CommandFailed and RayUnreachable.
        """
        name = f"lorafleet-relay-{secrets.token_hex(4)}"
        told = [f"{key}={value}" for key, value in self.environment.items()]
        line = ["env", *told, "lorafleet", "node", "relay", "input", "--", *command[2:]]
        with tempfile.TemporaryDirectory(prefix="lorafleet-") as folder:
            size = 0
            with (Path(folder) / "input").open("wb") as file:
                for block in feed:
                    size += file.write(block)
            if size > _MOST_BYTES:
                raise PlacementRefused(
                    f"{size / 1e6:,.0f} MB are too much for Ray's job server, which takes {_MOST_BYTES / 1e6:,.0f}: "
                    "lay it into the storage by hand, and name it by its path there"
                )
            self.jobs.submit(name, shlex.join(line), Path(folder), {"lorafleet": "relay"})
        info = self._ended(name)
        said = self.jobs.words(name)
        self.jobs.forget(name)
        found = re.search(rf"^{RELAYED} (\{{.*\}})$", said, re.MULTILINE)
        if found is None:
            words = " ".join((info.message or said).split())[-300:]
            raise CommandFailed(f"{' '.join(command[:3])} did not run on the cluster: {words}")
        told_back = json.loads(found[1])
        if told_back["code"]:
            raise CommandFailed(told_back["error"] or f"{' '.join(command[:3])} ended with code {told_back['code']}")
        try:
            for line_of in said[found.end() :].split():
                take(base64.b64decode(line_of, validate=True))
        except binascii.Error as error:
            raise CommandFailed(f"what {' '.join(command[:3])} said came mixed with other words") from error

    def _ended(self, name: str) -> JobInfo:
        ends = time.monotonic() + _COMMAND_SECONDS
        while time.monotonic() < ends:
            info = self.jobs.info(name)
            if info is not None and info.ended:
                return info
            time.sleep(0.3)
        self.jobs.stop(name)
        raise CommandFailed(f"job {name} did not end within {_COMMAND_SECONDS / 60:.0f} minutes")


def relay(source: Path, command: list[str]) -> None:
    """At the other end: run one of our own `node` commands on a file's bytes, and print what it says as text."""
    import subprocess
    import sys

    script = Path(sys.executable).with_name("lorafleet")
    with source.open("rb") as file:
        done = subprocess.run([str(script), "node", *command], stdin=file, capture_output=True, check=False)
    told: dict[str, Any] = {"code": done.returncode, "error": done.stderr.decode(errors="replace").strip()[-2000:]}
    if len(done.stdout) > _MOST_BYTES:
        size = f"{len(done.stdout) / 1e6:,.0f} MB"
        told = {"code": 1, "error": f"{size} are too much for a job's log: copy them from the storage by hand"}
    out = sys.stdout
    out.write(f"{RELAYED} {json.dumps(told)}\n")
    if not told["code"]:
        for start in range(0, len(done.stdout), 57_000):
            out.write(base64.b64encode(done.stdout[start : start + 57_000]).decode() + "\n")
    out.flush()
