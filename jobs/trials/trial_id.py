"""Compute a trial's id: a hash of exactly the values that its weights depend on.

The budget is not part of it, because the same trial can be trained longer. Names, tracking,
hardware and the search around the trial are not part of it either.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.jobs.data.adapters import ADAPTER_FILES
from lorafleet.jobs.data.inputs import JobInput, resolve_inputs
from lorafleet.jobs.data.split_files import SPLIT_VERSION, get_split_files
from lorafleet.jobs.files import compute_file_digest
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.defaults import resolve_learning_rate

TRAINING_VERSION = 2
"""Increased with every change to what training does with the same values; older ids then no
longer match.
"""
_PROMPT_FORMATS = {"classification": 1, "generation": 2}
"""Task -> version of how its rows become tokens, increased with every change. Version 2:
conversations are rendered with their chat template; every turn of the assistant is learnt,
through the token that ends it.
"""

_CONVERSATION_FIELDS = (
    "messages_column",
    "system_prompt",
    "chat_template",
    "chat_template_kwargs",
    "assistant_only_loss",
    "train_on_turns",
)
_DATA_FIELDS = (
    "format",
    "text_column",
    "label_column",
    "prompt_column",
    "completion_column",
    "max_train_samples",
    "split_seed",
)
METHOD_BLOCKS: dict[str, tuple[str, ...]] = {
    "lora": ("lora",),
    "qlora": ("lora", "qlora"),
    "prompt_tuning": ("prompt_tuning",),
    "full": (),
}
"""Method -> the blocks of the job file that it uses."""
# The budget, evaluations, what only saves memory or time, and how a batch is split.
# `build_identity` adds the rows of an optimiser step instead of the last three.
_IGNORED_TRAIN_FIELDS = {
    "num_train_epochs",
    "max_steps",
    "eval_steps",
    "checkpoint_minutes",
    "per_device_eval_batch_size",
    "chunked_loss",
    "padding_free",
    "torch_compile",
    "gradient_checkpointing",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
}


@dataclass(frozen=True)
class Provenance:
    """The exact files and values behind the names in a job file.

    A run stores it in facts.json. A resumed run whose data or model has other digests is
    refused, because its trials could not be compared with the earlier ones.
    """

    data_sha256: dict[str, str]
    """Split -> SHA-256 of its data file."""
    model_revisions: dict[str, str]
    """Model name -> what identifies its weights and tokenizer."""
    learning_rates: dict[str, float]
    """Method -> default learning rate for this job's model."""
    adapter_sha256: str = ""
    """SHA-256 of `train.init_adapter`; empty if the job has none."""


def compute_provenance(job: JobSpec) -> Provenance:
    """Return the digests of a job's data, models and adapter, and its default learning rates.

    Raises:
        AssetError: If a model is not on this machine.
        DataError: If a data file is not on this machine.
    """
    adapter = job.train.init_adapter
    # `resolve_learning_rate` returns the job's own rate if it has one. Here the default of each
    # method is needed: a search may vary the method.
    job_without_rate = job.model_copy(
        update={"train": job.train.model_copy(update={"learning_rate": None})}
    )
    return Provenance(
        {split: compute_file_digest(path) for split, path in get_split_files(job.data).items()},
        _resolve_revisions(resolve_inputs(job).models),
        {
            method: resolve_learning_rate(
                job_without_rate.model_copy(update={"method": method})
            ).value
            for method in METHOD_BLOCKS
        },
        compute_file_digest(Path(adapter) / ADAPTER_FILES[1]) if adapter else "",
    )


def _resolve_revisions(models: list[JobInput]) -> dict[str, str]:
    """Return model -> what identifies it.

    A model that arms use in several revisions is listed as NAME and as NAME@REVISION.
    """
    revisions: dict[str, str] = {}
    for model in models:
        # Also for a revision of None: two entries must not share a name.
        is_further = model.reference in revisions
        name = f"{model.reference}@{model.revision}" if is_further else model.reference
        revisions[name] = model.resolve_revision()
    return revisions


