"""A Slurm cluster: a run is a job in its queue, found again by the numbers in the run's folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorafleet.cluster import submitted_runs as registry
from lorafleet.cluster.backend import Say, Seen, quietly
from lorafleet.cluster.backends import SITE_FILE
from lorafleet.cluster.execution.node import ask_to_stop
from lorafleet.cluster.fetch import fetch_asset, fetch_job
from lorafleet.cluster.local import write_run
from lorafleet.cluster.planning.plan import make_plan
from lorafleet.cluster.remote.transfer import Which
from lorafleet.jobs import files
from lorafleet.jobs.data.assets import asset, cache_dir
from lorafleet.jobs.data.hub import check_whole, hub_cache
from lorafleet.jobs.data.rows import load_rows
from lorafleet.jobs.errors import AssetError, ExitCode, PlacementRefused, RunError
from lorafleet.jobs.loading.job_file import LoadedJob
from lorafleet.jobs.runs.plan import Plan
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.schema.environment import OFFLINE
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.placement import nodes_of_job
from lorafleet.jobs.sites.slurm import RequeueSpec, SlurmSite, slurm_seconds
from lorafleet.jobs.trials.trial_id import bases_of
from lorafleet.slurm import client
from lorafleet.slurm.accounting import JobRecord
from lorafleet.slurm.render import JOB, Script, array_of, render, submission
from lorafleet.slurm.states import job_state, why_pending

_LOOK_SECONDS = 5.0
"""Between two questions to Slurm about one job."""
_FOLDER = "slurm"
_DRIVERS_CODES = frozenset(ExitCode)
"""What a driver ends with; a script that did not come to its driver has others."""


class SlurmBackend:
    """Submits to the queue of a site."""

    def __init__(self, site: SlurmSite, nodes: int | None = None) -> None:
        self.site = site
        self.asked_nodes = nodes
        if site.cache_dir:
            cache = _folder_here(site.cache_dir, "cache_dir", site)
            os.environ["LORAFLEET_CACHE"] = str(cache)
            os.environ["HF_HUB_CACHE"] = str(cache / "hub")

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> SlurmBackend:
        """Return the backend of a submitted run, with the site as it was then."""
        return cls(SlurmSite.model_validate_json(json.dumps(record["site"])), int(record["nodes"]))

    def runs_dir(self, given: Path) -> Path:
        """The site's folder of runs, which the nodes see; without one, what the user gives."""
        return _folder_here(self.site.runs_dir, "runs_dir", self.site) if self.site.runs_dir else given

    def plan(self, loaded: LoadedJob, command: str) -> Plan:
        """Everything that would happen. Raises a UserError where the job could not begin."""
        array = self.site.launch == "array" and command == "sweep"
        if array and (self.asked_nodes or 1) > 1:
            asked = f"--nodes is {self.asked_nodes}, and launch of site {self.site.name} is array"
            raise PlacementRefused(f"{asked}: a task has one node")
        if array:
            check_array(loaded.job, self.site.name)
        nodes = nodes_of_job(self.site, self.asked_nodes, loaded.job.resources.num_nodes)
        made = make_plan(loaded, self.site.allocation(nodes), command, self.site.allow_environment)
        tasks = -(-len(made.trials) // self.site.array.trials_per_task) if array else 0
        name = array_of(self.site, tasks) if array else None
        line = submission(Path("RUN") / _FOLDER / JOB, Path("RUN"), "RUN_ID", 1, array=name)
        return made.model_copy(
            update={
                "site": self.site.name,
                "nodes": nodes,
                "tasks": tasks,
                "files": self._script(f"{made.command}: {made.job.name}", nodes),
                "command_line": shlex.join(line),
            }
        )

    def _script(self, title: str, nodes: int, verb: str = "exec --trust", *, stage: bool = True) -> dict[str, str]:
        """The job's files."""
        script = Script(
            title=f"lorafleet {title}, on site {self.site.name}",
            nodes=nodes,
            verb=verb,
            programs=str(Path(sys.executable).parent),
            exports=_exports() | (_in_a_container() if self.site.container else {}),
            folders=tuple(dict.fromkeys((str(cache_dir()), str(hub_cache())))),
            version=_version(),
            stage=stage,
        )
        return render(self.site, script, self._own_template())

    def _own_template(self) -> dict[str, str]:
        if not self.site.template:
            return {}
        path = files.in_home(os.path.expandvars(self.site.template))
        try:
            return {JOB: files.read_plain_text(path)}
        except (OSError, UnicodeDecodeError) as error:
            raise PlacementRefused(
                f"template of site {self.site.name} is {path}, which cannot be read: {error}"
            ) from error

    def check(self, plan: Plan) -> tuple[list[str], list[str]]:
        """What bash and Slurm have against the job, with what `sbatch --test-only` lets through; what was not asked."""
        found = [f"bash -n {name}: {complaint}" for name, complaint in _syntax(plan.files)]
        looks: tuple[Callable[[Plan], str | None], ...] = (self._refused, self._above_the_limit, self._unknown_account)
        for look in looks:
            try:
                sentence = look(plan)
            except client.SlurmError as error:  # not on a login node: said once
                return found, [f"not checked by Slurm: {error}"]
            found += [sentence] if sentence else []
        return found, []

    def _refused(self, plan: Plan) -> str | None:
        with _scratch() as folder:
            for name, text in plan.files.items():
                (folder / name).write_text(text)
            said = client.test_only(submission(folder / JOB, folder, plan.job.name, 1))
        return f"sbatch --test-only: {said}" if said else None

    def _above_the_limit(self, _plan: Plan) -> str | None:
        limit = client.partition_limit(self.site.partition)
        if limit is None or limit[1] in ("UNLIMITED", "INFINITE"):
            return None
        if self.site.time_limit_seconds <= slurm_seconds(limit[1]):
            return None
        return (
            f"time_limit is {self.site.time_limit}, and partition {limit[0]} allows {limit[1]}: the job would wait for "
            "ever"
        )

    def _unknown_account(self, _plan: Plan) -> str | None:
        known = client.accounts() if self.site.account else None
        if known is None or (self.site.account or "").lower() in known:
            return None
        return f"account is {self.site.account}, and you may use {', '.join(sorted(known))}"

    def submit(self, plan: Plan, loaded: LoadedJob, runs: Path) -> Run:
        """Write the run's folder and hand it over. Raises a UserError, and leaves nothing, where that fails."""
        _check_fetched(loaded)
        run = write_run(plan, loaded, runs, self.site.share)
        try:
            for name, text in plan.files.items():
                files.write_text(run.path / _FOLDER / name, text)
            (run.path / "logs").mkdir(exist_ok=True)
            self._write_site(run, plan.nodes, 1)
            _write_parts(run, plan, self.site.array.trials_per_task)
            self._hand_over(run, 1, plan.tasks)
        except BaseException:
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        registry.add(run, self.site.name)
        return run

    def _write_site(self, run: Run, nodes: int, number: int) -> None:
        stored = {"site": self.site.model_dump(mode="json"), "nodes": nodes, "submission": number}
        files.write_json(run.path / SITE_FILE, {"kind": self.site.kind, **stored})

    def _hand_over(self, run: Run, number: int, tasks: int = 0) -> None:
        """Submit the job: with the policy `chain` those that go on after it too, and with tasks a job array first."""
        chained = self.site.requeue.max_walltime_chain if self.site.requeue.policy == "chain" else 1
        arrays = [array_of(self.site, tasks)] if tasks else []
        jobs: list[str] = []
        for array in [*arrays, *[None] * chained]:
            after = jobs[-1] if jobs else None
            line = submission(run.path / _FOLDER / JOB, run.path, run.id, number, after=after, array=array)
            try:
                jobs.append(client.submit(line))
            except BaseException:
                with contextlib.suppress(client.SlurmError):
                    client.cancel(jobs)
                raise
            files.write_text(run.path / _FOLDER / "jobs", "".join(f"{job}\n" for job in jobs))

    def provide(self, job: JobSpec, say: Say) -> str:
        """Fetch it to the caches of the nodes, which this machine sees."""
        fetch_job(job, say)
        return "everything it names is on the nodes' caches"

    def provide_asset(self, name: str, say: Say) -> str:
        """Fetch it to the caches of the nodes."""
        return str(fetch_asset(asset(name), say))

    def refresh(self, run: Run, say: Say = quietly) -> None:
        """Nothing: the folder is the run's own."""

    def pull(self, run: Run, which: Which, say: Say) -> int:
        """Raises RunError: it is all here."""
        raise RunError(f"{run.id} lies in {run.path} itself: there is nothing to bring")

    def resume(self, run: Run) -> None:
        """Submit an unfinished run again. Raises RunError while a job of it waits or runs."""
        live = [record for record in self._records(run) if not job_state(record.state).ended]
        if live:
            raise RunError(f"{run.id} has job {live[0].job_id}, which {_sentence(live[0])}")
        stored = files.read_json(run.path / SITE_FILE)
        number = int(stored["submission"]) + 1
        (run.path / "stop").unlink(missing_ok=True)
        self._write_site(run, int(stored["nodes"]), number)
        self._hand_over(run, number)
        registry.add(run, self.site.name)

    def _records(self, run: Run) -> list[JobRecord]:
        """What Slurm knows of the jobs of the last submission, in the order in which they run."""
        return [record for job in _job_ids(run) if (record := client.job(job)) is not None]

    def look(self, run: Run) -> Seen:
        """Where a run is: asked of Slurm first, of the run's own files where Slurm has forgotten or does not answer."""
        jobs = _job_ids(run)
        if not jobs:
            return Seen(run.state, "it was not handed over to Slurm: `lorafleet resume` does so")
        try:
            records = self._records(run)
        except client.SlurmError as error:
            return Seen(run.state, f"{error}; its own record says {run.state}", asked=False)
        return seen(run, jobs[-1], records)

    def examine(self, runs: Path) -> Run:
        """Submit a short job that looks at nodes of the site, at two where there may be two; its folder is a run's."""
        nodes = self.asked_nodes or min(2, self.site.max_nodes or 2)
        short = {"time_limit": "15", "requeue": RequeueSpec(policy="none", signal_seconds=60)}
        backend = SlurmBackend(self.site.model_copy(update=short), nodes)
        run = Run.create(runs, "doctor", self.site.share)
        try:
            for name, text in backend._script("doctor", nodes, "node examine", stage=False).items():
                files.write_text(run.path / _FOLDER / name, text)
            backend._hand_over(run, 1)
        except BaseException:
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        return run

    def end_at_once(self, run: Run) -> None:
        """Cancel the jobs of a run."""
        client.cancel(_job_ids(run))

    def watch(self, run: Run) -> SlurmWatch:
        """The job, asked about every few seconds."""
        return SlurmWatch(self, run)

    def cancel(self, run: Run) -> str:
        """Take a waiting job out of the queue; ask a running one to save and end."""
        live = [record for record in self._records(run) if not job_state(record.state).ended]
        if not live:
            raise RunError(f"{run.id} has no job that waits or runs: it is {self.look(run).state}")
        running = [record for record in live if job_state(record.state).run is RunState.RUNNING]
        client.cancel(_job_ids(run), waiting=bool(running))
        if running:
            for folder in (run.path, *(part.path for part in run.parts())):
                ask_to_stop(Run(folder))
            job = _job_ids(run)[0]
            return (
                f"{run.id} saves its trials and ends (job {job}); `lorafleet resume {run.id}` goes on, and "
                f"`scancel {job}` ends it at once"
            )
        if run.state in (RunState.PENDING, RunState.RUNNING):
            run.set_state(RunState.STOPPED, reason="taken out of the queue")
        return f"{run.id} is out of the queue; `lorafleet resume {run.id}` submits it again"


class SlurmWatch:
    """A run in the queue, for somebody who waits for its end."""

    detaches = True

    def __init__(self, backend: SlurmBackend, run: Run) -> None:
        self.backend, self.run = backend, run
        self.looked_at = 0.0
        self.seen = Seen(run.state)

    def poll(self) -> int | None:
        """The driver's exit code once no job of the run waits or runs any more."""
        if time.monotonic() - self.looked_at < _LOOK_SECONDS:
            return None
        self.looked_at = time.monotonic()
        try:
            records = self.backend._records(self.run)
        except client.SlurmError as error:
            self.seen = Seen(self.run.state, str(error))
            return None
        self.seen = seen(self.run, _job_ids(self.run)[-1], records)
        if any(not job_state(record.state).ended for record in records):
            return None
        return exit_code(self.run, records)

    def send_signal(self, number: int) -> None:
        """A job in a queue does not hear this process's signals."""

    def close(self) -> None:
        """Nothing: there is nothing of its own."""


def seen(run: Run, job: str, records: list[JobRecord]) -> Seen:
    """Where a run is, from what Slurm and its own files say."""
    written, reason = run.state, str(run.status().get("reason") or "")
    live = [record for record in records if not job_state(record.state).ended]
    if live:
        now = next((record for record in live if job_state(record.state).run is RunState.RUNNING), live[0])
        return Seen(job_state(now.state).run, f"job {now.job_id} {_sentence(now)}")
    last = _last_that_ran(records)
    unbegun = last is not None and last.state == "FAILED" and last.exit_code not in _DRIVERS_CODES
    if written in (RunState.FINISHED, RunState.FAILED, RunState.STOPPED) and not (
        unbegun and written is RunState.STOPPED  # by an earlier job, which had saved
    ):
        return Seen(written, reason)
    if last is None:
        return Seen(RunState.FAILED, f"Slurm does not know job {job} any more, and it left no word of its end")
    state = job_state(last.state)
    code = f" (code {last.exit_code})" if last.exit_code else ""
    said = f"job {last.job_id} {state.sentence}{code}"
    if last.reason and last.reason not in ("NonZeroExitCode", last.state):
        said += f": {last.reason}"
    if state.run is RunState.STOPPED:
        return Seen(RunState.STOPPED, f"{said}; `lorafleet resume {run.id}` goes on")
    tail = _last_words(run, last.job_id)
    return Seen(RunState.FAILED, said + (f"; its last words: {tail}" if tail else ""))


def exit_code(run: Run, records: list[JobRecord]) -> int:
    """What a run that has ended means for the shell: the driver's own code where it came to one."""
    written = run.state
    last = _last_that_ran(records)
    if last is not None and last.exit_code and not last.signal and last.state == "FAILED":
        return last.exit_code
    if written is RunState.FINISHED:
        return ExitCode.OK
    if last is not None and job_state(last.state).run is RunState.STOPPED:
        return ExitCode.INTERRUPTED
    return ExitCode.INTERRUPTED if written is RunState.STOPPED else ExitCode.OUR_FAULT


def _last_that_ran(records: list[JobRecord]) -> JobRecord | None:
    """Of a chain the last job that did something: its withdrawn successors say nothing."""
    ran = [record for record in records if record.nodes or record.state != "CANCELLED"]
    return next(reversed(ran or records), None)


def _sentence(record: JobRecord) -> str:
    state = job_state(record.state)
    again = f" again (restart {record.restarts})" if record.restarts else ""
    if record.state == "PENDING":
        return f"{state.sentence}{again}: {why_pending(record.reason)}"
    on = f" on {record.nodes}" if record.nodes and state.run is RunState.RUNNING else ""
    return f"{state.sentence}{on}{again}"


def _last_words(run: Run, job: str) -> str:
    try:
        lines = (run.path / _FOLDER / f"{job}.out").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    told = [line.strip() for line in lines if line.strip()]
    return "; ".join(told[-2:])[:400]


def _job_ids(run: Run) -> list[str]:
    try:
        text = (run.path / _FOLDER / "jobs").read_text()
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if re.fullmatch(r"[0-9_]+", line.strip())]


