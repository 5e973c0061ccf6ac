"""What this user's earlier runs measured: seconds per training row and peak memory.

A plan takes both from trials of the same shape, and estimates only what was never measured. Runs
that are not this user's own are not read.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.plan import TrainingRate
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.runs.trust import find_distrust_reason
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.text import format_count
from lorafleet.jobs.trials.trial_id import METHOD_BLOCKS
from lorafleet.jobs.user import get_state_folder

_MAX_LOOKED_AT, _MAX_RUNS, _MAX_TRIALS = 100, 30, 16
"""Newest runs of which the plan is read, runs that count, and trials of each."""
_RATE_FIELDS = (
    "method",
    "model.model_name_or_path",
    "model.revision",
    "model.max_length",
    "model.dtype",
    "train.mixed_precision",
    "train.gradient_checkpointing",
    "train.packing",
    "train.per_device_train_batch_size",
    "qlora.quant_type",
)
"""Fields on which the time of a row depends most."""
_MEMORY_FIELDS = (
    *_RATE_FIELDS,
    "train.chunked_loss",
    "train.optim",
    "lora.lora_target_modules",
    "lora.use_dora",
    "prompt_tuning.num_virtual_tokens",
)
"""Fields on which peak memory depends, beside the rank and the rows."""


@dataclass(frozen=True)
class EarlierTrial:
    """What one trial of an earlier run measured."""

    run: str
    """Id of the run."""
    site: str
    """Name of its site; `here` for runs of this machine and of RAY_ADDRESS."""
    uses_gpu: bool
    workers: int
    """Processes of the trial."""
    data: str
    """Key of its rows: trials with other rows have other lengths."""
    resolved: dict[str, Any]
    """All fields that affect training."""
    seconds_per_row: float | None
    """Seconds of one process per training row, evaluations included."""
    peak_gib: float | None
    """Largest memory of one of its processes, or of a GPU."""


def read_earlier_trials(model: str, site: str) -> tuple[EarlierTrial, ...]:
    """Return what this user's newest runs of a base model measured on a site.

    A run that cannot be read is left out: a plan does not fail for it.
    """
    found: list[EarlierTrial] = []
    runs = 0
    for folder in itertools.islice(_list_own_runs(), _MAX_LOOKED_AT):
        if runs == _MAX_RUNS:
            break
        try:
            trials = _read_run(Run(folder), model, site)
        except (UserError, OSError, ValueError, KeyError, TypeError):
            continue
        runs += bool(trials)
        found += trials
    return tuple(found)


def _list_own_runs() -> Iterator[Path]:
    """Yield the folders of this user's runs that still exist, newest first."""
    try:
        records = [
            (path.stat().st_mtime, path) for path in (get_state_folder() / "runs").glob("*.json")
        ]
    except OSError:
        return
    for _time, path in sorted(records, reverse=True):
        try:
            folder = Path(str(files.read_json(path).get("path", "")))
            if (folder / "plan.json").is_file() and find_distrust_reason(folder) is None:
                yield folder
        except (UserError, OSError):
            continue


def _read_run(run: Run, model: str, site: str) -> list[EarlierTrial]:
    plan = files.read_json(run.path / "plan.json")
    if plan["job"]["model"]["model_name_or_path"] != model or plan.get("site", "here") != site:
        return []
    placement = plan["placement"]
    gpus, workers = int(placement["gpus_per_worker"]), int(placement["workers"])
    key = build_data_key(plan["job"])
    trials = itertools.islice(run.list_trials(), _MAX_TRIALS)
    return [
        trial
        for each in trials
        if (trial := _read_trial(each, run.id, site, bool(gpus), workers, key))
    ]


def _read_trial(
    trial: Trial, run: str, site: str, uses_gpu: bool, workers: int, data: str
) -> EarlierTrial | None:
    rows = trial.read_metrics()
    if not rows or not rows[-1].samples:
        return None
    last = rows[-1]
    seconds = (last.train_seconds or 0.0) + (last.eval_seconds or 0.0)
    return EarlierTrial(
        run=run,
        site=site,
        uses_gpu=uses_gpu,
        workers=workers,
        data=data,
        resolved=trial.read_params().resolved,
        seconds_per_row=seconds * workers / last.samples if seconds and last.samples else None,
        peak_gib=max((row.peak_memory_gib or 0.0 for row in rows), default=0.0) or None,
    )


def build_data_key(job: dict[str, Any]) -> str:
    """Return a key of a job's rows, from the job as JSON."""
    return json.dumps(job.get("data"), sort_keys=True)


def find_rate(
    earlier: Iterable[EarlierTrial], trials: Sequence[JobSpec], data: str, *, cuda: bool
) -> TrainingRate | None:
    """Return the time of a training row: the median of earlier trials of the same shape.

    Args:
        trials: The planned trials; each counts once, with its own median.
        data: Key of their rows (see `build_data_key`). Trials with other rows are used only if
            there are none with these.

    Returns:
        The mean of the medians; None if one of the trials has no counterpart.
    """
    candidates = [each for each in earlier if each.uses_gpu == cuda and each.seconds_per_row]
    same_rows = [each for each in candidates if each.data == data]
    used: dict[str, None] = {}
    medians = []
    for job in trials:
        values = _list_values(job)
        match = [each for each in same_rows or candidates if _matches(each, values, _RATE_FIELDS)]
        if not match:
            return None
        medians.append(statistics.median(each.seconds_per_row or 0.0 for each in match))
        used |= dict.fromkeys(each.run for each in match)
    names = list(used)
    more = f" and {format_count(len(names) - 1, 'other run')}" if len(names) > 1 else ""
    other = "" if same_rows else ", with other rows"
    return TrainingRate(seconds_per_row=statistics.mean(medians), source=f"{names[0]}{more}{other}")


def find_peak(
    earlier: Iterable[EarlierTrial], job: JobSpec, data: str, *, cuda: bool
) -> float | None:
    """Return the largest peak memory, in GiB, of earlier trials of the same shape.

    Trials with other rows, or of a smaller rank, do not count. Only trials of one process and
    of the same number of processes per trial are compared.
    """
    values, rank, workers = _list_values(job), job.lora.lora_r, job.resources.world_size
    peaks = [
        each.peak_gib
        for each in earlier
        if each.peak_gib
        and each.uses_gpu == cuda
        and each.data == data
        and each.workers == workers
        and _matches(each, values, _MEMORY_FIELDS)
        and (not job.uses_lora or (_get(each.resolved, "lora.lora_r") or 0) >= rank)
    ]
    return max(peaks, default=None)


def _list_values(job: JobSpec) -> dict[str, Any]:
    fields = {"method", "model", "train", *METHOD_BLOCKS[job.method]}
    return job.model_dump(mode="json", include=fields)


def _matches(earlier: EarlierTrial, values: dict[str, Any], fields: Sequence[str]) -> bool:
    return all(_get(earlier.resolved, field) == _get(values, field) for field in fields)


def _get(values: dict[str, Any], field: str) -> Any:
    for name in field.split("."):
        values = values.get(name) if isinstance(values, dict) else None  # type: ignore[assignment]
    return values
