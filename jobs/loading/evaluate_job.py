"""Models that were made before, as the arms of a comparison that trains nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.data.adapters import ADAPTER_FILES, read_config
from lorafleet.jobs.data.hub import public_base
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.loading.job_file import looks_like_path
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.arms import arm_of, own_job

_PEFT_METHODS = {"LORA": "lora", "PROMPT_TUNING": "prompt_tuning"}
_SHARED = ("model", "qlora", "prompt_tuning")
"""Blocks that say what a model's base is: an arm keeps those of the run that it is from."""


@dataclass(frozen=True)
class Given:
    """One model, and what its arm sets of the job that judges it."""

    name: str
    arm: dict[str, Any]


def of_run(run: Run, trial_id: str, weights: Path) -> Given:
    """The weights of a run's trial, on its own base."""
    resolved = run.trial(trial_id).params().get("resolved", {})
    return _of_resolved(run.id, resolved or _resolved_beside(weights), weights)


def _resolved_beside(weights: Path) -> dict[str, Any]:
    """What a trial that left these weights was trained as, where its folder or its card is still there."""
    found: dict[str, Any] = files.read_json(weights.parent / "params.json").get("resolved", {})
    return found or files.read_json(weights / "manifest.json").get("resolved", {})


def _of_resolved(name: str, resolved: dict[str, Any], weights: Path) -> Given:
    values = {path: fields.get(resolved, path) for path in fields.leaves() if path.partition(".")[0] in _SHARED}
    known = {path: value for path, value in values.items() if value is not None or path == "model.revision"}
    return Given(name, {"method": resolved.get("method", "lora"), "weights": str(weights), "set": known})


def of_arm(run: Run, job: JobSpec, name: str, weights: Path | None) -> Given:
    """What a comparison ships where that is no trial on its own base: an untrained base, or an adapter on another."""
    spec, own = arm_of(job, name), own_job(job, name)
    paths = [path for path in fields.leaves() if path.startswith(("model.", "qlora."))]
    base = {path: fields.get(own.model_dump(), path) for path in paths}
    known = {path: value for path, value in base.items() if value is not None or path == "model.revision"}
    if weights is None:
        return Given(run.id, {"method": "base", "quantization": spec.quantization, "set": known})
    return Given(run.id, {"method": own.method, "weights": str(weights), "set": known})


def of_folder(folder: Path) -> Given:
    """An adapter's folder, or a model's. Raises UserError for what is neither."""
    config = folder / ADAPTER_FILES[0]
    if config.is_file():
        kind = (read_config(folder) or {}).get("peft_type")
        if kind not in _PEFT_METHODS:
            raise UserError(f"{folder} holds an adapter of type {kind}, but must be {' or '.join(_PEFT_METHODS)}")
        shown = folder.parent.name if folder.name in ("adapter", "model") else folder.name
        resolved = _resolved_beside(folder.absolute())
        if resolved:
            return _of_resolved(shown, resolved, folder.absolute())
        return Given(shown, {"method": _PEFT_METHODS[kind], "weights": str(folder.absolute())})
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds neither {ADAPTER_FILES[0]} nor config.json: it is no adapter and no model")
    return of_model(str(folder.absolute()), folder.name)


def check_base(model: Given, job: JobSpec) -> None:
    """Raises UserError for an adapter of somebody else's that names another base of the hub than the job does."""
    config = Path(str(model.arm.get("weights", ""))) / ADAPTER_FILES[0]
    if "set" in model.arm or not config.is_file():
        return
    trained_on, ours = (read_config(config.parent) or {}).get("base_model_name_or_path"), job.model.model_name_or_path
    both = [name for name in (trained_on, ours) if isinstance(name, str) and is_model_name(name)]
    ids = {public_base(name, None)[0].casefold() for name in both}
    if len(both) == 2 and len(ids) == 2:
        raise UserError(
            f"{config.parent} was trained on {trained_on}, but the job's base is {ours}: "
            f"set model.model_name_or_path={trained_on}"
        )


def of_model(name: str, shown: str | None = None) -> Given:
    """A whole model: a hub id, an asset, or a folder."""
    return Given(shown or name, {"method": "base", "set": {"model.model_name_or_path": name}})


def is_model_name(text: str) -> bool:
    """Whether a text names a model of the hub or an asset, and no path or run."""
    return text.startswith("asset:") or (text.count("/") == 1 and not looks_like_path(text))


def named(models: list[Given]) -> dict[str, dict[str, Any]]:
    """Arms by names that a job file may have, each once."""
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        name = re.sub(r"[^a-z0-9]+", "-", model.name.lower()).strip("-")[:36].strip("-") or "model"
        number = 2
        unique = name
        while unique in found:
            unique, number = f"{name}-{number}", number + 1
        found[unique] = model.arm
    return found
