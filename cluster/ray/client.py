"""A client of Ray's job server: jobs by their submission id, and commands that run as jobs."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import logging
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

from lorafleet.cluster.ray.nodes import parse_state_node
from lorafleet.jobs.errors import CommandFailed, PlacementRefused, UserError
from lorafleet.jobs.sites.base import Node

_LOGGER = logging.getLogger(__name__)
_MAX_BYTES = 500_000_000
"""Largest input or output of a command in bytes: Ray accepts packages of half a GiB."""
_COMMAND_TIMEOUT_SECONDS = 1800.0
_ABANDON_SECONDS = 15.0
"""Longest wait for the end of a job that is not needed any more. Ray kills one after 3 seconds."""
_REQUEST_TIMEOUTS = (5.0, 60.0)
"""Timeouts in seconds: to connect, and for a response."""
_ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
RELAYED = "lorafleet-relay"
_RAY_CLIENT = "ray.dashboard.modules"
_RELAY_PREFIX = "lorafleet-relay-"
"""Beginning of the submission ids of short jobs."""
_KEPT_MILLISECONDS = 60_000
_ABSENCES = 4
"""Queries in a row without an interrupted job after which it counts as deleted."""


class RayUnreachable(UserError):
    """Raised when no job server answers, or when it answers with an error."""


@contextlib.contextmanager
def _hide_address_variables() -> Iterator[None]:
    """Hide the address variables: Ray's clients prefer them to the address they are given."""
    saved = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


