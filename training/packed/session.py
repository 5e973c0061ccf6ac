"""One trial of a pack, with the methods of a `TrainingSession` that its host calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorafleet.evaluation.metrics.predictions import RowResults
from lorafleet.evaluation.metrics.scores import Scores, compute_scores
from lorafleet.training import checkpoint
from lorafleet.training.data import iterate_evaluation_batches, make_batch
from lorafleet.training.evaluation import (
    OnPass,
    RowCollector,
    complete_results,
    ignore_phase,
)
from lorafleet.training.methods import save_lora_tensors
from lorafleet.training.packed.group import PackedGroup, Slot, repeat_rows
from lorafleet.training.session import build_report, describe_formats, list_answer_metrics
from lorafleet.training.strategies import Ranks


class PackedSession:
    """The trial in a slot of a group. The group trains it; this class does the rest.

    Checkpoints are those of a `TrainingSession`: a trial can go on alone from one that was
    written in a pack, and the other way round.
    """

    ranks = Ranks()

    def __init__(self, group: PackedGroup, slot: int) -> None:
        self.group, self.slot = group, slot
        self.on_pass: OnPass = ignore_phase
        self._results: tuple[int, RowResults] | None = None

    @property
    def trial(self) -> Slot:
        """The state of the slot."""
        return self.group.slots[self.slot]

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.trial.step

    @property
    def is_done(self) -> bool:
        """Return whether the last step has been taken."""
        return self.trial.is_done

    @property
    def meter(self) -> Any:
        """Costs of the trial: its share of those of the pack."""
        return self.trial.meter

    @property
    def first_gradient_at(self) -> float | None:
        """Time of the first backward pass, in seconds since the epoch."""
        return self.trial.first_gradient_at

    def reset_loss(self) -> None:
        """Start a new mean of the reported loss."""
        self.trial.reset_loss()

    def build_report(self) -> dict[str, Any]:
        """Return the mean loss since `reset_loss`, and the costs.

        Raises:
            TrainingFailure: A loss or a gradient is NaN or infinite (class `nan`).
        """
        trial = self.trial
        if trial.failure is not None:
            raise trial.failure
        report = build_report(
            trial.job,
            trial.schedule,
            trial.step,
            trial.peak_rate,
            trial.loss_sum,
            trial.targets,
            trial.meter,
            rows=len(trial.data.splits["train"]),
            trainable_parameters=trial.trainable_parameters,
            number_formats=describe_formats(trial.job, self.group.base),
        )
        return report | {"pack": self.group.capacity}

    def evaluate_with_rows(self, split_name: str = "validation") -> tuple[Scores, RowResults]:
        """Return metrics with intervals, and the results of each row.

        Those of `evaluate_together`, if it was called since the last step.
        """
        if self._results is None or self._results[0] != self.step:
            evaluate_together([self], split_name, self.on_pass)
        assert self._results is not None
        results, self._results = self._results[1], None
        return compute_scores(results, self.trial.job.metric_names), results

    def set_results(self, results: RowResults) -> None:
        """Take the results of an evaluation at the current step."""
        self._results = (self.step, results)

    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        """Save everything that a restart needs. See `TrainingSession.save`."""
        trial = self.trial
        with checkpoint.replace_folder(folder, keep=True) as scratch:
            checkpoint.save_tensors(scratch, self.group.get_tensors(self.slot))
            state = {
                "step": trial.step,
                "rng": [checkpoint.get_rng_state()],
                "meter": trial.meter.to_state(),
                "world_size": 1,
                "strategy": trial.job.resources.strategy,
                "extra": extra or {},
                "optimizer": trial.optimizer.to_state(),
                "scaler": {},
            }
            checkpoint.save_state(scratch, state)
            checkpoint.write_checksums(scratch)

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from the state that `save` wrote, and return the host's `extra`."""
        state = checkpoint.load_state(folder)
        trial = self.trial
        self.group.set_tensors(self.slot, checkpoint.load_tensors(folder))
        trial.optimizer.load_state(state["optimizer"])
        trial.step = int(state["step"])
        trial.meter.restore(state["meter"])
        extra: dict[str, Any] = state["extra"]
        return extra

    def save_weights(self, folder: Path) -> None:
        """Save the adapter in PEFT's format."""
        trial = self.trial
        tensors = self.group.get_tensors(self.slot)
        with checkpoint.replace_folder(folder) as scratch:
            save_lora_tensors(trial.job, trial.adapter_config, tensors, scratch)

    def close(self) -> None:
        """Free the slot. May be called twice."""
        self.group.leave(self.slot)


def evaluate_together(
    sessions: Sequence[PackedSession], split_name: str, on_pass: OnPass = ignore_phase
) -> None:
    """Evaluate the adapters of several slots in the same forward passes over a split.

    Each session keeps its results until `evaluate_with_rows` returns them. The costs are divided
    equally.

    Args:
        sessions: Sessions of one group, whose trials have the same rows.
        on_pass: Called before each forward pass. An exception that it raises ends the evaluation.
    """
    first_job = sessions[0].trial.job
    size = min(sessions[0].group.slots_per_pass, first_job.train.per_device_eval_batch_size)
    for start in range(0, len(sessions), size):
        _evaluate_in_a_pass(sessions[start : start + size], split_name, on_pass)


def _evaluate_in_a_pass(
    sessions: Sequence[PackedSession], split_name: str, on_pass: OnPass
) -> None:
    """Evaluate slots that fit into one forward pass together."""
    started_at = time.perf_counter()
    group = sessions[0].group
    first = sessions[0].trial
    module = group.use_modules()
    group.base.model.eval()
    collectors = [
        RowCollector(first.data, split_name, classifies=first.classifies) for _ in sessions
    ]
    split = first.data.splits[split_name]
    # As many rows in a pass as for one trial: the memory stays the same.
    rows_per_pass = max(1, first.job.train.per_device_eval_batch_size // len(sessions))
    with torch.inference_mode():
        for rows in iterate_evaluation_batches(split, np.arange(len(split)), rows_per_pass):
            on_pass("evaluation")
            batch = make_batch(
                split, rows, group.data.pad_id, group.base.device, classifies=first.classifies
            )
            counts = {session.slot: len(rows) for session in sessions}
            group.rows.set_counts(counts, trains=False)
            _, detail = module(repeat_rows(batch, len(sessions)))
            for collector, part in zip(collectors, group.rows.parts, strict=True):
                collector.add(rows, batch.labels, part.select(detail))
    for session, collector in zip(sessions, collectors, strict=True):
        group.rows.set_single(session.slot)
        job = session.trial.job
        results = complete_results(
            group.base.model,
            collector.build(session.ranks),
            job,
            first.data,
            split_name,
            group.base.device,
            session.ranks,
            metrics=list_answer_metrics(job),
            on_pass=on_pass,
        )
        session.set_results(results)
    seconds = (time.perf_counter() - started_at) / len(sessions)
    for session in sessions:
        session.meter.eval_seconds += seconds
