"""Compare several ways to adapt one base model, from a run folder to one table.

Each arm that trains is a run of its own below `arms/`: a search, and its best
configuration with further seeds. The arms run one after another, each with its own
driver process, so that no state of one arm affects the next. Then all arms are
evaluated on the same held-out rows, and their inference is measured in separate
processes, in turn.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafleet.cluster.execution.command import get_driver_command
from lorafleet.cluster.execution.supervisor import die_with
from lorafleet.evaluation.metrics.summary import write_baselines
from lorafleet.evaluation.render.write import write_report
from lorafleet.evaluation.report.build import build_report
from lorafleet.evaluation.report.comparison import select_trained_rows
from lorafleet.jobs import files
from lorafleet.jobs.data.rows import forget_rows
from lorafleet.jobs.errors import ExitCode, RunError
from lorafleet.jobs.runs.events import NoteEvent
from lorafleet.jobs.runs.run import Run, RunState
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials import arms
from lorafleet.jobs.trials.trial_id import compute_provenance
from lorafleet.tuning.driver import TrainingDriver
from lorafleet.tuning.provenance import build_metadata

if TYPE_CHECKING:
    from lorafleet.tuning.held_out import HeldOutEvaluation
    from lorafleet.tuning.inference_speed import Measure
    from lorafleet.tuning.trial_run import Work

_POLL_SECONDS = 0.5
_PACE_FILE = "pace.json"
"""File in an arm's folder with the training time of a row."""


class _StopRequested(Exception):
    """Raised when the run is asked to stop."""


