"""A trial's id: a hash of everything that its weights depend on, and of nothing else.

The budget is outside: the same trial can be trained longer. So are names, tracking, hardware and the search around it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.data.adapters import ADAPTER_FILES
from lorafleet.jobs.data.hub import model_revision
from lorafleet.jobs.data.rows import split_files
from lorafleet.jobs.data.splits import SPLIT_VERSION
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.defaults import learning_rate

TRAINING_VERSION = 1
"""Raised with every change to what our training does with the same values; old ids then no longer match."""
_PROMPT_FORMATS = {"classification": 1, "generation": 2}
"""Task -> version of how its rows become tokens, raised with every change. 2: conversations as their chat template says
(every turn of the assistant is learnt, through the token that ends it)."""

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
"""Method -> the blocks of the job file that it looks at."""
_OUTSIDE_TRAIN = {
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
class Facts:
    """What a job file alone does not say: which bytes its names stand for."""

    data_sha256: dict[str, str]
    """Digest of each data file, by split."""
    model_revisions: dict[str, str]
    """Model name -> what identifies its weights and tokenizer."""
    learning_rates: dict[str, float]
    """Method -> what a learning rate that is left out means here."""
    adapter_sha256: str = ""
    """Digest of `train.init_adapter`."""


def facts_of(job: JobSpec) -> Facts:
    """Digests of a job's data, models and adapter. Raises AssetError or DataError where one is not on this machine."""
    adapter = job.train.init_adapter
    bare = job.model_copy(update={"train": job.train.model_copy(update={"learning_rate": None})})
    return Facts(
        {split: files.sha256_file(path) for split, path in split_files(job.data).items()},
        _revisions(job),
        {method: learning_rate(bare.model_copy(update={"method": method})).value for method in METHOD_BLOCKS},
        files.sha256_file(Path(adapter) / ADAPTER_FILES[1]) if adapter else "",
    )


def _revisions(job: JobSpec) -> dict[str, str]:
    """Model -> what identifies it; one that arms have in several revisions is there as NAME, and as NAME@REVISION."""
    found: dict[str, str] = {}
    for name, revision in bases_of(job):
        found[f"{name}@{revision}" if name in found else name] = model_revision(name, revision)
    return found


def known_revision(revisions: dict[str, str], job: JobSpec) -> str | None:
    """What identifies the base of a job (an arm's own, it may be) among `model_revisions`."""
    name = job.model.model_name_or_path
    return revisions.get(f"{name}@{job.model.revision}", revisions.get(name))


_MODEL = "model.model_name_or_path"


def bases_of(job: JobSpec) -> list[tuple[str, str | None]]:
    """(name, revision) of the base models that a job, its search or its arms name, each once."""
    name, revision = job.model.model_name_or_path, job.model.revision
    parameter = job.search.parameters.get(_MODEL) if job.search else None
    found = [(name, revision)]
    found += [(str(value), revision) for value in (parameter.values if parameter else None) or []]
    for arm in job.compare.arms.values() if job.compare else ():
        own = str(arm.set.get(_MODEL, name))
        known = None if _MODEL in arm.set else revision  # the job's is of another model
        found.append((own, arm.set.get("model.revision", known)))
    return list(dict.fromkeys(found))


def models_of(job: JobSpec) -> list[str]:
    """Their names."""
    return list(dict.fromkeys(name for name, _ in bases_of(job)))


def encoders_of(job: JobSpec) -> list[str]:
    """The models that a job's metrics need."""
    return [job.evaluate.bertscore_model] if "bertscore_f1" in job.text_metrics else []


def prompt_format(job: JobSpec) -> int:
    """Return the version of how this job's rows become tokens."""
    return _PROMPT_FORMATS["generation" if job.generates else job.task]


def conversation_terms(job: JobSpec) -> dict[str, Any]:
    """Return what decides how a conversation is rendered and which part of it is learnt."""
    return job.data.model_dump(mode="json", include=set(_CONVERSATION_FIELDS)) if job.generates else {}


_WHERE_SET = ("warmup_steps", "early_stopping_patience", "packing")
"""Fields of `train` that are part of an identity only where they are set: earlier trials keep theirs."""


def trial_id(job: JobSpec, facts: Facts) -> str:
    """Ten hex digits of the SHA-256 of `identity`."""
    text = json.dumps(identity(job, facts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def identity(job: JobSpec, facts: Facts) -> dict[str, Any]:
    """The values that a trial's weights depend on."""
    raw = job.model_dump(mode="json")
    train = {key: value for key, value in raw["train"].items() if key not in _OUTSIDE_TRAIN}
    for name in _WHERE_SET:
        if train[name] is None or train[name] is False:
            del train[name]
    train["learning_rate"] = job.train.learning_rate or facts.learning_rates[job.method]
    train["init_adapter"] = facts.adapter_sha256
    train["batch_rows"] = job.train.effective_batch_size(job.resources.world_size)
    revision = known_revision(facts.model_revisions, job)
    if revision is None:
        raise KeyError(job.model.model_name_or_path)
    data = {key: fields.get(raw, f"data.{key}") for key in _DATA_FIELDS}
    data |= conversation_terms(job)
    if job.data.fold is not None:
        data["fold"] = [job.data.fold, job.evaluate.folds]
    if job.data.labels is not None:
        data["labels"] = raw["data"]["labels"]
    if "validation" not in facts.data_sha256:
        data |= {"validation_fraction": job.data.validation_fraction, "split_version": SPLIT_VERSION}
    if job.train.early_stopping_patience is not None:  # then what an evaluation sees, and when, decides when it ends
        train["early_stopping"] = {
            "eval_steps": job.train.eval_steps,
            "metric": job.metric.model_dump(mode="json"),
            "rows": [job.data.max_validation_samples, None if "test" in facts.data_sha256 else job.data.test_fraction],
        }
    return {
        "training_version": TRAINING_VERSION + (job.task == "classification"),
        "prompt_format": prompt_format(job),
        "task": "generation" if job.generates else job.task,
        "method": job.method,
        "model": {
            "revision": revision,
            "max_length": job.model.max_length,
            "dtype": job.model.dtype,
        },
        "data": data | {"sha256": facts.data_sha256},
        "adapter": {block: raw[block] for block in METHOD_BLOCKS[job.method]},
        "train": train,
    }
