"""The inference of several models, each in a process of its own, in turn: one after another, and that several times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from lorafleet.cluster.execution.subprocess_measurement import measured_apart
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.tuning.node_check import first_line


def _task(comparison: Any) -> Any:
    """A measurement where a trial would run."""
    wants = comparison.job.resources
    return ray.remote(measured_apart).options(
        num_cpus=wants.cpus_per_worker,
        num_gpus=comparison.placement.gpus_per_worker,
        label_selector=wants.label_selector,
        max_retries=1,
    )


def seconds_per_row(comparison: Any, job: JobSpec, tokens: str) -> float:
    """How long a training takes for a row, alone where a trial would run. Raises RunError when it cannot be known."""
    gpus = comparison.placement.gpus_per_worker
    request = {"what": "pace", "job": job.model_dump(mode="json"), "tokens": tokens, "gpus": gpus}
    try:
        found = ray.get(_task(comparison).remote(request, str(comparison.run.path), job.resources.cpus_per_worker))
    except ray.exceptions.RayError as error:
        raise RunError(f"the speed of {job.method} could not be measured: {first_line(error)}") from error
    return float(found["seconds_per_row"])


def measure_all(comparison: Any, models: list[Any], split: str) -> None:
    """Measure the models that are named, in turn; what fails is noted and left out."""
    spec, wants = comparison.job.compare.inference, comparison.job.resources
    task = _task(comparison)
    failed: set[str] = set()
    for number in range(spec.rounds):
        for one in models:
            if comparison.stop_file.exists():
                return
            ledger = comparison.run.arm(one.arm).inference_file
            if one.arm in failed or any(row["round"] == number for row in files.read_jsonl(ledger)):
                continue
            request = {
                "what": "inference",
                "job": one.job.model_dump(mode="json"),
                "tokens": one.tokens,
                "weights": str(one.weights) if one.weights else None,
                "split": split,
                "gpus": comparison.placement.gpus_per_worker,
                "rows": spec.rows,
                "new_tokens": spec.new_tokens,
            }
            try:
                found = ray.get(task.remote(request, str(Path(comparison.run.path)), wants.cpus_per_worker))
            except ray.exceptions.RayError as error:
                failed.add(one.arm)
                sentence = f"its inference was not measured: {first_line(error)}"
                comparison.run.event("warning", trial_id=one.arm, sentence=sentence)
                continue
            files.append_jsonl(ledger, {"round": number, **found})