def check_array(job: JobSpec, site: str) -> None:
    """Raise PlacementRefused for a search that tasks which know nothing of each other cannot do."""
    search = job.search
    assert search is not None
    wrong = None
    if search.scheduler.type != "none":
        wrong = f"search.scheduler.type is {search.scheduler.type}: tasks share no rungs; use scheduler: {{type: none}}"
    elif search.method == "tpe":
        wrong = "search.method is tpe: tasks do not hear of each other's results; use random or grid"
    elif search.budget.gpu_hours is not None or search.budget.wall_hours is not None:
        wrong = (
            "search.budget is set: tasks do not know what the others have spent; use array.max_running and time_limit"
        )
    elif job.evaluate.folds or search.seeds > 1:
        named = "evaluate.folds" if job.evaluate.folds else "search.seeds"
        wrong = f"{named} is set: what comes after the search needs what all tasks have found"
    elif job.resources.num_nodes > 1:
        wrong = f"resources.num_nodes is {job.resources.num_nodes}: a task has one node"
    if wrong:
        raise PlacementRefused(f"{wrong} (or launch: ray in site {site}, whose launch is array)")


def _write_parts(run: Run, plan: Plan, each: int) -> None:
    """A folder for each task of the array, with its share of the trials."""
    for number in range(plan.tasks):
        part = run.part(number)
        (part.path / "logs").mkdir(parents=True)
        part.set_state(RunState.PENDING, created=time.time(), name=plan.job.name)
        share = [number * each, min(len(plan.trials), (number + 1) * each)]
        own = plan.model_copy(update={"share": share, "files": {}})
        files.write_json(part.path / "plan.json", own.model_dump(mode="json"))


