"""Read seconds per training row and peak memory from this user's earlier runs.

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

from lorafleet.cluster.planning.memory import RUNTIME_CUDA_GIB
from lorafleet.jobs import files
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.runs.plan import TrainingRate
from lorafleet.jobs.runs.records import PackRecord
from lorafleet.jobs.runs.run import Run, Trial
from lorafleet.jobs.runs.trust import find_distrust_reason
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.text import format_count
from lorafleet.jobs.trials.trial_id import METHOD_BLOCKS
from lorafleet.jobs.user import get_state_folder

_MAX_PLANS_READ, _MAX_RUNS, _MAX_TRIALS = 100, 30, 16
"""Newest runs of which the plan is read, runs that count, and trials of each."""
_RATE_FIELDS = (
    "method",
    "model.model_name_or_path",
    "model.revision",
    "model.max_length",
    "model.dtype",
    "model.attn_implementation",
    "train.mixed_precision",
    "train.gradient_checkpointing",
    "train.packing",
    "train.padding_free",
    "train.per_device_train_batch_size",
    "qlora.quant_type",
)
"""Fields on which the time of a row depends most."""
_MEMORY_FIELDS = (
    *_RATE_FIELDS,
    "train.per_device_eval_batch_size",
    "train.chunked_loss",
    "train.optim",
    "lora.lora_target_modules",
    "lora.lora_dropout",
    "lora.use_dora",
    "qlora.use_double_quant",
    "prompt_tuning.num_virtual_tokens",
)
"""Fields on which peak memory depends, beside the rank and the rows."""
_FILE_FIELDS = ("train_file", "validation_file", "test_file", "dataset_name", "dataset_revision")
"""Fields of `data` that name files. Their digests count instead."""


@dataclass(frozen=True)
class EarlierTrial:
    """Shape and measurements of one trial of an earlier run."""

    run: str
    """Id of the run."""
    uses_gpu: bool
    workers: int
    """Processes of the trial."""
    cpus_per_worker: int
    strategy: str
    """Strategy of its processes, resolved."""
    trials_per_gpu: int
    """Trials that shared its GPU."""
    rows_key: str
    """Key of its rows (see `build_rows_key`); empty if it is not known."""
    resolved: dict[str, Any]
    """All fields that affect training."""
    samples: int
    """Training rows that it saw."""
    had_oom: bool
    """True if it ran out of memory, and went on with smaller micro-batches than `resolved` says."""
    seconds_per_row: float | None
    """Seconds of one process per training row, evaluations included."""
    peak_gib: float | None
    """Largest memory of one of its processes, or allocated on a GPU."""
    pack: PackRecord | None = None
    """Pack size that its run chose, with the measured speeds; None if it measured nothing."""


def read_earlier_trials(model: str, site: str) -> tuple[EarlierTrial, ...]:
    """Return what this user's newest runs of a base model measured on a site.

    A run that cannot be read is left out: a plan does not fail for it.

    Args:
        model: `model_name_or_path`, as the runs' plans have it.
        site: Name of the site; `here` for runs without a site file.
    """
    trials: list[EarlierTrial] = []
    runs = 0
    for folder in itertools.islice(_list_own_runs(), _MAX_PLANS_READ):
        if runs == _MAX_RUNS:
            break
        try:
            trials_of_run = _read_run(Run(folder), model, site)
        except (UserError, OSError, ValueError, KeyError, TypeError):
            continue
        runs += any(trial.seconds_per_row or trial.peak_gib for trial in trials_of_run)
        trials += trials_of_run
    return tuple(trials)


def _list_own_runs() -> Iterator[Path]:
    """Yield the folders of this user's runs that still exist, newest first."""
    records = []
    for path in (get_state_folder() / "runs").glob("*.json"):
        try:
            records.append((path.stat().st_mtime, path))
        except OSError:  # `clean` has just removed it
            continue
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
    digests = files.read_json(run.path / "facts.json").get("data_sha256")
    rows_key = build_rows_key(plan["job"], digests)
    pack = run.read_pack()
    if pack is not None and (not pack.together or pack.measuring is not None):
        pack = None
    trials = itertools.islice(run.list_trials(), _MAX_TRIALS)
    return [
        trial
        for each in trials
        if (trial := _read_trial(each, run.id, plan["placement"], rows_key, pack)) is not None
    ]


def _read_trial(
    trial: Trial, run: str, placement: dict[str, Any], rows_key: str, pack: PackRecord | None
) -> EarlierTrial | None:
    rows = trial.read_metrics()
    if not rows or not rows[-1].samples:
        return None
    # Time and memory of a packed trial are those of its pack, and say nothing of it alone.
    was_packed = any(row.pack for row in rows)
    last, workers = rows[-1], int(placement["workers"])
    seconds = (last.train_seconds or 0.0) + (last.eval_seconds or 0.0)
    return EarlierTrial(
        run=run,
        uses_gpu=bool(placement["gpus_per_worker"]),
        workers=workers,
        cpus_per_worker=int(placement["cpus_per_worker"]),
        strategy=str(placement["strategy"]),
        trials_per_gpu=int(placement.get("trials_per_gpu", 1)),
        rows_key=rows_key,
        resolved=trial.read_params().resolved,
        samples=rows[-1].samples,
        had_oom=bool(trial.read_status().retries.get("oom")),
        seconds_per_row=(
            seconds * workers / rows[-1].samples if seconds and not was_packed else None
        ),
        peak_gib=(None if was_packed else max(row.peak_memory_gib or 0.0 for row in rows) or None),
        pack=pack,
    )