def get_base_revision(revisions: dict[str, str], job: JobSpec) -> str | None:
    """Return what identifies the base of a job (or of an arm's job), or None.

    Args:
        revisions: `Provenance.model_revisions`: keys are NAME, or NAME@REVISION for further
            revisions.
        job: The job whose base is looked up.
    """
    name = job.model.model_name_or_path
    return revisions.get(f"{name}@{job.model.revision}", revisions.get(name))


def get_prompt_format(job: JobSpec) -> int:
    """Return the version of how this job's rows become tokens."""
    return _PROMPT_FORMATS["generation" if job.is_generative else job.task]


def get_conversation_settings(job: JobSpec) -> dict[str, Any]:
    """Return the settings that decide how conversations are rendered and learnt."""
    return (
        job.data.model_dump(mode="json", include=set(_CONVERSATION_FIELDS))
        if job.is_generative
        else {}
    )


_OPTIONAL_TRAIN_FIELDS = ("warmup_steps", "early_stopping_patience", "packing")
"""Fields of `train` that are part of an identity only if they are set, so that earlier trials
keep their ids.
"""


def compute_trial_id(job: JobSpec, provenance: Provenance) -> str:
    """Return a trial's id: ten hex digits of the SHA-256 of its identity.

    It names the trial's folder, and the search recognises a configuration by it. Each
    change to `build_identity` gives all trials new ids (docs/development/release.md).

    Raises:
        KeyError: The provenance does not hold the job's base model.
    """
    text = json.dumps(build_identity(job, provenance), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def build_identity(job: JobSpec, provenance: Provenance) -> dict[str, Any]:
    """Return the values that a trial's weights depend on.

    Raises:
        KeyError: If the provenance does not hold the job's base model.
    """
    raw = job.model_dump(mode="json")
    train = {key: value for key, value in raw["train"].items() if key not in _IGNORED_TRAIN_FIELDS}
    for name in _OPTIONAL_TRAIN_FIELDS:
        if train[name] is None or train[name] is False:
            del train[name]
    train["learning_rate"] = job.train.learning_rate or provenance.learning_rates[job.method]
    train["init_adapter"] = provenance.adapter_sha256
    # The rows of an optimiser step decide the result; processes and micro-batches only share them
    # out.
    train["batch_rows"] = job.train.compute_effective_batch_size(job.resources.world_size)
    revision = get_base_revision(provenance.model_revisions, job)
    if revision is None:
        raise KeyError(job.model.model_name_or_path)
    data = {key: fields.get_value(raw, f"data.{key}") for key in _DATA_FIELDS}
    data |= get_conversation_settings(job)
    if job.data.fold is not None:
        data["fold"] = [job.data.fold, job.evaluate.folds]
    if job.data.labels is not None:
        data["labels"] = raw["data"]["labels"]
    # Validation rows are held back from the training rows, so the fraction changes what is trained
    # on.
    if "validation" not in provenance.data_sha256:
        data |= {
            "validation_fraction": job.data.validation_fraction,
            "split_version": SPLIT_VERSION,
        }
    if (
        job.train.early_stopping_patience is not None
    ):  # early stopping: what is evaluated, and when, decides when training ends
        train["early_stopping"] = {
            "eval_steps": job.train.eval_steps,
            "metric": job.metric.model_dump(mode="json"),
            "rows": [
                job.data.max_validation_samples,
                None if "test" in provenance.data_sha256 else job.data.test_fraction,
            ],
        }
    return {
        # The training of classifiers has changed once without that of other tasks, which kept their
        # ids.
        "training_version": TRAINING_VERSION + (job.task == "classification"),
        "prompt_format": get_prompt_format(job),
        # Summarisation trains exactly as generation does; only its metrics differ.
        "task": "generation" if job.is_generative else job.task,
        "method": job.method,
        "model": {
            "revision": revision,
            "max_length": job.model.max_length,
            "dtype": job.model.dtype,
        },
        "data": data | {"sha256": provenance.data_sha256},
        "adapter": {block: raw[block] for block in METHOD_BLOCKS[job.method]},
        "train": train,
    }
