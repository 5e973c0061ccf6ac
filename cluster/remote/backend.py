"""Places whose machines do not see this one's disks: what a job names is brought there, and what it writes back here.

The folder of a run here is then a record: its plan, what the place said last, and copies of what the run wrote there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar

from lorafleet.cluster import submitted_runs as registry
from lorafleet.cluster.backend import Say, Seen
from lorafleet.cluster.backends import SITE_FILE
from lorafleet.cluster.fetch import fetch_asset, fetch_job
from lorafleet.cluster.remote import staging
from lorafleet.cluster.remote.transfer import Cargo, Unpacker, Which, framed, known
from lorafleet.jobs import files
from lorafleet.jobs.data.assets import asset
from lorafleet.jobs.errors import CommandFailed, ExitCode, RunError, UserError
from lorafleet.jobs.runs.plan import Plan
from lorafleet.jobs.runs.run import Run, RunState, TrialState
from lorafleet.jobs.runs.trust import remember
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.jobs.sites.ray import RayClusterSite
from lorafleet.jobs.text import counted

if TYPE_CHECKING:
    from lorafleet.cluster.doctor import Finding


class Place(Protocol):
    """Where commands can be run that see the storage."""

    def run(self, command: list[str], take: Callable[[bytes], object], feed: Iterable[bytes] = ()) -> None:
        """Run one: `feed` goes to its input, and `take` gets what it prints. Raises UserError where it fails."""


def ask(place: Place, command: list[str], question: Any) -> Any:
    """Run a command that reads one line of JSON and prints one. Raises UserError."""
    said = bytearray()
    place.run(command, said.extend, [json.dumps(question).encode() + b"\n"])
    try:
        return json.loads(said)
    except ValueError as error:
        raise CommandFailed(f"{' '.join(command)} printed no answer: {bytes(said[:200])!r}") from error


def bring(place: Place, there: str, run: Run, which: Which = "none", *, whole: bool = False, wait: bool = True) -> int:
    """Bring what of the record of the run in folder `there` is not here yet; returns how many files came.

    One transfer at a time: an older one that ends later would put back what it has read before. Without `wait` nothing
    is done while another is under way. Raises UserError, also where what comes is cut off: nothing has changed here
    then.
    """
    options = ["--weights", which, *(["--whole"] if whole else [])]
    with files.locked(run.path / ".record", wait=wait) as mine:
        if not mine:
            return 0
        unpacker = Unpacker(run.path)
        try:
            question = json.dumps(known(run.path)).encode() + b"\n"
            place.run(["lorafleet", "node", "send", there, *options], unpacker.take, [question])
            return unpacker.finish()
        finally:
            unpacker.drop()


def bring_unknown(place: Place, there: str, folder: Path) -> None:
    """Bring the record of a run of which nothing is here into a new folder, whole or not at all.

    Raises UserError, also where there is no run.
    """
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        unpacker = Unpacker(scratch, texts=True)
        try:
            place.run(["lorafleet", "node", "send", there, "--texts"], unpacker.take, [b"{}\n"])
            unpacker.finish()
        finally:
            unpacker.drop()
        if not (scratch / "plan.json").is_file():
            raise RunError(f"there is no run in {there} on the storage")
        scratch.chmod(0o700)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def send(place: Place, cargo: Iterable[Cargo], say: Say) -> None:
    """Lay files and folders on the storage, but those that are there already. Raises UserError."""
    cargo = list(cargo)
    asked = [{"target": one.target, "digest": one.digest} for one in cargo]
    missing = set(ask(place, ["lorafleet", "node", "lacks"], asked))
    for one in cargo:
        if one.target not in missing:
            say(f"{one.source} is there already, as {one.target}")
            continue
        say(f"{one.source} ({one.bytes / 1e6:,.1f} MB) goes to {one.target}")
        kind = ["--file"] if one.source.is_file() else []
        command = ["lorafleet", "node", "receive", one.target, one.digest, *kind]
        place.run(command, lambda _: None, framed(one.source))


AwaySite = TypeVar("AwaySite", KubernetesSite, RayClusterSite)


class Away(ABC, Generic[AwaySite]):
    """What every such place does alike."""

    site: AwaySite
    """What its site file says."""
    called: str
    """What sentences call it."""
    mount: str
    """Where its machines see the storage."""
    storage: str
    """What tells the storage from those of other sites."""
    internet: bool
    """Whether its machines fetch from the hub themselves."""

    @abstractmethod
    def reached(self, say: Say) -> contextlib.AbstractContextManager[Place]:
        """Something that sees the storage, for as long as it is wanted. Raises UserError when nothing does."""

    @abstractmethod
    def folder_of(self, run: str) -> str:
        """Where its machines see a run."""

    @abstractmethod
    def newest(self, run: str) -> int:
        """Which submission of a run the place knows as the newest. Raises UserError."""

    def attach(self, name: str, runs: Path, say: Say) -> Run:
        """Make a record here of a run that has none: of another machine, or one that nobody's lorafleet has submitted.

        Raises UserError, and leaves nothing, where there is none of this name on the storage.
        """
        run = Run(runs.absolute() / name)
        if not name or Path(name).name != name:
            raise RunError(f"RUN is {name!r}, which is no run's id")
        if run.path.exists():
            raise RunError(f"there is a record of {name} already: `lorafleet pull {name}`")
        submission = self.newest(name)
        runs.mkdir(parents=True, exist_ok=True)
        with self.reached(say) as place:
            bring_unknown(place, self.folder_of(name), run.path)
        remember(run.path)
        nodes = int(files.read_json(run.path / "plan.json").get("nodes") or 1)
        site = {"kind": self.site.kind, "site": self.site.model_dump(mode="json")}
        facts = {"submission": submission, "nodes": nodes, "call": "", "handed_over": True}
        files.write_json(run.path / SITE_FILE, site | facts)
        registry.add(run, self.site.name)
        return run

    def _not_taken(self, run: Run, error: BaseException, *, for_sure: bool) -> NoReturn:
        """A submission has failed: nothing is left of it, or where it may have been taken the record is kept."""
        if for_sure:
            shutil.rmtree(run.path, ignore_errors=True)
            raise error
        registry.add(run, self.site.name)
        raise RunError(
            f"{error or type(error).__name__}\nWhether the job was taken is not known: `lorafleet status {run.id}` "
            f"asks, and `lorafleet resume {run.id}` hands it over if it was not"
        ) from error

    @abstractmethod
    def findings(self) -> list[Finding]:
        """What the place has of all that a job needs. Raises UserError where it cannot be asked."""

    def examine(self, runs: Path) -> Run:
        """Look at the place; the findings are in the run's folder."""
        run = Run.create(runs, "doctor")
        try:
            files.write_json(run.path / "findings.json", {"findings": [found.as_dict() for found in self.findings()]})
        except BaseException:
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        return run

    def runs_dir(self, given: Path) -> Path:
        """Where the records are, on this machine: the runs themselves lie on the site's storage."""
        return given

    @property
    def cache(self) -> str:
        """Where its machines see models and data."""
        return f"{self.mount}/cache"

    def moved(self, made: Plan) -> Plan:
        """A plan that names what was brought to the storage by its path there."""
        places = staging.staged(self.storage, made.job, self.cache)
        return Plan.model_validate_json(json.dumps(staging.moved(made.model_dump(mode="json"), places)))

    def unseen(self, job: JobSpec) -> list[str]:
        """A sentence for everything that a job names by a path which the machines do not see."""
        return [
            f"{field} is {path}, which {self.called} does not see: `lorafleet fetch JOB.yaml --on SITE` brings it to "
            "the storage as it is now"
            for field, path in staging.named_paths(job)
            if not self._there(path)
        ]

    def unbrought(self, job: JobSpec) -> list[str]:
        """A sentence, where its machines have no internet, on what was never brought to them from here."""
        missing = [] if self.internet else staging.not_brought(self.storage, job)
        if not missing:
            return []
        return [
            f"internet of {self.called} is false, and {', '.join(missing)} was not brought to its storage from here: "
            "`lorafleet fetch JOB.yaml --on SITE` does so"
        ]

    def provide(self, job: JobSpec, say: Say) -> str:
        """Bring what a job names to the storage: what lies on this machine by a path, and where its machines have no
        internet also what it names of the hub and of the assets, which is fetched to this machine first."""
        own = [staging.own_cargo(path) for _, path in staging.named_paths(job) if not self._there(path)]
        if not self.internet:
            fetch_job(job, say)
            own += staging.fetched_cargo(job)
        if own:
            self._deliver(own, say)
        left = "; what it names of the hub and of the assets is fetched there" if self.internet else ""
        return f"{counted(len(own), 'part')} of it brought to the storage of {self.called}{left}"

    def provide_asset(self, name: str, say: Say) -> str:
        """Bring an asset to the storage; returns its folder there."""
        cargo = staging.asset_cargo(fetch_asset(asset(name), say))
        self._deliver([cargo], say)
        return f"{self.cache}/{cargo.target}"

    def _deliver(self, cargo: list[Cargo], say: Say) -> None:
        with self.reached(say) as place:
            send(place, cargo, say)
        staging.remember(self.storage, cargo)

    def _there(self, path: str) -> bool:
        return path.startswith(f"{self.mount}/")