@dataclass(frozen=True)
class JobInfo:
    """A job as Ray reports it."""

    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    code: int | None
    """Exit code of the job's command; None if unknown."""
    metadata: dict[str, str]
    end_time: int = 0
    """Time of its end by the cluster's clock, in milliseconds; 0 before."""

    @property
    def ended(self) -> bool:
        """Return whether the job is in a final state."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class RayJobs:
    """The jobs of one Ray cluster.

    A thin layer over Ray's JobSubmissionClient: with timeouts, with one kind of error, and
    with jobs that do not exist as None.
    """

    def __init__(self, address: str) -> None:
        """Connect to the job server. Raises RayUnreachable if none answers."""
        self.address = address
        from ray.job_submission import JobSubmissionClient

        # Ray reports each upload on the terminal, where only the user's own lines belong. Its
        # client gives its loggers a level of their own.
        for logger in ("ray", f"{_RAY_CLIENT}.dashboard_sdk", f"{_RAY_CLIENT}.job.sdk"):
            logging.getLogger(logger).setLevel(logging.WARNING)

        class Client(JobSubmissionClient):  # type: ignore[misc]
            """Ray's client with timeouts: its requests could otherwise wait for ever."""

            def _do_request(self, *arguments: Any, **options: Any) -> Any:
                return super()._do_request(*arguments, **{"timeout": _REQUEST_TIMEOUTS} | options)

        with self._translate_errors(), _hide_address_variables():
            self.client = Client(address)

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise every failure of a request as RayUnreachable with a readable message."""
        from ray.exceptions import AuthenticationError, RayError

        try:
            yield
        except AuthenticationError as error:
            raise RayUnreachable(
                f"the Ray cluster at {self.address} requires a token: set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN in your shell"
            ) from error
        except (RayError, ConnectionError, RuntimeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            if _is_connection_error(error):
                raise RayUnreachable(
                    f"the Ray cluster at {self.address} is unreachable ({reason}): check "
                    "`address` in the site file, and whether the cluster runs"
                ) from error
            raise RayUnreachable(
                f"the request to the Ray cluster at {self.address} failed: {reason}. If the "
                "cluster has problems, `lorafleet doctor --on SITE` may show which"
            ) from error

    def get_nodes(self) -> tuple[Node, ...]:
        """Return the machines that are alive. Raises RayUnreachable."""
        from ray.util.state import list_nodes
        from ray.util.state.exception import RayStateApiException

        with self._translate_errors(), _hide_address_variables():
            try:
                rows = list_nodes(
                    self.address, filters=[("state", "=", "ALIVE")], limit=1000, detail=True
                )
            except RayStateApiException as error:
                raise RuntimeError(str(error)) from error
        return tuple(sorted((parse_state_node(row) for row in rows), key=lambda node: node.name))

    def submit(
        self, name: str, entrypoint: str, folder: Path | None, metadata: dict[str, str]
    ) -> None:
        """Submit a job; its command runs in `folder`. Raises RayUnreachable.

        Args:
            name: Submission id, which must be new.
            entrypoint: Shell command.
            folder: Uploaded with the job. None: no working directory.
            metadata: Texts that `get_info` returns again.
        """
        _LOGGER.info("submitting job %s", name)
        env = {"working_dir": str(folder)} if folder else {}
        with self._translate_errors():
            self.client.submit_job(
                entrypoint=entrypoint, submission_id=name, runtime_env=env, metadata=metadata
            )

    def get_info(self, name: str) -> JobInfo | None:
        """Return what Ray knows of a job, or None. Raises RayUnreachable.

        None means that the cluster has answered and has no such job.
        """
        with self._translate_errors():
            try:
                details = self.client.get_job_info(name)
            except RuntimeError as error:
                # A proxy may answer 404 as well, with another text: that is no proof that the job
                # is gone.
                if "status code 404" in str(error) and f"Job {name} does not exist" in str(error):
                    return None
                raise
        return _parse_details(details)

    def list_names(self) -> list[str]:
        """Return the submission ids that the cluster knows. Raises RayUnreachable."""
        with self._translate_errors():
            return [str(job.submission_id) for job in self.client.list_jobs() if job.submission_id]

    def list_infos(self) -> dict[str, JobInfo]:
        """Return the jobs that the cluster knows, by submission id. Raises RayUnreachable."""
        with self._translate_errors():
            return {
                str(job.submission_id): _parse_details(job)
                for job in self.client.list_jobs()
                if job.submission_id
            }

    def stop(self, name: str) -> None:
        """Stop a job: Ray gives it a few seconds to end. Raises RayUnreachable."""
        with self._translate_errors():
            self.client.stop_job(name)

    def read_output(self, name: str) -> str:
        """Return the whole output of a job. Raises RayUnreachable."""
        with self._translate_errors():
            return str(self.client.get_job_logs(name))

    def delete(self, name: str) -> None:
        """Delete an ended job from Ray's list; errors are ignored.

        Ray's own monitor writes a job that is deleted within a second or two of its end again,
        as FAILED (seen with 2.60).
        """
        with contextlib.suppress(RayUnreachable), self._translate_errors():
            self.client.delete_job(name)


def _parse_details(details: Any) -> JobInfo:
    return JobInfo(
        str(getattr(details.status, "value", details.status)),
        str(details.message or ""),
        details.driver_exit_code,
        dict(details.metadata or {}),
        int(details.end_time or 0),
    )


def _is_connection_error(error: BaseException) -> bool:
    """Return whether no server answered. requests' errors are OSErrors, Ray's a ConnectionError."""
    import requests

    kinds = (ConnectionError, TimeoutError, requests.ConnectionError, requests.Timeout)
    causes = (error, error.__cause__, error.__context__)
    return any(isinstance(cause, kinds) for cause in causes if cause is not None)


@dataclass(frozen=True)
class JobCommandRunner:
    """Runs commands that see the storage, each as a short job on the cluster's head.

    The job server can upload files and return logs, and nothing else. So the input is a
    file of the job, and binary output returns as base64 lines in its log.
    """

    jobs: RayJobs
    environment: dict[str, str]

    def run(
        self, command: list[str], take: Callable[[bytes], object], feed: Iterable[bytes] = ()
    ) -> None:
        """Run a command: its input is sent as a file, its output returns as text in the job's log.

        Raises:
            CommandFailed: The command did not run, failed, or its output is damaged.
            RayUnreachable: The job server does not answer.
            PlacementRefused: The input is too large for Ray's job server.
        """
        name = f"{_RELAY_PREFIX}{secrets.token_hex(4)}"
        assignments = [f"{key}={value}" for key, value in self.environment.items()]
        # The first two words of a command are always `lorafleet node`, which `relay` adds again.
        line = ["env", *assignments, "lorafleet", "node", "relay", "input", "--", *command[2:]]
        with tempfile.TemporaryDirectory(prefix="lorafleet-") as folder:
            size = 0
            with (Path(folder) / "input").open("wb") as file:
                for block in feed:
                    size += file.write(block)
            if size > _MAX_BYTES:
                raise PlacementRefused(
                    f"the upload has {size / 1e6:,.0f} MB, but Ray's job server accepts at most "
                    f"{_MAX_BYTES / 1e6:,.0f}: copy the files to the storage yourself, and use "
                    "their path there in the job file"
                )
            try:
                self.jobs.submit(name, shlex.join(line), Path(folder), {"lorafleet": "relay"})
                info = self._wait_for_end(name)
                output = self.jobs.read_output(name)
            # Also an interrupt: the cluster's other users must not find half-done jobs of ours.
            except BaseException:
                self._abandon(name)
                raise
        self._delete_earlier(info)
        # Ray and the environment may print before the marker.
        match = re.search(rf"^{RELAYED} (\{{.*\}})$", output, re.MULTILINE)
        if match is None:
            reason = " ".join((info.message or output).split())[-300:]
            raise CommandFailed(f"{' '.join(command[:3])} did not run on the cluster: {reason}")
        reply = json.loads(match[1])
        if reply["code"]:
            raise CommandFailed(
                reply["error"] or f"{' '.join(command[:3])} ended with exit code {reply['code']}"
            )
        try:
            for encoded in output[match.end() :].split():
                take(base64.b64decode(encoded, validate=True))
        except binascii.Error as error:
            raise CommandFailed(
                f"the output of {' '.join(command[:3])} is damaged: other text is mixed into it"
            ) from error

    def _wait_for_end(self, name: str) -> JobInfo:
        deadline = time.monotonic() + _COMMAND_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            info = self.jobs.get_info(name)
            if info is not None and info.ended:
                return info
            time.sleep(0.3)
        raise CommandFailed(
            f"job {name} did not end within {_COMMAND_TIMEOUT_SECONDS / 60:.0f} minutes"
        )

    def _delete_earlier(self, newest: JobInfo) -> None:
        """Delete the short jobs from Ray's list that ended a minute before `newest`.

        Otherwise the list of a cluster would fill with them. Younger ones may still be read by
        somebody, and stay as SUCCEEDED.
        """
        with contextlib.suppress(RayUnreachable):
            for name, info in self.jobs.list_infos().items():
                is_old = info.ended and info.end_time < newest.end_time - _KEPT_MILLISECONDS
                if name.startswith(_RELAY_PREFIX) and is_old:
                    self.jobs.delete(name)

    def _abandon(self, name: str) -> None:
        """Stop a job and delete it from Ray's list, as far as the cluster answers."""
        deadline = time.monotonic() + _ABANDON_SECONDS
        with contextlib.suppress(RayUnreachable):
            info = self.jobs.get_info(name)
            if info is not None and not info.ended:
                self.jobs.stop(name)
            # Ray's monitor may write it once more after it was deleted.
            absent = 0
            while absent < _ABSENCES and time.monotonic() < deadline:
                info = self.jobs.get_info(name)
                absent = absent + 1 if info is None else 0
                if info is not None and info.ended:
                    self.jobs.delete(name)
                time.sleep(0.7)


def relay(source: Path, command: list[str]) -> None:
    """Run one of lorafleet's `node` commands on a file's bytes, and print its output as text.

    This is the cluster's end of `JobCommandRunner.run`.
    """
    import subprocess
    import sys

    script = Path(sys.executable).with_name("lorafleet")
    with source.open("rb") as file:
        process = subprocess.run(
            [str(script), "node", *command], stdin=file, capture_output=True, check=False
        )
    reply: dict[str, Any] = {
        "code": process.returncode,
        "error": process.stderr.decode(errors="replace").strip()[-2000:],
    }
    if len(process.stdout) > _MAX_BYTES:
        size = f"{len(process.stdout) / 1e6:,.0f} MB"
        reply = {
            "code": 1,
            "error": (
                f"the output has {size}, which is too much for a job's log: copy the files from "
                "the storage yourself"
            ),
        }
    out = sys.stdout
    out.write(f"{RELAYED} {json.dumps(reply)}\n")
    if not reply["code"]:
        for start in range(0, len(process.stdout), 57_000):
            out.write(base64.b64encode(process.stdout[start : start + 57_000]).decode() + "\n")
    out.flush()
