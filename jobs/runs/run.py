"""A run: one self-contained directory. State lives here once; everything else is computed from it.

runs/quickstart-3f9a1c/
    job.yaml            as given                     resolved.json   every value and its origin
    plan.json           what was going to happen     status.json     one RunState
    facts.json          digests, revisions           events.jsonl    one line a decision
    trials/<id>/        params.json status.json metrics.jsonl progress.json checkpoints/ adapter/ test.json
    report/ wandb/ logs/ tune/                       tune/ is Ray Tune's own, and can be deleted
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError, disk_full
from lorafleet.jobs.runs.lease import check_current, started
from lorafleet.jobs.runs.records import (
    EVENTS,
    METRIC_ROWS,
    PARAMS,
    PROGRESS,
    RUN_STATUS,
    TRIAL_STATUS,
    DamagedFile,
    read_record,
    read_rows,
)
from lorafleet.jobs.runs.tracebacks import at_run
from lorafleet.jobs.runs.trust import remember
from lorafleet.jobs.schema.search import FOLD
from lorafleet.jobs.trials.sampling import Assignment
from lorafleet.jobs.user import user_config

State = TypeVar("State", bound=StrEnum)
_RESERVE = 2**20
"""Bytes; random ones, since some file systems keep no room for zeros."""


def make_run_folder(path: Path, share: str = "none") -> None:
    """Make a run's folder, which its user alone can open.

    With `share` "group", or `share: group` in the user's settings, its group can read it too. Raises FileExistsError.
    """
    shared = "group" in (share, user_config().share)
    path.mkdir(mode=0o700)
    if shared:
        path.chmod(0o750 | (path.stat().st_mode & 0o2000))  # of a group that the folder above hands down (setgid)
    remember(path)


class RunState(StrEnum):
    """Where a run is."""

    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


_NEXT = {
    RunState.PENDING: {RunState.RUNNING, RunState.STOPPED, RunState.FAILED},
    RunState.RUNNING: {RunState.FINISHED, RunState.STOPPED, RunState.FAILED, RunState.RUNNING},
    RunState.STOPPED: {RunState.RUNNING, RunState.FAILED},
    RunState.FAILED: {RunState.RUNNING},
    RunState.FINISHED: {RunState.RUNNING, RunState.FAILED},
}


class TrialState(StrEnum):
    """Where a trial is. `stopped` was cut by the search; `pending` has not begun, or waits to be resumed."""

    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self in (TrialState.FINISHED, TrialState.STOPPED, TrialState.FAILED)


def _known(states: type[State], word: str, folder: Path) -> State:
    """A state by its word. Raises RunError for one that another version of lorafleet may have written."""
    try:
        return states(word)
    except ValueError:
        raise RunError(f"{folder / 'status.json'} says {word!r}, which this version does not know") from None


def _written_by_the_newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without those that a stale attempt added after a newer one had begun to write."""
    kept, newest = [], 0
    for row in rows:
        attempt = int(row.get("attempt") or 0)
        if attempt >= newest:
            kept.append(row)
            newest = attempt
    return kept