class Comparison(TrainingDriver):
    """One attempt at a comparison.

    Every step is repeatable: arms that have ended, models with results and rounds that were
    measured are skipped, so a resumed attempt continues where the last one ended. The arms
    are runs with drivers and leases of their own; this process only starts and watches
    them.
    """

    unjudged: dict[str, str] = {}
    """Models that could not be evaluated, with the reason."""

    def _run_attempt(self, attempt: int) -> ExitCode:
        self._record_phase("reading data")
        self._prepare_process()
        data = self._read_data()
        try:
            self._measure_paces(attempt, data)
            for name in arms.list_trained_arms(self.job):
                self._train_arm(name, data)
            self._evaluate_arms(attempt, data)
        except _StopRequested:
            return self._finish_stopped()
        return self._finish()

    # ---- training ----

    def _train_arm(self, name: str, data: Any) -> None:
        """Run an arm's search, and train its best configuration with further seeds.

        An arm without trained weights is recorded as a note and does not end the comparison.
        """
        arm = self.run.get_arm(name)
        self._run_arm(
            arm,
            arms.build_search_job(self.job, name, self._compute_sample_budget(name, data)),
            f"training {name}",
        )
        if not select_trained_rows(build_report(arm), arms.get_arm(self.job, name)):
            sentence = f"arm {name} has no trained weights: {_describe_failure(arm)}"
            self.run.add_event(NoteEvent(sentence=sentence))

    def _compute_sample_budget(self, name: str, data: Any) -> int | None:
        """Return the training rows of one training under the equal budget.

        None means that the job's `train` section decides.
        """
        budget = self.job.comparison.budget
        if budget.tokens is not None:
            job = arms.build_arm_job(self.job, name)
            arm_data = self._prepare_tokens(job, data)
            mean = float(arm_data.splits["train"].lengths.sum()) / arm_data.count_training_rows(
                job
            )  # of packed rows, if packing is on
            return max(1, math.ceil(budget.tokens / mean))
        if budget.device_seconds is not None:
            seconds = budget.device_seconds / (
                self.placement.workers * self._read_seconds_per_row(name)
            )
            return max(1, round(seconds))
        return budget.samples

    def _read_seconds_per_row(self, name: str) -> float:
        """Return the measured training time of a row of an arm, in seconds."""
        return float(files.read_json(self.run.get_arm(name).path / _PACE_FILE)["seconds_per_row"])

    def _measure_paces(self, attempt: int, data: Any) -> None:
        """Measure the training time of a row for each arm, once for all attempts.

        Does nothing unless the budget is `device_seconds`.
        """
        from lorafleet.tuning.inference_speed import measure_seconds_per_row

        unmeasured = [
            name
            for name in arms.list_trained_arms(self.job)
            if not (self.run.get_arm(name).path / _PACE_FILE).is_file()
        ]
        if self.job.comparison.budget.device_seconds is None or not unmeasured:
            return
        self._record_phase("measuring the speed of the arms")
        with self._open_measurement(attempt) as measure:
            for name in unmeasured:
                self._check_stop()
                job = arms.build_arm_job(self.job, name)
                tokens = self._get_tokens_folder(job, data)
                placement = self.plan.placements.get(name, {})
                threads = placement.get("cpus_per_worker", self.placement.cpus_per_worker)
                seconds = measure_seconds_per_row(self, job, tokens, measure, threads)
                files.write_json(
                    self.run.get_arm(name).path / _PACE_FILE, {"seconds_per_row": seconds}
                )

    def _run_arm(self, run: Run, job: JobSpec, phase: str) -> None:
        """Run an arm to its end, in a driver process of its own.

        Does nothing if an earlier attempt has ended the arm. The driver's output is in the
        arm's `logs/driver.log`.

        Args:
            run: The arm's folder. It need not exist.
            phase: What to record as the phase of the comparison.

        Raises:
            _StopRequested: The run is asked to stop.
            RunError: The arm's driver failed.
        """
        if _has_ended(run):
            return  # if none of its trials was trained, the report says so
        self._check_stop()
        self._record_phase(phase)
        # The arm's folder becomes a run like any other, with a plan derived from the comparison's.
        # `judges` is off, because all arms are evaluated together at the end.
        if not (run.path / "plan.json").is_file():
            run.path.mkdir(parents=True, exist_ok=True)
            run.set_state(RunState.PENDING, created=time.time(), name=job.name)
            plan = self.plan.to_dict() | {
                "job": job.model_dump(mode="json"),
                "command": "sweep",
                "judges": False,
                "files": {},
            }
            placement = self.plan.placements.get(run.path.name)
            if placement:
                plan["placement"] = placement
            files.write_json(run.path / "plan.json", plan)
        (run.path / "logs").mkdir(exist_ok=True)
        with files.open_to_append(run.path / "logs" / "driver.log") as log:
            child = subprocess.Popen(
                [*get_driver_command(), "exec", str(run.path), "--trust"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=run.path,
                # Ctrl-C must reach this process only: the arm is asked through its stop file, once.
                start_new_session=True,
                preexec_fn=partial(die_with, os.getpid()),
            )
        while (code := child.poll()) is None:
            if self.stop_request.exists() and not (run.path / "stop").exists():
                (run.path / "stop").touch()
            self._record_wall_seconds()
            time.sleep(_POLL_SECONDS)
        # The arm ended by itself to be requeued: too few machines of the allocation are left. The
        # comparison must be requeued too.
        if code == ExitCode.REQUEUE and self.stop_signal is None:
            self.stop_signal = signal.SIGUSR1
            self._request_stop()
        self._check_stop()
        # Models of an arm that broke off would be compared although they are half trained.
        if not _has_ended(run):
            reason = run.read_status().reason or f"its driver ended with exit code {code}"
            log_file = run.path / "logs" / "driver.log"
            raise RunError(f"{phase}: {reason} (see {log_file}; continue with `lorafleet resume`)")

    def _check_stop(self) -> None:
        """Raise _StopRequested if the run is asked to stop."""
        if self.stop_file.exists():
            raise _StopRequested

    # ---- evaluation ----

    def _evaluate_arms(self, attempt: int, data: Any) -> None:
        """Evaluate every arm on the held-out rows and measure its inference."""
        from lorafleet.tuning.finalists import record_unevaluated
        from lorafleet.tuning.held_out import HeldOutEvaluation
        from lorafleet.tuning.inference_speed import measure_all
        from lorafleet.tuning.trial_run import Work

        self._check_stop()
        self._record_phase("evaluating on held-out rows")
        split = "validation" if data.chosen_on_test else "test"
        shown_rows = (row.to_display_record() for row in data.read_rows(split))
        files.write_jsonl(self.run.get_rows_file(split), shown_rows)
        write_baselines(self.run, self.job, {split: data.read_rows(split)})
        work = Work(
            self.job,
            str(self.run.path),
            str(data.folder),
            self.placement.gpus_per_worker,
            self.placement.cpus_per_worker,
            False,
            attempt,
        )
        models = self._list_models(data)
        evaluations = [
            HeldOutEvaluation(
                f"{model.arm}/{model.seed}",
                model.job,
                model.tokens,
                str(model.weights) if model.weights else None,
                (split,),
                str(model.folder),
                "test.json",
                "predictions-SPLIT.jsonl",
            )
            for model in models
            if not (model.folder / "test.json").is_file()
        ]
        with self._open_measurement(attempt) as measure:
            self.unjudged = self._evaluate_models(work, evaluations)
            record_unevaluated(self.run, self.unjudged)
            self._check_stop()
            self._record_phase("measuring inference")
            # One model for each arm: seeds differ in their weights, not in their speed. Reversed,
            # the first seed wins.
            first_models = {model.arm: model for model in reversed(models)}
            measure_all(self, list(reversed(first_models.values())), split, measure)

    def _evaluate_models(self, work: Work, evaluations: list[HeldOutEvaluation]) -> dict[str, str]:
        """Evaluate models on the held-out rows.

        Returns:
            Model name -> reason, for each model that could not be evaluated.
        """
        if not self.evaluates_in_process:
            from lorafleet.tuning.evaluation_pool import evaluate_in_pool

            return evaluate_in_pool(work, evaluations, self.placement.slots, self.stop_request)
        from lorafleet.training.meter import free_unused_memory
        from lorafleet.training.model import resolve_device
        from lorafleet.tuning.base_cache import BaseCache
        from lorafleet.tuning.in_process import evaluate_in_process

        bases = BaseCache(work.gpus)
        failed = evaluate_in_process(
            work,
            bases,
            evaluations,
            threads=self._compute_cores(),
            is_restart=self.restart is not None,
        )
        # The processes that are measured next need the memory.
        bases.drop()
        free_unused_memory(resolve_device(work.gpus))
        return failed

    @contextlib.contextmanager
    def _open_measurement(self, attempt: int) -> Iterator[Measure]:
        """Yield the function that measures a model in a process of its own.

        On a cluster, and on several GPUs, Ray is open meanwhile.
        """
        from lorafleet.tuning.inference_speed import build_local_measure, build_ray_measure

        if self.evaluates_in_process:
            yield build_local_measure(self)
            return
        with self._open_ray(attempt) as ray_session:
            self.run.add_event(ray_session)
            yield build_ray_measure(self)

    def _list_models(self, data: Any) -> list[ArmModel]:
        """Return every model of every arm, the arm's first seed first."""
        models: list[ArmModel] = []
        for name, arm in self.job.comparison.arms.items():
            folder = self.run.get_arm(name)
            if arm.needs_training:
                models += self._list_trained_models(name, data)
            # The adapter was trained elsewhere, so there is one, and no seeds.
            elif arm.adapter_of and (
                weights_path := arms.get_arm(self.job, arm.adapter_of).weights
            ):
                job = _use_base_of(
                    arms.build_evaluation_job(self.job, arm.adapter_of, None),
                    arms.build_arm_job(self.job, name),
                )
                seed = job.train.seed
                models.append(
                    ArmModel(
                        name,
                        seed,
                        job,
                        Path(weights_path),
                        folder.get_evaluation_folder(seed),
                        self._get_tokens_folder(job, data),
                    )
                )
            elif arm.adapter_of:
                for model in self._list_trained_models(arm.adapter_of, data):
                    job = _use_base_of(model.job, arms.build_arm_job(self.job, name))
                    models.append(
                        ArmModel(
                            name,
                            model.seed,
                            job,
                            model.weights,
                            folder.get_evaluation_folder(model.seed),
                            model.tokens,
                        )
                    )
            else:
                job = arms.build_evaluation_job(self.job, name, None)
                seed, weights = job.train.seed, Path(arm.weights) if arm.weights else None
                models.append(
                    ArmModel(
                        name,
                        seed,
                        job,
                        weights,
                        folder.get_evaluation_folder(seed),
                        self._get_tokens_folder(job, data),
                    )
                )
        return models

    def _list_trained_models(self, name: str, data: Any) -> list[ArmModel]:
        """Return the trained models of an arm, or an empty list if it was never started."""
        arm, models = self.run.get_arm(name), []
        if not (arm.path / "plan.json").is_file():
            return []
        for row in select_trained_rows(build_report(arm), arms.get_arm(self.job, name)):
            job, weights = (
                arms.build_evaluation_job(self.job, name, row.params),
                arm.get_trial(row.trial_id).weights,
            )
            if weights.is_dir():
                seed = job.train.seed
                models.append(
                    ArmModel(
                        name,
                        seed,
                        job,
                        weights,
                        arm.get_evaluation_folder(seed),
                        self._get_tokens_folder(job, data),
                    )
                )
        return models

    def _get_tokens_folder(self, job: JobSpec, data: Any) -> str:
        """Return the folder of the rows, tokenised for an arm's own model."""
        return str(self._prepare_tokens(job, data).folder)

    def _prepare_tokens(self, job: JobSpec, data: Any) -> Any:
        """Return the rows, tokenised for an arm's own model."""
        # Another model has another tokenizer. The rows themselves are the same for all arms.
        if job.model == self.job.model:
            return data
        from lorafleet.training.data import prepare_tokens

        return prepare_tokens(job)

    # ---- records ----

    def _read_data(self) -> Any:
        """Return the rows as tokens, and write their metadata to facts.json.

        Raises RunError if the data files differ from those of an earlier attempt.
        """
        from lorafleet.training.data import prepare_tokens

        data = prepare_tokens(self.job)
        for name in self.job.comparison.arms:
            # Now, because the rows are at hand; later only the tokens are read.
            self._prepare_tokens(arms.build_arm_job(self.job, name), data)
        forget_rows()
        facts = compute_provenance(self.job)
        recorded = self.run.read_metadata()
        if not recorded.is_empty and recorded.data_sha256 != facts.data_sha256:
            raise RunError(
                f"the data files of {self.run.id} have changed since it started: start a new "
                "comparison"
            )
        metadata = build_metadata(self.job, facts, data)
        files.write_json(self.run.path / "facts.json", metadata.to_dict())
        return data

    def _finish_stopped(self) -> ExitCode:
        """Record that the run was stopped, write the report, and return the exit code."""
        self.run.set_state(
            RunState.STOPPED,
            reason="interrupted: continue with `lorafleet resume`",
            wall_seconds=self._compute_wall_seconds(),
        )
        write_report(self.run)
        return self._get_stop_code()

    def _finish(self) -> ExitCode:
        """Write the report, record the final state, and return the exit code.

        The run has failed if a model could not be evaluated: `resume` then evaluates only what
        is missing.
        """
        from lorafleet.evaluation.render.wandb import track_report

        wall = self._compute_wall_seconds()
        self._record_phase("writing the report")
        failed = sum(trial.read_status().failure is not None for trial in self.run.list_trials())
        reason = f"{failed} of {len(self.run.list_trials())} trials failed" if failed else None
        if self.unjudged:
            names = ", ".join(self.unjudged)
            reason = (
                f"not evaluated on the held-out rows: {names}; try again with `lorafleet resume`"
            )
            failed += len(self.unjudged)
        state = RunState.FAILED if self.unjudged else RunState.FINISHED
        self.run.set_state(state, reason=reason, wall_seconds=wall, phase=None)
        report = write_report(self.run, with_tokenizer=True)
        track_report(self.run, self.job, report)
        return ExitCode.SOME_TRIALS_FAILED if failed else ExitCode.OK


@dataclass(frozen=True)
class ArmModel:
    """One model of an arm.

    Arms that train have one for each seed. `_evaluate_arms` evaluates each of them and
    measures the inference of the first.
    """

    arm: str
    seed: int
    job: JobSpec
    """Job that it is evaluated with."""
    weights: Path | None
    """Folder of the trained weights. None: the base model."""
    folder: Path
    """Folder for the results."""
    tokens: str
    """Folder of the rows, tokenised for its model."""


def _use_base_of(trained: JobSpec, base: JobSpec) -> JobSpec:
    """Return a trained configuration with the base of another arm."""
    return trained.model_copy(update={"method": base.method, "qlora": base.qlora})


def _has_ended(run: Run) -> bool:
    """Return whether an arm has ended, even if none of its trials was trained."""
    # If all trials failed, running the driver again would only fail again.
    trials = run.list_trials()
    all_failed = (
        run.state is RunState.FAILED
        and bool(trials)
        and all(trial.state.has_ended for trial in trials)
    )
    return run.state is RunState.FINISHED or all_failed


def _describe_failure(run: Run) -> str:
    """Return why a run has no trained weights."""
    failures = [trial.read_status().failure for trial in run.list_trials()]
    messages = [failure.sentence for failure in failures if failure]
    return messages[0] if messages else str(run.read_status().reason or "no trial has a score")