def _folder_here(text: str, field: str, site: SlurmSite) -> Path:
    """A folder of the site as this machine has it. Raises PlacementRefused when a variable in it is not set here."""
    path = os.path.expandvars(text)
    if path.startswith("$"):
        raise PlacementRefused(f"{field} of site {site.name} is {text}, and that variable is not set here")
    return files.in_home(path)


def _exports() -> dict[str, str]:
    """Caches, and no questions to a hub or to W&B from nodes that may have no internet."""
    return {
        "LORAFLEET_CACHE": str(cache_dir()),
        "HF_HUB_CACHE": str(hub_cache()),
        **OFFLINE,
        "TOKENIZERS_PARALLELISM": "false",
    }


def _in_a_container() -> dict[str, str]:
    """What was looked at on the login node: inside, the machine's root and other users may have no names."""
    return {"LORAFLEET_TRUSTED_FOLDERS": os.pathsep.join(dict.fromkeys((str(cache_dir()), str(hub_cache()))))}


def _check_fetched(loaded: LoadedJob) -> None:
    """Raise AssetError when something that the job names is not where the nodes look for it."""
    job: JobSpec = loaded.job
    try:
        for name, revision in bases_of(job):
            check_whole(name, revision)
        load_rows(job)
    except AssetError as error:
        raise AssetError(
            f"{error} (nodes of a cluster fetch nothing: `lorafleet fetch {loaded.path} --on SITE`)"
        ) from error


def _syntax(texts: dict[str, str]) -> list[tuple[str, str]]:
    """What `bash -n` has against the files."""
    found = []
    for name, text in texts.items():
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            found.append((name, done.stderr.strip().splitlines()[0]))
    return found


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lorafleet-") as folder:
        (Path(folder) / _FOLDER).mkdir()
        yield Path(folder)


def _version() -> str:
    from importlib.metadata import version

    return version("lorafleet")
