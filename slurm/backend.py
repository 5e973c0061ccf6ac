"""The Slurm backend: a run is a job in the queue.

It is found again by the job numbers in the run's folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lorafleet.cluster import submitted_runs as registry
from lorafleet.cluster.backend import RunStatus, Say, WeightSelection, ignore_message
from lorafleet.cluster.execution.allocation import read_starts
from lorafleet.cluster.execution.node import request_stop
from lorafleet.cluster.fetch import fetch_asset, fetch_job
from lorafleet.cluster.planning.earlier_runs import read_earlier_trials
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.planning.waste import describe_waste
from lorafleet.cluster.submission import (
    SubmissionRecord,
    find_record,
    read_record,
    write_record,
    write_run,
)
from lorafleet.jobs import files
from lorafleet.jobs.data.assets import get_asset, get_cache_dir
from lorafleet.jobs.data.hub import get_hub_cache
from lorafleet.jobs.data.inputs import resolve_inputs
from lorafleet.jobs.data.rows import load_rows
from lorafleet.jobs.errors import AssetError, ExitCode, PlacementRefused, RunError
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.plan import Plan
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.schema.environment import OFFLINE
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.placement import choose_node_count
from lorafleet.jobs.sites.slurm import RequeueSpec, SlurmSite, parse_slurm_time
from lorafleet.jobs.text import format_count, make_printable
from lorafleet.slurm import client
from lorafleet.slurm.accounting import JobRecord
from lorafleet.slurm.render import JOB, ScriptContext, build_submit_command, format_array, render
from lorafleet.slurm.states import describe_pending, get_job_state

_POLL_SECONDS = 5.0
"""Seconds between two queries to Slurm about one job."""
_FOLDER = "slurm"
_ARRAY_REASON = "each task of a job array trains its own trials, each in a process of its own"
_DRIVER_EXIT_CODES = frozenset(ExitCode)
"""The exit codes of a driver; a batch script that failed before its driver started has other
codes.
"""


class SlurmBackend:
    """A backend that submits jobs to the queue of a Slurm site.

    The nodes see this machine's folders: the local folder is the run itself, and nothing is
    uploaded or downloaded.
    """

    def __init__(self, site: SlurmSite, nodes: int | None = None) -> None:
        self.site = site
        self.asked_nodes = nodes

    def adopt_caches(self) -> None:
        """Set LORAFLEET_CACHE and HF_HUB_CACHE of this process to the `cache_dir` of the site.

        Planning and fetching then look where the nodes will look.
        """
        if self.site.cache_dir:
            cache = _resolve_site_folder(self.site.cache_dir, "cache_dir", self.site)
            os.environ["LORAFLEET_CACHE"] = str(cache)
            os.environ["HF_HUB_CACHE"] = str(cache / "hub")

    @classmethod
    def from_record(cls, record: SubmissionRecord) -> SlurmBackend:
        """Return the backend of a submitted run, with the site as it was then."""
        return cls(SlurmSite.from_record(record.site), record.nodes)

    shares_disk = True

    @property
    def site_name(self) -> str:
        """Return the name of the site."""
        return self.site.name

    def describe_run_location(self, run: str, runs: Path) -> str:
        """Return where a run of this name is, for people."""
        return str(self.resolve_runs_dir(runs) / run)

    def attach(self, name: str, runs: Path, say: Say) -> Run:
        """Raise RunError: this machine sees the folders of the runs."""
        raise RunError(
            f"site {self.site.name} is a Slurm, whose runs are in {self.resolve_runs_dir(runs)}: "
            f"there is nothing to download; read them with `--runs {self.resolve_runs_dir(runs)}`"
        )

    def resolve_runs_dir(self, requested: Path) -> Path:
        """Return the site's folder of runs, which the nodes see.

        Returns `requested` if the site has none.
        """
        return (
            _resolve_site_folder(self.site.runs_dir, "runs_dir", self.site)
            if self.site.runs_dir
            else requested
        )

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Return the plan of everything that would happen.

        Raises:
            UserError: The job could not start.
        """
        is_array = self.site.launch == "array" and command == "sweep"
        if is_array and (self.asked_nodes or 1) > 1:
            conflict = (
                f"--nodes is {self.asked_nodes}, but launch of site {self.site.name} is array"
            )
            raise PlacementRefused(f"{conflict}: an array task runs on one node. Leave out --nodes")
        if is_array:
            check_array(loaded.job, self.site.name)
        nodes = choose_node_count(self.site, self.asked_nodes, loaded.job.resources.num_nodes)
        plan = make_plan(
            loaded,
            self.site.build_allocation(nodes),
            command,
            self.site.allow_environment,
            read_earlier_trials(loaded.job.model.model_name_or_path, self.site.name),
            _ARRAY_REASON if is_array else None,
        )
        tasks = -(-len(plan.trials) // self.site.array.trials_per_task) if is_array else 0
        max_running = min(tasks, self.site.array.max_running or tasks)
        if is_array:
            plan = _limit_to_tasks(plan, self.site, max_running)
        array_spec = format_array(self.site, tasks) if is_array else None
        line = build_submit_command(
            Path("RUN") / _FOLDER / JOB, Path("RUN"), "RUN_ID", 1, array=array_spec
        )
        notes = list(plan.notes)
        if self.site.requests_whole_nodes:
            cores = format_count(self.site.smallest_node.cpus_per_node, "CPU core")
            notes.append(
                f"site {self.site.name} requests whole nodes (--exclusive): Ray gets all cores of "
                f"a node, and the plan counts on {cores} (cpus_per_node)"
            )
        return plan.model_copy(
            update={
                "site": self.site.name,
                "notes": notes,
                "nodes": nodes,
                "tasks": tasks,
                "max_running_tasks": max_running,
                "files": self._render_job_files(f"{plan.command}: {plan.job.name}", nodes),
                "command_line": shlex.join(line),
            }
        )

    def _render_job_files(
        self, title: str, nodes: int, verb: str = "exec --trust", *, stage: bool = True
    ) -> dict[str, str]:
        """Return the job's files as {name: text}."""
        script = ScriptContext(
            title=f"lorafleet {title}, on site {self.site.name}",
            nodes=nodes,
            verb=verb,
            programs=str(Path(sys.executable).parent),
            exports=_build_exports() | (_build_container_exports() if self.site.container else {}),
            folders=tuple(dict.fromkeys((str(get_cache_dir()), str(get_hub_cache())))),
            version=_get_version(),
            names_setup=_are_single_commands(self.site.setup),
            stage=stage,
        )
        return render(self.site, script, self._read_template())

    def _read_template(self) -> dict[str, str]:
        if not self.site.template:
            return {}
        path = files.expand_home(os.path.expandvars(self.site.template))
        try:
            return {JOB: files.read_regular_text(path)}
        except (OSError, UnicodeDecodeError) as error:
            raise PlacementRefused(
                f"template of site {self.site.name} is {path}, which cannot be read: {error}"
            ) from error

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """Check the job with `bash -n`, Slurm's limits and `sbatch --test-only`.

        Slurm's limits cover what `sbatch --test-only` accepts although the job could never run.

        Returns:
            The problems, and what could not be checked; one message each.
        """
        problems = [f"bash -n {name}: {complaint}" for name, complaint in _check_syntax(plan.files)]
        checks: tuple[Callable[[Plan], str | None], ...] = (
            self._check_with_sbatch,
            self._check_array_size,
            self._check_time_limit,
            self._check_account,
        )
        for run_check in checks:
            try:
                message = run_check(plan)
            except client.SlurmError as error:  # not on a login node: report it once
                return problems, [f"Slurm did not check the job: {error}"]
            problems += [message] if message else []
        return problems, []

    def _check_with_sbatch(self, plan: Plan) -> str | None:
        """Return why `sbatch --test-only` rejects the job, or None."""
        with _open_scratch_folder() as folder:
            for name, text in plan.files.items():
                (folder / name).write_text(text)
            complaint = client.find_submission_error(
                build_submit_command(
                    folder / JOB,
                    folder,
                    plan.job.name,
                    1,
                    array=format_array(self.site, plan.tasks) if plan.tasks else None,
                )
            )
        return f"sbatch --test-only: {complaint}" if complaint else None

    def _check_array_size(self, plan: Plan) -> str | None:
        """Return a message if the job array has more tasks than Slurm allows, or None."""
        limit = client.get_max_array_size() if plan.tasks else None
        if limit is None or plan.tasks <= limit:
            return None
        per_task = -(-len(plan.trials) // limit) if limit else 0
        return (
            f"the job array would have {plan.tasks:,} tasks, but Slurm's MaxArraySize allows "
            f"{limit:,}: raise array.trials_per_task of site {self.site.name} from "
            f"{self.site.array.trials_per_task} to {per_task} or more"
            if limit
            else "Slurm's MaxArraySize is 0, so this cluster has no job arrays: use launch: ray in "
            f"the file of site {self.site.name}"
        )

    def _check_time_limit(self, _plan: Plan) -> str | None:
        """Return a message if the time limit is above that of every partition, or None.

        A job that names several partitions starts in any of them.
        """
        names = self.site.partition.split(",") if self.site.partition else [None]
        limits = [client.get_partition_limit(name) for name in names]
        if not all(limit and self._is_above(limit[1]) for limit in limits):
            return None
        allowed = " and ".join(
            f"partition {limit[0]} allows only {limit[1]}" for limit in limits if limit
        )
        return f"time_limit is {self.site.time_limit}, but {allowed}: the job would never start"

    def _is_above(self, limit: str) -> bool:
        """Return whether the site's time limit is above a partition's."""
        if limit in ("UNLIMITED", "INFINITE"):
            return False
        return self.site.time_limit_seconds > parse_slurm_time(limit)

    def _check_account(self, _plan: Plan) -> str | None:
        """Return a message if the user may not use the site's account, or None."""
        accounts = client.list_accounts() if self.site.account else None
        if accounts is None or (self.site.account or "").lower() in accounts:
            return None
        return (
            f"account is {self.site.account}, but you may only use {', '.join(sorted(accounts))}: "
            "change `account` in the site file"
        )

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Write the run's folder and submit its jobs.

        Raises:
            UserError: The submission failed; nothing is left behind.
        """
        _check_fetched(loaded)
        run = write_run(plan, loaded, runs, self.site.share)
        try:
            for name, text in plan.files.items():
                files.write_text(run.path / _FOLDER / name, text)
            (run.path / "logs").mkdir(exist_ok=True)
            self._write_site(run, plan.nodes, 1)
            _write_task_folders(run, plan, self.site.array.trials_per_task)
            self._submit_jobs(run, 1, plan.tasks)
        except BaseException:
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        registry.add(run, self.site.name)
        return run

    def _write_site(self, run: Run, nodes: int, number: int) -> None:
        record = SubmissionRecord(
            kind=self.site.kind,
            site=self.site.model_dump(mode="json"),
            nodes=nodes,
            submission=number,
        )
        write_record(run, record)

    def _submit_jobs(self, run: Run, number: int, tasks: int = 0) -> None:
        """Submit the run's jobs: a job array first if there are tasks, then one job.

        With requeue policy `chain` further jobs follow, each of which continues after the one
        before it.
        """
        chain_length = (
            self.site.requeue.max_walltime_chain if self.site.requeue.policy == "chain" else 1
        )
        arrays = [format_array(self.site, tasks)] if tasks else []
        jobs: list[str] = []
        for array in [*arrays, *[None] * chain_length]:
            previous_job = jobs[-1] if jobs else None
            command = build_submit_command(
                run.path / _FOLDER / JOB, run.path, run.id, number, after=previous_job, array=array
            )
            try:
                jobs.append(client.submit(command))
            except BaseException:
                with contextlib.suppress(client.SlurmError):
                    client.cancel(jobs)
                raise
            # Written after each job: if this process is killed, `stop` still knows what was
            # submitted.
            files.write_text(run.path / _FOLDER / "jobs", "".join(f"{job}\n" for job in jobs))

    def upload_inputs(self, job: JobSpec, say: Say) -> str:
        """Fetch the job's inputs to the nodes' caches, which this machine sees."""
        fetch_job(job, say)
        return "all inputs are in the caches that the nodes read"

    def upload_asset(self, name: str, say: Say) -> str:
        """Fetch an asset to the nodes' caches; return its folder."""
        return str(fetch_asset(get_asset(name), say))

    def refresh(self, run: Run, say: Say = ignore_message) -> None:
        """Do nothing: the local folder is the run itself."""

    def pull(self, run: Run, weights: WeightSelection, say: Say) -> int:
        """Raise RunError: all files are already here."""
        raise RunError(
            f"{run.id} is stored in {run.path}, which this machine sees: there is nothing to "
            "download"
        )

    def resume(self, run: Run) -> None:
        """Submit an unfinished run again.

        Raises:
            RunError: A job of the run still waits or runs.
        """
        live = self._load_live_records(run)
        if live:
            raise RunError(
                f"{run.id} already has job {live[0].job_id}, which {_describe_record(live[0])}"
            )
        self._record_last_end(run)
        record = read_record(run)
        number = record.submission + 1
        # It may be left from `lorafleet stop`, and would end the new driver at once.
        (run.path / "stop").unlink(missing_ok=True)
        self._write_site(run, record.nodes, number)
        # No array: a single job merges what its tasks have left and trains the rest.
        self._submit_jobs(run, number)
        registry.add(run, self.site.name)

    def _record_last_end(self, run: Run) -> None:
        """Record how Slurm ended the last job, if the job could not do so itself.

        The next driver notes it in the run, and cannot ask Slurm.
        """
        starts = read_starts(run.path)
        if not starts or starts[-1].event not in ("began", "cut-off"):
            return
        last = starts[-1]
        # It becomes an argument of Slurm's commands, and the folder may come from somebody else.
        if not re.fullmatch(r"[0-9_]+", last.job):
            return
        with contextlib.suppress(client.SlurmError):
            record = client.find_job(last.job)
            if record is not None and get_job_state(record.state).run is RunState.STOPPED:
                line = {
                    "job": last.job,
                    "restart": last.restart,
                    "submission": last.submission,
                    "event": "ended-by-slurm",
                    "code": 0,
                    "reason": f"it {get_job_state(record.state).sentence}",
                }
                files.append_jsonl(run.path / _FOLDER / "history.jsonl", line)

    def _load_job_records(self, run: Run) -> list[JobRecord]:
        """Return Slurm's records of the newest submission's jobs, in the order in which they run.

        Jobs that Slurm has forgotten are left out.

        Raises:
            SlurmError: Slurm does not answer.
        """
        jobs = _read_job_ids(run)
        records = client.find_jobs(jobs)
        return [records[job] for job in jobs if job in records]

    def _load_live_records(self, run: Run) -> list[JobRecord]:
        """Return those of `_load_job_records` whose jobs wait or run."""
        return [
            record
            for record in self._load_job_records(run)
            if not get_job_state(record.state).ended
        ]

    def status(self, run: Run) -> RunStatus:
        """Return the run's status from Slurm, or from the run's own files.

        The files decide if Slurm has forgotten the job or does not answer.
        """
        return self._read_status(run, client.find_jobs)

    def read_statuses(self, runs: Sequence[Run]) -> list[RunStatus]:
        """Return the statuses of runs, from few queries to Slurm about all their jobs.

        Of a run that says itself that it has ended, only the queue is asked: it may have been
        submitted again.
        """
        jobs = {run.path: _read_job_ids(run) for run in runs}
        active = [run for run in runs if run.state in (RunState.PENDING, RunState.RUNNING)]
        ended = [run for run in runs if run not in active]
        try:
            records = client.find_jobs([job for run in active for job in jobs[run.path]])
            records |= client.find_queued_jobs([job for run in ended for job in jobs[run.path]])
        except client.SlurmError as error:
            return [_make_stale_status(run, error) for run in runs]
        statuses = []
        for run in runs:
            try:
                statuses.append(self._read_status(run, lambda _jobs: records))
            except (RunError, ValueError, OSError) as error:  # files of this one run are damaged
                statuses.append(_make_stale_status(run, error))
        return statuses

    def _read_status(
        self, run: Run, find_jobs: Callable[[Sequence[str]], Mapping[str, JobRecord]]
    ) -> RunStatus:
        jobs = _read_job_ids(run)
        if not jobs:
            return RunStatus(
                run.state, "it was not submitted to Slurm: submit it with `lorafleet resume`"
            )
        try:
            records = find_jobs(jobs)
        except client.SlurmError as error:
            return _make_stale_status(run, error)
        return derive_status(run, jobs[-1], [records[job] for job in jobs if job in records])

    def check_site(self, runs: Path) -> Run:
        """Submit a short job that inspects nodes of the site, two if the site allows it.

        Two nodes show whether they see one folder and reach each other. The job never requeues
        and ends after 15 minutes.

        Returns:
            The run of the job: a run's folder, in which the job writes findings.json.

        Raises:
            UserError: The job could not be submitted; nothing is left behind.
        """
        nodes = self.asked_nodes or min(2, self.site.max_nodes or 2)
        run = Run.create(runs, "doctor", self.site.share)
        self._submit_short_job(run, "doctor", nodes, "node examine")
        return run

    def submit_probe(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Submit a short job that measures a few steps of the first trial on one node.

        Returns:
            The run of the job: a run's folder, in which the job writes pace.json.

        Raises:
            UserError: The job could not be submitted; nothing is left behind.
        """
        _check_fetched(loaded)
        run = write_run(plan, loaded, runs, self.site.share)
        self._submit_short_job(run, "probe", 1, "node probe")
        return run

    def _submit_short_job(self, run: Run, title: str, nodes: int, verb: str) -> None:
        """Submit a job of at most 15 minutes that never requeues; remove the run if it fails."""
        short_settings = {
            "time_limit": "15",
            "requeue": RequeueSpec(policy="none", signal_seconds=60),
        }
        backend = SlurmBackend(self.site.model_copy(update=short_settings), nodes)
        try:
            for name, text in backend._render_job_files(title, nodes, verb, stage=False).items():
                files.write_text(run.path / _FOLDER / name, text)
            backend._submit_jobs(run, 1)
        except BaseException:
            shutil.rmtree(run.path, ignore_errors=True)
            raise

    def kill(self, run: Run) -> None:
        """Cancel the jobs of a run; nothing is saved."""
        client.cancel(_read_job_ids(run))

    def watch(self, run: Run) -> SlurmWatch:
        """Return a watch that queries the run's jobs every few seconds."""
        return SlurmWatch(self, run)

    def cancel(self, run: Run) -> str:
        """Remove waiting jobs from the queue, and ask a running job to save and end.

        Raises:
            RunError: The run has no job that waits or runs.
        """
        live = self._load_live_records(run)
        if not live:
            raise RunError(
                f"{run.id} has no pending or running job: it is {self.status(run).state}"
            )
        running = [record for record in live if get_job_state(record.state).run is RunState.RUNNING]
        # scancel would end Ray's processes together with the driver, before it has saved.
        client.cancel(_read_job_ids(run), pending_only=bool(running))
        if running:
            for folder in (run.path, *(part.path for part in run.list_array_tasks())):
                request_stop(Run(folder))
            job = _read_job_ids(run)[0]
            return (
                f"{run.id} is saving its trials and will stop (job {job}). Continue it later with "
                f"`lorafleet resume {run.id}`; `scancel {job}` stops it at once, without saving"
            )
        # No driver is left that could record the end.
        if run.state in (RunState.PENDING, RunState.RUNNING):
            run.set_state(RunState.STOPPED, reason="cancelled while pending")
        return f"{run.id} was removed from the queue; `lorafleet resume {run.id}` submits it again"


def _make_stale_status(run: Run, error: Exception) -> RunStatus:
    message = f"{error}; the last recorded state is {run.state}"
    return RunStatus(run.state, message, fresh=False, problem=str(error))


class SlurmWatch:
    """A watch on a run in the queue."""

    detaches = True

    def __init__(self, backend: SlurmBackend, run: Run) -> None:
        self.backend, self.run = backend, run
        self.looked_at = 0.0
        self.status = RunStatus(run.state)

    def poll(self) -> int | None:
        """Return the driver's exit code once no job of the run waits or runs any more."""
        if time.monotonic() - self.looked_at < _POLL_SECONDS:
            return None
        self.looked_at = time.monotonic()
        try:
            records = self.backend._load_job_records(self.run)
        except client.SlurmError as error:
            self.status = RunStatus(self.run.state, str(error))
            return None
        self.status = derive_status(self.run, _read_job_ids(self.run)[-1], records)
        # With a chain or an array the run is over only when all of its jobs are.
        if any(not get_job_state(record.state).ended for record in records):
            return None
        return compute_exit_code(self.run, records)

    def send_signal(self, number: int) -> None:
        """Do nothing: a queued job does not receive this process's signals."""

    def close(self) -> None:
        """Do nothing: this watch holds no resources."""


def derive_status(run: Run, job: str, records: list[JobRecord]) -> RunStatus:
    """Return the status of a run from Slurm's records and the run's own files.

    A live job decides. After its end the run's own record does, because it is more exact
    than Slurm's state. Slurm's state is used if the driver recorded no end, or if the last
    job failed before its driver.

    Args:
        job: Id of the last submitted job, for the message if Slurm has forgotten it.
        records: Slurm's records of the jobs of the newest submission, in the order in which
            they run.
    """
    own_state, reason = run.state, str(run.read_status().reason or "")
    if own_state is RunState.FINISHED and _is_over(run):
        # Whatever of the submission is still in the queue will find nothing to do.
        return RunStatus(own_state, reason)
    active_records = [record for record in records if not get_job_state(record.state).ended]
    if active_records:
        current = next(
            (
                record
                for record in active_records
                if get_job_state(record.state).run is RunState.RUNNING
            ),
            active_records[0],
        )
        current = dataclasses.replace(
            current, restarts=max(current.restarts, _count_restarts(run, current))
        )
        return RunStatus(
            get_job_state(current.state).run, f"job {current.job_id} {_describe_record(current)}"
        )
    last = _find_last_started(records)
    # job.sbatch ends with other codes if nodes differ or Ray does not start, and bash with 127 for
    # a missing program.
    never_started = (
        last is not None and last.state == "FAILED" and last.exit_code not in _DRIVER_EXIT_CODES
    )
    if own_state in (RunState.FINISHED, RunState.FAILED, RunState.STOPPED) and not (
        never_started
        and own_state is RunState.STOPPED  # recorded by an earlier job, which had saved
    ):
        if own_state is RunState.STOPPED and last is not None and last.state == "CANCELLED":
            reason = f"job {last.job_id} was cancelled; {reason}"
        return RunStatus(own_state, reason)
    if last is None:
        return RunStatus(
            RunState.FAILED,
            f"Slurm does not know job {job} any more, and the run did not record how it ended",
        )
    state = get_job_state(last.state)
    code = f" (code {last.exit_code})" if last.exit_code else ""
    message = f"job {last.job_id} {state.sentence}{code}"
    if last.reason and last.reason not in ("NonZeroExitCode", last.state):
        message += f": {last.reason}"
    if state.run is RunState.STOPPED:
        return RunStatus(
            RunState.STOPPED, f"{message}; continue it with `lorafleet resume {run.id}`"
        )
    problem = _read_setup_problem(run, last.job_id)
    if problem:
        return RunStatus(RunState.FAILED, f"{message}; {problem}")
    last_output = _read_last_output(run, last.job_id)
    return RunStatus(
        RunState.FAILED, message + (f"; last output: {last_output}" if last_output else "")
    )


def compute_exit_code(run: Run, records: list[JobRecord]) -> int:
    """Return the shell's exit code for a run that has ended.

    It is the driver's own exit code if the job reached its driver: the batch script ends
    with it. A job that Slurm stopped gives INTERRUPTED.
    """
    own_state = run.state
    last = _find_last_started(records)
    if last is not None and last.exit_code and not last.signal and last.state == "FAILED":
        return last.exit_code
    if own_state is RunState.FINISHED:
        return ExitCode.OK
    if last is not None and get_job_state(last.state).run is RunState.STOPPED:
        return ExitCode.INTERRUPTED
    return ExitCode.INTERRUPTED if own_state is RunState.STOPPED else ExitCode.OUR_FAULT


def _find_last_started(records: list[JobRecord]) -> JobRecord | None:
    """Return a chain's last job that started; cancelled successors carry no information."""
    started = [record for record in records if record.nodes or record.state != "CANCELLED"]
    return next(reversed(started or records), None)


def _is_over(run: Run) -> bool:
    """Return whether the script of the newest submission has recorded that nothing is left."""
    record = find_record(run)
    return record is not None and (run.path / _FOLDER / f"over-{record.submission}").is_file()


def _count_restarts(run: Run, record: JobRecord) -> int:
    """Return how often the run's history says that a job was started again, or will be.

    squeue does not tell it.
    """
    began = [line.restart for line in read_starts(run.path) if line.job == record.job_id]
    if not began:
        return 0
    return max(began) + (get_job_state(record.state).run is RunState.PENDING)


def _describe_record(record: JobRecord) -> str:
    state = get_job_state(record.state)
    again = f" again (restart {record.restarts})" if record.restarts else ""
    if record.state == "PENDING":
        return f"{state.sentence}{again}: {describe_pending(record.reason)}"
    location = f" on {record.nodes}" if record.nodes and state.run is RunState.RUNNING else ""
    return f"{state.sentence}{location}{again}"


def _read_setup_problem(run: Run, job: str) -> str:
    """Return which set-up line of a job failed, and its last words; empty if none did."""
    number = re.match(r"[0-9]+", job)  # a component of a heterogeneous job is 12+0
    try:
        path = run.path / _FOLDER / f"problem-{number[0] if number else job}"
        text = files.read_regular_text(path)
    except (OSError, UnicodeDecodeError):
        return ""
    return make_printable(" ".join(text.split()))[:400]


def _read_last_output(run: Run, job: str) -> str:
    try:
        lines = (run.path / _FOLDER / f"{job}.out").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    output_lines = [line.strip() for line in lines if line.strip()]
    return "; ".join(output_lines[-2:])[:400]


def _read_job_ids(run: Run) -> list[str]:
    try:
        text = (run.path / _FOLDER / "jobs").read_text(errors="replace")
    except OSError:
        return []
    # These words become arguments of scancel, and the folder may come from somebody else.
    return [line.strip() for line in text.splitlines() if re.fullmatch(r"[0-9_]+", line.strip())]


def check_array(job: JobSpec, site: str) -> None:
    """Raise PlacementRefused for a search that independent array tasks cannot run.

    Tasks run at different times and do not see each other's results, so nothing in the
    search may depend on other trials.

    Args:
        job: A job with a search.
        site: Name of the site, for the message.
    """
    search = job.search
    assert search is not None
    problem = None
    if search.scheduler.type != "none":
        problem = (
            f"search.scheduler.type is {search.scheduler.type}, but array tasks cannot compare "
            "trials at rungs: use scheduler: {type: none}"
        )
    elif search.method == "tpe":
        problem = (
            "search.method is tpe, but array tasks do not see each other's results: use random or "
            "grid"
        )
    elif search.budget.gpu_hours is not None or search.budget.wall_hours is not None:
        problem = (
            "search.budget is set, but array tasks do not know what the other tasks have spent: "
            "use array.max_running and time_limit"
        )
    elif job.evaluate.folds or search.seeds > 1:
        field = "evaluate.folds" if job.evaluate.folds else "search.seeds"
        problem = (
            f"{field} is set, but the trainings after the search need the results of all array "
            "tasks"
        )
    elif job.resources.num_nodes > 1:
        problem = (
            f"resources.num_nodes is {job.resources.num_nodes}, but an array task runs on one node"
        )
    if problem:
        raise PlacementRefused(
            f"{problem} (or set launch: ray in the file of site {site}, whose launch is array)"
        )


def _limit_to_tasks(plan: Plan, site: SlurmSite, max_running: int) -> Plan:
    """Return the plan of a job array: each task has its own trials, on a node of its own."""
    trials = min(len(plan.trials), site.array.trials_per_task)
    plan_tasks = math.ceil(len(plan.trials) / trials)
    slots = min(plan.placement.slots, trials)
    waves = math.ceil(trials / slots)
    placement = plan.placement.model_copy(
        update={
            "slots": slots,
            "waves": waves,
            "limited_by": "trials of a task" if slots == trials else plan.placement.limited_by,
        }
    )
    rounds = math.ceil(plan_tasks / max_running)
    loads = [
        load.model_copy(update={"slots": slots * max_running, "waves": waves * rounds})
        for load in plan.loads
    ]
    waste = describe_waste(plan.job, site.build_allocation(1), placement, trials, plan.memory)
    return plan.model_copy(update={"task_placement": placement, "loads": loads, "waste": waste})


def _write_task_folders(run: Run, plan: Plan, trials_per_task: int) -> None:
    """Create a folder for each task of the array, with its range of trials."""
    for number in range(plan.tasks):
        part = run.get_array_task(number)
        (part.path / "logs").mkdir(parents=True)
        part.set_state(RunState.PENDING, created=time.time(), name=plan.job.name)
        trial_range = [
            number * trials_per_task,
            min(len(plan.trials), (number + 1) * trials_per_task),
        ]
        task_plan = plan.model_copy(update={"share": trial_range, "files": {}})
        files.write_json(part.path / "plan.json", task_plan.model_dump(mode="json"))


def _resolve_site_folder(text: str, field: str, site: SlurmSite) -> Path:
    """Return a folder of the site as this machine sees it.

    Raises:
        PlacementRefused: The path starts with a variable that is not set here.
    """
    path = os.path.expandvars(text)
    if path.startswith("$"):
        raise PlacementRefused(
            f"{field} of site {site.name} is {text}, but that variable is not set on this machine"
        )
    return files.expand_home(path)


def _build_exports() -> dict[str, str]:
    """Return the variables that a job exports.

    They name the caches, and keep nodes that may have no internet from contacting a hub or
    W&B.
    """
    return {
        "LORAFLEET_CACHE": str(get_cache_dir()),
        "HF_HUB_CACHE": str(get_hub_cache()),
        **OFFLINE,
        "TOKENIZERS_PARALLELISM": "false",
    }


def _build_container_exports() -> dict[str, str]:
    """Return the folders that the login node found trustworthy.

    Inside a container the machine's root and other users may have no names, so it cannot
    check their owners.
    """
    return {
        "LORAFLEET_TRUSTED_FOLDERS": os.pathsep.join(
            dict.fromkeys((str(get_cache_dir()), str(get_hub_cache())))
        )
    }


def _check_fetched(loaded: LoadedJob) -> None:
    """Raise AssetError if something that the job names is not where the nodes look for it."""
    job: JobSpec = loaded.job
    try:
        for model in resolve_inputs(job).models:
            model.check_complete()
        load_rows(job)
    except AssetError as error:
        raise AssetError(
            f"{error} (a cluster's nodes download nothing: run `lorafleet fetch {loaded.path} --on "
            "SITE`)"
        ) from error


def _are_single_commands(lines: tuple[str, ...]) -> bool:
    """Return whether each line of bash is complete without the others."""
    for line in lines:
        process = subprocess.run(
            ["bash", "-n"], input=f"{line}\n", capture_output=True, text=True, check=False
        )
        # A here-document without its end is only a warning.
        if process.returncode or process.stderr or line.rstrip().endswith("\\"):
            return False
    return True


def _check_syntax(texts: dict[str, str]) -> list[tuple[str, str]]:
    """Return (file, first error line) for each file that `bash -n` rejects.

    `sbatch --test-only` does not read the script beyond its options.
    """
    errors = []
    for name, text in texts.items():
        process = subprocess.run(
            ["bash", "-n"], input=text, capture_output=True, text=True, check=False
        )
        if process.returncode:
            errors.append((name, process.stderr.strip().splitlines()[0]))
    return errors


@contextlib.contextmanager
def _open_scratch_folder() -> Iterator[Path]:
    """Yield a temporary folder laid out like a run's folder."""
    with tempfile.TemporaryDirectory(prefix="lorafleet-") as folder:
        (Path(folder) / _FOLDER).mkdir()
        yield Path(folder)


def _get_version() -> str:
    from importlib.metadata import version

    return version("lorafleet")
