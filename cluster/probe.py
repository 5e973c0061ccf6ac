"""Measure a few real training steps of a job's first trial, for `lorafleet plan --probe`."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafleet.cluster.backend import Cluster, Say
from lorafleet.cluster.execution.subprocess_measurement import measure_in_subprocess
from lorafleet.cluster.planning.plan import average_rates
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError, UserError
from lorafleet.jobs.runs.plan import Plan, PlannedTrial, TrainingRate
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.runs.trust import remove_run_record
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.arms import build_arm_job
from lorafleet.jobs.trials.sampling import build_trial_job

if TYPE_CHECKING:
    from lorafleet.jobs.loading.job_file import LoadedJob

PACE_FILE = "pace.json"
"""File in the folder of a probe's run: what was measured."""


def measure_rate(plan: Plan, folder: Path) -> TrainingRate:
    """Train at most 12 steps of the first trial (of each arm) here; nothing is saved.

    One process is measured, also for trials of several.

    Args:
        folder: Working directory of the measuring process.

    Raises:
        RunError: The plan has no trials, or the measurement failed.
    """
    check_probe(plan)
    first_trials = {trial.arm: trial for trial in reversed(plan.trials)}
    rates = [_measure_trial(plan, trial, folder) for trial in first_trials.values()]
    rows = {load.arm: load.worst_rows for load in plan.loads}
    return average_rates(rates, [rows.get(arm, 1) for arm in first_trials])


def check_probe(plan: Plan) -> None:
    """Raise RunError if a plan trains nothing, so that there is no speed to measure."""
    if not plan.trials:
        raise RunError(f"`{plan.command}` trains nothing here, so there is no speed to measure")


def _measure_trial(plan: Plan, trial: PlannedTrial, folder: Path) -> TrainingRate:
    from lorafleet.evaluation.tokens import prepare

    job = _build_probed_job(plan.job, trial)
    request = {
        "what": "pace",
        "job": job.model_dump(mode="json"),
        "tokens": str(prepare(job).folder),
        "gpus": plan.placement.gpus_per_worker,
    }
    try:
        pace: dict[str, Any] = measure_in_subprocess(
            request, folder, plan.placement.cpus_per_worker
        )
    except RuntimeError as error:
        raise RunError(f"the speed of the first trial could not be measured: {error}") from error
    arm = f" of {trial.arm}" if trial.arm else ""
    return TrainingRate(
        seconds_per_row=float(pace["seconds_per_row"]),
        source=f"{pace['steps']} steps of the first trial{arm} just now, without evaluation",
    )


def _build_probed_job(job: JobSpec, trial: PlannedTrial) -> JobSpec:
    """Return the job of one planned trial, with one process."""
    if trial.arm is not None:
        job = build_arm_job(job, trial.arm)
    job = build_trial_job(job, trial.assignment)
    one_process: dict[str, Any] = {"num_nodes": 1, "workers_per_node": 1, "strategy": "ddp"}
    if job.resources.gpus_per_node not in ("auto", 0):
        one_process["gpus_per_node"] = 1
    resources = job.resources.model_copy(update=one_process)
    # A search and a comparison are not part of one training.
    return job.model_copy(update={"search": None, "compare": None, "resources": resources})


def measure_rate_on(
    backend: Cluster, plan: Plan, loaded: LoadedJob, runs: Path, say: Say
) -> TrainingRate:
    """Measure as `measure_rate` does, as a short job on one node of a site.

    Raises:
        UserError: The job could not be submitted, or ended without a measurement.
    """
    check_probe(plan)
    run = backend.submit_probe(plan, loaded, runs)
    record = follow_short_job(backend, run, PACE_FILE, say)
    return TrainingRate.from_record({name: record[name] for name in TrainingRate.model_fields})


def follow_short_job(backend: Cluster, run: Run, result: str, say: Say) -> dict[str, Any]:
    """Wait until a short job has written its result; return it, and remove the run's folder.

    An interrupt kills the job, which has nothing to save.

    Args:
        result: Name of the file in the run's folder.

    Raises:
        UserError: The job ended before it wrote the file; the message has the end of its log.
    """
    last_message, code = "", None
    try:
        # Backends without a shared disk have the result already.
        record = files.read_json(run.path / result)
        watch = None if record else backend.watch(run)
        while watch and (code := watch.poll()) is None:
            message = watch.status.message
            if message not in ("", last_message):
                last_message = message
                say(message)
            time.sleep(0.5)
        record = record or files.read_json(run.path / result)
        if watch and not record:
            # A job that ended before its driver has written only Slurm's output file.
            log = (run.path / "logs" / "driver.log", *sorted((run.path / "slurm").glob("*.out")))
            log_end = "\n".join(
                path.read_text(errors="replace")[-1500:] for path in log if path.is_file()
            )
            raise UserError(
                f"{log_end}\nthe job ended with exit code {code} before it wrote its result: "
                f"{watch.status.message}"
            )
    except KeyboardInterrupt:
        with contextlib.suppress(UserError):
            backend.kill(run)
        raise
    finally:
        remove_run_record(run.path)
        shutil.rmtree(run.path, ignore_errors=True)
    return record