@dataclass(frozen=True)
class Trial:
    """One trial's folder."""

    path: Path
    attempt: int | None = None
    """The attempt that writes; None for those that only read."""

    def check_current(self) -> None:
        """Raise StaleAttempt when a newer attempt writes this run."""
        if self.attempt is not None:
            check_current(self.path.parent.parent, self.attempt)

    @property
    def id(self) -> str:
        """Its content hash."""
        return self.path.name

    def predictions(self, split: str) -> Path:
        """What its weights did with each held-out row."""
        return self.path / f"predictions-{split}.jsonl"

    @property
    def validation_results(self) -> Path:
        """What its best weights so far did with each validation row."""
        return self.path / "validation-results.safetensors"

    @property
    def checkpoint(self) -> Path:
        """What a resume continues from."""
        return self.path / "checkpoints" / "last"

    def weights_of(self, method: str) -> Path:
        """Where the best weights so far by the validation metric lie: an adapter (PEFT) or, for `full`, a model."""
        return self.path / ("model" if method == "full" else "adapter")

    @property
    def weights(self) -> Path:
        """The folder of `weights_of` that is there; the adapter's when there is none."""
        model = self.weights_of("full")
        return model if model.is_dir() else self.weights_of("lora")

    def hang_file(self, rank: int) -> Path:
        """Where the stacks of a process that hangs go."""
        return self.path / f"hang-{rank}.txt"

    def keep_stacks(self) -> list[str]:
        """Names under which the stacks of processes that hung are kept; the files of those that did not go."""
        kept = []
        for path in sorted(self.path.glob("hang-*.txt")):
            if not path.stat().st_size:
                path.unlink()
                continue
            number = 1 + len(list(self.path.glob(f"stacks-{path.stem.rpartition('-')[2]}-*.txt")))
            kept.append(f"stacks-{path.stem.rpartition('-')[2]}-{number}.txt")
            path.rename(self.path / kept[-1])
        return kept

    def params(self) -> dict[str, Any]:
        """`{"assignment", "index", ...}` as it was written when the trial was made."""
        return read_record(self.path / "params.json", PARAMS)

    @property
    def arm(self) -> str | None:
        """The arm of a comparison that it belongs to."""
        run = self.path.parent.parent
        return run.name if run.parent.name == "arms" else None

    @property
    def fold(self) -> int | None:
        """Which fold it holds back; None outside of cross-validation."""
        fold: int | None = self.params().get("assignment", {}).get(FOLD)
        return fold

    @property
    def repeats(self) -> bool:
        """Whether it is the best configuration of a search, with another seed."""
        return bool(self.params().get("repeats"))

    def status(self) -> dict[str, Any]:
        """`{"state", "rung", "reason", "failure", ...}`."""
        return read_record(self.path / "status.json", TRIAL_STATUS)

    @property
    def state(self) -> TrialState:
        """Its state; `pending` before the first is written."""
        return _known(TrialState, self.status().get("state", "pending"), self.path)

    def set_state(self, state: TrialState, **facts: Any) -> None:
        """Write the state with what goes with it, keeping what was said before."""
        self.check_current()
        ended = {"ended": time.time()} if state.ended else {}
        now = {"updated": time.time(), **ended, **_stamp(self.attempt)}
        files.write_json(self.path / "status.json", self.status() | {"state": state} | facts | now)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl, oldest first."""
        return _written_by_the_newest(read_rows(self.path / "metrics.jsonl", METRIC_ROWS))

    def add_row(self, row: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        self.check_current()
        files.append_jsonl(self.path / "metrics.jsonl", {"time": time.time(), **row, **_stamp(self.attempt)})

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows that hold an evaluation."""
        return [row for row in self.metrics() if row.get("evaluated")]

    def progress(self) -> dict[str, Any]:
        """The heartbeat of a running trial."""
        return read_record(self.path / "progress.json", PROGRESS)


