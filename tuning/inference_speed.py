"""Benchmark inference of several models. Each runs in its own process, in turn.

The models take turns for several rounds, so that a change of the machine's load affects
all of them and shows in the spread of the rounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from lorafleet.cluster.execution.subprocess_measurement import measure_in_subprocess
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.runs.events import WarningEvent
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.tuning.node_check import extract_error_line


def _build_task(comparison: Any) -> Any:
    """Return a remote measurement with the resources of a trial."""
    resources = comparison.job.resources
    return ray.remote(measure_in_subprocess).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=comparison.placement.gpus_per_worker,
        label_selector=resources.label_selector,
        max_retries=1,
    )


def measure_seconds_per_row(comparison: Any, job: JobSpec, tokens: str) -> float:
    """Return the training time of a row in seconds, measured with the resources of a trial.

    Args:
        comparison: The driver, with an open Ray.
        job: The arm's job.
        tokens: Folder of the rows, tokenised for the arm's model.

    Raises:
        RunError: The measurement fails.
    """
    gpus = comparison.placement.gpus_per_worker
    request = {"what": "pace", "job": job.model_dump(mode="json"), "tokens": tokens, "gpus": gpus}
    try:
        measurements = ray.get(
            _build_task(comparison).remote(
                request, str(comparison.run.path), job.resources.cpus_per_worker
            )
        )
    except ray.exceptions.RayError as error:
        raise RunError(
            f"the speed of {job.method} could not be measured: {extract_error_line(error)}"
        ) from error
    return float(measurements["seconds_per_row"])


def measure_all(comparison: Any, models: list[Any], split: str) -> None:
    """Measure the inference of the given models, in turn for several rounds.

    Rounds that an earlier attempt has measured are skipped. A failure is recorded as a
    warning, and the model is left out from then on. Returns early if the run is asked to
    stop.

    Args:
        comparison: The driver, with an open Ray.
        models: One model of each arm.
        split: Split with the held-out rows.
    """
    spec, resources = comparison.job.compare.inference, comparison.job.resources
    task = _build_task(comparison)
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
                measurements = ray.get(
                    task.remote(request, str(Path(comparison.run.path)), resources.cpus_per_worker)
                )
            except ray.exceptions.RayError as error:
                failed.add(model.arm)
                sentence = f"its inference was not measured: {extract_error_line(error)}"
                comparison.run.add_event(WarningEvent(trial_id=model.arm, sentence=sentence))
                continue
            files.append_jsonl(results_file, {"round": number, **measurements})
