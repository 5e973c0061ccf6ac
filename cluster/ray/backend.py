"""A Ray cluster that is up already, reached by its job server: a run is a job of Ray's for each submission."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import secrets
import shlex
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafleet.cluster import submitted_runs as registry
from lorafleet.cluster.backend import Say, Seen, quietly
from lorafleet.cluster.local import write_run
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.remote.backend import (
    Away,
    Place,
    begin_submission,
    bring,
    exit_code,
    keep,
    or_said_to_be_missing,
    seen_last,
    settled,
    stored,
    unknown_there,
    written,
)
from lorafleet.cluster.remote.transfer import Which
from lorafleet.jobs import files
from lorafleet.jobs.errors import PlacementRefused, RunError, UserError
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.bundle import DOCUMENT, TEXTS, pack
from lorafleet.jobs.runs.plan import Plan
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.schema.environment import OFFLINE
from lorafleet.jobs.sites.base import RaySite
from lorafleet.jobs.sites.ray import RayClusterSite

if TYPE_CHECKING:
    from lorafleet.cluster.doctor import Finding
    from lorafleet.cluster.ray.client import AsJobs, JobInfo, RayJobs

_LOOK_SECONDS = 3.0
_SURE = 3
"""Looks that find no job before it is taken for lost: a head that is starting knows none."""
_REFRESH_SECONDS = 30.0
"""Between two looks into the run's folder: each is a job of its own."""


