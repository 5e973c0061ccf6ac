"""Choose how many trials the driver trains at once, and record it for later attempts."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from lorafleet.cluster.execution.supervisor import RestartNeeded
from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs import files
from lorafleet.jobs.runs.plan import PackingPlan
from lorafleet.jobs.runs.records import PackRecord
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.text import format_count
from lorafleet.jobs.trials.packing import (
    choose_pack_size,
    describe_full_cpu,
    find_packing_refusal,
)
from lorafleet.jobs.trials.schedule import build_schedule
from lorafleet.training.meter import free_unused_memory
from lorafleet.training.model import resolve_device
from lorafleet.training.packed.group import find_unreplaced_dropout
from lorafleet.training.packed.speeds import TrialSample, measure_alone, measure_together
from lorafleet.training.watchdog import Watchdog
from lorafleet.tuning.failures import is_device_error

if TYPE_CHECKING:
    from lorafleet.tuning.trial_host import TrialHost


def choose_pack(
    run: Run,
    packing: PackingPlan,
    jobs: list[JobSpec],
    host: TrialHost,
    threads: int,
    stacks: Path,
) -> PackRecord:
    """Return how many trials this process trains at once.

    The first attempt measures it, and the others read its record: a trial is trained in the same
    way over all attempts. One process measures for all that train packs.

    Args:
        packing: What the plan allows.
        jobs: Jobs of the trials that are known; at least one.
        host: A host without a trial.
        threads: CPU threads that the trials of a pack share.
        stacks: File for the stacks of this process if it hangs.
    """
    record = run.read_pack()
    if record is not None and record.measuring is None:
        return record
    if record is None:
        watchdog = Watchdog(stacks, 60 * host.work.job.retries.hang_minutes)
        watchdog.reset(setting_up=True)
        try:
            record = _choose(run, packing, jobs, host, threads)
        finally:
            watchdog.close()
    else:
        record = _choose_after_crash(record)
    _write(run, record)
    return record


def _write(run: Run, record: PackRecord) -> None:
    files.write_json(run.path / "pack.json", record.to_dict())


def _choose_after_crash(record: PackRecord) -> PackRecord:
    """Return the choice after the process died while it measured, for lack of memory perhaps.

    What was measured before decides.
    """
    tried = record.measuring or 1
    reason = f"the process died while {format_count(tried, 'trial')} were measured"
    speeds = {int(count): speed for count, speed in record.together.items()}
    if not speeds or max(speeds) == 1:
        return PackRecord(sentence=f"one trial at a time: {reason}")
    choice = choose_pack_size(speeds, record.alone, max(speeds))
    return record.model_copy(
        update={
            "trials": choice.trials,
            "trials_per_pass": choice.trials_per_pass,
            "sentence": f"{choice.sentence}; {reason}",
            "measuring": None,
        }
    )


def describe_pack(record: PackRecord) -> str:
    """Return the note of the report."""
    if record.trials == 1:
        return f"trains {record.sentence}"
    return (
        f"trains {record.sentence}; the time of a trial is its share, and its memory that of all "
        "trials together"
    )


def _choose(
    run: Run, packing: PackingPlan, jobs: list[JobSpec], host: TrialHost, threads: int
) -> PackRecord:
    job = next((job for job in jobs if find_packing_refusal(job) is None), jobs[0])
    data = host.data.for_fold(job)
    reason = find_packing_refusal(job)
    if reason is None and packing.is_measured and not host.work.gpus:
        reason = describe_full_cpu(_count_batch_tokens(job, data))
    if reason is not None:
        return PackRecord(sentence=f"one trial at a time: {reason}")
    try:
        return _measure(run, packing, jobs, host, threads, job)
    # Whatever a trial meets, here and in its own training: it must not end the search.
    except Exception as error:
        if is_device_error(error):
            raise RestartNeeded(str(error)) from error
        text = "".join(traceback.format_exception(error))
        files.write_text(run.path / "logs" / "lorafleet-pack-traceback.txt", text)
        error.__traceback__ = None  # its frames hold the tensors that did not fit
        host.bases.drop()
        free_unused_memory(resolve_device(host.work.gpus))
        return PackRecord(sentence=f"one trial at a time: the measurement failed ({error})")


def _measure(
    run: Run,
    packing: PackingPlan,
    jobs: list[JobSpec],
    host: TrialHost,
    threads: int,
    job: JobSpec,
) -> PackRecord:
    """Return the choice after measuring with a trial of a job."""
    unpacked = packing.unpacked
    assert unpacked is not None
    data = host.data.for_fold(job)
    schedule = build_schedule(
        job, host.data.count_training_rows(job), searching=host.work.searching
    )
    base = host.bases.get(job, len(data.labels))
    reason = find_unreplaced_dropout(base, data, job)
    if reason is not None:
        return PackRecord(sentence=f"one trial at a time: {reason}")
    sample = TrialSample(base, data, job, schedule)
    max_rank = max([packing.max_rank, *(job.lora.lora_r for job in jobs)])
    _write(run, PackRecord(measuring=1, max_rank=max_rank))
    alone = None
    if packing.is_measured:
        # Processes beside each other are at most as fast as each of them alone.
        beside = unpacked.slots // packing.processes
        alone = beside * measure_alone(sample, unpacked.cpus_per_worker)

    def record_count(count: int, speeds: dict[int, float]) -> None:
        # If this process dies, the next one knows what was too much.
        _write(
            run,
            PackRecord(
                measuring=count,
                max_rank=max_rank,
                alone=alone,
                together=_to_text(speeds),
            ),
        )

    together = measure_together(sample, packing.trials, max_rank, threads, record_count)
    choice = choose_pack_size(together, alone, packing.trials)
    return PackRecord(
        trials=choice.trials,
        trials_per_pass=choice.trials_per_pass,
        max_rank=max_rank,
        together=_to_text(together),
        alone=None if alone is None else round(alone, 1),
        sentence=choice.sentence,
    )


def _to_text(speeds: dict[int, float]) -> dict[str, float]:
    """Return speeds as JSON has them."""
    return {str(count): round(speed, 1) for count, speed in speeds.items()}


def _count_batch_tokens(job: JobSpec, data: TokenData) -> int:
    """Return the tokens of a micro-batch, without padding."""
    mean = float(data.splits["train"].lengths.mean())
    return round(job.train.per_device_train_batch_size * mean)
