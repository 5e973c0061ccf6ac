"""Read and write a run: one self-contained directory with its state.

Everything else is computed from it.

runs/quickstart-3f9a1c/
    job.yaml            as submitted           resolved.json   every value and its origin
    plan.json           what was planned       status.json     one RunState
    facts.json          digests, revisions     events.jsonl    one line per decision
    progress.json       heartbeats of the trials that have not ended
    trials/<id>/        params.json status.json metrics.jsonl test.json checkpoints/ adapter/
    report/ wandb/ logs/ tune/                 tune/ belongs to Ray Tune, and can be deleted
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError, make_disk_full_error
from lorafleet.jobs.runs.events import AnyEvent, Event, TrialEvent, describe_event, read_events
from lorafleet.jobs.runs.lease import check_current
from lorafleet.jobs.runs.processes import get_process_start
from lorafleet.jobs.runs.records import (
    DamagedFile,
    HeldOutScores,
    MetricsRow,
    PackRecord,
    PlanRecord,
    Progress,
    ProgressRecord,
    RunMetadata,
    RunStatusRecord,
    TrialParams,
    TrialStatus,
    read_rows,
    read_typed,
)
from lorafleet.jobs.runs.tracebacks import set_current_run
from lorafleet.jobs.runs.trust import record_own_run
from lorafleet.jobs.schema.types import FOLD, Assignment
from lorafleet.jobs.user import load_user_config

State = TypeVar("State", bound=StrEnum)
_RESERVE = 2**20
"""Size of the reserve file in bytes. Its bytes are random: some file systems store no blocks
for zeros.
"""


def make_run_folder(path: Path, share: str = "none") -> None:
    """Create a run's folder, which only its user can open.

    Its group can read it too if `share` is "group", or if the user's settings have `share:
    group`. Raises FileExistsError.
    """
    is_shared = "group" in (share, load_user_config().share)
    path.mkdir(mode=0o700)
    if is_shared:
        path.chmod(
            0o750 | (path.stat().st_mode & 0o2000)
        )  # keep setgid: the parent folder passes its group on
    record_own_run(path)


class RunState(StrEnum):
    """State of a run."""

    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


_TRANSITIONS = {
    RunState.PENDING: {RunState.RUNNING, RunState.STOPPED, RunState.FAILED},
    RunState.RUNNING: {RunState.FINISHED, RunState.STOPPED, RunState.FAILED, RunState.RUNNING},
    RunState.STOPPED: {RunState.RUNNING, RunState.FAILED},
    RunState.FAILED: {RunState.RUNNING},
    RunState.FINISHED: {RunState.RUNNING, RunState.FAILED},
}


class TrialState(StrEnum):
    """State of a trial.

    `stopped` was stopped by the search; `pending` has not started, or waits to be resumed; `paused`
    waits at a rung until it is among the best.
    """

    PENDING = "pending"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def has_ended(self) -> bool:
        """Return whether the state is final."""
        return self in (TrialState.FINISHED, TrialState.STOPPED, TrialState.FAILED)


def _parse_state(states: type[State], text: str, folder: Path) -> State:
    """Return the state of a text.

    Raises RunError for one that another version of lorafleet may have written.
    """
    try:
        return states(text)
    except ValueError:
        raise RunError(
            f"{folder / 'status.json'} contains the state {text!r}, which this version of "
            "lorafleet does not know"
        ) from None


def _drop_stale(rows: list[MetricsRow]) -> list[MetricsRow]:
    """Return the rows without those of stale attempts.

    A row is stale if a newer attempt had begun to write before it.
    """
    current_rows, newest = [], 0
    for row in rows:
        attempt = row.attempt or 0
        if attempt >= newest:
            current_rows.append(row)
            newest = attempt
    return current_rows


@dataclass(frozen=True)
class Trial:
    """The folder of one trial."""

    path: Path
    attempt: int | None = None
    """Attempt that writes; None for readers."""

    def check_current(self) -> None:
        """Raise StaleAttempt if a newer attempt writes this run."""
        if self.attempt is not None:
            check_current(self.path.parent.parent, self.attempt)

    @property
    def id(self) -> str:
        """Return the id of the trial: its content hash."""
        return self.path.name

    def get_predictions_file(self, split: str) -> Path:
        """Return the file of the trial's predictions for each held-out row."""
        return self.path / f"predictions-{split}.jsonl"

    @property
    def validation_results(self) -> Path:
        """Return the file of the results of the best weights so far for each validation row."""
        return self.path / "validation-results.safetensors"

    @property
    def checkpoint(self) -> Path:
        """Return the folder of the checkpoint that a resume continues from."""
        return self.path / "checkpoints" / "last"

    def get_weights_folder(self, method: str) -> Path:
        """Return the folder of the best weights so far by the validation metric.

        It holds an adapter (PEFT) or, for the method `full`, a model.
        """
        return self.path / ("model" if method == "full" else "adapter")

    @property
    def weights(self) -> Path:
        """Return the existing folder of `get_weights_folder`; that of the adapter if there is
        none.
        """
        model = self.get_weights_folder("full")
        return model if model.is_dir() else self.get_weights_folder("lora")

    def get_hang_file(self, rank: int) -> Path:
        """Return the file for the stacks of a process that hangs."""
        return self.path / f"hang-{rank}.txt"

    def save_stacks(self) -> list[str]:
        """Rename the stack files of processes that hung, and return the new names.

        Files of processes that did not hang are empty, and are removed.
        """
        names = []
        for path in sorted(self.path.glob("hang-*.txt")):
            if not path.stat().st_size:
                path.unlink()
                continue
            number = 1 + len(list(self.path.glob(f"stacks-{path.stem.rpartition('-')[2]}-*.txt")))
            names.append(f"stacks-{path.stem.rpartition('-')[2]}-{number}.txt")
            path.rename(self.path / names[-1])
        return names

    def read_params(self) -> TrialParams:
        """Return the trial's parameters, as written when it was created."""
        return read_typed(self.path / "params.json", TrialParams)

    @property
    def arm(self) -> str | None:
        """Return the arm of a comparison that the trial belongs to; None outside of comparisons."""
        run = self.path.parent.parent
        return run.name if run.parent.name == "arms" else None

    @property
    def fold(self) -> int | None:
        """Return the fold that the trial holds back; None outside of cross-validation."""
        fold: int | None = self.read_params().assignment.get(FOLD)
        return fold

    @property
    def is_repeat(self) -> bool:
        """Return whether the trial repeats the best configuration of a search with another seed."""
        return self.read_params().repeats

    def read_status(self) -> TrialStatus:
        """Return the trial's status."""
        return read_typed(self.path / "status.json", TrialStatus)

    @property
    def state(self) -> TrialState:
        """Return the state of the trial; `pending` before one is written."""
        return _parse_state(TrialState, self.read_status().state or "pending", self.path)

    def set_state(self, state: TrialState, **details: Any) -> TrialStatus:
        """Write the state together with `details`, and return the new status.

        Earlier values are kept.
        """
        self.check_current()
        ended = {"ended": time.time()} if state.has_ended else {}
        stamps = {"updated": time.time(), **ended, **_make_stamp(self.attempt)}
        values = self.read_status().to_dict() | {"state": state.value} | details | stamps
        files.write_json(self.path / "status.json", values)
        return TrialStatus.model_validate(values)

    def read_metrics(self) -> list[MetricsRow]:
        """Return all rows of metrics.jsonl, oldest first."""
        return _drop_stale(read_rows(self.path / "metrics.jsonl", MetricsRow))

    def add_rows(self, *rows: MetricsRow) -> None:
        """Append lines to metrics.jsonl."""
        self.check_current()
        lines = [
            {"time": time.time(), **row.to_dict(), **_make_stamp(self.attempt)} for row in rows
        ]
        files.append_jsonl(self.path / "metrics.jsonl", *lines)

    def find_rung(self, rows: Sequence[MetricsRow]) -> int | None:
        """Return the last rung that the trial has reached, or None.

        Args:
            rows: Its `read_metrics`.
        """
        rungs = (row.rung for row in reversed(rows) if row.rung is not None)
        return next(rungs, self.read_status().rung)

    def read_evaluations(self) -> list[MetricsRow]:
        """Return the rows of metrics.jsonl that hold an evaluation."""
        return [row for row in self.read_metrics() if row.evaluated]

    def read_held_out(self) -> HeldOutScores:
        """Return the held-out evaluation of the trial's weights; empty before there is one."""
        return read_typed(self.path / "test.json", HeldOutScores)


def _make_stamp(attempt: int | None) -> dict[str, int]:
    return {} if attempt is None else {"attempt": attempt}


@dataclass(frozen=True)
class Run:
    """The folder of one run."""

    path: Path
    attempt: int | None = None
    """Attempt that writes, stored with every write; None for readers."""

    def check_current(self) -> None:
        """Raise StaleAttempt if a newer attempt writes this run."""
        if self.attempt is not None:
            check_current(self.path, self.attempt)

    @classmethod
    def create(cls, runs: Path, name: str, share: str = "none") -> Run:
        """Create an empty run folder with a unique name.

        `share` is the setting of a site (see `make_run_folder`). Raises RunError if the folder
        cannot be created.
        """
        try:
            runs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"--runs is {runs}, but that folder cannot be created: {error.strerror}"
            ) from error
        while True:
            path = runs.absolute() / f"{name}-{secrets.token_hex(3)}"
            try:
                make_run_folder(path, share)
            except FileExistsError:
                continue
            run = cls(path)
            set_current_run(path)
            try:
                run.set_state(RunState.PENDING, created=time.time(), name=name)
                run.create_reserve()
            except OSError as error:
                shutil.rmtree(path, ignore_errors=True)
                raise make_disk_full_error(error, runs, "run the command again") or error from error
            return run

    @property
    def id(self) -> str:
        """Return the name of the folder.

        An array task has the id of its run; the run of an arm is prefixed with its comparison.
        """
        if self.path.parent.name == "arms":
            return f"{self.path.parent.parent.name}-{self.path.name}"
        return self.path.parent.parent.name if self.path.parent.name == "parts" else self.path.name

    def get_arm(self, name: str) -> Run:
        """Return the run of an arm of a comparison, existing or not."""
        return Run(self.path / "arms" / name)

    def list_arms(self) -> list[Run]:
        """Return the arms whose training has started, in the order of their start."""
        runs = [Run(path.parent) for path in (self.path / "arms").glob("*/plan.json")]
        return sorted(runs, key=lambda arm: arm.created)

    def get_evaluation_folder(self, seed: int) -> Path:
        """Return the folder of an arm's held-out evaluation of one seed.

        It holds `test.json` and the predictions.
        """
        return self.path / "judged" / str(seed)

    def list_evaluated_seeds(self) -> list[int]:
        """Return the seeds whose models of an arm were evaluated, in ascending order."""
        folders = [path.parent.name for path in (self.path / "judged").glob("*/test.json")]
        return sorted(int(name) for name in folders if name.isdecimal())

    @property
    def inference_file(self) -> Path:
        """Return the file of an arm's inference measurements, one line per round."""
        return self.path / "inference.jsonl"

    def get_array_task(self, number: int) -> Run:
        """Return the run of one array task."""
        return Run(self.path / "parts" / str(number))

    def list_array_tasks(self) -> list[Run]:
        """Return the array tasks that have not been merged yet."""
        tasks = [
            Run(path.parent)
            for path in (self.path / "parts").glob("*/plan.json")
            if path.parent.name.isdecimal()
        ]
        return sorted(tasks, key=lambda task: int(task.path.name))

    def create_reserve(self) -> None:
        """Reserve disk space, which `release_reserve` frees when the disk is full."""
        files.overwrite(self.path / ".reserve", secrets.token_bytes(_RESERVE))

    def release_reserve(self) -> None:
        """Free the reserved disk space, so that a run can still record its end."""
        (self.path / ".reserve").unlink(missing_ok=True)

    def read_plan(self) -> PlanRecord:
        """Return the run's plan; empty if the folder is not that of a run."""
        return read_typed(self.path / "plan.json", PlanRecord)

    def read_metadata(self) -> RunMetadata:
        """Return the run's metadata; empty before its driver has read the data."""
        return read_typed(self.path / "facts.json", RunMetadata)

    def read_pack(self) -> PackRecord | None:
        """Return how many trials the driver trains at once; None before that is chosen."""
        path = self.path / "pack.json"
        return read_typed(path, PackRecord) if path.is_file() else None

    def read_base_scores(self) -> HeldOutScores:
        """Return the evaluation of the untuned base model; empty before there is one."""
        return read_typed(self.path / "report" / "base.json", HeldOutScores)

    def read_status(self) -> RunStatusRecord:
        """Return the run's recorded status."""
        return read_typed(self.path / "status.json", RunStatusRecord)

    @property
    def progress_file(self) -> Path:
        """Return the file of `read_progress`."""
        return self.path / "progress.json"

    def read_progress(self) -> dict[str, Progress]:
        """Return the heartbeats of the trials that have not ended, by trial id.

        Those of array tasks and of arms are in runs of their own. Empty if no driver has trained.
        """
        return read_typed(self.progress_file, ProgressRecord).trials

    @property
    def state(self) -> RunState:
        """Return the recorded state.

        A running run whose driver died still says `running` (see `is_alive`).
        """
        return _parse_state(RunState, self.read_status().state or "pending", self.path)

    def set_state(self, state: RunState, **details: Any) -> None:
        """Move to a state.

        Raises RunError for an invalid transition, such as finished to stopped.
        """
        self.check_current()
        status = self.read_status()
        previous_state = status.state
        if previous_state is not None and state not in _TRANSITIONS[RunState(previous_state)]:
            raise RunError(f"{self.id} is {previous_state} and cannot become {state}")
        ended: dict[str, Any] = {}
        if state not in (RunState.PENDING, RunState.RUNNING):
            ended = {"ended": time.time(), "phase": None}
        stamps = {"updated": time.time(), **_make_stamp(self.attempt)}
        files.write_json(
            self.path / "status.json",
            status.to_dict() | {"state": state} | details | ended | stamps,
        )

    @property
    def created(self) -> float:
        """Return when the run was created, in seconds since the epoch."""
        return self.read_status().created or 0.0

    def is_alive(self) -> bool:
        """Return whether the driver that wrote the state of this run is alive on this machine."""
        status = self.read_status()
        pid = status.pid
        if self.state is not RunState.RUNNING or not pid or status.host != os.uname().nodename:
            return False
        return get_process_start(pid) == status.pid_started

    def has_lost_driver(self) -> bool:
        """Return whether the state is `running` although the driver is dead.

        Only a driver on this machine can be checked.
        """
        is_local = self.read_status().host in (None, os.uname().nodename)
        return self.state is RunState.RUNNING and is_local and not self.is_alive()

    def mark_running(self, **details: Any) -> None:
        """Record that this process drives the run."""
        pid = os.getpid()
        self.set_state(
            RunState.RUNNING,
            pid=pid,
            pid_started=get_process_start(pid),
            host=os.uname().nodename,
            **details,
        )

    def get_trial(self, trial_id: str) -> Trial:
        """Return a trial of the run, existing or not."""
        return Trial(self.path / "trials" / trial_id, self.attempt)

    def get_base_predictions_file(self, split: str) -> Path:
        """Return the file of the untuned base model's predictions for each row of a split."""
        return self.path / "report" / f"base-predictions-{split}.jsonl"

    @property
    def baselines_file(self) -> Path:
        """Return the file of the scores of baselines that need no model, by split."""
        return self.path / "report" / "baselines.json"

    def get_rows_file(self, split: str) -> Path:
        """Return the file of the rows of a split that was evaluated."""
        return self.path / "report" / f"rows-{split}.jsonl"

    def list_trials(self) -> list[Trial]:
        """Return all trials that were created, in the order of their index."""
        if (self.path / "arms").is_dir():
            return [trial for arm in self.list_arms() for trial in arm.list_trials()]
        entries = []
        for path in self.list_trial_folders():
            if (path / "params.json").is_file():
                with contextlib.suppress(RunError):  # `list_damages` reports it
                    trial = Trial(path, self.attempt)
                    index = trial.read_params().index
                    trial.state  # noqa: B018 - raises for an invalid state
                    entries.append((index, trial.id, trial))
        return [trial for _, _, trial in sorted(entries, key=lambda row: row[:2])]

    def list_trial_folders(self) -> list[Path]:
        """Return the folders of all trials, in no order, readable or not. Those of arms are left
        out.
        """
        return [*(self.path / "trials").glob("*"), *(self.path / "parts").glob("*/trials/*")]

    def list_damages(self, readable_ids: Collection[str] = ()) -> list[str]:
        """Return a message for each trial that cannot be read or whose folder is missing.

        `readable_ids` are the ids of trials that were already read.
        """
        if (self.path / "arms").is_dir():
            return [
                f"{arm.path.name}: {sentence}"
                for arm in self.list_arms()
                for sentence in arm.list_damages(readable_ids)
            ]
        messages, listed_ids = [], set(readable_ids)
        for path in self.list_trial_folders():
            trial = Trial(path)
            if trial.id in listed_ids:
                continue
            try:
                has_params = bool(trial.read_params().to_dict())
                # Reading raises for damaged files.
                for read in (trial.read_status, trial.read_metrics, trial.read_held_out):
                    read()
                _ = trial.state
                if has_params:
                    listed_ids.add(trial.id)
                elif any(path.iterdir()):
                    messages.append(f"{path / 'params.json'} is missing: the trial is skipped")
                    listed_ids.add(trial.id)
            except (RunError, OSError) as error:
                messages.append(f"trial {trial.id} is skipped: {error}")
                listed_ids.add(trial.id)
        with contextlib.suppress(DamagedFile):
            created_ids = dict.fromkeys(
                event.trial_id for event in self.read_events(TrialEvent) if event.trial_id
            )
            messages += [
                f"trial {name} was created, but its folder is missing"
                for name in created_ids
                if name not in listed_ids
            ]
        return messages

    def add_trial(self, trial_id: str, index: int, assignment: Assignment, **params: Any) -> Trial:
        """Create the folder of a trial if it does not exist, and return the trial.

        Args:
            params: Other fields of `TrialParams`.
        """
        trial = self.get_trial(trial_id)
        path = trial.path / "params.json"
        if not path.is_file():
            files.write_json(path, {"index": index, "assignment": assignment, **params})
            self.add_event(TrialEvent(trial_id=trial_id))
        return trial

    def add_event(self, event: Event) -> None:
        """Append an event to events.jsonl."""
        self.check_current()
        line = {"time": time.time(), **event.to_dict(), **_make_stamp(self.attempt)}
        files.append_jsonl(self.path / "events.jsonl", line)

    def list_remarks(self) -> list[str]:
        """Return unplanned events, one message each.

        Examples are damaged checkpoints, restarted trials and lower concurrency.
        """
        messages = [
            f"{arm.path.name}: {sentence}"
            for arm in self.list_arms()
            for sentence in arm.list_remarks()
        ]
        sentences = map(describe_event, self.read_events(Event))
        return messages + [sentence for sentence in sentences if sentence is not None]

    def read_events(self, kind: type[AnyEvent]) -> list[AnyEvent]:
        """Return the events of a kind, oldest first; of `Event`, all events."""
        return read_events(self.path / "events.jsonl", kind)
