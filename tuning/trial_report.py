"""The reports that a worker sends to the driver: one JSON text in a Tune result."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict

from lorafleet.jobs import files
from lorafleet.jobs.runs.records import FailureRecord, MetricsRow


class WorkerInfo(BaseModel):
    """The process that runs the trial."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Host and process id."""
    base_loads: int
    """Bases that it has loaded so far."""
    seconds: float
    """Time of its set-up."""


class TrialReport(BaseModel):
    """Result of one step of a trial, as the scheduler records it."""

    model_config = ConfigDict(frozen=True)

    row: MetricsRow | None = None
    """Line for metrics.jsonl; None if nothing was measured."""
    done: bool = False
    """True if the training is complete."""
    pauses: bool = False
    """True at a rung at which the trial waits until others have decided."""
    stopping: bool = False
    """True if the trial has saved because the run is asked to stop."""
    failure: FailureRecord | None = None
    """Reason why the trial cannot continue. Such a report has no row."""
    disk_full: str | None = None
    """Message that ends the run: the trial could not write."""
    warning: str | None = None
    """Sentence about the trial for the report of the run."""
    worker: WorkerInfo | None = None

    @property
    def ends_trial(self) -> bool:
        """Return whether the trial sends no further report in this attempt."""
        return self.done or self.pauses or self.stopping or self.failure is not None

    def to_result(self) -> dict[str, Any]:
        """Return the report as a Tune result.

        Tune flattens results for schedulers and interprets the key `done` itself.
        """
        report = files.replace_non_finite(self.model_dump(exclude_unset=True))
        return {"report": json.dumps(report)}

    @classmethod
    def from_result(cls, result: dict[str, Any]) -> TrialReport | None:
        """Return the report in a Tune result; None if Tune itself made the result."""
        text = result.get("report")
        return cls.model_validate(json.loads(text)) if text is not None else None


class EvaluationReport(BaseModel):
    """Result of the evaluation of one model on held-out rows."""

    model_config = ConfigDict(frozen=True)

    failure: str | None = None
    """Reason why the model cannot be evaluated."""
    disk_full: str | None = None
    """Message that ends the run: the results could not be written."""

    def to_result(self) -> dict[str, Any]:
        """Return the report as a Tune result."""
        return {"evaluation": self.model_dump_json()}

    @classmethod
    def from_result(cls, result: dict[str, Any]) -> EvaluationReport | None:
        """Return the report in a Tune result; None if Tune itself made the result."""
        text = result.get("evaluation")
        return cls.model_validate_json(text) if text is not None else None