class RayBackend(Away[RayClusterSite]):
    """Submits to the job server of a Ray cluster."""

    def __init__(self, site: RayClusterSite, nodes: int | None = None) -> None:
        if nodes is not None:
            raise PlacementRefused(f"--nodes is {nodes}, but the Ray of site {site.name} has the machines that it has")
        self.site = site
        self.called = f"site {site.name}"
        self.mount = site.storage
        self.storage = f"{site.address} {site.storage}"
        self.internet = site.internet

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> RayBackend:
        """Return the backend of a submitted run, with the site as it was then."""
        return cls(RayClusterSite.model_validate_json(json.dumps(record["site"])))

    @functools.cached_property
    def jobs(self) -> RayJobs:
        """The job server. Raises RayUnreachable."""
        from lorafleet.cluster.ray.client import RayJobs

        return RayJobs(self.site.address)

    @contextlib.contextmanager
    def reached(self, say: Say) -> Iterator[Place]:
        """Commands are run as short jobs."""
        yield self._place()

    def _place(self) -> AsJobs:
        from lorafleet.cluster.ray.client import AsJobs

        return AsJobs(self.jobs, self._variables())

    def _variables(self) -> dict[str, str]:
        own = {"LORAFLEET_CACHE": self.cache, "HF_HUB_CACHE": f"{self.cache}/hub"}
        own |= {"LORAFLEET_TRUSTED_FOLDERS": self.mount, "TOKENIZERS_PARALLELISM": "false"}
        return own | ({} if self.internet else OFFLINE) | self.site.environment

    # --- before

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Everything that would happen, on the machines that the cluster has now. Raises a UserError."""
        there = RaySite(
            address=self.site.address, nodes=self.jobs.nodes(), gpu_memory_gib=self.site.gpu_memory_gb * 1e9 / 2**30
        )
        made = self.moved(make_plan(loaded, there, command, self.site.allow_environment))
        line = shlex.join(self._entrypoint("RUN"))
        return made.model_copy(
            update={"site": self.site.name, "command_line": f"ray job submit --address {self.site.address} -- {line}"}
        )

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """What the cluster has against the job; what was not asked."""
        return self.unseen(plan.job), self.unbrought(plan.job)

    def _entrypoint(self, run: str) -> list[str]:
        told = [f"{name}={value}" for name, value in self._variables().items()]
        return ["env", *told, "lorafleet", "exec", self.folder_of(run), "--job", DOCUMENT]

    def folder_of(self, run: str) -> str:
        """Where the machines see a run."""
        return f"{self.mount}/runs/{run}"

    def newest(self, run: str) -> int:
        """Which submission of a run Ray knows as the newest; the first where it has forgotten all."""
        numbers = [name.removeprefix(f"{run}-") for name in self.jobs.names() if name.startswith(f"{run}-")]
        return max((int(number) for number in numbers if number.isdigit()), default=1)

    # --- handing over

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Make the run's record here, and hand the job over. Raises a UserError, and leaves nothing, where it fails."""
        refused = self.unseen(plan.job)
        if refused:
            raise PlacementRefused("\n".join(refused))
        run = write_run(plan, loaded, runs)
        try:
            self._hand_over(run, 1)
        except BaseException as error:
            self._not_taken(run, error, for_sure=self._has_nothing_of(run))
        registry.add(run, self.site.name)
        return run

    def _has_nothing_of(self, run: Run) -> bool:
        """Whether the cluster has no job of the run for sure."""
        try:
            return "submission" not in stored(run) or self.jobs.info(self.name_of(run)) is None
        except UserError:
            return False

    def _hand_over(self, run: Run, submission: int, call: str = "") -> None:
        call = call or secrets.token_hex(8)
        facts = {"kind": self.site.kind, "site": self.site.model_dump(mode="json"), "submission": submission}
        begin_submission(run, facts | {"call": call, "handed_over": False})
        texts = {name: (run.path / name).read_text() for name in TEXTS}
        name = self.name_of(run)
        with tempfile.TemporaryDirectory(prefix="lorafleet-") as folder:
            for file, text in pack(str(run.status()["name"]), texts, submission).items():
                (Path(folder) / file).write_text(text)
            line, marks = shlex.join(self._entrypoint(run.id)), {"run": run.id, "call": call}
            try:
                self.jobs.submit(name, line, Path(folder), marks)
            except UserError:
                found = self.jobs.info(name)  # an answer may have been lost
                if found is None or found.metadata.get("call") != call:
                    raise
        keep(run, submission, handed_over=True)

    def resume(self, run: Run) -> None:
        """Hand an unfinished run over again, as a job of its own. Raises RunError while one of it lives."""
        facts, found = stored(run), self.jobs.info(self.name_of(run))
        if found is not None and not found.ended:
            raise RunError(f"{run.id} has job {self.name_of(run)}, which is {found.status}")
        if facts.get("handed_over") or found is not None:
            return self._hand_over(run, int(facts["submission"]) + 1)
        return self._hand_over(run, int(facts["submission"]), str(facts["call"]))

    # --- while it lives

    def name_of(self, run: Run) -> str:
        """The submission id of the run's newest job."""
        return f"{run.id}-{stored(run)['submission']}"

    def look(self, run: Run) -> Seen:
        """Where a run is: asked of the cluster first, of what was seen last where that does not answer."""
        try:
            found = self.jobs.info(self.name_of(run))
        except UserError as error:
            return seen_last(run) or Seen(run.state, f"{error}; the record here says {run.state}", asked=False)
        now = seen(run, self.name_of(run), found)
        return settled(run, int(stored(run)["submission"]), now) if found is not None and found.ended else now

    def refresh(self, run: Run, say: Say = quietly) -> None:
        """Bring what the run has written since, and what its driver has said where its own log is not here."""
        with contextlib.suppress(UserError):
            bring(self._place(), self.folder_of(run.id), run, wait=False)
        self._words(run)

    def _words(self, run: Run) -> None:
        with contextlib.suppress(UserError):
            if not (run.path / "logs" / "driver.log").is_file():
                words = self.jobs.words(self.name_of(run))
                if words:
                    files.write_text(run.path / "logs" / "submitter.log", words)

    def collect(self, run: Run, submission: int) -> None:
        """Bring the record of a submission that has ended; what hinders it is written down."""
        with or_said_to_be_missing(run, submission):
            bring(self._place(), self.folder_of(run.id), run)
        self._words(run)

    def pull(self, run: Run, which: Which, say: Say) -> int:
        """Bring a run's record, W&B's files and the weights of `which` trials; returns how many files came."""
        count = bring(self._place(), self.folder_of(run.id), run, which, whole=True)
        keep(run, int(stored(run)["submission"]), missing=None, collected=True)
        return count

    def watch(self, run: Run) -> RayWatch:
        """The job, asked about every few seconds."""
        return RayWatch(self, run)

    def cancel(self, run: Run) -> str:
        """Ask the run to save and end; one whose driver has not begun is taken back."""
        name, found = self.name_of(run), self.jobs.info(self.name_of(run))
        if found is None or found.ended:
            raise RunError(f"{run.id} has no job that waits or runs: it is {self.look(run).state}")
        keep(run, int(stored(run)["submission"]), stopping=True)
        if found.status == "RUNNING":  # Ray itself would give it three seconds
            self._place().run(["lorafleet", "node", "stop", self.folder_of(run.id)], lambda _: None)
            return f"{run.id} saves its trials and ends (job {name}); `lorafleet resume {run.id}` goes on"
        self.jobs.stop(name)
        return f"{run.id} is taken back; `lorafleet resume {run.id}` submits it again"

    def end_at_once(self, run: Run) -> None:
        """End the run's job; nothing is saved."""
        self.jobs.stop(self.name_of(run))

    def findings(self) -> list[Finding]:
        """Ask the cluster for what a job needs, and run a short one."""
        from lorafleet.cluster.ray.doctor import findings

        return findings(self)