# --- the record of a run


def stored(run: Run) -> dict[str, Any]:
    """What is kept beside a record: the site as it was, the submission, what was seen last."""
    return files.read_json(run.path / SITE_FILE)


def keep(run: Run, submission: int, **facts: Any) -> None:
    """Add to what is kept of a submission; of one that was followed by another nothing is kept any more."""
    path = run.path / SITE_FILE
    with files.locked(run.path / ".site"):
        now = files.read_json(path)
        if now.get("submission") == submission:
            files.write_json(path, now | facts)


def begin_submission(run: Run, facts: dict[str, Any]) -> None:
    """Write down what is handed over; what was brought of the submission before says nothing of this one's end."""
    with files.locked(run.path / ".site"):
        files.write_json(run.path / SITE_FILE, facts)
    status = run.status()
    files.write_json(run.path / "status.json", status | {"state": RunState.PENDING, "reason": None})


def settled(run: Run, submission: int, found: Seen) -> Seen:
    """Note how a submission ended, for the time when the place has forgotten it."""
    keep(run, submission, last={"state": str(found.state), "sentence": found.sentence})
    return found


def seen_last(run: Run) -> Seen | None:
    """How it ended, if that was seen."""
    last = stored(run).get("last")
    return Seen(RunState(last["state"]), last["sentence"]) if last else None


