"""Benchmark inference of several models. Each runs in its own process, in turn.

The models take turns for several rounds, so that a change of the machine's load affects
all of them and shows in the spread of the rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorafleet.cluster.execution.subprocess_measurement import measure_in_subprocess
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.events import WarningEvent
from lorafleet.jobs.schema.job import JobSpec

Measure = Callable[[dict[str, Any], int], dict[str, Any]]
"""Returns what a request (see `commands/measure.py`) asks for, measured with some threads.

Raises RuntimeError if the measurement fails.
"""


def build_local_measure(comparison: Any) -> Measure:
    """Return a measurement in a process on this machine.

    Args:
        comparison: The driver.
    """
    return lambda request, threads: measure_in_subprocess(request, comparison.run.path, threads)


def build_ray_measure(comparison: Any) -> Measure:
    """Return a measurement in a process of Ray with the resources of a trial.

    Args:
        comparison: The driver, with an open Ray.
    """
    import ray

    from lorafleet.tuning.node_check import extract_error_line

    resources = comparison.job.resources
    task = ray.remote(measure_in_subprocess).options(
        num_cpus=comparison.placement.cpus_per_worker,
        num_gpus=comparison.placement.gpus_per_worker,
        label_selector=resources.label_selector,
        max_retries=1,
    )

    def measure(request: dict[str, Any], threads: int) -> dict[str, Any]:
        try:
            result: dict[str, Any] = ray.get(
                task.remote(request, str(comparison.run.path), threads)
            )
        except ray.exceptions.RayError as error:
            raise RuntimeError(extract_error_line(error)) from error
        return result

    return measure


def measure_seconds_per_row(
    comparison: Any, job: JobSpec, tokens: str, measure: Measure, threads: int
) -> float:
    """Return the training time of a row in seconds, measured with the resources of a trial.

    Args:
        comparison: The driver.
        job: The arm's job.
        tokens: Folder of the rows, tokenised for the arm's model.
        threads: CPU threads of the arm's trials.

    Raises:
        RunError: The measurement fails.
    """
    gpus = comparison.placement.gpus_per_worker
    request = {"what": "pace", "job": job.model_dump(mode="json"), "tokens": tokens, "gpus": gpus}
    try:
        return float(measure(request, threads)["seconds_per_row"])
    except RuntimeError as error:
        raise RunError(f"the speed of {job.method} could not be measured: {error}") from error


def measure_all(comparison: Any, models: list[Any], split: str, measure: Measure) -> None:
    """Measure the inference of the given models, in turn for several rounds.

    Rounds that an earlier attempt has measured are skipped. A failure is recorded as a
    warning, and the model is left out from then on. Returns early if the run is asked to
    stop.

    Args:
        comparison: The driver.
        models: One model of each arm.
        split: Split with the held-out rows.
    """
    spec = comparison.job.compare.inference
    failed: set[str] = set()
    for number in range(spec.rounds):
        for model in models:
            if comparison.stop_file.exists():
                return
            results_file = comparison.run.get_arm(model.arm).inference_file
            if model.arm in failed or any(
                row["round"] == number for row in files.read_jsonl(results_file)
            ):
                continue
            request = {
                "what": "inference",
                "job": model.job.model_dump(mode="json"),
                "tokens": model.tokens,
                "weights": str(model.weights) if model.weights else None,
                "split": split,
                "gpus": comparison.placement.gpus_per_worker,
                "rows": spec.rows,
                "new_tokens": spec.new_tokens,
            }
            try:
                # One at a time: models that run side by side would slow each other down.
                measurements = measure(request, comparison.placement.cpus_per_worker)
            except RuntimeError as error:
                failed.add(model.arm)
                sentence = f"its inference was not measured: {error}"
                comparison.run.add_event(WarningEvent(trial_id=model.arm, sentence=sentence))
                continue
            files.append_jsonl(results_file, {"round": number, **measurements})