def build_rows_key(job: dict[str, Any], digests: dict[str, str] | None) -> str:
    """Return a key of a job's rows: the digests of their files, and what is done with them.

    Args:
        job: The job as JSON.
        digests: Split -> digest of its file. None or empty: not known, and the key is empty.
    """
    if not digests:
        return ""
    data = {name: value for name, value in job["data"].items() if name not in _FILE_FIELDS}
    return json.dumps([data, digests], sort_keys=True)


def find_rate(
    earlier: Iterable[EarlierTrial],
    trials: Sequence[JobSpec],
    rows_key: str,
    *,
    cuda: bool,
    cpus_per_worker: int,
    trials_per_gpu: int,
) -> TrainingRate | None:
    """Return the time of a training row: the median of earlier trials of the same shape.

    Args:
        trials: The planned trials; each counts once, with its own median.
        rows_key: Key of their rows. Trials with other rows are used only if there are none with
            these.
        cpus_per_worker: CPU cores of each planned process. Without a GPU, only trials with as
            many cores are compared.
        trials_per_gpu: Trials that share a GPU: they slow each other down.

    Returns:
        The mean of the medians; None if there are no trials, or one has no counterpart.
    """
    candidates = [
        each
        for each in earlier
        if each.uses_gpu == cuda
        and each.trials_per_gpu == trials_per_gpu
        and each.seconds_per_row
        and (cuda or each.cpus_per_worker == cpus_per_worker)
    ]
    same_rows = [each for each in candidates if rows_key and each.rows_key == rows_key]
    runs: dict[str, None] = {}
    medians = []
    for job in trials:
        values = _list_values(job)
        counterparts = [
            each for each in same_rows or candidates if _matches(each, values, _RATE_FIELDS)
        ]
        if not counterparts:
            return None
        medians.append(statistics.median(each.seconds_per_row or 0.0 for each in counterparts))
        runs |= dict.fromkeys(each.run for each in counterparts)
    if not medians:
        return None
    names = list(runs)
    more = f" and {format_count(len(names) - 1, 'other run')}" if len(names) > 1 else ""
    remark = "" if same_rows else ", with other rows"
    return TrainingRate(
        seconds_per_row=statistics.mean(medians), source=f"{names[0]}{more}{remark}"
    )


def find_peak(
    earlier: Iterable[EarlierTrial], job: JobSpec, rows_key: str, samples: int, *, cuda: bool
) -> float | None:
    """Return the largest memory, in GiB, of a process of earlier trials of the same shape.

    A trial does not count if it had other rows, a smaller rank or another number of processes,
    shared its work otherwise, saw fewer rows, or ran out of memory. On a GPU, what CUDA itself
    takes is added: it was not measured.

    Args:
        job: A planned trial. Its strategy is taken for ddp if it is not resolved yet.
        rows_key: Key of its rows; empty if they are not known.
        samples: Training rows after which it has seen its longest row.
    """
    if not rows_key:
        return None
    values, rank, resources = _list_values(job), job.lora.lora_r, job.resources
    strategy = "ddp" if resources.strategy == "auto" else resources.strategy
    peaks = [
        each.peak_gib
        for each in earlier
        if each.peak_gib
        and not each.had_oom
        and each.uses_gpu == cuda
        and each.rows_key == rows_key
        and each.samples >= samples
        and (each.workers, each.strategy) == (resources.world_size, strategy)
        and _matches(each, values, _MEMORY_FIELDS)
        and (not job.uses_lora or (_get(each.resolved, "lora.lora_r") or 0) >= rank)
    ]
    peak = max(peaks, default=None)
    return peak + RUNTIME_CUDA_GIB if peak is not None and cuda else peak


def find_pack(
    earlier: Iterable[EarlierTrial], trials: Sequence[JobSpec], *, cuda: bool, cpus: int
) -> str | None:
    """Return what the newest earlier run of the same shape measured about packs, as a sentence.

    Args:
        trials: The planned trials; one that an earlier trial matches is enough.
        cpus: CPU cores of the process. Without a GPU, only runs with as many are compared.

    Returns:
        None if no such run has measured it.
    """
    shapes = [_list_values(job) for job in trials]
    for each in earlier:
        is_alike = each.uses_gpu == cuda and (cuda or each.cpus_per_worker == cpus)
        if each.pack is None or not is_alike:
            continue
        if any(_matches(each, values, _RATE_FIELDS) for values in shapes):
            return f"{each.run} measured: {each.pack.sentence}"
    return None


def _list_values(job: JobSpec) -> dict[str, Any]:
    fields = {"method", "model", "train", *METHOD_BLOCKS[job.method]}
    return job.model_dump(mode="json", include=fields)


def _matches(earlier: EarlierTrial, values: dict[str, Any], fields: Sequence[str]) -> bool:
    return all(_get(earlier.resolved, field) == _get(values, field) for field in fields)


def _get(values: Any, field: str) -> Any:
    for name in field.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values
