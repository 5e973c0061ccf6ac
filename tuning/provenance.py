"""What a run is of: digests, revisions, rows, versions. Written down before anything is trained."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lorafleet.jobs.data.custom_metric_files import digest
from lorafleet.jobs.data.hub import model_revision
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.metrics import METRIC_VERSION
from lorafleet.jobs.trials.trial_id import Facts, conversation_terms, encoders_of, prompt_format

if TYPE_CHECKING:
    from lorafleet.evaluation.tokens import TokenData

_PACKAGES = ("lorafleet", "torch", "transformers", "peft", "ray", "accelerate", "numpy")


def _conversation(job: JobSpec, data: TokenData) -> dict[str, Any]:
    """Return what decides how conversations were rendered and learnt; nothing where none were."""
    if data.frame is None:
        return {}
    return conversation_terms(job) | {"template_sha256": data.template_sha256}


def class_counts(data: TokenData) -> dict[str, dict[str, int]]:
    """Return how many rows each class has in each split; nothing where there are no classes."""
    import numpy as np

    if not data.labels:
        return {}
    return {
        name: dict(zip(data.labels, np.bincount(split.targets, minlength=len(data.labels)).tolist(), strict=True))
        for name, split in data.splits.items()
    }


def record_of(job: JobSpec, facts: Facts, data: TokenData) -> dict[str, Any]:
    """The contents of facts.json: what two runs must have in common to be compared, and what a reader may ask."""
    from lorafleet.evaluation.tokens import token_counts

    counted = token_counts(data)
    return {
        "data_sha256": facts.data_sha256,
        "model_revisions": facts.model_revisions,
        "encoders": {name: model_revision(name, None) for name in encoders_of(job)},
        "rows": {name: counts["rows"] for name, counts in counted.items()},
        "tokens": {name: counts["tokens"] for name, counts in counted.items()},
        "labels": list(data.labels),
        "class_counts": class_counts(data),
        "warnings": list(data.warnings),
        "chosen_on_test": data.chosen_on_test,
        "rows_sha256": data.rows_sha256,
        "prompt_format": prompt_format(job),
        "conversation": _conversation(job, data),
        "metric_version": METRIC_VERSION,
        "custom_metrics": {name: digest(metric) for name, metric in job.evaluate.custom_metrics.items()},
        "versions": {name: version(name) for name in _PACKAGES},
    }
