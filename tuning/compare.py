"""Several ways to adapt one base, from a run folder to one table.

Each arm that trains is a run of its own below `arms/`: a search, and its best configuration with further seeds. They go
one after another, each with its own driver process, so that nothing of one arm stays for the next. Then all arms are
judged on the same held-out rows, and measured in processes of their own, in turn.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorafleet.cluster.local import driver_command
from lorafleet.evaluation.metrics.summary import write_baselines
from lorafleet.evaluation.report.comparison import trained_rows
from lorafleet.evaluation.report.search import build_report, write_report
from lorafleet.jobs import files
from lorafleet.jobs.errors import ExitCode, RunError
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials import arms
from lorafleet.jobs.trials.trial_id import facts_of
from lorafleet.tuning.driver import TrainingDriver
from lorafleet.tuning.provenance import record_of

_POLL_SECONDS = 0.5
_PACE = "pace.json"
"""Of an arm: how long a row takes in its training."""
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl
_LIBC = ctypes.CDLL(None)  # before there is a fork


class _Stopped(Exception):
    """The run is to stop."""


class Comparison(TrainingDriver):
    """One attempt at a comparison."""

    unjudged: dict[str, str] = {}
    """Models that could not be evaluated, and why."""

    def _attempt(self, attempt: int) -> ExitCode:
        self._phase("reading data")
        data = self._read_data()
        try:
            self._measure_paces(attempt, data)
            for name in arms.trained(self.job):
                self._train(name, data)
            self._judge(attempt, data)
        except _Stopped:
            return self._stopped()
        return self._finish()

    # ---- training ----

    def _train(self, name: str, data: Any) -> None:
        """An arm's search, and its best configuration with further seeds."""
        arm = self.run.arm(name)
        self._drive(arm, arms.search_job(self.job, name, self._samples(name, data)), f"training {name}")
        if not trained_rows(build_report(arm), arms.arm_of(self.job, name)):
            self.run.event("note", sentence=f"arm {name} has no trained weights: {_why(arm)}")

    def _samples(self, name: str, data: Any) -> int | None:
        """Training rows of one training under the equal budget; None: what `train` says."""
        assert self.job.compare is not None
        budget = self.job.compare.budget
        if budget.tokens is not None:
            job = arms.own_job(self.job, name)
            own = self._own_tokens(job, data)
            mean = float(own.splits["train"].lengths.sum()) / own.training_rows(job)  # of packed rows, where they are
            return max(1, math.ceil(budget.tokens / mean))
        if budget.device_seconds is not None:
            seconds = budget.device_seconds / (self.placement.workers * self._seconds_per_row(name))
            return max(1, round(seconds))
        return budget.samples

    def _seconds_per_row(self, name: str) -> float:
        return float(files.read_json(self.run.arm(name).path / _PACE)["seconds_per_row"])

    def _measure_paces(self, attempt: int, data: Any) -> None:
        """How long a row takes in the training of each arm, once for all attempts."""
        from lorafleet.tuning.inference_speed import seconds_per_row

        waiting = [name for name in arms.trained(self.job) if not (self.run.arm(name).path / _PACE).is_file()]
        assert self.job.compare is not None
        if self.job.compare.budget.device_seconds is None or not waiting:
            return
        self._phase("measuring the speed of the arms")
        with self._ray(attempt):
            for name in waiting:
                self._check_stop()
                job = arms.own_job(self.job, name)
                found = seconds_per_row(self, job, self._tokens(job, data))
                files.write_json(self.run.arm(name).path / _PACE, {"seconds_per_row": found})

    def _drive(self, run: Run, job: JobSpec, phase: str) -> None:
        """The run of an arm to its end, in a process of its own. Raises _Stopped, or RunError when it broke off."""
        if _over(run):
            return  # where no trial of it was trained, the report says so
        self._check_stop()
        self._phase(phase)
        if not (run.path / "plan.json").is_file():
            run.path.mkdir(parents=True, exist_ok=True)
            run.set_state(RunState.PENDING, created=time.time(), name=job.name)
            plan = self.stored | {"job": job.model_dump(mode="json"), "command": "sweep", "judges": False, "files": {}}
            own = self.stored.get("placements", {}).get(run.path.name)
            files.write_json(run.path / "plan.json", plan | ({"placement": own} if own else {}))
        (run.path / "logs").mkdir(exist_ok=True)
        with files.opened_to_append(run.path / "logs" / "driver.log") as log:
            child = subprocess.Popen(
                [*driver_command(), "exec", str(run.path), "--trust"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=run.path,
                start_new_session=True,  # Ctrl-C is for us: it is asked through its stop file, once
                preexec_fn=partial(_die_with, os.getpid()),
            )
        while (code := child.poll()) is None:
            if self.stop_file.exists() and not (run.path / "stop").exists():
                (run.path / "stop").touch()
            self._note_wall()
            time.sleep(_POLL_SECONDS)
        if code == ExitCode.REQUEUE and self.told is None:  # too few machines of an allocation are left
            self.told = signal.SIGUSR1
            self.stop_file.touch()
        self._check_stop()
        if not _over(run):
            said = run.status().get("reason") or f"its driver ended with code {code}"
            log_file = run.path / "logs" / "driver.log"
            raise RunError(f"{phase}: {said} (`lorafleet resume` goes on; {log_file} has what it said)")

    def _check_stop(self) -> None:
        if self.stop_file.exists():
            raise _Stopped

    # ---- judging ----

    def _judge(self, attempt: int, data: Any) -> None:
        """Every arm on the held-out rows, and its inference measured."""
        from lorafleet.tuning.held_out import Exam, examine_all
        from lorafleet.tuning.inference_speed import measure_all
        from lorafleet.tuning.trial_run import Work

        self._check_stop()
        self._phase("evaluating on held-out rows")
        split = "validation" if data.chosen_on_test else "test"
        files.write_jsonl(self.run.rows_file(split), (row.shown() for row in data.rows(split)))
        write_baselines(self.run, self.job, {split: data.rows(split)})
        work = Work(self.job, str(self.run.path), str(data.folder), self.placement.gpus_per_worker, False, attempt)
        judged = self._judged(data)
        exams = [
            Exam(
                f"{one.arm}/{one.seed}",
                one.job,
                one.tokens,
                str(one.weights) if one.weights else None,
                (split,),
                str(one.folder),
                "test.json",
                "predictions-SPLIT.jsonl",
            )
            for one in judged
            if not (one.folder / "test.json").is_file()
        ]
        with self._ray(attempt) as ray_facts:
            self.run.event("ray", **ray_facts)
            self.unjudged = examine_all(work, exams, self.placement.slots)
            for what, why in self.unjudged.items():
                self.run.event("warning", trial_id=what, sentence=f"not evaluated on the held-out rows: {why}")
            self._check_stop()
            self._phase("measuring inference")
            firsts = {one.arm: one for one in reversed(judged)}
            measure_all(self, list(reversed(firsts.values())), split)

    def _judged(self, data: Any) -> list[Judged]:
        """Every model of every arm, the arm's first seed first."""
        assert self.job.compare is not None
        found: list[Judged] = []
        for name, arm in self.job.compare.arms.items():
            folder = self.run.arm(name)
            if arm.trains:
                found += self._trained(name, data)
            elif arm.adapter_of and (given := arms.arm_of(self.job, arm.adapter_of).weights):
                job = _on_base_of(arms.judged_job(self.job, arm.adapter_of, None), arms.own_job(self.job, name))
                seed = job.train.seed
                found.append(Judged(name, seed, job, Path(given), folder.judged(seed), self._tokens(job, data)))
            elif arm.adapter_of:
                for one in self._trained(arm.adapter_of, data):
                    job = _on_base_of(one.job, arms.own_job(self.job, name))
                    found.append(Judged(name, one.seed, job, one.weights, folder.judged(one.seed), one.tokens))
            else:
                job = arms.judged_job(self.job, name, None)
                seed, weights = job.train.seed, Path(arm.weights) if arm.weights else None
                found.append(Judged(name, seed, job, weights, folder.judged(seed), self._tokens(job, data)))
        return found

    def _trained(self, name: str, data: Any) -> list[Judged]:
        arm, found = self.run.arm(name), []
        if not (arm.path / "plan.json").is_file():
            return []
        for row in trained_rows(build_report(arm), arms.arm_of(self.job, name)):
            job, weights = arms.judged_job(self.job, name, row.params), arm.trial(row.trial_id).weights
            if weights.is_dir():
                seed = job.train.seed
                found.append(Judged(name, seed, job, weights, arm.judged(seed), self._tokens(job, data)))
        return found

    def _tokens(self, job: JobSpec, data: Any) -> str:
        """The folder of the rows as an arm's own model reads them."""
        return str(self._own_tokens(job, data).folder)

    def _own_tokens(self, job: JobSpec, data: Any) -> Any:
        if job.model == self.job.model:
            return data
        from lorafleet.training.data import prepare

        return prepare(job)

    # ---- what is written down ----

    def _read_data(self) -> Any:
        from lorafleet.training.data import prepare

        data = prepare(self.job)
        facts = facts_of(self.job)
        before = files.read_json(self.run.path / "facts.json")
        if before and before["data_sha256"] != facts.data_sha256:
            raise RunError(f"the data files of {self.run.id} have changed since it began: start a new comparison")
        files.write_json(self.run.path / "facts.json", record_of(self.job, facts, data))
        return data

    def _stopped(self) -> ExitCode:
        self.run.set_state(
            RunState.STOPPED, reason="interrupted: `lorafleet resume` goes on", wall_seconds=self._wall()
        )
        write_report(self.run)
        return ExitCode.INTERRUPTED if self.told in (None, signal.SIGINT) else ExitCode.REQUEUE

    def _finish(self) -> ExitCode:
        from lorafleet.evaluation.render.wandb import track_report

        wall = self._wall()
        self._phase("writing the report")
        failed = sum(trial.status().get("failure") is not None for trial in self.run.trials())
        reason = f"{failed} of {len(self.run.trials())} trials failed" if failed else None
        if self.unjudged:
            names = ", ".join(self.unjudged)
            reason = f"not evaluated on the held-out rows: {names}; `lorafleet resume` tries again"
            failed += len(self.unjudged)
        state = RunState.FAILED if self.unjudged else RunState.FINISHED
        self.run.set_state(state, reason=reason, wall_seconds=wall, phase=None)
        track_report(self.run, self.job, write_report(self.run, with_tokenizer=True))
        return ExitCode.SOME_TRIALS_FAILED if failed else ExitCode.OK


@dataclass(frozen=True)
class Judged:
    """One model of an arm."""

    arm: str
    seed: int
    job: JobSpec
    """As what it is judged."""
    weights: Path | None
    """What was trained; None: nothing."""
    folder: Path
    """Where what is found goes."""
    tokens: str
    """The folder of the rows as its model reads them."""


def _on_base_of(trained: JobSpec, base: JobSpec) -> JobSpec:
    """A trained configuration on another arm's base."""
    return trained.model_copy(update={"method": base.method, "qlora": base.qlora})


def _over(run: Run) -> bool:
    """Whether an arm came to its end, be it without one trained trial."""
    trials = run.trials()
    all_failed = run.state is RunState.FAILED and bool(trials) and all(trial.state.ended for trial in trials)
    return run.state is RunState.FINISHED or all_failed


def _why(run: Run) -> str:
    failures = [trial.status().get("failure") for trial in run.trials()]
    said = [failure["sentence"] for failure in failures if failure]
    return said[0] if said else str(run.status().get("reason") or "no trial has a score")


def _die_with(parent: int) -> None:
    """Before the driver of an arm begins: when we are killed, it is asked to save and end."""
    if sys.platform == "linux":
        _LIBC.prctl(_DIES_WITH_PARENT, signal.SIGTERM)
        if os.getppid() != parent:  # killed in this very moment
            os._exit(ExitCode.INTERRUPTED)