def seen(run: Run, name: str, job: JobInfo | None) -> Seen:
    """Where a run is, from what Ray says of its job (None: nothing) and from what is here of its own record."""
    if job is None:
        return unknown_there(run, f"Ray does not know job {name} any more: a head that begins anew forgets its jobs")
    if job.status == "PENDING":
        why = job.message.partition(".")[0]
        return Seen(RunState.PENDING, f"job {name} waits" + (f": {why}" if why else ""))
    if job.status == "RUNNING":
        return Seen(RunState.RUNNING, f"job {name} runs")
    own, reason = written(run)
    if job.status == "SUCCEEDED":
        return Seen(own if own in (RunState.STOPPED, RunState.FAILED) else RunState.FINISHED, reason)
    if job.status == "STOPPED" or own is RunState.STOPPED:
        return Seen(RunState.STOPPED, f"job {name} was stopped; `lorafleet resume {run.id}` goes on")
    words = reason if own is RunState.FAILED else ""
    words = words or f"job {name} failed: {' '.join(job.message.split())[:300]}"
    return Seen(RunState.FAILED, "; ".join(filter(None, [words, reason if own is None else ""])))


class RayWatch:
    """A job of a Ray cluster, for somebody who waits for its end; a thread brings what the run writes."""

    detaches = True

    def __init__(self, backend: RayBackend, run: Run) -> None:
        self.backend, self.run = backend, run
        self.name = backend.name_of(run)
        self.submission = int(stored(run)["submission"])
        self.seen = Seen(run.state)
        self._unknown = 0
        self._looked_at = -_LOOK_SECONDS
        self._end = threading.Event()
        threading.Thread(target=self._refresh, daemon=True, name=f"refresh {run.id}").start()

    def _refresh(self) -> None:
        while not self._end.wait(_REFRESH_SECONDS):
            if self.seen.state is RunState.RUNNING:
                self.backend.refresh(self.run)

    def poll(self) -> int | None:
        """The driver's exit code once the job has ended, with the run's record here as it is then."""
        if time.monotonic() - self._looked_at < _LOOK_SECONDS:
            return None
        self._looked_at = time.monotonic()
        try:
            job = self.backend.jobs.info(self.name)
        except UserError as error:
            self.seen = Seen(self.seen.state, str(error))
            return None
        self._unknown = self._unknown + 1 if job is None else 0
        now = seen(self.run, self.name, job)
        if now.state in (RunState.PENDING, RunState.RUNNING) or 0 < self._unknown < _SURE:
            self.seen = now
            return None
        self._end.set()
        self.backend.collect(self.run, self.submission)
        self.seen = settled(self.run, self.submission, seen(self.run, self.name, job))
        code = job.code if job is not None else None
        if code is None and job is not None:
            said = re.search(r"exit code (\d+)", job.message)
            code = int(said[1]) if said else None
        return exit_code(self.run, self.seen, code)

    def send_signal(self, number: int) -> None:
        """A job elsewhere does not hear this process's signals."""

    def close(self) -> None:
        """End the thread."""
        self._end.set()
