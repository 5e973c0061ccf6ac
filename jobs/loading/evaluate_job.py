"""Turn existing models into the arms of a comparison that trains nothing.

`lorafleet evaluate` takes runs, adapters and models in any mixture. Each becomes an arm
with `weights` (or an untrained base), so that the same code evaluates, compares and
reports them as for a comparison that trains.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.data.adapters import ADAPTER_FILES, read_config
from lorafleet.jobs.data.hub import resolve_public_base
from lorafleet.jobs.errors import UserError
from lorafleet.jobs.loading.job_file import is_path_like
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.job import JobSpec
from lorafleet.jobs.trials.arms import build_arm_job, get_arm

_PEFT_METHODS = {"LORA": "lora", "PROMPT_TUNING": "prompt_tuning"}
_SHARED = ("model", "qlora", "prompt_tuning")
"""Blocks that define a model's base: an arm keeps those of the run that it comes from."""


@dataclass(frozen=True)
class ModelArm:
    """An existing model, and what its arm sets in the job that evaluates it.

    `name` is for display and need not be valid or unique in a job file: `name_arms` makes
    it so. `arm` has the layout of `compare.arms.NAME`.
    """

    name: str
    arm: dict[str, Any]


def make_run_arm(run: Run, trial_id: str, weights: Path) -> ModelArm:
    """Return the arm of a run's trial, with its weights on its own base.

    Args:
        run: The run.
        trial_id: The trial. Its record names the base and the method; the files beside the
            weights are used if the record is gone.
        weights: Folder of its weights.
    """
    resolved = run.get_trial(trial_id).read_params().resolved
    return _make_resolved_arm(run.id, resolved or _read_training_settings(weights), weights)


def _read_training_settings(weights: Path) -> dict[str, Any]:
    """Return the settings with which weights were trained.

    They are read from the trial's folder or from the manifest beside the weights; empty if both
    are gone.
    """
    settings: dict[str, Any] = files.read_json(weights.parent / "params.json").get("resolved", {})
    return settings or files.read_json(weights / "manifest.json").get("resolved", {})


def _make_resolved_arm(name: str, resolved: dict[str, Any], weights: Path) -> ModelArm:
    """Return the arm of weights whose training settings are known.

    A `model.revision` of None is set too: the job that evaluates may name a revision, which
    belongs to its own base.
    """
    values = {
        path: fields.get_value(resolved, path)
        for path in fields.get_leaf_fields()
        if path.partition(".")[0] in _SHARED
    }
    overrides = {
        path: value
        for path, value in values.items()
        if value is not None or path == "model.revision"
    }
    return ModelArm(
        name, {"method": resolved.get("method", "lora"), "weights": str(weights), "set": overrides}
    )


def make_compared_arm(run: Run, job: JobSpec, name: str, weights: Path | None) -> ModelArm:
    """Return the arm of a comparison's result that is not a trial on its own base.

    It is an untrained base, or an adapter on another base.

    Args:
        run: The comparison's run.
        job: Its job.
        name: The arm of that job.
        weights: Folder of the adapter; None for an untrained base.
    """
    spec, arm_job = get_arm(job, name), build_arm_job(job, name)
    paths = [path for path in fields.get_leaf_fields() if path.startswith(("model.", "qlora."))]
    base_values = {path: fields.get_value(arm_job.model_dump(), path) for path in paths}
    overrides = {
        path: value
        for path, value in base_values.items()
        if value is not None or path == "model.revision"
    }
    if weights is None:
        return ModelArm(
            run.id, {"method": "base", "quantization": spec.quantization, "set": overrides}
        )
    return ModelArm(run.id, {"method": arm_job.method, "weights": str(weights), "set": overrides})


def make_folder_arm(folder: Path) -> ModelArm:
    """Return the arm of a folder that holds an adapter or a model.

    An adapter that lorafleet saved brings its base along, from the files beside it. Any
    other adapter is evaluated on the job's base, which `check_base` compares with its
    config.

    Args:
        folder: The folder.

    Raises:
        UserError: If the folder holds neither, or an adapter of another type than LoRA and
            prompt tuning.
    """
    config = folder / ADAPTER_FILES[0]
    if config.is_file():
        kind = (read_config(folder) or {}).get("peft_type")
        # Only adapters that lorafleet can train are evaluated: other types have no method in an
        # arm.
        if kind not in _PEFT_METHODS:
            raise UserError(
                f"{folder} is an adapter of type {kind}, but the type must be "
                f"{' or '.join(_PEFT_METHODS)}"
            )
        # A folder called `adapter` or `model` says nothing; its parent has the name.
        display_name = folder.parent.name if folder.name in ("adapter", "model") else folder.name
        resolved = _read_training_settings(folder.absolute())
        if resolved:
            return _make_resolved_arm(display_name, resolved, folder.absolute())
        return ModelArm(
            display_name, {"method": _PEFT_METHODS[kind], "weights": str(folder.absolute())}
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has neither {ADAPTER_FILES[0]} nor config.json, so it is neither an adapter "
            "nor a model"
        )
    return make_model_arm(str(folder.absolute()), folder.name)


def check_base(model: ModelArm, job: JobSpec) -> None:
    """Raise UserError if an adapter was trained on another base of the hub than the job's.

    Only adapters without known training settings are checked, and only if both names can be
    compared: a local path says nothing about which model it holds.

    Args:
        model: The arm.
        job: The job that evaluates it.
    """
    config = Path(str(model.arm.get("weights", ""))) / ADAPTER_FILES[0]
    if "set" in model.arm or not config.is_file():
        return
    trained_on, job_base = (
        (read_config(config.parent) or {}).get("base_model_name_or_path"),
        job.model.model_name_or_path,
    )
    hub_names = [
        name for name in (trained_on, job_base) if isinstance(name, str) and is_model_name(name)
    ]
    ids = {resolve_public_base(name, None)[0].casefold() for name in hub_names}
    # An asset counts as the hub model that it is a copy of, and the case of hub ids does not
    # matter.
    if len(hub_names) == 2 and len(ids) == 2:
        raise UserError(
            f"{config.parent} was trained on {trained_on}, but the job's base is {job_base}: set "
            f"model.model_name_or_path={trained_on}"
        )


def make_model_arm(name: str, display_name: str | None = None) -> ModelArm:
    """Return the arm of a whole model: a hub id, an asset or a folder."""
    return ModelArm(
        display_name or name, {"method": "base", "set": {"model.model_name_or_path": name}}
    )


def is_model_name(text: str) -> bool:
    """Return whether a text names a hub model or an asset, and not a path or a run.

    A hub id has exactly one slash. A relative folder of that form must be written as
    `./a/b`.
    """
    return text.startswith("asset:") or (text.count("/") == 1 and not is_path_like(text))


def name_arms(models: list[ModelArm]) -> dict[str, dict[str, Any]]:
    """Return the arms by names that are valid in a job file, each unique.

    Names are lower-case letters, digits and dashes, at most 36 characters and a number.

    Args:
        models: The arms, in the order in which they are to be shown.
    """
    arms: dict[str, dict[str, Any]] = {}
    for model in models:
        name = re.sub(r"[^a-z0-9]+", "-", model.name.lower()).strip("-")[:36].strip("-") or "model"
        number = 2
        unique = name
        while unique in arms:
            unique, number = f"{name}-{number}", number + 1
        arms[unique] = model.arm
    return arms
