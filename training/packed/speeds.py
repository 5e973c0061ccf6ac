"""Measure how fast trials are trained together, and alone, on the machine that will train them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lorafleet.evaluation.tokens import TokenData
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.packing import MIN_SPEEDUP
from lorafleet.jobs.trials.schedule import Schedule
from lorafleet.training.cpu import set_up_cpu
from lorafleet.training.meter import free_unused_memory, is_out_of_memory
from lorafleet.training.model import Base
from lorafleet.training.packed.group import PackedGroup
from lorafleet.training.session import TrainingSession

_MIN_BATCHES, _MAX_BATCHES, _SECONDS = 3, 20, 0.5
"""Micro-batches of a measurement: at least, at most, and the time after which no other follows."""


@dataclass(frozen=True)
class TrialSample:
    """A trial to measure with, on data that it has in common with the others."""

    base: Base
    """A base that no session uses."""
    data: TokenData
    job: JobSpec
    schedule: Schedule


def measure_alone(sample: TrialSample, threads: int) -> float:
    """Return the tokens per second of a trial that is trained alone, without padding.

    Args:
        threads: CPU threads that it gets.
    """
    set_up_cpu(threads)
    session = TrainingSession.build(
        sample.job, sample.base, sample.data, _make_endless(sample.schedule)
    )
    try:

        def run() -> int:
            before = session.meter.tokens
            session.advance(session.step + 1)
            return session.meter.tokens - before

        return _measure(run, sample.base.device)
    finally:
        session.close()


def measure_together(
    sample: TrialSample,
    max_trials: int,
    max_rank: int,
    threads: int,
    on_count: Callable[[int, dict[int, float]], None] = lambda count, speeds: None,
) -> dict[int, float]:
    """Return the tokens per second of all trials of a pack, by their number.

    The number is doubled until the speed does not increase any more, or memory is short.

    Args:
        max_trials: Largest number of trials.
        max_rank: Rank to which the adapters are padded.
        threads: CPU threads that they share.
        on_count: Called with each number before it is measured, and the speeds before it.
    """
    set_up_cpu(threads)
    group = PackedGroup(sample.base, sample.data, max_trials, max_rank)
    speeds: dict[int, float] = {}
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < max_trials] + [max_trials]
    try:
        group.enter(0, sample.job, _make_endless(sample.schedule))

        def run() -> int:
            group.run_micro_batch()
            trials = [group.slots[slot] for slot in group.last_pass]
            for trial in trials:
                if trial.failure is not None:
                    raise trial.failure
            lengths = sample.data.splits["train"].lengths
            return sum(int(lengths[trial.last_rows].sum()) for trial in trials)

        for count in counts:
            on_count(count, speeds)
            for slot in range(len(group.slots), count):
                group.copy(0, slot)
            speeds[count] = _measure(run, sample.base.device)
            previous = max((speed for n, speed in speeds.items() if n < count), default=0.0)
            if speeds[count] < MIN_SPEEDUP * previous:
                break
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or not speeds:
            raise
    finally:
        group.close()
        free_unused_memory(sample.base.device)
    return speeds


def _make_endless(schedule: Schedule) -> Schedule:
    """Return a schedule that no measurement reaches the end of."""
    return replace(schedule, total_steps=10**9)


def _measure(run: Callable[[], int], device: torch.device) -> float:
    """Return the tokens per second of a call that trains and returns a number of tokens."""
    run()  # the first one allocates
    speeds: list[float] = []
    began_at = time.perf_counter()
    while len(speeds) < _MIN_BATCHES or (
        len(speeds) < _MAX_BATCHES and time.perf_counter() - began_at < _SECONDS
    ):
        started_at = time.perf_counter()
        tokens = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        speeds.append(tokens / (time.perf_counter() - started_at))
    return statistics.median(speeds)
