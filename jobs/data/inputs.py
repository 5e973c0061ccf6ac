"""Everything that a job takes from outside: models, data, adapters, files of metrics.

`resolve_inputs` lists it once. Fetching, uploading, checking and provenance are functions
of that list, so a new kind of source has one place to be added to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from lorafleet.jobs.data.assets import PREFIX, get_asset_folder
from lorafleet.jobs.data.custom_metric_files import get_metric_file
from lorafleet.jobs.data.hub import (
    HubName,
    check_complete,
    get_dataset_folder,
    get_model_folder,
    resolve_model_revision,
)
from lorafleet.jobs.schema.job import JobSpec

Source = Literal["path", "asset", "hub"]
"""Source of an input: a path of this machine, an asset of lorafleet, or the hub."""
Role = Literal["model", "encoder", "dataset", "data_file", "adapter", "config", "metric"]
"""Use of an input."""
_MODEL = "model.model_name_or_path"
_PATH_STARTS = ("/", "./", "../", "~")


@dataclass(frozen=True)
class JobInput:
    """One input of a job."""

    field: str
    """Dotted field that names it. For a model of the search or of an arm it is the job's own
    `model.model_name_or_path`.
    """
    reference: str
    """The name, as the job has it."""
    role: Role
    revision: str | None = None
    """Revision of a hub model or data set."""
    config: str | None = None
    """Configuration of a hub data set."""

    @property
    def source(self) -> Source:
        """Return where the input comes from."""
        if self.reference.startswith(_PATH_STARTS) or self.role not in (
            "model",
            "encoder",
            "dataset",
        ):
            return "path"
        return "asset" if self.reference.startswith(PREFIX) else "hub"

    def __str__(self) -> str:
        return str(HubName(self.reference, self.revision))

    @cached_property
    def path(self) -> Path:
        """Return the file or folder of the input on this machine.

        Raises AssetError if a model, an encoder or an asset is not there. Other files need not
        exist.
        """
        if self.role in ("model", "encoder"):
            return get_model_folder(self.reference, self.revision)
        if self.source == "asset":
            return get_asset_folder(self.reference)
        if self.source == "hub":
            return get_dataset_folder(self.reference, self.revision, self.config)
        return Path(self.reference)

    def check_complete(self) -> None:
        """Raise AssetError if a model or an encoder lacks weights or a tokenizer."""
        if self.role in ("model", "encoder"):
            check_complete(self.reference, self.revision)

    def resolve_revision(self) -> str:
        """Return what identifies the weights and the tokenizer of a model or an encoder.

        Raises AssetError if it is not on this machine, or its files were changed.
        """
        return resolve_model_revision(self.reference, self.revision)


@dataclass(frozen=True)
class JobInputs:
    """All inputs of a job, its search and its arms. Each model is listed once."""

    items: tuple[JobInput, ...]

    @property
    def models(self) -> list[JobInput]:
        """Return the base models."""
        return [item for item in self.items if item.role == "model"]

    @property
    def encoders(self) -> list[JobInput]:
        """Return the models that metrics need."""
        return [item for item in self.items if item.role == "encoder"]

    @property
    def dataset(self) -> JobInput | None:
        """Return the data set; None if the job names files only."""
        return next((item for item in self.items if item.role == "dataset"), None)

    @property
    def paths(self) -> list[JobInput]:
        """Return what the job names by a path of this machine."""
        return [item for item in self.items if item.source == "path"]

    @property
    def fetched(self) -> list[JobInput]:
        """Return what `lorafleet fetch` brings: assets, and models and data of the hub."""
        return [item for item in self.items if item.source != "path"]


def resolve_inputs(job: JobSpec) -> JobInputs:
    """Return all inputs of a job. Nothing is read yet.

    Args:
        job: The job, as loaded: its paths are absolute.
    """
    data, resources = job.data, job.resources
    items = [
        JobInput(f"data.{field}", path, "data_file")
        for field in ("train_file", "validation_file", "test_file")
        if (path := getattr(data, field))
    ]
    if data.dataset_name:
        items.append(
            JobInput(
                "data.dataset_name",
                data.dataset_name,
                "dataset",
                data.dataset_revision,
                data.dataset_config_name,
            )
        )
    if job.train.init_adapter:
        items.append(JobInput("train.init_adapter", job.train.init_adapter, "adapter"))
    if resources.deepspeed_config:
        items.append(JobInput("resources.deepspeed_config", resources.deepspeed_config, "config"))
    items += [JobInput(_MODEL, name, "model", revision) for name, revision in list_base_models(job)]
    items += [
        JobInput("evaluate.bertscore_model", name, "encoder") for name in list_metric_models(job)
    ]
    items += [
        JobInput(f"compare.arms.{name}.weights", arm.weights, "adapter")
        for name, arm in (job.compare.arms.items() if job.compare else ())
        if arm.weights
    ]
    items += [
        JobInput(f"evaluate.custom_metrics.{name}.function", get_metric_file(metric), "metric")
        for name, metric in job.evaluate.custom_metrics.items()
    ]
    return JobInputs(tuple(items))


def list_base_models(job: JobSpec) -> list[tuple[str, str | None]]:
    """Return (name, revision) of the base models of a job, its search and its arms.

    Each pair is listed once.
    """
    name, revision = job.model.model_name_or_path, job.model.revision
    parameter = job.search.parameters.get(_MODEL) if job.search else None
    bases = [(name, revision)]
    bases += [(str(value), revision) for value in (parameter.values if parameter else None) or []]
    for arm in job.compare.arms.values() if job.compare else ():
        arm_model = str(arm.set.get(_MODEL, name))
        # The job's revision belongs to its own model.
        default_revision = None if _MODEL in arm.set else revision
        bases.append((arm_model, arm.set.get("model.revision", default_revision)))
    return list(dict.fromkeys(bases))


def list_metric_models(job: JobSpec) -> list[str]:
    """Return the models that a job's metrics need."""
    return [job.evaluate.bertscore_model] if "bertscore_f1" in job.text_metrics else []