def _stamp(attempt: int | None) -> dict[str, int]:
    return {} if attempt is None else {"attempt": attempt}


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    path: Path
    attempt: int | None = None
    """The attempt that writes, which every write carries; None for those that only read."""

    def check_current(self) -> None:
        """Raise StaleAttempt when a newer attempt writes this run."""
        if self.attempt is not None:
            check_current(self.path, self.attempt)

    @classmethod
    def create(cls, runs: Path, name: str, share: str = "none") -> Run:
        """A new, empty run folder with a name of its own; `share` is a site's (`make_run_folder`)."""
        try:
            runs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--runs is {runs}, which cannot be made a folder: {error.strerror}") from error
        while True:
            path = runs.absolute() / f"{name}-{secrets.token_hex(3)}"
            try:
                make_run_folder(path, share)
            except FileExistsError:
                continue
            run = cls(path)
            at_run(path)
            try:
                run.set_state(RunState.PENDING, created=time.time(), name=name)
                run.keep_reserve()
            except OSError as error:
                shutil.rmtree(path, ignore_errors=True)
                raise disk_full(error, runs, "start again") or error from error
            return run

    @property
    def id(self) -> str:
        """The folder's name; a part has its run's, and a run of an arm its comparison's before its own."""
        if self.path.parent.name == "arms":
            return f"{self.path.parent.parent.name}-{self.path.name}"
        return self.path.parent.parent.name if self.path.parent.name == "parts" else self.path.name

    def arm(self, name: str) -> Run:
        """The run of an arm of a comparison, existing or not."""
        return Run(self.path / "arms" / name)

    def arms(self) -> list[Run]:
        """The arms that were begun to be trained, the first begun first."""
        found = [Run(path.parent) for path in (self.path / "arms").glob("*/plan.json")]
        return sorted(found, key=lambda arm: arm.created)

    def judged(self, seed: int) -> Path:
        """Of an arm: what its model of one seed does with the held-out rows, `test.json` and the predictions."""
        return self.path / "judged" / str(seed)

    def judged_seeds(self) -> list[int]:
        """Of an arm: the seeds whose models were judged, in order."""
        folders = [path.parent.name for path in (self.path / "judged").glob("*/test.json")]
        return sorted(int(name) for name in folders if name.isdecimal())

    @property
    def inference_file(self) -> Path:
        """Of an arm: what was measured of its inference, a line a round."""
        return self.path / "inference.jsonl"

    def part(self, number: int) -> Run:
        """The part of one task of a job array."""
        return Run(self.path / "parts" / str(number))

    def parts(self) -> list[Run]:
        """The parts that were not put together yet."""
        found = [Run(path.parent) for path in (self.path / "parts").glob("*/plan.json") if path.parent.name.isdecimal()]
        return sorted(found, key=lambda part: int(part.path.name))

    def keep_reserve(self) -> None:
        """Take some room, which `release_reserve` gives back on the day when the disk is full."""
        files.overwrite(self.path / ".reserve", secrets.token_bytes(_RESERVE))

    def release_reserve(self) -> None:
        """Make room for the last words of a run."""
        (self.path / ".reserve").unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """`{"state", "reason", "pid", ...}`."""
        return read_record(self.path / "status.json", RUN_STATUS)

    @property
    def state(self) -> RunState:
        """Its state as written; a running run whose driver died still says so (see `alive`)."""
        return _known(RunState, self.status().get("state", "pending"), self.path)

    def set_state(self, state: RunState, **facts: Any) -> None:
        """Move to a state. Raises RunError on a move that makes no sense, such as finished to stopped."""
        self.check_current()
        status = self.status()
        before = status.get("state")
        if before is not None and state not in _NEXT[RunState(before)]:
            raise RunError(f"{self.id} is {before} and cannot become {state}")
        ended = {} if state in (RunState.PENDING, RunState.RUNNING) else {"ended": time.time()}
        now = {"updated": time.time(), **_stamp(self.attempt)}
        files.write_json(self.path / "status.json", status | {"state": state} | facts | ended | now)

    @property
    def created(self) -> float:
        """Seconds since the epoch."""
        return float(self.status().get("created", 0.0))

    def alive(self) -> bool:
        """Whether the driver that wrote this run's state still lives on this machine."""
        status = self.status()
        pid = status.get("pid")
        if self.state is not RunState.RUNNING or not pid or status.get("host") != os.uname().nodename:
            return False
        return started(pid) == status.get("pid_started")

    def gone(self) -> bool:
        """Whether the run says that it runs and its driver, which was on this machine, does not live."""
        here = self.status().get("host", os.uname().nodename) == os.uname().nodename
        return self.state is RunState.RUNNING and here and not self.alive()

    def mark_running(self, **facts: Any) -> None:
        """Say that this process drives the run."""
        pid = os.getpid()
        self.set_state(RunState.RUNNING, pid=pid, pid_started=started(pid), host=os.uname().nodename, **facts)

    def trial(self, trial_id: str) -> Trial:
        """The folder of a trial, existing or not."""
        return Trial(self.path / "trials" / trial_id, self.attempt)

    def base_predictions(self, split: str) -> Path:
        """What the untuned base did with each row of a split."""
        return self.path / "report" / f"base-predictions-{split}.jsonl"

    @property
    def baselines_file(self) -> Path:
        """What answers that need no model get, by split."""
        return self.path / "report" / "baselines.json"

    def rows_file(self, split: str) -> Path:
        """The rows of a split that was judged on."""
        return self.path / "report" / f"rows-{split}.jsonl"

    def trials(self) -> list[Trial]:
        """Every trial that was made, in the order in which they were."""
        folders = [*(self.path / "trials").glob("*"), *(self.path / "parts").glob("*/trials/*")]
        if (self.path / "arms").is_dir():
            return [trial for arm in self.arms() for trial in arm.trials()]
        found = []
        for path in folders:
            if (path / "params.json").is_file():
                with contextlib.suppress(RunError):  # `damages` names it
                    trial = Trial(path, self.attempt)
                    index = trial.params().get("index", 0)
                    trial.state  # noqa: B018 - a word that is none raises
                    found.append((index, trial.id, trial))
        return [trial for _, _, trial in sorted(found, key=lambda row: row[:2])]

    def damages(self, whole: Collection[str] = ()) -> list[str]:
        """A sentence for each trial that cannot be read, and for each that was made and is gone.

        `whole` are the ids of trials that were read already.
        """
        if (self.path / "arms").is_dir():
            return [f"{arm.path.name}: {sentence}" for arm in self.arms() for sentence in arm.damages(whole)]
        said, there = [], set(whole)
        for path in [*(self.path / "trials").glob("*"), *(self.path / "parts").glob("*/trials/*")]:
            trial = Trial(path)
            if trial.id in there:
                continue
            try:
                if trial.params() and trial.state and trial.metrics() is not None and trial.progress() is not None:
                    there.add(trial.id)
                elif any(path.iterdir()):
                    said.append(f"{path / 'params.json'} is gone: the trial is left out")
                    there.add(trial.id)
            except (RunError, OSError) as error:
                said.append(f"trial {trial.id} is left out: {error}")
                there.add(trial.id)
        with contextlib.suppress(DamagedFile):
            made = dict.fromkeys(row["trial_id"] for row in self.events("trial") if "trial_id" in row)
            said += [f"trial {name} was made, and its folder is gone" for name in made if name not in there]
        return said

    def add_trial(self, trial_id: str, index: int, assignment: Assignment) -> Trial:
        """Make a trial's folder, if it is not there already."""
        trial = self.trial(trial_id)
        if not (trial.path / "params.json").is_file():
            files.write_json(trial.path / "params.json", {"index": index, "assignment": assignment})
            self.event("trial", trial_id=trial_id)
            trial.set_state(TrialState.PENDING)
        return trial

    def event(self, kind: str, **facts: Any) -> None:
        """Add a line to events.jsonl."""
        self.check_current()
        row = {"time": time.time(), "event": kind, **facts, **_stamp(self.attempt)}
        files.append_jsonl(self.path / "events.jsonl", row)

    def remarks(self) -> list[str]:
        """What happened beside the plan, a sentence each: damaged checkpoints, trials begun again, fewer at once."""
        said = [f"{arm.path.name}: {sentence}" for arm in self.arms() for sentence in arm.remarks()]
        for event in self.events():
            if event.get("event") == "warning":
                said.append(f"{event['trial_id']}: {event['sentence']}")
            elif event.get("event") == "tracking_failed":
                said.append(f"W&B was given up: {event['error']}; the run's own record is whole")
            elif event.get("event") in ("placement", "note"):
                said.append(str(event["sentence"]))
            elif event.get("event") == "retry":
                failure, number = event["failure"], event["number"]
                halved = ", with fewer rows a pass and more passes" if failure["failure_class"] == "oom" else ""
                said.append(
                    f"{event['trial_id']} began again{halved} (retry {number} after {failure['failure_class']}): "
                    f"{failure['sentence']}"
                )
        return said

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The lines of events.jsonl, of one kind or all."""
        rows = _written_by_the_newest(read_rows(self.path / "events.jsonl", EVENTS))
        return [row for row in rows if kind is None or row.get("event") == kind]