def unknown_there(run: Run, what: str) -> Seen:
    """Of a run of which the place knows nothing: not yet, or not any more."""
    facts, state, reason = stored(run), run.state, str(run.status().get("reason") or "")
    if not facts.get("handed_over"):
        return Seen(state, "it was not handed over: `lorafleet resume` does so")
    last = seen_last(run)
    if last:
        return last
    if facts.get("stopping") and state is not RunState.FINISHED:
        return Seen(RunState.STOPPED, f"it was stopped: `lorafleet resume {run.id}` goes on")
    if state in (RunState.FINISHED, RunState.FAILED, RunState.STOPPED):
        return Seen(state, reason)
    sentence = f"{what}; `lorafleet pull {run.id}` brings what is on the storage, `lorafleet resume` goes on"
    return Seen(RunState.FAILED, sentence)


def exit_code(run: Run, found: Seen, said: int | None) -> int:
    """What a run that has ended means for the shell: the driver's own code (`said`) where it is known."""
    failed = [trial.state is TrialState.FAILED for trial in run.trials()]
    if found.state is RunState.FINISHED:
        return ExitCode.SOME_TRIALS_FAILED if any(failed) else ExitCode.OK
    if found.state is RunState.STOPPED:
        return ExitCode.INTERRUPTED
    if said in frozenset(ExitCode) - {ExitCode.OK}:
        return int(said)
    return ExitCode.SOME_TRIALS_FAILED if failed and all(failed) else ExitCode.OUR_FAULT


@contextlib.contextmanager
def or_said_to_be_missing(run: Run, submission: int) -> Iterator[None]:
    """What keeps a record from coming is written down, and told with the run's end."""
    try:
        yield
    except UserError as error:
        sentence = f"its record is not here ({error}): `lorafleet pull {run.id}` brings it"
        keep(run, submission, missing=sentence, tries=int(stored(run).get("tries") or 0) + 1)
    else:
        keep(run, submission, missing=None, collected=True)


def written(run: Run) -> tuple[RunState | None, str]:
    """(state, reason) as the run itself has written them; (None, why) where that could not be brought."""
    missing = str(stored(run).get("missing") or "")
    return (None, missing) if missing else (run.state, str(run.status().get("reason") or ""))
