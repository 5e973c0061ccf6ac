"""Collect a run's metadata (digests, revisions, rows, versions) before training starts."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lorafleet.jobs.data.custom_metric_files import compute_metric_digest
from lorafleet.jobs.data.inputs import resolve_inputs
from lorafleet.jobs.runs.records import RunMetadata
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.schema.metrics import METRIC_VERSION
from lorafleet.jobs.trials.trial_id import (
    Provenance,
    get_conversation_settings,
    get_prompt_format,
)

if TYPE_CHECKING:
    from lorafleet.evaluation.tokens import TokenData

_PACKAGES = ("lorafleet", "torch", "transformers", "peft", "ray", "accelerate", "numpy")


def _collect_conversation_terms(job: JobSpec, data: TokenData) -> dict[str, Any]:
    """Return the settings that decide how conversations were rendered and learnt.

    Empty if there are no conversations.
    """
    if data.frame is None:
        return {}
    return get_conversation_settings(job) | {"template_sha256": data.template_sha256}


def count_classes(data: TokenData) -> dict[str, dict[str, int]]:
    """Return the number of rows of each class in each split. Empty if there are no classes.

    Returns:
        Split -> class name -> rows, with 0 for a class without rows.
    """
    import numpy as np

    if not data.labels:
        return {}
    return {
        name: dict(
            zip(
                data.labels,
                np.bincount(split.targets, minlength=len(data.labels)).tolist(),
                strict=True,
            )
        )
        for name, split in data.splits.items()
    }


def build_metadata(job: JobSpec, facts: Provenance, data: TokenData) -> RunMetadata:
    """Return the contents of facts.json.

    These are what two runs must have in common to be compared, and further information for
    readers. A resumed run compares its digests with the file.

    Args:
        facts: Digests of the data files and revisions of the models.
        data: The tokenised rows.
    """
    from lorafleet.evaluation.tokens import count_tokens

    counts_by_split = count_tokens(data)
    return RunMetadata(
        data_sha256=facts.data_sha256,
        model_revisions=facts.model_revisions,
        encoders={
            encoder.reference: encoder.resolve_revision()
            for encoder in resolve_inputs(job).encoders
        },
        rows={name: counts["rows"] for name, counts in counts_by_split.items()},
        tokens={name: counts["tokens"] for name, counts in counts_by_split.items()},
        labels=list(data.labels),
        class_counts=count_classes(data),
        warnings=list(data.warnings),
        chosen_on_test=data.chosen_on_test,
        rows_sha256=data.rows_sha256,
        prompt_format=get_prompt_format(job),
        conversation=_collect_conversation_terms(job, data),
        metric_version=METRIC_VERSION,
        custom_metrics={
            name: compute_metric_digest(metric)
            for name, metric in job.evaluate.custom_metrics.items()
        },
        versions={name: version(name) for name in _PACKAGES},
    )
