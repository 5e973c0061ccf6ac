"""Evaluate models in Ray actors of their own, several at once."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from lorafleet.jobs.errors import make_disk_full_error
from lorafleet.training.cpu import set_up_cpu
from lorafleet.tuning.base_cache import BaseCache
from lorafleet.tuning.held_out import MAX_TRIES, Evaluator, HeldOutEvaluation
from lorafleet.tuning.node_check import extract_error_line
from lorafleet.tuning.progress import ProgressExchange, RayLink, StopFile, open_exchange
from lorafleet.tuning.trial_run import Work

_PLACEMENT_SECONDS = 900.0
"""Seconds that a worker may wait to be placed on a node."""
_POLL_SECONDS = 1.0
"""Seconds between two looks for a request to stop."""


class EvalWorker:
    """Ray actor around an `Evaluator`.

    `evaluate_in_pool` starts as many as there are slots, and replaces one whose process died.
    """

    def __init__(self, work: Work) -> None:
        os.chdir(work.run)
        set_up_cpu(work.threads)
        self.evaluator = Evaluator(work, BaseCache(work.gpus))

    def is_ready(self) -> bool:
        """Return True once the actor is running.

        A call of it returns when Ray has placed the actor on a node.
        """
        return True

    def evaluate(self, evaluation: HeldOutEvaluation, attempt: int) -> bool:
        """Evaluate a model (see `Evaluator.evaluate`)."""
        return self.evaluator.evaluate(evaluation, attempt)


def evaluate_in_pool(
    work: Work, evaluations: list[HeldOutEvaluation], slots: int, stop_file: StopFile
) -> dict[str, str]:
    """Evaluate models, up to `slots` of them at once.

    A failure costs only that model's numbers. A worker whose process dies is replaced, and
    its evaluation is tried once more. An exception in a living worker is not retried: it
    would occur again.

    Args:
        evaluations: Models that have no results yet.
        slots: Maximum number of workers.
        stop_file: Asks the run to stop; the workers are told through Ray.

    Returns:
        Model name -> reason, for each model that could not be evaluated.

    Raises:
        DiskFull: A worker could not write its results.
    """
    if not evaluations:
        return {}
    with open_exchange(None, stop_file) as exchange:
        linked = replace(work, link=RayLink(exchange.actor))
        return _evaluate_all(linked, evaluations, slots, exchange)


def _evaluate_all(
    work: Work, evaluations: list[HeldOutEvaluation], slots: int, exchange: ProgressExchange
) -> dict[str, str]:
    """Evaluate models as `evaluate_in_pool` does."""
    failed: dict[str, str] = {}
    waiting, tries = list(evaluations), Counter[str]()
    free = [_start_worker(work) for _ in range(min(slots, len(evaluations)))]
    running: dict[Any, tuple[HeldOutEvaluation, Any]] = {}
    while waiting or running:
        while waiting and free and not exchange.stop_file.exists():
            worker, evaluation = free.pop(), waiting.pop(0)
            try:
                # Placement may fail for good, for example after nodes were lost; `evaluate` itself
                # has no time limit.
                is_ready = worker.is_ready.remote()
                if _wait_for_one([is_ready], exchange, _PLACEMENT_SECONDS, until_stop=True) is None:
                    break
                ray.get(is_ready)
            except ray.exceptions.RayError as error:
                failed[evaluation.name] = (
                    f"no worker process could be started: {extract_error_line(error)}"
                )
                continue
            tries[evaluation.name] += 1
            running[worker.evaluate.remote(evaluation, tries[evaluation.name])] = (
                evaluation,
                worker,
            )
        if not running and exchange.stop_file.exists():
            return failed
        if not running:
            return failed | dict.fromkeys(
                (evaluation.name for evaluation in waiting), "no worker process could be started"
            )
        # Every call returns: a hanging worker is ended by its watchdog.
        done = _wait_for_one(list(running), exchange)
        evaluation, worker = running.pop(done)
        try:
            ray.get(done)
        except ray.exceptions.RayError as error:
            full = make_disk_full_error(error, Path(work.run))
            if full:
                raise full from error
            # Whatever failed, the next model gets a process that nothing has happened to.
            ray.kill(worker)
            worker = _start_worker(work)
            if (
                isinstance(error, ray.exceptions.RayActorError)
                and tries[evaluation.name] < MAX_TRIES
            ):
                waiting.append(evaluation)
            else:
                failed[evaluation.name] = extract_error_line(error)
        free.append(worker)
    return failed


def _wait_for_one(
    replies: list[Any],
    exchange: ProgressExchange,
    timeout: float = math.inf,
    *,
    until_stop: bool = False,
) -> Any:
    """Return a reply that is there. Meanwhile, workers are told when the run must stop.

    Args:
        replies: Replies of which one is waited for.
        timeout: Seconds to wait.
        until_stop: Return None when the run is asked to stop.

    Raises:
        GetTimeoutError: None came in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        exchange.poll()
        ready, _ = ray.wait(replies, timeout=_POLL_SECONDS)
        if ready:
            return ready[0]
        if until_stop and exchange.stop_file.exists():
            return None
        if time.monotonic() > deadline:
            raise ray.exceptions.GetTimeoutError(f"no reply within {timeout:.0f} seconds")


def _start_worker(work: Work) -> Any:
    """Start an evaluation worker with the resources of a trial's process."""
    actor = ray.remote(EvalWorker).options(
        num_cpus=work.threads,
        num_gpus=work.gpus,
        label_selector=work.job.resources.label_selector,
    )
    return actor.remote(work)
